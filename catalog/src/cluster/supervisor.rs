//! Watches a cluster's server and starts it again when it ends without being told to.
//!
//! A backend that crashes is not its business: the postmaster sees to that itself.

use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Cluster, ConnInfo, StopMode};

/// Pause before the first restart; each further one takes twice as long.
const BACKOFF_MIN: Duration = Duration::from_millis(100);

/// Longest pause between restarts.
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// A server that has run this long is taken to be well: the next restart is quick again.
const WELL_AFTER: Duration = Duration::from_secs(60);

/// A cluster whose server is started again whenever it ends; stopped when dropped.
#[derive(Debug)]
pub struct Supervisor {
    shared: Arc<Shared>,
    conninfo: ConnInfo,
    thread: Option<JoinHandle<Cluster>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    stopping: bool,
    pid: u32,
    restarts: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits for `timeout`, less if it is told to stop; says whether it was.
    fn pause(&self, timeout: Duration) -> bool {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.lock(), timeout, |state| !state.stopping)
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        state.stopping
    }
}

impl Supervisor {
    pub(super) fn new(cluster: Cluster) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State { stopping: false, pid: cluster.pid(), restarts: 0 }),
            changed: Condvar::new(),
        });
        let conninfo = cluster.conninfo();
        let watched = Arc::clone(&shared);
        Self { shared, conninfo, thread: Some(thread::spawn(move || watch(cluster, &watched))) }
    }

    /// Where the cluster takes connections; the same after a restart.
    pub fn conninfo(&self) -> &ConnInfo {
        &self.conninfo
    }

    /// The process id of the postmaster that was started last.
    pub fn pid(&self) -> u32 {
        self.shared.lock().pid
    }

    /// How many times the server had to be started again.
    pub fn restarts(&self) -> u64 {
        self.shared.lock().restarts
    }

    /// Stops watching, stops the server, and gives the cluster back.
    pub fn stop(mut self, mode: StopMode) -> Option<Cluster> {
        let mut cluster = self.end_watch()?;
        cluster.stop(mode);
        Some(cluster)
    }

    fn end_watch(&mut self) -> Option<Cluster> {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_all();
        self.thread.take()?.join().ok()
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        // The cluster stops its server when it is dropped.
        drop(self.end_watch());
    }
}

fn watch(mut cluster: Cluster, shared: &Shared) -> Cluster {
    let mut backoff = BACKOFF_MIN;
    let mut started = Instant::now();
    // The postmaster's end is noticed within this time; there is nothing to wait on that both it and a stop would wake.
    while !shared.pause(Duration::from_millis(50)) {
        let Some(status) = cluster.ended() else { continue };
        if started.elapsed() > WELL_AFTER {
            backoff = BACKOFF_MIN;
        }
        tracing::warn!(%status, data_dir = %cluster.data_dir().display(), "postgres ended by itself, starting it again");
        if shared.pause(backoff) {
            break;
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
        match cluster.restart() {
            Ok(()) => {
                let mut state = shared.lock();
                state.pid = cluster.pid();
                state.restarts += 1;
                started = Instant::now();
            }
            Err(error) => {
                tracing::error!(error = %error, source = ?std::error::Error::source(&error), "postgres cannot be started again")
            }
        }
    }
    cluster
}
