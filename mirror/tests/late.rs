//! Tables that are copied by themselves while the others stream.

use tokio::task::JoinHandle;
use tokio_postgres::Client;

use crate::support::{Fixture, ask, connect, eventually, start};

/// Keeps everybody from writing to a table of the target, but not from looking at it.
async fn hold_target(fixture: &Fixture, table: &str) -> Client {
    let holder = fixture.connect_target().await;
    holder.batch_execute(&format!("begin; lock table {table} in share mode")).await.unwrap();
    holder
}

async fn table_is(fixture: &Fixture, table: &str, state: &str) {
    let query = format!("select state from peergate.mirror_tables where source_name = '{table}'");
    fixture.wait_until(&query, state).await;
}

/// Changes all tables in each of its transactions until it is told to stop.
async fn write_on(fixture: &Fixture, tables: &[&str]) -> (tokio::sync::oneshot::Sender<()>, JoinHandle<u32>) {
    let writer = connect(&fixture.cluster, "shop").await;
    let tables: Vec<String> = tables.iter().map(|t| (*t).to_owned()).collect();
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let running = tokio::spawn(async move {
        let mut round = 0;
        while stopped.try_recv().is_err() {
            round += 1;
            let changes: String = tables
                .iter()
                .map(|t| {
                    format!(
                        "insert into {t} values ({round} + 1000000, {round}); update {t} set n = n + 1 where id % 100 = {round} % 100;
                         delete from {t} where id = {round}; update {t} set id = id + 5000000 where id = 2000 + {round};"
                    )
                })
                .collect();
            writer.batch_execute(&format!("begin; {changes} commit")).await.unwrap();
        }
        round
    });
    (stop, running)
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_copy_it_keeps_finished_tables_and_the_rest_comes_late() {
    let mut fixture = start().await;
    let schema = "create table done (id int primary key, n int); insert into done select i, 0 from generate_series(1, 20000) i;
                  create table held (id int primary key, n int); insert into held select i, 0 from generate_series(1, 30000) i;
                  create table keyless (n int); insert into keyless select generate_series(1, 1000)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.target.batch_execute("create table held (id int primary key, n int)").await.unwrap();
    let holder = hold_target(&fixture, "held").await;
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    table_is(&fixture, "done", "copied").await;
    table_is(&fixture, "keyless", "copied").await;
    fixture.abort_engine().await;
    // Its server notices at once that it is gone, and not only when the lock is free.
    let waiting =
        "select pg_terminate_backend(pid) from pg_stat_activity where wait_event_type = 'Lock' and query like 'copy%'";
    fixture.target.batch_execute(waiting).await.unwrap();
    let rows =
        "select md5(string_agg(concat_ws(' ', id, xmin), ',' order by id)) from done where id between 3000 and 4000";
    let copied = ask(&fixture.target, rows).await;
    fixture.start_engine("node-1");
    // What was complete streams, although the other table's copy is still held up.
    fixture.source.batch_execute("insert into done values (-1, 0); insert into keyless values (0)").await.unwrap();
    assert!(eventually(async || ask(&fixture.target, "select count(*) from done where id = -1").await == "1").await);
    fixture.wait_for_state("running").await;
    table_is(&fixture, "held", "copying").await;
    let (stop, writer) = write_on(&fixture, &["done", "held"]).await;
    holder.batch_execute("commit").await.unwrap();
    table_is(&fixture, "held", "live").await;
    stop.send(()).unwrap();
    assert!(writer.await.unwrap() > 0);
    fixture.caught_up().await;
    fixture.assert_equal().await;
    let unchanged = "select count(*) from peergate.mirror_events where message like '%\"public.done\" is copying'";
    assert_eq!(fixture.ask(unchanged).await, "1", "it was copied twice");
    let touched = ask(&fixture.target, "select count(*) from done where id between 3000 and 4000 and n = 0").await;
    if touched == "1001" {
        assert_eq!(ask(&fixture.target, rows).await, copied, "it was copied twice");
    }
    // Each step is an event, and nothing of the late copy is left.
    let steps = "select string_agg(substring(message from 'is (.*)'), ' ' order by id) from peergate.mirror_events where message like 'table \"public.held\" is %'";
    assert_eq!(fixture.ask(steps).await, "copying indexing copied catchup live");
    let left = "select count(*) from pg_replication_slots where slot_name like '%late'";
    assert!(eventually(async || ask(&fixture.source, left).await == "0").await);
    assert_eq!(ask(&fixture.target, "select count(*) from peergate.progress").await, "1");
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
    fixture.wait_until("select count(*) from peergate.mirror_drops", "0").await;
    assert_eq!(ask(&fixture.target, "select to_regclass('peergate.progress_tables') is null").await, "t");
    assert_eq!(ask(&fixture.source, "select count(*) from pg_publication").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_rewritten_during_the_copy_is_copied_once_more_and_alone() {
    let fixture = start().await;
    let schema = "create table held (id int primary key, n int); insert into held select i, 0 from generate_series(1, 30000) i;
                  create table cut (id int primary key, n int); insert into cut select i, 0 from generate_series(1, 1000) i;
                  create table rewritten (id int primary key, n int); insert into rewritten select i, 0 from generate_series(1, 900) i;
                  create table vacuumed (id int primary key, n int); insert into vacuumed select i, 0 from generate_series(1, 800) i";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.target.batch_execute("create table held (id int primary key, n int)").await.unwrap();
    let holder = hold_target(&fixture, "held").await;
    // One session copies, and the largest table comes first: the others wait, unlocked.
    fixture.create_mirror(r#"{"all": true}"#, r#"{"copy_parallel_workers": "1"}"#).await;
    let waits = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like 'copy%'";
    assert!(eventually(async || ask(&fixture.target, waits).await == "1").await);
    for change in [
        "begin; truncate cut; insert into cut select i, 1 from generate_series(1, 10) i; commit",
        "alter table rewritten alter n type bigint",
        "vacuum full vacuumed",
    ] {
        fixture.source.batch_execute(change).await.unwrap();
    }
    holder.batch_execute("commit").await.unwrap();
    for table in ["held", "cut", "vacuumed", "rewritten"] {
        table_is(&fixture, table, "live").await;
    }
    fixture.source.batch_execute("insert into cut values (77, 7); insert into held values (-1, 0); update rewritten set n = 3000000000 where id = 1").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    let copies = "select count(*) from peergate.mirror_events where message = 'table \"public.held\" is copying'";
    assert_eq!(fixture.ask(copies).await, "1");
}

/// A table as the catalog's calls name it.
fn named(table: &str) -> String {
    format!(r#"{{"schema": "public", "name": "{table}"}}"#)
}

fn item(table: &str) -> String {
    format!(r#"{{"from": {0}, "to": {0}}}"#, named(table))
}

async fn call(fixture: &Fixture, call: &str) {
    fixture.control.batch_execute(&format!("call peergate.{call}")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_added_and_dropped_while_the_others_stream() {
    let fixture = start().await;
    let schema =
        "create table a (id int primary key, n int); insert into a select i, 0 from generate_series(1, 5000) i;
                  create table b (id int primary key, n int); insert into b select i, 0 from generate_series(1, 5000) i;
                  create table log (n int); create table filled (id int primary key);
                  create table wide (id int primary key, secret text); insert into wide values (1, 'x')";
    fixture.source.batch_execute(schema).await.unwrap();
    let theirs = "create table b (id int primary key, n int); create table filled (id int primary key); insert into filled values (1)";
    fixture.target.batch_execute(theirs).await.unwrap();
    fixture.create_mirror(&format!(r#"{{"tables": [{}]}}"#, item("a")), "{}").await;
    fixture.caught_up().await;
    let holder = hold_target(&fixture, "b").await;
    let narrow = r#"{"from": {"schema": "public", "name": "wide"}, "to": {"schema": "public", "name": "narrow"}, "columns": ["id"]}"#;
    call(&fixture, &format!("add_mirror_tables('m', '[{}, {}, {narrow}]')", item("b"), item("log"))).await;
    table_is(&fixture, "b", "copying").await;
    // The others stream on meanwhile.
    fixture.source.batch_execute("insert into a values (-1, 0)").await.unwrap();
    assert!(eventually(async || ask(&fixture.target, "select count(*) from a where id = -1").await == "1").await);
    let (stop, writer) = write_on(&fixture, &["a", "b"]).await;
    holder.batch_execute("commit").await.unwrap();
    table_is(&fixture, "b", "live").await;
    fixture.source.batch_execute("insert into log values (1), (1)").await.unwrap();
    // One that is dropped stays on the target as it was; what others have there is left alone.
    call(&fixture, &format!("drop_mirror_tables('m', '[{}]')", named("a"))).await;
    call(&fixture, &format!("add_mirror_tables('m', '[{}]')", item("filled"))).await;
    table_is(&fixture, "a", "removed").await;
    table_is(&fixture, "filled", "blocked").await;
    let why = fixture.ask("select concat_ws(' ', error_sqlstate, error_message, error_hint) from peergate.mirror_tables where source_name = 'filled'").await;
    assert!(why.starts_with("55000 target table \"public.filled\" is not empty") && why.contains("RESYNC"), "{why}");
    fixture
        .wait_until("select state from peergate.tasks where kind = 'alter_mirror' order by id desc limit 1", "failed")
        .await;
    stop.send(()).unwrap();
    writer.await.unwrap();
    fixture.caught_up().await;
    let sum = "select concat_ws(' ', count(*), sum(n)) from a";
    let frozen = ask(&fixture.target, sum).await;
    fixture.source.batch_execute("update a set n = n + 1").await.unwrap();
    // It comes back with what the source has by then.
    call(&fixture, &format!("add_mirror_tables('m', '[{}]')", item("a"))).await;
    call(&fixture, &format!("resync_mirror('m', '[{}]')", named("filled"))).await;
    fixture.caught_up().await;
    assert_ne!(ask(&fixture.target, sum).await, frozen);
    fixture
        .source
        .batch_execute("insert into filled values (2); delete from a where id = -1; insert into wide values (2, 'y')")
        .await
        .unwrap();
    fixture.caught_up().await;
    let narrow = "select string_agg(r::text, ' ' order by id) from narrow r";
    assert_eq!(ask(&fixture.target, narrow).await, "(1) (2)");
    fixture.source.batch_execute("drop table wide").await.unwrap();
    fixture.assert_equal().await;
    assert_eq!(fixture.ask("select string_agg(distinct state, ' ') from peergate.mirror_tables").await, "live");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resync_replaces_what_is_there_in_one_moment() {
    let mut fixture = start().await;
    let schema =
        "create table a (id int primary key, n int); insert into a select i, 0 from generate_series(1, 20000) i;
                  create table keyless (n int); insert into keyless select generate_series(1, 500)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.target.batch_execute("create view v as select * from a; delete from a where id % 2 = 0; update a set n = 7 where id = 1; delete from keyless").await.unwrap();
    let reader = fixture.connect_target().await;
    let reading = tokio::spawn(async move {
        loop {
            let rows: i64 = reader.query_one("select count(*) from v", &[]).await.unwrap().get(0);
            assert!(rows >= 10_000, "a reader saw {rows} rows");
            if rows >= 20_000 {
                break;
            }
        }
    });
    call(&fixture, &format!("resync_mirror('m', '[{}, {}]')", named("a"), named("keyless"))).await;
    fixture.source.batch_execute("update a set n = n + 1 where id < 100").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    reading.await.unwrap();
    assert_eq!(
        fixture.ask("select string_agg(state, ' ') from peergate.tasks where kind = 'resync_mirror'").await,
        "completed"
    );
    // All of it, when nothing else helps; killed on the way.
    fixture.stop_engine().await;
    // The walsender may be a moment behind the engine.
    let free = "select count(*) from pg_replication_slots where active";
    assert!(eventually(async || ask(&fixture.source, free).await == "0").await);
    fixture
        .source
        .batch_execute("select pg_drop_replication_slot(slot_name) from pg_replication_slots; update a set n = n + 1")
        .await
        .unwrap();
    fixture.start_engine("node-1");
    fixture.wait_for_state("resync_required").await;
    let holder = hold_target(&fixture, "a").await;
    call(&fixture, "resync_mirror('m')").await;
    table_is(&fixture, "keyless", "copied").await;
    table_is(&fixture, "a", "indexing").await;
    fixture.abort_engine().await;
    holder.batch_execute("commit").await.unwrap();
    fixture.start_engine("node-1");
    fixture.caught_up().await;
    fixture.source.batch_execute("delete from a where id > 19000").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert_eq!(
        ask(
            &fixture.target,
            "select count(*) from pg_tables where schemaname = 'peergate' and tablename like '%stage%'"
        )
        .await,
        "0"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_be_written_stops_its_table_alone_or_is_skipped() {
    let fixture = start().await;
    let schema = "create table a (id int primary key, n int); create table b (id int primary key, n int); insert into a values (1, 1)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"on_error": "quarantine_table"}"#).await;
    fixture.caught_up().await;
    fixture.target.batch_execute("alter table a add constraint small check (n < 100)").await.unwrap();
    fixture.source.batch_execute("insert into a values (2, 2)").await.unwrap();
    fixture.caught_up().await;
    fixture
        .source
        .batch_execute("begin; insert into a values (3, 1000); insert into b values (3, 3); commit")
        .await
        .unwrap();
    table_is(&fixture, "a", "blocked").await;
    fixture.source.batch_execute("insert into b values (4, 4); insert into a values (5, 5)").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select string_agg(id::text, ' ' order by id) from b").await, "3 4");
    assert_eq!(ask(&fixture.target, "select string_agg(id::text, ' ' order by id) from a").await, "1 2");
    let why = "select concat_ws(' ', error_sqlstate, error_lsn is not null, from_lsn is null) from peergate.mirror_tables where source_name = 'a'";
    assert_eq!(fixture.ask(why).await, "23514 t t");
    fixture.target.batch_execute("alter table a drop constraint small").await.unwrap();
    call(&fixture, &format!("resync_mirror('m', '[{}]')", named("a"))).await;
    fixture.caught_up().await;
    fixture.assert_equal().await;

    call(&fixture, r#"set_mirror_options('m', '{"on_error": "stop"}')"#).await;
    fixture.caught_up().await;
    fixture.target.batch_execute("alter table a add constraint small check (n < 10000)").await.unwrap();
    fixture
        .source
        .batch_execute("begin; insert into a values (6, 20000); delete from b where id = 3; commit")
        .await
        .unwrap();
    fixture.wait_for_state("blocked").await;
    fixture.source.batch_execute("insert into a values (7, 7)").await.unwrap();
    let error = fixture.control.batch_execute("call peergate.skip_mirror_transaction('m', '0/1')").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "22023");
    let at = fixture.ask("select error_lsn from peergate.mirror_status").await;
    call(&fixture, &format!("skip_mirror_transaction('m', '{at}')")).await;
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select string_agg(id::text, ' ' order by id) from a").await, "1 2 3 5 7");
    assert_eq!(ask(&fixture.target, "select string_agg(id::text, ' ' order by id) from b").await, "3 4");
    let told = "select message from peergate.mirror_events where kind = 'skip'";
    let expected = format!(
        "the source transaction that commits at {at} was skipped: table \"public.a\" lacks 1 inserts, 0 updates, 0 deletes; table \"public.b\" lacks 0 inserts, 0 updates, 1 deletes"
    );
    fixture.wait_until(told, &expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_is_canceled_leaves_the_mirror_whole() {
    let fixture = start().await;
    let schema = "create table a (id int primary key, n int); insert into a values (1, 1);
                  create table held (id int primary key, n int); insert into held select i, 0 from generate_series(1, 30000) i";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.target.batch_execute("create table held (id int primary key, n int)").await.unwrap();
    fixture.create_mirror(&format!(r#"{{"tables": [{}]}}"#, item("a")), "{}").await;
    fixture.wait_for_state("running").await;
    // The copy of a table that is being added is given up, and the others stream on.
    let holder = hold_target(&fixture, "held").await;
    call(&fixture, &format!("add_mirror_tables('m', '[{}]')", item("held"))).await;
    table_is(&fixture, "held", "copying").await;
    let adding = fixture.ask("select max(id) from peergate.tasks where kind = 'alter_mirror'").await;
    call(&fixture, &format!("cancel_task({adding})")).await;
    fixture.wait_until("select count(*) from peergate.tasks where state in ('pending', 'running')", "0").await;
    let states = "select string_agg(state, ',' order by id) from peergate.tasks where kind = 'alter_mirror'";
    assert_eq!(fixture.ask(states).await, "canceled,completed");
    fixture.source.batch_execute("insert into a values (2, 2); insert into held values (-1, 0)").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select count(*) from a").await, "2");
    holder.batch_execute("commit").await.unwrap();
    let left = "select count(*) from pg_replication_slots where slot_name like '%late'";
    assert!(eventually(async || ask(&fixture.source, left).await == "0").await);
    let live =
        "select string_agg(source_name || ' ' || state, ',' order by source_name) from peergate.mirror_table_runtime";
    assert_eq!(fixture.ask(live).await, "a live,held removed");
    assert_eq!(ask(&fixture.target, "select count(*) from held where id < 0").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_whose_creation_is_canceled_rests_and_can_go_on() {
    let fixture = start().await;
    let schema =
        "create table held (id int primary key, n int); insert into held select i, 0 from generate_series(1, 30000) i";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.target.batch_execute("create table held (id int primary key, n int)").await.unwrap();
    let holder = hold_target(&fixture, "held").await;
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    table_is(&fixture, "held", "copying").await;
    let creating = fixture.ask("select max(id) from peergate.tasks where kind = 'create_mirror'").await;
    call(&fixture, &format!("cancel_task({creating})")).await;
    fixture.wait_for_state("paused").await;
    let waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like 'copy%'";
    assert!(eventually(async || ask(&fixture.target, waiting).await == "0").await, "its copy has ended");
    holder.batch_execute("commit").await.unwrap();
    let create = "select state from peergate.tasks where kind = 'create_mirror'";
    assert_eq!(fixture.ask(create).await, "canceled");
    call(&fixture, "resume_mirror('m')").await;
    fixture.wait_for_state("running").await;
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert_eq!(fixture.ask(create).await, "canceled");
}
