//! Whenever the process ends, and however, the next one goes on: no row is lost, none comes twice, nothing is left behind.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::stage::{Load, Stage, ask, connect, eventually};

/// The seed of a run's random moments: printed, and taken from `CRASH_SEED` to repeat it.
fn seed() -> u64 {
    let seed = std::env::var("CRASH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("CRASH_SEED={seed}");
    seed
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_copy_it_goes_on_after_a_restart() {
    let mut random = StdRng::seed_from_u64(seed());
    let mut stage = Stage::start().await;
    let (source, target) = (stage.on_source().await, stage.on_target().await);
    let fill = "create table big (id int primary key, filler text);
        insert into big select i, repeat(md5(i::text), 8) from generate_series(1, 1000000) i";
    source.batch_execute(fill).await.unwrap();
    let load = Load::start(&stage, random.random()).await;
    stage.create_mirror().await;
    stage.wait_until("select state = 'copying' and rows_copied > 0 from mirror_status").await;
    // Only to choose the moment.
    tokio::time::sleep(Duration::from_millis(random.random_range(0..300))).await;
    stage.kill();
    let copied = ask(&target, "select count(*) from big").await;
    assert!(copied.parse::<u32>().unwrap() < 1_000_000, "the copy was over already");

    let ready = stage.restart();
    let recopied = Instant::now();
    stage.wait_until("select state = 'running' from mirrors").await;
    let recopied = recopied.elapsed();
    let transactions = load.stop().await;
    let caught_up = stage.caught_up().await;
    stage.assert_equal().await;
    eprintln!(
        "killed with {copied} rows on the target; ready again after {ready:?}, copied after {recopied:?}, \
         after {transactions} transactions caught up in {caught_up:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_ten_times_in_the_stream_it_loses_and_doubles_nothing() {
    let mut random = StdRng::seed_from_u64(seed());
    let mut stage = Stage::start().await;
    stage.create_mirror().await;
    stage.caught_up().await;
    let load = Load::start(&stage, random.random()).await;
    let mut ready = Duration::ZERO;
    for _ in 0..10 {
        // Only to choose the moment.
        tokio::time::sleep(Duration::from_millis(random.random_range(0..900))).await;
        stage.kill();
        ready += stage.restart();
    }
    let caught_up_in_load = stage.caught_up().await;
    let transactions = load.stop().await;
    let caught_up = stage.caught_up().await;
    stage.assert_equal().await;
    eprintln!(
        "ready again after {:?} on average; while the load went on caught up in {caught_up_in_load:?}, \
         after its {transactions} transactions in {caught_up:?}",
        ready / 10
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_in_the_stream_ends_it_soon_and_the_next_goes_on() {
    let mut stage = Stage::start().await;
    stage.create_mirror().await;
    stage.caught_up().await;
    let load = Load::start(&stage, seed()).await;
    stage.wait_until("select rows_applied > 1000 from mirrors").await;
    let begun = Instant::now();
    // It checks the exit status.
    let log = stage.server.take().unwrap().stop();
    let ended = begun.elapsed();
    assert!(ended < Duration::from_secs(10), "took {ended:?}\n{log}");
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
    let ready = stage.restart();
    let transactions = load.stop().await;
    let caught_up = stage.caught_up().await;
    stage.assert_equal().await;
    eprintln!(
        "ended in {ended:?}, ready again after {ready:?}, after {transactions} transactions caught up in {caught_up:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn mirror_dropped_just_before_a_kill_is_removed_after_it() {
    let mut stage = Stage::start().await;
    stage.create_mirror().await;
    stage.caught_up().await;
    let (source, target) = (stage.on_source().await, stage.on_target().await);
    // Keeps the engine from being done before the kill.
    let holder = connect(&stage.source.config("postgres")).await;
    let hold =
        "select 'begin; ' || string_agg(format('comment on publication %I is null', pubname), ';') from pg_publication";
    holder.batch_execute(&ask(&source, hold).await).await.unwrap();
    stage.psql("drop mirror m").await;
    stage.kill();
    holder.batch_execute("rollback").await.unwrap();
    assert_eq!(ask(&source, "select count(*) > 0 from pg_publication").await, "t");

    let ready = stage.restart();
    let begun = Instant::now();
    stage.wait_until("select count(*) = 0 from peergate.mirror_drops").await;
    let removed = begun.elapsed();
    for (what, left) in [("slot", "pg_replication_slots"), ("publication", "pg_publication")] {
        assert_eq!(ask(&source, &format!("select count(*) from {left}")).await, "0", "a {what} is left");
    }
    assert_eq!(ask(&target, "select to_regclass('peergate.progress') is null").await, "t");
    assert_eq!(stage.psql("select state from tasks where kind = 'drop_mirror'").await.trim(), "completed");
    eventually("sessions are closed", async || {
        ask(&source, "select count(*) from pg_stat_activity where application_name = 'peergate'").await == "0"
    })
    .await;
    eprintln!("ready again after {ready:?}, removed after {removed:?}");
}
