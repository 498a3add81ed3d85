//! Whatever dies, no row is lost and none comes twice; and who was replaced writes no more.

use catalog::cluster::StopMode;

use crate::support::{ask, eventually, spawn_engine, start, start_servers};

/// A table without a key shows every row that comes twice.
const SCHEMA: &str = "create table log (id bigint, n int); create table t (id int primary key, n int not null)";

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_dies_again_and_again_loses_and_doubles_nothing() {
    let mut fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.source.batch_execute("insert into log select i, 0 from generate_series(1, 200000) i; insert into t select i, 0 from generate_series(1, 50000) i").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"batch_rows_max": "500"}"#).await;
    for round in 0..12 {
        let write = format!(
            "insert into log select i, {round} + 1 from generate_series(1, 3000) i; update t set n = n + 1 where id % 12 = {round}"
        );
        fixture.source.batch_execute(&write).await.unwrap();
        // In the copy at first, then in the stream; each time somewhere else.
        tokio::time::sleep(std::time::Duration::from_millis(40 + 37 * round)).await;
        fixture.abort_engine().await;
        fixture.start_engine("node-1");
    }
    fixture.caught_up().await;
    fixture.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_are_cut_are_opened_again() {
    let fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    for round in 0..6 {
        let write = format!("insert into log select i, {round} from generate_series(1, 20000) i");
        fixture.source.batch_execute(&write).await.unwrap();
        let (session, database) = if round % 2 == 0 { (&fixture.target, "dwh") } else { (&fixture.source, "shop") };
        let cut = format!(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'peergate' and datname = '{database}'"
        );
        session.batch_execute(&cut).await.unwrap();
    }
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert_eq!(fixture.ask("select count(*) > 0 from peergate.mirror_events where message like 'retrying%' and sqlstate is not null").await, "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_crashes_comes_back_with_rows_and_progress_agreeing() {
    let mut fixture = start_servers(&[("fsync", "on"), ("full_page_writes", "on")]).await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.start_engine("node-1");
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    for round in 0..3 {
        let write = format!("insert into log select i, {round} from generate_series(1, 30000) i");
        fixture.source.batch_execute(&write).await.unwrap();
        if round == 1 {
            // Before a checkpoint, and after one.
            fixture.target.batch_execute("checkpoint").await.unwrap();
        }
        fixture = fixture.restart_servers(StopMode::Immediate).await;
    }
    fixture.caught_up().await;
    fixture.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_replaced_writes_no_more() {
    let fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    // As another process does when it takes over: first of all the target's row is its own.
    fixture.target.batch_execute("update peergate.progress set epoch = epoch + 1").await.unwrap();
    fixture.source.batch_execute("insert into log values (1, 1)").await.unwrap();
    // The fenced worker ends, and takes the mirror again with an epoch of its own.
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert_eq!(fixture.ask("select epoch >= 2 from peergate.mirror_status").await, "t");
    assert_eq!(ask(&fixture.target, "select epoch >= 2 from peergate.progress").await, "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_two_processes_has_the_mirror_and_the_other_takes_over() {
    let mut fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let (stop, other) = spawn_engine(&fixture.catalog, "node-2");
    fixture.wait_until("select count(*) from peergate.nodes", "2").await;
    assert_eq!(fixture.ask("select node_id from peergate.mirror_status").await, "node-1");
    fixture.source.batch_execute("insert into log select i, 1 from generate_series(1, 5000) i").await.unwrap();
    // It gives its lease back when it stops, so the other need not wait for it to expire.
    fixture.stop_engine().await;
    fixture.wait_until("select node_id from peergate.mirror_status", "node-2").await;
    fixture.caught_up().await;
    fixture.assert_equal().await;
    stop.send_replace(true);
    other.await.unwrap().unwrap();
}

/// What passes on the target is waited for, however it is said: a full disk, a lock that is not to be had, a deadlock.
#[tokio::test(flavor = "multi_thread")]
async fn what_passes_on_the_target_is_retried_and_nothing_is_lost() {
    let fixture = start().await;
    fixture.source.batch_execute(SCHEMA).await.unwrap();
    fixture.source.batch_execute("insert into t values (1, 0), (2, 0)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    for (n, code) in ["53100", "53200", "55P03", "40001"].into_iter().enumerate() {
        let refuse = format!(
            "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'no room' using errcode = '{code}'; end $$;
             create trigger refuse before insert on log for each row execute function refuse(); alter table log enable always trigger refuse"
        );
        fixture.target.batch_execute(&refuse).await.unwrap();
        fixture
            .source
            .batch_execute(&format!("insert into log select i, {n} from generate_series(1, 100) i"))
            .await
            .unwrap();
        fixture
            .wait_until(
                "select state || ' ' || error_sqlstate from peergate.mirror_status where attempt >= 2",
                &format!("retrying {code}"),
            )
            .await;
        let alarm = format!("select level from peergate.mirror_events where sqlstate = '{code}'");
        assert_eq!(fixture.ask(&alarm).await, "warning");
        fixture.target.batch_execute("drop function refuse cascade").await.unwrap();
        fixture.caught_up().await;
    }
    // A real deadlock, of which the mirror's session is the victim: it looks for one sooner.
    fixture.target.batch_execute("alter database dwh set deadlock_timeout = '5s'").await.unwrap();
    fixture.control.batch_execute("call peergate.pause_mirror('m')").await.unwrap();
    fixture.wait_for_state("paused").await;
    let other = fixture.connect_target().await;
    other.batch_execute("set deadlock_timeout = '60s'; begin; update t set n = n where id = 2").await.unwrap();
    fixture.source.batch_execute("update t set n = n + 1").await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    let waits = "select count(*) > 0 from pg_stat_activity where datname = 'dwh' and application_name = 'peergate' and wait_event_type = 'Lock'";
    assert!(eventually(async || ask(&fixture.target, waits).await == "t").await);
    other.batch_execute("update t set n = n where id = 1; rollback").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert_eq!(fixture.ask("select level from peergate.mirror_events where sqlstate = '40P01'").await, "warning");
}
