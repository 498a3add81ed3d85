//! Chaos on real servers: a random schema and load, engines, servers and networks that die, stall and come back, and then both sides
//! are compared, row by row. A reader of the target looks all the time whether it sees half a transaction.
//!
//! `make chaos MINUTES=n` runs it for long; `make test` for `CHAOS_SECONDS`, 75 if it is not said. `CHAOS_SEED` repeats a run's choices,
//! though not its timing; what was done is printed when something is wrong.

#![cfg(debug_assertions)]
#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

mod check;
mod engine;
mod harm;
mod journal;
#[allow(dead_code, reason = "the engine's tests use more of it")]
#[path = "../../../mirror/tests/proxy.rs"]
mod proxy;
mod schema;
mod servers;
mod workload;

use check::Reader;
use harm::Harm;
use journal::Journal;
use schema::Schema;
use servers::World;
use workload::Workload;

/// How long a mirror's life is disturbed.
const LIFE: std::ops::Range<u64> = 12..30;

/// How long it may take to catch up when nothing disturbs it any more.
const CATCH_UP: Duration = Duration::from_secs(180);

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_whatever_dies() {
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let time = Duration::from_secs(variable("CHAOS_SECONDS").unwrap_or(75));
    let mut seed = variable("CHAOS_SEED").unwrap_or_else(rand::random);
    let begun = Instant::now();
    let journal = Journal::new();
    let mut world = World::start(&journal).await;
    let (mut lives, mut totals) = (0, harm::Totals::default());
    while lives == 0 || begun.elapsed() < time {
        eprintln!("CHAOS_SEED={seed}");
        journal.begin(seed);
        match live(&mut world, &journal, seed, &mut totals).await {
            Ok(()) => {}
            Err(what) => {
                panic!("{what}\n\nrepeat it with CHAOS_SEED={seed}\n\n{}\n{}", journal.text(), world.explain().await)
            }
        }
        lives += 1;
        seed = seed.wrapping_add(1);
    }
    eprintln!("{lives} lives in {} s: {totals}", begun.elapsed().as_secs());
}

/// The same harm fifty times, at moments that have nothing to do with what the engine does just then.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_kills_lose_and_double_nothing() {
    let seed = std::env::var("CHAOS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("CHAOS_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let journal = Journal::new();
    let mut world = World::start(&journal).await;
    let schema = Arc::new(Schema::random(&mut random));
    world.make_schema(&schema).await;
    let workload = Workload::start(world.source.config("shop"), &schema, random.random(), &journal);
    world.create_mirror(&schema::mirror_options(&mut random)).await;
    let reader = Reader::start(world.target.config("dwh"));
    for _ in 0..50 {
        world.start_engine(0, None);
        // Only to choose the moment. A start takes some 200 ms.
        tokio::time::sleep(Duration::from_millis(random.random_range(100..900))).await;
        let engine = world.engines[0].take().expect("started above");
        tokio::task::spawn_blocking(move || engine.kill()).await.unwrap();
    }
    world.start_engine(0, None);
    let transactions = workload.stop().await;
    let checked = async {
        world.caught_up(CATCH_UP).await?;
        reader.stop().await?;
        check::compare(&world).await
    };
    if let Err(what) = checked.await {
        panic!("{what}\n\n{schema}\n{}\n{}", journal.text(), world.explain().await);
    }
    eprintln!("50 kills in {transactions} transactions");
}

/// A mirror's life: made, copied and streamed while all kinds of things go wrong, compared, dropped.
async fn live(world: &mut World, journal: &Journal, seed: u64, totals: &mut harm::Totals) -> Result<(), String> {
    let mut random = StdRng::seed_from_u64(seed);
    let schema = Arc::new(Schema::random(&mut random));
    world.make_schema(&schema).await;
    let length = Duration::from_secs(random.random_range(LIFE));
    let workload = Workload::start(world.source.config("shop"), &schema, random.random(), journal);
    let options = schema::mirror_options(&mut random);
    journal.note(format!("mirror with {options} over {schema}"));
    // At first nobody takes it up: what is done to it right from its start is to be among the harm.
    world.create_mirror(&options).await;
    let reader = Reader::start(world.target.config("dwh"));
    let mut harm = Harm::new(random.random(), journal);
    let begun = Instant::now();
    while begun.elapsed() < length {
        harm.act(world).await?;
        reader.verdict()?;
    }
    *totals += harm.totals;
    world.heal(journal).await?;
    totals.transactions += workload.stop().await;
    world.caught_up(CATCH_UP).await?;
    totals.looks += reader.stop().await?;
    check::compare(world).await?;
    world.drop_mirror().await?;
    world.clean().await
}
