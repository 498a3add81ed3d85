//! How long VERIFY MIRROR takes on a large table while it changes, what that costs the load, and what it finds.
//!
//! Two servers with fsync, the catalog on the target's, the engine in this process. `VERIFY_ROWS` (default 10,000,000) rows as pgbench's accounts,
//! and clients that each update a row, read it, and insert another one, all the time. It is verified; then one row is changed on the target,
//! and it is verified again, and again with repair.

#![allow(clippy::unwrap_used, reason = "what fails here ends the benchmark")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::cluster::TestCluster;
use catalog::connect::Connector;
use catalog::peer::PeerOptions;
use catalog::secret::Keyring;
use mirror::engine::{self, EngineOptions};
use tokio::sync::watch;
use tokio_postgres::{Client, NoTls};

const SETTINGS: [(&str, &str); 4] =
    [("fsync", "on"), ("shared_buffers", "256MB"), ("max_wal_size", "16GB"), ("checkpoint_timeout", "1h")];

/// Clients of the load.
const CLIENTS: usize = 2;

/// How long anything that is waited for may take.
const DEADLINE: Duration = Duration::from_secs(3600);

fn main() {
    let rows: u64 = std::env::var("VERIFY_ROWS").ok().map_or(10_000_000, |text| text.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(run(rows));
}

async fn run(rows: u64) {
    let start = || tokio::task::spawn_blocking(|| TestCluster::start(&SETTINGS).unwrap());
    let (source, target) = (start(), start());
    let (source, target) = (source.await.unwrap(), target.await.unwrap());
    connect(&target, "postgres").await.batch_execute("create database control").await.unwrap();
    let options = PeerOptions::plain([
        ("host", "127.0.0.1".to_owned()),
        ("port", target.port().to_string()),
        ("user", "postgres".to_owned()),
        ("database", "control".to_owned()),
    ]);
    let keyring = Arc::new(Keyring::parse(&"5a".repeat(32)).unwrap());
    let catalog = Catalog::new(Connector::new(&options).unwrap(), keyring).unwrap();
    catalog.migrate().await.unwrap();
    let control = connect(&target, "control").await;
    let on_source = connect(&source, "postgres").await;
    let make = format!(
        "create table accounts (aid int primary key, bid int, abalance int, filler char(84));
         insert into accounts select i, i / 100000, 0, '' from generate_series(1, {rows}) i; analyze accounts;
         create table history (id bigserial primary key, aid int, delta int, at timestamptz default clock_timestamp())"
    );
    on_source.batch_execute(&make).await.unwrap();
    for (peer, cluster) in [("shop", &source), ("dwh", &target)] {
        let options = format!(
            r#"{{"host": "127.0.0.1", "port": "{}", "user": "postgres", "database": "postgres"}}"#,
            cluster.port()
        );
        control.batch_execute(&format!("call peergate.create_peer('{peer}', 'postgres', '{options}')")).await.unwrap();
    }
    let (stop, stopped) = watch::channel(false);
    let options = EngineOptions { node_id: "bench".to_owned(), host: "bench".to_owned(), role: "engine" };
    let engine = tokio::spawn(engine::run(catalog, options, stopped));
    control.batch_execute(r#"call peergate.create_mirror('m', 'shop', 'dwh', '{"all": true}')"#).await.unwrap();
    until(&control, "select state from peergate.mirrors", "running").await;

    let (ended, transactions) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = Vec::new();
    for n in 0..CLIENTS {
        clients.push(tokio::spawn(load(
            connect(&source, "postgres").await,
            n as u64,
            rows,
            ended.clone(),
            transactions.clone(),
        )));
    }
    let rate = async |for_long: Duration| {
        let (before, since) = (transactions.load(Ordering::Relaxed), Instant::now());
        tokio::time::sleep(for_long).await;
        (transactions.load(Ordering::Relaxed) - before) as f64 / since.elapsed().as_secs_f64()
    };
    println!("{rows} rows, {:.0} transactions/s without a verification", rate(Duration::from_secs(20)).await);
    verify(&control, &transactions, "equal", false).await;
    let on_target = connect(&target, "postgres").await;
    // One that the load does not touch.
    on_target.batch_execute("update accounts set abalance = abalance + 1 where aid = 4711").await.unwrap();
    verify(&control, &transactions, "one row changed behind its back", false).await;
    verify(&control, &transactions, "the same, with repair", true).await;
    verify(&control, &transactions, "after the repair", false).await;
    ended.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    stop.send_replace(true);
    engine.await.unwrap().unwrap();
}

/// Changes rows above the first 100,000, and adds others, until it ends.
async fn load(client: Client, seed: u64, rows: u64, ended: Arc<AtomicBool>, transactions: Arc<AtomicU64>) {
    let mut state = seed + 1;
    while !ended.load(Ordering::Relaxed) {
        // Any spread of keys does.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let aid = 100_000 + (state >> 33) % (rows - 100_000);
        let transaction = format!(
            "begin; update accounts set abalance = abalance + 1 where aid = {aid}; select abalance from accounts where aid = {aid};
             insert into history (aid, delta) values ({aid}, 1); commit"
        );
        client.batch_execute(&transaction).await.unwrap();
        transactions.fetch_add(1, Ordering::Relaxed);
    }
}

async fn verify(control: &Client, transactions: &AtomicU64, what: &str, repair: bool) {
    let (before, begun) = (transactions.load(Ordering::Relaxed), Instant::now());
    control.batch_execute(&format!("call peergate.start_verification('m', null, {repair})")).await.unwrap();
    until(control, "select state from peergate.tasks order by id desc limit 1", "completed").await;
    let took = begun.elapsed().as_secs_f64();
    let rate = (transactions.load(Ordering::Relaxed) - before) as f64 / took;
    println!("{what}: {took:.1} s, {rate:.0} transactions/s meanwhile");
    let found = "select concat_ws(' ', source_name, result, source_rows, 'rows, missing', missing, 'different', different, 'extra', extra, 'repaired', repaired)
                 from peergate.verification_tables where task_id = (select max(id) from peergate.tasks)
                 union all select concat_ws(' ', kind, key) from peergate.verification_differences where task_id = (select max(id) from peergate.tasks)
                 union all select message from peergate.task_log where task_id = (select max(id) from peergate.tasks)";
    for row in control.query(found, &[]).await.unwrap() {
        println!("    {}", row.get::<_, String>(0));
    }
}

async fn until(client: &Client, query: &str, expected: &str) {
    let begun = Instant::now();
    while begun.elapsed() < DEADLINE {
        let row = client.query_one(query, &[]).await.unwrap();
        let state: String = row.get(0);
        assert!(!matches!(state.as_str(), "failed" | "canceled" | "blocked"), "{state}");
        if state == expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{query} is not {expected}");
}

async fn connect(cluster: &TestCluster, database: &str) -> Client {
    let (client, connection) = cluster.config(database).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}
