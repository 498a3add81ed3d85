//! Connections to the catalog's server for sessions that are relayed. Nothing is said on them here but what TLS needs.

use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use catalog::connect::{Attempt, Connector};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::config::{Host, SslMode};
use tokio_rustls::client::TlsStream;

/// How long a connection may take, over all the ways to make it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The frame that asks for TLS.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// Where the catalog's server is, and the ways to reach it, in order.
#[derive(Clone)]
pub(crate) struct Backend {
    attempts: Vec<Attempt>,
}

impl Backend {
    /// Takes the server and the TLS settings from the catalog's own sessions; role and password are each client's.
    pub(crate) fn new(connector: &Connector) -> Backend {
        Backend { attempts: connector.attempts().to_vec() }
    }

    /// Returns whether sessions may be encrypted.
    pub(crate) fn uses_tls(&self) -> bool {
        self.attempts.iter().any(|attempt| attempt.config.get_ssl_mode() != SslMode::Disable)
    }

    /// Returns the database that is the catalog.
    pub(crate) fn database(&self) -> Option<&str> {
        let config = &self.attempts.first()?.config;
        config.get_dbname().or(config.get_user())
    }

    /// Connects, over TLS if the settings say so.
    ///
    /// # Errors
    /// [`io::Error`] of the last attempt.
    pub(crate) async fn connect(&self) -> io::Result<BackendStream> {
        let connect = async {
            let mut last = io::Error::other("there is no way to the catalog");
            for attempt in &self.attempts {
                match connect(attempt).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = error,
                }
            }
            Err(last)
        };
        tokio::time::timeout(CONNECT_TIMEOUT, connect)
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the catalog does not answer")))
    }
}

async fn connect(attempt: &Attempt) -> io::Result<BackendStream> {
    let config = &attempt.config;
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let host = config.get_hosts().first();
    if let Some(Host::Unix(directory)) = host {
        return unix(directory, port).await;
    }
    let name = match host {
        Some(Host::Tcp(name)) => name.as_str(),
        _ => "localhost",
    };
    let mut socket = match config.get_hostaddrs().first() {
        Some(address) => TcpStream::connect((*address, port)).await?,
        None => TcpStream::connect((name, port)).await?,
    };
    tune(&socket)?;
    let mode = config.get_ssl_mode();
    if mode == SslMode::Disable {
        return Ok(BackendStream::Tcp(socket));
    }
    socket.write_all(&SSL_REQUEST).await?;
    // One byte and no more: what a liar adds in plain text ends up in the handshake and breaks it.
    match socket.read_u8().await? {
        b'S' => {
            let (stream, _) = attempt.tls.handshake(name, socket).await?;
            Ok(BackendStream::Tls(Box::new(stream)))
        }
        _ if mode == SslMode::Require => Err(io::Error::other("the catalog's server does not support TLS")),
        _ => Ok(BackendStream::Tcp(socket)),
    }
}

async fn unix(directory: &Path, port: u16) -> io::Result<BackendStream> {
    UnixStream::connect(directory.join(format!(".s.PGSQL.{port}"))).await.map(BackendStream::Unix)
}

/// Sets what every session's TCP socket needs: no delay, and keepalives so that a machine that is gone is noticed.
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

/// A connection to the catalog's server.
pub(crate) enum BackendStream {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl BackendStream {
    /// Returns whether it is encrypted.
    pub(crate) fn is_tls(&self) -> bool {
        matches!(self, BackendStream::Tls(_))
    }
}

macro_rules! each {
    ($self:ident, $io:ident => $call:expr) => {
        match $self.get_mut() {
            BackendStream::Tcp($io) => $call,
            BackendStream::Unix($io) => $call,
            BackendStream::Tls($io) => $call,
        }
    };
}

impl AsyncRead for BackendStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_read(cx, buffer))
    }
}

impl AsyncWrite for BackendStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, io => Pin::new(io).poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_shutdown(cx))
    }
}
