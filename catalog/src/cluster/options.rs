//! What a private cluster is to be like, and how it is reached and stopped.

use std::path::PathBuf;
use std::time::Duration;

/// How a cluster can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Only by its Unix socket.
    SocketOnly,
    /// By its Unix socket and on 127.0.0.1.
    Loopback {
        /// The TCP port; [`free_port`](super::free_port) finds one.
        port: u16,
    },
}

/// What a cluster is to be like. The fields that `initdb` uses have no effect on a cluster that is there already.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Where the data is. Its parent folder has to exist.
    pub data_dir: PathBuf,
    /// Folder of the Unix socket; `None`: `data_dir`. Made, with mode 0700, if it is missing.
    pub socket_dir: Option<PathBuf>,
    /// How it can be reached.
    pub listen: Listen,
    /// The superuser that `initdb` makes.
    pub superuser: String,
    /// The superuser's password, for SCRAM; `None` lets everybody in who gets to the socket or port, for tests.
    pub password: Option<String>,
    /// Names and values for the configuration file. `ALTER SYSTEM` in the cluster overrides them.
    pub settings: Vec<(String, String)>,
    /// Whether data survives a crash of the machine. `false`, for tests, does without fsync; a killed server loses nothing
    /// even then.
    pub durable: bool,
    /// How long a start may take, crash recovery included.
    pub start_timeout: Duration,
}

impl ClusterOptions {
    /// Options for a durable cluster in `data_dir` that is reached by its socket only, with no password and no settings.
    pub fn new(data_dir: impl Into<PathBuf>, superuser: impl Into<String>) -> Self {
        Self {
            data_dir: data_dir.into(),
            socket_dir: None,
            listen: Listen::SocketOnly,
            superuser: superuser.into(),
            password: None,
            settings: Vec::new(),
            durable: true,
            start_timeout: Duration::from_secs(300),
        }
    }
}

/// How to stop a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopMode {
    /// Ends all sessions, writes a checkpoint, and leaves a clean directory.
    Fast,
    /// Ends at once; the next start recovers.
    Immediate,
}

/// Where a cluster takes connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnInfo {
    /// The folder of its Unix socket, or `127.0.0.1` when it listens there.
    pub host: String,
    /// Its port; with a socket, only a part of the socket's name.
    pub port: u16,
    /// Its superuser.
    pub user: String,
}

impl ConnInfo {
    /// A connection configuration for the superuser, without a password, to `database`.
    pub fn config(&self, database: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host(&self.host).port(self.port).user(&self.user).dbname(database);
        config
    }
}
