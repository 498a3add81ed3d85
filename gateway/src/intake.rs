//! How a direction of a session reads: without a buffer while nothing comes, with a large one where much comes, and within what all
//! sessions together may hold.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Size of each direction's buffer, in bytes.
pub(crate) const BUFFER_BYTES: usize = 64 * 1024;

/// A read of at least this much means that more is coming: a server sends rows by 8 kB.
const MUCH_BYTES: usize = 8 * 1024;

/// What all sessions together may hold of frames that have to be seen whole, in buffers of [`BUFFER_BYTES`]: 64 MiB. What is made of
/// them takes up to five times that, for a moment.
pub(crate) const HELD_BUFFERS_MAX: usize = 1024;

/// How long a session waits for others to be done with what they hold.
const HELD_TIMEOUT: Duration = Duration::from_secs(10);

thread_local! {
    /// Where what comes for sessions that have no buffer is read to: one buffer for all the idle ones of a thread.
    static LANDING: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_BYTES].into_boxed_slice());
}

/// Reads for a pump, and sees to its buffer: none while nothing comes, more where much comes.
#[derive(Default)]
pub(crate) struct Intake {
    /// What the last read brought, in bytes.
    last: usize,
    /// The largest that the buffer has been, in bytes.
    largest: usize,
    /// Its share of what all sessions may hold, for what it holds beyond a buffer's size.
    share: Option<OwnedSemaphorePermit>,
}

impl Intake {
    /// Reads more behind what the buffer holds; 0 at the end.
    ///
    /// # Errors
    /// [`io::Error`] of the socket.
    pub(crate) async fn read<R: AsyncRead + Unpin>(
        &mut self,
        reader: &mut R,
        buffer: &mut BytesMut,
    ) -> io::Result<usize> {
        if buffer.is_empty() && self.largest > 4 * BUFFER_BYTES {
            // Not by its capacity: what was taken off its front is not in it.
            *self = Intake::default();
            *buffer = BytesMut::new();
        }
        // Much is coming, and is read to where it stays.
        if !buffer.is_empty() || self.last >= MUCH_BYTES {
            if buffer.capacity() - buffer.len() < BUFFER_BYTES / 2 {
                buffer.reserve(BUFFER_BYTES);
            }
            self.largest = self.largest.max(buffer.capacity());
        }
        let read = poll_fn(|cx| {
            let room = buffer.capacity() - buffer.len();
            if room >= BUFFER_BYTES / 2 {
                let read = pin!(reader.read_buf(buffer)).poll(cx);
                if read.is_pending() && buffer.is_empty() {
                    *buffer = BytesMut::new();
                }
                return read;
            }
            LANDING.with_borrow_mut(|landing| {
                let mut landing = ReadBuf::new(landing);
                ready!(Pin::new(&mut *reader).poll_read(cx, &mut landing))?;
                buffer.extend_from_slice(landing.filled());
                Poll::Ready(Ok(landing.filled().len()))
            })
        })
        .await?;
        self.last = read;
        Ok(read)
    }

    /// Returns how much more of what all sessions may hold the buffer needs, in buffers; one that needs nothing gives its share back. A
    /// frame that is held whole makes the buffer grow only as its bytes come.
    pub(crate) fn lacks(&mut self, buffer: &BytesMut) -> usize {
        let beyond = buffer.len() / BUFFER_BYTES;
        if beyond == 0 {
            self.share = None;
            return 0;
        }
        beyond.saturating_sub(self.share.as_ref().map_or(0, OwnedSemaphorePermit::num_permits))
    }

    /// Takes that much more; `false`: there is none to be had.
    pub(crate) async fn take(&mut self, more: usize, held: &Arc<Semaphore>) -> bool {
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        let acquired = tokio::time::timeout(HELD_TIMEOUT, held.clone().acquire_many_owned(more)).await;
        let Ok(Ok(permit)) = acquired else { return false };
        match &mut self.share {
            Some(share) => share.merge(permit),
            None => self.share = Some(permit),
        }
        true
    }
}

/// Reads on while something else is being done, so that the client's end is noticed. Returns when it is gone; what it says is kept,
/// up to a buffer more.
pub(crate) async fn listen<R: AsyncRead + Unpin>(client: &mut R, buffer: &mut BytesMut) {
    let limit = buffer.len() + BUFFER_BYTES;
    while buffer.len() < limit {
        match client.read_buf(buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
    std::future::pending::<()>().await;
}
