//! A session on a peer, kept for a client.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::BytesMut;
use catalog::connect::{Attempt, ConnectError, Connector};
use catalog::front::{PeerAccess, PeerLink};
use catalog::wire::Socket;
use pg::SqlState;
use pg::frame::Walker;
use pg::name::quote_ident;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};

use crate::backend::{cancel, cancel_packet};
use crate::fields::frame;
use crate::login::next_frame;
use crate::session::Shared;

use super::{Refused, error};

/// How much is read at a time, in bytes.
const READ_BYTES: usize = 32 * 1024;

/// Settings as the client's session has them.
pub(super) type Settings = Vec<(&'static str, Vec<u8>)>;

/// A session on a peer.
pub(super) struct Link {
    pub(super) peer: String,
    /// The peer as it was when this was opened.
    pub(super) version: String,
    pub(super) buffer: BytesMut,
    pub(super) walker: Walker,
    /// The transaction's status, as ReadyForQuery told it.
    pub(super) status: u8,
    /// The session has another client_encoding than was set: it is set anew before the next statement.
    pub(super) changed_encoding: bool,
    socket: Socket,
    attempt: Arc<Attempt>,
    key: Vec<u8>,
    adopted: Settings,
    broken: bool,
}

/// Asks the catalog for a peer.
pub(super) async fn access(shared: &Shared, user: &str, peer: &str) -> Result<PeerLink, Refused> {
    match shared.catalog.peer_link(user, peer).await {
        Ok(Some(access)) => Ok(access),
        Ok(None) => Err(error(SqlState::UNDEFINED_OBJECT, &format!("peer \"{peer}\" does not exist"), None, None)),
        Err(cause) => {
            tracing::warn!(error = %cause, "cannot ask the catalog for a peer");
            Err(error(SqlState::PEER_UNREACHABLE, "the catalog cannot be asked for the peer", None, None))
        }
    }
}

/// The refusal of a role that lacks USAGE.
pub(super) fn denied(access: &PeerAccess) -> Refused {
    let message = format!("permission denied for peer \"{}\"", access.name);
    let (owner, peer) = (quote_ident(&access.owner), quote_ident(&access.name));
    let hint = format!("Role {owner} or a superuser can GRANT USAGE ON PEER {peer}.");
    error(SqlState::INSUFFICIENT_PRIVILEGE, &message, None, Some(&hint))
}

impl Link {
    /// Connects and logs in.
    pub(super) async fn open(access: &PeerLink, settings: &[(&'static str, Vec<u8>)]) -> Result<Link, Refused> {
        let peer = &access.peer.name;
        let unreachable = |e: ConnectError| {
            let message = format!("could not connect to peer \"{peer}\"");
            error(SqlState::PEER_UNREACHABLE, &message, Some(&e.message), e.hint.as_deref())
        };
        let options = access.peer.options.as_ref().map_err(|e| {
            error(
                SqlState::PEER_UNREACHABLE,
                &format!("could not connect to peer \"{peer}\""),
                Some(&e.to_string()),
                None,
            )
        })?;
        let connector = Connector::new(options).map_err(unreachable)?;
        let (session, attempt) = connector.log_in(|a| parameters(a, settings)).await.map_err(unreachable)?;
        let mut link = Link {
            peer: peer.clone(),
            version: access.version.clone(),
            buffer: BytesMut::new(),
            walker: Walker::new(),
            status: b'I',
            changed_encoding: false,
            socket: session.socket,
            attempt: Arc::new(attempt.clone()),
            key: session.key,
            adopted: settings.iter().filter(|(name, _)| in_startup(name)).cloned().collect(),
            broken: false,
        };
        link.adopt(settings).await?;
        Ok(link)
    }

    /// Takes over the settings of the client's session that have changed since. What the peer does not take, such as a time zone that
    /// it does not know, stays as it was.
    pub(super) async fn adopt(&mut self, settings: &[(&'static str, Vec<u8>)]) -> Result<(), Refused> {
        if self.changed_encoding {
            self.adopted.retain(|(name, _)| *name != "client_encoding");
            self.changed_encoding = false;
        }
        // In a transaction that has failed nothing can be set; in an open one it would be gone with a rollback.
        if self.status != b'I' {
            return Ok(());
        }
        for (name, value) in settings {
            if self.adopted.iter().any(|(known, as_it_is)| known == name && as_it_is == value) {
                continue;
            }
            let Ok(text) = std::str::from_utf8(value) else { continue };
            let set = format!(
                "SELECT pg_catalog.set_config('{name}', {}, false)",
                pg::name::quote_literal(text).trim_start()
            );
            let result = async {
                self.say(&frame(b'Q', &[set.as_bytes(), b"\0"].concat())).await?;
                loop {
                    let said = next_frame(&mut self.socket, &mut self.buffer).await?;
                    if said[0] == b'Z' {
                        return io::Result::Ok(());
                    }
                }
            };
            if let Err(cause) = result.await {
                return Err(self.lost(&cause));
            }
            self.adopted.retain(|(known, _)| known != name);
            self.adopted.push((name, value.clone()));
        }
        Ok(())
    }

    /// Returns whether the peer still has this session, as far as it has said.
    pub(super) fn is_alive(&mut self) -> bool {
        // Notices and notifications may have come; an end of the session comes as an error, or as the end of the stream.
        let mut waker = std::task::Context::from_waker(std::task::Waker::noop());
        loop {
            let mut bytes = [0; 1024];
            let mut landing = ReadBuf::new(&mut bytes);
            match Pin::new(&mut self.socket).poll_read(&mut waker, &mut landing) {
                Poll::Pending => break,
                Poll::Ready(Ok(())) if !landing.filled().is_empty() => self.buffer.extend_from_slice(landing.filled()),
                Poll::Ready(_) => return false,
            }
        }
        let mut at = 0;
        while let Ok(Some(header)) = pg::frame::Header::read(&self.buffer[at..]) {
            if header.tag == b'E' || self.buffer.len() - at < header.size {
                return header.tag != b'E';
            }
            at += header.size;
        }
        true
    }

    /// Returns whether a transaction is open on the peer.
    pub(super) fn in_transaction(&self) -> bool {
        self.status != b'I'
    }

    /// Returns whether it can be used again.
    pub(super) fn is_usable(&self) -> bool {
        !self.broken && self.buffer.is_empty() && self.walker.at_boundary()
    }

    /// Sends frames.
    ///
    /// # Errors
    /// [`io::Error`] of the socket.
    pub(super) async fn say(&mut self, frames: &[u8]) -> io::Result<()> {
        self.socket.write_all(frames).await?;
        self.socket.flush().await
    }

    /// Reads more behind what the buffer holds.
    ///
    /// # Errors
    /// [`io::Error`] of the socket, or that it was closed.
    pub(super) async fn hear(&mut self) -> io::Result<()> {
        self.buffer.reserve(READ_BYTES);
        if self.socket.read_buf(&mut self.buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }

    /// Gives the session up, and says so.
    pub(super) fn lost(&mut self, cause: &io::Error) -> Refused {
        self.broken = true;
        let detail = match cause.kind() {
            io::ErrorKind::UnexpectedEof => format!("{}: closed by the server", self.attempt.address),
            _ => format!("{}: {cause}", self.attempt.address),
        };
        let message = format!("connection to peer \"{}\" was lost", self.peer);
        let hint = self.in_transaction().then_some("The transaction that was open there is rolled back.");
        error(SqlState::PEER_UNREACHABLE, &message, Some(&detail), hint)
    }

    /// Returns what cancels the statement that runs, unless it is told that there is none any more.
    pub(super) fn stop_on_drop(&self) -> StopOnDrop {
        StopOnDrop { attempt: self.attempt.clone(), key: self.key.clone(), armed: true }
    }
}

/// Cancels a statement when it is dropped.
pub(super) struct StopOnDrop {
    attempt: Arc<Attempt>,
    key: Vec<u8>,
    armed: bool,
}

impl StopOnDrop {
    /// The statement has ended.
    pub(super) fn disarm(&mut self) {
        self.armed = false;
    }

    /// Cancels it now.
    pub(super) fn cancel(&self) {
        // Without a runtime there is no session either.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (attempt, packet) = (self.attempt.clone(), cancel_packet(&self.key));
        runtime.spawn(async move {
            let sent = tokio::time::timeout(super::OBEY_TIMEOUT, cancel(&attempt, &packet)).await;
            if let Ok(Err(error)) = sent {
                tracing::warn!(error = %error, "cannot cancel a statement on a peer");
            }
        });
    }
}

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        if self.armed {
            self.cancel();
        }
    }
}

/// Settings that have to hold from the first message on, and that every server takes.
fn in_startup(name: &str) -> bool {
    matches!(name, "client_encoding" | "application_name")
}

/// What the peer's session begins with.
fn parameters(attempt: &Attempt, settings: &[(&'static str, Vec<u8>)]) -> Vec<(String, String)> {
    let config = &attempt.config;
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
    let mut parameters = vec![("database".to_owned(), database.to_owned())];
    parameters.extend(config.get_options().map(|options| ("options".to_owned(), options.to_owned())));
    for (name, value) in settings.iter().filter(|(name, value)| in_startup(name) && !value.is_empty()) {
        parameters.push(((*name).to_owned(), String::from_utf8_lossy(value).into_owned()));
    }
    if !parameters.iter().any(|(name, _)| name == "application_name") {
        let name = config.get_application_name().unwrap_or("peergate");
        parameters.push(("application_name".to_owned(), name.to_owned()));
    }
    parameters
}
