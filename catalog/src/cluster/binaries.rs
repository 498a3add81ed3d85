//! Where the Postgres server programs of this machine are, and which major version they have.
//!
//! It only looks; what is missing is installed by `scripts/setup.sh`, never by the product.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Error, Result};

/// The folder of one installation of the Postgres server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    directory: PathBuf,
    major: u32,
}

impl Binaries {
    /// Finds a Postgres server: `initdb` and `postgres` in one folder.
    ///
    /// The first of these that has both wins: `explicit`, the folder that `PEERGATE_PG_BIN` names, the folders of
    /// `PATH`, `pg_config --bindir`, then the folders of the distributions, newest major first. A folder that was named
    /// (by `explicit` or by the variable) has to have them: the search does not go on behind it.
    ///
    /// # Errors
    /// [`Error::NoBinaries`] if there are none, or the folder that was named lacks them.
    pub fn find(explicit: Option<&Path>) -> Result<Self> {
        if let Some(directory) = explicit.map(Path::to_path_buf).or_else(|| folder_from_env("PEERGATE_PG_BIN")) {
            return Self::in_directory(&directory);
        }
        candidates()
            .iter()
            .find_map(|directory| Self::in_directory(directory).ok())
            .ok_or(Error::NoBinaries { searched: None, major: None })
    }

    /// Finds a Postgres server of one major version, such as 15.
    ///
    /// The folder that `PEERGATE_PG_BIN_<major>` names comes first, then all that [`Binaries::find`] looks at.
    ///
    /// # Errors
    /// [`Error::NoBinaries`] if none of that version is found.
    pub fn for_major(major: u32) -> Result<Self> {
        let missing = |searched| Error::NoBinaries { searched, major: Some(major) };
        if let Some(directory) = folder_from_env(&format!("PEERGATE_PG_BIN_{major}")) {
            return Self::in_directory(&directory)
                .ok()
                .filter(|found| found.major == major)
                .ok_or(missing(Some(directory)));
        }
        folder_from_env("PEERGATE_PG_BIN")
            .into_iter()
            .chain(candidates())
            .find_map(|directory| Self::in_directory(&directory).ok().filter(|found| found.major == major))
            .ok_or(missing(None))
    }

    /// Looks at one folder only.
    ///
    /// # Errors
    /// [`Error::NoBinaries`] if `initdb` or `postgres` is not there or does not say its version.
    pub fn in_directory(directory: &Path) -> Result<Self> {
        let missing = || Error::NoBinaries { searched: Some(directory.to_path_buf()), major: None };
        // A link in a folder of PATH leads to the folder that has pgbench and the others too.
        let postgres = directory.join("postgres").canonicalize().map_err(|_| missing())?;
        let directory = postgres.parent().ok_or_else(missing)?;
        if !directory.join("initdb").is_file() {
            return Err(missing());
        }
        let version = output_of(Command::new(&postgres).arg("--version")).ok_or_else(missing)?;
        Ok(Self { directory: directory.to_path_buf(), major: parse_major(&version).ok_or_else(missing)? })
    }

    /// The folder that holds the programs.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The major version, such as 15.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// The path of another program of the same installation, such as `pgbench`; else the one in `PATH`.
    ///
    /// # Errors
    /// [`Error::NoTool`] if it is in neither.
    pub fn tool(&self, name: &str) -> Result<PathBuf> {
        std::iter::once(self.directory.clone())
            .chain(path_folders())
            .map(|directory| directory.join(name))
            .find(|path| path.is_file())
            .ok_or_else(|| Error::NoTool { name: name.to_owned() })
    }
}

fn folder_from_env(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn path_folders() -> Vec<PathBuf> {
    env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default()
}

/// All folders worth a look, best first.
fn candidates() -> Vec<PathBuf> {
    let mut folders = path_folders();
    folders.extend(output_of(Command::new("pg_config").arg("--bindir")).map(|folder| PathBuf::from(folder.trim())));
    folders.extend(versioned("/usr/lib/postgresql", "", "bin"));
    folders.extend(versioned("/usr", "pgsql-", "bin"));
    for root in ["/opt/homebrew/opt", "/usr/local/opt"] {
        folders.extend(versioned(root, "postgresql@", "bin"));
    }
    folders
}

/// The folders `root/<prefix><number>/tail`, highest number first.
fn versioned(root: &str, prefix: &str, tail: &str) -> Vec<PathBuf> {
    let mut found: Vec<(u32, PathBuf)> = fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
            Some((number, entry.path().join(tail)))
        })
        .collect();
    found.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
    found.into_iter().map(|(_, path)| path).collect()
}

fn output_of(command: &mut Command) -> Option<String> {
    let output = command.env("LC_ALL", "C").stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The 15 of `postgres (PostgreSQL) 15.10 (Debian 15.10-0+deb12u1)` and the 18 of `postgres (PostgreSQL) 18beta1`.
fn parse_major(version: &str) -> Option<u32> {
    let (_, rest) = version.split_once("(PostgreSQL) ")?;
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    rest.get(..digits)?.parse().ok()
}

/// The major version that a data directory was made by; `None` if it is not one.
pub(super) fn data_major(data_dir: &Path) -> Option<u32> {
    fs::read_to_string(data_dir.join(OsStr::new("PG_VERSION"))).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn major_is_read_from_what_postgres_prints() {
        assert_eq!(parse_major("postgres (PostgreSQL) 15.10 (Debian 15.10-0+deb12u1)\n"), Some(15));
        assert_eq!(parse_major("postgres (PostgreSQL) 18beta1\n"), Some(18));
        assert_eq!(parse_major("postgres (Other) 3\n"), None);
    }

    #[test]
    fn folder_that_was_named_is_not_passed_over() {
        let nowhere = Path::new("/nonexistent");
        assert!(
            matches!(Binaries::find(Some(nowhere)), Err(Error::NoBinaries { searched: Some(path), .. }) if path == nowhere)
        );
    }
}
