//! What sessions cost in memory: many idle ones, and one with a large result and a slow reader; the gateway and pgbouncer, by the
//! resident memory of their processes.
//!
//! `BENCH_SCALE` (default 1) scales it: 1 is 5,000 sessions and 10 GB. That many sessions need twice as many open files, and about
//! as many MB for the server as there are sessions, twice; `make bench-memory` raises the limit of files as far as it may.

#![allow(clippy::unwrap_used, reason = "what fails here ends the benchmark")]

use std::time::{Duration, Instant};

use catalog::cluster::TestCluster;

mod stage;

use stage::wire::{Session, frame};
use stage::{DATABASE, Link, Proxy};

/// One row of the large result, in bytes.
const ROW_BYTES: u64 = 8000;

/// How long the reader reads slowly, before it reads as fast as it can.
const SLOW: Duration = Duration::from_secs(5);

fn main() {
    let scale: f64 = std::env::var("BENCH_SCALE").map_or(1.0, |text| text.parse().unwrap());
    let sessions = ((5000.0 * scale) as usize).max(1);
    let bytes = (10e9 * scale) as u64;
    let connections = (sessions + 100).to_string();
    let settings = [("max_connections", connections.as_str()), ("shared_buffers", "32MB"), ("autovacuum", "off")];
    let cluster = TestCluster::start(&settings).unwrap();
    Session::open(cluster.port(), "postgres").query(&format!("create database {DATABASE}"));
    let proxies =
        || [("pgbouncer", Proxy::pgbouncer(&cluster, Link::Tcp)), ("peergate", Proxy::peergate(&cluster, Link::Tcp))];

    println!("\n{sessions} idle sessions, resident memory in kB\n");
    println!("| | fresh | after login | each | after a result of 100 kB | each | after all have ended |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for (name, proxy) in proxies() {
        idle(name, &proxy, sessions);
    }
    println!("\nA result of {:.1} GB, resident memory in kB\n", bytes as f64 / 1e9);
    println!("| | before | most while read slowly | most | after | MB/s while read fast |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for (name, proxy) in proxies() {
        large(name, &proxy, bytes);
    }
}

fn idle(name: &str, proxy: &Proxy, count: usize) {
    let (fresh, _) = proxy.memory_kb();
    let mut sessions: Vec<Session> = (0..count).map(|_| Session::open(proxy.port, DATABASE)).collect();
    let (after_login, _) = proxy.memory_kb();
    for session in &mut sessions {
        assert!(session.query("select repeat('x', 100000)").bytes > 100_000);
    }
    let (after_work, _) = proxy.memory_kb();
    drop(sessions);
    // Its sessions end in the background.
    let begun = Instant::now();
    let mut least = after_work;
    while begun.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(100));
        least = least.min(proxy.memory_kb().0);
    }
    let each = |now: u64| now.saturating_sub(fresh) as f64 / count as f64;
    println!(
        "| {name} | {fresh} | {after_login} | {:.1} | {after_work} | {:.1} | {least} |",
        each(after_login),
        each(after_work)
    );
}

fn large(name: &str, proxy: &Proxy, bytes: u64) {
    let rows = bytes / ROW_BYTES;
    let mut session = Session::open(proxy.port, DATABASE);
    session.query("select 1");
    let (before, _) = proxy.memory_kb();
    proxy.forget_peak();
    let text = format!("select repeat('x', {ROW_BYTES}) from generate_series(1, {rows})\0");
    session.send(&frame(b'Q', text.as_bytes()));
    let begun = Instant::now();
    let mut read = 0;
    while begun.elapsed() < SLOW && read < rows / 2 {
        // A hundred rows, and a pause: less than a MB each hundredth of a second.
        (0..100).for_each(|_| read += session.until(b'D').rows);
        std::thread::sleep(Duration::from_millis(10));
    }
    let (_, slow_peak) = proxy.memory_kb();
    let fast = Instant::now();
    let answer = session.finish();
    assert_eq!(read + answer.rows, rows);
    let rate = answer.bytes as f64 / 1e6 / fast.elapsed().as_secs_f64();
    let (after, peak) = proxy.memory_kb();
    println!("| {name} | {before} | {slow_peak} | {peak} | {after} | {rate:.0} |");
}
