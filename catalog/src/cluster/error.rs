//! What can go wrong with a private cluster.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// What can go wrong with a private cluster.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no server installed where it was looked for: install one, or name its folder.
    #[error("no Postgres server{} found{}", major.map(|major| format!(" of version {major}")).unwrap_or_default(),
            searched.as_ref().map(|path| format!(" in {}", path.display())).unwrap_or_default())]
    NoBinaries {
        /// The one folder that was looked at; `None`: all the usual ones.
        searched: Option<PathBuf>,
        /// The major version asked for; `None`: any.
        major: Option<u32>,
    },
    /// A client or server program is not installed.
    #[error("program \"{name}\" not found")]
    NoTool {
        /// Its name.
        name: String,
    },
    /// This process is root, and there is neither a user `postgres` nor `nobody` to run Postgres as.
    #[error("Postgres cannot run as root, and there is no user \"postgres\" or \"nobody\"")]
    NoUser,
    /// The user that Postgres runs as may not pass through a folder above its data.
    #[error("user \"{user}\", whom Postgres runs as, may not pass through {} to {}", directory.display(), path.display())]
    NotReachable {
        /// Whom Postgres runs as.
        user: String,
        /// The folder that keeps them out.
        directory: PathBuf,
        /// Where they have to get.
        path: PathBuf,
    },
    /// The directory to make a cluster in holds something else.
    #[error("directory {} is not empty and not a Postgres cluster", data_dir.display())]
    NotEmpty {
        /// That directory.
        data_dir: PathBuf,
    },
    /// The cluster was made by another major version than the server's.
    #[error("cluster {} was made by Postgres {cluster}, the server is {server}", data_dir.display())]
    WrongMajor {
        /// The cluster's directory.
        data_dir: PathBuf,
        /// Its major version.
        cluster: u32,
        /// The server's.
        server: u32,
    },
    /// Another process that is alive runs this cluster.
    #[error("cluster {} is in use by another process{}", data_dir.display(), pid.map(|pid| format!(" (its postmaster is {pid})")).unwrap_or_default())]
    InUse {
        /// The cluster's directory.
        data_dir: PathBuf,
        /// The running postmaster, when it is known.
        pid: Option<u32>,
    },
    /// `initdb`, or the server in single-user mode, failed.
    #[error("{program} failed ({status}): {output}")]
    Failed {
        /// Which program.
        program: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        output: String,
    },
    /// The server ended before it took connections.
    #[error("Postgres ended while it started ({status}): {log}")]
    Ended {
        /// How it ended.
        status: ExitStatus,
        /// The end of its log.
        log: String,
    },
    /// The server did not take connections, or left-over processes did not end, within the time allowed.
    #[error("Postgres in {} is not ready after {} s", data_dir.display(), waited.as_secs())]
    TimedOut {
        /// The cluster's directory.
        data_dir: PathBuf,
        /// How long it was waited for.
        waited: Duration,
    },
    /// A file or process could not be dealt with.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }
}

/// What the functions of this module return.
pub type Result<T, E = Error> = std::result::Result<T, E>;
