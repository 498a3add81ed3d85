//! Whatever becomes of a mirror, and whoever makes it so, an event says it: what it was, what it is, why, and where in the WAL.

use crate::support::{ask, start};

/// The mirror's transitions as its events tell them, without what repeats by chance.
const STATES: &str = "select string_agg(split_part(message, ':', 1), ' ' order by id) from peergate.mirror_events where kind in ('state', 'error')";

#[tokio::test(flavor = "multi_thread")]
async fn every_change_of_state_is_an_event_with_its_cause_and_place() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key); insert into t values (1)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let begun = "created preflight schema slot copying catchup running";
    assert_eq!(fixture.ask(STATES).await, begun);
    fixture.control.batch_execute("call peergate.pause_mirror('m')").await.unwrap();
    fixture.wait_for_state("paused").await;
    fixture.target.batch_execute("insert into t values (3)").await.unwrap();
    fixture.source.batch_execute("insert into t values (3)").await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.wait_for_state("blocked").await;
    assert_eq!(fixture.ask(STATES).await, format!("{begun} paused catchup blocked"));
    let event = "select concat_ws(' ', level, sqlstate, lsn is not null, detail is not null, hint is not null, node_id)
                 from peergate.mirror_events where message like 'blocked%'";
    assert_eq!(fixture.ask(event).await, "error 23505 t t t node-1");
    assert_eq!(fixture.ask("select error_lsn is not null from peergate.mirror_runtime").await, "t");
    // Each attempt that a person asks for is one more.
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.wait_until(STATES, &format!("{begun} paused catchup blocked retrying catchup blocked")).await;
    let asked = "select concat_ws(' | ', level, message, detail ~ '^It was blocked: ', node_id) from peergate.mirror_events where message like 'retrying%'";
    assert_eq!(fixture.ask(asked).await, "info | retrying: a person asked for a new attempt | t");
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
    fixture.wait_until("select state from peergate.tasks where kind = 'drop_mirror'", "completed").await;
    let end = "select string_agg(kind || ' ' || message, ', ' order by id) from peergate.mirror_events where id >= (select id from peergate.mirror_events where message = 'dropping')";
    assert_eq!(fixture.ask(end).await, "state dropping, drop slot, publication and progress were removed");
}

#[tokio::test(flavor = "multi_thread")]
async fn resync_required_is_neither_entered_nor_left_silently() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.control.batch_execute("call peergate.pause_mirror('m')").await.unwrap();
    fixture.wait_for_state("paused").await;
    // The target is set back behind the slot.
    let applied = ask(&fixture.target, "select applied_lsn from peergate.progress").await;
    fixture.target.batch_execute("update peergate.progress set applied_lsn = '0/1'").await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.wait_for_state("resync_required").await;
    let states = fixture.ask(STATES).await;
    assert!(states.ends_with("running paused resync_required"), "{states}");
    let event = "select concat_ws(' ', level, sqlstate, lsn, hint is not null) from peergate.mirror_events order by id desc limit 1";
    assert_eq!(fixture.ask(event).await, "error 55000 0/1 t");
    // RESUME looks once more, and the end of that is told although it is what it was.
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.wait_until(STATES, &format!("{states} retrying resync_required")).await;
    // What was missing is there after all.
    fixture.target.batch_execute(&format!("update peergate.progress set applied_lsn = '{applied}'")).await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    let states = fixture.ask(STATES).await;
    assert!(states.ends_with("resync_required retrying catchup running"), "{states}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_repeats_is_told_once_and_retried_for_ever() {
    let mut fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.stop_engine().await;
    // Nobody is let in any more.
    fixture.control.batch_execute("alter database shop allow_connections false").await.unwrap();
    fixture.start_engine("node-1");
    fixture.wait_until("select attempt >= 3 from peergate.mirror_status", "t").await;
    let told = "select count(*), max(sqlstate), max(level) from peergate.mirror_events where message like 'retrying%'";
    let row = fixture.control.query_one(told, &[]).await.unwrap();
    let told: (i64, String, String) = (row.get(0), row.get(1), row.get(2));
    assert_eq!(told, (1, "55000".to_owned(), "warning".to_owned()));
    assert_eq!(fixture.ask("select retry_at is not null from peergate.mirror_status").await, "t");
    fixture.control.batch_execute("alter database shop allow_connections true").await.unwrap();
    fixture.caught_up().await;
}

/// What fails each time after it has begun again says why meanwhile, too.
#[tokio::test(flavor = "multi_thread")]
async fn an_error_is_shown_until_the_mirror_runs_again() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let fails = "create function full_disk() returns trigger language plpgsql as $$
            begin
                perform pg_sleep(0.3);
                raise 'no room' using errcode = 'disk_full';
            end $$;
        create trigger full_disk before insert on t for each row execute function full_disk();
        alter table t enable replica trigger full_disk";
    fixture.target.batch_execute(fails).await.unwrap();
    fixture.source.batch_execute("insert into t values (1)").await.unwrap();
    fixture.wait_until("select attempt >= 1 from peergate.mirror_status", "t").await;
    fixture
        .wait_until("select concat_ws(' ', state, error_sqlstate) from peergate.mirror_status", "catchup 53100")
        .await;
    fixture.target.batch_execute("drop trigger full_disk on t").await.unwrap();
    fixture.caught_up().await;
    fixture
        .wait_until("select concat_ws(' ', state, error_sqlstate, attempt) from peergate.mirror_status", "running 0")
        .await;
}
