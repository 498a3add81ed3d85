//! Cancel requests. They go to the catalog's server as they came; keys are that server's own, so any gateway can pass any on.
//!
//! The map of keys here serves only what the gateway does itself for a session, which that server knows nothing of.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Process id and secret of a backing session, as in BackendKeyData and CancelRequest.
type Key = Vec<u8>;

/// The sessions that can be cancelled, by their keys.
#[derive(Default)]
pub(crate) struct Cancels {
    sessions: Mutex<HashMap<Key, Entry>>,
}

/// What is known of a session.
struct Entry {
    requests: watch::Sender<u64>,
    /// The gateway itself is at work for it, and its server is not.
    at_work: bool,
}

/// Hears of cancel requests for one session. Dropped, the session is forgotten.
pub(crate) struct Cancelled {
    key: Key,
    owner: Arc<dyn AsCancels + Send + Sync>,
    count: watch::Receiver<u64>,
}

/// What holds the map; lets [`Cancelled`] own it.
pub(crate) trait AsCancels {
    /// The map.
    fn cancels(&self) -> &Cancels;
}

impl Cancels {
    fn map(&self) -> std::sync::MutexGuard<'_, HashMap<Key, Entry>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the session with that key, if the gateway is at work for it, and returns whether it was. The server must not be told too:
    /// it is idle then, and would cancel whatever the session sends next.
    pub(crate) fn cancel(&self, key: &[u8]) -> bool {
        match self.map().get(key) {
            Some(session) if session.at_work => {
                session.requests.send_modify(|count| *count += 1);
                true
            }
            _ => false,
        }
    }
}

impl Cancelled {
    /// Registers a session by the body of its BackendKeyData.
    pub(crate) fn new<T: AsCancels + Send + Sync + 'static>(owner: Arc<T>, key: &[u8]) -> Cancelled {
        let (sender, count) = watch::channel(0);
        owner.cancels().map().insert(key.to_vec(), Entry { requests: sender, at_work: false });
        Cancelled { key: key.to_vec(), owner, count }
    }

    /// Says that the gateway is at work for the session, or no more. Requests that came before are forgotten.
    pub(crate) fn at_work(&mut self, at_work: bool) {
        if let Some(session) = self.owner.cancels().map().get_mut(&self.key) {
            session.at_work = at_work;
        }
        self.count.mark_unchanged();
    }

    /// Waits for a request.
    pub(crate) async fn wait(&mut self) {
        if self.count.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Cancelled {
    fn drop(&mut self) {
        self.owner.cancels().map().remove(&self.key);
    }
}
