//! The sessions that there are: what the console and the metrics show, and what KILL and cancel requests reach.
//!
//! A session's counters are written by its own thread only, so adding is a load and a store; whoever reads them from elsewhere may be
//! a moment late. Keys are the servers' own, so any gateway can pass any cancel request on; the map of them here serves sessions
//! on peers, and work that the gateway itself does for a session, of which no server knows.

use std::collections::{BTreeMap, HashMap};
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
    /// Those of the sessions that are consoles.
    consoles: AtomicUsize,
    sessions: Mutex<Sessions>,
    keys: Mutex<HashMap<Vec<u8>, Arc<Entry>>>,
    ended: Notify,
}

/// The sessions that are there, and what those that are not had counted: under one lock, so that nothing is counted twice or not at
/// all.
#[derive(Default)]
struct Sessions {
    entries: HashMap<u64, Arc<Entry>>,
    past: Totals,
    /// By database, of those that got that far: a name that a client only asked for is not kept.
    past_by_database: BTreeMap<String, Totals>,
}

/// All sessions at one moment.
pub(crate) struct Census {
    /// The sessions, the oldest first.
    pub(crate) sessions: Vec<Arc<Entry>>,
    /// How many there have been, these included.
    pub(crate) connections: u64,
    /// What all sessions have counted so far.
    pub(crate) totals: Totals,
    /// That, by database or peer, of those that got that far.
    pub(crate) by_database: BTreeMap<String, Totals>,
}

/// What has been counted, at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    /// Bytes that came from clients.
    pub(crate) received: u64,
    /// Bytes that were sent to clients.
    pub(crate) sent: u64,
    /// Transactions that have ended.
    pub(crate) transactions: u64,
    /// Requests that were answered.
    pub(crate) requests: u64,
}

impl Totals {
    fn add(&mut self, other: Totals) {
        self.received += other.received;
        self.sent += other.sent;
        self.transactions += other.transactions;
        self.requests += other.requests;
    }
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
    /// Returns what has been counted so far.
    pub(crate) fn totals(&self) -> Totals {
        Totals {
            received: self.received.get(),
            sent: self.sent.get(),
            transactions: self.transactions.get(),
            requests: self.requests.get(),
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
    /// All of them.
    pub(crate) const ALL: [State; 5] =
        [State::Login, State::Active, State::Idle, State::InTransaction, State::InFailedTransaction];

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
    is_console: AtomicBool,
}

impl Entry {
    /// Returns the database or peer that it has a session on; `None` if it has not got that far.
    pub(crate) fn database(&self) -> Option<&str> {
        self.behind()?;
        self.identity().map(|identity| identity.database.as_str())
    }

    /// Returns whether it is a console's.
    pub(crate) fn is_console(&self) -> bool {
        self.is_console.load(Ordering::Acquire)
    }

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
            is_console: AtomicBool::new(false),
        });
        lock(&self.sessions).entries.insert(id, entry.clone());
        Place { registry: self.clone(), entry, before }
    }

    /// Returns how many sessions there are.
    pub(crate) fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Returns how many of the sessions are consoles.
    pub(crate) fn consoles(&self) -> usize {
        self.consoles.load(Ordering::Acquire)
    }

    /// Counts everything.
    pub(crate) fn census(&self) -> Census {
        let sessions = lock(&self.sessions);
        let mut entries: Vec<_> = sessions.entries.values().cloned().collect();
        let (mut totals, mut by_database) = (sessions.past, sessions.past_by_database.clone());
        for entry in &entries {
            totals.add(entry.counters.totals());
            if let Some(database) = entry.database() {
                by_database.entry(database.to_owned()).or_default().add(entry.counters.totals());
            }
        }
        drop(sessions);
        entries.sort_by_key(|entry| entry.id);
        Census { sessions: entries, connections: self.next.load(Ordering::Relaxed), totals, by_database }
    }

    /// Returns the session with that number.
    pub(crate) fn session(&self, id: u64) -> Option<Arc<Entry>> {
        lock(&self.sessions).entries.get(&id).cloned()
    }

    /// Returns the session that a cancel request means.
    pub(crate) fn by_key(&self, key: &[u8]) -> Option<Arc<Entry>> {
        lock(&self.keys).get(key).cloned()
    }

    /// Waits until no session is left.
    pub(crate) async fn wait_until_empty(&self) {
        self.wait_until(|| self.len() == 0).await;
    }

    /// Waits until no session is left but those of consoles.
    pub(crate) async fn wait_for_consoles_only(&self) {
        self.wait_until(|| self.len() <= self.consoles()).await;
    }

    async fn wait_until(&self, come: impl Fn() -> bool) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            // Registered before the look, so that the last one's end is not missed.
            ended.as_mut().enable();
            if come() {
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
    /// Says that the session is a console's: a shutdown does not wait for it.
    pub(crate) fn becomes_console(&self) {
        if !self.entry.is_console.swap(true, Ordering::AcqRel) {
            self.registry.consoles.fetch_add(1, Ordering::AcqRel);
            self.registry.ended.notify_waiters();
        }
    }

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
        let mut sessions = lock(&self.registry.sessions);
        sessions.entries.remove(&self.entry.id);
        sessions.past.add(self.entry.counters.totals());
        if let Some(database) = self.entry.database() {
            sessions.past_by_database.entry(database.to_owned()).or_default().add(self.entry.counters.totals());
        }
        drop(sessions);
        if self.entry.is_console() {
            self.registry.consoles.fetch_sub(1, Ordering::AcqRel);
        }
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
        let census = registry.census();
        assert_eq!((census.sessions.len(), census.connections, census.totals.sent), (0, 1, 7));
        assert!(census.by_database.is_empty());
        registry.wait_until_empty().await;
    }

    #[tokio::test]
    async fn consoles_are_not_waited_for() {
        let registry = Arc::new(Registry::default());
        let (console, session) =
            (registry.enter("127.0.0.1:1".parse().unwrap()), registry.enter("127.0.0.1:2".parse().unwrap()));
        console.becomes_console();
        let waits = registry.wait_for_consoles_only();
        tokio::pin!(waits);
        assert!(tokio::time::timeout(std::time::Duration::from_millis(5), &mut waits).await.is_err());
        drop(session);
        waits.await;
        assert_eq!(registry.len(), 1);
        drop(console);
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
