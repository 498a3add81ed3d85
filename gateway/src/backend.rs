//! Connections to the servers that sessions are relayed to. Nothing is said on them here but what TLS needs.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use catalog::connect::{Attempt, Connector};
use catalog::wire::{self, Socket};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_postgres::config::SslMode;

/// How long a connection may take, over all the ways to make it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where the catalog's server is, and the ways to reach it, in order.
#[derive(Clone)]
pub(crate) struct Backend {
    attempts: Vec<Arc<Attempt>>,
}

/// A connection on which nothing has been said yet.
pub(crate) struct Connected {
    /// The connection.
    pub(crate) socket: Socket,
    /// Stands for the server's certificate; `None` without TLS.
    pub(crate) certificate: Option<Vec<u8>>,
    /// How it was made.
    pub(crate) attempt: Arc<Attempt>,
}

impl Backend {
    /// Takes the server and the TLS settings from the catalog's own sessions; role and password are each client's.
    pub(crate) fn new(connector: &Connector) -> Backend {
        Backend { attempts: connector.attempts().iter().cloned().map(Arc::new).collect() }
    }

    /// Returns whether sessions may be encrypted.
    pub(crate) fn uses_tls(&self) -> bool {
        self.attempts.iter().any(|attempt| attempt.config.get_ssl_mode() != SslMode::Disable)
    }

    /// Returns the first way to the catalog.
    pub(crate) fn first_attempt(&self) -> Option<&Attempt> {
        self.attempts.first().map(Arc::as_ref)
    }

    /// Returns the database that is the catalog.
    pub(crate) fn database(&self) -> &str {
        let config = self.attempts.first().map(|attempt| &attempt.config);
        config.and_then(|c| c.get_dbname().or(c.get_user())).unwrap_or_default()
    }

    /// Connects, over TLS if the settings say so.
    ///
    /// # Errors
    /// [`io::Error`] of the last attempt.
    pub(crate) async fn connect(&self) -> io::Result<Connected> {
        let connect = async {
            let mut last = io::Error::other("there is no way to the catalog");
            for attempt in &self.attempts {
                match wire::open(attempt).await {
                    Ok((socket, certificate)) => {
                        return Ok(Connected { socket, certificate, attempt: attempt.clone() });
                    }
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        tokio::time::timeout(CONNECT_TIMEOUT, connect)
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the catalog does not answer")))
    }

    /// Passes a cancel request on to the catalog's server, of which nobody here knows which session it means.
    ///
    /// # Errors
    /// As [`cancel`].
    pub(crate) async fn cancel(&self, packet: &[u8]) -> io::Result<()> {
        say_and_wait(self.connect().await?.socket, packet).await
    }
}

/// Writes a CancelRequest for the session with that key, the body of its BackendKeyData.
///
/// Source: PostgreSQL docs, protocol-message-formats, "CancelRequest".
pub(crate) fn cancel_packet(key: &[u8]) -> Vec<u8> {
    [&(8 + key.len() as u32).to_be_bytes()[..], &[0x04, 0xd2, 0x16, 0x2e], key].concat()
}

/// Sends a cancel request to the server that is reached by `attempt`, and waits until it has dealt with it, as clients do.
///
/// # Errors
/// [`io::Error`] if it cannot be sent.
pub(crate) async fn cancel(attempt: &Attempt, packet: &[u8]) -> io::Result<()> {
    say_and_wait(wire::open(attempt).await?.0, packet).await
}

async fn say_and_wait(mut socket: Socket, packet: &[u8]) -> io::Result<()> {
    socket.write_all(packet).await?;
    socket.flush().await?;
    // The server closes when it is done, and hard, now and then.
    while matches!(socket.read(&mut [0; 64]).await, Ok(n) if n > 0) {}
    Ok(())
}

/// Sets what every client's TCP socket needs: no delay, and keepalives so that a machine that is gone is noticed.
pub(crate) fn tune(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new()
        .with_time(Duration::from_secs(60))
        .with_interval(Duration::from_secs(10))
        .with_retries(6);
    let socket = socket2::SockRef::from(socket);
    socket.set_tcp_keepalive(&keepalive)?;
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(Duration::from_secs(60)))?;
    Ok(())
}
