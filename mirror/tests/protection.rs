//! The source is protected: what a slot makes it keep is seen, told, and ended if that was asked for.

use crate::support::{Fixture, ask, eventually, start, start_behind_proxies};

async fn streaming(fixture: &Fixture, options: &str) {
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, options).await;
    fixture.caught_up().await;
}

/// Some WAL segments on the source; a checkpoint lets slots move that are read.
async fn write_wal(fixture: &Fixture) {
    for statement in ["insert into t select coalesce(max(id), 0) + 1 from t", "select pg_switch_wal()", "checkpoint"] {
        fixture.source.batch_execute(statement).await.unwrap();
    }
}

/// Has the slots looked at without waiting for the next turn.
async fn look(fixture: &Fixture) {
    fixture.control.batch_execute("update peergate.mirror_runtime set slot_checked_at = null").await.unwrap();
}

const SLOT_EVENTS: &str = "select string_agg(level || ' ' || coalesce(sqlstate, '-'), ', ' order by id) from peergate.mirror_events where kind = 'slot'";

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_over_its_budget_is_told_once_and_dropped_only_if_asked() {
    let fixture = start().await;
    streaming(&fixture, r#"{"slot_wal_budget": "1MB"}"#).await;
    fixture.control.batch_execute("call peergate.pause_mirror('m')").await.unwrap();
    fixture.wait_for_state("paused").await;
    write_wal(&fixture).await;
    look(&fixture).await;
    fixture
        .wait_until(
            "select slot_wal_bytes > 1024 * 1024 and slot_wal_status = 'reserved' from peergate.mirror_status",
            "t",
        )
        .await;
    assert_eq!(fixture.ask(SLOT_EVENTS).await, "warning 53400");
    let seen = fixture.ask("select slot_checked_at from peergate.mirror_status").await;
    look(&fixture).await;
    fixture.wait_until(&format!("select slot_checked_at > '{seen}' from peergate.mirror_status"), "t").await;
    assert_eq!(fixture.ask(SLOT_EVENTS).await, "warning 53400", "once is enough");
    // Once the mirror goes on, the source may forget, and that is told too.
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    let back = eventually(async || {
        fixture.source.batch_execute("checkpoint").await.unwrap();
        fixture.caught_up().await;
        look(&fixture).await;
        fixture.ask(SLOT_EVENTS).await == "warning 53400, info -"
    });
    assert!(back.await, "{}", fixture.explain().await);

    let ask_for_it =
        r#"update peergate.mirror_definitions set options = options || '{"slot_wal_over_budget": "drop_slot"}'"#;
    fixture.control.batch_execute("call peergate.pause_mirror('m')").await.unwrap();
    fixture.wait_for_state("paused").await;
    fixture.control.batch_execute(ask_for_it).await.unwrap();
    write_wal(&fixture).await;
    look(&fixture).await;
    fixture.wait_until("select slot_wal_status from peergate.mirror_status", "missing").await;
    assert_eq!(ask(&fixture.source, "select count(*) from pg_replication_slots").await, "0");
    let told = "select message from peergate.mirror_events where kind = 'slot' order by id desc limit 1";
    assert!(fixture.ask(told).await.ends_with("was dropped to save the source"));
    assert_eq!(fixture.ask("select state from peergate.mirrors").await, "paused");
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.wait_for_state("resync_required").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_mirror_in_a_busy_server_holds_nothing_back() {
    let fixture = start().await;
    streaming(&fixture, "{}").await;
    // None of this is the mirror's: it is in another database.
    let other = "create table if not exists busy (n int); insert into busy select generate_series(1, 1000)";
    let busy = ask(&fixture.source, "select pg_current_wal_lsn()").await;
    let moved = format!("select restart_lsn > '{busy}' and confirmed_flush_lsn > '{busy}' from pg_replication_slots");
    let let_go = eventually(async || {
        fixture.control.batch_execute(other).await.unwrap();
        fixture.source.batch_execute("checkpoint").await.unwrap();
        ask(&fixture.source, &moved).await == "t"
    });
    assert!(let_go.await, "restart_lsn stays");
    assert_eq!(fixture.ask("select rows_applied from peergate.mirror_status").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_measures_the_latency_of_an_idle_mirror() {
    let fixture = start_behind_proxies().await;
    streaming(&fixture, r#"{"heartbeat_interval": "200ms"}"#).await;
    fixture.wait_until("select latency_seconds between 0 and 60 from peergate.mirror_status", "t").await;
    assert_eq!(fixture.ask("select rows_applied from peergate.mirror_status").await, "0");
    // It is as long as the way: one that is held up arrives late.
    let [_, target] = fixture.proxies.as_ref().unwrap();
    let late = eventually(async || {
        target.stall();
        let until = fixture.ask("select clock_timestamp() + interval '2 s'").await;
        fixture.wait_until(&format!("select clock_timestamp() > '{until}'"), "t").await;
        target.pass();
        fixture.caught_up().await;
        fixture.ask("select latency_seconds > 1 from peergate.mirror_status").await == "t"
    });
    assert!(late.await, "{}", fixture.ask("select latency_seconds from peergate.mirror_status").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn slots_can_be_synchronized_by_standbys_where_the_server_can() {
    let fixture = start().await;
    streaming(&fixture, "{}").await;
    let version: u32 = ask(&fixture.source, "select current_setting('server_version_num')").await.parse().unwrap();
    look(&fixture).await;
    fixture.wait_until("select slot_wal_status from peergate.mirror_status", "reserved").await;
    let failover = fixture.ask("select slot_failover from peergate.mirror_status").await;
    assert_eq!(failover, if version >= 170_000 { "t" } else { "" });
}
