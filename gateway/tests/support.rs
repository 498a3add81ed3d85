//! A gateway before a migrated catalog on a real server, and ways to talk to it.

use std::net::SocketAddr;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::cluster::{Binaries, TestCluster};
use catalog::connect::Connector;
use catalog::peer::PeerOptions;
use catalog::secret::Keyring;
use gateway::server::{Control, Server, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

/// The cluster that the tests share while any of them runs: each has a database of its own there.
static CLUSTER: Mutex<Weak<TestCluster>> = Mutex::new(Weak::new());

fn cluster() -> Arc<TestCluster> {
    let mut shared = CLUSTER.lock().unwrap_or_else(|e| e.into_inner());
    shared.upgrade().unwrap_or_else(|| {
        let cluster = Arc::new(TestCluster::start(&[("log_statement", "all"), ("max_connections", "300")]).unwrap());
        *shared = Arc::downgrade(&cluster);
        cluster
    })
}

/// A gateway and its catalog. Dropped, the gateway's sessions end.
pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    pub(crate) database: String,
    pub(crate) cluster: Arc<TestCluster>,
    pub(crate) stop: watch::Sender<bool>,
    pub(crate) control: Control,
    pub(crate) serving: Option<JoinHandle<Result<(), gateway::error::Error>>>,
}

/// Starts a gateway with a catalog of its own.
pub(crate) async fn start() -> Gateway {
    start_with(|_| {}).await
}

/// Makes a database in the cluster that tests share.
pub(crate) async fn new_database() -> (Arc<TestCluster>, String) {
    let cluster = tokio::task::spawn_blocking(cluster).await.unwrap();
    let database = format!("catalog_{:016x}", rand::random::<u64>());
    let (admin, connection) = cluster.config("postgres").connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    admin.batch_execute(&format!("create database {database}")).await.unwrap();
    (cluster, database)
}

/// Access to a catalog, as a gateway has it.
pub(crate) fn catalog_in(cluster: &TestCluster, database: &str) -> Catalog {
    let options = PeerOptions::plain([
        ("host", "127.0.0.1".to_owned()),
        ("port", cluster.port().to_string()),
        ("user", "postgres".to_owned()),
        ("database", database.to_owned()),
        ("sslmode", "disable".to_owned()),
    ]);
    let keyring = Arc::new(Keyring::parse(&"5a".repeat(32)).unwrap());
    Catalog::new(Connector::new(&options).unwrap(), keyring).unwrap()
}

/// As [`start`], with other options.
pub(crate) async fn start_with(change: impl FnOnce(&mut ServerOptions)) -> Gateway {
    let (cluster, database) = new_database().await;
    let catalog = catalog_in(&cluster, &database);
    catalog.migrate().await.unwrap();
    let mut options = ServerOptions::new("127.0.0.1:0".parse().unwrap());
    // On any machine: sessions on different threads.
    options.threads = 2;
    change(&mut options);
    let server = Server::bind(options, catalog).await.unwrap();
    let address = server.local_addr().unwrap();
    let (stop, stopped) = watch::channel(false);
    let control = server.control();
    let serving = Some(tokio::spawn(server.serve(stopped)));
    Gateway { address, database, cluster, stop, control, serving }
}

impl Gateway {
    /// Connects through the gateway.
    pub(crate) async fn connect(&self) -> Client {
        self.connect_to(self.address.port()).await
    }

    /// Connects to the catalog without the gateway.
    pub(crate) async fn connect_directly(&self) -> Client {
        self.connect_to(self.cluster.port()).await
    }

    pub(crate) fn config(&self, port: u16) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(port).user("postgres").dbname(&self.database);
        config
    }

    async fn connect_to(&self, port: u16) -> Client {
        let (client, connection) = self.config(port).connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Runs a script with psql through the gateway; returns what it wrote.
    pub(crate) async fn psql(&self, script: &str) -> String {
        let output = self.run_psql(self.address.port(), script).await;
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) async fn run_psql(&self, port: u16, script: &str) -> Output {
        self.run_psql_on(port, &self.database, script).await
    }

    pub(crate) async fn run_psql_on(&self, port: u16, database: &str, script: &str) -> Output {
        let psql = Binaries::find(None).unwrap().tool("psql").unwrap();
        let mut command = Command::new("sh");
        let dsn = format!("host=127.0.0.1 port={port} user=postgres dbname={database}");
        command.arg("-c").arg("exec \"$0\" -X -q -v VERBOSITY=verbose -d \"$1\" < \"$2\" 2>&1");
        let file = self.cluster.directory().join(format!("{:016x}.sql", rand::random::<u64>()));
        std::fs::write(&file, script).unwrap();
        command.arg(psql).arg(dsn).arg(&file);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }

    /// Options with which a CREATE PEER connects to the test cluster.
    pub(crate) fn peer_options(&self) -> String {
        format!("host = '127.0.0.1', port = {}, user = 'postgres', database = 'postgres'", self.cluster.port())
    }

    /// A plain socket to the gateway.
    pub(crate) async fn socket(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// A socket on which a session has begun; the answers up to the first ReadyForQuery have been read.
    pub(crate) async fn raw_session(&self) -> TcpStream {
        let mut socket = self.socket().await;
        socket.write_all(&startup(&self.database)).await.unwrap();
        read_until(&mut socket, b'Z').await;
        socket
    }

    /// What the server has logged so far.
    pub(crate) fn server_log(&self) -> String {
        let mut text = String::new();
        let mut folders = vec![self.cluster.directory().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap().flatten() {
                let path = entry.path();
                if path.is_dir() && !path.ends_with("base") {
                    folders.push(path);
                } else if path.to_string_lossy().contains("log")
                    && path.is_file()
                    && !path.to_string_lossy().contains("pg_wal")
                {
                    text.push_str(&String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()));
                }
            }
        }
        text
    }
}

/// A StartupMessage for the superuser.
pub(crate) fn startup(database: &str) -> Vec<u8> {
    let body = [b"\0\x03\0\0user\0postgres\0database\0", database.as_bytes(), b"\0\0"].concat();
    [&(body.len() as u32 + 4).to_be_bytes()[..], &body].concat()
}

/// A frame.
pub(crate) fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

/// Reads one frame.
pub(crate) async fn read_frame(socket: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let tag = socket.read_u8().await?;
    let length = socket.read_u32().await? as usize;
    let mut body = vec![0; length - 4];
    socket.read_exact(&mut body).await?;
    Ok((tag, body))
}

/// Reads frames up to one with that tag; returns the tags and that frame's body.
pub(crate) async fn read_until(socket: &mut TcpStream, tag: u8) -> (String, Vec<u8>) {
    let mut tags = String::new();
    loop {
        let (next, body) = read_frame(socket).await.unwrap();
        tags.push(char::from(next));
        if next == tag {
            return (tags, body);
        }
    }
}

/// Reads all that comes until the other side closes.
pub(crate) async fn read_to_end(socket: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(10), socket.read_to_end(&mut all)).await.unwrap();
    all
}

/// Asks again until the answer is yes; fails after a minute.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !ask().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
