//! Tables whose rows have no key, or get another one.

use crate::support::{ask, start};

/// Rows that are the same, that equality calls the same, and types that have none.
const SCHEMA: &str = "
    create table log (n numeric, t text, j json, x xml, p point, f float8, c char(5), a int[]); alter table log replica identity full;
    insert into log select 1.0, 'a', '{\"k\": 1}', '<x/>', '(1,2)', 'NaN', 'c', '{1,NULL}' from generate_series(1, 3);
    insert into log values (1.00, 'a', '{\"k\": 1}', '<x/>', '(1,2)', 'NaN', 'c', '{1,NULL}'), (1.0, 'a', '{\"k\":1}', '<x/>', '(1,2)', 'NaN', 'c', '{1,NULL}');
    insert into log select from generate_series(1, 3); insert into log values (null, '', null, null, null, '-0', '', '{}'), (null, '', null, null, null, '0', '', '{}');
    create table indexed (id int, v text); alter table indexed replica identity full; create index on indexed (id);
    insert into indexed select i % 100, 'v' || i % 7 from generate_series(1, 3000) i;
    create table identity (id int generated always as identity, v text); alter table identity replica identity full;
    insert into identity (v) select 'x' from generate_series(1, 3); alter table identity alter v set storage external;
    create table nothing (); alter table nothing replica identity full; insert into nothing select from generate_series(1, 3)";

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_a_row_without_a_key_changes_exactly_one_that_is_the_same() {
    let fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.assert_equal().await;
    let one = "ctid = (select ctid from log where";
    for change in [
        format!("delete from log where {one} n = 1.0 and scale(n) = 2 limit 1)"),
        format!("update log set t = 'b' where {one} n = 1.0 and j::text = '{{\"k\":1}}' limit 1)"),
        format!("update log set t = 'b' where {one} n = 1.0 limit 1)"),
        format!("delete from log where {one} f = 0 and f::text = '-0' limit 1)"),
        format!("delete from log where {one} t is null limit 1)"),
        format!("update log set n = 7 where {one} t is null limit 1)"),
        format!("begin; insert into log (t) values ('x'), ('x'); delete from log where {one} t = 'x' limit 1); update log set t = 'y' where t = 'x'; commit"),
        "begin; insert into indexed select i, 'n' from generate_series(1, 500) i; update indexed set v = v || '!' where id % 10 = 3; delete from indexed where id < 20; commit".to_owned(),
        "update identity set v = repeat('y', 100000) where id = 1; update identity set v = 'z' where id = 2; update identity set id = default where v = 'x'; delete from identity where id = 2".to_owned(),
        "delete from nothing where ctid = '(0,1)'; insert into nothing default values; insert into nothing default values".to_owned(),
        "truncate log".to_owned(),
    ] {
        fixture.source.batch_execute(&change).await.unwrap();
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
    assert!(
        fixture.ask("select warning from peergate.mirror_tables where source_name = 'log'").await.contains("no key")
    );
    // A row that is not there is never passed over.
    fixture.target.batch_execute("delete from indexed where id = 50").await.unwrap();
    fixture
        .source
        .batch_execute("delete from indexed where ctid = (select ctid from indexed where id = 50 limit 1)")
        .await
        .unwrap();
    let error = fixture.try_caught_up().await.unwrap_err();
    assert!(
        error.contains("rows to delete are missing in target table") && error.contains("(id, v)=(50, v"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_rows_get_new_keys_and_keep_large_values_and_what_only_the_target_has() {
    let fixture = start().await;
    let schema = "create table t (id int primary key, big text, n int); alter table t alter big set storage external;
                  insert into t select i, repeat('x', 10000) || i, i from generate_series(1, 300) i;
                  create table u (id int primary key, n int unique, big text); alter table u alter big set storage external;
                  insert into u select i, i, repeat('u', 10000) from generate_series(1, 30) i";
    fixture.source.batch_execute(schema).await.unwrap();
    let on_target = "create table t (note text default 'new', n bigint, big text, id int primary key);
                     create table u (id int primary key, n int unique, big text, note text not null default 'new')";
    fixture.target.batch_execute(on_target).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.target.batch_execute("update t set note = 'note ' || id; update u set note = 'note ' || n").await.unwrap();
    for change in [
        "update t set id = id + 1000",
        "begin; update t set n = n + 1 where id % 2 = 0; update t set id = -id where id > 1200; insert into t values (1, 'b', 0); update t set id = 2000 - id where id < 0; commit",
        "begin; delete from t where id = 1100; update t set id = 1100 where id = 1101; update t set id = 1101 where id = 1102; delete from t where id = 1101; commit",
        "begin; update t set id = 5000 where id = 1001; update t set id = 1001 where id = 1002; update t set id = 1002 where id = 5000; commit",
        "begin; update u set n = -n; update u set n = 31 + n, id = id + 100; commit",
    ] {
        fixture.source.batch_execute(change).await.unwrap();
        fixture.caught_up().await;
        for table in ["t", "u"] {
            let rows = format!("select md5(string_agg(concat_ws(',', id, n, big), ';' order by id)) from {table}");
            assert_eq!(ask(&fixture.target, &rows).await, ask(&fixture.source, &rows).await, "{table}: {change}");
        }
    }
    assert_eq!(
        ask(
            &fixture.target,
            "select string_agg(id || ' ' || note, ', ' order by id) from t where note not like 'note %'"
        )
        .await,
        "1 new"
    );
    assert_eq!(ask(&fixture.target, "select count(distinct note) from t where note like 'note %'").await, "298");
    assert_eq!(ask(&fixture.target, "select bool_and(note = 'note ' || (31 - n)) from u").await, "t");
}
