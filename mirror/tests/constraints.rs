//! Constraints and triggers of the target, with and without the privilege to switch them off.

use crate::support::{Fixture, ask, start};

const SCHEMA: &str = "
    create table parent (id int primary key, code text unique, v int);
    create table child (id int primary key, parent int references parent on delete cascade on update cascade, v int);
    create table tree (id int primary key, up int references tree, name text);
    create table a (id int primary key, b int); create table b (id int primary key, a int references a deferrable initially deferred);
    alter table a add foreign key (b) references b deferrable;
    create table slots (id int primary key, during int4range, code text, n int, exclude using gist (during with &&));
    create unique index on slots (lower(code)); create unique index on slots (n) where n > 0;
    create table later (id int primary key, n int unique deferrable initially deferred, v text);
    insert into parent select i, 'c' || i, i from generate_series(1, 20) i; insert into child select i, 1 + i % 20, i from generate_series(1, 60) i;
    insert into tree values (1, null, 'root'), (2, 1, 'left'), (3, 1, 'right'); begin; insert into b values (1, 1); insert into a values (1, 1); commit;
    insert into slots values (1, '[1,5)', 'A', 1), (2, '[5,9)', 'B', 2), (3, '[9,12)', 'C', -1); insert into later values (1, 1, 'x'), (2, 2, 'y')";

const CHANGES: &[&str] = &[
    // Parents and children of one transaction, and of several in one batch.
    "begin; insert into parent values (100, 'n', 1); insert into child values (100, 100, 1); commit; begin; delete from child where id = 100; delete from parent where id = 100; commit",
    "insert into parent values (101, 'm', 1); insert into child select i, 101, 0 from generate_series(200, 230) i; update child set parent = 1 where id = 200",
    // What the source's own cascades did comes too.
    "delete from parent where id = 3; update parent set id = 300 where id = 4; delete from parent where id = 101",
    "begin; insert into tree values (4, 3, 'x'), (5, 4, 'y'); update tree set up = 5 where id = 2; delete from tree where false; commit",
    "begin; update tree set up = null where id = 2; delete from tree where id = 5; delete from tree where id = 4; commit",
    "begin; insert into b values (2, 2); insert into a values (2, 2); commit; begin; set constraints all deferred; delete from a where id = 1; delete from b where id = 1; commit",
    // Values that must be unique pass from row to row.
    "begin; update parent set code = 'tmp' where id = 5; update parent set code = 'c5' where id = 6; update parent set code = 'c6' where id = 5; commit",
    "begin; update slots set during = '[100,101)' where id = 1; update slots set during = '[1,5)' where id = 2; update slots set during = '[5,9)' where id = 1; commit",
    "begin; update slots set code = 'tmp' where id = 1; update slots set code = 'a' where id = 2; update slots set code = 'b' where id = 1; commit",
    "begin; update slots set n = -5 where id = 1; update slots set n = 1 where id = 2; update slots set n = 2 where id = 1; update slots set n = 3 where id = 3; commit",
    "begin; update later set n = 3 - n; insert into later values (3, 1, 'z'); delete from later where id = 2; commit",
    "begin; update parent set id = id + 1000 where id > 10; update parent set id = id - 1000 where id > 1000; commit",
];

async fn run_changes(fixture: &Fixture) {
    for change in CHANGES {
        fixture
            .source
            .batch_execute(change)
            .await
            .unwrap_or_else(|e| panic!("{change}: {}", crate::support::describe(&e)));
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn constraints_of_the_target_are_no_hindrance() {
    let fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    let tables_only = SCHEMA.split("insert into parent").next().unwrap();
    fixture.target.batch_execute(tables_only).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.assert_equal().await;
    run_changes(&fixture).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_privilege_changes_are_written_in_their_order_and_it_is_said() {
    let fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    let role = "create role writer login; grant create, temporary on database dwh to writer; grant usage, create on schema public to writer";
    fixture.target.batch_execute(role).await.unwrap();
    fixture
        .control
        .batch_execute("update peergate.peers set options = options || '{\"user\": \"writer\"}' where name = 'dwh'")
        .await
        .unwrap();
    let tables_only = SCHEMA.split("insert into parent").next().unwrap();
    fixture.target.batch_execute(&format!("set role writer; {tables_only}; reset role")).await.unwrap();
    // The copy goes table by table, in no order that foreign keys could follow.
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    let error = fixture.try_caught_up().await.unwrap_err();
    assert!(error.contains("foreign keys of target table \"public.child\" cannot be switched off"), "{error}");
    let keys = "select string_agg(format('alter table %s drop constraint %I', conrelid::regclass, conname), ';') || ';' from pg_constraint where contype = 'f'";
    let drop = ask(&fixture.target, keys).await;
    let add = "select string_agg(format('alter table %s add constraint %I %s', conrelid::regclass, conname, pg_get_constraintdef(oid)), ';') || ';' from pg_constraint where contype = 'f'";
    let add = ask(&fixture.target, add).await;
    fixture.target.batch_execute(&drop).await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.control.batch_execute("call peergate.pause_mirror('m')").await.unwrap();
    fixture.wait_for_state("paused").await;
    let trigger = "create table seen (what text); grant insert on seen to writer;
                   create function note() returns trigger language plpgsql as $$ begin insert into public.seen values (tg_op || ' ' || new.id); return new; end $$;
                   create trigger ordinary after insert on tree for each row execute function note()";
    fixture.target.batch_execute(&format!("{add}{trigger}")).await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    run_changes(&fixture).await;
    // Ordinary triggers fire, once for each row.
    assert_eq!(ask(&fixture.target, "select string_agg(what, ',' order by what) from seen").await, "INSERT 4,INSERT 5");
    let said = "select count(*) from peergate.mirror_events where level = 'warning' and message like 'triggers and foreign keys of the target fire%'";
    assert_eq!(fixture.ask(&format!("select ({said}) > 0")).await, "t");
}
