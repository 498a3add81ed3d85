//! The embedded catalog: a private Postgres cluster in the data directory, and who may use that directory.
//!
//! What a cluster is and how it is run is in [`catalog::cluster`]; here is what Peergate wants of it: one process per
//! directory, a role and a database `peergate`, a password, sensible settings. The schema is not made here.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use catalog::cluster::{self, Binaries, Cluster, ClusterOptions, ConnInfo, StopMode, Supervisor};
use nix::fcntl::{Flock, FlockArg};
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;

use crate::config::Secret;

/// The role that owns the embedded catalog, and the name of its database.
pub const ROLE: &str = "peergate";

/// What is set on the embedded catalog; `ALTER SYSTEM` overrides it.
const SETTINGS: [(&str, &str); 11] = [
    ("wal_level", "logical"),
    // Each client's session has a session of its own here.
    ("max_connections", "300"),
    ("superuser_reserved_connections", "10"),
    ("password_encryption", "scram-sha-256"),
    ("unix_socket_permissions", "0700"),
    // Small rows, often updated: WAL is recycled rather than piled up, and no query is worth compiling.
    ("max_wal_size", "256MB"),
    ("min_wal_size", "80MB"),
    ("jit", "off"),
    ("autovacuum_naptime", "15s"),
    ("log_line_prefix", "%m [%p] %q%u@%d "),
    ("log_checkpoints", "off"),
];

/// What can go wrong with the data directory and the embedded catalog.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// Another process uses the directory.
    #[error("data directory {} is in use by another peergate{}", directory.display(), pid.as_ref().map(|pid| format!(", process {pid}")).unwrap_or_default())]
    InUse {
        /// The data directory.
        directory: PathBuf,
        /// The other process, when it said so.
        pid: Option<String>,
    },
    /// A file in the data directory cannot be dealt with.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The cluster cannot be made or started.
    #[error("cannot run the embedded catalog")]
    Cluster(#[from] cluster::Error),
    /// The cluster runs, and does not do as it is told.
    #[error("cannot set up the embedded catalog")]
    Sql(#[from] tokio_postgres::Error),
}

impl EmbeddedError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }
}

/// A data directory that this process, and no other, uses. The kernel gives it free when the process ends, however it ends.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: Flock<File>,
}

impl DataDir {
    /// Makes the directory if it is missing, and locks it.
    ///
    /// As root it is made so that others may pass through, because Postgres runs as another user; what is in it is private.
    ///
    /// # Errors
    /// [`EmbeddedError::InUse`] if another process has it.
    pub fn lock(path: &Path) -> Result<Self, EmbeddedError> {
        let mode = if nix::unistd::Uid::effective().is_root() { 0o711 } else { 0o700 };
        DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
            .map_err(|error| EmbeddedError::io("make", path, error))?;
        let lock_path = path.join("lock");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(|error| EmbeddedError::io("open", &lock_path, error))?;
        let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(mut file, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                let pid = Some(pid.trim().to_owned()).filter(|pid| !pid.is_empty());
                EmbeddedError::InUse { directory: path.to_path_buf(), pid }
            }
            other => EmbeddedError::io("lock", &lock_path, other.into()),
        })?;
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(*lock, "{}", std::process::id()))
            .map_err(|error| EmbeddedError::io("write", &lock_path, error))?;
        Ok(Self { path: path.to_path_buf(), _lock: lock })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Where the password of the embedded catalog's role is to be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PasswordPlace {
    /// In `PEERGATE_PASSWORD`, which whoever started the process has set.
    Environment,
    /// In a file with mode 0600.
    File(PathBuf),
}

/// The running embedded catalog, stopped when it is dropped.
#[derive(Debug)]
pub struct EmbeddedCatalog {
    supervisor: Supervisor,
    config: tokio_postgres::Config,
    password: Secret,
    password_place: PasswordPlace,
}

impl EmbeddedCatalog {
    /// Starts the cluster in the data directory, made first if need be, with its role, its password and its database.
    ///
    /// `password` is what the role's password shall be: one that differs from the cluster's replaces it. With `None` it is
    /// the one in the file `password`, made at random at the first start.
    ///
    /// # Errors
    /// [`EmbeddedError`]; nothing is left running.
    pub async fn start(directory: &DataDir, password: Option<&Secret>) -> Result<Self, EmbeddedError> {
        let (password, password_place) = match password {
            Some(password) => (password.clone(), PasswordPlace::Environment),
            None => {
                let path = directory.path.join("password");
                (read_or_make_password(&path)?, PasswordPlace::File(path))
            }
        };
        let mut options = ClusterOptions::new(directory.path.join("pgdata"), ROLE);
        options.socket_dir = Some(directory.path.join("run"));
        options.password = Some(password.reveal().to_owned());
        options.settings = SETTINGS.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let cluster = blocking({
            let options = options.clone();
            move || make_and_start(options)
        })
        .await?;
        let mut config = cluster.conninfo().config(ROLE);
        config.password(password.reveal()).application_name("peergate").connect_timeout(Duration::from_secs(10));

        let cluster = match ensure_database(&config).await {
            Err(error) if error.code() == Some(&SqlState::INVALID_PASSWORD) => {
                let password = password.clone();
                let cluster = blocking(move || change_password(cluster, options, &password)).await?;
                ensure_database(&config).await?;
                cluster
            }
            other => {
                other?;
                cluster
            }
        };
        if password_place == PasswordPlace::Environment {
            // The one in the file is not the password any more.
            let _ = fs::remove_file(directory.path.join("password"));
        }
        Ok(Self { supervisor: cluster.supervise(), config, password, password_place })
    }

