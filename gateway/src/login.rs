//! Logins that end elsewhere: the catalog says whether the client is who it says, with its own roles, passwords and rules, and then
//! the session goes on on a peer, or with the gateway itself.
//!
//! Sessions in the catalog's databases are not here: theirs is one conversation with the server from beginning to end.

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use catalog::connect::{Attempt, ConnectError, Connector};
use catalog::front::PeerAccess;
use catalog::wire::Socket;
use pg::frame::{HEADER_BYTES, Header, cstr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use crate::error::Fatal;
use crate::fields::frame;
use crate::session::{Client, Shared};
use crate::startup::{Startup, startup_packet};

/// Largest message in a login, as PostgreSQL has it for what a client sends.
const LOGIN_BYTES_MAX: usize = 65_535;

/// AuthenticationOk.
pub(crate) const AUTHENTICATION_OK: &[u8] = b"R\0\0\0\x08\0\0\0\0";

/// Why a login came to nothing.
pub(crate) enum Refused {
    /// The client has been told, in the catalog's own words, or is gone.
    Told,
    /// The client has to be told.
    Fatal(Fatal),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Refused {
        tracing::debug!(error = %error, "a login broke off");
        Refused::Told
    }
}

/// Lets the catalog's server decide whether the client may log in as the role that it names. It hears all but the last word,
/// AuthenticationOk: that is for whoever serves it now.
///
/// # Errors
/// [`Refused`]; the catalog's own refusal has been passed on.
pub(crate) async fn authenticate(shared: &Shared, client: &mut Client, startup: &Startup) -> Result<(), Refused> {
    if let Some(negotiation) = startup.negotiation() {
        client.io.write_all(&negotiation).await?;
    }
    let connected = shared.connect().await.map_err(|error| {
        tracing::warn!(error = %error, "cannot reach the catalog for a login");
        Refused::Fatal(Fatal::BackendUnreachable)
    })?;
    let keeps_binding = shared.shows(client, connected.certificate.as_deref());
    let mut server = connected.socket;
    let parameters = [("user", startup.user.as_str()), ("database", shared.backend.database())];
    server.write_all(&startup_packet(&parameters)).await?;
    server.flush().await?;
    let mut heard = BytesMut::new();
    let mut accepted = false;
    loop {
        tokio::select! {
            heard = next_frame(&mut server, &mut heard) => match heard? {
                said if said[0] == b'R' && said[HEADER_BYTES..] == [0; 4] => accepted = true,
                said if said[0] == b'R' => {
                    let replaced = without_channel_binding(&said[HEADER_BYTES..]).filter(|_| !keeps_binding);
                    client.io.write_all(replaced.as_deref().unwrap_or(&said)).await?;
                    client.io.flush().await?;
                }
                // With what the role may not have, such as this database.
                said if said[0] == b'E' => {
                    shared.events.login(false);
                    client.io.write_all(&said).await?;
                    client.io.flush().await?;
                    return Err(Refused::Told);
                }
                said if said[0] == b'Z' && accepted => {
                    server.write_all(&frame(b'X', b"")).await?;
                    server.flush().await?;
                    return Ok(());
                }
                // Settings, key and notices are this short session's own.
                _ => {}
            },
            said = next_frame(&mut client.io, &mut client.read), if !accepted => match said? {
                answer if answer[0] == b'p' => {
                    server.write_all(&answer).await?;
                    server.flush().await?;
                }
                goodbye if goodbye[0] == b'X' => return Err(Refused::Told),
                _ => return Err(Refused::Fatal(Fatal::Protocol("expected a password response"))),
            }
        }
    }
}

/// Lets a foreign server of the catalog in, by the token that its user mapping holds. Returns the peer.
///
/// A token is asked for as it is: it is taken only from this machine or over TLS, is of no use but here and for its peer, and ends with the
/// peer, with its owner's USAGE, and with the next one.
///
/// # Errors
/// [`Refused`].
pub(crate) async fn authenticate_token(
    shared: &Shared,
    client: &mut Client,
    startup: &Startup,
    is_local: bool,
) -> Result<PeerAccess, Refused> {
    if !(is_local || client.is_tls()) {
        return Err(Refused::Fatal(Fatal::TlsRequired));
    }
    if let Some(negotiation) = startup.negotiation() {
        client.io.write_all(&negotiation).await?;
    }
    client.io.write_all(&frame(b'R', &3_i32.to_be_bytes())).await?;
    client.io.flush().await?;
    let answer = next_frame(&mut client.io, &mut client.read).await?;
    let token = match answer[0] {
        b'p' => cstr(&answer[HEADER_BYTES..]).and_then(|(token, _)| std::str::from_utf8(token).ok()),
        b'X' => return Err(Refused::Told),
        _ => return Err(Refused::Fatal(Fatal::Protocol("expected a password response"))),
    };
    let access = shared.catalog.token_access(&startup.database, token.unwrap_or_default()).await;
    let access = access.map_err(|error| {
        tracing::warn!(error = %error, "cannot ask the catalog for a peer");
        Refused::Fatal(Fatal::BackendUnreachable)
    })?;
    access.ok_or_else(|| {
        shared.events.login(false);
        Refused::Fatal(Fatal::TokenRefused(startup.user.clone()))
    })
}

/// Reads one frame of a login, whole. Nothing is lost if it is dropped and called again.
pub(crate) async fn next_frame<R: AsyncRead + Unpin>(reader: &mut R, buffer: &mut BytesMut) -> io::Result<BytesMut> {
    loop {
        let invalid = || io::Error::new(io::ErrorKind::InvalidData, "invalid message length in a login");
        if let Some(header) = Header::read(buffer).map_err(|_| invalid())? {
            if header.size > LOGIN_BYTES_MAX {
                return Err(invalid());
            }
            if buffer.len() >= header.size {
                return Ok(buffer.split_to(header.size));
            }
        }
        if reader.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Takes `SCRAM-SHA-256-PLUS` from an AuthenticationSASL: a binding to the gateway's TLS session would mean nothing to the server.
pub(crate) fn without_channel_binding(body: &[u8]) -> Option<Vec<u8>> {
    let mut rest = body.strip_prefix(&10_i32.to_be_bytes())?;
    let mut kept = 10_i32.to_be_bytes().to_vec();
    while let Some((mechanism, after)) = cstr(rest).filter(|(m, _)| !m.is_empty()) {
        if mechanism != b"SCRAM-SHA-256-PLUS" {
            kept.extend_from_slice(mechanism);
            kept.push(0);
        }
        rest = after;
    }
    kept.push(0);
    Some(frame(b'R', &kept))
}

/// A session on a peer that has begun, with the gateway's credentials for it and the client's wishes.
pub(crate) struct PeerSession {
    /// The connection.
    pub(crate) socket: Socket,
    /// What the client has to hear before anything else, from AuthenticationOk to ReadyForQuery.
    pub(crate) greeting: Vec<u8>,
    /// The session's key.
    pub(crate) key: Vec<u8>,
    /// How the peer was reached.
    pub(crate) attempt: Arc<Attempt>,
}

/// Opens a session on a peer for a client that the catalog has let in.
///
/// # Errors
/// [`Fatal::PeerDenied`] or [`Fatal::PeerUnreachable`].
pub(crate) async fn open_peer(access: &PeerAccess, startup: &Startup) -> Result<PeerSession, Fatal> {
    let unreachable = |error: ConnectError| Fatal::PeerUnreachable {
        peer: access.name.clone(),
        detail: error.message,
        hint: error.hint,
    };
    if !access.allowed {
        return Err(Fatal::PeerDenied { peer: access.name.clone(), owner: access.owner.clone() });
    }
    let options = access.options.as_ref().map_err(|error| Fatal::PeerUnreachable {
        peer: access.name.clone(),
        detail: error.to_string(),
        hint: None,
    })?;
    let connector = Connector::new(options).map_err(unreachable)?;
    let (session, attempt) = connector.log_in(|attempt| parameters(attempt, startup)).await.map_err(unreachable)?;
    let greeting = [AUTHENTICATION_OK, &session.greeting].concat();
    Ok(PeerSession { socket: session.socket, greeting, key: session.key, attempt: Arc::new(attempt.clone()) })
}

/// What the peer's session begins with: the peer's database, and what the client wishes beside that.
fn parameters(attempt: &Attempt, startup: &Startup) -> Vec<(String, String)> {
    let config = &attempt.config;
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
    let mut parameters = vec![("database".to_owned(), database.to_owned())];
    let mut options = config.get_options().map(str::to_owned);
    for (name, value) in &startup.parameters {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match name.as_slice() {
            b"user" | b"database" => {}
            // The peer's come first: where both set something, the client's wish counts.
            b"options" => {
                let peers = options.take().map(|options| options + " ").unwrap_or_default();
                options = Some(peers + &text(value));
            }
            name if name.starts_with(b"_pq_.") => {}
            name => parameters.push((text(name), text(value))),
        }
    }
    if startup.value("application_name").is_none() {
        let name = config.get_application_name().unwrap_or("peergate");
        parameters.push(("application_name".to_owned(), name.to_owned()));
    }
    parameters.extend(options.map(|options| ("options".to_owned(), options)));
    parameters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_binding_is_taken_from_the_list() {
        let body = b"\0\0\0\x0aSCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0";
        assert_eq!(without_channel_binding(body), Some(frame(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0")));
        assert_eq!(without_channel_binding(b"\0\0\0\0"), None);
        assert_eq!(without_channel_binding(b"\0\0\0\x0aX"), Some(frame(b'R', b"\0\0\0\x0a\0")));
    }
}
