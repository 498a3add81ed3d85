//! What the gateway costs: the same load directly, through pgbouncer (session mode) and through a real `peergate serve`, in one run.
//!
//! Everything runs on this machine: a server, both proxies, and the load. All clients come over TCP; the proxies reach the server over
//! TCP, and in the lines with "Unix" through its socket. The load's database is the catalog, so the gateway looks for its
//! statements in all of it. Repeats come in random order, and a ratio is the median of the ratios within one repeat: what else the
//! machine does then weighs on both. Where the middle half of the ratios has 1 in it, the difference is called noise.
//!
//! `BENCH_SCALE` (default 1) scales the data: 1 is a gigabyte for COPY, a million rows for SELECT and 2 million accounts.
//! `BENCH_SECONDS` (default 1) is how long one pgbench runs, `BENCH_REPEATS` (default 5) how often each load does (COPY
//! three times at most), and `BENCH_ONLY`
//! names loads by a part of their names ("latency" is the last table).

#![allow(clippy::unwrap_used, reason = "what fails here ends the benchmark")]

use std::process::Command;
use std::time::{Duration, Instant};

use catalog::cluster::TestCluster;
use rand::seq::SliceRandom;

mod stage;

use stage::wire::{Session, frame};
use stage::{DATABASE, Link, Proxy, pgbench};

/// No fsync and no checkpoint within a measurement: the server's disk is not what is measured.
const SETTINGS: [(&str, &str); 6] = [
    ("shared_buffers", "512MB"),
    ("max_wal_size", "16GB"),
    ("checkpoint_timeout", "1h"),
    ("autovacuum", "off"),
    ("max_connections", "300"),
    ("log_checkpoints", "off"),
];

/// Round trips of one measurement of latency, and in how many turns they are made.
const ROUND_TRIPS: usize = 500;
const TURNS: usize = 6;

/// One row of the gigabyte: with its id about 250 bytes.
const FILLER_BYTES: usize = 240;

fn main() {
    let number = |name: &str, default: f64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let scale = number("BENCH_SCALE", 1.0);
    let seconds = number("BENCH_SECONDS", 1.0).max(1.0) as u64;
    let repeats = number("BENCH_REPEATS", 5.0).max(1.0) as usize;
    let only = std::env::var("BENCH_ONLY").unwrap_or_default();

    let stage = Stage::start(scale, seconds);
    let mut lines: Vec<Line> =
        loads().into_iter().filter(|(load, _)| load.name().contains(&only)).map(Line::new).collect();
    let mut latencies = "latency".contains(&only).then(|| Latencies::open(&stage));
    let begun = Instant::now();
    let mut random = rand::rng();
    for repeat in 0..repeats {
        let mut order: Vec<usize> = (0..lines.len()).filter(|n| repeat < lines[*n].load.repeats_max()).collect();
        order.shuffle(&mut random);
        for n in order {
            lines[n].repeat(&stage, &mut random);
        }
        if let Some(latencies) = &mut latencies {
            latencies.repeat(&mut random);
        }
    }
    println!("\n{repeats} repeats of {seconds} s, data scaled by {scale}, in {:.0} s\n", begun.elapsed().as_secs_f64());
    if !lines.is_empty() {
        print(&lines);
    }
    if let Some(latencies) = latencies {
        latencies.print();
    }
}

/// The server, the proxies, and what they are measured with.
struct Stage {
    proxies: Vec<Proxy>,
    seconds: u64,
    copy_rows: u64,
    select_rows: u64,
    cluster: TestCluster,
}

/// Whom a load talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Direct,
    Pgbouncer(Link),
    Peergate(Link),
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Target::Direct => "direct",
            Target::Pgbouncer(Link::Tcp) => "pgbouncer",
            Target::Pgbouncer(Link::Unix) => "pgbouncer, Unix",
            Target::Peergate(Link::Tcp) => "peergate",
            Target::Peergate(Link::Unix) => "peergate, Unix",
        }
    }
}

