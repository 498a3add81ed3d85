//! Pause, resume and drop, at any time, and what they leave behind.

use crate::support::{ask, start};

/// Nothing of ours is left on the peers.
async fn assert_clean(fixture: &crate::support::Fixture) {
    assert_eq!(ask(&fixture.source, "select count(*) from pg_replication_slots").await, "0");
    assert_eq!(ask(&fixture.source, "select count(*) from pg_publication").await, "0");
    assert_eq!(ask(&fixture.target, "select count(*) from pg_namespace where nspname = 'peergate'").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_mirror_writes_nothing_and_resumes_where_it_was() {
    let mut fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.control.batch_execute("update peergate.mirrors set desired_state = 'paused'").await.unwrap();
    fixture.wait_for_state("paused").await;
    fixture.wait_until("select state from peergate.tasks where kind = 'pause_mirror'", "completed").await;
    fixture.source.batch_execute("insert into t values (1)").await.unwrap();
    let error = fixture.control.batch_execute("call peergate.wait_for_mirror('m')").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "55000");
    // A restart does not wake it.
    fixture.stop_engine().await;
    fixture.start_engine("node-1");
    fixture
        .wait_until(
            "select count(*) from peergate.nodes where started_at > (select max(finished_at) from peergate.tasks)",
            "1",
        )
        .await;
    assert_eq!(fixture.ask("select state from peergate.mirrors").await, "paused");
    assert_eq!(ask(&fixture.target, "select count(*) from t").await, "0");
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    fixture.wait_until("select state from peergate.tasks where kind = 'resume_mirror'", "completed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_mirror_leaves_nothing_on_the_peers() {
    let fixture = start().await;
    fixture
        .source
        .batch_execute("create table t (id int primary key); create table keyless (id int); insert into t values (1)")
        .await
        .unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    // Its peers may go in the same breath; the work order has what it needs.
    fixture.control.batch_execute("delete from peergate.mirrors; delete from peergate.peers").await.unwrap();
    fixture.wait_until("select state from peergate.tasks where kind = 'drop_mirror'", "completed").await;
    assert_clean(&fixture).await;
    assert_eq!(ask(&fixture.target, "select count(*) from t").await, "1");
    assert_eq!(fixture.ask("select count(*) from peergate.mirror_drops").await, "0");
    assert_eq!(fixture.ask("select count(*) from peergate.mirror_leases").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_dropped_while_it_copies_and_while_no_engine_runs() {
    let mut fixture = start().await;
    let schema = "create table t (id bigint primary key, pad text default repeat('x', 300)); insert into t (id) select generate_series(1, 400000)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"copy_parallel_workers": "1"}"#).await;
    fixture.wait_for_state("copying").await;
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
    fixture.wait_until("select state from peergate.tasks where kind = 'drop_mirror'", "completed").await;
    assert_clean(&fixture).await;
    fixture.target.batch_execute("drop table if exists t").await.unwrap();
    fixture.source.batch_execute("truncate t").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.stop_engine().await;
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
    fixture.start_engine("node-1");
    fixture
        .wait_until("select count(*) from peergate.tasks where kind = 'drop_mirror' and state = 'completed'", "2")
        .await;
    assert_clean(&fixture).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_rolled_back_is_never_seen_by_the_engine() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    let call = r#"begin; call peergate.create_mirror('m', 'shop', 'dwh', '{"all": true}'); rollback"#;
    fixture.control.batch_execute(call).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    assert_eq!(fixture.ask("select count(*) from peergate.tasks").await, "1");
    assert_eq!(ask(&fixture.source, "select count(*) from pg_replication_slots").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_mirrors_share_a_target_and_one_is_dropped() {
    let fixture = start().await;
    fixture
        .source
        .batch_execute("create table a (id int primary key); create table b (id int primary key)")
        .await
        .unwrap();
    let only = |t: &str| {
        format!(
            r#"{{"tables": [{{"from": {{"schema": "public", "name": "{t}"}}, "to": {{"schema": "public", "name": "{t}"}}}}]}}"#
        )
    };
    fixture.create_mirror(&only("a"), "{}").await;
    let call = format!("call peergate.create_mirror('other', 'shop', 'dwh', '{}')", only("b"));
    fixture.control.batch_execute(&call).await.unwrap();
    fixture.caught_up().await;
    fixture.wait_until("select count(*) from peergate.mirrors where state = 'running'", "2").await;
    fixture.control.batch_execute("call peergate.drop_mirror(array['other'])").await.unwrap();
    fixture.wait_until("select state from peergate.tasks where kind = 'drop_mirror'", "completed").await;
    assert_eq!(ask(&fixture.target, "select count(*) from peergate.progress").await, "1");
    fixture.source.batch_execute("insert into a values (1)").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select count(*) from a").await, "1");
}
