//! Both sides are compared at one position while changes go on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::task::JoinHandle;

use crate::filters::{has_filters, refused_before_15};
use crate::support::{Fixture, ask, connect, start};

/// Runs a verification and returns what it found: for each table `name result missing/different/extra repaired`, then the rows.
async fn verify(fixture: &Fixture, tables: &str, repair: bool) -> String {
    let call = format!("call peergate.start_verification('m', {tables}, {repair})");
    fixture.control.batch_execute(&call).await.unwrap();
    let task = fixture.ask("select max(id) from peergate.tasks where kind = 'verify_mirror'").await;
    fixture
        .wait_until(
            &format!("select case when state in ('pending', 'running') then state else 'over' end from peergate.tasks where id = {task}"),
            "over",
        )
        .await;
    let found = format!(
        "select coalesce((select error_sqlstate || ' ' || error_message from peergate.tasks where id = {task} and state <> 'completed'),
            (select string_agg(format('%s %s %s/%s/%s %s', source_name, result, missing, different, extra, repaired)
                               || coalesce(': ' || message, ''), ', ' order by source_name)
             from peergate.verification_tables where task_id = {task})
            || coalesce('; ' || (select string_agg(concat_ws(' ', kind, key, case when copies > 1 then 'x' || copies end), ', ' order by source_name, id)
                                 from peergate.verification_differences where task_id = {task}), ''))"
    );
    fixture.ask(&found).await
}

