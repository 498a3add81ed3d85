//! Rows that were deleted on the source stay on the target, marked, and each says when it was written last.

use std::collections::BTreeMap;

use crate::support::{Fixture, ask, start};

/// What the target must hold, kept by triggers of the source, row by row: rows that come take the place of deleted ones.
const SHADOW: &str = "
    create schema shadow;
    create table shadow.rows (tbl text, key jsonb, content jsonb, gone boolean, n bigserial primary key);
    create index on shadow.rows (tbl, key);
    create function shadow.key_of(content jsonb, columns text[]) returns jsonb language sql immutable as
        'select coalesce(jsonb_agg(content -> c order by n), content) from unnest(columns) with ordinality u (c, n)';
    create function shadow.note() returns trigger language plpgsql as $$
    declare
        columns text[] := coalesce(string_to_array(tg_argv[0], ','), '{}');
    begin
        if tg_op = 'TRUNCATE' then
            update shadow.rows set gone = true where tbl = tg_table_name and not gone;
            return null;
        end if;
        if tg_op <> 'DELETE' and columns <> '{}' then
            delete from shadow.rows where tbl = tg_table_name and key = shadow.key_of(to_jsonb(new), columns) and gone;
        end if;
        if tg_op = 'INSERT' then
            insert into shadow.rows values (tg_table_name, shadow.key_of(to_jsonb(new), columns), to_jsonb(new), false);
        elsif tg_op = 'UPDATE' then
            update shadow.rows set key = shadow.key_of(to_jsonb(new), columns), content = to_jsonb(new)
            where n = (select n from shadow.rows where tbl = tg_table_name and key = shadow.key_of(to_jsonb(old), columns) and not gone limit 1);
        else
            update shadow.rows set gone = true
            where n = (select n from shadow.rows where tbl = tg_table_name and key = shadow.key_of(to_jsonb(old), columns) and not gone limit 1);
        end if;
        return null;
    end $$";

const TABLES: &str = "
    create table orders (id int primary key, email text unique, big text, n int); alter table orders alter big set storage external;
    create table pair (a int, b text, v text, primary key (b, a)); alter table pair replica identity full;
    create table numbered (id int primary key, v text, serial int generated always as identity);
    create table log (n int, t text); alter table log replica identity full;
    create table lines (t text)";

/// Many changes of few keys in one transaction, `ROUND` of them.
const STORM: &str = "do $$
    declare k int; l int; begin perform setseed(SEED);
    for i in 1..ROUND loop
        k := random() * 12; l := random() * 12;
        case (random() * 9)::int
        when 0 then insert into orders values (k, 'e' || l, repeat('x', 3000 * (l % 3)) || i, i) on conflict do nothing;
                    insert into numbered (id, v) values (k, 'v' || i) on conflict do nothing;
        when 1 then delete from orders where id = k; delete from numbered where id = l;
        when 2 then update orders set n = n + 1 where id = k; update numbered set v = v || '!' where id = l;
        when 3 then update orders set id = l where id = k and not exists (select from orders where id = l);
                    update numbered set id = k, serial = default where id = l and not exists (select from numbered where id = k);
        when 4 then update orders set big = repeat('y', 3000) || i where id = k;
        when 5 then insert into pair values (k, l, 'v' || i) on conflict do nothing; insert into log values (k, 't'); insert into lines values (i);
        when 6 then delete from pair where a = k; delete from log where ctid = (select ctid from log where n = k limit 1);
        when 7 then update pair set v = 'w' || i where a = k; update log set t = t || i where n = l;
        when 8 then update pair set a = l where a = k and not exists (select from pair p where p.a = l);
        else if random() < 0.03 then truncate orders, log; end if;
        end case;
    end loop; end $$";

fn storm(seed: f64, round: usize) -> String {
    STORM.replace("SEED", &seed.to_string()).replace("ROUND", &round.to_string())
}

async fn prepare(fixture: &Fixture) {
    fixture.source.batch_execute(&format!("{SHADOW};{TABLES}")).await.unwrap();
    for (table, key) in [("orders", "id"), ("pair", "b,a"), ("numbered", "id"), ("log", ""), ("lines", "")] {
        let argument = if key.is_empty() { String::new() } else { format!("'{key}'") };
        let triggers = format!(
            "create trigger note after insert or update or delete on {table} for each row execute function shadow.note({argument});
             create trigger note_all after truncate on {table} for each statement execute function shadow.note({argument})"
        );
        fixture.source.batch_execute(&triggers).await.unwrap();
    }
}

