//! The binary with its embedded catalog between a source and a target, and a load on the source.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use catalog::cluster::{Binaries, TestCluster};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

use crate::serve::{Place, Server};

/// How long anything that is waited for may take.
const DEADLINE: Duration = Duration::from_secs(120);

/// Tables that the load works on: with a key, without one (every row that comes twice shows), and with big values.
pub(crate) const SCHEMA: &str = "
    create table accounts (id int primary key, balance bigint not null default 0, note text);
    create table history (account int, delta int, at timestamptz default clock_timestamp());
    create table events (id bigserial primary key, kind text not null, body text);
    insert into accounts select i, 0, repeat(md5(i::text), i % 7 * 40) from generate_series(1, 20000) i;
    insert into history select i, 0 from generate_series(1, 20000) i;";

/// The servers of one test.
pub(crate) struct Stage {
    pub(crate) source: TestCluster,
    pub(crate) target: TestCluster,
    pub(crate) server: Option<Server>,
    /// The user's password.
    pub(crate) password: String,
    place: Place,
}

impl Stage {
    /// Starts the three servers; the source has [`SCHEMA`].
    pub(crate) async fn start() -> Stage {
        let start = || tokio::task::spawn_blocking(|| TestCluster::start(&[]).unwrap());
        let (source, target) = (start(), start());
        let place = Place::new();
        let server = Server::start(&place.0, &[]);
        let password = std::fs::read_to_string(place.0.join("password")).unwrap().trim_end().to_owned();
        let (source, target) = (source.await.unwrap(), target.await.unwrap());
        let stage = Stage { source, target, server: Some(server), password, place };
        stage.on_source().await.batch_execute(SCHEMA).await.unwrap();
        stage
    }

    pub(crate) async fn on_source(&self) -> Client {
        connect(&self.source.config("postgres")).await
    }

    pub(crate) async fn on_target(&self) -> Client {
        connect(&self.target.config("postgres")).await
    }

    /// A session as the user, through the gateway.
    pub(crate) async fn on_gateway(&self) -> Client {
        connect(&self.server.as_ref().unwrap().config_as("peergate", &self.password, "peergate")).await
    }

    /// Runs a script with psql through the gateway, as the user; returns what it wrote.
    pub(crate) async fn psql(&self, script: &str) -> String {
        let psql = Binaries::find(None).unwrap().tool("psql").unwrap();
        let (host, port) = self.server.as_ref().unwrap().address().rsplit_once(':').unwrap();
        let mut command = tokio::process::Command::new(psql);
        command.args(["-X", "-At", "-v", "ON_ERROR_STOP=1", "-c", script]);
        command.args(["-d", &format!("host={host} port={port} user=peergate dbname=peergate")]);
        let output = command.env("PGPASSWORD", &self.password).output().await.unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{script}\n{said}");
        said
    }

    /// Creates both peers, and mirror `m` of all tables between them.
    pub(crate) async fn create_mirror(&self) {
        for (peer, cluster) in [("shop", &self.source), ("dwh", &self.target)] {
            let port = cluster.port();
            self.psql(&format!("create peer {peer} from postgres with (host = '127.0.0.1', port = {port}, user = 'postgres', database = 'postgres')")).await;
        }
        self.psql("create mirror m from shop to dwh for all tables").await;
    }

    /// Ends the process as `kill -9` does.
    pub(crate) fn kill(&mut self) {
        let mut server = self.server.take().unwrap();
        server.child.kill().unwrap();
        server.child.wait().unwrap();
    }

    /// Starts the process again on the same directory; returns how long that took.
    pub(crate) fn restart(&mut self) -> Duration {
        assert!(self.server.is_none(), "it runs already");
        let begun = Instant::now();
        self.server = Some(Server::start(&self.place.0, &[]));
        begun.elapsed()
    }

    /// Waits until the target has all that the source had committed; returns how long that took.
    pub(crate) async fn caught_up(&self) -> Duration {
        let begun = Instant::now();
        let client = self.on_gateway().await;
        if let Err(error) = client.batch_execute("wait for mirror m timeout '120s'").await {
            let events = "select string_agg(concat_ws(' | ', at, level, kind, message, detail), E'\\n' order by id) from mirror_events";
            panic!("not caught up: {error:?}\n{}", ask(&client, events).await);
        }
        begun.elapsed()
    }