impl Stage {
    fn start(scale: f64, seconds: u64) -> Stage {
        let cluster = TestCluster::start(&SETTINGS).unwrap();
        Session::open(cluster.port(), "postgres").query(&format!("create database {DATABASE}"));
        let tcp = [Proxy::pgbouncer(&cluster, Link::Tcp), Proxy::peergate(&cluster, Link::Tcp)];
        let unix = [Proxy::pgbouncer(&cluster, Link::Unix), Proxy::peergate(&cluster, Link::Unix)];
        let (copy_rows, select_rows) = ((4_000_000.0 * scale) as u64, (1_000_000.0 * scale) as u64);
        let accounts = ((20.0 * scale).ceil() as u64).max(1);
        pgbench(cluster.port(), &["-i", "-q", "-I", "dtgvp", "-s", &accounts.to_string()]);
        let mut session = Session::open(cluster.port(), DATABASE);
        session.query(&format!(
            "create unlogged table rows as select i as id, repeat('x', {FILLER_BYTES}) as filler from generate_series(1, {copy_rows}) i"
        ));
        session.query("create unlogged table copied (id int, filler text)");
        // Read once, so that nobody is the first to; and written, so that no reader has to.
        session.query("vacuum rows");
        session.query("vacuum");
        session.query("checkpoint");
        session.query("select count(*) from rows");
        Stage { proxies: tcp.into_iter().chain(unix).collect(), seconds, copy_rows, select_rows, cluster }
    }

    fn proxy(&self, target: Target) -> Option<&Proxy> {
        match target {
            Target::Direct => None,
            Target::Pgbouncer(Link::Tcp) => Some(&self.proxies[0]),
            Target::Peergate(Link::Tcp) => Some(&self.proxies[1]),
            Target::Pgbouncer(Link::Unix) => Some(&self.proxies[2]),
            Target::Peergate(Link::Unix) => Some(&self.proxies[3]),
        }
    }

