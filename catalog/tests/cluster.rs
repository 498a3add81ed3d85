//! What a private cluster promises: it starts, stops, survives crashes, and is never run twice.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use catalog::cluster::{Binaries, Cluster, ClusterOptions, Error, Listen, StopMode, TestCluster, free_port};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A cluster's options in a folder that is removed at the end.
struct Place {
    directory: PathBuf,
    options: ClusterOptions,
}

impl Place {
    fn new() -> Self {
        let directory = std::env::temp_dir().join(format!("peergate-cluster-{:016x}", rand::random::<u64>()));
        fs::create_dir(&directory).unwrap();
        let mut options = ClusterOptions::new(directory.join("pgdata"), "peergate");
        options.socket_dir = Some(directory.join("run"));
        options.durable = false;
        Self { directory, options }
    }

    fn initialised() -> (Self, Binaries) {
        let place = Self::new();
        let binaries = Binaries::find(None).unwrap();
        assert!(Cluster::init(&binaries, &place.options).unwrap());
        (place, binaries)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// Runs one statement and gives the first column of its first row.
fn ask(config: &tokio_postgres::Config, sql: &str) -> Result<String, tokio_postgres::Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
        let connection = tokio::spawn(connection);
        let messages = client.simple_query(sql).await?;
        drop(client);
        let _ = connection.await;
        let value = messages.iter().find_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        Ok(value.unwrap_or_default().to_owned())
    })
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        std::thread::yield_now();
    }
}

fn ask_cluster(cluster: &Cluster, sql: &str) -> String {
    ask(&cluster.conninfo().config("postgres"), sql).unwrap()
}

/// A process that has ended but was not reaped yet, which is init's business, has no program any more.
fn is_running(pid: u32) -> bool {
    fs::read_link(format!("/proc/{pid}/exe")).is_ok()
}

#[test]
fn cluster_starts_and_stops() {
    let (place, binaries) = Place::initialised();
    assert!(!Cluster::init(&binaries, &place.options).unwrap(), "a second init makes nothing");
    let mut options = place.options.clone();
    options.listen = Listen::Loopback { port: free_port().unwrap() };
    options.settings.push(("application_name".to_owned(), "it's odd".to_owned()));
    let mut cluster = Cluster::start(&binaries, options).unwrap();
    assert_eq!(ask_cluster(&cluster, "show application_name"), "it's odd");
    assert_eq!(ask_cluster(&cluster, "show data_checksums"), "on");
    assert_eq!(ask_cluster(&cluster, "show server_encoding"), "UTF8");
    let pid = cluster.pid();
    cluster.stop(StopMode::Fast);
    assert!(!is_running(pid));
    assert!(!place.options.data_dir.join("postmaster.pid").exists());
}

#[test]
fn password_is_asked_for_and_can_be_changed_in_single_user_mode() {
    let place = Place::new();
    let binaries = Binaries::find(None).unwrap();
    let mut options = place.options.clone();
    options.password = Some("it's secret".to_owned());
    Cluster::init(&binaries, &options).unwrap();
    let names: Vec<_> = fs::read_dir(&place.directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["pgdata"], "neither the password nor an unfinished cluster is left");

    let cluster = Cluster::start(&binaries, options.clone()).unwrap();
    let mut config = cluster.conninfo().config("postgres");
    assert!(ask(&config, "select 1").is_err());
    assert_eq!(ask(config.password("it's secret"), "select 1").unwrap(), "1");
    drop(cluster);

    Cluster::run_single_user(&binaries, &options.data_dir, "postgres", "alter role peergate password 'other'").unwrap();
    assert!(
        Cluster::run_single_user(&binaries, &options.data_dir, "postgres", "alter role nobody password 'other'")
            .is_err()
    );
    let cluster = Cluster::start(&binaries, options).unwrap();
    assert_eq!(ask(cluster.conninfo().config("postgres").password("other"), "select 1").unwrap(), "1");
}

#[test]
fn second_start_on_a_directory_is_refused() {
    let (place, binaries) = Place::initialised();
    let cluster = Cluster::start(&binaries, place.options.clone()).unwrap();
    match Cluster::start(&binaries, place.options.clone()) {
        Err(Error::InUse { pid, .. }) => assert_eq!(pid, Some(cluster.pid())),
        other => panic!("not refused: {other:?}"),
    }
    assert_eq!(ask_cluster(&cluster, "select 1"), "1");
}

#[test]
fn directory_with_other_files_is_refused() {
    let place = Place::new();
    fs::create_dir(&place.options.data_dir).unwrap();
    fs::write(place.options.data_dir.join("thesis.txt"), "years of work").unwrap();
    let refused = Cluster::init(&Binaries::find(None).unwrap(), &place.options);
    assert!(matches!(refused, Err(Error::NotEmpty { .. })), "{refused:?}");
}

