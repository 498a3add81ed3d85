//! A connection in two halves for two futures of one task. `tokio::io::split` would take a lock at each read and write, for halves that
//! may be on two threads; these never are.

use std::cell::RefCell;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection that can be read and written by turns.
pub(crate) struct Halves<S>(RefCell<S>);

/// One side of a [`Halves`]: what is read or written through it is the connection's.
pub(crate) struct Half<'a, S>(&'a RefCell<S>);

impl<S> Halves<S> {
    /// Takes the connection.
    pub(crate) fn new(socket: S) -> Halves<S> {
        Halves(RefCell::new(socket))
    }

    /// Returns one side of it.
    pub(crate) fn half(&self) -> Half<'_, S> {
        Half(&self.0)
    }

    /// Returns the connection.
    pub(crate) fn into_inner(self) -> S {
        self.0.into_inner()
    }
}

// A poll is over before the next begins, so a borrow never meets another.
impl<S: AsyncRead + Unpin> AsyncRead for Half<'_, S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Half<'_, S> {
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