    fn port(&self, target: Target) -> u16 {
        self.proxy(target).map_or(self.cluster.port(), |proxy| proxy.port)
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
enum Load {
    Pgbench { mode: &'static str, clients: usize },
    CopyOut,
    CopyIn,
    Select,
}

/// All loads, with how the proxies reach the server.
fn loads() -> Vec<(Load, Link)> {
    let pgbench = |mode| [1, 4, 32].map(|clients| (Load::Pgbench { mode, clients }, Link::Tcp));
    let mut loads: Vec<_> = ["simple", "extended", "prepared"].into_iter().flat_map(pgbench).collect();
    loads.extend([Load::CopyOut, Load::CopyIn, Load::Select].map(|load| (load, Link::Tcp)));
    loads.extend(["simple", "prepared"].map(|mode| (Load::Pgbench { mode, clients: 4 }, Link::Unix)));
    loads
}

/// What one run came to.
struct Run {
    /// Transactions, rows or bytes.
    units: f64,
    took: Duration,
}

impl Load {
    fn name(self) -> String {
        match self {
            Load::Pgbench { mode, clients } => {
                format!("{mode}, {clients} {}", if clients == 1 { "client" } else { "clients" })
            }
            Load::CopyOut => "COPY out, MB/s".to_owned(),
            Load::CopyIn => "COPY in, MB/s".to_owned(),
            Load::Select => "SELECT, 1000 rows/s".to_owned(),
        }
    }

    /// A gigabyte takes long, and differs less from time to time.
    fn repeats_max(self) -> usize {
        if matches!(self, Load::CopyOut | Load::CopyIn) { 3 } else { usize::MAX }
    }

    fn run(self, stage: &Stage, target: Target) -> Run {
        let port = stage.port(target);
        match self {
            Load::Pgbench { mode, clients } => run_pgbench(port, mode, clients, stage.seconds),
            Load::CopyOut => {
                let mut session = Session::open(port, DATABASE);
                let begun = Instant::now();
                let answer = session.query("copy rows to stdout");
                assert_eq!(answer.rows, stage.copy_rows);
                Run { units: answer.bytes as f64 / 1e6, took: begun.elapsed() }
            }
            Load::CopyIn => {
                Session::open(stage.cluster.port(), DATABASE).query("truncate copied");
                copy_in(&mut Session::open(port, DATABASE), stage.copy_rows)
            }
            Load::Select => {
                let mut session = Session::open(port, DATABASE);
                let begun = Instant::now();
                let answer = session.query(&format!("select * from pgbench_accounts limit {}", stage.select_rows));
                assert_eq!(answer.rows, stage.select_rows);
                Run { units: answer.rows as f64 / 1e3, took: begun.elapsed() }
            }
        }
    }
}

fn run_pgbench(port: u16, mode: &str, clients: usize, seconds: u64) -> Run {
    let (threads, clients, seconds) = (clients.min(2).to_string(), clients.to_string(), seconds.to_string());
    let arguments = ["-n", "-S", "-M", mode, "-c", &clients, "-j", &threads, "-T", &seconds];
    let printed = pgbench(port, &arguments);
    let number = |before: &str| -> f64 {
        let line = printed.lines().find_map(|line| line.strip_prefix(before)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let transactions = number("number of transactions actually processed: ");
    // Logging in is not in it.
    Run { units: transactions, took: Duration::from_secs_f64(transactions / number("tps = ")) }
}

/// Copies rows in, in messages of about 8 kB as psql sends them.
fn copy_in(session: &mut Session, rows: u64) -> Run {
    let row = format!("1\t{}\n", "x".repeat(FILLER_BYTES));
    let rows_per_message = 8192 / row.len() as u64;
    let message = frame(b'd', row.repeat(rows_per_message as usize).as_bytes());
    let messages_per_write = 8;
    let write = message.repeat(messages_per_write as usize);
    let begun = Instant::now();
    session.send(&frame(b'Q', b"copy copied from stdin\0"));
    session.until(b'G');
    let writes = rows / (rows_per_message * messages_per_write);
    for _ in 0..writes {
        session.send(&write);
    }
    session.send(&frame(b'c', b""));
    session.finish();
    Run { units: (writes * write.len() as u64) as f64 / 1e6, took: begun.elapsed() }
}

/// What was measured of one target under one load.
#[derive(Default)]
struct Series {
    rates: Vec<f64>,
    units: f64,
    cpu: Duration,
}

/// One load, on everybody.
struct Line {
    load: Load,
    link: Link,
    /// Direct, pgbouncer, peergate.
    series: [Series; 3],
}

impl Line {
    fn new((load, link): (Load, Link)) -> Line {
        Line { load, link, series: Default::default() }
    }

    fn targets(&self) -> [Target; 3] {
        [Target::Direct, Target::Pgbouncer(self.link), Target::Peergate(self.link)]
    }

    fn repeat(&mut self, stage: &Stage, random: &mut impl rand::Rng) {
        let mut order = [0, 1, 2];
        order.shuffle(random);
        for n in order {
            let target = self.targets()[n];
            let cpu = || stage.proxy(target).map(Proxy::cpu).unwrap_or_default();
            let before = cpu();
            let run = self.load.run(stage, target);
            let series = &mut self.series[n];
            series.cpu += cpu() - before;
            series.units += run.units;
            series.rates.push(run.units / run.took.as_secs_f64());
        }
    }

    /// The ratios of peergate's rates to another's, sorted.
    fn ratios(&self, other: usize) -> Vec<f64> {
        sorted(self.series[2].rates.iter().zip(&self.series[other].rates).map(|(ours, theirs)| ours / theirs))
    }
}

/// Where the client, the proxy and the server's process run while round trips are measured.
#[derive(Clone, Copy, Debug)]
enum Placement {
    /// Where the system puts them, which is now one core and now two, and waking another core is dear.
    Free,
    /// All on one core: what the work itself takes, and the same each time.
    OneCore,
}

/// A session that stays and asks one question at a time.
struct Asker {
    target: Target,
    session: Session,
    /// All processes on the way, the server's own for this session included.
    pids: Vec<u32>,
    /// Each repeat's median and 99th percentile in µs, by placement.
    p50: [Vec<f64>; 2],
    p99: [Vec<f64>; 2],
}

/// The time of a round trip, to everybody.
struct Latencies {
    askers: Vec<Asker>,
    /// All cores, as taskset writes them.
    cores: String,
}

impl Latencies {
    fn open(stage: &Stage) -> Latencies {
        let links = [Link::Tcp, Link::Unix];
        let targets = [Target::Direct].into_iter();
        let targets = targets.chain(links.map(Target::Pgbouncer)).chain(links.map(Target::Peergate));
        let open = |target| {
            let mut session = Session::open(stage.port(target), DATABASE);
            let backend = session.value("select pg_backend_pid()").parse().unwrap();
            let pids = stage.proxy(target).map(Proxy::pid).into_iter().chain([backend, std::process::id()]).collect();
            session.send(&[frame(b'P', b"s\0select 1\0\0\0"), frame(b'S', b"")].concat());
            session.finish();
            Asker { target, session, pids, p50: Default::default(), p99: Default::default() }
        };
        let cores = format!("0-{}", std::thread::available_parallelism().unwrap().get() - 1);
        Latencies { askers: targets.map(open).collect(), cores }
    }

    fn repeat(&mut self, random: &mut impl rand::Rng) {
        for placement in [Placement::Free, Placement::OneCore] {
            self.place(placement);
            self.ask(placement, random);
        }
        self.place(Placement::Free);
    }

    /// Places all processes on the way.
    fn place(&self, placement: Placement) {
        let cores = match placement {
            Placement::Free => self.cores.as_str(),
            Placement::OneCore => "0",
        };
        for pid in self.askers.iter().flat_map(|asker| &asker.pids) {
            let output = Command::new("taskset").args(["-acp", cores, &pid.to_string()]).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
    }

    /// Everybody gets several short turns: what else the machine does changes within a second.
    fn ask(&mut self, placement: Placement, random: &mut impl rand::Rng) {
        let ask = [frame(b'B', b"\0s\0\0\0\0\0\0\0"), frame(b'E', b"\0\0\0\0\0"), frame(b'S', b"")].concat();
        let mut seen = vec![Vec::new(); self.askers.len()];
        let mut order: Vec<usize> = (0..self.askers.len()).collect();
        for _ in 0..TURNS {
            order.shuffle(random);
            for n in &order {
                let session = &mut self.askers[*n].session;
                for _ in 0..ROUND_TRIPS {
                    let begun = Instant::now();
                    session.send(&ask);
                    session.finish();
                    seen[*n].push(begun.elapsed().as_secs_f64() * 1e6);
                }
            }
        }
        for (asker, seen) in self.askers.iter_mut().zip(seen) {
            let seen = sorted(seen);
            asker.p50[placement as usize].push(quantile(&seen, 0.5));
            asker.p99[placement as usize].push(quantile(&seen, 0.99));
        }
    }

    fn print(&self) {
        println!("\nOne client, prepared `select 1`: round trips in µs (medians of the repeats' quantiles)\n");
        println!("| target | p50 | p99 | added p50 | from … to | one core: p50 | p99 | added p50 | from … to |");
        println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
        for asker in &self.askers {
            print!("| {} |", asker.target.name());
            for placement in [Placement::Free, Placement::OneCore].map(|p| p as usize) {
                let (p50, direct) = (&asker.p50[placement], &self.askers[0].p50[placement]);
                let added = sorted(p50.iter().zip(direct).map(|(through, direct)| through - direct));
                let (from, to) = (added[0], added[added.len() - 1]);
                let (p50, p99) = (median(p50), median(&asker.p99[placement]));
                print!(" {p50:.1} | {p99:.1} | {:.1} | {from:.1} … {to:.1} |", quantile(&added, 0.5));
            }
            println!();
        }
    }
}

fn print(lines: &[Line]) {
    println!(
        "| load | direct | pgbouncer | peergate | of direct | of pgbouncer | middle half | CPU pgbouncer | CPU peergate | ratio |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for line in lines {
        let [direct, pgbouncer, peergate] = &line.series;
        let ratios = line.ratios(1);
        let (low, high) = (quantile(&ratios, 0.25), quantile(&ratios, 0.75));
        let noise = if low <= 1.0 && high >= 1.0 { ", noise" } else { "" };
        // Microseconds per transaction; elsewhere milliseconds per megabyte or thousand rows.
        let (unit, factor) = if matches!(line.load, Load::Pgbench { .. }) { ("µs", 1e6) } else { ("ms", 1e3) };
        let cpu = |series: &Series| series.cpu.as_secs_f64() * factor / series.units;
        println!(
            "| {}{} | {:.0} | {:.0} | {:.0} | {:.2} | {:.2} | {low:.2} … {high:.2}{noise} | {:.2} {unit} | {:.2} {unit} | {:.2} |",
            line.load.name(),
            if line.link == Link::Unix { ", Unix" } else { "" },
            median(&direct.rates),
            median(&pgbouncer.rates),
            median(&peergate.rates),
            quantile(&line.ratios(0), 0.5),
            quantile(&ratios, 0.5),
            cpu(pgbouncer),
            cpu(peergate),
            cpu(peergate) / cpu(pgbouncer),
        );
    }
}

fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(values: &[f64]) -> f64 {
    quantile(&sorted(values.iter().copied()), 0.5)
}

/// Between two values of a sorted list, as far along as `part` says.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let at = (sorted.len() - 1) as f64 * part;
    let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    below + (above - below) * at.fract()
}