#[test]
fn stale_pid_file_is_no_obstacle() {
    let (place, binaries) = Place::initialised();
    let pid_file = place.options.data_dir.join("postmaster.pid");
    // Our own pid stands for one that an unrelated process has by now; then one that nobody has.
    for pid in [std::process::id(), i32::MAX as u32] {
        fs::write(&pid_file, format!("{pid}\n{}\n", place.options.data_dir.display())).unwrap();
        drop(Cluster::start(&binaries, place.options.clone()).unwrap());
    }
}

#[test]
fn unfinished_init_is_not_taken_for_a_cluster() {
    let place = Place::new();
    let unfinished = place.directory.join("pgdata.new");
    fs::create_dir(&unfinished).unwrap();
    fs::write(unfinished.join("PG_VERSION"), "15\n").unwrap();
    let binaries = Binaries::find(None).unwrap();
    assert!(Cluster::init(&binaries, &place.options).unwrap());
    assert!(!unfinished.exists());
    Cluster::start(&binaries, place.options.clone()).unwrap();
}

#[test]
fn killed_cluster_starts_again() {
    let (place, binaries) = Place::initialised();
    let mut cluster = Cluster::start(&binaries, place.options.clone()).unwrap();
    ask_cluster(&cluster, "create table t as select 7 as n; checkpoint");
    cluster.kill();
    cluster.restart().unwrap();
    assert_eq!(ask_cluster(&cluster, "select n from t"), "7");
}

#[test]
fn crashed_server_is_started_again_by_its_supervisor() {
    let (place, binaries) = Place::initialised();
    let supervisor = Cluster::start(&binaries, place.options.clone()).unwrap().supervise();
    for restarts in 1..=2 {
        kill(Pid::from_raw(supervisor.pid() as i32), Signal::SIGKILL).unwrap();
        until("a restart", || supervisor.restarts() == restarts);
        assert_eq!(ask(&supervisor.conninfo().config("postgres"), "select 1").unwrap(), "1");
    }
    let pid = supervisor.pid();
    supervisor.stop(StopMode::Fast);
    assert!(!is_running(pid));
}

#[test]
fn path_too_long_for_a_socket_is_no_obstacle() {
    let (place, binaries) = Place::initialised();
    let mut options = place.options.clone();
    options.socket_dir = Some(place.directory.join("x".repeat(100)));
    let cluster = Cluster::start(&binaries, options).unwrap();
    let socket_dir = cluster.socket_dir().to_path_buf();
    assert_eq!(ask_cluster(&cluster, "select 1"), "1");
    drop(cluster);
    assert!(!socket_dir.exists());
}

/// The variable with the data directory when this binary was started as the process that is killed.
const VICTIM: &str = "PEERGATE_TEST_VICTIM";

/// Not a test of its own unless it is started as the victim: runs a cluster until it is killed.
#[test]
fn victim() {
    let Some(data_dir) = std::env::var_os(VICTIM) else { return };
    let cluster = Cluster::start(&Binaries::find(None).unwrap(), ClusterOptions::new(data_dir, "peergate")).unwrap();
    println!("\nvictim runs {}", cluster.pid());
    let _ = std::io::stdout().flush();
    let _ = std::io::stdin().lines().next();
}

#[test]
fn kill_of_the_owner_leaves_no_orphan_and_a_directory_that_starts_again() {
    let (place, binaries) = Place::initialised();
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cluster::victim", "--nocapture"])
        .env(VICTIM, &place.options.data_dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(victim.stdout.take().unwrap());
    let postmaster =
        output.lines().find_map(|line| line.unwrap().strip_prefix("victim runs ")?.parse::<u32>().ok()).unwrap();
    victim.kill().unwrap();
    victim.wait().unwrap();
    // Whether the orphan is still stopping by now or not, the next start gets by.
    let cluster = Cluster::start(&binaries, place.options.clone()).unwrap();
    assert!(!is_running(postmaster));
    assert_eq!(ask_cluster(&cluster, "select 1"), "1");
}

#[test]
fn test_cluster_is_ready_for_replication_and_cleans_up() {
    let mut cluster = TestCluster::start(&[("max_connections", "33")]).unwrap();
    let config = cluster.config("postgres");
    assert_eq!(ask(&config, "select setting from pg_settings where name = 'wal_level'").unwrap(), "logical");
    assert_eq!(ask(&config, "show max_connections").unwrap(), "33");
    cluster.cluster().restart().unwrap();
    assert_eq!(ask(&config, "select 1").unwrap(), "1");
    let directory = cluster.directory().to_path_buf();
    drop(cluster);
    assert!(!directory.exists());
}

#[test]
fn log_shows_why_a_start_failed() {
    let (place, binaries) = Place::initialised();
    let mut log = OpenOptions::new().append(true).open(place.options.data_dir.join("postgresql.conf")).unwrap();
    writeln!(log, "shared_buffers = 'lots'").unwrap();
    match Cluster::start(&binaries, place.options.clone()) {
        Err(Error::Ended { log, .. }) => assert!(log.contains("shared_buffers"), "{log}"),
        other => panic!("started: {other:?}"),
    }
}