    /// How to connect to the catalog's database as its owner.
    pub fn config(&self) -> &tokio_postgres::Config {
        &self.config
    }

    /// Where the cluster takes connections.
    pub fn conninfo(&self) -> &ConnInfo {
        self.supervisor.conninfo()
    }

    /// The owner's password.
    pub fn password(&self) -> &Secret {
        &self.password
    }

    /// Where the owner's password is to be found.
    pub fn password_place(&self) -> &PasswordPlace {
        &self.password_place
    }

    /// Stops the cluster (fast) and comes back when it has ended.
    pub async fn stop(self) {
        let supervisor = self.supervisor;
        blocking(move || drop(supervisor.stop(StopMode::Fast))).await;
    }
}

/// Runs what blocks off the runtime's threads.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

fn make_and_start(options: ClusterOptions) -> Result<Cluster, EmbeddedError> {
    // A cluster that is there needs the server that made it, even if a newer one has been installed since.
    let binaries = match cluster::major_of(&options.data_dir) {
        Some(major) => Binaries::for_major(major)?,
        None => Binaries::find(None)?,
    };
    if Cluster::init(&binaries, &options)? {
        tracing::info!(data_dir = %options.data_dir.display(), major = binaries.major(), "made the embedded catalog");
    }
    Ok(Cluster::start(&binaries, options)?)
}

/// Sets the role's password without knowing the old one.
///
/// In single-user mode, so that no way in without a password is ever open to others. The server gets a SCRAM verifier
/// and never sees the password itself.
fn change_password(mut cluster: Cluster, options: ClusterOptions, password: &Secret) -> Result<Cluster, EmbeddedError> {
    tracing::info!("changing the password of the embedded catalog's role");
    cluster.stop(StopMode::Fast);
    let binaries = cluster.binaries().clone();
    drop(cluster);
    let verifier = postgres_protocol::password::scram_sha_256(password.reveal().as_bytes());
    let sql = format!("alter role {ROLE} password '{verifier}'");
    Cluster::run_single_user(&binaries, &options.data_dir, "postgres", &sql)?;
    Ok(Cluster::start(&binaries, options)?)
}

async fn ensure_database(config: &tokio_postgres::Config) -> Result<(), tokio_postgres::Error> {
    let (client, connection) = config.clone().dbname("postgres").connect(NoTls).await?;
    let connection = tokio::spawn(connection);
    if client.query_opt("select from pg_database where datname = $1", &[&ROLE]).await?.is_none() {
        client.batch_execute(&format!("create database {ROLE}")).await?;
    }
    drop(client);
    let _ = connection.await;
    Ok(())
}

fn read_or_make_password(path: &Path) -> Result<Secret, EmbeddedError> {
    match fs::read_to_string(path) {
        Ok(text) if !text.trim_end().is_empty() => return Ok(Secret::new(text.trim_end())),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(EmbeddedError::io("read", path, error)),
        _ => {}
    }
    // 120 bits in letters and digits that need no quoting anywhere.
    const ALPHABET: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let password: String =
        rand::random::<[u8; 24]>().iter().map(|byte| char::from(ALPHABET[usize::from(byte % 32)])).collect();
    // Renamed when complete: a password that was cut off would lock us out of nothing, but puzzle its reader.
    let unfinished = path.with_extension("new");
    let _ = fs::remove_file(&unfinished);
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&unfinished)
        .and_then(|mut file| writeln!(file, "{password}").and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&unfinished, path))
        .map_err(|error| EmbeddedError::io("write", path, error))?;
    Ok(Secret::new(password))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_directory_has_one_user() {
        let path = std::env::temp_dir().join(format!("peergate-lock-{:016x}", rand::random::<u64>()));
        let first = DataDir::lock(&path).unwrap();
        let refused = DataDir::lock(&path).unwrap_err().to_string();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        drop(first);
        DataDir::lock(&path).unwrap();
        fs::remove_dir_all(&path).unwrap();
    }

    #[test]
    fn password_is_made_once_and_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let directory = std::env::temp_dir().join(format!("peergate-password-{:016x}", rand::random::<u64>()));
        fs::create_dir(&directory).unwrap();
        let path = directory.join("password");
        let made = read_or_make_password(&path).unwrap();
        assert_eq!(made.reveal().len(), 24);
        assert_eq!(read_or_make_password(&path).unwrap(), made);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::remove_dir_all(&directory).unwrap();
    }
}
