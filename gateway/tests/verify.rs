//! VERIFY MIRROR through the gateway: rows in the extended protocol, cancel requests, timeouts, transactions.

use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls};

use crate::stage::Stage;

fn rows(rows: &[tokio_postgres::Row]) -> Vec<(String, String, i64, i64)> {
    rows.iter().map(|r| (r.get("table"), r.get("result"), r.get("different"), r.get("repaired"))).collect()
}

fn of(table: &str, result: &str, different: i64, repaired: i64) -> (String, String, i64, i64) {
    (table.to_owned(), result.to_owned(), different, repaired)
}

/// Begins a verification that cannot end: a transaction that writes keeps the source from giving a snapshot.
async fn held_up(stage: &Stage) -> Client {
    let writer = stage.on_source().await;
    writer.batch_execute("begin; update accounts set balance = balance where id = 1").await.unwrap();
    writer
}

const LAST: &str = "(select state from tasks where kind = 'verify_mirror' order by id desc limit 1)";

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_is_prepared_bound_and_read_like_any_query() {
    let stage = Stage::start().await;
    stage.create_mirror().await;
    stage.caught_up().await;
    let mut client = stage.on_gateway().await;
    let verify = client.prepare("verify mirror m table accounts, events").await.unwrap();
    let names: Vec<&str> = verify.columns().iter().map(|c| c.name()).collect();
    assert_eq!(names[..5], ["table", "target", "result", "source_rows", "target_rows"]);
    let equal = [of("public.accounts", "equal", 0, 0), of("public.events", "equal", 0, 0)];
    assert_eq!(rows(&client.query(&verify, &[]).await.unwrap()), equal);
    stage.on_target().await.batch_execute("update accounts set note = 'x' where id in (5, 6)").await.unwrap();
    let different = [of("public.accounts", "different", 2, 0), of("public.events", "equal", 0, 0)];
    assert_eq!(rows(&client.query(&verify, &[]).await.unwrap()), different);

    // What is mended stays: not in a transaction that may be rolled back. Looking is allowed there.
    let repair = client.prepare("verify mirror m table accounts repair").await.unwrap();
    let transaction = client.transaction().await.unwrap();
    assert_eq!(rows(&transaction.query(&verify, &[]).await.unwrap()), different);
    let error = transaction.query(&repair, &[]).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::ACTIVE_SQL_TRANSACTION), "{error:?}");
    transaction.rollback().await.unwrap();
    assert_eq!(rows(&client.query(&repair, &[]).await.unwrap()), [of("public.accounts", "repaired", 2, 2)]);
    assert_eq!(rows(&client.query(&verify, &[]).await.unwrap()), equal);
    stage.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_ends_with_whoever_waits_for_it() {
    let stage = Stage::start().await;
    stage.create_mirror().await;
    stage.caught_up().await;
    let writer = held_up(&stage).await;
    let client = stage.on_gateway().await;
    let cancel = client.cancel_token();
    let waiting = tokio::spawn(async move { (client.query("verify mirror m", &[]).await, client) });
    stage.wait_until(&format!("select {LAST} = 'running'")).await;
    cancel.cancel_query(NoTls).await.unwrap();
    let (result, client) = waiting.await.unwrap();
    assert_eq!(result.unwrap_err().code(), Some(&SqlState::QUERY_CANCELED));
    stage.wait_until(&format!("select {LAST} = 'canceled'")).await;

    client.batch_execute("set statement_timeout = '300ms'").await.unwrap();
    let error = client.query("verify mirror m", &[]).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::QUERY_CANCELED));
    client.batch_execute("set statement_timeout = 0").await.unwrap();
    stage.wait_until(&format!("select {LAST} = 'canceled'")).await;

    // Nothing of it is left: the next one goes through, and the stream with it.
    writer.batch_execute("commit").await.unwrap();
    let found = tokio::time::timeout(Duration::from_secs(60), client.query("verify mirror m", &[])).await.unwrap();
    assert!(rows(&found.unwrap()).iter().all(|(_, result, ..)| result == "equal"));
    stage.caught_up().await;
    let slots = "select count(*) from pg_replication_slots where temporary";
    assert_eq!(stage.on_source().await.query_one(slots, &[]).await.unwrap().get::<_, i64>(0), 0);
}
