//! The copy: every type, partitions, odd names, and writes that go on meanwhile.

use crate::support::{ask, connect, eventually, start};

/// Types and values that are easily damaged on the way.
const AWKWARD: &str = r#"
    create type mood as enum ('sad', 'it''s ok', 'Ünicode');
    create domain positive as integer check (value > 0);
    create type address as (street text, "No." integer, mood mood);
    create type span as range (subtype = float8);
    create table awkward (
        id bigint primary key, t text, v varchar(10), c char(5), n numeric, n2 numeric(20, 5), f4 float4, f8 float8, b bytea,
        ts timestamp, tz timestamptz, d date, ti time, tt timetz, iv interval, u uuid, j json, jb jsonb, bo bool, i2 int2,
        mo mood, po positive, ad address, sp span, r int4range, mr int4multirange, a int[], at text[], am mood[], aa address[],
        inet inet, mac macaddr, bi bit(3), vb varbit, p point, tsv tsvector, x xml, money money, rc regclass, oid oid
    );
    insert into awkward values
    (1, E'quote '' double " newline \n tab \t backslash \\ \\. Ünicode 🐘', 'v', 'c', 'NaN', 123456789012345.12345, 'NaN', '-Infinity', '\x00ff5c',
     'infinity', '-infinity', 'infinity', '24:00', '12:00:00.123456+02:30', '-1 year 2 mons -3 days 04:05:06.789', gen_random_uuid(),
     '{"a":  1, "a": 2}', '{"k": [null, 1e400, "\u00e9"]}', true, -32768, 'it''s ok', 7, ('Main "St"', null, 'Ünicode'), '[1.5,2.5)', '[1,5)',
     '{[1,3),[5,7)}', '{1,NULL,3}', '{"a,b",NULL,"c\"d","NULL",""}', '{sad,NULL}', array[('x', 1, 'sad')::address, null],
     '10.0.0.0/8', '08:00:2b:01:02:03', '101', '1', '(1.5,-2)', 'a:1 b:2', '<x>é</x>', 12.34, 'awkward', 4294967295),
    (2, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null,
     null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null),
    (3, '', '', '', 1e-1000, 0, 1.17549435e-38, 5e-324, '', '4713-01-01 BC', '294276-12-31 23:59:59.999999+00', '5874897-12-31', '00:00', '00:00+15:59',
     '178000000 years', '00000000-0000-0000-0000-000000000000', 'null', '{}', false, 0, 'sad', 1, row(null, null, null), 'empty', 'empty', '{}',
     '{{1,2},{3,4}}', '{}', '{}', '{}', '::1', 'ff:ff:ff:ff:ff:ff', '000', '', '(0,0)', '', '', -0.01, null, 0);
    create table binary_only (id int primary key, t text, n numeric, tz timestamptz, b bytea, a int[], jb jsonb, mo mood, po positive, iv interval);
    insert into binary_only values (1, E'\\ \t \n', 'NaN', 'infinity', '\x0001', '{1,NULL}', '{"a": null}', 'Ünicode', 3, '1 mon -1 day'),
        (2, null, null, null, null, null, null, null, null, null), (3, repeat('x', 1000000), 1e300, now(), '', '{}', '[]', 'sad', 9, '0');
"#;

