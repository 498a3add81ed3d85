//! What networks do to a mirror: connections that break amid a message, and connections on which nothing comes any more.

use crate::support::{ask, start_behind_proxies};

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_break_anywhere_lose_and_double_nothing() {
    let fixture = start_behind_proxies().await;
    let [source, target] = fixture.proxies.as_ref().unwrap();
    let tables = "create table log (id bigint, n int); create table t (id int primary key, n int not null);
        insert into t select i, 0 from generate_series(1, 2000) i";
    fixture.source.batch_execute(tables).await.unwrap();
    // The first cuts fall into the copy, the later ones into the stream; where exactly is not in our hands.
    target.cut_after(20_000);
    fixture.create_mirror(r#"{"all": true}"#, r#"{"batch_rows_max": "500"}"#).await;
    for round in 0..16_u32 {
        let write = format!(
            "insert into log select i, {round} from generate_series(1, 1500) i; update t set n = n + 1 where id % 16 = {round}"
        );
        fixture.source.batch_execute(&write).await.unwrap();
        let proxy = if round % 2 == 0 { source } else { target };
        proxy.cut_after(3_000 + 7_919 * round);
    }
    source.pass();
    target.pass();
    fixture.caught_up().await;
    fixture.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_that_stands_still_for_a_while_is_waited_for() {
    let fixture = start_behind_proxies().await;
    let [source, target] = fixture.proxies.as_ref().unwrap();
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    for (n, proxy) in [source, target].into_iter().enumerate() {
        proxy.stall();
        fixture
            .source
            .batch_execute(&format!("insert into t select {n} * 1000 + i from generate_series(1, 500) i"))
            .await
            .unwrap();
        assert_eq!(ask(&fixture.target, "select count(*) from t").await, (n * 500).to_string());
        proxy.pass();
        fixture.caught_up().await;
    }
    fixture.assert_equal().await;
}
