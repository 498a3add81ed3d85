//! A private Postgres cluster on this machine: made, started, watched and stopped by this process.
//!
//! The embedded catalog, the demo and the tests are built on it. It is not for clusters that somebody else runs, and it
//! knows nothing of catalogs. Everything here blocks; call it from a blocking thread.

mod binaries;
mod error;
mod files;
mod options;
mod process;
mod supervisor;
mod testing;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

pub use self::binaries::Binaries;
pub use self::error::{Error, Result};
use self::files::{
    PasswordFile, SocketDir, create_private_dir, log_tail, open_log, remove_tree, sibling, write_private_file,
};
pub use self::options::{ClusterOptions, ConnInfo, Listen, StopMode};
pub use self::process::end_with_parent;
use self::process::{Process, RunAs, poll_until, prepare, processes_in};
pub use self::supervisor::Supervisor;
pub use self::testing::TestCluster;

/// The port in the name of a socket when there is no TCP port.
const SOCKET_PORT: u16 = 5432;

/// How long a stop in the asked mode may take before the next harder one is tried.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// How long processes that a killed postmaster left behind may take to notice and end.
const LEFTOVER_TIMEOUT: Duration = Duration::from_secs(30);

/// File in the data directory with our settings. Rewritten at each start.
const SETTINGS_FILE: &str = "peergate.conf";

/// File in the data directory that the server logs to.
const LOG_FILE: &str = "postgres.log";

/// A running private cluster, stopped when it is dropped.
///
/// While it exists it holds a lock on the data directory, so that no two processes of ours run one cluster.
#[derive(Debug)]
pub struct Cluster {
    binaries: Binaries,
    options: ClusterOptions,
    run_as: Option<RunAs>,
    socket_dir: SocketDir,
    postmaster: Process,
    _lock: Flock<File>,
}

impl Cluster {
    /// Makes a cluster in `options.data_dir` unless there is one, and says whether it did.
    ///
    /// It is made beside its place and renamed when it is complete: whatever kills `initdb` leaves no half a cluster.
    /// UTF-8, collation C.UTF-8 where the system has it (else C), data checksums, SCRAM if there is a password.
    ///
    /// # Errors
    /// [`Error::NotEmpty`] if there are other files in that place; [`Error::NotReachable`] and [`Error::NoUser`] when
    /// this process is root; [`Error::Failed`] with what `initdb` said.
    pub fn init(binaries: &Binaries, options: &ClusterOptions) -> Result<bool> {
        let data_dir = &options.data_dir;
        if binaries::data_major(data_dir).is_some() {
            return Ok(false);
        }
        if fs::read_dir(data_dir).is_ok_and(|mut entries| entries.next().is_some()) {
            return Err(Error::NotEmpty { data_dir: data_dir.clone() });
        }
        let run_as = RunAs::for_children()?;
        if let Some(user) = &run_as {
            user.check_reach(data_dir)?;
        }
        let unfinished = sibling(data_dir, "new");
        remove_tree(&unfinished)?;
        create_private_dir(&unfinished, run_as.as_ref())?;
        let password_file = options
            .password
            .as_deref()
            .map(|password| PasswordFile::write(sibling(data_dir, "pw"), password, run_as.as_ref()))
            .transpose()?;
        let mut result = initdb(binaries, options, &unfinished, password_file.as_ref(), run_as.as_ref(), "C.UTF-8");
        if matches!(&result, Err(Error::Failed { output, .. }) if output.contains("invalid locale")) {
            result = initdb(binaries, options, &unfinished, password_file.as_ref(), run_as.as_ref(), "C");
        }
        if let Err(error) = result {
            remove_tree(&unfinished)?;
            return Err(error);
        }
        let configuration = unfinished.join("postgresql.conf");
        OpenOptions::new()
            .append(true)
            .open(&configuration)
            .and_then(|mut file| {
                file.write_all(format!("\ninclude_if_exists = '{SETTINGS_FILE}'\n").as_bytes())
                    .and_then(|()| file.sync_all())
            })
            .map_err(|error| Error::io("write", &configuration, error))?;
        fs::rename(&unfinished, data_dir).map_err(|error| Error::io("rename a new cluster to", data_dir, error))?;
        if let Some(parent) = data_dir.parent() {
            File::open(parent)
                .and_then(|folder| folder.sync_all())
                .map_err(|error| Error::io("write", parent, error))?;
        }
        Ok(true)
    }

