//! Reading under the replication protocol, and the bounds of its frames.

use std::io;

use bytes::BytesMut;
use catalog::wire::Socket;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::error::Error;

/// Room made for each read.
pub(super) const READ_BYTES: usize = 256 << 10;

/// Socket buffer for the stream: a walsender sends each message by itself, and a large buffer lets many wait for one read.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;

/// Largest message that can be: a row of 1 GiB, and what is around it.
const MESSAGE_BYTES_MAX: usize = (1 << 30) + (1 << 20);

/// Reads what is there, or waits for it; 0 means that the server has closed.
pub(super) async fn fill(io: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> io::Result<usize> {
    // A large frame has its room already, and more would be as much again.
    if buffer.capacity() - buffer.len() < READ_BYTES / 4 {
        buffer.reserve(READ_BYTES);
    }
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

/// Gives the stream's socket room. It is a wish: the system may give less, and the stream works all the same.
pub(super) fn widen(socket: &Socket) {
    if let Some(tcp) = socket.tcp() {
        let _ = SockRef::from(tcp).set_recv_buffer_size(RECEIVE_BUFFER_BYTES);
    }
}
