//! Connections on which the protocol is spoken by hand: the engine's replication stream, and the gateway's relayed sessions. How they
//! are made and logged in is here, as libpq does it; what is said on them afterwards is their owners' business.
//!
//! Source: PostgreSQL docs, protocol-flow, "Start-up" and "SASL Authentication".

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use fallible_iterator::FallibleIterator;
use pg::frame::{HEADER_BYTES, Header};
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::{backend, frontend};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_postgres::config::{ChannelBinding, Host, SslMode, SslNegotiation};
use tokio_rustls::client::TlsStream;

use crate::connect::{Attempt, ConnectError, KIND_QUERY, ServerKind};

mod unix;

pub use unix::UnixSocket;

/// Largest message that a server may send during a login.
const LOGIN_BYTES_MAX: usize = 1 << 20;

/// A connection to a Postgres server.
#[derive(Debug)]
pub enum Socket {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixSocket),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
}

impl Socket {
    /// Returns whether it is encrypted.
    pub fn is_tls(&self) -> bool {
        matches!(self, Socket::Tls(_))
    }

    /// Returns the TCP socket at the bottom of it, if there is one.
    pub fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Socket::Tcp(tcp) => Some(tcp),
            Socket::Tls(tls) => Some(tls.get_ref().0),
            Socket::Unix(_) => None,
        }
    }
}

