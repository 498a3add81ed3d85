//! What cannot be applied stops the mirror exactly there.

use crate::support::{Fixture, ask, describe, start};

/// Runs transactions on the source while the target's table is locked, so that they are gathered in one batch. Returns where each one's
/// commit is: after the position before it.
async fn gathered(fixture: &Fixture, transactions: &[&str]) -> Vec<String> {
    let locker = fixture.connect_target().await;
    locker.batch_execute("begin; lock table t in exclusive mode").await.unwrap();
    fixture
        .source
        .batch_execute("insert into t values (0, 0, 'first') on conflict (id) do update set v = 'again'")
        .await
        .unwrap();
    let waits = "select count(*) > 0 from pg_locks where not granted";
    assert!(crate::support::eventually(async || ask(&fixture.target, waits).await == "t").await);
    let mut positions = Vec::new();
    for transaction in transactions {
        positions.push(ask(&fixture.source, "select pg_current_wal_lsn()").await);
        fixture.source.batch_execute(transaction).await.unwrap();
    }
    positions.push(ask(&fixture.source, "select pg_current_wal_lsn()").await);
    locker.batch_execute("commit").await.unwrap();
    positions
}

#[tokio::test(flavor = "multi_thread")]
async fn what_precedes_a_row_that_cannot_be_written_is_applied_and_the_row_is_named() {
    let fixture = start().await;
    let schema = "create table t (id int primary key, n int, v text); create table other (id int primary key)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.target.batch_execute("alter table t add constraint small check (n < 100)").await.unwrap();
    let many = "insert into t select i, 1, 'many' from generate_series(1000, 1100) i";
    let positions = gathered(
        &fixture,
        &[
            "insert into t values (1, 1, 'a')",
            many,
            "begin; insert into other values (1); update t set n = 2 where id = 1; commit",
            "begin; insert into t values (2, 2, 'b'); update t set n = 3 where id >= 1000; update t set n = 100 where id = 1050; insert into other values (2); commit",
            "insert into t values (3, 3, 'after')",
        ],
    )
    .await;
    let error = fixture.try_caught_up().await.unwrap_err();
    for said in ["23514", r#"constraint "small""#, r#"table "public.t""#, "(1050, 100"] {
        assert!(error.contains(said), "{said}\n{error}");
    }
    assert_eq!(ask(&fixture.target, "select count(*) || ' ' || min(n) || ' ' || max(n) from t").await, "103 0 2");
    assert_eq!(ask(&fixture.target, "select string_agg(id::text, ',') from other").await, "1");
    let lsn = format!(
        "select lsn >= '{}' and lsn < '{}' from peergate.mirror_events where level = 'error' order by id desc limit 1",
        positions[3], positions[4]
    );
    assert_eq!(fixture.ask(&lsn).await, "t");
    // A row that is missing is named just as well, among many that are not.
    fixture.target.batch_execute("alter table t drop constraint small").await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    fixture.target.batch_execute("delete from t where id = 1077").await.unwrap();
    gathered(
        &fixture,
        &["insert into t values (4, 4, 'd')", "update t set n = 9 where id > 1000", "delete from t where id = 4"],
    )
    .await;
    let error = fixture.try_caught_up().await.unwrap_err();
    assert!(
        error.contains("1 of 100 rows to update are missing") && error.contains("The row is (id)=(1077)."),
        "{error}"
    );
    assert_eq!(ask(&fixture.target, "select v from t where id = 4").await, "d");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_in_the_way_is_named_whatever_its_batch() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key, n int, v text unique)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"batch_rows_max": "40"}"#).await;
    fixture.caught_up().await;
    fixture.target.batch_execute("insert into t values (-1, 0, 'in the way')").await.unwrap();
    // The transaction is larger than a batch: the one before it is in its first part.
    let large = "begin; insert into t select i, 0, 'x' || i from generate_series(10, 200) i; insert into t values (201, 0, 'in the way'); commit";
    gathered(&fixture, &["insert into t values (1, 1, 'a')", large]).await;
    let error = fixture.try_caught_up().await.unwrap_err();
    for said in ["23505", "t_v_key", "Key (v)=(in the way) already exists"] {
        assert!(error.contains(said), "{said}\n{error}");
    }
    assert_eq!(ask(&fixture.target, "select string_agg(id::text, ',' order by id) from t").await, "-1,0,1");
    let alone = fixture.target.batch_execute("insert into t values (1, 0, '')").await.unwrap_err();
    assert!(describe(&alone).contains("23505"));
    fixture.target.batch_execute("delete from t where id = -1").await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
}
