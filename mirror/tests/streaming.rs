//! The stream: what becomes of each kind of change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{ask, start};

#[tokio::test(flavor = "multi_thread")]
async fn keys_change_values_stay_and_tables_are_emptied() {
    let fixture = start().await;
    let schema = "create table t (id int primary key, big text, n int); alter table t alter big set storage external;
                  insert into t select i, repeat('x', 100000) || i, i from generate_series(1, 10) i;
                  create table byindex (a int not null, b int not null, v text); create unique index on byindex (a, b);
                  alter table byindex replica identity using index byindex_a_b_idx; insert into byindex values (1, 1, 'a'), (1, 2, 'b');
                  create table whole (id int primary key, big text, n int); alter table whole alter big set storage external; alter table whole replica identity full;
                  insert into whole select id, big, n from t; create table other (id int primary key)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    for change in [
        // Unchanged large values: in place, with a new key, twice in one transaction, after an insert in the same transaction.
        "update t set n = n + 1 where id <= 3",
        "update t set id = id + 100 where id <= 2",
        "begin; update t set n = -1 where id = 3; update t set n = -2, id = 33 where id = 3; update t set n = -3 where id = 33; commit",
        "begin; insert into t values (50, repeat('y', 100000), 1); update t set n = 2 where id = 50; update t set id = 51 where id = 50; commit",
        "begin; update t set big = 'small' where id = 4; update t set n = 5 where id = 4; commit",
        "begin; delete from t where id = 5; insert into t values (5, 'again', 0); commit",
        "begin; insert into t values (60, 'a', 1); delete from t where id = 60; commit",
        // Several keys change at once.
        "update t set id = id + 1000 where id > 5",
        "begin; update byindex set b = b + 10 where a = 1; update byindex set v = null; insert into byindex values (2, 2, 'c'); delete from byindex where b = 11; commit",
        "begin; update whole set n = 0 where id = 1; update whole set id = 1000 where id = 2; delete from whole where id = 3; commit",
        // What was rolled back never happened.
        "begin; insert into other values (1); savepoint a; insert into other values (2); rollback to a; insert into other values (3); commit",
        "begin; insert into other values (9); rollback",
        // TRUNCATE amid rows of the same transaction.
        "begin; insert into other values (4); truncate other, byindex; insert into other values (5); insert into byindex values (7, 7, 'z'); commit",
    ] {
        fixture.source.batch_execute(change).await.unwrap();
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
    assert_eq!(fixture.ask("select sum(truncates) from peergate.mirror_tables").await, "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn unique_values_pass_from_row_to_row() {
    let fixture = start().await;
    let schema = "create table t (id int primary key, u int unique, big text); alter table t alter big set storage external;
                  insert into t select i, i, repeat('b', 50000) from generate_series(1, 20) i;
                  create table x (id int primary key, r int4range, exclude using gist (r with &&)); insert into x values (1, '[1,5)'), (2, '[5,9)')";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let changes = [
        "begin; update t set u = -1 where id = 1; update t set u = 1 where id = 2; update t set u = 2 where id = 1; commit",
        "begin; update t set u = -u; update t set u = 21 + u; commit",
        "begin; delete from t where id = 3; update t set u = 18 where id = 4; insert into t values (3, 17, 'n'); commit",
        "begin; update x set r = '[20,21)' where id = 1; update x set r = '[1,5)' where id = 2; update x set r = '[5,9)' where id = 1; commit",
    ];
    for change in changes {
        fixture.source.batch_execute(change).await.unwrap();
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_and_foreign_keys_of_the_target_stay_quiet() {
    let fixture = start().await;
    let schema = "create table parent (id int primary key); create table child (id int primary key, parent int);
                  insert into parent values (1); insert into child values (1, 1)";
    fixture.source.batch_execute(schema).await.unwrap();
    let on_target = "create table parent (id int primary key); create table child (id int primary key, parent int references parent);
                     create table seen (what text);
                     create function note() returns trigger language plpgsql as $$ begin insert into public.seen values (tg_name); return new; end $$;
                     create trigger ordinary after insert on child for each row execute function note();
                     create trigger replica after insert on child for each row execute function note(); alter table child enable replica trigger replica";
    fixture.target.batch_execute(on_target).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.target.batch_execute("truncate seen").await.unwrap();
    fixture
        .source
        .batch_execute("begin; insert into child values (2, 7); insert into parent values (7); commit")
        .await
        .unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select string_agg(what, ',') from seen").await, "replica");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_of_the_target_never_sees_half_a_transaction() {
    let fixture = start().await;
    fixture
        .source
        .batch_execute("create table a (id int primary key, n int); create table b (id int primary key, n int)")
        .await
        .unwrap();
    // Batches so small that the larger transactions are written in several parts.
    fixture.create_mirror(r#"{"all": true}"#, r#"{"batch_rows_max": "50"}"#).await;
    fixture.caught_up().await;
    let done = Arc::new(AtomicBool::new(false));
    let reader = fixture.connect_target().await;
    let watch = tokio::spawn({
        let done = done.clone();
        async move {
            let mut looks = 0;
            while !done.load(Ordering::Relaxed) {
                let row =
                    reader.query_one("select (select count(*) from a), (select count(*) from b)", &[]).await.unwrap();
                assert_eq!(row.get::<_, i64>(0), row.get::<_, i64>(1), "half a transaction");
                looks += 1;
            }
            looks
        }
    });
    for round in 0..40 {
        let rows = if round % 4 == 0 { 400 } else { 3 };
        let write = format!(
            "begin; insert into a select {round} * 1000 + i, 0 from generate_series(1, {rows}) i; insert into b select {round} * 1000 + i, 0 from generate_series(1, {rows}) i; commit"
        );
        fixture.source.batch_execute(&write).await.unwrap();
    }
    fixture.caught_up().await;
    done.store(true, Ordering::Relaxed);
    assert!(watch.await.unwrap() > 0);
    fixture.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_tells_what_was_done() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key, n int)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let work = "insert into t select i, 0 from generate_series(1, 1000) i; update t set n = 1 where id <= 500; delete from t where id > 750";
    fixture.source.batch_execute(work).await.unwrap();
    fixture.caught_up().await;
    let counts = "select rows_inserted || '/' || rows_updated || '/' || rows_deleted from peergate.mirror_tables";
    fixture.wait_until(counts, "1000/500/250").await;
    fixture.assert_equal().await;
    let status = "select rows_applied = 1750 and bytes_applied > 0 and applied_lsn >= source_lsn and lag_bytes = 0 and lag_seconds = 0
                  and error_message is null and state = 'running' from peergate.mirror_status";
    fixture.wait_until(status, "t").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_identities_or_stored_apart_are_followed() {
    let fixture = start().await;
    let schema = "create table i (id int generated always as identity primary key, v text, n int); alter table i alter v set storage external;
                  insert into i (v, n) select repeat('x', 50000), g from generate_series(1, 3) g;
                  create table k (k text primary key, v int); alter table k alter k set storage external;
                  insert into k select string_agg(md5(g::text), ''), 1 from generate_series(1, 70) g";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    for change in [
        "update i set id = default, n = 100 where id = 1",
        "update i set n = 7 where id = 4",
        "update k set v = 2",
        "update k set k = k || 'y', v = 3",
        "delete from k",
    ] {
        fixture.source.batch_execute(change).await.unwrap();
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn inheritance_is_neither_hindered_on_the_source_nor_reached_into_on_the_target() {
    let fixture = start().await;
    let schema = "create table parent (id int primary key, n int); create table child () inherits (parent);
                  insert into parent values (1, 1); insert into child values (2, 2)";
    fixture.source.batch_execute(schema).await.unwrap();
    let only =
        r#"{"tables": [{"from": {"schema": "public", "name": "parent"}, "to": {"schema": "public", "name": "copy"}}]}"#;
    fixture.create_mirror(only, "{}").await;
    fixture.caught_up().await;
    fixture
        .target
        .batch_execute("create table archive () inherits (copy); insert into archive values (1, 77)")
        .await
        .unwrap();
    fixture
        .source
        .batch_execute("update child set n = 3; update only parent set n = 4; delete from child")
        .await
        .unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select n from only copy").await, "4");
    fixture.source.batch_execute("truncate only parent").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select string_agg(n::text, ',') from copy").await, "77");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_extension_types_are_found_by_their_own_operators() {
    let fixture = start().await;
    let schema = "create schema ext; create extension citext schema ext; create extension ltree schema ext;
                  create table c (k ext.citext primary key, n int); create table l (k ext.ltree primary key, n int);
                  insert into c values ('Abc', 1), ('def', 2); insert into l values ('a.b', 1), ('a.c', 2)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let changes = "update c set n = 5 where k = 'Abc'; update c set k = 'ABC' where n = 5; delete from c where n = 2;
                   set search_path = public, ext; update l set n = 5 where k = 'a.b'; delete from l where k = 'a.c'; reset search_path";
    fixture.source.batch_execute(changes).await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
}
