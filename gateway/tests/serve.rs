//! What the binary promises: one process per directory, a clean end, a start after any end, and a catalog that is somebody else's.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use catalog::cluster::TestCluster;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio_postgres::{Config, NoTls};

use crate::stage::Stage;

/// A data directory, removed when dropped.
pub(crate) struct Place(pub(crate) PathBuf);

impl Place {
    pub(crate) fn new() -> Self {
        Self(std::env::temp_dir().join(format!("peergate-serve-{:016x}", rand::random::<u64>())))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn peergate() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_peergate"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PEERGATE_") && !name.to_string_lossy().starts_with("PEERGATE_PG_BIN") {
            command.env_remove(name);
        }
    }
    command
}

/// A running `peergate serve`; stopped when dropped.
pub(crate) struct Server {
    pub(crate) child: Child,
    /// What it printed until it was ready, and the next two lines.
    pub(crate) printed: Vec<String>,
    /// Its log so far.
    log: Arc<Mutex<String>>,
    /// Collects the log, so that a full pipe never holds it up.
    reading: Option<JoinHandle<()>>,
}

impl Server {
    fn spawn(data_dir: &Path, more: &[&str]) -> Child {
        let mut command = peergate();
        command.args(["serve", "--listen", "127.0.0.1:0", "--data-dir"]).arg(data_dir).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub(crate) fn start(data_dir: &Path, more: &[&str]) -> Self {
        Self::ready(Self::spawn(data_dir, more))
    }

    fn ready(mut child: Child) -> Self {
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut printed: Vec<String> = lines.by_ref().take(1).map(Result::unwrap).collect();
        let engine = printed.first().is_some_and(|line| line == "peergate's engine is ready");
        if !engine {
            printed.extend(lines.by_ref().take(2).map(Result::unwrap));
        }
        if !engine && !printed.first().is_some_and(|line| line.starts_with("peergate is ready on ")) {
            let mut log = String::new();
            child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
            panic!("not ready: {printed:?}\n{log}");
        }
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(String::new()));
        let collected = log.clone();
        let reading = std::thread::spawn(move || {
            for line in stderr.split(b'\n').map_while(Result::ok) {
                collected.lock().unwrap().push_str(&(String::from_utf8_lossy(&line) + "\n"));
            }
        });
        Self { child, printed, log, reading: Some(reading) }
    }

    /// Returns what it has logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    pub(crate) fn address(&self) -> &str {
        self.printed[0].strip_prefix("peergate is ready on ").unwrap()
    }

    /// Connects as the embedded catalog's owner.
    pub(crate) fn config(&self, data_dir: &Path) -> Config {
        let password = fs::read_to_string(data_dir.join("password")).unwrap();
        self.config_as("peergate", password.trim_end(), "peergate")
    }

    pub(crate) fn config_as(&self, user: &str, password: &str, database: &str) -> Config {
        let (host, port) = self.address().rsplit_once(':').unwrap();
        let mut config = Config::new();
        config.host(host).port(port.parse().unwrap()).user(user).password(password).dbname(database);
        config
    }

    /// Ends it as an operator does, and gives its log.
    pub(crate) fn stop(mut self) -> String {
        let started = Instant::now();
        self.signal(Signal::SIGTERM);
        self.reading.take().unwrap().join().unwrap();
        let log = self.log();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}\n{log}");
        assert!(started.elapsed() < Duration::from_secs(15), "took {:?}\n{log}", started.elapsed());
        log
    }
}