    /// Waits until a query on the catalog gives `t`.
    pub(crate) async fn wait_until(&self, query: &str) {
        let client = self.on_gateway().await;
        eventually(query, async || ask(&client, query).await == "t").await;
    }

    /// Compares all tables of both sides as multisets of rows.
    pub(crate) async fn assert_equal(&self) {
        let (source, target) = (self.on_source().await, self.on_target().await);
        let tables = "select string_agg(tablename, ' ' order by 1) from pg_tables where schemaname = 'public'";
        let tables = ask(&source, tables).await;
        assert!(tables.split(' ').count() >= 3, "{tables}");
        for table in tables.split(' ') {
            // Order does not count and rows that are there twice do: two sums of 64-bit hashes, and the number.
            let print = format!(
                "select concat_ws(' ', count(*), sum(hashtextextended(t::text, 1)), sum(hashtextextended(t::text, 2))) from {table} t"
            );
            let (there, here) = (ask(&source, &print).await, ask(&target, &print).await);
            if there != here {
                panic!("{table} differs: source {there}, target {here}\n{}", difference(&source, &target, table).await);
            }
        }
    }
}

/// Rows that one side has more often than the other, for a test that fails.
async fn difference(source: &Client, target: &Client, table: &str) -> String {
    let query = format!("select t::text as row, count(*) from {table} t group by 1");
    let mut counts = std::collections::BTreeMap::<String, i64>::new();
    for (client, sign) in [(source, 1), (target, -1)] {
        for row in client.query(&query, &[]).await.unwrap() {
            *counts.entry(row.get(0)).or_default() += sign * row.get::<_, i64>(1);
        }
    }
    let rows: Vec<String> = counts
        .iter()
        .filter(|(_, n)| **n != 0)
        .take(10)
        .map(|(row, n)| format!("{n:+} {}", row.chars().take(100).collect::<String>()))
        .collect();
    rows.join("\n")
}

/// Transactions on the source, one after the other, until it is stopped.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    running: JoinHandle<u64>,
}

impl Load {
    /// Starts it; `seed` decides what it does.
    pub(crate) async fn start(stage: &Stage, seed: u64) -> Load {
        let client = stage.on_source().await;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let running = tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(seed);
            let mut transactions = 0;
            while !stopped.load(Ordering::Relaxed) {
                let (account, n, delta) =
                    (random.random_range(1..20000), random.random_range(1..40), random.random_range(-99..99));
                let changes = match random.random_range(0..10) {
                    0 => format!("update events set id = -id where id > 0 and id % 97 = {n}"),
                    1 => format!("delete from events where id < 0 and id % 5 = -{}", n % 5),
                    2 => format!(
                        "update accounts set note = repeat(md5(note), {n} * 9) where id % 5000 = {account} % 5000"
                    ),
                    3 => format!("delete from accounts where id = {account}"),
                    4 => format!(
                        "insert into accounts values ({account}, 1) on conflict (id) do update set id = -excluded.id * 100000 - {transactions}"
                    ),
                    _ => format!(
                        "insert into events (kind, body) select 'k' || i, repeat('x', i * 10) from generate_series(1, {n}) i"
                    ),
                };
                let transaction = format!(
                    "begin;
                     update accounts set balance = balance + {delta} where id between {account} and {account} + {n};
                     insert into history (account, delta) select {account} + i, {delta} from generate_series(1, {n}) i;
                     {changes};
                     commit"
                );
                let done = client.batch_execute(&transaction).await;
                done.unwrap_or_else(|error| panic!("{error:?}: {transaction}"));
                transactions += 1;
            }
            transactions
        });
        Load { stop, running }
    }

    /// Ends it; returns how many transactions it committed.
    pub(crate) async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.running.await.unwrap()
    }
}

pub(crate) async fn connect(config: &tokio_postgres::Config) -> Client {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Returns the first column of the first row as text; empty when there is none, or it is NULL.
pub(crate) async fn ask(client: &Client, query: &str) -> String {
    let messages = client.simple_query(query).await.unwrap();
    let row =
        messages.iter().find_map(|m| if let tokio_postgres::SimpleQueryMessage::Row(r) = m { r.get(0) } else { None });
    row.unwrap_or_default().to_owned()
}

/// Looks again and again until something holds.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < DEADLINE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
