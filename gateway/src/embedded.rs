//! The embedded catalog: a private Postgres cluster in the data directory, and who may use that directory.
//!
//! What a cluster is and how it is run is in [`catalog::cluster`]; here is what Peergate wants of it: one process per
//! directory, a database, two roles, their passwords, sensible settings. The schema is not made here.
//!
//! The role `peergate` is the user's: its password may be changed like any other's, by `ALTER ROLE` or `\password`, and
//! stays as it was set. Peergate's own sessions have a role of their own, `peergate_internal`, so that nothing that is done
//! to the user's role keeps Peergate out.

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

/// The user's role, which owns the embedded catalog, and the name of its database.
pub const ROLE: &str = "peergate";

/// The role of Peergate's own sessions on the embedded catalog. What is made there is made as [`ROLE`] all the same.
pub const INTERNAL_ROLE: &str = "peergate_internal";

/// File in the data directory with the user's password as it was at first.
const PASSWORD_FILE: &str = "password";

/// File in the data directory with the password of [`INTERNAL_ROLE`].
const INTERNAL_PASSWORD_FILE: &str = "internal-password";

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

/// Where the user's password is to be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PasswordPlace {
    /// In `PEERGATE_PASSWORD`, which whoever started the process has set.
    Environment,
    /// In a file with mode 0600.
    File(PathBuf),
    /// With whoever set it last: in SQL, or in `PEERGATE_PASSWORD` at an earlier start.
    Elsewhere,
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
    /// Starts the cluster in the data directory, made first if need be, with its roles, their passwords and its database.
    ///
    /// `password` is what the user's password shall be at each start: one that differs from the cluster's replaces it, also
    /// one that was set in SQL since, and so it is the way back in for who has lost theirs. With `None` the first start makes
    /// one at random and keeps it in the file `password`; no later start touches it. Who then changes it in SQL has changed
    /// it for good: the file is left as it is, and [`EmbeddedCatalog::password_place`] says that it is of no use any more.
    ///
    /// # Errors
    /// [`EmbeddedError`]; nothing is left running.
    pub async fn start(directory: &DataDir, password: Option<&Secret>) -> Result<Self, EmbeddedError> {
        let password_path = directory.path.join(PASSWORD_FILE);
        let mut options = ClusterOptions::new(directory.path.join("pgdata"), ROLE);
        let wanted = match password {
            Some(password) => Some(password.clone()),
            None if cluster::major_of(&options.data_dir).is_none() => Some(read_or_make_password(&password_path)?),
            None => read_password(&password_path)?,
        };
        let internal = read_or_make_password(&directory.path.join(INTERNAL_PASSWORD_FILE))?;
        options.socket_dir = Some(directory.path.join("run"));
        options.password = wanted.as_ref().map(|password| password.reveal().to_owned());
        options.settings = SETTINGS.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let cluster = blocking({
            let (options, internal) = (options.clone(), internal.clone());
            move || make_and_start(options, &internal)
        })
        .await?;
        let mut config = cluster.conninfo().config(ROLE);
        config.application_name("peergate").connect_timeout(Duration::from_secs(10));
        let mut user_config = config.clone();
        config.user(INTERNAL_ROLE).password(internal.reveal());

        let cluster = match ensure_database(&config).await {
            Err(error) if is_refused(&error) => {
                let internal = internal.clone();
                let cluster = blocking(move || make_role_and_restart(cluster, options, &internal)).await?;
                ensure_database(&config).await?;
                cluster
            }
            other => {
                other?;
                cluster
            }
        };
        let valid = match &wanted {
            Some(wanted) => log_in(user_config.password(wanted.reveal())).await?,
            None => false,
        };
        let password_place = match password {
            Some(password) => {
                if !valid {
                    change_password(&config, password).await?;
                }
                // The one in the file is not the password any more.
                let _ = fs::remove_file(&password_path);
                PasswordPlace::Environment
            }
            None if valid => PasswordPlace::File(password_path),
            None => PasswordPlace::Elsewhere,
        };
        Ok(Self { supervisor: cluster.supervise(), config, password: internal, password_place })
    }

    /// How Peergate itself connects to the catalog's database.
    pub fn config(&self) -> &tokio_postgres::Config {
        &self.config
    }

    /// Where the cluster takes connections.
    pub fn conninfo(&self) -> &ConnInfo {
        self.supervisor.conninfo()
    }

    /// The password of Peergate's own sessions.
    pub fn password(&self) -> &Secret {
        &self.password
    }

    /// Where the user's password is to be found.
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

