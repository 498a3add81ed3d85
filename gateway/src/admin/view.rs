//! What the console shows, as values: taken in one go, so that the tables made of it agree.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::SystemTime;

use crate::config::Setting;
use crate::registry::Totals;

/// A moment in a gateway's life.
#[derive(Clone, Debug)]
pub(crate) struct View {
    /// When it is.
    pub(crate) now: SystemTime,
    /// When the process began.
    pub(crate) began: SystemTime,
    /// The sessions, the oldest first.
    pub(crate) sessions: Vec<SessionView>,
    /// What the sessions of each database have done, those that have ended included.
    pub(crate) totals: BTreeMap<String, Totals>,
    /// The configuration; empty if the gateway was started without one.
    pub(crate) settings: Vec<Setting>,
    /// Where it listens.
    pub(crate) listener: ListenerView,
    /// The catalog's database.
    pub(crate) catalog: ServerView,
    /// Sessions that there may be.
    pub(crate) sessions_max: usize,
    /// No new sessions are taken.
    pub(crate) draining: bool,
    /// Memory in use, if the system tells.
    pub(crate) resident_bytes: Option<u64>,
}

/// One session.
#[derive(Clone, Debug)]
pub(crate) struct SessionView {
    pub(crate) id: u64,
    /// Empty until its first packet is read, as the next three.
    pub(crate) user: String,
    pub(crate) database: String,
    pub(crate) application_name: String,
    pub(crate) tls: &'static str,
    pub(crate) client: SocketAddr,
    pub(crate) began: SystemTime,
    pub(crate) state: Doing,
    /// What it is on a console.
    pub(crate) console: bool,
    pub(crate) totals: Totals,
    /// The session on a server that it is relayed to.
    pub(crate) server: Option<ServerView>,
}

/// What a session is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Doing {
    /// Its name.
    pub(crate) name: &'static str,
    /// The login is not through.
    pub(crate) login: bool,
    /// It waits for the client outside of a transaction.
    pub(crate) idle: bool,
}

/// A database on a server, and a session on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ServerView {
    /// Host or folder of the socket.
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) database: String,
    /// The process that serves the session.
    pub(crate) pid: Option<i32>,
}

/// What is listened on.
#[derive(Clone, Debug)]
pub(crate) struct ListenerView {
    pub(crate) address: SocketAddr,
    /// `disable`, `allow` or `required`.
    pub(crate) tls: &'static str,
    /// When the certificate ends, in seconds since 1970.
    pub(crate) certificate_expires: Option<u64>,
}
