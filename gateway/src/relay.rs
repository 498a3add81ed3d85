//! The two pumps of a session, each in a task of its own: it wakes for what concerns it and nothing else. Each reads, walks from header to
//! header, writes, and only then reads again: whoever is slow slows the other down, and no more than a buffer is held for each
//! direction.
//!
//! Runs of frames go on untouched and frames of any size are streamed. Only those that may be ours are held whole. What becomes
//! of them is for `intercept` to say.

mod client;
mod cut;
mod server;

use std::cell::{Cell, RefCell};

use tokio::sync::Notify;

use crate::error::Fatal;
use crate::execute::PeerSessions;
use crate::intercept::Interceptor;
use crate::registry::Entry;
use crate::session::Session;

/// The version of a directory that has never been looked at.
const NEVER: u64 = u64::MAX;

/// A frame that should be seen whole but is larger goes on unseen.
const INSPECT_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Why a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The client is gone, or said goodbye.
    Client,
    /// The server closed, after it said why or because the client had said goodbye.
    Server,
    /// The gateway ends it.
    Fatal(Fatal),
}

/// What both pumps know.
pub(crate) struct Relay {
    session: Session,
    interceptor: RefCell<Interceptor>,
    /// The sessions on peers that EXECUTE has opened.
    peer_sessions: PeerSessions,
    /// Which state of the directory of peers the interceptor has; 0: it has to be asked for anew.
    peers_version: Cell<u64>,
    /// They have been looked up for the message that comes now.
    looked_up: Cell<bool>,
    /// What holds the client's messages back may be over.
    let_go: Notify,
    /// Somebody waits for that.
    awaits_let_go: Cell<bool>,
    /// The login is through: the first ReadyForQuery was forwarded.
    ready: Cell<bool>,
    became_ready: Notify,
    became_quiet: Notify,
    /// Somebody waits for that.
    awaits_quiet: Cell<bool>,
    /// The client has got whole frames only.
    at_boundary: Cell<bool>,
    /// Nothing of the client's waits here.
    client_drained: Cell<bool>,
    /// The client said goodbye, or the server a FATAL error: the end that follows needs no words.
    parting: Cell<bool>,
}

impl Relay {
    /// Begins with the login, or behind it if it is `ready`.
    pub(crate) fn new(session: Session, ready: bool) -> Relay {
        let nonce = format!("{:032x}", rand::random::<u128>());
        if ready {
            session.place.entry.set_status(b'I');
        }
        Relay {
            interceptor: RefCell::new(Interceptor::new(session.intercepts, nonce)),
            peer_sessions: PeerSessions::default(),
            peers_version: Cell::new(NEVER),
            looked_up: Cell::new(false),
            let_go: Notify::new(),
            awaits_let_go: Cell::new(false),
            session,
            ready: Cell::new(ready),
            became_ready: Notify::new(),
            became_quiet: Notify::new(),
            awaits_quiet: Cell::new(false),
            at_boundary: Cell::new(true),
            client_drained: Cell::new(true),
            parting: Cell::new(false),
        }
    }

    /// Returns what is relayed.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    fn entry(&self) -> &Entry {
        &self.session.place.entry
    }

    /// Waits for the end of the login.
    pub(crate) async fn logged_in(&self) {
        while !self.ready.get() {
            self.became_ready.notified().await;
        }
    }

    /// Returns whether the login is through.
    fn is_ready(&self) -> bool {
        self.ready.get()
    }

    /// Waits until nothing is going on and no transaction is open. A login that is not through is nothing.
    pub(crate) async fn idle(&self) {
        self.awaits_quiet.set(true);
        while self.ready.get()
            && !(self.entry().status() == b'I' && self.client_drained.get() && self.interceptor.borrow().is_idle())
        {
            self.became_quiet.notified().await;
        }
    }

    /// Returns whether the server may be at work for a client that has not said goodbye.
    pub(crate) fn is_abandoned(&self) -> bool {
        let waits = matches!(self.entry().status(), b'I' | b'T' | b'E') && self.interceptor.borrow().is_idle();
        !self.parting.get() && !waits
    }

    /// Returns whether an error can be put into the client's stream now.
    pub(crate) fn can_speak(&self) -> bool {
        self.at_boundary.get()
    }
}
