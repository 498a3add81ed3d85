//! What the tests share: the binary under test, running servers, folders that go away, and a turn at the machine.

use std::env;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use catalog::cluster::Binaries;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a server may take to start or stop, and a case or client to run.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// Waits until no other test of this binary runs: each is parallel in itself, and its deadlines are for a machine of its own.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The binary under test: `PEERGATE_BIN`, else it is built.
pub(crate) fn binary() -> PathBuf {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT
        .get_or_init(|| {
            if let Some(path) = env::var_os("PEERGATE_BIN") {
                return PathBuf::from(path);
            }
            let build = ["build", "--quiet", "-p", "gateway", "--bin", "peergate"];
            let status = Command::new(env!("CARGO")).args(build).status().unwrap();
            assert!(status.success(), "cannot build peergate");
            target_folder().join("debug/peergate")
        })
        .clone()
}

/// Where builds go, and what `scripts/setup.sh tests` installs.
pub(crate) fn target_folder() -> PathBuf {
    // This test is target/debug/deps/main-….
    env::current_exe().unwrap().ancestors().nth(3).unwrap().to_owned()
}

/// A running `peergate serve`; killed when dropped without a stop.
pub(crate) struct Server {
    child: Child,
    /// Where it listens, as `host:port`.
    pub(crate) address: String,
}

impl Server {
    /// Starts it on a free port, with its log in a file, and waits until it takes connections.
    pub(crate) fn start(binary: &Path, data_dir: &Path, log: &Path, options: &[&str]) -> Self {
        let mut child = Command::new(binary)
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(data_dir)
            .args(options)
            .env_remove("PEERGATE_PASSWORD")
            .env_remove("PEERGATE_CATALOG")
            .env_remove("PEERGATE_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(log).unwrap())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some(address) = line.strip_prefix("peergate is ready on ") {
                    let _ = sender.send(address.to_owned());
                }
            }
        });
        let mut server = Self { child, address: String::new() };
        match receiver.recv_timeout(DEADLINE) {
            Ok(address) => server.address = address,
            Err(_) => panic!("peergate is not ready; its log:\n{}", fs::read_to_string(log).unwrap_or_default()),
        }
        server
    }

    /// The port it listens on.
    pub(crate) fn port(&self) -> u16 {
        self.address.rsplit_once(':').unwrap().1.parse().unwrap()
    }

    /// Stops it by SIGTERM, as an operator would.
    pub(crate) fn stop(mut self) -> Result<(), String> {
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        if !ends(&mut self.child, DEADLINE) {
            return Err("peergate did not end in time".to_owned());
        }
        let status = self.child.wait().unwrap();
        if status.success() { Ok(()) } else { Err(format!("peergate ended with {status}")) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The warnings and errors in a server's log, but those with one of the allowed texts.
pub(crate) fn unexpected_in(log: &Path, allowed: &[&str]) -> Vec<String> {
    fs::read_to_string(log)
        .unwrap()
        .lines()
        .filter(|line| line.contains(" WARN ") || line.contains(" ERROR "))
        .filter(|line| !allowed.iter().any(|text| line.contains(text)))
        .map(|line| format!("unexpected in the server's log: {line}"))
        .collect()
}

/// A folder for one test, removed at the end.
pub(crate) struct Scratch(pub(crate) PathBuf);

impl Scratch {
    /// Makes it.
    pub(crate) fn new() -> Self {
        let path = env::temp_dir().join(format!("peergate-sql-{:08x}", rand::random::<u32>()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A command without the variables that lead Postgres' programs somewhere.
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("PG")) {
        command.env_remove(name);
    }
    command
}

/// The psql of the server under test.
pub(crate) fn psql() -> PathBuf {
    Binaries::find(None).unwrap().tool("psql").unwrap()
}

/// Whether a process ends within `timeout`.
pub(crate) fn ends(child: &mut Child, timeout: Duration) -> bool {
    let deadline = Instant::now() + timeout;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            return false;
        }
        thread::park_timeout(Duration::from_millis(5));
    }
    true
}
