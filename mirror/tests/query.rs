//! Mirrors of queries: each mode, each kind of watermark, and that nothing is lost or doubled.

use std::time::Duration;

use crate::support::{Fixture, ask, connect, describe, eventually, start};

/// The rows of a query on a side, as text.
async fn rows(client: &tokio_postgres::Client, query: &str) -> Vec<String> {
    let query = format!("select t::text from ({query}) t order by 1");
    client.query(&query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

impl Fixture {
    /// As [`Fixture::create_query`], with the whole object.
    async fn create_query_mirror(&self, query: &str, options: &str) {
        self.create_query(query, options.strip_prefix('{').and_then(|o| o.strip_suffix('}')).unwrap()).await;
    }

    /// Checks that both sides give the same rows.
    async fn assert_same(&self, source: &str, target: &str) {
        let (source, target) = (rows(&self.source, source).await, rows(&self.target, target).await);
        let missing: Vec<_> = source.iter().filter(|r| !target.contains(r)).take(5).collect();
        let surplus: Vec<_> = target.iter().filter(|r| !source.contains(r)).take(5).collect();
        if source != target {
            let counts = (source.len(), target.len());
            panic!("{counts:?} rows\nmissing: {missing:?}\ntoo much: {surplus:?}\n{}", self.explain_rounds().await);
        }
    }

    /// What the catalog says of the rounds, for a test that fails.
    async fn explain_rounds(&self) -> String {
        let rounds = rows(&self.control, "select * from peergate.mirror_rounds").await.join("\n");
        let partitions = rows(&self.control, "select * from peergate.mirror_partitions").await.join("\n");
        format!("{rounds}\n{partitions}\n{}", self.explain().await)
    }

    async fn drop_query_mirror(&self) {
        self.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
        self.wait_until("select count(*) from peergate.mirror_drops", "0").await;
        assert_eq!(
            ask(
                &self.target,
                "select to_regclass('peergate.query_progress') is null and to_regclass('peergate.progress') is null"
            )
            .await,
            "t"
        );
    }
}

/// A table with a column of each type that can be a watermark, in 1,000 steps.
const EACH_KIND: &str = "
    create domain step as int;
    create table t (n int primary key, small smallint not null, big bigint not null, dom step not null,
                    d date not null, ts timestamp not null, tz timestamptz not null);
    create function fill(lo int, hi int) returns void language sql as $$
        insert into t select i, (i % 1000)::smallint, i * 10000000000::bigint, i, date '2024-01-01' + i / 10,
                             timestamp '2024-01-01' + i * interval '1 microsecond', timestamptz '2024-01-01 00:00+00' + i * interval '1 hour'
        from generate_series(lo, hi) i
    $$;
    select fill(1, 1000)";

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_watermark_takes_each_row_once() {
    let fixture = start().await;
    fixture.source.batch_execute(EACH_KIND).await.unwrap();
    let mut until = 1000;
    for column in ["n", "big", "dom", "d", "ts", "tz", "xmin"] {
        let (bounded, table) = match column {
            "xmin" => ("select * from t where xmin::text::bigint between {{.start}} and {{.end}}".to_owned(), ""),
            _ => (
                format!("select * from t where {column} between {{{{.start}}}} and {{{{.end}}}}"),
                r#", "watermark_table": "t""#,
            ),
        };
        for query in [bounded.as_str(), "select * from t"] {
            let options = format!(
                r#"{{"target_table": "copy", "watermark_column": "{column}", "partition_rows": "130", "parallel_workers": "3"{table}}}"#
            );
            fixture.create_query_mirror(query, &options).await;
            fixture.caught_up().await;
            fixture.assert_same("select * from t", "select * from copy").await;
            // A day has ten of them: the next rows are to be of another day.
            fixture.source.batch_execute(&format!("select fill({}, {})", until + 10, until + 300)).await.unwrap();
            until += 300;
            fixture.caught_up().await;
            fixture.assert_same("select * from t", "select * from copy").await;
            let partitions =
                fixture.ask("select max(partitions) >= case when '' = '' then 1 end from peergate.mirror_rounds").await;
            assert_eq!(partitions, "t");
            if column != "xmin" {
                assert_eq!(
                    fixture.ask("select max(partitions) >= 7 from peergate.mirror_rounds").await,
                    "t",
                    "{column}"
                );
            }
            assert_eq!(fixture.ask("select count(*) from peergate.mirror_partitions where state <> 'done'").await, "0");
            fixture.drop_query_mirror().await;
            fixture.target.batch_execute("drop table copy").await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upsert_follows_changes_and_on_request_deletes() {
    let fixture = start().await;
    let tables = "
        create type mood as enum ('low', 'high');
        create table t (id int primary key, v text, m mood, amount numeric(10, 2), doc json, changed timestamptz not null default clock_timestamp());
        insert into t select i, 'v' || i, 'low', i, '{}' from generate_series(1, 500) i";
    fixture.source.batch_execute(tables).await.unwrap();
    let query = "select * from t where changed between {{.start}} and {{.end}}";
    let options = r#"{"mode": "upsert", "key_columns": "id", "target_table": "Odd.\"Copy\"", "watermark_column": "changed", "watermark_table": "public.t",
                      "partition_rows": "50", "parallel_workers": "4", "detect_deletes": "true"}"#;
    fixture.create_query_mirror(query, options).await;
    let same = async || {
        fixture.caught_up().await;
        fixture.assert_same("select * from t", "select * from odd.\"Copy\"").await;
    };
    same().await;
    let column = "select format_type(atttypid, atttypmod) from pg_attribute where attrelid = 'odd.\"Copy\"'::regclass and attname = 'amount'";
    assert_eq!(ask(&fixture.target, column).await, "numeric(10,2)");
    fixture
        .source
        .batch_execute("update t set v = v || 'x', m = 'high', changed = clock_timestamp() where id % 3 = 0")
        .await
        .unwrap();
    same().await;
    fixture.source.batch_execute("delete from t where id % 5 = 0; insert into t (id) values (1000)").await.unwrap();
    same().await;
    assert_eq!(fixture.ask("select sum(rows_deleted) from peergate.mirror_rounds").await, "100");
    // A row that is the same is not written anew.
    let before = ask(&fixture.target, "select sum(xmin::text::bigint) from odd.\"Copy\"").await;
    fixture.source.batch_execute("update t set changed = changed where id < 50").await.unwrap();
    fixture.control.batch_execute("call peergate.resync_mirror('m')").await.unwrap();
    same().await;
    assert_ne!(
        ask(&fixture.target, "select sum(xmin::text::bigint) from odd.\"Copy\"").await,
        before,
        "a resync writes all rows"
    );
    fixture.drop_query_mirror().await;
    // Without a watermark each round looks at all rows.
    fixture
        .create_query_mirror(
            "select id, v from t",
            r#"{"mode": "upsert", "key_columns": "id", "target_table": "plain", "detect_deletes": "true"}"#,
        )
        .await;
    fixture.caught_up().await;
    let before = ask(&fixture.target, "select sum(xmin::text::bigint) from plain").await;
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select sum(xmin::text::bigint) from plain").await, before);
    fixture.source.batch_execute("delete from t where id < 100; update t set v = null where id = 101").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_same("select id, v from t", "select * from plain").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_sees_the_old_rows_or_the_new_ones() {
    let fixture = start().await;
    fixture
        .source
        .batch_execute("create table t (id int, v int); insert into t select i, 0 from generate_series(1, 2000) i")
        .await
        .unwrap();
    let options = r#"{"mode": "overwrite", "target_table": "copy", "watermark_column": "id", "partition_rows": "300", "parallel_workers": "3", "refresh_interval": "1s"}"#;
    fixture.source.batch_execute("insert into t values (null, 0)").await.unwrap();
    fixture.create_query_mirror("select * from t", options).await;
    fixture.caught_up().await;
    let reader = fixture.connect_target().await;
    let watch = tokio::spawn(async move {
        let mut seen = std::collections::BTreeSet::new();
        loop {
            let row = reader.query_one("select count(*), min(v), max(v) from copy", &[]).await.unwrap();
            let found: (i64, i32, i32) = (row.get(0), row.get(1), row.get(2));
            assert!(found.0 == 2001 && found.1 == found.2, "{found:?}");
            seen.insert(found.1);
            if seen.contains(&5) {
                return seen.len();
            }
        }
    });
    for round in 1..=5 {
        fixture.source.batch_execute(&format!("update t set v = {round}")).await.unwrap();
        fixture.caught_up().await;
        fixture.assert_same("select * from t", "select * from copy").await;
    }
    assert!(watch.await.unwrap() >= 2);
    fixture.source.batch_execute("delete from t").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select count(*) from copy").await, "0");
    assert_eq!(ask(&fixture.target, "select count(*) from pg_class where relname like '%stage%'").await, "0");
}

/// Rows whose watermarks are lower than those that are committed already.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_committed_late_is_waited_for() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id bigserial, at timestamptz not null default now())").await.unwrap();
    let options =
        r#"{"target_table": "copy", "watermark_column": "at", "watermark_table": "t", "refresh_interval": "1s"}"#;
    fixture.create_query_mirror("select * from t where at between {{.start}} and {{.end}}", options).await;
    fixture.caught_up().await;
    // It has not written anything yet, and its now() is fixed.
    let late = connect(&fixture.cluster, "shop").await;
    late.batch_execute("begin; select now()").await.unwrap();
    fixture.source.batch_execute("insert into t default values").await.unwrap();
    fixture.wait_until("select state from peergate.mirror_rounds order by round desc limit 1", "waiting").await;
    let who = fixture.ask("select waits_for from peergate.mirror_rounds order by round desc limit 1").await;
    assert!(who.starts_with("the open transaction of process ") && who.ends_with("on peer \"shop\""), "{who}");
    assert_eq!(ask(&fixture.target, "select count(*) from copy").await, "0");
    late.batch_execute("insert into t default values; commit").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_same("select * from t", "select * from copy").await;
    // Who only asks for those that write does not wait for this one.
    fixture
        .control
        .batch_execute(r#"call peergate.set_mirror_options('m', '{"wait_for_transactions": "writers"}')"#)
        .await
        .unwrap();
    late.batch_execute("begin; select now()").await.unwrap();
    fixture.source.batch_execute("insert into t default values").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_same("select * from t", "select * from copy").await;
    late.batch_execute("insert into t default values").await.unwrap();
    fixture.source.batch_execute("insert into t default values").await.unwrap();
    fixture.wait_until("select state from peergate.mirror_rounds order by round desc limit 1", "waiting").await;
    late.batch_execute("rollback").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_same("select * from t", "select * from copy").await;
}

/// Many write at once, and commit in another order than they began; engines are killed, sessions cut.
#[tokio::test(flavor = "multi_thread")]
async fn under_load_and_with_killed_engines_each_row_comes_exactly_once() {
    for (column, query) in [
        ("id", "select * from t where id between {{.start}} and {{.end}}"),
        ("at", "select * from t where at between {{.start}} and {{.end}}"),
        ("xmin", "select * from t"),
    ] {
        let mut fixture = start().await;
        fixture
            .source
            .batch_execute("create table t (id bigserial, w int, at timestamptz not null default now())")
            .await
            .unwrap();
        let table = if column == "xmin" { "" } else { r#", "watermark_table": "t""# };
        let options = format!(
            r#"{{"target_table": "copy", "watermark_column": "{column}", "partition_rows": "40", "parallel_workers": "3", "refresh_interval": "1s"{table}}}"#
        );
        fixture.create_query_mirror(query, &options).await;
        let mut writers = tokio::task::JoinSet::new();
        for w in 0..6 {
            let client = connect(&fixture.cluster, "shop").await;
            writers.spawn(async move {
                for n in 0..60 {
                    client
                        .batch_execute(&format!("begin; insert into t (w) select {w} from generate_series(1, 7)"))
                        .await
                        .unwrap();
                    tokio::time::sleep(Duration::from_millis(3 + (w * 13 + n * 7) % 40)).await;
                    let end = if n % 10 == 9 { "rollback" } else { "commit" };
                    client
                        .batch_execute(&format!("savepoint a; insert into t (w) values ({w}); release a; {end}"))
                        .await
                        .unwrap();
                }
            });
        }
        let nudger = connect(&fixture.cluster, "control").await;
        let mut kills = 0u64;
        while !writers.is_empty() {
            nudger.batch_execute("select pg_notify('peergate', 'wait:m')").await.unwrap();
            tokio::time::sleep(Duration::from_millis(60 + 29 * (kills % 7))).await;
            kills += 1;
            if kills.is_multiple_of(3) {
                fixture.abort_engine().await;
                fixture.start_engine("node-1");
            } else if kills.is_multiple_of(5) {
                let cut = "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'peergate%' and datname in ('shop', 'dwh')";
                nudger.batch_execute(cut).await.unwrap();
            }
            while let Some(ended) = writers.try_join_next() {
                ended.unwrap();
            }
        }
        assert!(kills > 5);
        fixture.caught_up().await;
        fixture.assert_same("select * from t", "select * from copy").await;
        assert_eq!(ask(&fixture.target, "select count(*) from copy").await, (6 * 54 * 8).to_string(), "{column}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_goes_on_with_the_partitions_that_are_not_done() {
    let mut fixture = start().await;
    fixture
        .source
        .batch_execute(
            "create table t (id int primary key, v text); insert into t select i, i from generate_series(1, 1000) i",
        )
        .await
        .unwrap();
    fixture
        .target
        .batch_execute(
            "create table copy (id int, v text);
             create function refuse() returns trigger language plpgsql as $$ begin
                 if new.id = 777 then raise 'not this one' using errcode = '23514'; end if; return new; end $$;
             create trigger refuse before insert on copy for each row execute function refuse()",
        )
        .await
        .unwrap();
    let options =
        r#"{"target_table": "copy", "watermark_column": "id", "partition_rows": "100", "parallel_workers": "1"}"#;
    fixture.create_query_mirror("select * from t", options).await;
    let error = fixture.try_caught_up().await.unwrap_err();
    assert!(
        error.starts_with("23514: mirror \"m\" is blocked: peer \"dwh\": not this one")
            && error.contains("writing to table \"public.copy\""),
        "{error}"
    );
    assert_eq!(ask(&fixture.target, "select count(*) from copy").await, "700");
    assert_eq!(
        fixture.ask("select state || ' ' || partitions || ' ' || partitions_done from peergate.mirror_rounds").await,
        "failed 10 7"
    );
    // What is done is not done again, whatever happens to the rows that it had.
    fixture.source.batch_execute("update t set v = 'new' where id in (1, 900)").await.unwrap();
    fixture.target.batch_execute("drop function refuse cascade").await.unwrap();
    fixture.stop_engine().await;
    fixture.start_engine("node-2");
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(
        ask(
            &fixture.target,
            "select count(*) || ' ' || count(distinct id) || ' ' || count(*) filter (where v = 'new') from copy"
        )
        .await,
        "1000 1000 1"
    );
    assert_eq!(
        fixture.ask("select state || ' ' || partitions_done from peergate.mirror_rounds where round = 1").await,
        "completed 10"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_about_a_mirror_of_a_query_do_what_they_say() {
    let fixture = start().await;
    fixture
        .source
        .batch_execute("create table t (id int primary key); insert into t select generate_series(1, 10)")
        .await
        .unwrap();
    let options = r#"{"target_table": "copy", "watermark_column": "id", "on_demand": "true"}"#;
    fixture.create_query_mirror("select * from t", options).await;
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select count(*) from copy").await, "0");
    let execute = "call peergate.execute_mirror('m')";
    let count = async || ask(&fixture.target, "select count(*) from copy").await;
    for n in ["10", "11"] {
        fixture.control.batch_execute(execute).await.unwrap();
        fixture.caught_up().await;
        assert_eq!(count().await, n);
        fixture.source.batch_execute("insert into t select max(id) + 1 from t").await.unwrap();
    }
    assert_eq!(fixture.ask("select state from peergate.mirrors").await, "running");
    // A resync replaces all that the table holds, at once.
    fixture.target.batch_execute("insert into copy values (-1)").await.unwrap();
    fixture.control.batch_execute("call peergate.resync_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_same("select * from t", "select * from copy").await;
    fixture.control.batch_execute("call peergate.pause_mirror('m')").await.unwrap();
    fixture.wait_for_state("paused").await;
    let refused = describe(&fixture.control.batch_execute(execute).await.unwrap_err());
    assert!(refused.starts_with("55000: mirror \"m\" is paused"), "{refused}");
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.control.batch_execute(execute).await.unwrap();
    fixture.caught_up().await;
    fixture.assert_same("select * from t", "select * from copy").await;
    fixture
        .control
        .batch_execute(r#"call peergate.set_mirror_options('m', '{"disabled": "false", "refresh_interval": "1s"}')"#)
        .await
        .unwrap();
    fixture.source.batch_execute("insert into t select max(id) + 1 from t").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_same("select * from t", "select * from copy").await;
    assert_eq!(fixture.ask("select count(*) from peergate.tasks where state <> 'completed'").await, "0");
    let shown = fixture.ask("select \"table\" || target || rows_copied from peergate.show_mirror('m')").await;
    assert!(shown.starts_with("(query)public.copy"), "{shown}");
    fixture.drop_query_mirror().await;

    let once = r#"{"target_table": "copy", "mode": "append", "run_once": "true", "truncate_target": "true"}"#;
    fixture.create_query_mirror("select id * 10 as id from t", once).await;
    fixture.caught_up().await;
    fixture.assert_same("select id * 10 from t", "select * from copy").await;
    assert_eq!(fixture.ask("select state from peergate.mirrors").await, "completed");
    fixture.drop_query_mirror().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_said_before_anything_is_written() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key, v text, doc json); create sequence s; insert into t values (1, 'x', '{}')").await.unwrap();
    fixture
        .target
        .batch_execute("create table copy (id int, v text, must int not null, sum int generated always as (id + 1) stored); create table num (id int, v int)")
        .await
        .unwrap();
    let upsert = |table: &str| format!(r#"{{"mode": "upsert", "key_columns": "id", "target_table": "{table}"}}"#);
    let append =
        |table: &str, column: &str| format!(r#"{{"target_table": "{table}", "watermark_column": "{column}"}}"#);
    for (query, options, expected) in [
        (
            "select * from nix",
            upsert("x"),
            "42P01: mirror \"m\" is blocked: peer \"shop\": relation \"nix\" does not exist",
        ),
        ("select 1) to program 'false' --", upsert("x"), "42601: "),
        ("select 1; select 2", upsert("x"), "42601: "),
        (
            "select id, v as id from t",
            upsert("x"),
            "42701: mirror \"m\" is blocked: the query gives two columns \"id\"",
        ),
        ("select v from t", upsert("x"), "42703: mirror \"m\" is blocked: the query lacks key column \"id\""),
        (
            "select id, v as other from t",
            upsert("copy"),
            "42703: mirror \"m\" is blocked: target table \"public.copy\" lacks column \"other\"",
        ),
        (
            "select id, v from t",
            upsert("num"),
            "55000: mirror \"m\" is blocked: target table \"public.num\" has no unique index on (id)",
        ),
        ("select id, 1 as sum, 1 as must from t", append("copy", "id"), "428C9: "),
        ("select id, v from t", append("copy", "id"), "23502: mirror \"m\" is blocked: column \"must\""),
        ("select id, v from t", append("num", "id"), "22P02: "),
        (
            "select id, v from t",
            append("x", "v"),
            "0A000: mirror \"m\" is blocked: column \"v\" of type text cannot be a watermark",
        ),
        ("select id, v from t", append("x", "nix"), "42703: "),
        ("select id from t union select 2", append("x", "xmin"), "0A000: mirror \"m\" is blocked: a query with UNION"),
        (
            "select id from t where id > 0",
            append("x", "xmin"),
            "42601: mirror \"m\" is blocked: the query cannot be limited by xmin from outside",
        ),
        ("delete from t returning id", append("x", "xmin"), "42601: "),
        ("select nextval('s') as id", upsert("x"), "25006: "),
        (
            "select 1 as id, i as v from generate_series(1, 2) i",
            upsert("x"),
            "21000: mirror \"m\" is blocked: the query gives several rows with the same key (id)",
        ),
    ] {
        fixture.create_query_mirror(query, &options).await;
        let error = fixture.try_caught_up().await.err().unwrap_or_else(|| panic!("{query} is not refused"));
        assert!(error.starts_with(expected), "{query}: {error}");
        fixture.drop_query_mirror().await;
        fixture.target.batch_execute("drop table if exists x").await.unwrap();
    }
    let missing = r#"{"mode": "upsert", "key_columns": "id", "target_table": "x", "create_table": "false"}"#;
    fixture.create_query_mirror("select * from t", missing).await;
    let error = fixture.try_caught_up().await.unwrap_err();
    assert!(error.starts_with("42P01: mirror \"m\" is blocked: target table \"public.x\" does not exist"), "{error}");
    assert_eq!(ask(&fixture.source, "select count(*) from t").await, "1");
}

/// Who rewrites a table leaves an empty one to older snapshots.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_rewritten_amid_a_round_loses_nothing() {
    let fixture = start().await;
    fixture
        .source
        .batch_execute(
            "create table t (id int primary key, v int); create table slow (n int);
             insert into t select i, i from generate_series(1, 40) i;
             create function slowly(i int) returns int language plpgsql as $$ begin perform pg_sleep(0.02); return i; end $$",
        )
        .await
        .unwrap();
    let options = r#"{"target_table": "copy", "watermark_column": "id", "watermark_table": "t", "partition_rows": "10", "parallel_workers": "1"}"#;
    fixture
        .create_query_mirror(
            "select slowly(id) as id, v::text as v from t where id between {{.start}} and {{.end}}",
            options,
        )
        .await;
    let begun = "select count(*) > 0 from peergate.mirror_partitions where state = 'done'";
    assert!(eventually(async || fixture.ask(begun).await == "t").await);
    // The reader's lock is there for as long as its transaction; a new session has none yet.
    fixture
        .source
        .batch_execute(
            "create table other as select * from t; alter table t rename to old; alter table other rename to t",
        )
        .await
        .unwrap();
    fixture.caught_up().await;
    fixture.assert_same("select id, v::text from t", "select * from copy").await;
}
