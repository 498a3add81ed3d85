//! Child processes that are Postgres programs: whose rights they run with, what ends them, what they wrote.
//!
//! It knows nothing of clusters; [`super::Cluster`] decides what to run and when to stop it.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid, User, getgrouplist, getpid, setgid, setgroups, setuid};

use super::{Error, Result};

/// The unprivileged user that Postgres runs as when this process is root.
#[derive(Clone, Debug)]
pub(super) struct RunAs {
    name: String,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl RunAs {
    /// The user `postgres`, else `nobody`; `None` when this process is not root and has nothing to drop.
    pub(super) fn for_children() -> Result<Option<Self>> {
        if !Uid::effective().is_root() {
            return Ok(None);
        }
        let find = |name| User::from_name(name).ok().flatten().filter(|user| !user.uid.is_root());
        let user = find("postgres").or_else(|| find("nobody")).ok_or(Error::NoUser)?;
        // Looked up here and not in the child: between fork and exec nothing may allocate or read /etc/group.
        let groups = CString::new(user.name.as_str())
            .ok()
            .and_then(|name| getgrouplist(&name, user.gid).ok())
            .unwrap_or_else(|| vec![user.gid]);
        Ok(Some(Self { name: user.name, uid: user.uid, gid: user.gid, groups }))
    }

    /// Gives `path`, and all that is in it, to the user. Does nothing to a tree whose top is already theirs.
    pub(super) fn own(&self, path: &Path) -> io::Result<()> {
        if fs::symlink_metadata(path)?.uid() == self.uid.as_raw() {
            return Ok(());
        }
        self.own_tree(path)
    }

    fn own_tree(&self, path: &Path) -> io::Result<()> {
        // Contents first: a run that is interrupted starts again, because the top is still somebody else's.
        if fs::symlink_metadata(path)?.is_dir() {
            for entry in fs::read_dir(path)? {
                self.own_tree(&entry?.path())?;
            }
        }
        lchown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))
    }

    /// Checks that the user may pass through every folder above `path`.
    ///
    /// # Errors
    /// [`Error::NotReachable`] naming the first folder that keeps them out. Without this check Postgres' own message
    /// would speak of a data directory that it cannot find.
    pub(super) fn check_reach(&self, path: &Path) -> Result<()> {
        let above: Vec<&Path> = path.ancestors().skip(1).collect();
        for directory in above.into_iter().rev() {
            let metadata = fs::metadata(directory).map_err(|error| Error::io("look at", directory, error))?;
            let bit = if metadata.uid() == self.uid.as_raw() {
                0o100
            } else if self.groups.iter().any(|group| group.as_raw() == metadata.gid()) {
                0o010
            } else {
                0o001
            };
            if metadata.mode() & bit == 0 {
                return Err(Error::NotReachable {
                    user: self.name.clone(),
                    directory: directory.to_path_buf(),
                    path: path.to_path_buf(),
                });
            }
        }
        Ok(())
    }
}

/// Makes `command` a Postgres program: in a process group of its own (so that Ctrl-C in the terminal is ours to handle),
/// with the rights of `run_as`, an environment without the user's `PG…` variables, and a death signal.
///
/// The kernel sends `death` when the *thread* that spawned the child ends, so the caller keeps that thread.
pub(super) fn prepare(command: &mut Command, run_as: Option<&RunAs>, death: Signal) {
    command.env_clear().env("LANG", "C").env("LC_ALL", "C").current_dir("/").process_group(0);
    for name in ["PATH", "TZ", "TMPDIR", "LD_LIBRARY_PATH"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    let run_as = run_as.cloned();
    let parent = getpid();
    // SAFETY: the closure runs between fork and exec and only makes system calls; all that it needs was allocated before.
    unsafe {
        command.pre_exec(move || {
            if let Some(user) = &run_as {
                setgroups(&user.groups)?;
                setgid(user.gid)?;
                setuid(user.uid)?;
            }
            die_with_parent(death, parent)
        });
    }
}

/// Has the kernel send SIGTERM to a child when the thread that spawns it ends, so that none is left when this process is killed.
///
/// The thread is the caller's to keep. Linux only; elsewhere it does nothing.
pub fn end_with_parent(command: &mut Command) {
    let parent = getpid();
    // SAFETY: as in `prepare`.
    unsafe {
        command.pre_exec(move || die_with_parent(Signal::SIGTERM, parent));
    }
}

/// Asks the kernel for `death` when the parent thread is gone. A change of credentials forgets the request, so this comes last.
#[cfg(target_os = "linux")]
fn die_with_parent(death: Signal, parent: Pid) -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(death)?;
    // The parent may have died before the request was made.
    if nix::unistd::getppid() == parent {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(nix::errno::Errno::ESRCH as i32))
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_death: Signal, _parent: Pid) -> io::Result<()> {
    Ok(())
}

