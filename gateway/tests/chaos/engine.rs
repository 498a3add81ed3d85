//! Engines: processes of their own, as they are deployed.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, mpsc};

use catalog::cluster::end_with_parent;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A running `peergate serve --role engine`; killed when dropped.
pub(crate) struct Engine {
    pid: Pid,
    ended: Arc<Mutex<Option<ExitStatus>>>,
    waiting: Option<std::thread::JoinHandle<()>>,
}

impl Engine {
    /// Starts the process on its data directory, which is its identity; its log is added to `folder/log`.
    pub(crate) fn start(folder: &Path, catalog_url: &str, fail_points: Option<&str>) -> Engine {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peergate"));
        command.args(["serve", "--role", "engine", "--catalog", catalog_url, "--data-dir"]).arg(folder.join("data"));
        command.env("PEERGATE_KEY", "5a".repeat(32)).env("PEERGATE_LOG", "info");
        if let Some(points) = fail_points {
            command.env("PEERGATE_FAIL_POINTS", points);
        }
        let log = File::options().create(true).append(true).open(log_of(folder)).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let ended = Arc::new(Mutex::new(None));
        let (started, start) = mpsc::channel();
        let end = ended.clone();
        // The process ends with the thread that started it, which is there as long as the process.
        let waiting = std::thread::spawn(move || {
            end_with_parent(&mut command);
            let mut child = command.spawn().unwrap();
            started.send(child.id()).unwrap();
            *end.lock().unwrap() = Some(child.wait().unwrap());
        });
        let pid = Pid::from_raw(start.recv().unwrap().cast_signed());
        Engine { pid, ended, waiting: Some(waiting) }
    }

    /// Sends a signal, unless the process has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        if self.ended.lock().unwrap().is_none() {
            let _ = kill(self.pid, signal);
        }
    }

    /// How it ended; `None` while it runs.
    pub(crate) fn ended(&self) -> Option<ExitStatus> {
        *self.ended.lock().unwrap()
    }

    /// Ends it as `kill -9` does, and waits for that.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.signal(Signal::SIGKILL);
        if let Some(waiting) = self.waiting.take() {
            let _ = waiting.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
    }
}

/// Whether an engine ended as it was told to: by SIGTERM, by `kill -9`, or by a failure point.
pub(crate) fn is_expected(status: ExitStatus) -> bool {
    status.success()
        || status
            .signal()
            .is_some_and(|s| [Signal::SIGKILL as i32, Signal::SIGABRT as i32, Signal::SIGTERM as i32].contains(&s))
}

pub(crate) fn log_of(folder: &Path) -> PathBuf {
    folder.join("log")
}
