//! A throw-away cluster for tests and the demo: its own temporary folder, a free port, no passwords, no fsync.
//!
//! Never for data that anybody wants to keep.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Binaries, Cluster, ClusterOptions, Error, Listen, Result, StopMode, free_port};

/// What is set on a test cluster unless the test says otherwise: all that logical replication needs.
const SETTINGS: [(&str, &str); 8] = [
    ("wal_level", "logical"),
    ("max_wal_senders", "20"),
    ("max_replication_slots", "20"),
    ("max_logical_replication_workers", "10"),
    ("max_worker_processes", "20"),
    ("max_prepared_transactions", "20"),
    ("max_connections", "100"),
    ("autovacuum_naptime", "1s"),
];

/// A running cluster in a temporary folder. Dropped, it is stopped and its folder is removed.
#[derive(Debug)]
pub struct TestCluster {
    cluster: Cluster,
    port: u16,
    // After the cluster: fields are dropped in order, and the server has to be gone before its files.
    directory: TemporaryDir,
}

impl TestCluster {
    /// Starts a cluster of the version that [`Binaries::find`] finds, with `settings` on top of those for replication.
    ///
    /// It listens on 127.0.0.1 and a Unix socket, and lets everybody in as the superuser `postgres`. As root it runs
    /// as an unprivileged user.
    ///
    /// # Errors
    /// As [`Cluster::init`] and [`Cluster::start`].
    pub fn start(settings: &[(&str, &str)]) -> Result<Self> {
        Self::start_with(&Binaries::find(None)?, settings)
    }

    /// Starts a cluster on these server programs; else as [`TestCluster::start`].
    ///
    /// # Errors
    /// As [`TestCluster::start`].
    pub fn start_with(binaries: &Binaries, settings: &[(&str, &str)]) -> Result<Self> {
        let directory = TemporaryDir::create()?;
        let mut options = ClusterOptions::new(directory.0.join("pgdata"), "postgres");
        options.socket_dir = Some(directory.0.join("run"));
        options.settings =
            SETTINGS.iter().chain(settings).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        options.durable = false;
        options.start_timeout = Duration::from_secs(60);
        Cluster::init(binaries, &options)?;
        // Another process may take the port between our look and the server's bind.
        let mut attempts = 0;
        loop {
            let port = free_port()?;
            options.listen = Listen::Loopback { port };
            match Cluster::start(binaries, options.clone()) {
                Ok(cluster) => return Ok(Self { cluster, port, directory }),
                Err(Error::Ended { log, .. }) if log.contains("in use") && attempts < 5 => attempts += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// The TCP port on 127.0.0.1; the same after a restart.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The temporary folder, for whatever else the test has to put somewhere.
    pub fn directory(&self) -> &Path {
        &self.directory.0
    }

    /// A connection configuration for the superuser `postgres` on `database`.
    pub fn config(&self, database: &str) -> tokio_postgres::Config {
        self.cluster.conninfo().config(database)
    }

    /// The same as a URL.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// The cluster, to stop, kill and restart it.
    pub fn cluster(&mut self) -> &mut Cluster {
        &mut self.cluster
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        // Nobody will ever read its files again.
        self.cluster.stop(StopMode::Immediate);
    }
}

#[derive(Debug)]
struct TemporaryDir(PathBuf);

impl TemporaryDir {
    fn create() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("peergate-test-{:016x}", rand::random::<u64>()));
        // Others may pass through, since the server may run as somebody else; the folders within are private.
        DirBuilder::new().mode(0o711).create(&path).map_err(|error| Error::io("make", &path, error))?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