    /// Starts the server of a cluster that [`Cluster::init`] made, and waits until it takes connections.
    ///
    /// What a killed process left behind is dealt with first: its postmaster, if it still runs, is stopped, its
    /// backends are waited for, and a `postmaster.pid` that means nobody, or an unrelated process, is removed.
    /// As root the server runs as `postgres` or `nobody`, and the data and socket folders are given to that user.
    ///
    /// # Errors
    /// [`Error::InUse`] if another [`Cluster`] of that directory lives; [`Error::WrongMajor`]; [`Error::Ended`] with the
    /// end of the server's log; [`Error::TimedOut`] after `options.start_timeout`.
    pub fn start(binaries: &Binaries, options: ClusterOptions) -> Result<Self> {
        let data_dir = &options.data_dir;
        check_major(binaries, data_dir)?;
        let lock = lock(data_dir)?;
        let run_as = RunAs::for_children()?;
        if let Some(user) = &run_as {
            user.check_reach(data_dir)?;
            user.own(data_dir).map_err(|error| Error::io("change the owner of", data_dir, error))?;
        }
        let socket_dir = SocketDir::prepare(&options, run_as.as_ref())?;
        stop_leftovers(data_dir)?;
        let postmaster = launch(binaries, &options, &socket_dir, run_as.as_ref())?;
        Ok(Self { binaries: binaries.clone(), options, run_as, socket_dir, postmaster, _lock: lock })
    }

    /// Runs `sql`, one statement per line, as the superuser on a cluster that is not running, in single-user mode.
    ///
    /// It asks for no password, so it is the way in when the password is lost.
    ///
    /// # Errors
    /// As [`Cluster::start`], and [`Error::Failed`] if the server ends badly or reports an error in a statement.
    pub fn run_single_user(binaries: &Binaries, data_dir: &Path, database: &str, sql: &str) -> Result<()> {
        check_major(binaries, data_dir)?;
        let _lock = lock(data_dir)?;
        let run_as = RunAs::for_children()?;
        stop_leftovers(data_dir)?;
        let program = binaries.directory().join("postgres");
        let mut command = Command::new(&program);
        command.arg("--single").arg("-D").arg(data_dir).args([
            "-c",
            "exit_on_error=true",
            "-c",
            "log_statement=none",
            database,
        ]);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        prepare(&mut command, run_as.as_ref(), Signal::SIGTERM);
        let mut child = command.spawn().map_err(|error| Error::io("run", &program, error))?;
        let written = child.stdin.take().map(|mut input| input.write_all(format!("{sql}\n").as_bytes()));
        let output = child.wait_with_output().map_err(|error| Error::io("wait for", &program, error))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success()
            || said.contains("ERROR:")
            || said.contains("FATAL:")
            || !matches!(written, Some(Ok(())))
        {
            return Err(Error::Failed { program: "postgres --single", status: output.status, output: said });
        }
        Ok(())
    }

    /// Where it takes connections.
    pub fn conninfo(&self) -> ConnInfo {
        let (host, port) = match self.options.listen {
            Listen::SocketOnly => (self.socket_dir.path.to_string_lossy().into_owned(), SOCKET_PORT),
            Listen::Loopback { port } => ("127.0.0.1".to_owned(), port),
        };
        ConnInfo { host, port, user: self.options.superuser.clone() }
    }

    /// The folder of its Unix socket. The temporary folder stands in when the path asked for is too long for a socket.
    pub fn socket_dir(&self) -> &Path {
        &self.socket_dir.path
    }

    /// Where its data is.
    pub fn data_dir(&self) -> &Path {
        &self.options.data_dir
    }

    /// The server programs that it runs on.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// The process id of its postmaster, which may have ended.
    pub fn pid(&self) -> u32 {
        self.postmaster.pid()
    }