macro_rules! each {
    ($self:ident, $io:ident => $call:expr) => {
        match $self.get_mut() {
            Socket::Tcp($io) => $call,
            Socket::Unix($io) => $call,
            Socket::Tls($io) => $call,
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, io => Pin::new(io).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Socket {
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

/// Opens the socket and, as the attempt's `ssl_mode` says, TLS on it. Also returns the data for SCRAM's channel binding, which
/// stand for the server's certificate. The attempt's time limit is the caller's to keep.
///
/// # Errors
/// [`io::Error`] of the system or of the handshake.
pub async fn open(attempt: &Attempt) -> io::Result<(Socket, Option<Vec<u8>>)> {
    let config = &attempt.config;
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let (mut tcp, name) = match (config.get_hosts().first(), config.get_hostaddrs().first()) {
        (Some(Host::Unix(directory)), _) => {
            let socket = UnixSocket::connect(directory.join(format!(".s.PGSQL.{port}"))).await?;
            return Ok((Socket::Unix(socket), None));
        }
        (host, Some(address)) => {
            let name = if let Some(Host::Tcp(name)) = host { name.clone() } else { address.to_string() };
            (TcpStream::connect((*address, port)).await?, name)
        }
        (Some(Host::Tcp(name)), None) => (TcpStream::connect((name.as_str(), port)).await?, name.clone()),
        (None, None) => return Err(io::Error::other("no host")),
    };
    tune(&tcp, attempt)?;
    if config.get_ssl_mode() == SslMode::Disable {
        return Ok((Socket::Tcp(tcp), None));
    }
    if config.get_ssl_negotiation() == SslNegotiation::Direct {
        let (stream, binding) = attempt.tls.handshake(&name, tcp).await?;
        return Ok((Socket::Tls(Box::new(stream)), binding));
    }
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    tcp.write_all_buf(&mut request).await?;
    // One byte and no more is read here: what follows it must not be taken for part of the TLS session.
    match tcp.read_u8().await? {
        b'S' => {
            let (stream, binding) = attempt.tls.handshake(&name, tcp).await?;
            Ok((Socket::Tls(Box::new(stream)), binding))
        }
        _ if config.get_ssl_mode() == SslMode::Prefer => Ok((Socket::Tcp(tcp), None)),
        _ => Err(io::Error::other("the server does not support TLS, which sslmode requires")),
    }
}

/// No delay, and keepalives as the options say, so that a machine that is gone is noticed.
fn tune(tcp: &TcpStream, attempt: &Attempt) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let (config, socket) = (&attempt.config, SockRef::from(tcp));
    if config.get_keepalives() {
        let mut keepalive = TcpKeepalive::new().with_time(config.get_keepalives_idle());
        if let Some(interval) = config.get_keepalives_interval() {
            keepalive = keepalive.with_interval(interval);
        }
        if let Some(retries) = config.get_keepalives_retries() {
            keepalive = keepalive.with_retries(retries);
        }
        socket.set_tcp_keepalive(&keepalive)?;
    }
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(config.get_tcp_user_timeout().copied())?;
    Ok(())
}

/// A session that has begun.
#[derive(Debug)]
pub struct Session {
    /// The connection.
    pub socket: Socket,
    /// What the server said after it let us in, as it came: ParameterStatus, BackendKeyData, notices, ReadyForQuery.
    pub greeting: Vec<u8>,
    /// The body of its BackendKeyData: process id and secret, with which to cancel. Empty if there was none.
    pub key: Vec<u8>,
}

/// Connects and logs in, with the role and password of the attempt and with `parameters` (name and value, neither `user` nor
/// `password` among them) in the start-up packet.
///
/// # Errors
/// [`ConnectError`] with what the server or the system said, or that there was no answer within the attempt's time.
pub async fn log_in(attempt: &Attempt, parameters: &[(&str, &str)]) -> Result<Session, ConnectError> {
    let work = async {
        let (socket, binding) = open(attempt).await.map_err(|e| ConnectError::io(&attempt.address, &e))?;
        Login { attempt, socket, buffer: BytesMut::new() }.run(parameters, binding).await
    };
    match tokio::time::timeout(attempt.timeout, work).await {
        Ok(result) => result,
        Err(_) => Err(ConnectError::at_address(attempt, &format!("no answer within {:?}", attempt.timeout))),
    }
}

/// A login that is under way.
struct Login<'a> {
    attempt: &'a Attempt,
    socket: Socket,
    buffer: BytesMut,
}

impl Login<'_> {
    async fn run(mut self, parameters: &[(&str, &str)], binding: Option<Vec<u8>>) -> Result<Session, ConnectError> {
        let user = self.attempt.config.get_user().unwrap_or_default();
        let mut out = BytesMut::new();
        let all = [("user", user)].into_iter().chain(parameters.iter().copied());
        frontend::startup_message(all, &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await?;
        let (mut greeting, mut key) = (Vec::new(), Vec::new());
        loop {
            let frame = self.frame().await?;
            // These are handed on as they came, and a later protocol's key need not be one that the codec knows.
            if matches!(frame[0], b'S' | b'K' | b'N' | b'Z') {
                greeting.extend_from_slice(&frame);
            }
            match frame[0] {
                b'S' | b'N' => continue,
                b'K' => {
                    key = frame[HEADER_BYTES..].to_vec();
                    continue;
                }
                b'Z' => {
                    if self.attempt.kind != ServerKind::Any {
                        self.check_kind().await?;
                    }
                    return Ok(Session { socket: self.socket, greeting, key });
                }
                _ => {}
            }
            match self.parse(frame)? {
                backend::Message::AuthenticationOk => {}
                backend::Message::AuthenticationCleartextPassword => {
                    let password = self.password()?.to_vec();
                    self.send_password(&password).await?;
                }
                backend::Message::AuthenticationMd5Password(body) => {
                    let hashed = md5_hash(user.as_bytes(), self.password()?, body.salt());
                    self.send_password(hashed.as_bytes()).await?;
                }
                backend::Message::AuthenticationSasl(body) => self.sasl(&body, binding.clone()).await?,
                backend::Message::ErrorResponse(body) => return Err(ConnectError::server(self.attempt, &body)),
                _ => return Err(self.error("unexpected message while logging in")),
            }
        }
    }

    /// Asks the server what it is, and refuses one that is not wanted.
    async fn check_kind(&mut self) -> Result<(), ConnectError> {
        let mut out = BytesMut::new();
        frontend::query(KIND_QUERY, &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await?;
        let mut flags = Vec::new();
        loop {
            match self.message().await? {
                backend::Message::DataRow(row) => {
                    let mut ranges = row.ranges();
                    while let Some(range) = ranges.next().map_err(|e| self.io_error(&e))? {
                        flags.push(range.is_some_and(|range| &row.buffer()[range] == b"t"));
                    }
                }
                backend::Message::ErrorResponse(body) => return Err(ConnectError::server(self.attempt, &body)),
                backend::Message::ReadyForQuery(_) => break,
                _ => {}
            }
        }
        match flags[..] {
            [standby, read_only] => self.attempt.check_kind(standby, read_only),
            _ => Err(self.error("unexpected answer while logging in")),
        }
    }

    fn password(&self) -> Result<&[u8], ConnectError> {
        self.attempt.config.get_password().ok_or_else(|| ConnectError::no_password(&self.attempt.address))
    }

    async fn send_password(&mut self, password: &[u8]) -> Result<(), ConnectError> {
        if self.attempt.config.get_channel_binding() == ChannelBinding::Require {
            return Err(self.no_binding());
        }
        let mut out = BytesMut::new();
        frontend::password_message(password, &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await
    }

    fn no_binding(&self) -> ConnectError {
        self.error("channel binding is required, but the server does not offer it")
    }

    async fn sasl(
        &mut self,
        body: &backend::AuthenticationSaslBody,
        binding: Option<Vec<u8>>,
    ) -> Result<(), ConnectError> {
        let mut offered = (false, false);
        let mut mechanisms = body.mechanisms();
        while let Some(mechanism) = mechanisms.next().map_err(|e| self.io_error(&e))? {
            offered.0 |= mechanism == sasl::SCRAM_SHA_256;
            offered.1 |= mechanism == sasl::SCRAM_SHA_256_PLUS;
        }
        let wanted = self.attempt.config.get_channel_binding();
        let binding = binding.filter(|_| wanted != ChannelBinding::Disable);
        let (mechanism, binding) = match (offered, binding) {
            ((_, true), Some(data)) => (sasl::SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(data)),
            ((true, _), Some(_)) => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested()),
            ((true, _), None) => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported()),
            _ => return Err(self.error("the server offers no SASL mechanism that we know")),
        };
        if mechanism != sasl::SCRAM_SHA_256_PLUS && wanted == ChannelBinding::Require {
            return Err(self.no_binding());
        }
        let mut scram = sasl::ScramSha256::new(self.password()?, binding);
        let mut out = BytesMut::new();
        frontend::sasl_initial_response(mechanism, scram.message(), &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await?;
        match self.message().await? {
            backend::Message::AuthenticationSaslContinue(body) => {
                scram.update(body.data()).map_err(|e| self.io_error(&e))?;
            }
            backend::Message::ErrorResponse(body) => return Err(ConnectError::server(self.attempt, &body)),
            _ => return Err(self.error("unexpected message in SASL")),
        }
        frontend::sasl_response(scram.message(), &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await?;
        match self.message().await? {
            backend::Message::AuthenticationSaslFinal(body) => scram.finish(body.data()).map_err(|e| self.io_error(&e)),
            backend::Message::ErrorResponse(body) => Err(ConnectError::server(self.attempt, &body)),
            _ => Err(self.error("unexpected message in SASL")),
        }
    }

    fn error(&self, what: &str) -> ConnectError {
        ConnectError::at_address(self.attempt, what)
    }

    fn io_error(&self, error: &io::Error) -> ConnectError {
        ConnectError::io(&self.attempt.address, error)
    }

    async fn send(&mut self, out: &mut BytesMut) -> Result<(), ConnectError> {
        let sent = async {
            self.socket.write_all_buf(out).await?;
            self.socket.flush().await
        };
        sent.await.map_err(|e| ConnectError::io(&self.attempt.address, &e))
    }

    async fn message(&mut self) -> Result<backend::Message, ConnectError> {
        let frame = self.frame().await?;
        self.parse(frame)
    }

    fn parse(&self, mut frame: BytesMut) -> Result<backend::Message, ConnectError> {
        let message = backend::Message::parse(&mut frame).map_err(|e| self.io_error(&e))?;
        message.ok_or_else(|| self.error("message without a body"))
    }

    /// Reads one frame, whole. Never more than what the server sends by itself: after ReadyForQuery that is nothing.
    async fn frame(&mut self) -> Result<BytesMut, ConnectError> {
        loop {
            let header = Header::read(self.buffer.chunk()).map_err(|e| self.error(&e.to_string()))?;
            if let Some(header) = header {
                if header.size > LOGIN_BYTES_MAX {
                    return Err(self.error(&format!("message of {} bytes while logging in", header.size)));
                }
                if self.buffer.len() >= header.size {
                    return Ok(self.buffer.split_to(header.size));
                }
            }
            if self.socket.read_buf(&mut self.buffer).await.map_err(|e| self.io_error(&e))? == 0 {
                return Err(self.error("closed by the server"));
            }
        }
    }
}
