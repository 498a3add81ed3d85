//! Scenarios from the tests of other replication systems that no other file here has; docs/acceptance.md lists them all.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures_util::SinkExt;

use crate::support::{ask, connect, eventually, start, start_servers};

/// Parents and children in one transaction, in either order, and a transaction over more tables than the sink keeps in mind: whoever reads
/// the target sees all of it or nothing.
#[tokio::test(flavor = "multi_thread")]
async fn transactions_over_foreign_keys_and_many_tables_stay_whole() {
    let fixture = start().await;
    let schema = "create table parent (id int primary key); create table child (id int primary key, parent int not null references parent deferrable initially deferred);
        do $$ begin for n in 1..150 loop execute format('create table many_%s (id int primary key, n int)', n); end loop; end $$";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"batch_rows_max": "100"}"#).await;
    fixture.caught_up().await;
    let done = Arc::new(AtomicBool::new(false));
    let reader = fixture.connect_target().await;
    let watch = tokio::spawn({
        let done = done.clone();
        async move {
            let look = "select (select count(*) from child where parent not in (select id from parent)), (select count(*) from many_1), (select count(*) from many_150)";
            while !done.load(Ordering::Relaxed) {
                let row = reader.query_one(look, &[]).await.unwrap();
                assert_eq!(row.get::<_, i64>(0), 0, "a child without its parent");
                assert_eq!(row.get::<_, i64>(1), row.get::<_, i64>(2), "half a transaction");
            }
        }
    });
    for round in 0..10 {
        let family = format!(
            "begin; insert into child select {round} * 100 + i, {round} * 100 + i from generate_series(1, 60) i; insert into parent select {round} * 100 + i from generate_series(1, 60) i; commit;
             begin; delete from parent where id % 7 = {round}; delete from child where parent % 7 = {round}; commit"
        );
        fixture.source.batch_execute(&family).await.unwrap();
        let many = format!(
            "do $$ begin for n in 1..150 loop execute format('insert into many_%s values ({round}, %s)', n, n); end loop; end $$"
        );
        fixture.source.batch_execute(&many).await.unwrap();
    }
    fixture.caught_up().await;
    done.store(true, Ordering::Relaxed);
    watch.await.unwrap();
    assert_eq!(fixture.assert_equal().await, 152);
}

/// What the source computed is not computed again; columns go by their names; what is no table is left alone, as are our own objects.
#[tokio::test(flavor = "multi_thread")]
async fn values_go_to_columns_by_name_and_are_not_computed_again() {
    let fixture = start().await;
    let schema = "create schema other; create table t (a int primary key, b text, volatile_one double precision default random(), at timestamptz default clock_timestamp(),
            s bigserial, twice int generated always as (a * 2) stored);
        create table other.t (a int primary key, c text);
        create materialized view mv as select * from t; create view v as select * from t; create unlogged table u (id int primary key);
        create temp table temporary (id int); create schema peergate; create table peergate.progress (mine int primary key);
        insert into t (a, b) values (1, 'x'); insert into other.t values (1, 'other')";
    fixture.source.batch_execute(schema).await.unwrap();
    let on_target = "create table t (extra text default 'theirs', at timestamptz, s bigint, twice int generated always as (a * 2) stored, b text, gone int, volatile_one double precision, a int primary key);
        alter table t drop column gone";
    fixture.target.batch_execute(on_target).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    // COPY and statements of many rows are as good as any.
    let copy = fixture.source.copy_in("copy t (a, b) from stdin").await.unwrap();
    let mut copy = std::pin::pin!(copy);
    copy.send(bytes::Bytes::from_static(b"2\ttwo\n3\t\\N\n4\tf\\tour\n")).await.unwrap();
    copy.finish().await.unwrap();
    let changes = "insert into t (a, b) select i, i from generate_series(10, 40) i; update t set b = b || '!', at = default where a > 20; refresh materialized view mv;
        update other.t set c = 'changed'; insert into other.t values (2, null); insert into u values (1); insert into peergate.progress values (1)";
    fixture.source.batch_execute(changes).await.unwrap();
    // One row, again and again, in transactions that follow each other at once.
    fixture.source.batch_execute(&"update t set a = -a where a in (1, -1);".repeat(301)).await.unwrap();
    fixture.caught_up().await;
    for rows in [
        "select string_agg(concat_ws(',', a, b, volatile_one, at, s, twice), ' ' order by a) from t",
        "select string_agg(concat_ws(',', a, c), ' ' order by a) from other.t",
    ] {
        assert_eq!(ask(&fixture.target, rows).await, ask(&fixture.source, rows).await);
    }
    assert_eq!(ask(&fixture.target, "select count(*) from t where extra = 'theirs'").await, "35");
    let others = "select string_agg(relname, ' ') from pg_class where relname in ('mv', 'v', 'temporary')";
    assert_eq!(ask(&fixture.target, others).await, "");
    assert_eq!(
        ask(&fixture.source, "select count(*) from pg_publication_tables where schemaname = 'peergate'").await,
        "0"
    );
}

