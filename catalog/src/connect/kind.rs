//! Which of several hosts will do: libpq's `target_session_attrs`.
//!
//! Source: PostgreSQL docs, libpq-connect, "target_session_attrs".

use crate::peer::PeerOptions;

/// What a server must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServerKind {
    /// Whatever it is.
    Any,
    /// One whose sessions can write.
    ReadWrite,
    /// One whose sessions cannot.
    ReadOnly,
    /// One that is no standby.
    Primary,
    /// A standby.
    Standby,
}

/// Tells whether the server is a standby, and whether the session can only read: two columns of one row.
pub(crate) const QUERY: &str = "select pg_catalog.pg_is_in_recovery(), \
     pg_catalog.pg_is_in_recovery() or pg_catalog.current_setting('transaction_read_only')::pg_catalog.bool";

impl ServerKind {
    /// Returns what the options ask for: all hosts are tried for the first kind, then for the next.
    pub(crate) fn wanted(options: &PeerOptions) -> &'static [ServerKind] {
        match options.get("target_session_attrs") {
            Some("read-write") => &[ServerKind::ReadWrite],
            Some("read-only") => &[ServerKind::ReadOnly],
            Some("primary") => &[ServerKind::Primary],
            Some("standby") => &[ServerKind::Standby],
            Some("prefer-standby") => &[ServerKind::Standby, ServerKind::Any],
            _ => &[ServerKind::Any],
        }
    }

    /// Says why a server will not do, in libpq's words; `None` if it will.
    pub(crate) fn objection(self, standby: bool, read_only: bool) -> Option<&'static str> {
        match self {
            ServerKind::ReadWrite if read_only => Some("session is read-only"),
            ServerKind::ReadOnly if !read_only => Some("session is not read-only"),
            ServerKind::Primary if standby => Some("server is in hot standby mode"),
            ServerKind::Standby if !standby => Some("server is not in hot standby mode"),
            _ => None,
        }
    }
}
