//! Fails at every named point of the engine, and looks whether all goes on from there. The points are found in the source: one that no
//! test reaches fails this one. In a binary of its own, since points are the process's.

#![cfg(debug_assertions)]
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

use std::collections::BTreeSet;
use std::path::Path;

use catalog::Catalog;
use mirror::failpoint::{self, Fault};

#[allow(dead_code, reason = "this binary uses some of it")]
mod proxy;
#[allow(dead_code, reason = "this binary uses some of it")]
mod support;

use support::{Fixture, ask, spawn_engine, start_servers};

/// Points that fail in the same life, one after the other: more would say less of each, fewer take longer.
const POINTS_PER_LIFE: usize = 7;

#[tokio::test(flavor = "multi_thread")]
async fn at_every_point_all_goes_on_from_where_it_failed() {
    let fixture = start_servers(&[]).await;
    live(&fixture, "nothing fails").await;
    let order = failpoint::reached();
    let reached: BTreeSet<String> = order.iter().map(|p| (*p).to_owned()).collect();
    let missed: Vec<String> = points_in_source().difference(&reached).cloned().collect();
    assert!(missed.is_empty(), "the life below does not reach {missed:?}: let it, and compare both sides then");
    let lives = order.len().div_ceil(POINTS_PER_LIFE);
    for inverse in [false, true] {
        for first in 0..lives {
            let faults: Vec<(&str, Fault)> = (order.iter().skip(first).step_by(lives).enumerate())
                .map(|(n, point)| (*point, if (n % 2 == 0) == inverse { Fault::Hang } else { Fault::Fail }))
                .collect();
            eprintln!("{faults:?}");
            for (point, fault) in &faults {
                failpoint::arm(point, *fault, 0);
            }
            live(&fixture, &format!("{faults:?}")).await;
            assert_eq!(failpoint::armed(), Vec::<String>::new(), "not reached in {faults:?}");
        }
    }
}

/// The names in all `fail_point!("…")` of this crate.
fn points_in_source() -> BTreeSet<String> {
    fn look_into(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                look_into(&path, found);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            for rest in text.split("fail_point!(\"").skip(1) {
                let name = rest.split('"').next().unwrap().to_owned();
                assert!(found.insert(name.clone()), "two points are named \"{name}\"");
            }
        }
    }
    let mut found = BTreeSet::new();
    look_into(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
    found
}

/// A mirror's life from its creation until nothing is left of it, with an engine that is killed where a point hangs.
async fn live(fixture: &Fixture, what: &str) {
    let engine = tokio::spawn(run_engine(fixture.catalog.clone()));
    let life = async {
        copy_and_stream(fixture).await;
        copy_only(fixture).await;
        of_query(fixture).await;
    };
    if tokio::time::timeout(std::time::Duration::from_secs(180), life).await.is_err() {
        panic!("not over in time: {what}\n{}", fixture.explain().await);
    }
    engine.abort();
    // Its end has to be waited for: it may hold the mirror's lease.
    let _ = engine.await;
}

/// Runs an engine, and another one whenever a point hangs: what hung goes as with `kill -9`.
async fn run_engine(catalog: Catalog) {
    loop {
        let (_stop, running) = spawn_engine(&catalog, "node-1");
        let guard = AbortOnDrop(running);
        while failpoint::fired().await.1 != Fault::Hang {}
        drop(guard);
    }
}

