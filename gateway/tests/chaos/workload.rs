//! Writers on the source. Each transaction keeps what the reader of the target looks for: what is taken from one account is given to
//! another in another table, and each leaves a mark in two tables.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config};

use crate::journal::Journal;
use crate::schema::{ACCOUNTS, KEYS_MAX, Key, Schema, Table};
use crate::servers::connect;

/// Sessions that write at the same time.
const WRITERS: u64 = 2;

/// How many of the changes are of a table's shape.
const ALTERATIONS: f64 = 0.03;

/// Running writers.
pub(crate) struct Workload {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<u64>>,
}

impl Workload {
    pub(crate) fn start(source: Config, schema: &Arc<Schema>, seed: u64, journal: &Journal) -> Workload {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = (0..WRITERS)
            .map(|n| {
                let writer = Writer {
                    schema: schema.clone(),
                    random: StdRng::seed_from_u64(seed.wrapping_add(n)),
                    next_mark: n * 1_000_000_000,
                    journal: journal.clone(),
                };
                tokio::spawn(writer.run(source.clone(), stop.clone()))
            })
            .collect();
        Workload { stop, writers }
    }

    /// Ends the writers; returns how many transactions were committed.
    pub(crate) async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let mut transactions = 0;
        for writer in self.writers {
            transactions += writer.await.unwrap();
        }
        transactions
    }
}

struct Writer {
    schema: Arc<Schema>,
    random: StdRng,
    next_mark: u64,
    journal: Journal,
}