#[tokio::test(flavor = "multi_thread")]
async fn every_type_is_the_same_in_copy_and_in_stream() {
    let mut fixture = start().await;
    // The databases' own settings must not matter.
    let odd = "alter database shop set datestyle = 'SQL, DMY'; alter database shop set intervalstyle = 'sql_standard'; alter database shop set timezone = 'Asia/Kolkata';
               alter database shop set extra_float_digits = 0;
               alter database shop set bytea_output = 'escape'";
    fixture.source.batch_execute(odd).await.unwrap();
    fixture.target.batch_execute("alter database dwh set datestyle = 'German'").await.unwrap();
    let version = "select current_setting('server_version_num')::int < 140000";
    let old = ask(&fixture.source, version).await == "t" || ask(&fixture.target, version).await == "t";
    let awkward = if old { AWKWARD.replace("int4multirange", "text") } else { AWKWARD.to_owned() };
    fixture.source.batch_execute(&awkward).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    assert_eq!(fixture.assert_equal().await, 2);
    let stream = "create temp table two as select * from awkward where id <> 1; update two set id = id + 10; insert into awkward select * from two;
                  create temp table one as select * from awkward where id = 1; update one set id = 11; insert into awkward select * from one;
                  update awkward set t = t || 'x', am = am || 'sad'::mood where id in (1, 3);
                  insert into binary_only select id + 10, t, n, tz, b, a, jb, mo, po, iv from binary_only;
                  update binary_only set n = n + 1 where id = 3; update binary_only set id = id + 100 where id = 13; delete from awkward where id = 12";
    fixture.source.batch_execute(stream).await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    // A mirror all of whose types are safe streams in binary.
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
    fixture.target.batch_execute("drop table awkward, binary_only").await.unwrap();
    let only = r#"{"tables": [{"from": {"schema": "public", "name": "binary_only"}, "to": {"schema": "public", "name": "binary_only"}}]}"#;
    fixture.create_mirror(only, "{}").await;
    fixture.caught_up().await;
    let stream = "insert into binary_only select id + 1000, t, n, tz, b, a, jb, mo, po, iv from binary_only; update binary_only set n = 7 where id = 3;
                  update binary_only set id = id + 5000 where id = 1003; delete from binary_only where id = 1; update binary_only set t = '\\' where id = 2";
    fixture.source.batch_execute(stream).await.unwrap();
    fixture.caught_up().await;
    fixture.source.batch_execute("drop table awkward").await.unwrap();
    fixture.assert_equal().await;
    fixture.stop_engine().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_made_with_keys_defaults_identity_and_indexes() {
    let fixture = start().await;
    let schema = r#"
        create schema "Odd ""Schema";
        create table "Odd ""Schema"."Select" ("From" serial primary key, "a,b" text not null default 'it''s', "ü" int generated always as identity,
            g int generated always as ("From" * 2) stored, unique ("a,b"));
        create index "Some Index" on "Odd ""Schema"."Select" (lower("a,b")) where "From" > 0;
        insert into "Odd ""Schema"."Select" ("a,b") values ('x'), ('y');
        create table parts (id int, k text, primary key (id, k)) partition by list (k);
        create table parts_a partition of parts for values in ('a');
        create table parts_rest partition of parts default;
        insert into parts select i, chr(97 + i % 3) from generate_series(1, 100) i;
        create table never_analyzed (id int primary key); insert into never_analyzed select generate_series(1, 1000);
        create table empty_one (id int primary key);
        create table dropped (a int, b int, c int primary key); alter table dropped drop column b; insert into dropped values (1, 2);"#;
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture
        .source
        .batch_execute(
            r#"insert into "Odd ""Schema"."Select" ("a,b") values ('z'); update "Odd ""Schema"."Select" set "a,b" = 'xx' where "From" = 1;
               update parts set k = 'z' where id = 1; delete from parts where id = 2; insert into parts values (1000, 'a');
               insert into dropped values (3, 4); update "Odd ""Schema"."Select" set "ü" = default where "From" = 2"#,
        )
        .await
        .unwrap();
    fixture.caught_up().await;
    for table in [r#""Odd ""Schema"."Select""#, "parts", "never_analyzed", "empty_one", "dropped"] {
        let rows = format!("select string_agg(r::text, ' ' order by r::text) from {table} r");
        assert_eq!(ask(&fixture.target, &rows).await, ask(&fixture.source, &rows).await, "{table}");
    }
    let columns = r#"select string_agg(concat_ws(' ', attname, attnotnull, attidentity, attgenerated, pg_get_expr(adbin, adrelid)), '; ' order by attname)
                     from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum
                     where attrelid = '"Odd ""Schema"."Select"'::regclass and attnum > 0"#;
    assert_eq!(ask(&fixture.target, columns).await, ask(&fixture.source, columns).await);
    let indexes = r#"select string_agg(pg_get_indexdef(indexrelid), '; ' order by 1) from pg_index where indrelid = '"Odd ""Schema"."Select"'::regclass"#;
    assert_eq!(ask(&fixture.target, indexes).await, ask(&fixture.source, indexes).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_during_the_copy_are_neither_lost_nor_doubled() {
    let fixture = start().await;
    let schema =
        "create table busy (id bigint primary key, n int not null default 0, pad text default repeat('x', 200));
                  insert into busy (id) select generate_series(1, 300000); create table log (id bigint)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"copy_parallel_workers": "3"}"#).await;
    for round in 0..60 {
        let write = format!(
            "insert into log select {round} * 100 + generate_series(1, 100); update busy set n = n + 1 where id % 60 = {round};
             delete from busy where id % 977 = {round}; insert into busy (id) select 1000000 + {round} * 100 + generate_series(1, 100);
             update busy set id = id + 5000000 where id % 1009 = {round}"
        );
        fixture.source.batch_execute(&write).await.unwrap();
    }
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert_eq!(
        fixture.ask("select count(*) from peergate.mirror_tables where copy_fraction = 1 and state = 'live'").await,
        "2"
    );
    assert_eq!(fixture.ask("select state from peergate.tasks where kind = 'create_mirror'").await, "completed");
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_are_chosen_renamed_and_cut_to_columns() {
    let fixture = start().await;
    fixture
        .source
        .batch_execute("create table a (id int primary key, secret text, x int); insert into a values (1, 's', 2); create table b (id int primary key)")
        .await
        .unwrap();
    let selection = r#"{"tables": [{"from": {"schema": "public", "name": "a"}, "to": {"schema": "copies", "name": "A 2"}, "exclude": ["secret"]}]}"#;
    fixture.create_mirror(selection, "{}").await;
    fixture.caught_up().await;
    fixture
        .source
        .batch_execute("insert into a values (2, 't', 3); update a set secret = 'u' where id = 1")
        .await
        .unwrap();
    fixture.caught_up().await;
    assert_eq!(
        ask(&fixture.target, r#"select string_agg(r::text, ' ' order by id) from copies."A 2" r"#).await,
        "(1,2) (2,3)"
    );
    assert_eq!(ask(&fixture.target, "select to_regclass('public.b') is null").await, "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn modes_copy_only_and_stream_only_do_their_half() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key); insert into t values (1)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"mode": "copy_only"}"#).await;
    fixture.wait_for_state("completed").await;
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select count(*) from t").await, "1");
    assert_eq!(ask(&fixture.source, "select count(*) from pg_replication_slots").await, "0");
    assert_eq!(ask(&fixture.source, "select count(*) from pg_publication").await, "0");
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
    fixture.target.batch_execute("truncate t").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"mode": "stream_only"}"#).await;
    fixture.caught_up().await;
    fixture.source.batch_execute("insert into t values (2)").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select string_agg(id::text, ',') from t").await, "2");
}

/// A transaction that has written waits for a lock, which whoever makes the slot must not keep from it while waiting for it to end.
#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_is_waited_for_does_not_hold_the_slot_up() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key); insert into t values (1)").await.unwrap();
    let reader = connect(&fixture.cluster, "shop").await;
    reader.batch_execute("begin; lock table t in access share mode").await.unwrap();
    let writer = connect(&fixture.cluster, "shop").await;
    let truncate = tokio::spawn(async move {
        writer
            .batch_execute("begin; create table elsewhere (id int); truncate t; insert into t values (2); commit")
            .await
    });
    let waits = "select count(*) from pg_locks where not granted";
    assert!(eventually(async || ask(&fixture.source, waits).await == "1").await);
    let named = r#"{"tables": [{"from": {"schema": "public", "name": "t"}, "to": {"schema": "public", "name": "t"}}]}"#;
    fixture.create_mirror(named, "{}").await;
    let queued =
        "select count(*) > 0 from pg_stat_activity where application_name = 'peergate' and wait_event_type = 'Lock'";
    assert!(eventually(async || ask(&fixture.source, queued).await == "t").await);
    reader.batch_execute("commit").await.unwrap();
    truncate.await.unwrap().unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select string_agg(id::text, ',') from t").await, "2");
}