async fn rows(client: &tokio_postgres::Client, query: &str) -> BTreeMap<String, i64> {
    client.query(query, &[]).await.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect()
}

/// Compares the target's rows with those that it must have, deleted ones included.
async fn same_rows(fixture: &Fixture, what: &str) {
    fixture.caught_up().await;
    for table in ["orders", "pair", "numbered", "log", "lines"] {
        let expected =
            format!("select content::text || ' ' || gone, count(*) from shadow.rows where tbl = '{table}' group by 1");
        let found = format!(
            "select (to_jsonb(whole_row) - 'gone' - 'written')::text || ' ' || gone, count(*) from {table} whole_row group by 1"
        );
        let (expected, found) = (rows(&fixture.source, &expected).await, rows(&fixture.target, &found).await);
        let missing: Vec<_> = expected.iter().filter(|(row, n)| found.get(*row) != Some(n)).take(3).collect();
        let surplus: Vec<_> = found.iter().filter(|(row, n)| expected.get(*row) != Some(n)).take(3).collect();
        assert!(missing.is_empty() && surplus.is_empty(), "{what}: {table}: missing {missing:?}, too much {surplus:?}");
    }
}

const OPTIONS: &str = r#"{"soft_delete_column": "gone", "synced_at_column": "written"}"#;

