//! What the demo runs on: a temporary folder, two sample servers, a `peergate serve`, the load; and how it prints.
//!
//! All of it is stopped and removed when [`Stage`] is dropped, however the demo ends.

use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead, BufReader, IsTerminal, Write};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use catalog::cluster::{Binaries, Cluster, ClusterOptions, Listen, end_with_parent, free_port};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_postgres::{Config, NoTls};

use super::DemoError;

/// The password of the sample servers.
pub(super) const SAMPLE_PASSWORD: &str = "s3cret";

const ODD_TABLES: &str = include_str!("odd.sql");
const ODD_LOAD: &str = include_str!("load.sql");

/// Transactions a second that pgbench is held to, so that there is something left of a small machine for the mirror.
const LOAD_RATE: u32 = 300;

/// Pause between two rounds on the odd tables.
const ROUND: Duration = Duration::from_millis(100);

/// Prints, in colour on a terminal.
pub(super) struct Output {
    colour: bool,
}

impl Output {
    pub(super) fn new() -> Self {
        Self { colour: io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Prints a line. A reader that has gone away (`| head`) is no reason to stop.
    pub(super) fn say(&self, line: &str) {
        let _ = writeln!(io::stdout(), "{line}");
    }

    pub(super) fn title(&self, text: &str) {
        self.say(&self.paint("1", text));
    }

    pub(super) fn heading(&self, text: &str) {
        self.say(&format!("\n{}", self.paint("1;36", &format!("── {text}"))));
    }

    /// Prints a statement as psql shows one that is typed.
    pub(super) fn prompt(&self, statement: &str) {
        for (n, line) in statement.lines().enumerate() {
            let prompt = if n == 0 { "peergate=# " } else { "peergate-# " };
            self.say(&format!("{}{}", self.paint("2", prompt), self.paint("1", line)));
        }
    }

    pub(super) fn mark(&self, line: &str, good: bool) {
        let mark = if good { self.paint("32", "✓ equal") } else { self.paint("1;31", "✗ DIFFERENT") };
        self.say(&format!("{line}  {mark}"));
    }

    pub(super) fn verdict(&self, good: bool) {
        let text = if good {
            self.paint("1;32", "\n✓ Both sides are equal.")
        } else {
            self.paint("1;31", "\n✗ The demo has failed.")
        };
        self.say(&text);
    }
}

/// All that the demo has started. The fields are dropped in this order: users before what they use, the folder last.
pub(super) struct Stage {
    load: Option<Load>,
    server: Server,
    pub(super) shop: Cluster,
    pub(super) dwh: Cluster,
    psql: PathBuf,
    _directory: TemporaryDir,
}

impl Stage {
    /// Starts the sample servers and `peergate serve`, which logs to `log`, by default into the folder.
    pub(super) async fn set(out: &Output, log: Option<PathBuf>) -> Result<Self, DemoError> {
        let binaries = Binaries::find(None)?;
        let psql = binaries.tool("psql")?;
        let directory = TemporaryDir::create()?;
        out.say(&format!("  Everything is in {} and is removed at the end.", directory.0.display()));
        let (shop, dwh) = tokio::try_join!(
            sample_server(&binaries, &directory.0, "shop"),
            sample_server(&binaries, &directory.0, "dwh")
        )?;
        for (name, server) in [("shop", &shop), ("dwh", &dwh)] {
            run_sql(&sample_config(server, "postgres"), &format!("create database {name}")).await?;
            out.say(&format!(
                "  PostgreSQL {} with database {name} on port {}",
                binaries.major(),
                server.conninfo().port
            ));
        }
        let server = Server::start(&directory.0, log.unwrap_or_else(|| directory.0.join("peergate.log"))).await?;
        out.say(&format!("  $ peergate serve --data-dir {} --listen {}", server.data_dir.display(), server.address));
        Ok(Self { load: None, server, shop, dwh, psql, _directory: directory })
    }

    pub(super) fn shop_config(&self) -> Config {
        sample_config(&self.shop, "shop")
    }

    pub(super) fn dwh_config(&self) -> Config {
        sample_config(&self.dwh, "dwh")
    }

    /// The command that a user would type to connect.
    pub(super) fn psql_line(&self) -> String {
        let (host, port) = self.server.host_and_port();
        format!("psql \"host={host} port={port} user=peergate dbname=peergate\"")
    }

    /// Fills the database shop: pgbench's tables, and the odd ones.
    pub(super) async fn load_sample_data(&self, scale: u32, out: &Output) -> Result<(), DemoError> {
        out.say(&format!(
            "  $ pgbench --initialize --scale {scale} shop      # and a schema \"odd\" with awkward rows"
        ));
        let mut pgbench = self.pgbench()?;
        pgbench.args(["--initialize", "--quiet", "--scale", &scale.to_string(), "shop"]);
        let shop = self.shop_config();
        let (made, odd) = tokio::join!(output_of(pgbench, "pgbench"), run_sql(&shop, ODD_TABLES));
        made?;
        odd?;
        run_sql(&shop, "analyze").await
    }

    /// Starts pgbench and the rounds on the odd tables, for that many seconds.
    pub(super) fn start_load(&mut self, seconds: u64, out: &Output) -> Result<(), DemoError> {
        out.say(&format!("  $ pgbench --client 4 --rate {LOAD_RATE} --time {seconds} shop      # and ten rounds a second on the odd tables"));
        let mut pgbench = self.pgbench()?;
        pgbench.args([
            "--no-vacuum",
            "--client",
            "4",
            "--rate",
            &LOAD_RATE.to_string(),
            "--time",
            &seconds.to_string(),
            "shop",
        ]);
        let pgbench = tokio::spawn(async move { output_of(pgbench, "pgbench").await });
        let rounds = Arc::new(AtomicU64::new(0));
        let until = Instant::now() + Duration::from_secs(seconds);
        let odd = tokio::spawn(run_rounds(self.shop_config(), until, Arc::clone(&rounds)));
        self.load = Some(Load { pgbench, odd, rounds, started: Instant::now() });
        Ok(())
    }

    /// Whether the load is still on.
    pub(super) fn load_runs(&self) -> bool {
        self.load.as_ref().is_some_and(|load| !load.pgbench.is_finished() || !load.odd.is_finished())
    }

    pub(super) fn load_elapsed(&self) -> Duration {
        self.load.as_ref().map(|load| load.started.elapsed()).unwrap_or_default()
    }

    /// Waits for the end of the load and gives pgbench's transactions, the rounds on the odd tables, and the time it took.
    pub(super) async fn end_load(&mut self) -> Result<(u64, u64, Duration), DemoError> {
        let Some(mut load) = self.load.take() else { return Ok((0, 0, Duration::ZERO)) };
        let failed = |error| DemoError::Io { action: "wait for the load".to_owned(), source: io::Error::other(error) };
        let printed = (&mut load.pgbench).await.map_err(failed)??;
        (&mut load.odd).await.map_err(failed)??;
        let transactions =
            printed.lines().find_map(|line| line.strip_prefix("number of transactions actually processed: "));
        let transactions =
            transactions.and_then(|count| count.split('/').next()?.trim().parse().ok()).unwrap_or_default();
        Ok((transactions, load.rounds.load(Ordering::Relaxed), load.started.elapsed()))
    }

    /// Prints a statement, has psql run it through the gateway, and prints what psql prints.
    pub(super) async fn show(&self, out: &Output, statement: &str) -> Result<(), DemoError> {
        out.prompt(statement);
        let mut psql = self.psql();
        psql.args(["-P", "pager=off", "-c", statement]);
        let printed = output_of(psql, "psql").await?;
        out.say(printed.trim_end());
        Ok(())
    }

    /// Has psql run a query through the gateway and gives its one row, fields separated by U+001F.
    pub(super) async fn ask(&self, query: &str) -> Result<String, DemoError> {
        let mut psql = self.psql();
        psql.args(["-q", "-A", "-t", "-F", "\x1f", "-c", query]);
        output_of(psql, "psql").await
    }

    fn psql(&self) -> tokio::process::Command {
        let (host, port) = self.server.host_and_port();
        let mut psql = client_program(&self.psql, host, port, "peergate", &self.server.password);
        psql.env("PGDATABASE", "peergate").args(["-X", "-v", "ON_ERROR_STOP=1"]);
        psql
    }

    fn pgbench(&self) -> Result<tokio::process::Command, DemoError> {
        let port = self.shop.conninfo().port.to_string();
        Ok(client_program(&self.shop.binaries().tool("pgbench")?, "127.0.0.1", &port, "postgres", SAMPLE_PASSWORD))
    }
}

/// A client program, without what the user's environment says about other servers.
fn client_program(program: &Path, host: &str, port: &str, user: &str, password: &str) -> tokio::process::Command {
    let mut command = tokio::process::Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        command.env_remove(name);
    }
    command
        .env("PGHOST", host)
        .env("PGPORT", port)
        .env("PGUSER", user)
        .env("PGPASSWORD", password)
        .env("PGCLIENTENCODING", "UTF8");
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs a program to its end and gives what it printed, errors and notices first.
async fn output_of(mut command: tokio::process::Command, program: &str) -> Result<String, DemoError> {
    let output = command.output().await.map_err(|source| DemoError::Io { action: format!("run {program}"), source })?;
    let printed = format!("{}{}", String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    if output.status.success() {
        Ok(printed)
    } else {
        Err(DemoError::Program {
            program: program.to_owned(),
            status: output.status,
            output: printed.trim_end().to_owned(),
        })
    }
}

async fn run_sql(config: &Config, sql: &str) -> Result<(), DemoError> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client.batch_execute(sql).await?)
}

async fn run_rounds(config: Config, until: Instant, rounds: Arc<AtomicU64>) -> Result<(), DemoError> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    let mut ticks = tokio::time::interval(ROUND);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while Instant::now() < until {
        ticks.tick().await;
        client.batch_execute(ODD_LOAD).await?;
        rounds.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// The running load; ended when dropped.
struct Load {
    pgbench: JoinHandle<Result<String, DemoError>>,
    odd: JoinHandle<Result<(), DemoError>>,
    rounds: Arc<AtomicU64>,
    started: Instant,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.pgbench.abort();
        self.odd.abort();
    }
}

async fn sample_server(binaries: &Binaries, directory: &Path, name: &str) -> Result<Cluster, DemoError> {
    let mut options = ClusterOptions::new(directory.join(name), "postgres");
    options.socket_dir = Some(directory.join(format!("{name}.run")));
    options.password = Some(SAMPLE_PASSWORD.to_owned());
    options.settings = [("wal_level", "logical"), ("max_wal_size", "2GB")]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec();
    options.durable = false;
    options.listen = Listen::Loopback { port: free_port()? };
    let binaries = binaries.clone();
    let started = tokio::task::spawn_blocking(move || {
        Cluster::init(&binaries, &options)?;
        Cluster::start(&binaries, options)
    });
    match started.await {
        Ok(cluster) => Ok(cluster?),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn sample_config(server: &Cluster, database: &str) -> Config {
    let mut config = server.conninfo().config(database);
    config.password(SAMPLE_PASSWORD);
    config
}

/// A `peergate serve` of our own executable; told to stop, and waited for, when dropped.
struct Server {
    child: Child,
    address: String,
    data_dir: PathBuf,
    password: String,
}

impl Server {
    async fn start(directory: &Path, log: PathBuf) -> Result<Self, DemoError> {
        let failed = |action: &str| {
            let action = action.to_owned();
            move |source| DemoError::Io { action, source }
        };
        let data_dir = directory.join("peergate");
        let executable = std::env::current_exe().map_err(failed("find the executable"))?;
        let mut command = Command::new(executable);
        command.args(["serve", "--listen", "127.0.0.1:0", "--data-dir"]).arg(&data_dir);
        for name in [
            "PEERGATE_LISTEN",
            "PEERGATE_DATA_DIR",
            "PEERGATE_CATALOG",
            "PEERGATE_ROLE",
            "PEERGATE_TLS_CERT",
            "PEERGATE_TLS_KEY",
            "PEERGATE_CONFIG",
            "PEERGATE_PASSWORD",
            "PEERGATE_KEY",
        ] {
            command.env_remove(name);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command.stderr(File::create(&log).map_err(failed("write the log of peergate serve"))?);
        // Ctrl-C in the terminal is for the demo, which then stops the server when its turn has come.
        command.process_group(0);
        // The demo runs on the main thread to its end.
        end_with_parent(&mut command);
        let mut child = command.spawn().map_err(failed("run peergate serve"))?;
        let output = child.stdout.take().map(BufReader::new);
        let mut server = Self { child, address: String::new(), data_dir, password: String::new() };
        let (sender, receiver) = oneshot::channel();
        thread::spawn(move || {
            let mut sender = Some(sender);
            for line in output.into_iter().flat_map(BufRead::lines).map_while(Result::ok) {
                if let Some(address) = line.strip_prefix("peergate is ready on ") {
                    let _ = sender.take().map(|sender| sender.send(address.to_owned()));
                }
            }
        });
        match tokio::time::timeout(Duration::from_secs(120), receiver).await {
            Ok(Ok(address)) => server.address = address,
            _ => return Err(DemoError::NotReady { log: tail(&log) }),
        }
        let password = server.data_dir.join("password");
        server.password = fs::read_to_string(password).map_err(failed("read the password"))?.trim_end().to_owned();
        Ok(server)
    }

    fn host_and_port(&self) -> (&str, &str) {
        self.address.rsplit_once(':').unwrap_or((&self.address, "9900"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        let deadline = Instant::now() + Duration::from_secs(30);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// The demo's folder, removed when dropped.
struct TemporaryDir(PathBuf);

impl TemporaryDir {
    fn create() -> Result<Self, DemoError> {
        let path = std::env::temp_dir().join(format!("peergate-demo-{:08x}", rand::random::<u32>()));
        // As root the servers run as somebody else, who has to pass through; the folders within are private.
        let made = DirBuilder::new().mode(0o711).create(&path);
        made.map_err(|source| DemoError::Io { action: format!("make {}", path.display()), source })?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
