//! How fast a mirror catches up and copies, as a ratio to a native subscription: same servers, same load, same run.
//!
//! Three servers with fsync: a source, a target with a native subscription, and a target with a mirror, whose engine runs in this
//! process and whose catalog is on its target. In each phase both stand still while the load runs; then one after the other catches
//! up, and the clock stops when the last row of the load is visible. In the end all tables are compared.
//!
//! `BENCH_SCALE` (default 1) scales the load: 1 is 100,000 TPC-B transactions, 1 million rows inserted in one transaction, 500,000
//! updated in one, and a copy of half a gigabyte.

#![allow(clippy::unwrap_used, reason = "what fails here ends the benchmark")]

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::cluster::{Binaries, TestCluster};
use catalog::connect::Connector;
use catalog::peer::PeerOptions;
use catalog::secret::Keyring;
use mirror::engine::{self, EngineOptions};
use tokio::sync::watch;
use tokio_postgres::{Client, NoTls};

/// Alike on all three: durable, and with room enough that no checkpoint falls into one measurement and not into another.
const SETTINGS: [(&str, &str); 7] = [
    ("fsync", "on"),
    ("shared_buffers", "256MB"),
    ("max_wal_size", "16GB"),
    ("checkpoint_timeout", "1h"),
    ("autovacuum_naptime", "1min"),
    ("log_checkpoints", "off"),
    // Else a subscription that is enabled waits up to 5 s for its worker, which would be counted against it.
    ("wal_retrieve_retry_interval", "10ms"),
];

/// How long anything that is waited for may take.
const DEADLINE: Duration = Duration::from_secs(1800);

/// What was measured of one load.
struct Measured {
    phase: &'static str,
    changes: u64,
    native: Duration,
    ours: Duration,
}

impl Measured {
    fn ratio(&self) -> f64 {
        self.native.as_secs_f64() / self.ours.as_secs_f64()
    }
}

/// The three servers.
struct Stage {
    source: TestCluster,
    native: TestCluster,
    ours: TestCluster,
    /// A session on the catalog.
    control: Client,
}

