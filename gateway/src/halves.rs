//! A connection that two tasks of one thread share: one reads it, the other writes. `tokio::io::split` would take a lock at each read and
//! write, for halves that may be on two threads; these never are.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use catalog::wire::Socket;
use pgwire::tokio::server::MaybeTls;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};

/// A connection with the other side of a session.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Unpin + 'static {
    /// Writes as much as there is room for, without waiting and so that it needs no flush.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is no room or it cannot be done like that, else that of the socket.
    fn write_now(&self, bytes: &[u8]) -> io::Result<usize>;
}

impl Connection for MaybeTls {
    fn write_now(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            MaybeTls::Plain(tcp) => tcp.try_write(bytes),
            // TLS.
            _ => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

impl Connection for Socket {
    fn write_now(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(tcp) => tcp.try_write(bytes),
            Socket::Unix(unix) => unix.try_write(bytes),
            Socket::Tls(_) => Err(io::ErrorKind::WouldBlock.into()),
        }
    }
}

/// A connection that can be read and written by turns.
pub(crate) struct Halves<S>(Rc<RefCell<S>>);

/// One side of a [`Halves`]: what is read or written through it is the connection's.
pub(crate) struct Half<S>(Rc<RefCell<S>>);

impl<S> Halves<S> {
    /// Takes the connection.
    pub(crate) fn new(socket: S) -> Halves<S> {
        Halves(Rc::new(RefCell::new(socket)))
    }

    /// Returns one side of it.
    pub(crate) fn half(&self) -> Half<S> {
        Half(self.0.clone())
    }

    /// Returns the connection, unless a side of it is still in use.
    pub(crate) fn into_inner(self) -> Option<S> {
        Rc::into_inner(self.0).map(RefCell::into_inner)
    }
}

impl<S: Connection> Half<S> {
    /// Sends all of it. Mostly there is room, and nothing has to be waited for.
    ///
    /// # Errors
    /// [`io::Error`] of the socket.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let written = self.0.borrow().write_now(bytes);
        let written = match written {
            Ok(written) if written == bytes.len() => return Ok(()),
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
        self.write_all(&bytes[written..]).await?;
        self.flush().await
    }
}

// A poll is over before the next begins, so a borrow never meets another.
impl<S: AsyncRead + Unpin> AsyncRead for Half<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Half<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_shutdown(cx)
    }
}
