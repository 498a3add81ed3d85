//! The sessions that there are: what the console and the metrics show, and what KILL and cancel requests reach.
//!
//! A session's counters are written by its own thread only, so adding is a load and a store; whoever reads them from elsewhere may be
//! a moment late. Keys are the servers' own, so any gateway can pass any cancel request on; the map of them here serves sessions
//! on peers, and work that the gateway itself does for a session, of which no server knows.

#![allow(dead_code, reason = "the console and the metrics read it")]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::SystemTime;

use catalog::connect::Attempt;
use tokio::sync::{Notify, watch};

/// All sessions of a gateway, those that are still logging in included.
#[derive(Default)]
pub(crate) struct Registry {
    next: AtomicU64,
    count: AtomicUsize,
    sessions: Mutex<HashMap<u64, Arc<Entry>>>,
    keys: Mutex<HashMap<Vec<u8>, Arc<Entry>>>,
    ended: Notify,
    /// What sessions that have ended had counted.
    past: Counters,
}

/// What a session has counted. Bytes are the protocol's, without TLS.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Bytes that came from the client.
    pub(crate) received: Counter,
    /// Bytes that were sent to the client.
    pub(crate) sent: Counter,
    /// ReadyForQuery that say that no transaction is open: each ends one, or a statement that is one by itself.
    pub(crate) transactions: Counter,
    /// All ReadyForQuery: round trips as the client sees them.
    pub(crate) requests: Counter,
}

impl Counters {
    fn each(&self) -> [&Counter; 4] {
        [&self.received, &self.sent, &self.transactions, &self.requests]
    }

    fn add(&self, other: &Counters) {
        for (sum, more) in self.each().into_iter().zip(other.each()) {
            // Several threads end sessions.
            sum.0.fetch_add(more.get(), Ordering::Relaxed);
        }
    }
}

/// A number that one thread counts up and any may read.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    /// Adds; for the counter's own thread only.
    #[inline]
    pub(crate) fn add(&self, n: usize) {
        self.0.store(self.0.load(Ordering::Relaxed) + n as u64, Ordering::Relaxed);
    }

    /// Returns the number.
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a session is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The login is not through.
    Login,
    /// A request is being answered, or may be on its way.
    Active,
    /// Waiting for the client, outside of a transaction.
    Idle,
    /// Waiting for the client, in a transaction.
    InTransaction,
    /// Waiting for the client, in a transaction that has failed.
    InFailedTransaction,
}

impl State {
    /// Its name, as `pg_stat_activity` has it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            State::Login => "login",
            State::Active => "active",
            State::Idle => "idle",
            State::InTransaction => "idle in transaction",
            State::InFailedTransaction => "idle in transaction (aborted)",
        }
    }
}

/// Who a session is, once its first packet is read.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    /// The role it logs in as.
    pub(crate) user: String,
    /// The database, or peer, that it asked for.
    pub(crate) database: String,
    /// As given at start-up; empty if it was not.
    pub(crate) application_name: String,
    /// The TLS version between client and gateway; `None`: plain text.
    pub(crate) tls: Option<&'static str>,
}

/// The session on a server that a client's is relayed to.
pub(crate) struct Behind {
    /// The body of its BackendKeyData: process id, then secret.
    pub(crate) key: Vec<u8>,
    /// How that server is reached.
    pub(crate) attempt: Arc<Attempt>,
}

impl Behind {
    /// Returns the server's process id.
    pub(crate) fn pid(&self) -> Option<i32> {
        self.key.first_chunk().map(|pid| i32::from_be_bytes(*pid))
    }
}

/// A session.
pub(crate) struct Entry {
    /// Identifies it in this process, from 1.
    pub(crate) id: u64,
    /// Where the client is.
    pub(crate) client: SocketAddr,
    /// When it connected.
    pub(crate) began: SystemTime,
    /// What it has counted.
    pub(crate) counters: Counters,
    identity: OnceLock<Identity>,
    behind: OnceLock<Behind>,
    state: AtomicU8,
    killed: Notify,
    cancels: watch::Sender<u64>,
    /// The gateway itself is at work for it, and its server is not.
    at_work: AtomicBool,
}

impl Entry {
    /// Returns who it is, if its first packet has been read.
    pub(crate) fn identity(&self) -> Option<&Identity> {
        self.identity.get()
    }

    /// Says who it is.
    pub(crate) fn identify(&self, identity: Identity) {
        // A connection has one first packet.
        let _ = self.identity.set(identity);
    }

    /// Returns the session that it is relayed to, if it has got that far.
    pub(crate) fn behind(&self) -> Option<&Behind> {
        self.behind.get()
    }

    /// Returns what it is doing.
    pub(crate) fn state(&self) -> State {
        match self.state.load(Ordering::Relaxed) {
            b'I' => State::Idle,
            b'T' => State::InTransaction,
            b'E' => State::InFailedTransaction,
            b'L' => State::Login,
            _ => State::Active,
        }
    }

    /// Returns the transaction status of the ReadyForQuery that was the last word; 0 if something has been said since.
    #[inline]
    pub(crate) fn status(&self) -> u8 {
        self.state.load(Ordering::Relaxed)
    }

    /// Sets what [`Entry::status`] returns.
    #[inline]
    pub(crate) fn set_status(&self, status: u8) {
        self.state.store(status, Ordering::Relaxed);
    }

