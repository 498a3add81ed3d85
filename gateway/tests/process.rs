//! A real gateway process before a catalog of its own, for what can only be told from outside: its memory, its threads, its log.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use catalog::cluster::TestCluster;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_postgres::{Client, NoTls};

use crate::serve::{Place, Server};
use crate::support::{new_database, read_until, startup};

/// How long a session may take to answer, or to end: longer means that it is stuck.
pub(crate) const STUCK: Duration = Duration::from_secs(30);

/// A gateway process and its catalog.
pub(crate) struct Process {
    pub(crate) server: Server,
    pub(crate) cluster: Arc<TestCluster>,
    pub(crate) database: String,
    threads: usize,
    pub(crate) _place: Place,
}

impl Process {
    /// Starts one before a database in the cluster that the tests share.
    pub(crate) async fn start() -> Process {
        Process::start_with("").await
    }

    /// As [`Process::start`], with more lines in its configuration file.
    pub(crate) async fn start_with(settings: &str) -> Process {
        let (cluster, database) = new_database().await;
        Process::before(cluster, database, settings).await
    }

    /// Starts one before a cluster that is the test's own.
    pub(crate) async fn alone(settings: &[(&'static str, &'static str)]) -> Process {
        let settings = settings.to_vec();
        let cluster = tokio::task::spawn_blocking(move || TestCluster::start(&settings).unwrap()).await.unwrap();
        Process::before(Arc::new(cluster), "postgres".to_owned(), "").await
    }

    async fn before(cluster: Arc<TestCluster>, database: String, settings: &str) -> Process {
        let place = Place::new();
        fs::create_dir_all(&place.0).unwrap();
        let (config, url) = (place.0.join("peergate.toml"), format!("{}?sslmode=disable", cluster.url(&database)));
        fs::write(&config, settings).unwrap();
        let data_dir = place.0.join("data");
        let start = move || {
            let config = config.to_str().unwrap();
            Server::start(&data_dir, &["--role", "gateway", "--catalog", &url, "--config", config])
        };
        let server = tokio::task::spawn_blocking(start).await.unwrap();
        let mut process = Process { server, cluster, database, threads: 0, _place: place };
        // They start after it has said that it is ready.
        process.client().await.query("select 1", &[]).await.unwrap();
        process.threads = process.session_threads();
        process
    }

    pub(crate) fn port(&self) -> u16 {
        self.server.address().rsplit_once(':').unwrap().1.parse().unwrap()
    }

    /// A plain socket to the gateway.
    pub(crate) async fn socket(&self) -> TcpStream {
        let socket = TcpStream::connect(("127.0.0.1", self.port())).await.unwrap();
        socket.set_nodelay(true).unwrap();
        socket
    }

    /// A socket on which a session has begun.
    pub(crate) async fn session(&self) -> TcpStream {
        begin(self.socket().await, &self.database).await
    }

    /// A client through the gateway.
    pub(crate) async fn client(&self) -> Client {
        self.client_on(self.port()).await
    }

    /// A client of the server itself.
    pub(crate) async fn direct(&self) -> Client {
        self.client_on(self.cluster.port()).await
    }

    async fn client_on(&self, port: u16) -> Client {
        let mut config = tokio_postgres::Config::new();
        let name = if port == self.port() { "through" } else { "direct" };
        config.host("127.0.0.1").port(port).user("postgres").dbname(&self.database).application_name(name);
        let (client, connection) = config.connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Its resident memory, now and at its highest, in kB.
    pub(crate) fn memory_kb(&self) -> (u64, u64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.server.child.id())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        (field("VmRSS:"), field("VmHWM:"))
    }

    /// Forgets how high its memory has been.
    pub(crate) fn forget_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.server.child.id()), "5").unwrap();
    }

    /// How many threads there are that serve sessions.
    fn session_threads(&self) -> usize {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.server.child.id())).unwrap();
        let name = |task: &fs::DirEntry| fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        tasks.flatten().filter(|task| name(task).starts_with("sessions-")).count()
    }

    /// Waits until no session of a client is left on the server.
    pub(crate) async fn settled(&self) {
        let direct = self.direct().await;
        let left = "select count(*), coalesce(string_agg(concat_ws(' ', state, wait_event, query), '; '), '') from pg_stat_activity
            where datname = current_database() and backend_type = 'client backend' and application_name not in ('peergate', 'direct')
            and pid <> pg_backend_pid()";
        let begun = Instant::now();
        loop {
            let row = direct.query_one(left, &[]).await.unwrap();
            if row.get::<_, i64>(0) == 0 {
                return;
            }
            assert!(begun.elapsed() < STUCK, "sessions are stuck: {}", row.get::<_, String>(1));
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends it, and makes sure that it served to its end: nothing stuck, no thread lost, nothing in its log but what is allowed.
    pub(crate) async fn finish(self, allowed: &[&str]) {
        self.settled().await;
        self.client().await.query("select 1", &[]).await.unwrap();
        assert_eq!(self.session_threads(), self.threads, "a thread is gone");
        let Process { server, _place, cluster, .. } = self;
        let log = tokio::task::spawn_blocking(|| server.stop()).await.unwrap();
        let bad = |line: &&str| {
            ["panicked", "ERROR", "WARN"].iter().any(|word| line.contains(word))
                && !allowed.iter().any(|text| line.contains(text))
        };
        assert_eq!(log.lines().find(bad), None, "{log}");
        drop(cluster);
    }
}

/// Begins a session on a socket.
pub(crate) async fn begin(mut socket: TcpStream, database: &str) -> TcpStream {
    socket.write_all(&startup(database)).await.unwrap();
    read_until(&mut socket, b'Z').await;
    socket
}

/// Fails when something takes so long that it must be stuck.
pub(crate) async fn in_time<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(STUCK, work).await.unwrap_or_else(|_| panic!("stuck: {what}"))
}

/// The seed of a run: printed, and taken from `HOSTILE_SEED` to repeat it.
pub(crate) fn seed() -> u64 {
    let seed = std::env::var("HOSTILE_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("HOSTILE_SEED={seed}");
    seed
}
