//! Mirrors that take some rows of a table only.

use serde_json::{Value, json};

use crate::support::{Fixture, ask, start};

fn table(name: &str, condition: &str) -> Value {
    let name = json!({"schema": "public", "name": name});
    json!({"from": name, "to": name, "where": condition})
}

pub(crate) async fn has_filters(fixture: &Fixture) -> bool {
    ask(&fixture.source, "show server_version_num").await.parse::<u32>().unwrap() >= 150_000
}

/// The target's rows, of which each table has those that fulfil its condition on the source.
async fn same_rows(fixture: &Fixture, tables: &[(&str, &str)]) {
    fixture.caught_up().await;
    for (table, condition) in tables {
        let rows = format!("select string_agg({table}::text, ' ' order by {table}::text) from {table}");
        let expected = ask(&fixture.source, &format!("{rows} where {condition}")).await;
        assert_eq!(ask(&fixture.target, &rows).await, expected, "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn copy_and_stream_take_the_same_rows_and_those_that_cross_the_line_come_and_go() {
    let fixture = start().await;
    if !has_filters(&fixture).await {
        return refused_before_15(&fixture).await;
    }
    let schema = "create table orders (id int, region text, doc text, primary key (id, region)) partition by list (region);
        create table orders_eu partition of orders for values in ('eu', 'uk');
        create table orders_us partition of orders for values in ('us');
        insert into orders select i, (array['eu', 'us', 'uk'])[i % 3 + 1], repeat('x', i % 5000) from generate_series(1, 3000) i;
        create table notes (id int primary key, n int, \"Odd )name\" text default '(');
        alter table notes replica identity full;
        insert into notes select i, i % 10 from generate_series(1, 500) i;
        create table log (n int);
        insert into log select generate_series(1, 20)";
    fixture.source.batch_execute(schema).await.unwrap();
    // A condition may name its table, have a comment at its end, and parentheses of all kinds.
    let mut tables = vec![
        ("orders", "orders.region in ('eu', 'uk') and id % 2 = 0"),
        ("notes", "n < 5 and \"Odd )name\" <> ')' -- the small ones"),
        ("log", "n > 10"),
    ];
    let listed: Vec<Value> = tables.iter().map(|(name, condition)| table(name, condition)).collect();
    fixture.create_mirror(&json!({"tables": listed}).to_string(), "{}").await;
    tables[1].1 = "n < 5";
    same_rows(&fixture, &tables).await;

    let changes = "insert into orders values (5000, 'eu', 'in'), (5001, 'eu', 'out'), (5002, 'us', 'out');
        update orders set region = 'us' where id between 1 and 100 and region = 'uk';
        update orders set region = 'eu' where id between 200 and 300 and region = 'us';
        update orders set id = id + 100001 where id between 400 and 500;
        delete from orders where id between 600 and 700;
        update notes set n = n + 3;
        update notes set n = n - 5 where id % 7 = 0;
        delete from notes where id % 11 = 0;
        insert into log values (5), (50)";
    fixture.source.batch_execute(changes).await.unwrap();
    same_rows(&fixture, &tables).await;
    fixture.source.batch_execute("truncate log; insert into log values (1), (11)").await.unwrap();
    same_rows(&fixture, &tables).await;

    // Late tables and new copies take the same.
    fixture
        .source
        .batch_execute("create table late (id int primary key); insert into late select generate_series(1, 100)")
        .await
        .unwrap();
    let add = format!("call peergate.add_mirror_tables('m', '{}')", json!([table("late", "id > 90")]));
    fixture.control.batch_execute(&add).await.unwrap();
    fixture.wait_until("select state from peergate.mirror_tables where source_name = 'late'", "live").await;
    fixture.source.batch_execute("insert into late values (101), (0); delete from late where id = 95").await.unwrap();
    tables.push(("late", "id > 90"));
    same_rows(&fixture, &tables).await;
    // Another filter, and none.
    for item in [table("notes", "n >= 4"), json!({"from": table("log", "")["from"], "to": table("log", "")["to"]})] {
        let alter = format!("call peergate.alter_mirror_table('m', '{item}')");
        fixture.control.batch_execute(&alter).await.unwrap();
    }
    fixture.wait_until("select count(*) from peergate.tasks where state <> 'completed'", "0").await;
    fixture.source.batch_execute("update notes set n = n + 1; insert into log values (3)").await.unwrap();
    tables[1].1 = "n >= 4";
    tables[2].1 = "true";
    same_rows(&fixture, &tables).await;
    fixture.target.batch_execute("delete from notes").await.unwrap();
    fixture.control.batch_execute("call peergate.resync_mirror('m')").await.unwrap();
    fixture.source.batch_execute("update notes set n = 1 where id < 20").await.unwrap();
    same_rows(&fixture, &tables).await;
}

/// What a mirror of some rows comes to where publications have no filters.
pub(crate) async fn refused_before_15(fixture: &Fixture) {
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.create_mirror(&json!({"tables": [table("t", "id > 1")]}).to_string(), "{}").await;
    let error = fixture.try_caught_up().await.unwrap_err();
    assert!(error.contains("0A000") && error.contains("from PostgreSQL 15 on"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_a_filter_is_said_before_anything_is_made() {
    let fixture = start().await;
    if !has_filters(&fixture).await {
        return refused_before_15(&fixture).await;
    }
    let schema = "create table a (id int primary key, n int); create table b (id int primary key);
        create table c (id int primary key); create table d (id int primary key);
        create function mine(int) returns bool immutable language sql as 'select true'";
    fixture.source.batch_execute(schema).await.unwrap();
    let listed = [
        table("a", "n > 1"),
        table("b", "nothing > 1"),
        table("c", "public.mine(id)"),
        table("d", "true); drop table d; select (true"),
    ];
    fixture.create_mirror(&json!({"tables": listed}).to_string(), "{}").await;
    let error = fixture.try_caught_up().await.unwrap_err();
    for said in [
        "row filter of table \"public.a\" has column \"n\", which its replica identity has not",
        "ALTER TABLE \"public\".\"a\" REPLICA IDENTITY FULL",
        "row filter of table \"public.b\": peer \"shop\": column \"nothing\" does not exist",
        "row filter of table \"public.c\": peer \"shop\": invalid publication WHERE expression",
        "row filter of table \"public.d\": peer \"shop\": cannot insert multiple commands into a prepared statement",
    ] {
        assert!(error.contains(said), "{said}\n{error}");
    }
    assert_eq!(fixture.ask("select state from peergate.mirror_status").await, "blocked");
    for made in ["select count(*) from pg_publication", "select count(*) from pg_replication_slots"] {
        assert_eq!(ask(&fixture.source, made).await, "0");
    }
    // Users of the source are not hindered.
    fixture.source.batch_execute("insert into a values (1, 1); update a set n = 2; table d").await.unwrap();
}