/// Many rows and one that is huge, in parallel and by ranges of blocks; nothing stays behind on the source.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_table_is_copied_by_ranges() {
    let fixture = start().await;
    let schema = "create table large (id int primary key, doc jsonb);
        insert into large select i, jsonb_build_object('n', i, 'pad', repeat('x', 300)) from generate_series(1, 120000) i;
        insert into large select 0, jsonb_agg(md5(i::text)) from generate_series(1, 500000) i";
    fixture.source.batch_execute(schema).await.unwrap();
    assert_eq!(ask(&fixture.source, "select pg_relation_size('large') > 4096 * 8192").await, "t", "one range only");
    fixture.create_mirror(r#"{"all": true}"#, r#"{"mode": "copy_only", "copy_parallel_workers": "3"}"#).await;
    fixture.wait_for_state("completed").await;
    let print = "select concat_ws(' ', count(*), sum(hashtextextended(l::text, 1))) from large l";
    assert_eq!(ask(&fixture.target, print).await, ask(&fixture.source, print).await);
    assert_eq!(fixture.ask("select rows_copied from peergate.mirror_tables").await, "120001");
    assert_eq!(ask(&fixture.source, "select count(*) from pg_replication_slots").await, "0");
    assert_eq!(ask(&fixture.source, "select count(*) from pg_publication").await, "0");
}

const CONFIRMED: &str = "select confirmed_flush_lsn - '0/0' from pg_replication_slots";

/// A commit that waits for the target's standby is not acknowledged; and a mirror without changes lets the source forget what others write.
#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_durable_is_acknowledged_and_idle_positions_are_too() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    // The engine's own commits on the target ask for more than this default.
    let wait = "alter system set synchronous_commit = 'local'; alter system set synchronous_standby_names = 'nobody'";
    for statement in wait.split("; ") {
        fixture.target.batch_execute(statement).await.unwrap();
    }
    fixture.target.batch_execute("select pg_reload_conf()").await.unwrap();
    // A reload reaches each session in its own time: rows are written until one of their commits waits.
    fixture.source.batch_execute("set synchronous_commit = local; create sequence ids").await.unwrap();
    let waits = "select count(*) from pg_stat_activity where wait_event = 'SyncRep' and application_name = 'peergate'";
    let written = eventually(async || {
        fixture.source.batch_execute("insert into t select nextval('ids')").await.unwrap();
        ask(&fixture.target, waits).await == "1"
    });
    assert!(written.await, "no commit waits");
    fixture.source.batch_execute("insert into t select nextval('ids')").await.unwrap();
    let after = ask(&fixture.source, "select pg_current_wal_lsn() - '0/0'").await.parse::<u64>().unwrap();
    // The walsender hears from us at least every five seconds, whatever happens.
    let heard = "select reply_time > now() from pg_stat_replication"
        .replace("now()", &format!("'{}'", ask(&fixture.source, "select clock_timestamp() + '1 s'").await));
    assert!(eventually(async || ask(&fixture.source, &heard).await == "t").await);
    assert!(ask(&fixture.source, CONFIRMED).await.parse::<u64>().unwrap() < after, "acknowledged too early");
    for statement in ["alter system reset all", "select pg_reload_conf()"] {
        fixture.target.batch_execute(statement).await.unwrap();
    }
    fixture.caught_up().await;
    assert!(eventually(async || ask(&fixture.source, CONFIRMED).await.parse::<u64>().unwrap() >= after).await);
    // Another database is busy.
    let neighbour = connect(&fixture.cluster, "postgres").await;
    neighbour
        .batch_execute("create table busy as select repeat('x', 500) from generate_series(1, 10000)")
        .await
        .unwrap();
    let written = ask(&neighbour, "select pg_current_wal_lsn() - '0/0'").await.parse::<u64>().unwrap();
    assert!(
        eventually(async || ask(&fixture.source, CONFIRMED).await.parse::<u64>().unwrap() >= written).await,
        "an idle mirror holds the WAL of a busy neighbour"
    );
}

