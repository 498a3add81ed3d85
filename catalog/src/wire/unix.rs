//! A Unix socket that is watched for what there is to read, and for room to write only while that is waited for.
//!
//! tokio's own is watched for both all the time, and the system reports room whenever the other side has read: whoever asks one question
//! at a time would be woken once more for each.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// A connected Unix socket.
#[derive(Debug)]
pub struct UnixSocket {
    socket: AsyncFd<UnixStream>,
    /// Watches for room to write; there while that is waited for.
    room: Option<AsyncFd<UnixStream>>,
}

impl UnixSocket {
    /// Connects to the socket at a path.
    ///
    /// # Errors
    /// [`io::Error`] of the system.
    pub async fn connect(path: PathBuf) -> io::Result<UnixSocket> {
        let socket = tokio::net::UnixStream::connect(path).await?.into_std()?;
        Ok(UnixSocket { socket: watch(socket, Interest::READABLE)?, room: None })
    }

    /// Writes what there is room for, without waiting.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none, or what the system says.
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.get_ref().write(bytes)
    }
}

fn watch(socket: UnixStream, interest: Interest) -> io::Result<AsyncFd<UnixStream>> {
    // SAFETY: the socket has one file descriptor, which is open as long as it lives.
    Ok(unsafe { AsyncFd::register_with_interest(socket, interest) }?)
}

impl AsyncRead for UnixSocket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut watch = ready!(self.socket.poll_read_ready(cx))?;
            // SAFETY: nothing is taken out of the buffer, and what is written to it is initialized by that.
            let space = unsafe { buffer.unfilled_mut() };
            let room = space.len();
            match SockRef::from(self.socket.get_ref()).recv(space) {
                Ok(read) => {
                    // Less than there was room for was all there is: no need to be told so by another read.
                    if read > 0 && read < room {
                        watch.clear_ready();
                    }
                    // SAFETY: the system has just written that many bytes there.
                    unsafe { buffer.assume_init(read) };
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => watch.clear_ready(),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for UnixSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match self.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => {
                    if written.as_ref().is_ok_and(|written| *written == bytes.len()) {
                        self.room = None;
                    }
                    return Poll::Ready(written);
                }
            }
            let room = match self.room.take() {
                Some(room) => room,
                None => watch(self.socket.get_ref().try_clone()?, Interest::WRITABLE)?,
            };
            // Forgotten before it is tried again: what is reported from then on counts.
            let ready = self.room.insert(room).poll_write_ready(cx)?.map(|mut watch| watch.clear_ready());
            ready!(ready);
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.socket.get_ref().shutdown(Shutdown::Write))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    const MEGABYTES: usize = 8;

    async fn pair() -> (UnixSocket, UnixStream) {
        let folder = std::env::temp_dir().join(format!("unix-{}-{:x}", std::process::id(), rand::random::<u64>()));
        let listener = std::os::unix::net::UnixListener::bind(&folder).unwrap();
        let socket = UnixSocket::connect(folder.clone()).await.unwrap();
        std::fs::remove_file(folder).unwrap();
        (socket, listener.accept().unwrap().0)
    }

    #[tokio::test]
    async fn what_is_written_waits_for_its_reader_and_arrives() {
        let (mut socket, mut other) = pair().await;
        let sent: Vec<u8> = (0..MEGABYTES << 20).map(|n| (n % 251) as u8).collect();
        // More than there is room for: without a reader it is never through.
        let early = tokio::time::timeout(Duration::from_millis(50), socket.write_all(&sent[..])).await;
        assert!(early.is_err() && socket.room.is_some());
        assert_eq!(socket.try_write(b"x").unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            other.read_to_end(&mut all).map(|_| all)
        });
        socket.write_all(&sent).await.unwrap();
        assert!(socket.room.is_none());
        socket.shutdown().await.unwrap();
        let all = reader.join().unwrap().unwrap();
        // The part that was sent in vain, then all of it.
        assert!(all.len() > sent.len() && all.ends_with(&sent));
    }

    #[tokio::test]
    async fn what_comes_is_read_to_the_end() {
        let (mut socket, mut other) = pair().await;
        let sent: Vec<u8> = (0..MEGABYTES << 20).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let writer = std::thread::spawn(move || other.write_all(&sent));
        let mut all = Vec::new();
        socket.read_to_end(&mut all).await.unwrap();
        writer.join().unwrap().unwrap();
        assert!(all == expected);
    }
}