    /// Ends the session, with 57P01 if a word can be put in.
    pub(crate) fn kill(&self) {
        self.killed.notify_one();
    }

    /// Waits for [`Entry::kill`].
    pub(crate) async fn killed(&self) {
        self.killed.notified().await;
    }

    /// Cancels what the gateway itself is doing for the session, and returns whether it is doing anything. The server must not be told
    /// too: it is idle then, and would cancel whatever the session sends next.
    pub(crate) fn cancel_work(&self) -> bool {
        let at_work = self.at_work.load(Ordering::Acquire);
        if at_work {
            self.cancels.send_modify(|count| *count += 1);
        }
        at_work
    }

    /// Says that the gateway is at work for the session until what is returned is dropped. Cancel requests that came before are
    /// forgotten.
    pub(crate) fn begin_work(&self) -> Work<'_> {
        let work = Work { entry: self, cancels: self.cancels.subscribe() };
        self.at_work.store(true, Ordering::Release);
        work
    }
}

/// Something that the gateway does for a session, which the client may cancel.
pub(crate) struct Work<'a> {
    entry: &'a Entry,
    cancels: watch::Receiver<u64>,
}

impl Work<'_> {
    /// Waits until the client cancels it.
    pub(crate) async fn canceled(&mut self) {
        if self.cancels.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.entry.at_work.store(false, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here can be left half done by a panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    /// Counts a client that has connected, until its place is dropped.
    pub(crate) fn enter(self: &Arc<Self>, client: SocketAddr) -> Place {
        let before = self.count.fetch_add(1, Ordering::AcqRel);
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let entry = Arc::new(Entry {
            id,
            client,
            began: SystemTime::now(),
            counters: Counters::default(),
            identity: OnceLock::new(),
            behind: OnceLock::new(),
            state: AtomicU8::new(b'L'),
            killed: Notify::new(),
            cancels: watch::Sender::new(0),
            at_work: AtomicBool::new(false),
        });
        lock(&self.sessions).insert(id, entry.clone());
        Place { registry: self.clone(), entry, before }
    }

    /// Returns how many sessions there are.
    pub(crate) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Returns the sessions, the oldest first.
    pub(crate) fn sessions(&self) -> Vec<Arc<Entry>> {
        let mut sessions: Vec<_> = lock(&self.sessions).values().cloned().collect();
        sessions.sort_by_key(|entry| entry.id);
        sessions
    }

    /// Returns the session with that number.
    pub(crate) fn session(&self, id: u64) -> Option<Arc<Entry>> {
        lock(&self.sessions).get(&id).cloned()
    }

    /// Returns the session that a cancel request means.
    pub(crate) fn by_key(&self, key: &[u8]) -> Option<Arc<Entry>> {
        lock(&self.keys).get(key).cloned()
    }

    /// Returns how many sessions there have been, and what those that have ended had counted.
    pub(crate) fn past(&self) -> (u64, &Counters) {
        (self.next.load(Ordering::Relaxed), &self.past)
    }

    /// Waits until no session is left.
    pub(crate) async fn wait_until_empty(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            // Registered before the look, so that the last one's end is not missed.
            ended.as_mut().enable();
            if self.len() == 0 {
                return;
            }
            ended.await;
        }
    }
}

/// A session's place in the registry.
pub(crate) struct Place {
    registry: Arc<Registry>,
    /// The session.
    pub(crate) entry: Arc<Entry>,
    /// How many there were already.
    pub(crate) before: usize,
}

impl Place {
    /// Says which session on which server the client's is relayed to. `key` is the body of its BackendKeyData.
    pub(crate) fn relayed_to(&self, key: &[u8], attempt: Arc<Attempt>) {
        // One session has one server, which says its key once.
        if self.entry.behind.set(Behind { key: key.to_vec(), attempt }).is_ok() {
            lock(&self.registry.keys).insert(key.to_vec(), self.entry.clone());
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(behind) = self.entry.behind() {
            lock(&self.registry.keys).remove(&behind.key);
        }
        lock(&self.registry.sessions).remove(&self.entry.id);
        self.registry.past.add(&self.entry.counters);
        self.registry.count.fetch_sub(1, Ordering::AcqRel);
        self.registry.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_session_is_found_until_it_ends() {
        let registry = Arc::new(Registry::default());
        let place = registry.enter("127.0.0.1:1".parse().unwrap());
        assert_eq!((place.before, registry.len(), place.entry.state()), (0, 1, State::Login));
        place.entry.counters.sent.add(7);
        assert_eq!(registry.session(1).unwrap().counters.sent.get(), 7);
        assert!(registry.by_key(b"key").is_none());
        drop(place);
        assert!(registry.session(1).is_none());
        assert_eq!((registry.past().0, registry.past().1.sent.get()), (1, 7));
        registry.wait_until_empty().await;
    }

    #[tokio::test]
    async fn only_work_that_is_going_on_can_be_canceled() {
        let registry = Arc::new(Registry::default());
        let place = registry.enter("127.0.0.1:1".parse().unwrap());
        assert!(!place.entry.cancel_work());
        let mut work = place.entry.begin_work();
        assert!(tokio::time::timeout(std::time::Duration::from_millis(5), work.canceled()).await.is_err());
        assert!(place.entry.cancel_work());
        work.canceled().await;
        drop(work);
        assert!(!place.entry.cancel_work());
    }
}
