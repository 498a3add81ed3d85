//! Files and folders of a private cluster, for the user that Postgres runs as and nobody else.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::process::RunAs;
use super::{ClusterOptions, Error, Listen, Result, SOCKET_PORT};

/// Longest path of a Unix socket in bytes: Linux has 108 with the terminating zero.
const SOCKET_PATH_MAX: usize = 107;

/// Size in bytes from which on a start sets the log aside as `postgres.log.1`.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// Writes a file with mode 0600 for the user that Postgres runs as.
pub(super) fn write_private_file(path: &Path, text: &str, run_as: Option<&RunAs>) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(text.as_bytes())?;
    run_as.map_or(Ok(()), |user| user.own(path))
}

pub(super) fn open_log(path: &Path, run_as: Option<&RunAs>) -> io::Result<File> {
    if fs::metadata(path).is_ok_and(|metadata| metadata.len() > LOG_BYTES_MAX) {
        fs::rename(path, path.with_extension("log.1"))?;
    }
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
    if let Some(user) = run_as {
        user.own(path)?;
    }
    Ok(log)
}

/// The last lines that the server wrote after `start`, in bytes.
pub(super) fn log_tail(path: &Path, start: u64) -> String {
    let content = fs::read(path).unwrap_or_default();
    let since = content.get(start as usize..).unwrap_or(&content);
    let text = String::from_utf8_lossy(since);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("; ")
}

/// The file that hands `initdb` the password; removed when dropped.
pub(super) struct PasswordFile(pub(super) PathBuf);

impl PasswordFile {
    pub(super) fn write(path: PathBuf, password: &str, run_as: Option<&RunAs>) -> Result<Self> {
        let file = Self(path);
        write_private_file(&file.0, &format!("{password}\n"), run_as)
            .map_err(|error| Error::io("write", &file.0, error))?;
        Ok(file)
    }
}

impl Drop for PasswordFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// The folder of the Unix socket, removed when dropped if it was made in the temporary folder.
#[derive(Debug)]
pub(super) struct SocketDir {
    pub(super) path: PathBuf,
    temporary: bool,
}

impl SocketDir {
    pub(super) fn prepare(options: &ClusterOptions, run_as: Option<&RunAs>) -> Result<Self> {
        let port = match options.listen {
            Listen::SocketOnly => SOCKET_PORT,
            Listen::Loopback { port } => port,
        };
        let wanted = options.socket_dir.as_ref().unwrap_or(&options.data_dir);
        let fits = wanted.join(format!(".s.PGSQL.{port}")).as_os_str().as_bytes().len() <= SOCKET_PATH_MAX;
        let directory = if fits {
            Self { path: wanted.clone(), temporary: false }
        } else {
            // A random name that must be new: in a folder that everybody may write to, a known one could be taken before us.
            let path = std::env::temp_dir().join(format!("peergate-{:016x}", rand::random::<u64>()));
            DirBuilder::new().mode(0o700).create(&path).map_err(|error| Error::io("make", &path, error))?;
            Self { path, temporary: true }
        };
        create_private_dir(&directory.path, run_as)?;
        if let Some(user) = run_as {
            user.check_reach(&directory.path)?;
        }
        Ok(directory)
    }
}

impl Drop for SocketDir {
    fn drop(&mut self) {
        if self.temporary {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Makes a folder with mode 0700, if it is missing, and gives it to the user that Postgres runs as.
pub(super) fn create_private_dir(path: &Path, run_as: Option<&RunAs>) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::set_permissions(path, fs::Permissions::from_mode(0o700))
                .map_err(|error| Error::io("change the mode of", path, error))?;
        }
        other => other.map_err(|error| Error::io("make", path, error))?,
    }
    run_as.map_or(Ok(()), |user| user.own(path).map_err(|error| Error::io("change the owner of", path, error)))
}

pub(super) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", path, error)),
        _ => Ok(()),
    }
}

/// `pgdata.new` for `pgdata`: in the same folder, so that a rename is enough.
pub(super) fn sibling(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(extension);
    path.with_file_name(name)
}
