//! Partitions that come, go and are emptied under a live mirror, whose rows no message of the stream tells of.

use crate::support::{Fixture, ask, eventually, start};

/// Two months, and a row in each.
const SCHEMA: &str = "
    create table log (id int, day date, what text, primary key (id, day)) partition by range (day);
    create table log_1 partition of log for values from ('2026-01-01') to ('2026-02-01');
    create table log_2 partition of log for values from ('2026-02-01') to ('2026-03-01');
    insert into log values (1, '2026-01-10', 'a'), (2, '2026-02-10', 'b');
    create table other (id int primary key)";

const ROWS: &str = "select string_agg(l::text, ' ' order by l.id) from log l";

const TIMES_COPIED: &str =
    "select count(*) from peergate.mirror_events where message like 'table \"public.log\" is copied once more%'";

async fn mirror(options: &str) -> Fixture {
    let fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, options).await;
    fixture.caught_up().await;
    fixture
}

/// Waits until both sides have the same rows.
async fn same_rows(fixture: &Fixture) {
    let expected = ask(&fixture.source, ROWS).await;
    let mut last = String::new();
    let same = eventually(async || {
        last = ask(&fixture.target, ROWS).await;
        last == expected
    });
    assert!(same.await, "source:\n{expected}\ntarget:\n{last}\n{}", fixture.explain().await);
}

/// Makes a change, and waits until it has been followed.
async fn follow(fixture: &Fixture, change: &str) {
    fixture.source.batch_execute(change).await.unwrap_or_else(|e| panic!("{change}: {e}"));
    same_rows(fixture).await;
    fixture.caught_up().await;
    same_rows(fixture).await;
}