async fn weather_storms(fixture: &Fixture) {
    fixture.source.batch_execute(&storm(0.1, 200)).await.unwrap();
    fixture.source.batch_execute("delete from shadow.rows where gone").await.unwrap();
    fixture.create_mirror(r#"{"schemas": [{"from": "public", "to": "public"}]}"#, OPTIONS).await;
    same_rows(fixture, "copy").await;
    for change in [
        "insert into orders values (100, 'a', 'big', 1); delete from orders where id = 100",
        "insert into orders values (100, 'a', 'again', 2)",
        "begin; update orders set n = 3 where id = 100; delete from orders where id = 100; commit",
        "begin; insert into orders values (100, 'b', 'once more', 3); update orders set id = 101 where id = 100; commit",
        "begin; delete from orders where id = 101; insert into orders values (101, 'b', repeat('z', 9000), 4); update orders set id = 102 where id = 101; delete from orders where id = 102; commit",
        "insert into orders select i, 'm' || i, repeat('q', 5000), i from generate_series(200, 260) i",
        "begin; update orders set id = id + 1000 where id between 200 and 260; delete from orders where id between 1200 and 1230; insert into orders values (1201, 'c', 'd', 1); commit",
        "insert into pair select i, i, 'x' from generate_series(300, 340) i; delete from pair where a > 320",
        "insert into numbered (id) select generate_series(400, 440); update numbered set v = 'x', serial = default where id >= 400; delete from numbered where id > 420",
        "insert into numbered (id) select generate_series(400, 440) on conflict do nothing",
        "truncate lines; insert into lines values ('a'), ('a'); truncate pair",
    ] {
        fixture.source.batch_execute(change).await.unwrap();
        same_rows(fixture, change).await;
    }
    for n in 0..12 {
        fixture.source.batch_execute(&storm(f64::from(n) / 20.0, 250)).await.unwrap();
        same_rows(fixture, &format!("storm {n}")).await;
    }
    // Many transactions in one batch.
    fixture.control.batch_execute("call peergate.pause_mirror('m')").await.unwrap();
    fixture.wait_for_state("paused").await;
    for n in 0..150 {
        fixture.source.batch_execute(&storm(-f64::from(n) / 200.0, 4)).await.unwrap();
    }
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    same_rows(fixture, "many transactions").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_rows_stay_as_they_were_last_whatever_the_batches() {
    let fixture = start().await;
    prepare(&fixture).await;
    weather_storms(&fixture).await;

    // The time is that of the target's transaction, of the rows that were written.
    let stamps = "insert into orders values (500, 's', '', 1), (501, 't', '', 1)";
    fixture.source.batch_execute(stamps).await.unwrap();
    fixture.caught_up().await;
    let stamp = "select string_agg(written::text, ' ' order by id) from orders where id in (500, 501)";
    let before = ask(&fixture.target, stamp).await;
    fixture.source.batch_execute("update orders set n = 2 where id = 500").await.unwrap();
    fixture.caught_up().await;
    let after = ask(&fixture.target, stamp).await;
    let parts = |stamps: &str| stamps.split(' ').map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(parts(&before)[2..], parts(&after)[2..], "another row was not written");
    assert!(before < after, "{before} {after}");
    let defaults = "select string_agg(column_name || ' ' || data_type || ' ' || is_nullable, ', ' order by column_name)
                    from information_schema.columns where table_name = 'orders' and column_name in ('gone', 'written')";
    assert_eq!(ask(&fixture.target, defaults).await, "gone boolean NO, written timestamp with time zone NO");
    // What was unique may come again.
    assert_eq!(
        ask(&fixture.target, "select count(*) from pg_index where indrelid = 'orders'::regclass and indisunique").await,
        "1"
    );
    assert_eq!(ask(&fixture.target, "select count(*) from pg_index where indrelid = 'orders'::regclass").await, "2");

    // Neither a comparison nor a new copy takes deleted rows for surplus ones.
    let verify = "call peergate.start_verification('m', null, true)";
    let state = "select state from peergate.tasks where kind = 'verify_mirror' order by id desc limit 1";
    let results = "select string_agg(distinct result, ' ') || ' ' || sum(missing) || ' ' || sum(different) || ' ' || sum(extra)
                   from peergate.verification_tables where task_id = (select max(task_id) from peergate.verification_tables)";
    fixture.control.batch_execute(verify).await.unwrap();
    fixture.wait_until(state, "completed").await;
    assert_eq!(fixture.ask(results).await, "equal 0 0 0");
    same_rows(&fixture, "verified").await;
    // One that the source never had is marked; one that is only marked comes back.
    let spoil = "insert into orders values (9000, 'surplus', '', 1); update orders set n = -1 where id = 501; update orders set gone = true where id = 500";
    fixture.target.batch_execute(spoil).await.unwrap();
    fixture.control.batch_execute(verify).await.unwrap();
    fixture.wait_until(state, "completed").await;
    assert_eq!(fixture.ask(results).await, "equal repaired 1 1 1");
    assert_eq!(ask(&fixture.target, "delete from orders where id = 9000 returning gone").await, "t");
    same_rows(&fixture, "repaired").await;
    fixture.target.batch_execute(spoil).await.unwrap();
    fixture.control.batch_execute("call peergate.resync_mirror('m')").await.unwrap();
    fixture.wait_until("select count(*) from peergate.tasks where state not in ('completed')", "0").await;
    assert_eq!(ask(&fixture.target, "delete from orders where id = 9000 returning gone").await, "t");
    same_rows(&fixture, "copied anew").await;
    // Tables that come late are like the others.
    fixture
        .source
        .batch_execute("create table late (id int primary key); insert into late values (1), (2)")
        .await
        .unwrap();
    fixture.control.batch_execute("call peergate.refresh_mirror_tables('m')").await.unwrap();
    fixture.wait_until("select state from peergate.mirror_tables where source_name = 'late'", "live").await;
    fixture
        .source
        .batch_execute("delete from late where id = 1; alter table late add column v int default 7")
        .await
        .unwrap();
    fixture.source.batch_execute("insert into late values (1, 8); delete from late where id = 2").await.unwrap();
    fixture.caught_up().await;
    let late = "select string_agg(concat_ws(' ', id, v, gone), ', ' order by id) from late";
    assert_eq!(ask(&fixture.target, late).await, "1 8 f, 2 7 t");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_that_are_written_in_their_order_come_to_the_same() {
    let fixture = start().await;
    prepare(&fixture).await;
    let role = "create role writer login; grant create, temporary on database dwh to writer; grant usage, create on schema public to writer";
    fixture.target.batch_execute(role).await.unwrap();
    let user = "update peergate.peers set options = options || '{\"user\": \"writer\"}' where name = 'dwh'";
    fixture.control.batch_execute(user).await.unwrap();
    weather_storms(&fixture).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_go_with_their_partition_are_marked() {
    let fixture = start().await;
    let schema = "create table log (id int primary key) partition by range (id);
        create table log_1 partition of log for values from (0) to (10); create table log_2 partition of log for values from (10) to (20);
        insert into log values (1), (2), (11), (12)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, OPTIONS).await;
    fixture.caught_up().await;
    fixture.source.batch_execute("delete from log where id = 2").await.unwrap();
    fixture.caught_up().await;
    fixture.source.batch_execute("drop table log_1").await.unwrap();
    let rows = "select string_agg(concat_ws(' ', id, gone), ', ' order by id) from log";
    let marked = crate::support::eventually(async || ask(&fixture.target, rows).await == "1 t, 2 t, 11 f, 12 f").await;
    assert!(marked, "{}\n{}", ask(&fixture.target, rows).await, fixture.explain().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_runs_gets_the_columns_and_keeps_them() {
    let fixture = start().await;
    let schema = "create table t (id int primary key, v text); insert into t values (1, 'a'), (2, 'b'), (3, 'c')";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.source.batch_execute("delete from t where id = 1").await.unwrap();
    fixture.caught_up().await;
    let set =
        r#"call peergate.set_mirror_options('m', '{"soft_delete_column": "Is gone", "synced_at_col_name": "at"}')"#;
    fixture.control.batch_execute(set).await.unwrap();
    fixture
        .wait_until("select count(*) from peergate.mirror_events where message like 'target table % got column %'", "1")
        .await;
    fixture.source.batch_execute("delete from t where id = 2; insert into t values (4, 'd')").await.unwrap();
    fixture.caught_up().await;
    let rows = r#"select string_agg(concat_ws(' ', id, v, "Is gone", at is not null), ', ' order by id) from t"#;
    let found =
        crate::support::eventually(async || ask(&fixture.target, rows).await == "2 b t t, 3 c f t, 4 d f t").await;
    assert!(found, "{}\n{}", ask(&fixture.target, rows).await, fixture.explain().await);
    for (other, error) in [
        (r#"{"soft_delete_column": "other"}"#, "0A000"),
        (r#"{"disable_peerdb_columns": "true"}"#, "0A000"),
        (r#"{"synced_at_column": "Is gone"}"#, "42701"),
    ] {
        let set = format!("call peergate.set_mirror_options('m', '{other}')");
        let refused = fixture.control.batch_execute(&set).await.unwrap_err();
        assert_eq!(refused.code().unwrap().code(), error, "{other}: {refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_have_the_columns_is_said_before_anything_is_made() {
    let fixture = start().await;
    let schema = "create table clash (id int primary key, gone int); create table u (id int primary key, code text); create table typed (id int primary key)";
    fixture.source.batch_execute(schema).await.unwrap();
    let on_target = "create table u (id int primary key, code text unique); create table typed (id int primary key, gone int, written text)";
    fixture.target.batch_execute(on_target).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, OPTIONS).await;
    let error = fixture.try_caught_up().await.unwrap_err();
    for said in [
        "column \"gone\" of source table \"public.clash\" has the name of a column that the mirror writes itself",
        "target table \"public.u\" has a unique index on (code)",
        "column \"gone\" of target table \"public.typed\" is integer",
        "column \"written\" of target table \"public.typed\" is text",
    ] {
        assert!(error.contains(said), "{said}: {error}");
    }
    // What is there already is taken as it is.
    let mend = "drop table typed; create table typed (id int primary key, gone bool, written timestamp); drop table u; create table u (id int primary key, code text); create unique index on u (code) where not gone";
    let mend = mend.replace("create unique", "alter table u add gone bool default false; create unique");
    fixture.target.batch_execute(&mend).await.unwrap();
    fixture.source.batch_execute("alter table clash drop gone; insert into typed values (1), (2)").await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.source.batch_execute("delete from typed where id = 1; insert into typed values (3); insert into u values (1, 'x'); delete from u; insert into u values (2, 'x')").await.unwrap();
    fixture.caught_up().await;
    let typed = "select string_agg(concat_ws(' ', id, gone, written is not null), ', ' order by id) from typed";
    assert_eq!(ask(&fixture.target, typed).await, "1 t t, 2 f, 3 f t");
    assert_eq!(
        ask(&fixture.target, "select string_agg(id || ' ' || gone, ', ' order by id) from u").await,
        "1 true, 2 false"
    );
}