/// A running child, with a thread of its own that waits for it.
///
/// The thread exists because the death signal is tied to it: were the child spawned from one of a runtime's threads, it
/// would be told to stop when that thread goes idle and is ended.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pid: Pid,
    exit: Arc<Exit>,
}

#[derive(Debug, Default)]
struct Exit {
    status: Mutex<Option<ExitStatus>>,
    changed: Condvar,
}

impl Exit {
    fn lock(&self) -> MutexGuard<'_, Option<ExitStatus>> {
        self.status.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Process {
    pub(super) fn spawn(mut command: Command) -> io::Result<Self> {
        let exit = Arc::new(Exit::default());
        let (sender, receiver) = mpsc::channel();
        let seen = Arc::clone(&exit);
        thread::Builder::new().name("postmaster".to_owned()).spawn(move || {
            let mut child = match command.spawn() {
                Ok(child) => child,
                Err(error) => {
                    let _ = sender.send(Err(error));
                    return;
                }
            };
            let _ = sender.send(Ok(Pid::from_raw(child.id() as i32)));
            wait_without_reaping(&child);
            // Reaped under the lock that `signal` holds: the pid cannot become somebody else's between its look and its kill.
            let mut status = seen.lock();
            *status = Some(child.wait().unwrap_or_default());
            seen.changed.notify_all();
        })?;
        let pid = receiver.recv().map_err(|_| io::Error::other("the thread that spawns the child is gone"))??;
        Ok(Self { pid, exit })
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid.as_raw() as u32
    }

    /// How it ended; `None` while it runs.
    pub(super) fn status(&self) -> Option<ExitStatus> {
        *self.exit.lock()
    }

    /// Sends `signal` unless it has ended.
    pub(super) fn signal(&self, signal: Signal) {
        let status = self.exit.lock();
        if status.is_none() {
            let _ = kill(self.pid, signal);
        }
    }

    /// Waits for its end, `timeout` at the most.
    pub(super) fn wait(&self, timeout: Duration) -> Option<ExitStatus> {
        let guard = self.exit.lock();
        let (status, _) = self
            .exit
            .changed
            .wait_timeout_while(guard, timeout, |status| status.is_none())
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        *status
    }
}

#[cfg(target_os = "linux")]
fn wait_without_reaping(child: &std::process::Child) {
    use nix::sys::wait::{Id, WaitPidFlag, waitid};
    while let Err(nix::errno::Errno::EINTR) =
        waitid(Id::Pid(Pid::from_raw(child.id() as i32)), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)
    {}
}

#[cfg(not(target_os = "linux"))]
fn wait_without_reaping(_child: &std::process::Child) {}

/// The processes that work in `data_dir`: a postmaster and its backends all change into it.
///
/// Empty where the system has no `/proc`; Postgres' own interlock then stands alone.
pub(super) fn processes_in(data_dir: &Path) -> Vec<Pid> {
    let Ok(data_dir) = data_dir.canonicalize() else { return Vec::new() };
    let works_there = |pid: i32| {
        let process = PathBuf::from(format!("/proc/{pid}"));
        fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == data_dir)
            && fs::read_link(process.join("exe"))
                .is_ok_and(|exe| exe.to_string_lossy().trim_end_matches(" (deleted)").ends_with("/postgres"))
    };
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| works_there(*pid))
        .map(Pid::from_raw)
        .collect()
}

/// Waits until `done` says so, `timeout` at the most; says whether it did.
pub(super) fn poll_until(timeout: Duration, mut done: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + timeout;
    while !done() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
    true
}
