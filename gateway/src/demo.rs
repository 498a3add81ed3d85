//! `peergate demo`: the whole of it at work on sample servers of its own, told so that a newcomer learns by watching.
//!
//! It is a user of Peergate like any other: it starts `peergate serve` as a process of its own and gives it statements by
//! psql. It knows nothing of gateway and engine. What it starts, and where, is in `demo/stage.rs`; how the two sides are
//! compared in `demo/compare.rs`.

use std::io;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

mod compare;
mod stage;

use crate::config::DemoArguments;
use compare::TableComparison;
use stage::{Output, Stage};

/// The mirror's name.
const MIRROR: &str = "shop_to_dwh";

/// How much longer than asked the load may take, on a slow machine, before the demo gives up.
const LOAD_GRACE: Duration = Duration::from_secs(120);

/// What makes a demo fail.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A sample server cannot be run.
    #[error("cannot run a sample server")]
    Cluster(#[from] catalog::cluster::Error),
    /// A sample server refused a statement.
    #[error("a sample server refused a statement")]
    Sql(#[from] tokio_postgres::Error),
    /// A program could not be run, or a file not be written.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed ({status})\n{output}")]
    Program {
        /// Its name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// What it printed.
        output: String,
    },
    /// `peergate serve` is not ready in time, or has ended.
    #[error("peergate serve is not ready; its log ends with\n{log}")]
    NotReady {
        /// The end of its log.
        log: String,
    },
    /// The mirror needs a person.
    #[error("the mirror is {state}: {message}")]
    Stuck {
        /// Its state.
        state: String,
        /// Why.
        message: String,
    },
    /// Something that DROP MIRROR should have removed is still there.
    #[error("after DROP MIRROR there is still {0}")]
    LeftBehind(String),
    /// The two sides are not the same.
    #[error("the two sides differ")]
    Different,
    /// Ctrl-C, or a signal to end.
    #[error("interrupted; everything that was started is stopped")]
    Interrupted,
}

/// Runs the demo, prints it, and stops and removes all that it made.
///
/// # Errors
/// [`DemoError`]; [`DemoError::Different`] if the comparison is not equal. Nothing is left behind then either.
pub async fn run(arguments: DemoArguments) -> Result<(), DemoError> {
    tokio::select! {
        result = play(arguments) => result,
        () = interrupted() => Err(DemoError::Interrupted),
    }
}

async fn interrupted() {
    let wait = async |kind| match signal(kind) {
        Ok(mut signal) => drop(signal.recv().await),
        Err(_) => std::future::pending().await,
    };
    tokio::select! {
        () = wait(SignalKind::interrupt()) => {}
        () = wait(SignalKind::terminate()) => {}
        () = wait(SignalKind::hangup()) => {}
    }
}

/// What the summary tells.
#[derive(Default)]
struct Story {
    setting_up: Duration,
    loading: Duration,
    copy: Option<Duration>,
    copied: String,
    last: Progress,
    lag_max_bytes: u64,
    lag_max_seconds: f64,
    catching_up: Duration,
    transactions: u64,
    rounds: u64,
    load: Duration,
}

async fn play(arguments: DemoArguments) -> Result<(), DemoError> {
    let out = Output::new();
    let seconds = arguments.seconds.max(1);
    let mut story = Story::default();

    out.title("Peergate demo: a live Postgres database, mirrored to another one by two kinds of SQL statement");
    out.heading("Two sample servers, \"shop\" and \"dwh\", and Peergate");
    let started = Instant::now();
    let mut stage = Stage::set(&out, arguments.log).await?;
    story.setting_up = started.elapsed();

    out.heading("Sample data in the database shop");
    let started = Instant::now();
    stage.load_sample_data(arguments.scale, &out).await?;
    story.loading = started.elapsed();

    out.heading(&format!("{seconds} s of load on shop, beginning now: the mirror is made while the data changes"));
    stage.start_load(seconds, &out)?;

    out.heading("You tell Peergate what you want, in SQL, with psql or any Postgres driver");
    out.say(&format!("$ {}", stage.psql_line()));
    let (shop, dwh, password) = (stage.shop.conninfo().port, stage.dwh.conninfo().port, stage::SAMPLE_PASSWORD);
    let peer = |name: &str, port: u16| {
        format!(
            "CREATE PEER {name} FROM POSTGRES WITH\n    (host = '127.0.0.1', port = {port}, user = 'postgres', password = '{password}', database = '{name}');"
        )
    };
    stage.show(&out, &peer("shop", shop)).await?;
    stage.show(&out, &peer("dwh", dwh)).await?;
    stage
        .show(
            &out,
            "SELECT name, type, options FROM peers;   -- the catalog is plain SQL; the passwords are sealed elsewhere",
        )
        .await?;
    let created = Instant::now();
    stage.show(&out, &format!("CREATE MIRROR {MIRROR} FROM shop TO dwh FOR ALL TABLES;")).await?;
    stage.show(&out, "SHOW MIRRORS;").await?;

    out.heading("Copying what is there, then streaming what changes");
    out.prompt(&format!("{} \\watch", Progress::sql()));
    watch(&mut stage, &out, &mut story, created, seconds).await?;
    (story.transactions, story.rounds, story.load) = stage.end_load().await?;
    out.say(&format!(
        "  The load has ended: {} pgbench transactions, {} rounds on the odd tables.",
        group(story.transactions),
        group(story.rounds)
    ));

    out.heading("Waiting until dwh has all that shop had committed");
    let waited = Instant::now();
    stage.show(&out, &format!("WAIT FOR MIRROR {MIRROR} TIMEOUT '10 min';")).await?;
    story.catching_up = waited.elapsed();
    story.note(Progress::read(&stage).await?, created);
    stage
        .show(
            &out,
            &format!(
                "SELECT source_name, state, rows_copied, rows_inserted, rows_updated, rows_deleted, truncates\n    FROM mirror_tables WHERE mirror = '{MIRROR}' ORDER BY source_schema, source_name;"
            ),
        )
        .await?;

    out.heading("Comparing every row of every table on both sides");
    let comparison = compare::compare(&stage.shop_config(), &stage.dwh_config()).await?;
    compare::print(&out, &comparison);

    out.heading("Taking it down: nothing stays behind on either server");
    stage.show(&out, &format!("DROP MIRROR {MIRROR};")).await?;
    let left = compare::wait_until_clean(&stage.shop_config(), &stage.dwh_config(), Duration::from_secs(60)).await?;
    stage.show(&out, "SHOW TASKS;").await?;
    if left.is_none() {
        stage.show(&out, "DROP PEER shop, dwh;").await?;
        out.say("  No slot and no publication is left on shop, and no progress on dwh.");
    }
    drop(stage);

    story.tell(&out, &comparison, left.as_deref());
    match left {
        Some(left) => Err(DemoError::LeftBehind(left)),
        None if comparison.iter().all(TableComparison::is_equal) => Ok(()),
        None => Err(DemoError::Different),
    }
}

/// Prints how the mirror gets on until the load is over.
async fn watch(
    stage: &mut Stage,
    out: &Output,
    story: &mut Story,
    created: Instant,
    seconds: u64,
) -> Result<(), DemoError> {
    let every = Duration::from_secs((seconds / 30).clamp(1, 10));
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    while stage.load_runs() {
        ticks.tick().await;
        if stage.load_elapsed() > Duration::from_secs(seconds) + LOAD_GRACE {
            let message = "the load on shop does not come to its end: something holds its transactions up".to_owned();
            return Err(DemoError::Stuck { state: story.last.state.clone(), message });
        }
        let progress = Progress::read(stage).await?;
        out.say(&format!("  {:>3} s  {}", stage.load_elapsed().as_secs(), progress.line()));
        story.note(progress, created);
    }
    Ok(())
}

/// One row of `mirror_status`.
#[derive(Clone, Debug, Default)]
struct Progress {
    state: String,
    copied_at: String,
    copy_fraction: f64,
    rows_copied: u64,
    rows_applied: u64,
    transactions_applied: u64,
    lag_bytes: u64,
    lag_seconds: f64,
    error: String,
}

impl Progress {
    fn sql() -> String {
        format!(
            "SELECT state, copied_at, copy_fraction, rows_copied, rows_applied, transactions_applied, lag_bytes, lag_seconds, error_message\n    FROM mirror_status WHERE mirror = '{MIRROR}';"
        )
    }

    async fn read(stage: &Stage) -> Result<Self, DemoError> {
        let row = stage.ask(&Self::sql()).await?;
        let fields: Vec<&str> = row.splitn(9, '\x1f').map(str::trim_end).collect();
        let field = |n: usize| fields.get(n).copied().unwrap_or_default();
        let progress = Self {
            state: field(0).to_owned(),
            copied_at: field(1).to_owned(),
            copy_fraction: field(2).parse().unwrap_or_default(),
            rows_copied: field(3).parse().unwrap_or_default(),
            rows_applied: field(4).parse().unwrap_or_default(),
            transactions_applied: field(5).parse().unwrap_or_default(),
            lag_bytes: field(6).parse().unwrap_or_default(),
            lag_seconds: field(7).parse().unwrap_or_default(),
            error: field(8).to_owned(),
        };
        match progress.state.as_str() {
            "blocked" | "resync_required" => Err(DemoError::Stuck { state: progress.state, message: progress.error }),
            _ => Ok(progress),
        }
    }

    fn is_copied(&self) -> bool {
        !self.copied_at.is_empty()
    }

    fn line(&self) -> String {
        let mut line = format!("{:<10}", self.state);
        if self.is_copied() {
            line.push_str(&format!(
                "  {:>11} rows copied  {:>11} changes applied  lag {:>9}, {:.1} s",
                group(self.rows_copied),
                group(self.rows_applied),
                size(self.lag_bytes),
                self.lag_seconds
            ));
        } else {
            let filled = (self.copy_fraction.clamp(0.0, 1.0) * 20.0) as usize;
            line.push_str(&format!(
                "  {:>11} rows copied  [{}{}] {:.0} %",
                group(self.rows_copied),
                "█".repeat(filled),
                "·".repeat(20 - filled),
                self.copy_fraction * 100.0
            ));
        }
        if !self.error.is_empty() {
            line.push_str(&format!("  {}", self.error));
        }
        line
    }
}

impl Story {
    fn note(&mut self, progress: Progress, created: Instant) {
        if progress.is_copied() {
            if self.copy.is_none() {
                self.copy = Some(created.elapsed());
                self.copied = group(progress.rows_copied);
            } else {
                // The first look after the copy sees the changes that piled up during it; they are no lag of streaming.
                self.lag_max_bytes = self.lag_max_bytes.max(progress.lag_bytes);
                self.lag_max_seconds = self.lag_max_seconds.max(progress.lag_seconds);
            }
        }
        self.last = progress;
    }

    fn tell(&self, out: &Output, comparison: &[TableComparison], left: Option<&str>) {
        let equal = comparison.iter().filter(|table| table.is_equal()).count();
        let rows: i64 = comparison.iter().map(TableComparison::source_rows).sum();
        out.heading("Summary");
        let line = |what: &str, value: String| out.say(&format!("  {what:<26} {value}"));
        line("servers started in", format!("{:.1} s", self.setting_up.as_secs_f64()));
        line("sample data made in", format!("{:.1} s", self.loading.as_secs_f64()));
        let load = self.load.as_secs_f64().max(0.001);
        line(
            "load",
            format!(
                "{:.0} s, {} transactions and {} rounds on odd tables ({:.0} transactions/s)",
                load,
                group(self.transactions),
                group(self.rounds),
                self.transactions as f64 / load
            ),
        );
        if let Some(copy) = self.copy {
            let rate = self.last.rows_copied as f64 / copy.as_secs_f64().max(0.001);
            line(
                "copied",
                format!(
                    "{} rows in {:.1} s, under load ({} rows/s)",
                    self.copied,
                    copy.as_secs_f64(),
                    group(rate as u64)
                ),
            );
        }
        line(
            "streamed",
            format!(
                "{} row changes in {} transactions",
                group(self.last.rows_applied),
                group(self.last.transactions_applied)
            ),
        );
        line("largest lag seen", format!("{}, {:.1} s", size(self.lag_max_bytes), self.lag_max_seconds));
        line("caught up after the load", format!("in {:.1} s", self.catching_up.as_secs_f64()));
        line(
            "compared",
            format!("{equal} of {} tables are equal, {} rows", comparison.len(), group(rows.max(0) as u64)),
        );
        line("left on the servers", left.unwrap_or("nothing").to_owned());
        out.verdict(equal == comparison.len() && left.is_none());
    }
}

/// 1234567 as `1,234,567`.
fn group(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// 1536 as `1.5 kB`.
fn size(bytes: u64) -> String {
    match bytes {
        0..1_024 => format!("{bytes} B"),
        1_024..1_048_576 => format!("{:.1} kB", bytes as f64 / 1_024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GB", bytes as f64 / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(group), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([0, 1_536, 5 << 20, 3 << 30].map(size), ["0 B", "1.5 kB", "5.0 MB", "3.0 GB"]);
    }
}