fn make_and_start(options: ClusterOptions, internal: &Secret) -> Result<Cluster, EmbeddedError> {
    // A cluster that is there needs the server that made it, even if a newer one has been installed since.
    let binaries = match cluster::major_of(&options.data_dir) {
        Some(major) => Binaries::for_major(major)?,
        None => Binaries::find(None)?,
    };
    if Cluster::init(&binaries, &options)? {
        make_role(&binaries, &options, internal)?;
        tracing::info!(data_dir = %options.data_dir.display(), major = binaries.major(), "made the embedded catalog");
    }
    Ok(Cluster::start(&binaries, options)?)
}

/// Makes the role of Peergate's own sessions, or makes it usable again, on a cluster that is not running.
///
/// In single-user mode, because that needs no password: the user's may be anything by now, and no way in without a password
/// is ever open to others. The server gets a SCRAM verifier and never sees the password itself.
fn make_role(binaries: &Binaries, options: &ClusterOptions, internal: &Secret) -> Result<(), EmbeddedError> {
    let verifier = postgres_protocol::password::scram_sha_256(internal.reveal().as_bytes());
    let sql = format!(
        "do $$ begin if not exists (select from pg_roles where rolname = '{INTERNAL_ROLE}') then create role {INTERNAL_ROLE}; end if; end $$;\n\
         alter role {INTERNAL_ROLE} superuser login connection limit -1 valid until 'infinity' password '{verifier}';\n\
         comment on role {INTERNAL_ROLE} is 'The sessions of peergate itself; its password is in the data directory.';"
    );
    Ok(Cluster::run_single_user(binaries, &options.data_dir, "postgres", &sql)?)
}

fn make_role_and_restart(
    mut cluster: Cluster,
    options: ClusterOptions,
    internal: &Secret,
) -> Result<Cluster, EmbeddedError> {
    tracing::info!(role = INTERNAL_ROLE, "making the role of peergate's own sessions");
    cluster.stop(StopMode::Fast);
    let binaries = cluster.binaries().clone();
    drop(cluster);
    make_role(&binaries, &options, internal)?;
    Ok(Cluster::start(&binaries, options)?)
}

/// Whether a login failed because of the role or its password.
fn is_refused(error: &tokio_postgres::Error) -> bool {
    [Some(&SqlState::INVALID_PASSWORD), Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION)].contains(&error.code())
}

async fn ensure_database(config: &tokio_postgres::Config) -> Result<(), tokio_postgres::Error> {
    let (client, connection) = config.clone().dbname("postgres").connect(NoTls).await?;
    let connection = tokio::spawn(connection);
    if client.query_opt("select from pg_database where datname = $1", &[&ROLE]).await?.is_none() {
        client.batch_execute(&format!("create database {ROLE} owner {ROLE}")).await?;
    }
    drop(client);
    let _ = connection.await;
    Ok(())
}

/// Tells whether the role and password of `config` let one in.
async fn log_in(config: &tokio_postgres::Config) -> Result<bool, tokio_postgres::Error> {
    match config.connect(NoTls).await {
        Ok((client, connection)) => {
            drop(client);
            let _ = connection.await;
            Ok(true)
        }
        Err(error) if is_refused(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn change_password(config: &tokio_postgres::Config, password: &Secret) -> Result<(), tokio_postgres::Error> {
    tracing::info!(role = ROLE, "changing the password of the embedded catalog's role");
    let (client, connection) = config.connect(NoTls).await?;
    let connection = tokio::spawn(connection);
    let verifier = postgres_protocol::password::scram_sha_256(password.reveal().as_bytes());
    client.batch_execute(&format!("alter role {ROLE} password '{verifier}'")).await?;
    drop(client);
    let _ = connection.await;
    Ok(())
}

/// Reads the password that Peergate's own sessions have in a data directory that another process uses.
///
/// # Errors
/// [`EmbeddedError::Io`] if there is none, or it is not for us to read.
pub fn internal_password(data_dir: &Path) -> Result<Secret, EmbeddedError> {
    let path = data_dir.join(INTERNAL_PASSWORD_FILE);
    read_password(&path)?.ok_or_else(|| EmbeddedError::io("read", &path, io::ErrorKind::NotFound.into()))
}

fn read_password(path: &Path) -> Result<Option<Secret>, EmbeddedError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim_end()).filter(|text| !text.is_empty()).map(Secret::new)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(EmbeddedError::io("read", path, error)),
    }
}

fn read_or_make_password(path: &Path) -> Result<Secret, EmbeddedError> {
    if let Some(password) = read_password(path)? {
        return Ok(password);
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
