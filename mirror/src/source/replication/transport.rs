//! The socket under the replication protocol, TLS on it, and the bounds of its frames.

use std::io;

use bytes::BytesMut;
use catalog::connect::Attempt;
use postgres_protocol::message::frontend;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio_postgres::config::{Host, SslMode};

use crate::error::Error;

/// Room made for each read.
pub(super) const READ_BYTES: usize = 256 << 10;

/// Socket buffer for the stream: a walsender sends each message by itself, and a large buffer lets many wait for one read.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;

/// Largest message that can be: a row of 1 GiB, and what is around it.
const MESSAGE_BYTES_MAX: usize = (1 << 30) + (1 << 20);

/// A socket, with TLS or without.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// Reads what is there, or waits for it; 0 means that the server has closed.
pub(super) async fn fill(io: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> io::Result<usize> {
    buffer.reserve(READ_BYTES);
    io.read_buf(buffer).await
}

/// Returns the whole length of the frame at the start of `buffer`, once its header is there.
pub(super) fn frame_length(peer: &str, buffer: &[u8]) -> Result<Option<usize>, Error> {
    let Some(header) = buffer.get(1..5) else { return Ok(None) };
    let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
    if (4..=MESSAGE_BYTES_MAX).contains(&length) {
        Ok(Some(length + 1))
    } else {
        Err(Error::protocol(peer, format!("message of {length} bytes")))
    }
}

/// Returns whether it is a Unix socket that is connected to.
pub(super) fn is_unix(attempt: &Attempt) -> bool {
    matches!(attempt.config.get_hosts().first(), Some(Host::Unix(_)))
}

/// Opens the socket and, as `ssl_mode` says, TLS on it; also returns the data for SCRAM's channel binding.
pub(super) async fn open(attempt: &Attempt) -> io::Result<(Box<dyn Duplex>, Option<Vec<u8>>)> {
    let config = &attempt.config;
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let (tcp, name) = match (config.get_hosts().first(), config.get_hostaddrs().first()) {
        #[cfg(unix)]
        (Some(Host::Unix(directory)), _) => {
            let socket = UnixStream::connect(directory.join(format!(".s.PGSQL.{port}"))).await?;
            return Ok((Box::new(socket), None));
        }
        (host, Some(address)) => {
            let name = if let Some(Host::Tcp(name)) = host { name.clone() } else { address.to_string() };
            (TcpStream::connect((*address, port)).await?, name)
        }
        (Some(Host::Tcp(name)), None) => (TcpStream::connect((name.as_str(), port)).await?, name.clone()),
        (None, None) => return Err(io::Error::other("no host")),
    };
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(&tcp);
    // Both are wishes: the system may give less, and the stream works all the same.
    let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES);
    if let Some(timeout) = config.get_tcp_user_timeout() {
        let _ = socket.set_tcp_user_timeout(Some(*timeout));
    }
    if config.get_keepalives() {
        let _ = socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(config.get_keepalives_idle()));
    }
    let mut tcp = tcp;
    if config.get_ssl_mode() == SslMode::Disable {
        return Ok((Box::new(tcp), None));
    }
    let mut out = BytesMut::new();
    frontend::ssl_request(&mut out);
    tcp.write_all_buf(&mut out).await?;
    // One byte and no more is read here: what follows it must not be taken for part of the TLS session.
    match tcp.read_u8().await? {
        b'S' => {
            let (stream, binding) = attempt.tls.handshake(&name, tcp).await?;
            Ok((Box::new(stream), binding))
        }
        _ if config.get_ssl_mode() == SslMode::Prefer => Ok((Box::new(tcp), None)),
        _ => Err(io::Error::other("the server does not support TLS, which sslmode requires")),
    }
}