/// How many looks have been taken up cannot be seen: this one shows that those before it were.
async fn looked(fixture: &Fixture, n: u32) {
    fixture.source.batch_execute(&format!("alter table other alter id set default {n}")).await.unwrap();
    let default = "select pg_get_expr(adbin, adrelid) from pg_attrdef where adrelid = 'other'::regclass";
    let seen = eventually(async || ask(&fixture.target, default).await == n.to_string());
    assert!(seen.await, "{}", fixture.explain().await);
    // A partition that the stream told of is looked at once more.
    let all = "select not exists (select from peergate.relations r, jsonb_each_text(r.shape -> 'files') f where f.value = '0')";
    assert!(eventually(async || ask(&fixture.target, all).await == "t").await, "{}", fixture.explain().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_go_with_partitions_and_nothing_is_copied_for_it() {
    let fixture = mirror("{}").await;
    let copied = fixture.ask(TIMES_COPIED).await;
    let changes = [
        // As maintenance does it: the next one is made, the oldest goes.
        "begin; create table log_3 partition of log for values from ('2026-03-01') to ('2026-04-01'); drop table log_1; commit;
         insert into log values (3, '2026-03-10', 'c'); update log set what = 'B' where id = 2",
        "alter table log detach partition log_2; insert into log values (4, '2026-03-11', 'd')",
        // Subpartitions, of which one goes.
        "begin; create table log_4 partition of log for values from ('2026-04-01') to ('2026-05-01') partition by range (day);
         create table log_4x partition of log_4 for values from ('2026-04-01') to ('2026-04-10');
         create table log_4y partition of log_4 for values from ('2026-04-10') to ('2026-05-01'); commit;
         insert into log values (5, '2026-04-09', 'x'), (6, '2026-04-10', 'y')",
        "drop table log_4x; insert into log values (7, '2026-04-11', 'y')",
    ];
    for (n, change) in changes.into_iter().enumerate() {
        follow(&fixture, change).await;
        // A partition that is dropped before it was looked at is another matter.
        looked(&fixture, n as u32).await;
    }
    // Written anew, with the rows that it had.
    for partition in ["log_3", "log_4y"] {
        fixture.source.batch_execute(&format!("vacuum full {partition}")).await.unwrap();
    }
    looked(&fixture, 11).await;
    follow(&fixture, "truncate log; insert into log values (8, '2026-03-12', 'again')").await;
    looked(&fixture, 12).await;
    same_rows(&fixture).await;
    assert_eq!(fixture.ask(TIMES_COPIED).await, copied, "{}", fixture.explain().await);
    assert_eq!(fixture.ask("select count(*) from peergate.mirror_events where level = 'error'").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_rows_came_or_went_is_not_guessed_and_the_table_is_copied_alone() {
    let fixture = mirror("{}").await;
    let changes = [
        // Rows come along.
        "create table log_3 (like log); insert into log_3 values (3, '2026-03-10', 'c'), (4, '2026-03-11', 'd');
         alter table log attach partition log_3 for values from ('2026-03-01') to ('2026-04-01'); insert into other values (1)",
        "begin; create table log_4 (like log); insert into log_4 values (5, '2026-04-10', 'e');
         alter table log attach partition log_4 for values from ('2026-04-01') to ('2026-05-01'); commit",
        // Rows go, and others of the partition come.
        "truncate log_2; insert into log values (6, '2026-02-20', 'f')",
        // The default partition takes rows like those that went.
        "create table log_rest partition of log default; drop table log_1; insert into log values (7, '2026-01-11', 'g')",
        // One has rows and is gone before anybody has looked at it.
        "begin; create table log_5 partition of log for values from ('2026-05-01') to ('2026-06-01'); commit;
         begin; insert into log values (9, '2026-05-10', 'i'); commit; drop table log_5",
        // Another takes the place of one that is gone.
        "begin; drop table log_3; create table log_3 partition of log for values from ('2026-03-01') to ('2026-04-01');
         insert into log values (8, '2026-03-12', 'h'); commit",
    ];
    for change in changes {
        let copied: i64 = fixture.ask(TIMES_COPIED).await.parse().unwrap();
        follow(&fixture, change).await;
        let again = eventually(async || fixture.ask(TIMES_COPIED).await.parse::<i64>().unwrap() > copied);
        assert!(again.await, "{change}\n{}", fixture.explain().await);
        fixture.caught_up().await;
        same_rows(&fixture).await;
    }
    assert_eq!(ask(&fixture.target, "select count(*) from other").await, "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happened_while_the_mirror_stood_still_is_found() {
    let mut fixture = mirror("{}").await;
    fixture.stop_engine().await;
    let change = "drop table log_1; create table log_3 (like log); insert into log values (3, '2026-02-11', 'c')";
    fixture.source.batch_execute(change).await.unwrap();
    fixture.start_engine("node-2");
    same_rows(&fixture).await;
    fixture.abort_engine().await;
    let change = "insert into log_3 values (4, '2026-03-11', 'd');
                  alter table log attach partition log_3 for values from ('2026-03-01') to ('2026-04-01')";
    fixture.source.batch_execute(change).await.unwrap();
    fixture.start_engine("node-3");
    same_rows(&fixture).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_does_not_follow_says_so() {
    let fixture = mirror(r#"{"ddl": "block"}"#).await;
    fixture.source.batch_execute("drop table log_1").await.unwrap();
    fixture.wait_for_state("blocked").await;
    let said = fixture
        .ask("select concat_ws(' | ', message, hint) from peergate.mirror_events where level = 'error' limit 1")
        .await;
    assert!(
        said.contains("a partition of table \"public.log\" was detached or dropped") && said.contains("RESYNC MIRROR"),
        "{said}"
    );
    assert_eq!(ask(&fixture.target, "select count(*) from log").await, "2", "nothing is done about it");
    fixture.control.batch_execute("call peergate.set_mirror_options('m', '{\"ddl\": \"ignore\"}')").await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    let warned =
        "select count(*) > 0 from peergate.mirror_events where level = 'warning' and detail like '%delete from%'";
    fixture.wait_until(warned, "t").await;
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.target, "select count(*) from log").await, "2");
}
