//! Tables that are made on the source after the mirror.

use crate::support::{ask, start};

/// The mirror's tables and their states.
const TABLES: &str = "select string_agg(source_schema || '.' || source_name || ':' || state, ' ' order by source_schema, source_name) from peergate.mirror_tables";

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_of_everything_takes_new_tables_in_by_itself() {
    let fixture = start().await;
    let schema = "create table a (id int primary key); insert into a values (1); create table kept_out (id int primary key); create schema more";
    fixture.source.batch_execute(schema).await.unwrap();
    let selection = r#"{"all": true, "except": [{"schema": "public", "name": "kept_out"}]}"#;
    fixture.create_mirror(selection, "{}").await;
    fixture.caught_up().await;
    let made = "create table more.b (id int primary key, n int); insert into more.b select i, i from generate_series(1, 1000) i;
                create table parts (id int primary key) partition by range (id); create table low partition of parts for values from (0) to (10);
                insert into parts values (1); create unlogged table fleeting (id int primary key); alter table a rename to renamed";
    fixture.source.batch_execute(made).await.unwrap();
    // One that was renamed is not new.
    fixture.wait_until(TABLES, "more.b:live public.parts:live public.renamed:live").await;
    let changes = "update more.b set n = -n; create table low_2 partition of parts for values from (10) to (20); insert into parts values (11); insert into renamed values (2)";
    fixture.source.batch_execute(changes).await.unwrap();
    fixture.caught_up().await;
    for query in [
        "select sum(n) from more.b",
        "select string_agg(id::text, ' ' order by id) from parts",
        "select count(*) from renamed",
    ] {
        assert_eq!(ask(&fixture.target, query).await, ask(&fixture.source, query).await, "{query}");
    }
    fixture.source.batch_execute("create table c (id int primary key)").await.unwrap();
    fixture.wait_until(TABLES, "more.b:live public.c:live public.parts:live public.renamed:live").await;
    let there = "select count(*) from pg_tables where tablename in ('kept_out', 'fleeting', 'low')";
    assert_eq!(ask(&fixture.target, there).await, "0");
    assert_eq!(fixture.ask("select count(*) from peergate.mirror_events where level = 'error'").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn new_tables_wait_for_a_statement_where_changes_of_schema_are_not_followed() {
    let fixture = start().await;
    fixture
        .source
        .batch_execute("create table a (id int primary key); create table b (id int primary key)")
        .await
        .unwrap();
    let selection = r#"{"schemas": [{"from": "public", "to": "copies"}]}"#;
    fixture.create_mirror(selection, r#"{"ddl": "block"}"#).await;
    fixture.caught_up().await;
    fixture
        .source
        .batch_execute("create table c (id int primary key); insert into c values (1); drop table b")
        .await
        .unwrap();
    let refresh = "call peergate.refresh_mirror_tables('m')";
    fixture.control.batch_execute(refresh).await.unwrap();
    fixture.caught_up().await;
    fixture.wait_until(TABLES, "public.a:live public.b:removed public.c:live").await;
    fixture.source.batch_execute("insert into c values (2); insert into a values (1)").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select count(*) from copies.c").await, "2");
    // Nothing has changed: nothing happens.
    fixture.control.batch_execute(refresh).await.unwrap();
    fixture.caught_up().await;
    fixture.wait_until(TABLES, "public.a:live public.b:removed public.c:live").await;
    let tasks = "select string_agg(state, ' ') from peergate.tasks where kind = 'alter_mirror'";
    fixture.wait_until(tasks, "completed completed").await;
}