    /// How its postmaster ended; `None` while it runs.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.postmaster.status()
    }

    /// Stops the server, and comes back when it has ended; harder after 30 s, and killed in the end.
    ///
    /// A server that has already ended is left alone.
    pub fn stop(&mut self, mode: StopMode) {
        let signals: &[Signal] = match mode {
            StopMode::Fast => &[Signal::SIGINT, Signal::SIGQUIT, Signal::SIGKILL],
            StopMode::Immediate => &[Signal::SIGQUIT, Signal::SIGKILL],
        };
        for signal in signals {
            self.postmaster.signal(*signal);
            if self.postmaster.wait(STOP_TIMEOUT).is_some() {
                return;
            }
            tracing::warn!(pid = self.pid(), signal = signal.as_str(), "postgres did not stop in time");
        }
    }

    /// Kills the postmaster with SIGKILL, as a test of what a crash leaves behind, and waits for its end.
    pub fn kill(&mut self) {
        self.postmaster.signal(Signal::SIGKILL);
        self.postmaster.wait(STOP_TIMEOUT);
    }

    /// Starts the server again; stops it (fast) first if it runs.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.stop(StopMode::Fast);
        stop_leftovers(&self.options.data_dir)?;
        self.postmaster = launch(&self.binaries, &self.options, &self.socket_dir, self.run_as.as_ref())?;
        Ok(())
    }

    /// Hands the cluster to a thread that starts its server again, with growing pauses, whenever it ends.
    pub fn supervise(self) -> Supervisor {
        Supervisor::new(self)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop(StopMode::Fast);
    }
}

/// A TCP port on 127.0.0.1 that nobody listens on right now.
///
/// # Errors
/// [`Error::Io`] if the system gives none.
pub fn free_port() -> Result<u16> {
    TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|error| Error::io("find a free port on", Path::new("127.0.0.1"), error))
}

/// The major version of the cluster in `data_dir`; `None` if there is none.
pub fn major_of(data_dir: &Path) -> Option<u32> {
    binaries::data_major(data_dir)
}

fn check_major(binaries: &Binaries, data_dir: &Path) -> Result<()> {
    match binaries::data_major(data_dir) {
        Some(cluster) if cluster == binaries.major() => Ok(()),
        Some(cluster) => Err(Error::WrongMajor { data_dir: data_dir.to_path_buf(), cluster, server: binaries.major() }),
        None => Err(Error::io("find a cluster in", data_dir, io::ErrorKind::NotFound.into())),
    }
}

/// Locks the directory itself: no file to leave behind, and the kernel lets go when this process ends, however it ends.
fn lock(data_dir: &Path) -> Result<Flock<File>> {
    let directory = File::open(data_dir).map_err(|error| Error::io("open", data_dir, error))?;
    Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => Error::InUse {
            data_dir: data_dir.to_path_buf(),
            pid: recorded_pid(data_dir).map(|pid| pid.as_raw() as u32),
        },
        other => Error::io("lock", data_dir, other.into()),
    })
}

fn recorded_pid(data_dir: &Path) -> Option<Pid> {
    fs::read_to_string(data_dir.join("postmaster.pid")).ok()?.lines().next()?.trim().parse().ok().map(Pid::from_raw)
}

/// Ends what a killed process left running in `data_dir`. The caller holds the lock, so no living process wants it.
fn stop_leftovers(data_dir: &Path) -> Result<()> {
    let recorded = recorded_pid(data_dir);
    if let Some(postmaster) = recorded.filter(|pid| processes_in(data_dir).contains(pid)) {
        tracing::warn!(pid = postmaster.as_raw(), data_dir = %data_dir.display(), "stopping a postmaster that an earlier process left running");
        // Fast, then immediate. What is stopped is looked up anew before each signal: pids are used again.
        for signal in [Signal::SIGINT, Signal::SIGQUIT] {
            if processes_in(data_dir).contains(&postmaster) {
                let _ = kill(postmaster, signal);
            }
            if poll_until(STOP_TIMEOUT, || !processes_in(data_dir).contains(&postmaster)) {
                break;
            }
        }
    }
    if !poll_until(LEFTOVER_TIMEOUT, || processes_in(data_dir).is_empty()) {
        return Err(Error::TimedOut { data_dir: data_dir.to_path_buf(), waited: LEFTOVER_TIMEOUT });
    }
    // Nobody works there any more. Postgres would remove the file itself, unless its pid is by now that of an unrelated
    // process of the same user; where there is no /proc to tell, the decision stays with Postgres.
    let pid_file = data_dir.join("postmaster.pid");
    if cfg!(target_os = "linux") && pid_file.exists() {
        fs::remove_file(&pid_file).map_err(|error| Error::io("remove", &pid_file, error))?;
    }
    Ok(())
}

