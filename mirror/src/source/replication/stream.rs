//! A running stream: what comes, and telling the walsender how far we are.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Buf, Bytes, BytesMut};
use catalog::wire::Socket;
use pg::Lsn;
use pg::stream::{StandbyStatus, StreamMessage};
use postgres_protocol::message::backend;
use tokio::io::{AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::transport::{READ_BYTES, fill, frame_length};
use super::{ReplicationConnection, problem_of};
use crate::error::Error;

/// A read of at least this much means that we are behind; one that fills the room, that more is there already.
const BEHIND_BYTES: usize = 32 << 10;

/// A frame whose memory is worth giving back at once.
const LARGE_FRAME: usize = 4 << 20;

/// How long to let data gather while behind: fewer, larger reads leave the walsender more of the processor. Not on a Unix socket, whose
/// buffer is the sender's and small: there the walsender would only wait.
const GATHER: Duration = Duration::from_millis(2);

/// How often a status is sent when there is nothing new to say; more often where the walsender has less patience.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// Silence after which the walsender is taken for dead, unless told otherwise; it is asked to answer at every second status.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Microseconds from the Unix epoch to that of PostgreSQL.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

/// What the stream brings.
#[derive(Debug)]
pub enum Incoming {
    /// A message of the output plugin, and where it begins in the WAL.
    Data(Lsn, Bytes),
    /// Everything before this position has been decoded by the walsender.
    Keepalive(Lsn),
}

/// A running stream. Reading it and telling the walsender how far we are go on independently.
pub struct ReplicationStream {
    peer: String,
    reader: ReadHalf<Socket>,
    buffer: BytesMut,
    gathers: bool,
    behind: bool,
    /// When something was last read, or waited for.
    heard: Instant,
    silence_max: Duration,
    status: watch::Sender<StandbyStatus>,
    reply: Arc<Notify>,
    writer: JoinHandle<()>,
}

/// Dropping the stream closes the connection; the walsender then frees the slot.
impl Drop for ReplicationStream {
    fn drop(&mut self) {
        self.writer.abort();
    }
}

impl ReplicationStream {
    /// Streams on a connection that has begun to; `patience` is how long the walsender waits to hear from us, zero: for ever.
    pub(super) fn new(connection: ReplicationConnection, from: Lsn, patience: Duration) -> ReplicationStream {
        let (reader, writer) = tokio::io::split(connection.io);
        let first = StandbyStatus { received: from, flushed: from, reply_requested: false };
        let (status, changes) = watch::channel(first);
        let reply = Arc::new(Notify::new());
        let writer = tokio::spawn(send_statuses(writer, changes, reply.clone(), status_interval(patience)));
        ReplicationStream {
            peer: connection.peer,
            reader,
            buffer: connection.buffer,
            gathers: connection.gathers,
            behind: false,
            heard: Instant::now(),
            silence_max: SILENCE_MAX,
            status,
            reply,
            writer,
        }
    }

    /// Sets the silence after which the walsender is taken for dead: more than the ten seconds between two questions.
    pub fn set_silence_max(&mut self, silence_max: Duration) {
        self.silence_max = silence_max;
    }

    /// Returns how far the walsender is told that we are.
    pub fn flushed(&self) -> Lsn {
        self.status.borrow().flushed
    }

    /// Tells the walsender that everything before `durable` is applied and recorded on the target.
    ///
    /// It never goes back: a lower position than one that was told already is ignored.
    pub fn acknowledge(&self, durable: crate::progress::DurableLsn) {
        self.status.send_if_modified(|status| {
            let ahead = durable.lsn() > status.flushed;
            if ahead {
                status.flushed = durable.lsn();
                status.received = status.received.max(durable.lsn());
            }
            ahead
        });
    }

    /// Waits for what comes next. Can be dropped and called again without losing anything.
    ///
    /// # Errors
    /// [`Error::Transient`] if the connection broke or went silent, [`Error::Blocked`] if what came is not the protocol.
    pub async fn next(&mut self) -> Result<Incoming, Error> {
        loop {
            if let Some(incoming) = self.next_buffered()? {
                return Ok(incoming);
            }
            if self.behind {
                tokio::time::sleep(GATHER).await;
            }
            // Whoever waits here stops and begins again now and then; the silence goes on meanwhile.
            let silent = self.heard + self.silence_max;
            let read = tokio::time::timeout_at(silent, fill(&mut self.reader, &mut self.buffer)).await;
            let read =
                read.map_err(|_| Error::connection(&self.peer, &format!("silent for {:?}", self.silence_max)))?;
            let read = read.map_err(|e| Error::connection(&self.peer, &e.to_string()))?;
            if read == 0 {
                return Err(Error::connection(&self.peer, "closed by the server"));
            }
            self.heard = Instant::now();
            self.behind = self.gathers && (BEHIND_BYTES..READ_BYTES).contains(&read);
        }
    }

    /// Returns what comes next if it has been read already.
    ///
    /// # Errors
    /// As [`ReplicationStream::next`].
    pub fn next_buffered(&mut self) -> Result<Option<Incoming>, Error> {
        while let Some(length) = frame_length(&self.peer, &self.buffer)? {
            if self.buffer.len() < length {
                // A large row: make room for all of it at once.
                self.buffer.reserve(length - self.buffer.len() + READ_BYTES);
                return Ok(None);
            }
            let mut frame = self.buffer.split_to(length).freeze();
            if length > LARGE_FRAME {
                // What follows would keep all of its memory.
                self.buffer = BytesMut::from(&self.buffer[..]);
            }
            let tag = frame[0];
            frame.advance(5);
            match tag {
                b'd' => match StreamMessage::decode(frame)? {
                    StreamMessage::XLogData { start, body, .. } => {
                        self.note_received(start);
                        return Ok(Some(Incoming::Data(start, body)));
                    }
                    StreamMessage::Keepalive { end, reply_requested } => {
                        self.note_received(end);
                        if reply_requested {
                            self.reply.notify_one();
                        }
                        return Ok(Some(Incoming::Keepalive(end)));
                    }
                },
                b'N' | b'S' => {}
                b'E' => {
                    let mut whole = BytesMut::with_capacity(length);
                    whole.extend_from_slice(b"E");
                    whole.extend_from_slice(&u32::try_from(length - 1).unwrap_or(u32::MAX).to_be_bytes());
                    whole.extend_from_slice(&frame);
                    return match backend::Message::parse(&mut whole) {
                        Ok(Some(backend::Message::ErrorResponse(body))) => {
                            Err(Error::server(problem_of(&self.peer, &body)))
                        }
                        _ => Err(Error::protocol(&self.peer, "malformed error")),
                    };
                }
                // CopyDone, and CommandComplete: a server that is shut down in an orderly way says goodbye.
                b'c' | b'C' => return Err(Error::connection(&self.peer, "the server ended the stream")),
                tag => return Err(Error::protocol(&self.peer, format!("unexpected message {:?}", char::from(tag)))),
            }
        }
        Ok(None)
    }

    /// Says that nothing was read for a while because there was no room: that was not the walsender's silence.
    pub fn listen_anew(&mut self) {
        self.heard = Instant::now();
    }

    /// Silent: the next status that is due carries it.
    fn note_received(&self, received: Lsn) {
        self.status.send_if_modified(|status| {
            status.received = status.received.max(received);
            false
        });
    }
}

/// Tells the walsender how far we are: at once when something became durable or it asks, else at a steady pace.
///
/// Every second status of that pace asks for an answer, so that a dead walsender is noticed by the reader's silence.
async fn send_statuses(
    mut writer: WriteHalf<Socket>,
    mut changes: watch::Receiver<StandbyStatus>,
    reply: Arc<Notify>,
    interval: Duration,
) {
    let mut ask = false;
    loop {
        let mut status = *changes.borrow_and_update();
        status.reply_requested = ask;
        let mut out = BytesMut::with_capacity(64);
        out.extend_from_slice(b"d\0\0\0\x26");
        status.encode(postgres_clock(), &mut out);
        if writer.write_all_buf(&mut out).await.is_err() || writer.flush().await.is_err() {
            // The reader will see that the connection is gone.
            return;
        }
        ask = tokio::select! {
            changed = changes.changed() => match changed {
                Ok(()) => false,
                Err(_) => return,
            },
            () = reply.notified() => false,
            () = tokio::time::sleep(interval) => !ask,
        };
    }
}

/// A third of the walsender's patience: while nothing is read, for want of room, its questions are not seen.
fn status_interval(patience: Duration) -> Duration {
    if patience.is_zero() { STATUS_INTERVAL } else { STATUS_INTERVAL.min(patience / 3) }
}

/// Returns microseconds since 2000-01-01 00:00 UTC by this machine's clock.
pub fn postgres_clock() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX).saturating_sub(POSTGRES_EPOCH)
}
