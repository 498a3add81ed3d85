//! Pause, resume and drop, at any time, and what they leave behind.

use crate::support::{ask, connect, describe, eventually, start, start_behind_proxies};

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

#[tokio::test(flavor = "multi_thread")]
async fn a_drop_whose_source_never_comes_back_is_forced_and_says_what_is_left() {
    let fixture = start_behind_proxies().await;
    let [source, _] = fixture.proxies.as_ref().unwrap();
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let name = fixture.ask("select object_name from peergate.mirrors").await;
    source.refuse();
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
    // The target is not kept waiting for the source.
    let gone = eventually(async || ask(&fixture.target, "select to_regclass('peergate.progress')").await.is_empty());
    assert!(gone.await, "the target still has the progress row");
    fixture
        .wait_until(
            "select state || ' ' || error_sqlstate from peergate.tasks where kind = 'drop_mirror'",
            "running HV00N",
        )
        .await;
    let error = fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap_err();
    let error = describe(&error);
    assert!(error.starts_with("55000") && error.contains("DROP MIRROR m FORCE"), "{error}");
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'], force => true)").await.unwrap();
    fixture.wait_until("select state from peergate.tasks where kind = 'drop_mirror'", "completed").await;
    let left = format!(
        r#"left behind on peer "shop": replication slot "{name}", publications "{name}", "{name}_inserts", or those of "{name}_late""#
    );
    assert_eq!(fixture.ask("select error_message from peergate.tasks where kind = 'drop_mirror'").await, left);
    let event = fixture
        .ask("select concat_ws(' ', level, message, detail) from peergate.mirror_events order by id desc limit 1")
        .await;
    assert!(event.starts_with(&format!("warning {left} could not connect to peer")), "{event}");
    fixture.wait_until("select count(*) from peergate.mirror_drops", "0").await;
    assert_eq!(ask(&fixture.source, "select slot_name from pg_replication_slots").await, name);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_finished_copy_left_on_the_source_is_removed_by_the_next_process() {
    let mut fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key); insert into t values (1)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"mode": "copy_only"}"#).await;
    fixture.wait_for_state("completed").await;
    fixture.stop_engine().await;
    // As if it had died after the copy and before removing them.
    let name = fixture.ask("select object_name from peergate.mirrors").await;
    let left = format!(
        "create publication {name} for table t; select pg_create_logical_replication_slot('{name}', 'pgoutput')"
    );
    for statement in left.split(';') {
        fixture.source.batch_execute(statement).await.unwrap();
    }
    fixture.control.batch_execute("update peergate.mirror_runtime set state = 'copying'").await.unwrap();
    fixture.start_engine("node-1");
    fixture.wait_for_state("completed").await;
    assert_eq!(ask(&fixture.source, "select count(*) from pg_replication_slots").await, "0");
    assert_eq!(ask(&fixture.source, "select count(*) from pg_publication").await, "0");
    assert_eq!(ask(&fixture.target, "select count(*) from t").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_that_fails_at_the_end_of_a_copy_costs_no_second_copy() {
    let fixture = start().await;
    let refuse = "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'out of room' using errcode = '53100'; end $$;
        create trigger refuse before update of copied_at on peergate.mirror_runtime for each row when (new.copied_at is not null) execute function refuse()";
    fixture.control.batch_execute(refuse).await.unwrap();
    fixture.source.batch_execute("create table t (id int primary key); insert into t values (1)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.wait_until("select attempt >= 2 from peergate.mirror_status", "t").await;
    let error = fixture.ask("select error_message from peergate.mirror_status").await;
    assert!(error.starts_with("catalog: ") && error.contains("out of room"), "{error}");
    let copied = ask(&fixture.target, "select xmin from t").await;
    fixture.source.batch_execute("insert into t values (2)").await.unwrap();
    fixture.control.batch_execute("drop trigger refuse on peergate.mirror_runtime").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert_eq!(ask(&fixture.target, "select xmin from t where id = 1").await, copied, "the row was copied again");
}

/// A transition that is none of the documented ones is a bug of ours, which a build with assertions does not survive.
#[cfg(debug_assertions)]
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_panics_blocks_its_mirror_and_no_other() {
    let fixture = start().await;
    fixture
        .source
        .batch_execute("create table t (id int primary key); create table other (id int primary key)")
        .await
        .unwrap();
    let only = |t: &str| {
        format!(
            r#"{{"tables": [{{"from": {{"schema": "public", "name": "{t}"}}, "to": {{"schema": "public", "name": "{t}"}}}}]}}"#
        )
    };
    let call = format!("call peergate.create_mirror('other', 'shop', 'dwh', '{}')", only("other"));
    fixture.control.batch_execute(&call).await.unwrap();
    fixture.wait_until("select state from peergate.mirrors", "running").await;
    // Its slot waits for this transaction, and meanwhile somebody lies about its state.
    let older = connect(&fixture.cluster, "shop").await;
    older.batch_execute("begin; insert into other values (1)").await.unwrap();
    fixture.create_mirror(&only("t"), "{}").await;
    fixture.wait_for_state("slot").await;
    fixture
        .control
        .batch_execute("update peergate.mirror_runtime set state = 'running' where state = 'slot'")
        .await
        .unwrap();
    older.batch_execute("commit").await.unwrap();
    fixture.wait_for_state("blocked").await;
    let told = fixture.ask("select concat_ws(' ', error_sqlstate, error_message, error_hint) from peergate.mirror_status where mirror = 'm'").await;
    assert!(told.starts_with("XX000 the mirror's worker failed") && told.contains("bug in Peergate"), "{told}");
    assert_eq!(fixture.ask("select state from peergate.mirrors where name = 'other'").await, "running");
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_waits_on_the_target_ends_with_the_engine() {
    let mut fixture = start().await;
    let schema = "create table t (id int primary key)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.target.batch_execute(schema).await.unwrap();
    // Lets rows in, and keeps ANALYZE waiting for ever.
    let holder = fixture.connect_target().await;
    holder.batch_execute("begin; lock table t in share update exclusive mode").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    let waiting =
        "select count(*) from pg_stat_activity where datname = 'dwh' and query like 'analyze%' and state = 'active'";
    assert!(eventually(async || ask(&fixture.target, waiting).await == "1").await);
    fixture.abort_engine().await;
    assert!(eventually(async || ask(&fixture.target, waiting).await == "0").await, "it still waits");
}
