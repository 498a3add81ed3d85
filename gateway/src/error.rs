//! What the gateway itself says to a client: always FATAL, and always the end of the session.
//!
//! Errors of statements are not here: those are raised by Postgres, in the client's own transaction.

use bytes::BytesMut;
use pg::SqlState;
use pg::name::quote_ident;

use crate::fields::Fields;

/// What the gateway could not do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The certificate or its key cannot be used.
    #[error("cannot use TLS file {path}: {reason}")]
    Tls {
        /// The file.
        path: std::path::PathBuf,
        /// Why not.
        reason: String,
    },
    /// Options contradict each other.
    #[error("{0}")]
    Options(String),
    /// The system refused a thread or a socket.
    #[error("{0}")]
    System(&'static str, #[source] std::io::Error),
}

/// Why a session ends, as the client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fatal {
    /// The client sent plain text where TLS was to begin: somebody in between may have put it there.
    PlaintextAfterTls,
    /// The client's bytes are not the protocol.
    Protocol(&'static str),
    /// The client asked, where a session must begin, for something that cannot begin one.
    UnsupportedProtocol(u16, u16),
    /// Only TLS sessions are let in.
    TlsRequired,
    /// Only clients with a certificate are let in.
    CertificateRequired,
    /// The client's certificate is not for the role that it wants.
    CertificateOfAnother,
    /// There are as many sessions as there may be.
    TooManySessions,
    /// Sessions hold as much of large statements as they may, and go on doing so.
    HeldTooMuch,
    /// The login took too long.
    LoginTimeout,
    /// No session could be had on the catalog.
    BackendUnreachable,
    /// The backing session broke off without a word.
    BackendGone,
    /// There is neither a peer nor a database of that name.
    UnknownDatabase(String),
    /// The token of a foreign server is not, or no longer, one.
    TokenRefused(String),
    /// The role may not have sessions on the peer.
    PeerDenied {
        /// The peer.
        peer: String,
        /// Who may let it.
        owner: String,
    },
    /// No session could be had on the peer.
    PeerUnreachable {
        /// The peer.
        peer: String,
        /// What its server or the system said.
        detail: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// The role may not use the console.
    ConsoleDenied,
    /// The gateway is shutting down and takes no new sessions.
    ShuttingDown,
    /// The gateway is shutting down and ends this session, or an administrator does.
    Shutdown,
}

impl Fatal {
    /// Returns the error's code.
    pub fn sqlstate(&self) -> SqlState {
        match self {
            Fatal::PlaintextAfterTls | Fatal::Protocol(_) => SqlState::PROTOCOL_VIOLATION,
            Fatal::UnsupportedProtocol(..) => SqlState::FEATURE_NOT_SUPPORTED,
            Fatal::TlsRequired | Fatal::CertificateRequired | Fatal::CertificateOfAnother => {
                SqlState::INVALID_AUTHORIZATION
            }
            Fatal::TooManySessions => SqlState::TOO_MANY_CONNECTIONS,
            Fatal::HeldTooMuch => SqlState::OUT_OF_MEMORY,
            Fatal::LoginTimeout => SqlState::QUERY_CANCELED,
            Fatal::BackendUnreachable => SqlState::CONNECTION_FAILURE,
            Fatal::TokenRefused(_) => SqlState::INVALID_PASSWORD,
            Fatal::UnknownDatabase(_) => SqlState::UNDEFINED_DATABASE,
            Fatal::PeerDenied { .. } | Fatal::ConsoleDenied => SqlState::INSUFFICIENT_PRIVILEGE,
            Fatal::PeerUnreachable { .. } => SqlState::PEER_UNREACHABLE,
            Fatal::ShuttingDown => SqlState::CANNOT_CONNECT_NOW,
            // What drivers and pools know as the end of a connection that can be made anew.
            Fatal::BackendGone | Fatal::Shutdown => SqlState::ADMIN_SHUTDOWN,
        }
    }

    /// Returns the message, in Postgres' words where it has them.
    pub fn message(&self) -> String {
        match self {
            Fatal::PlaintextAfterTls => "received unencrypted data after SSL request".to_owned(),
            Fatal::Protocol(what) => (*what).to_owned(),
            Fatal::UnsupportedProtocol(major, minor) => format!("unsupported frontend protocol {major}.{minor}"),
            Fatal::TlsRequired => "this server takes only TLS connections".to_owned(),
            Fatal::CertificateRequired => "connection requires a valid client certificate".to_owned(),
            Fatal::CertificateOfAnother => {
                "certificate authentication failed: the certificate's common name is not the role's name".to_owned()
            }
            Fatal::TooManySessions => "sorry, too many clients already".to_owned(),
            Fatal::HeldTooMuch => "out of memory for large statements".to_owned(),
            Fatal::LoginTimeout => "canceling authentication due to timeout".to_owned(),
            Fatal::BackendUnreachable => "the catalog cannot be reached".to_owned(),
            Fatal::BackendGone => "terminating connection because its server closed it unexpectedly".to_owned(),
            Fatal::UnknownDatabase(name) => format!("database \"{name}\" does not exist"),
            Fatal::TokenRefused(user) => format!("password authentication failed for user \"{user}\""),
            Fatal::PeerDenied { peer, .. } => format!("permission denied for peer \"{peer}\""),
            Fatal::PeerUnreachable { peer, .. } => format!("could not connect to peer \"{peer}\""),
            Fatal::ConsoleDenied => "permission denied for the console".to_owned(),
            Fatal::ShuttingDown => "the database system is shutting down".to_owned(),
            Fatal::Shutdown => "terminating connection due to administrator command".to_owned(),
        }
    }

    /// Returns more about it, as a sentence.
    pub fn detail(&self) -> Option<&str> {
        match self {
            Fatal::PeerUnreachable { detail, .. } => Some(detail),
            _ => None,
        }
    }

    /// Returns what to do about it, as a sentence.
    pub fn hint(&self) -> Option<String> {
        match self {
            Fatal::PeerDenied { peer, owner } => {
                let peer = quote_ident(peer);
                Some(format!("Role {} or a superuser can GRANT USAGE ON PEER {peer}.", quote_ident(owner)))
            }
            Fatal::PeerUnreachable { hint, .. } => hint.clone(),
            Fatal::ConsoleDenied => Some(
                "It is for superusers, members of the role that owns schema peergate, and members of pg_monitor."
                    .to_owned(),
            ),
            _ => None,
        }
    }

    /// Appends the ErrorResponse.
    pub fn encode(&self, out: &mut BytesMut) {
        let code = self.sqlstate().to_string();
        let mut fields = Fields::default();
        for (key, text) in [(b'S', "FATAL"), (b'V', "FATAL"), (b'C', &code), (b'M', &self.message())] {
            fields.set(key, text);
        }
        if let Some(detail) = self.detail() {
            fields.set(b'D', detail);
        }
        if let Some(hint) = self.hint() {
            fields.set(b'H', hint);
        }
        fields.set(b'R', "gateway");
        out.extend_from_slice(&fields.encode(b'E'));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_is_an_error_response() {
        let mut out = BytesMut::new();
        Fatal::TooManySessions.encode(&mut out);
        assert_eq!(&out[..1], b"E");
        assert_eq!(out.len(), 1 + u32::from_be_bytes(out[1..5].try_into().unwrap()) as usize);
        assert!(out.windows(7).any(|w| w == b"C53300\0"));
    }
}