impl Writer {
    async fn run(mut self, source: Config, stop: Arc<AtomicBool>) -> u64 {
        let mut transactions = 0;
        let mut client: Option<Client> = None;
        while !stop.load(Ordering::Relaxed) {
            let Some(connected) = &client else {
                client = connect(&source).await.ok();
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            match self.transaction(connected).await {
                Ok(()) => transactions += 1,
                // Deadlocks among the writers are their own affair.
                Err(error) if error.code().is_some_and(|c| c.code() == "40P01") => {
                    let _ = connected.batch_execute("rollback").await;
                }
                Err(error) => {
                    if !connected.is_closed() && !error.is_closed() {
                        self.journal.note(format!("a writer failed: {error:?}"));
                    }
                    client = None;
                }
            }
            // The load should not be all that the machine does.
            tokio::time::sleep(Duration::from_millis(self.random.random_range(0..30))).await;
        }
        transactions
    }

    async fn transaction(&mut self, client: &Client) -> Result<(), tokio_postgres::Error> {
        client.batch_execute("begin").await?;
        let (from, to, n) = (self.account(), self.account(), self.random.random_range(1..100));
        let transfer = format!("update acc_a set n = n - {n} where id = {from}");
        client.batch_execute(&transfer).await?;
        self.next_mark += 1;
        client.batch_execute(&format!("insert into mark_a values ({})", self.next_mark)).await?;
        for _ in 0..self.random.random_range(0..5) {
            let index = self.random.random_range(0..self.schema.tables.len());
            let schema = self.schema.clone();
            let table = &schema.tables[index];
            let alters = self.random.random_bool(ALTERATIONS);
            let statement = if alters { alteration(table, &mut self.random) } else { change(table, &mut self.random) };
            client.batch_execute("savepoint a").await?;
            // What the constraints forbid is undone by itself.
            let undo = match client.batch_execute(&statement).await {
                Ok(()) => self.random.random_bool(0.15),
                Err(error) if error.code().is_some_and(|c| c.code().starts_with("23")) => true,
                Err(error) => return Err(error),
            };
            client.batch_execute(if undo { "rollback to a; release a" } else { "release a" }).await?;
        }
        if self.random.random_bool(0.02) {
            client.batch_execute("truncate mark_a, mark_b").await?;
        } else {
            client.batch_execute(&format!("insert into mark_b values ({})", self.next_mark)).await?;
        }
        client.batch_execute(&format!("update acc_b set n = n + {n} where id = {to}")).await?;
        client.batch_execute(if self.random.random_bool(0.9) { "commit" } else { "rollback" }).await
    }

    fn account(&mut self) -> u32 {
        self.random.random_range(1..=ACCOUNTS)
    }
}

/// A random change of one table.
fn change(table: &Table, random: &mut StdRng) -> String {
    let name = &table.name;
    let (one, other) = (random.random_range(1..=KEYS_MAX), random.random_range(1..=KEYS_MAX));
    let salt = random.random_range(0..100_000);
    let (columns, key, other_key) = (table.columns(), table.key(&one.to_string()), table.key(&other.to_string()));
    let insert = |from: u32, rows: u32| {
        format!(
            "insert into {name} ({columns}) select {} from generate_series({from}, {from} + {rows}) i",
            table.row("i", &format!("(i + {salt})"))
        )
    };
    if table.key == Key::None {
        return match random.random_range(0..12) {
            0 => format!("truncate {name}"),
            1 => insert(one, 2_000),
            _ => insert(one, 5),
        };
    }
    match random.random_range(0..24) {
        0 if !table.partitioned => format!("truncate {name}; {}", insert(1, KEYS_MAX / 2)),
        0..2 => format!("delete from {name} where k2 % 5 = {}", one % 5),
        2..4 => format!("delete from {name} where k1 = {key}; {}", insert(one, 0)),
        4..8 => insert(one, random.random_range(0..3)),
        // A new key, with the large value left as it is, or not.
        8..11 => format!("update {name} set k1 = {other_key} where k1 = {key}"),
        11 => {
            format!("update {name} set k1 = {other_key}, k2 = {other}, big = repeat('{salt}', 1500) where k1 = {key}")
        }
        12..14 => {
            // Two rows exchange their keys.
            let aside = table.key("1000000");
            format!(
                "update {name} set k1 = {aside} where k1 = {key}; update {name} set k1 = {key} where k1 = {other_key}; update {name} set k1 = {other_key} where k1 = {aside}"
            )
        }
        14..17 if table.unique => {
            // A unique value goes from row to row.
            format!(
                "update {name} set u = null where u in ({one}, {other}); update {name} set u = {one} where k1 = {key}; update {name} set u = {other} where k1 = {other_key};
                 update {name} set u = null where k1 = {key}; update {name} set u = {one} where k1 = {other_key}; update {name} set u = {other} where k1 = {key}"
            )
        }
        14..18 => format!("update {name} set v = 'w{salt}', num = num + 1, at = null where k2 % 7 = {}", one % 7),
        18 => format!("update {name} set big = repeat('é{salt}', {}) where k2 % 9 = {}", salt % 3000, one % 9),
        19 => format!("update {name} set v = v || 'x'"),
        20 => format!("update {name} set arr = arr || {salt}, js = js || '{{\"s\": {salt}}}' where k1 = {key}"),
        _ => format!("update {name} set v = 'y{salt}' where k1 = {key}"),
    }
}

/// A random change of one table's shape: columns come, go and change that its rows are not made of.
fn alteration(table: &Table, random: &mut StdRng) -> String {
    let (name, n) = (&table.name, random.random_range(0..1_000_000_000));
    // Which of these columns there are is the server's to say.
    let of_one = |statement: String| {
        format!(
            "do $do$ declare x name;
             begin
                 select attname into x from pg_attribute where attrelid = $name${name}$name$::regclass and attname like 'x\\_%' and not attisdropped
                 order by random() limit 1;
                 if x is not null then execute format($sql${statement}$sql$, x); end if;
             end $do$"
        )
    };
    match random.random_range(0..12) {
        0..3 => format!("alter table {name} add column x_{n} int default {n}"),
        3 => format!("alter table {name} add column x_{n} text"),
        4..6 => of_one(format!("alter table {name} rename column %I to x_{n}")),
        6..8 => of_one(format!("alter table {name} drop column %I")),
        // What it computes is not sent, so that the table is copied anew.
        8 => of_one(format!("alter table {name} alter column %I type text")),
        9 => format!("alter table {name} add column x_{n} uuid default gen_random_uuid()"),
        _ if table.key == Key::None => format!("alter table {name} add column x_{n} bigint default -1"),
        _ => of_one(format!("update {name} set %I = null where k2 %% 3 = {}", n % 3)),
    }
}