/// Ended as by an operator: killed, its postmaster would still write into the folder that is then removed.
impl Drop for Server {
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        if let Ok(None) = self.child.try_wait() {
            let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        }
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn healthcheck(address: &str) -> Output {
    peergate().args(["healthcheck", "--listen", address]).output().unwrap()
}

async fn ask(config: &Config, sql: &str) -> String {
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn ready_line_says_how_to_connect_and_sigterm_ends_it() {
    let place = Place::new();
    let server = Server::start(&place.0, &[]);
    let port = server.address().rsplit_once(':').unwrap().1;
    assert_eq!(server.printed[1], format!("  psql \"host=127.0.0.1 port={port} user=peergate dbname=peergate\""));
    assert_eq!(server.printed[2], format!("  the password is in {}", place.0.join("password").display()));
    assert_eq!(ask(&server.config(&place.0), "select count(*)::text from peers").await, "0");
    let healthy = healthcheck(server.address());
    assert!(healthy.status.success(), "{healthy:?}");

    let address = server.address().to_owned();
    // An idle session does not keep it from ending.
    let (_client, connection) = server.config(&place.0).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    let log = server.stop();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{log}");
    assert!(!place.0.join("pgdata/postmaster.pid").exists(), "the catalog is still running");
    assert!(!healthcheck(&address).status.success());
}

#[test]
fn second_serve_on_a_directory_is_refused_by_name() {
    let place = Place::new();
    let server = Server::start(&place.0, &[]);
    let refused = Server::spawn(&place.0, &[]).wait_with_output().unwrap();
    assert!(!refused.status.success());
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    let expected =
        format!("data directory {} is in use by another peergate, process {}", place.0.display(), server.child.id());
    assert!(message.contains(&expected), "{message}");
    server.stop();
}

#[tokio::test]
async fn killed_serve_starts_again_with_what_was_committed() {
    let place = Place::new();
    let mut server = Server::start(&place.0, &[]);
    let config = server.config(&place.0);
    ask(&config, "with made as (insert into settings (scope, name, type, description) values ('mirror', 'kept', 'text', 'x') returning name) select name from made").await;
    server.child.kill().unwrap();
    server.child.wait().unwrap();
    let server = Server::start(&place.0, &[]);
    assert_eq!(ask(&server.config(&place.0), "select name from settings where name = 'kept'").await, "kept");
    server.stop();
}

#[tokio::test]
async fn two_processes_can_start_at_once_on_a_catalog_of_somebody_else() {
    let cluster = TestCluster::start(&[]).unwrap();
    let url = cluster.url("postgres");
    let (first, second) = (Place::new(), Place::new());
    let more = ["--catalog", url.as_str()];
    let children = [Server::spawn(&first.0, &more), Server::spawn(&second.0, &more)];
    let servers = children.map(Server::ready);
    for server in &servers {
        let config = server.config_as("postgres", "", "postgres");
        assert_eq!(ask(&config, "select to_regclass('peergate.peers')::text").await, "peers");
    }
    assert!(!first.0.join("pgdata").exists(), "a server of our own is running besides");
    servers.into_iter().for_each(|server| drop(server.stop()));
}

#[test]
fn what_cannot_be_done_is_said_at_once() {
    let place = Place::new();
    let said = |more: &[&str]| {
        let output = Server::spawn(&place.0, more).wait_with_output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    assert!(said(&["--role", "engine"]).contains("needs catalog"));
    assert!(said(&["--catalog", "postgres://127.0.0.1:1/nothing"]).contains("127.0.0.1:1"));
}

/// What is in the catalog was made for the user, though Peergate's own session made it.
#[tokio::test(flavor = "multi_thread")]
async fn user_changes_the_password_and_peergate_goes_on() {
    let mut stage = Stage::start().await;
    stage.psql("alter role peergate password 'changed'").await;
    "changed".clone_into(&mut stage.password);
    stage.create_mirror().await;
    stage.caught_up().await;
    stage.assert_equal().await;
    let who = "select concat_ws(' ', session_user, current_user, (select owner from mirrors), (select string_agg(distinct owner, ',') from peers), \
        (select string_agg(distinct created_by, ',') from tasks))";
    assert_eq!(stage.psql(who).await.trim(), "peergate peergate peergate peergate peergate");
    let foreign = "select count(*) from pg_class c join pg_namespace n on n.oid = c.relnamespace, pg_proc p \
        where n.nspname = 'peergate' and p.pronamespace = n.oid and ('peergate'::regrole <> all (array[c.relowner, n.nspowner, p.proowner]))";
    assert_eq!(stage.psql(foreign).await.trim(), "0");

    stage.server.take().unwrap().stop();
    stage.restart();
    assert_eq!(stage.server.as_ref().unwrap().printed[2], "  the password is the one that was set last");
    assert_eq!(stage.psql("show server_encoding").await.trim(), "UTF8");
    stage.on_source().await.batch_execute("insert into history values (0, 1)").await.unwrap();
    stage.caught_up().await;
    stage.assert_equal().await;
}