/// Clients that change the source all the time, all rows above 1000.
struct Load {
    stop: Arc<AtomicBool>,
    transactions: Arc<AtomicU64>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    async fn start(fixture: &Fixture) -> Load {
        let (stop, transactions) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut clients = Vec::new();
        for n in 0..3 {
            let client = connect(&fixture.cluster, "shop").await;
            let (stop, transactions) = (stop.clone(), transactions.clone());
            clients.push(tokio::spawn(async move {
                for i in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let id = 2000 + (i % 50) * 10 + n;
                    let change = format!(
                        "begin; insert into a values ({id}, 'load') on conflict (id) do update set v = a.v || '{i}' where length(a.v) < 50;
                         update a set v = left(v, 4) where id = {id} and length(v) > 40; insert into log values ({id}, '{i}');
                         delete from a where id = {} ; update b set n = n + 1 where k = 'load {n}'; commit",
                        id + 3
                    );
                    client.batch_execute(&change).await.unwrap();
                    transactions.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        Load { stop, transactions, clients }
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.unwrap();
        }
    }
}

const SCHEMA: &str = "
    create table a (id int primary key, v text); insert into a select i, 'v' || i from generate_series(1, 1000) i;
    create table b (k text primary key, n int); insert into b select 'k' || i, i from generate_series(1, 500) i;
    insert into b select 'load ' || i, 0 from generate_series(0, 2) i;
    create table log (id int, v text); insert into log select i % 10, 'same' from generate_series(1, 100) i";

#[tokio::test(flavor = "multi_thread")]
async fn under_load_only_what_was_changed_behind_the_mirrors_back_is_found() {
    let fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let load = Load::start(&fixture).await;
    for _ in 0..5 {
        assert_eq!(verify(&fixture, "null", false).await, "a equal 0/0/0 0, b equal 0/0/0 0, log equal 0/0/0 0");
    }
    let before = load.transactions.load(Ordering::Relaxed);
    assert!(before > 0, "there was no load");
    let behind = "update a set v = 'other' where id = 7; delete from a where id = 8; insert into a values (1500, 'extra');
                  update b set n = -1 where k = 'k3'; delete from log where ctid = (select ctid from log where id = 3 and v = 'same' limit 1);
                  insert into log values (1, 'same'), (1, 'same'), (77, null)";
    fixture.target.batch_execute(behind).await.unwrap();
    let expected = "a different 1/1/1 0, b different 0/1/0 0, log different 1/0/3 0; missing (id)=(8), different (id)=(7), extra (id)=(1500), \
                    different (k)=(k3), ";
    let found = verify(&fixture, "null", false).await;
    let mut rows: Vec<&str> = found.split("; ").nth(1).unwrap().split(", ").collect();
    rows.sort_unstable();
    let mut wanted = vec![
        "different (id)=(7)",
        "extra (id)=(1500)",
        "missing (id)=(8)",
        "different (k)=(k3)",
        "missing (3,same)",
        "extra (1,same) x2",
        "extra (77,)",
    ];
    wanted.sort_unstable();
    assert_eq!(rows, wanted);
    assert_eq!(found.split("; ").next(), expected.split("; ").next());
    let only_b = verify(&fixture, r#"'[{"schema": "public", "name": "b"}]'"#, false).await;
    assert_eq!(only_b, "b different 0/1/0 0; different (k)=(k3)");
    assert!(load.transactions.load(Ordering::Relaxed) > before, "the load did not go on");
    load.stop().await;
    let last = "select string_agg(source_name || ' ' || different, ', ' order by source_name) from peergate.verifications where is_last";
    assert_eq!(fixture.ask(last).await, "a 1, b 1, log 0");
    assert_eq!(ask(&fixture.source, "select count(*) from pg_replication_slots where temporary").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_waits_for_any_more_is_canceled() {
    let fixture = start().await;
    fixture.source.batch_execute("create table a (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let id: i64 = fixture.ask("select id from peergate.mirrors").await.parse().unwrap();
    let waiter = -5_000_000_000;
    let task = fixture.catalog.begin_verification(id, None, false, "somebody", waiter).await.unwrap();
    let state = format!("select state || ' ' || created_by from peergate.tasks where id = {task}");
    fixture.wait_until(&state, "canceled somebody").await;
    let session = connect(&fixture.cluster, "control").await;
    session.batch_execute(&format!("select pg_advisory_lock({waiter})")).await.unwrap();
    let task = fixture.catalog.begin_verification(id, None, false, "somebody", waiter).await.unwrap();
    fixture.wait_until(&format!("select state from peergate.tasks where id = {task}"), "completed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repair_mends_exactly_what_differs_while_the_same_rows_change() {
    let fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    // Rows that the target has and the source changes all the time: what is mended must never be older than what the stream brought.
    let (stop, client) = (Arc::new(AtomicBool::new(false)), connect(&fixture.cluster, "shop").await);
    let changing = tokio::spawn({
        let stop = stop.clone();
        async move {
            for i in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let change = format!(
                    "update a set v = '{i}' where id between 1 and 20; update b set n = {i} where k in ('k1', 'k2', 'k3')"
                );
                client.batch_execute(&change).await.unwrap();
            }
        }
    });
    let load = Load::start(&fixture).await;
    let behind = "update a set v = 'other' where id between 10 and 30; delete from a where id between 100 and 1000; insert into a select i, 'extra' from generate_series(5000, 5100) i;
                  update b set n = -1; delete from log where v = 'same' and id < 5; insert into log values (77, null), (77, null), (1, 'same')";
    fixture.target.batch_execute(behind).await.unwrap();
    let found = verify(&fixture, "null", true).await;
    let tables = found.split("; ").next().unwrap();
    for (table, result) in ["a", "b", "log"].into_iter().zip(tables.split(", ")) {
        assert!(result.starts_with(&format!("{table} repaired ")), "{tables}");
    }
    assert!(tables.contains("a repaired 901/") && tables.contains("/101 "), "{tables}");
    assert!(tables.ends_with("log repaired 49/0/2 51"), "{tables}");
    assert_eq!(verify(&fixture, "null", false).await, "a equal 0/0/0 0, b equal 0/0/0 0, log equal 0/0/0 0");
    stop.store(true, Ordering::Relaxed);
    changing.await.unwrap();
    load.stop().await;
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert_eq!(verify(&fixture, "null", true).await, "a equal 0/0/0 0, b equal 0/0/0 0, log equal 0/0/0 0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_repaired_is_told_and_stops_nobody() {
    let fixture = start().await;
    fixture.source.batch_execute("create table a (id int primary key, v int); insert into a select i, i from generate_series(1, 10) i; create table b (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture
        .target
        .batch_execute("delete from a where id = 7; alter table a add check (v <> 7); insert into b values (1)")
        .await
        .unwrap();
    let found = verify(&fixture, "null", true).await;
    assert!(
        found.starts_with(
            "a different 1/0/0 0: not repaired: peer \"dwh\": new row for relation \"a\" violates check constraint"
        ),
        "{found}"
    );
    assert!(found.contains("b repaired 0/0/1 1; missing (id)=(7), extra (id)=(1)"), "{found}");
    fixture.source.batch_execute("insert into a values (11, 11)").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(fixture.ask("select state from peergate.mirrors").await, "running");
}

/// Types, columns and tables that are not the same on both sides.
#[tokio::test(flavor = "multi_thread")]
async fn tables_that_look_different_on_both_sides_are_compared_and_repaired() {
    let fixture = start().await;
    let source = "
        create type mood as enum ('sad', 'happy'); create domain positive as int check (value > 0); create schema odd;
        create table types (id int primary key, n numeric(10,2), f float8, f4 float4, t text, c char(5), vc varchar(5), b bytea, ts timestamp, tz timestamptz,
            d date, i interval, j json, jb jsonb, x xml, u uuid, a int[], ta text[], m mood, p positive, r int4range, bits bit varying, net inet, q \"char\", mo money, bo bool, ft tsvector, pt point);
        insert into types select i, i / 3.0, i / 7.0, i / 7.0, 'tëxt ' || i, 'c', 'v', decode(md5(i::text), 'hex'), '2024-02-29 12:00:00.123456', '2024-02-29 12:00:00+05:30', '0044-03-15 BC',
            '1 year -3 days 04:05:06.7', '{\"b\": 1,  \"a\": [2]}', '{\"b\": 1,  \"a\": [2]}', '<a/>', md5(i::text)::uuid, array[1, null, i], array['a,b', null, '\"q\"', ''], 'happy', 5, '[1,5)',
            b'1011', '10.0.0.1/8', '\\x', 12.34, true, 'a:1 b:2', '(1,2)' from generate_series(1, 50) i;
        insert into types (id) values (51); insert into types (id, f, t, ts) values (52, '-0', '', 'infinity'), (53, 'NaN', '(,)\"\\\\', '-infinity');
        create table \"odd\".\"T, \"\"x\" (\"Id\" text, \"second key\" int, secret text, v text, primary key (\"second key\", \"Id\"));
        insert into \"odd\".\"T, \"\"x\" select 'k' || i, i % 3, 'secret', 'v' from generate_series(1, 30) i;
        create table other_types (id int primary key, n numeric, s int, v varchar(10), ts timestamp(6), c char(8));
        insert into other_types select i, i + 0.5, i, 'v', '2024-01-01 00:00:00.25', 'pad' from generate_series(1, 20) i; insert into other_types (id) values (99);
        create table parts (id int, day date, v text, primary key (id, day)) partition by range (day);
        create table parts_1 partition of parts for values from ('2024-01-01') to ('2024-02-01');
        create table parts_2 partition of parts for values from ('2024-02-01') to ('2024-03-01');
        insert into parts select i, date '2024-01-01' + i, 'v' from generate_series(1, 50) i;
        create table generated (id int primary key, v int, g int generated always as (v * 2) stored); insert into generated values (1, 1), (2, 2);
        create table identity (id int generated always as identity primary key, v text); insert into identity (v) values ('a'), ('b'), ('c');
        create table nothing (); insert into nothing select from generate_series(1, 3);
        create table big (id int primary key, v text); insert into big select i, repeat(md5(i::text), 3000) from generate_series(1, 20) i";
    fixture.source.batch_execute(source).await.unwrap();
    let target = "
        create table other (c text, note text default 'kept', v text, id bigint primary key, s text, ts timestamptz(1), n numeric(12,3));
        create table generated (extra int, g int generated always as (v + 1) stored, v bigint, id bigint primary key)";
    fixture.target.batch_execute(target).await.unwrap();
    let tables: Vec<String> = ["types", "parts", "generated", "identity", "nothing", "big"]
        .map(|t| {
            format!(r#"{{"from": {{"schema": "public", "name": "{t}"}}, "to": {{"schema": "public", "name": "{t}"}}}}"#)
        })
        .into();
    let selection = format!(
        r#"{{"tables": [{}, {{"from": {{"schema": "odd", "name": "T, \"x"}}, "to": {{"schema": "new", "name": "Renamed"}}, "columns": ["Id", "second key", "v"]}},
            {{"from": {{"schema": "public", "name": "other_types"}}, "to": {{"schema": "public", "name": "other"}}}}]}}"#,
        tables.join(", ")
    );
    fixture.create_mirror(&selection, "{}").await;
    fixture.caught_up().await;
    let equal = |name: &str| format!("{name} equal 0/0/0 0");
    let names = ["big", "generated", "identity", "nothing", "other_types", "parts", "T, \"x", "types"];
    let mut all = verify(&fixture, "null", false).await;
    for name in names {
        assert!(all.contains(&equal(name)), "{name}: {all}");
        all = all.replace(&equal(name), "");
    }
    let behind = "
        update types set f = 0 where id = 52; update types set jb = '{}' where id = 3; update types set t = null where id = 4; delete from types where id = 51;
        update new.\"Renamed\" set v = 'w' where \"Id\" = 'k5'; delete from new.\"Renamed\" where \"Id\" = 'k6'; insert into new.\"Renamed\" values ('a, (b)', 7, 'x');
        update other set note = 'mine', n = n + 0.001 where id = 3; update other set ts = null where id = 4; delete from other where id = 99;
        update parts set v = 'w' where id = 40; delete from parts where id = 2; update generated set v = 7 where id = 2; delete from identity where id = 2;
        update identity set v = 'z' where id = 3; insert into nothing default values; update big set v = left(v, -1) where id = 20; delete from big where id = 19";
    fixture.target.batch_execute(behind).await.unwrap();
    let found = verify(&fixture, "null", true).await;
    for wanted in [
        "types repaired 1/3/0 4",
        "T, \"x repaired 1/1/1 3",
        "other_types repaired 1/2/0 3",
        "parts repaired 1/1/0 2",
        "generated repaired 0/1/0 1",
        "identity repaired 1/1/0 2",
        "nothing repaired 0/0/1 1",
        "big repaired 1/1/0 2",
        "extra (second key, Id)=(7, a, (b))",
        "missing (id, day)=(2, 2024-01-03)",
    ] {
        assert!(found.contains(wanted), "{wanted}: {found}");
    }
    let mut all = verify(&fixture, "null", false).await;
    for name in names {
        assert!(all.contains(&equal(name)), "{name}: {all}");
        all = all.replace(&equal(name), "");
    }
    assert_eq!(ask(&fixture.target, "select note from other where id = 3").await, "mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_verification_that_the_engine_leaves_is_begun_anew_by_the_next_one() {
    let mut fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    // A transaction that writes keeps the source from giving a snapshot.
    fixture.source.batch_execute("begin; update a set v = 'w' where id = 1").await.unwrap();
    fixture.control.batch_execute("call peergate.start_verification('m')").await.unwrap();
    let state = "select state from peergate.tasks where kind = 'verify_mirror'";
    fixture.wait_until(state, "running").await;
    fixture.stop_engine().await;
    fixture.start_engine("node-2");
    fixture.wait_for_state("running").await;
    fixture.source.batch_execute("commit").await.unwrap();
    fixture.wait_until(state, "completed").await;
    assert_eq!(fixture.ask("select count(*) from peergate.verifications where result = 'equal'").await, "3");
    // A canceled task stops it, too.
    fixture.source.batch_execute("begin; update a set v = 'x' where id = 1").await.unwrap();
    fixture.control.batch_execute("call peergate.start_verification('m')").await.unwrap();
    let state = "select state from peergate.tasks where kind = 'verify_mirror' order by id desc limit 1";
    fixture.wait_until(state, "running").await;
    fixture
        .control
        .batch_execute("update peergate.tasks set state = 'canceled' where state = 'running'")
        .await
        .unwrap();
    fixture.source.batch_execute("commit").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(fixture.ask(state).await, "canceled");
}

/// A mirror of some rows is compared as to these, and what the target has beyond them is extra.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_the_mirror_does_not_take_are_not_missed() {
    let fixture = start().await;
    if !has_filters(&fixture).await {
        return refused_before_15(&fixture).await;
    }
    fixture
        .source
        .batch_execute(
            "create table a (id int primary key, v text); insert into a select i, 'v' from generate_series(1, 100) i",
        )
        .await
        .unwrap();
    let selection = r#"{"tables": [{"from": {"schema": "public", "name": "a"}, "to": {"schema": "public", "name": "a"}, "where": "id % 2 = 0"}]}"#;
    fixture.create_mirror(selection, "{}").await;
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select count(*) from a").await, "50");
    assert_eq!(verify(&fixture, "null", false).await, "a equal 0/0/0 0");
    fixture
        .target
        .batch_execute("insert into a values (7, 'v'); delete from a where id = 8; update a set v = 'w' where id = 10")
        .await
        .unwrap();
    assert!(verify(&fixture, "null", true).await.starts_with("a repaired 1/1/1 3"));
    assert_eq!(verify(&fixture, "null", false).await, "a equal 0/0/0 0");
}