fn launch(
    binaries: &Binaries,
    options: &ClusterOptions,
    socket_dir: &SocketDir,
    run_as: Option<&RunAs>,
) -> Result<Process> {
    let data_dir = &options.data_dir;
    write_settings(options, run_as)?;
    let log_path = data_dir.join(LOG_FILE);
    let log = open_log(&log_path, run_as).map_err(|error| Error::io("open", &log_path, error))?;
    let log_start = log.metadata().map(|metadata| metadata.len()).unwrap_or_default();
    let (addresses, port) = match options.listen {
        Listen::SocketOnly => ("", SOCKET_PORT),
        Listen::Loopback { port } => ("127.0.0.1", port),
    };
    let program = binaries.directory().join("postgres");
    let mut command = Command::new(&program);
    // On the command line, so that neither a file nor ALTER SYSTEM can move the server away from where we look for it.
    command
        .arg("-D")
        .arg(data_dir)
        .arg("-p")
        .arg(port.to_string())
        .arg("-c")
        .arg(format!("listen_addresses={addresses}"));
    command.arg("-c").arg(format!("unix_socket_directories={}", socket_dir.path.display()));
    command.args(["-c", "logging_collector=off", "-c", "log_destination=stderr"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    // Should this process be killed, the postmaster gets SIGINT: a fast shutdown, which ends the sessions (their clients
    // were ours), writes a checkpoint and so spares the next start a recovery. SIGTERM would wait for sessions for ever,
    // and SIGKILL would leave backends running.
    prepare(&mut command, run_as, Signal::SIGINT);
    let postmaster = Process::spawn(command).map_err(|error| Error::io("run", &program, error))?;
    let ready =
        poll_until(options.start_timeout, || postmaster.status().is_some() || is_ready(data_dir, postmaster.pid()));
    if let Some(status) = postmaster.status() {
        return Err(Error::Ended { status, log: log_tail(&log_path, log_start) });
    }
    if !ready {
        postmaster.signal(Signal::SIGQUIT);
        if postmaster.wait(STOP_TIMEOUT).is_none() {
            postmaster.signal(Signal::SIGKILL);
        }
        return Err(Error::TimedOut { data_dir: data_dir.clone(), waited: options.start_timeout });
    }
    tracing::debug!(pid = postmaster.pid(), data_dir = %data_dir.display(), "postgres started");
    Ok(postmaster)
}

/// Whether the postmaster `pid` says in its file that it takes connections, as `pg_ctl --wait` finds out.
///
/// Source: PostgreSQL's `utils/pidfile.h`: line 1 is the pid, line 8 the status.
fn is_ready(data_dir: &Path, pid: u32) -> bool {
    let Ok(content) = fs::read_to_string(data_dir.join("postmaster.pid")) else { return false };
    let mut lines = content.lines();
    lines.next().and_then(|line| line.trim().parse().ok()) == Some(pid)
        && lines.nth(6).is_some_and(|status| status.starts_with("ready"))
}

fn write_settings(options: &ClusterOptions, run_as: Option<&RunAs>) -> Result<()> {
    let mut text = String::from("# Written by peergate at each start. Use ALTER SYSTEM to override a setting.\n");
    if !options.durable {
        // Nothing more: with synchronous_commit or full_page_writes off, even a kill of the server would lose data.
        text.push_str("fsync = 'off'\n");
    }
    for (name, value) in &options.settings {
        text.push_str(&format!("{name} = '{}'\n", value.replace('\'', "''")));
    }
    let path = options.data_dir.join(SETTINGS_FILE);
    let written = write_private_file(&path, &text, run_as);
    written.map_err(|error| Error::io("write", &path, error))
}

fn initdb(
    binaries: &Binaries,
    options: &ClusterOptions,
    directory: &Path,
    password: Option<&PasswordFile>,
    run_as: Option<&RunAs>,
    locale: &str,
) -> Result<()> {
    let program = binaries.directory().join("initdb");
    let mut command = Command::new(&program);
    command.arg("-D").arg(directory).arg("-U").arg(&options.superuser);
    command.args(["--encoding=UTF8", "--lc-messages=C", "--data-checksums"]).arg(format!("--locale={locale}"));
    match password {
        Some(file) => command.arg("--auth=scram-sha-256").arg("--pwfile").arg(&file.0),
        None => command.arg("--auth=trust"),
    };
    if !options.durable {
        command.arg("--no-sync");
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    prepare(&mut command, run_as, Signal::SIGTERM);
    let output = command.output().map_err(|error| Error::io("run", &program, error))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Failed {
        program: "initdb",
        status: output.status,
        output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}