/// The target stands still, both batches are full and nothing is read: the walsender must not think that we are gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_walsender_is_answered_while_the_target_stands_still() {
    let mut fixture = start_servers(&[("wal_sender_timeout", "3s")]).await;
    fixture.start_engine("node-1");
    fixture.source.batch_execute("create table t (id int primary key, pad text)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"batch_rows_max": "100"}"#).await;
    fixture.caught_up().await;
    let walsender = "select pid from pg_stat_replication";
    let before = ask(&fixture.source, walsender).await;
    let locker = fixture.connect_target().await;
    locker.batch_execute("begin; lock table t").await.unwrap();
    let write = "insert into t select i, repeat('x', 2000) from generate_series(1, 20000) i";
    fixture.source.batch_execute(write).await.unwrap();
    let later = ask(&fixture.source, "select clock_timestamp() + '8 s'").await;
    let is_later = format!("select clock_timestamp() > '{later}'");
    assert!(eventually(async || ask(&fixture.source, &is_later).await == "t").await);
    assert_eq!(ask(&fixture.source, walsender).await, before, "the walsender was ended");
    locker.batch_execute("rollback").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
}

/// A deadlock with somebody on the target passes by itself, whoever is its victim.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadlock_on_the_target_is_tried_again() {
    let mut fixture = start_servers(&[("deadlock_timeout", "100ms")]).await;
    fixture.start_engine("node-1");
    let schema = "create table a (id int primary key, n int); create table b (id int primary key, n int);
        insert into a values (1, 0); insert into b values (1, 0)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let other = fixture.connect_target().await;
    // Its own check for deadlocks comes late, so that the engine is the victim.
    other.batch_execute("set deadlock_timeout = '1 min'; begin; lock table b").await.unwrap();
    fixture.source.batch_execute("begin; update a set n = 1; update b set n = 1; commit").await.unwrap();
    let waits = "select count(*) from pg_locks where not granted and relation = 'b'::regclass";
    assert!(eventually(async || ask(&fixture.target, waits).await == "1").await);
    other.batch_execute("lock table a; commit").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    let told = "select count(*) > 0 from peergate.mirror_events where sqlstate = '40P01' and level = 'warning' and message like 'retrying%'";
    assert_eq!(fixture.ask(told).await, "t");
    assert_eq!(fixture.ask("select count(*) from peergate.mirror_events where level = 'error'").await, "0");
}

/// The document names tests that exist.
#[test]
fn the_document_names_tests_that_exist() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut tests = String::new();
    for folder in ["mirror/tests", "gateway/tests", "gateway/tests/chaos"] {
        for entry in std::fs::read_dir(root.join(folder)).unwrap() {
            tests += &std::fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
        }
    }
    let document = std::fs::read_to_string(root.join("docs/acceptance.md")).unwrap();
    let names = document.split('`').filter(|text| text.matches('_').count() > 3 && !text.contains(['/', '.', ' ']));
    let missing: Vec<&str> = names.filter(|name| !tests.contains(&format!("fn {name}("))).collect();
    assert!(missing.is_empty(), "no tests: {missing:?}");
}