struct AbortOnDrop(tokio::task::JoinHandle<Result<(), mirror::error::Error>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn copy_and_stream(fixture: &Fixture) {
    let begin = "drop schema public cascade; create schema public";
    fixture.target.batch_execute(begin).await.unwrap();
    fixture.source.batch_execute(begin).await.unwrap();
    let tables = "create table t (id int primary key, u int unique, n int not null default 0, big text);
        create table log (id int, n int);
        alter table t alter big set storage external;
        insert into t select i, i, 0, repeat('x', 4000) from generate_series(1, 300) i;
        insert into log select i, 0 from generate_series(1, 300) i";
    fixture.source.batch_execute(tables).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"batch_rows_max": "100"}"#).await;
    for round in 1..=3 {
        let changes = format!(
            "begin; update t set n = n + 1; insert into log select i, {round} from generate_series(1, 300) i; commit;
             update t set id = id + 1000 where id % 50 = {round};
             begin; update t set u = null where u = {round}; update t set u = {round} where u = {round} + 7;
             update t set u = {round} + 7 where u is null; commit;
             begin; savepoint a; delete from t where id < 9; rollback to a; delete from t where id = 100 + {round}; commit"
        );
        fixture.source.batch_execute(&changes).await.unwrap();
        fixture.caught_up().await;
    }
    fixture.source.batch_execute("begin; truncate log; insert into log values (1, 1); commit").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    for change in [
        "alter table t add column c int default 5; update t set c = c + 1 where id % 2 = 0",
        // Values that are not sent: the table is copied once more, by its new name.
        "begin; insert into log values (8, 8); alter table log add v uuid default gen_random_uuid(); alter table log rename to journal;
         insert into journal values (9, 9); commit",
        "alter table journal drop column v; alter table journal rename to log; insert into log values (10, 10)",
    ] {
        fixture.source.batch_execute(change).await.unwrap();
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
    // The catalog learns of a name a moment after the target has it.
    fixture
        .wait_until("select string_agg(source_name, ' ' order by source_name) from peergate.mirror_tables", "log t")
        .await;
    let name = |table: &str| format!(r#"{{"schema": "public", "name": "{table}"}}"#);
    for call in [
        format!("drop_mirror_tables('m', '[{}]')", name("log")),
        format!(r#"add_mirror_tables('m', '[{{"from": {0}, "to": {0}}}]')"#, name("log")),
        format!("resync_mirror('m', '[{}]')", name("t")),
        "resync_mirror('m')".to_owned(),
    ] {
        fixture.control.batch_execute(&format!("call peergate.{call}")).await.unwrap();
        fixture.source.batch_execute("update t set n = n + 1; insert into log values (7, 7)").await.unwrap();
        fixture.caught_up().await;
    }
    fixture.assert_equal().await;
    let behind_its_back =
        "delete from t where id = 50; update t set n = -1 where id = 60; insert into t (id) values (-1)";
    fixture.target.batch_execute(behind_its_back).await.unwrap();
    fixture.control.batch_execute("call peergate.start_verification('m', repair => true)").await.unwrap();
    let open = "select count(*) from peergate.tasks where kind = 'verify_mirror' and state in ('pending', 'running')";
    fixture.wait_until(open, "0").await;
    fixture.assert_equal().await;
    drop_mirror(fixture).await;
}

async fn copy_only(fixture: &Fixture) {
    fixture.create_mirror(r#"{"all": true}"#, r#"{"mode": "copy_only", "truncate_target": "true"}"#).await;
    fixture.wait_for_state("completed").await;
    fixture.assert_equal().await;
    drop_mirror(fixture).await;
}

/// Rounds of a query: new rows, a change and a delete, all anew, and rows that replace all others.
async fn of_query(fixture: &Fixture) {
    let begin = "drop schema public cascade; create schema public";
    fixture.target.batch_execute(begin).await.unwrap();
    fixture.source.batch_execute(begin).await.unwrap();
    let tables = "create table q (id bigserial primary key, n int, at timestamptz not null default clock_timestamp());
        insert into q (n) select i from generate_series(1, 100) i";
    fixture.source.batch_execute(tables).await.unwrap();
    let query = "select * from public.q where at between {{.start}} and {{.end}}";
    let appended = r#""target_table": "appended", "watermark_column": "at", "watermark_table": "q", "partition_rows": "30", "parallel_workers": "2""#;
    let upserted = r#""target_table": "q", "mode": "upsert", "key_columns": "id", "watermark_column": "at", "watermark_table": "q", "partition_rows": "30",
                      "detect_deletes": "true""#;
    for (options, changes) in [
        (appended, "insert into q (n) select i from generate_series(101, 150) i"),
        (upserted, "delete from q where n % 7 = 0; update q set n = 0, at = clock_timestamp() where n % 5 = 0"),
    ] {
        fixture.create_query(query, options).await;
        fixture.caught_up().await;
        fixture.source.batch_execute(changes).await.unwrap();
        fixture.caught_up().await;
        if options == appended {
            let count = "select count(*) || ' ' || count(distinct id) from appended";
            assert_eq!(ask(&fixture.target, count).await, "150 150");
        } else {
            fixture.assert_equal().await;
        }
        fixture.control.batch_execute("call peergate.resync_mirror('m')").await.unwrap();
        fixture.caught_up().await;
        drop_mirror(fixture).await;
    }
    fixture
        .create_query("select * from public.q", r#""target_table": "q", "mode": "overwrite", "run_once": "true""#)
        .await;
    fixture.wait_for_state("completed").await;
    fixture.assert_equal().await;
    drop_mirror(fixture).await;
}

/// Nothing of ours may be left on the peers.
async fn drop_mirror(fixture: &Fixture) {
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
    fixture.wait_until("select count(*) from peergate.mirror_drops", "0").await;
    assert_eq!(ask(&fixture.source, "select count(*) from pg_replication_slots").await, "0");
    assert_eq!(ask(&fixture.source, "select count(*) from pg_publication").await, "0");
    assert_eq!(ask(&fixture.target, "select to_regclass('peergate.progress') is null").await, "t");
    assert_eq!(ask(&fixture.target, "select to_regclass('peergate.query_progress') is null").await, "t");
}