fn main() {
    let scale: f64 = std::env::var("BENCH_SCALE").ok().map_or(1.0, |text| text.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(run(scale));
}

async fn run(scale: f64) {
    let start = || tokio::task::spawn_blocking(|| TestCluster::start(&SETTINGS).unwrap());
    let (source, native, ours) = (start(), start(), start());
    let (source, native, ours) = (source.await.unwrap(), native.await.unwrap(), ours.await.unwrap());
    let (catalog, control) = open_catalog(&ours).await;
    let stage = Stage { source, native, ours, control };
    let (stop, stopped) = watch::channel(false);
    let options = EngineOptions { node_id: "bench".to_owned(), host: "bench".to_owned(), role: "engine" };
    let engine = tokio::spawn(engine::run(catalog, options, stopped));

    let copy = stage.copy(scale).await;
    let caught_up = stage.catch_up(scale).await;
    stop.send_replace(true);
    engine.await.unwrap().unwrap();
    print(&copy, &caught_up);
}

fn print(copy: &Measured, caught_up: &[Measured]) {
    println!(
        "\n{:<22} {:>10}  {:>9} {:>10}  {:>9} {:>10}  {:>6}",
        "", "rows", "native s", "rows/s", "mirror s", "rows/s", "ratio"
    );
    let line = |m: &Measured| {
        let rate = |took: Duration| m.changes as f64 / took.as_secs_f64();
        println!(
            "{:<22} {:>10}  {:>9.2} {:>10.0}  {:>9.2} {:>10.0}  {:>6.2}",
            m.phase,
            m.changes,
            m.native.as_secs_f64(),
            rate(m.native),
            m.ours.as_secs_f64(),
            rate(m.ours),
            m.ratio()
        );
    };
    caught_up.iter().for_each(line);
    let total = Measured {
        phase: "all of these",
        changes: caught_up.iter().map(|m| m.changes).sum(),
        native: caught_up.iter().map(|m| m.native).sum(),
        ours: caught_up.iter().map(|m| m.ours).sum(),
    };
    line(&total);
    let mean = caught_up.iter().map(|m| m.ratio().ln()).sum::<f64>() / caught_up.len() as f64;
    println!("{:<77} {:>6.2}", "geometric mean of the ratios", mean.exp());
    line(copy);
}

async fn open_catalog(cluster: &TestCluster) -> (Catalog, Client) {
    let admin = connect(cluster, "postgres").await;
    admin.batch_execute("create database control").await.unwrap();
    let options = PeerOptions::plain([
        ("host", "127.0.0.1".to_owned()),
        ("port", cluster.port().to_string()),
        ("user", "postgres".to_owned()),
        ("database", "control".to_owned()),
    ]);
    let keyring = Arc::new(Keyring::parse(&"5a".repeat(32)).unwrap());
    let catalog = Catalog::new(Connector::new(&options).unwrap(), keyring).unwrap();
    catalog.migrate().await.unwrap();
    (catalog, connect(cluster, "control").await)
}

impl Stage {
    /// Makes a database on all three, with these tables where they have to be made beforehand, and both as peers.
    async fn create_database(&self, database: &str, tables: &str) {
        for cluster in [&self.source, &self.native, &self.ours] {
            let admin = connect(cluster, "postgres").await;
            admin.batch_execute(&format!("create database {database}")).await.unwrap();
        }
        // A mirror makes its own.
        connect(&self.source, database).await.batch_execute(tables).await.unwrap();
        connect(&self.native, database).await.batch_execute(tables).await.unwrap();
        let publish = format!("create publication {database} for all tables");
        connect(&self.source, database).await.batch_execute(&publish).await.unwrap();
        for (peer, cluster) in
            [(format!("{database}_source"), &self.source), (format!("{database}_target"), &self.ours)]
        {
            let port = cluster.port();
            let options =
                format!(r#"{{"host": "127.0.0.1", "port": "{port}", "user": "postgres", "database": "{database}"}}"#);
            self.control
                .batch_execute(&format!("call peergate.create_peer('{peer}', 'postgres', '{options}')"))
                .await
                .unwrap();
        }
    }

    /// Begins a native subscription and waits until it has copied.
    async fn subscribe(&self, database: &str) -> Duration {
        let target = connect(&self.native, database).await;
        let port = self.source.port();
        let begun = Instant::now();
        let subscribe = format!(
            "create subscription {database} connection 'host=127.0.0.1 port={port} user=postgres dbname={database}' publication {database}"
        );
        target.batch_execute(&subscribe).await.unwrap();
        wait_until(
            &target,
            "select count(*) filter (where srsubstate <> 'r') = 0 and count(*) > 0 from pg_subscription_rel",
        )
        .await;
        begun.elapsed()
    }

    /// Begins a mirror and waits until it has copied and caught up.
    async fn mirror(&self, database: &str) -> Duration {
        let begun = Instant::now();
        let create = format!(
            r#"call peergate.create_mirror('{database}', '{database}_source', '{database}_target', '{{"all": true}}')"#
        );
        self.control.batch_execute(&create).await.unwrap();
        self.wait_for_state(database, "running").await;
        begun.elapsed()
    }

    async fn wait_for_state(&self, mirror: &str, state: &str) {
        let failed = format!(
            "select last_error from peergate.mirrors where name = '{mirror}' and state in ('blocked', 'resync_required')"
        );
        let holds = format!("select state = '{state}' from peergate.mirrors where name = '{mirror}'");
        wait_for(&holds, async || {
            let errors = self.control.query(&failed, &[]).await.unwrap();
            assert!(errors.is_empty(), "{:?}", errors.first().map(|row| row.get::<_, Option<String>>(0)));
            self.control.query_one(&holds, &[]).await.unwrap().get(0)
        })
        .await;
    }

    /// Both stand as after a restart: nothing dirty is left for the other's measurement.
    async fn checkpoint(&self) {
        for cluster in [&self.source, &self.native, &self.ours] {
            connect(cluster, "postgres").await.batch_execute("checkpoint").await.unwrap();
        }
    }

    async fn copy(&self, scale: f64) -> Measured {
        let rows = (4_000_000.0 * scale) as u64;
        let table = "create table big (id bigint primary key, a int, b text, c timestamptz, d numeric)";
        self.create_database("copied", table).await;
        let source = connect(&self.source, "copied").await;
        let fill = format!(
            "insert into big select i, i % 1000, repeat(md5(i::text), 2), timestamptz '2026-01-01' + i * interval '1 s', i / 7.0 from generate_series(1, {rows}) i"
        );
        source.batch_execute(&fill).await.unwrap();
        source.batch_execute("vacuum analyze big").await.unwrap();
        // Read once, so that nobody is the first to.
        source.batch_execute("select sum(hashtextextended(b::text, 0)) from big").await.unwrap();
        self.checkpoint().await;
        let native = self.subscribe("copied").await;
        self.checkpoint().await;
        let ours = self.mirror("copied").await;
        self.assert_equal("copied").await;
        // Out of the way of what follows.
        self.control.batch_execute("call peergate.drop_mirror(array['copied'])").await.unwrap();
        connect(&self.native, "copied").await.batch_execute("drop subscription copied").await.unwrap();
        wait_until(&self.control, "select count(*) = 0 from peergate.mirror_drops").await;
        Measured { phase: "initial copy", changes: rows, native, ours }
    }

    async fn catch_up(&self, scale: f64) -> Vec<Measured> {
        let tables = "
            create table pgbench_accounts (aid int not null primary key, bid int, abalance int, filler char(84));
            create table pgbench_branches (bid int not null primary key, bbalance int, filler char(88));
            create table pgbench_tellers (tid int not null primary key, bid int, tbalance int, filler char(84));
            create table pgbench_history (tid int, bid int, aid int, delta int, mtime timestamp, filler char(22));
            create table rows (id bigint primary key, a int not null, b text, c timestamptz);
            create table marker (n int primary key)";
        self.create_database("loaded", tables).await;
        pgbench(&self.source, &["-i", "-I", "g", "-s", "10", "-q"]);
        self.subscribe("loaded").await;
        self.mirror("loaded").await;

        let source = connect(&self.source, "loaded").await;
        let clients = 4;
        let transactions = (25_000.0 * scale) as u64;
        let (inserted, updated) = ((1_000_000.0 * scale) as u64, (500_000.0 * scale) as u64);
        let insert = format!(
            "insert into rows select i, i % 100, md5(i::text) || md5((-i)::text), now() from generate_series(1, {inserted}) i"
        );
        let update = format!("update rows set a = a + 1, c = now() where id <= {updated}");
        let mut measured = Vec::new();
        for (n, (phase, changes)) in
            [("TPC-B", clients * transactions * 4), ("one INSERT", inserted), ("one UPDATE", updated)]
                .into_iter()
                .enumerate()
        {
            self.settle().await;
            self.pause().await;
            match n {
                0 => {
                    let (clients, transactions) = (clients.to_string(), transactions.to_string());
                    pgbench(&self.source, &["-n", "-c", &clients, "-j", "2", "-t", &transactions]);
                }
                1 => source.batch_execute(&insert).await.unwrap(),
                _ => source.batch_execute(&update).await.unwrap(),
            }
            source.execute("insert into marker values ($1)", &[&(n as i32)]).await.unwrap();
            // Each goes first in turn.
            let (mut native, mut ours) = (Duration::ZERO, Duration::ZERO);
            for turn in 0..2 {
                self.checkpoint().await;
                if turn == n % 2 {
                    native = self.resume_native(n).await;
                } else {
                    ours = self.resume_ours(n).await;
                }
            }
            eprintln!("{phase}: native {native:?}, mirror {ours:?}");
            measured.push(Measured { phase, changes, native, ours });
        }
        self.assert_equal("loaded").await;
        measured
    }

    /// Lets both run until their slots begin after all that was done, so that no walsender decodes an earlier load again.
    async fn settle(&self) {
        let (source, native) = (connect(&self.source, "loaded").await, connect(&self.native, "loaded").await);
        native.batch_execute("alter subscription loaded enable").await.unwrap();
        self.control.batch_execute("call peergate.resume_mirror('loaded')").await.unwrap();
        self.wait_for_state("loaded", "running").await;
        let end: String = source.query_one("select pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
        let settled = format!("select count(*) = 2 and bool_and(restart_lsn >= '{end}') from pg_replication_slots");
        wait_for(&settled, async || {
            // It writes the record at which a slot can begin.
            source.batch_execute("checkpoint").await.unwrap();
            tokio::time::sleep(Duration::from_millis(500)).await;
            source.query_one(&settled, &[]).await.unwrap().get(0)
        })
        .await;
    }

    async fn pause(&self) {
        self.control.batch_execute("call peergate.pause_mirror('loaded')").await.unwrap();
        self.wait_for_state("loaded", "paused").await;
        let native = connect(&self.native, "loaded").await;
        native.batch_execute("alter subscription loaded disable").await.unwrap();
        let source = connect(&self.source, "loaded").await;
        wait_until(&source, "select bool_and(not active) from pg_replication_slots").await;
    }

    async fn resume_native(&self, n: usize) -> Duration {
        let target = connect(&self.native, "loaded").await;
        let begun = Instant::now();
        target.batch_execute("alter subscription loaded enable").await.unwrap();
        wait_until(&target, &format!("select exists (select from marker where n = {n})")).await;
        let took = begun.elapsed();
        target.batch_execute("alter subscription loaded disable").await.unwrap();
        took
    }

    async fn resume_ours(&self, n: usize) -> Duration {
        let target = connect(&self.ours, "loaded").await;
        let begun = Instant::now();
        self.control.batch_execute("call peergate.resume_mirror('loaded')").await.unwrap();
        wait_until(&target, &format!("select exists (select from marker where n = {n})")).await;
        let took = begun.elapsed();
        self.control.batch_execute("call peergate.pause_mirror('loaded')").await.unwrap();
        self.wait_for_state("loaded", "paused").await;
        took
    }

    /// Compares all tables of the source with both targets' as multisets of rows.
    async fn assert_equal(&self, database: &str) {
        let source = connect(&self.source, database).await;
        let tables = source
            .query("select tablename::text from pg_tables where schemaname = 'public' order by 1", &[])
            .await
            .unwrap();
        for table in tables.iter().map(|row| row.get::<_, &str>(0)) {
            let print = format!(
                "select concat_ws(' ', count(*), sum(hashtextextended(t::text, 1)), sum(hashtextextended(t::text, 2))) from {table} t"
            );
            let expected: String = source.query_one(&print, &[]).await.unwrap().get(0);
            for (what, cluster) in [("native", &self.native), ("mirror", &self.ours)] {
                let found: String = connect(cluster, database).await.query_one(&print, &[]).await.unwrap().get(0);
                assert_eq!(found, expected, "{table} of the {what} target differs");
            }
        }
    }
}

fn pgbench(cluster: &TestCluster, arguments: &[&str]) {
    let port = cluster.port().to_string();
    let mut command = Command::new(Binaries::find(None).unwrap().tool("pgbench").unwrap());
    command.args(["-h", "127.0.0.1", "-p", &port, "-U", "postgres"]).args(arguments).arg("loaded");
    // The load's own durability is not what is measured.
    let output = command.env("PGOPTIONS", "-c synchronous_commit=off").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

async fn connect(cluster: &TestCluster, database: &str) -> Client {
    let (client, connection) = cluster.config(database).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

async fn wait_until(client: &Client, query: &str) {
    wait_for(query, async || client.query_one(query, &[]).await.unwrap().get::<_, Option<bool>>(0).unwrap_or(false))
        .await;
}

async fn wait_for(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < DEADLINE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
