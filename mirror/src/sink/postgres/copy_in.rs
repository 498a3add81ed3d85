//! COPY from here to the target.

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt;
use pg::pgoutput::{Tuple, Value};
use tokio_postgres::Statement;

use crate::batch::Sorted;
use crate::error::Error;
use crate::relation::TableMap;
use crate::session::PeerSession;
use crate::sink::encode;

/// Bytes that are gathered before they are handed to the connection. A large value goes in pieces of this size, so that it is in memory
/// once.
const SEND_BYTES: usize = 256 << 10;

/// A running COPY.
pub(super) struct CopyWriter {
    peer: String,
    sink: std::pin::Pin<Box<tokio_postgres::CopyInSink<Bytes>>>,
    buffer: BytesMut,
}

impl CopyWriter {
    /// Begins a COPY in binary form.
    pub(super) async fn open(target: &PeerSession, statement: &Statement) -> Result<CopyWriter, Error> {
        let sink = target.client.copy_in(statement).await.map_err(|e| target.error(&e))?;
        let mut buffer = BytesMut::with_capacity(SEND_BYTES);
        encode::begin(&mut buffer);
        Ok(CopyWriter { peer: target.peer.clone(), sink: Box::pin(sink), buffer })
    }

    /// Sends a row of the target's columns.
    pub(super) async fn row(&mut self, table: &TableMap, tuple: &Tuple) -> Result<(), Error> {
        encode::row(&mut self.buffer, table.columns.len());
        self.values(table, tuple, |_| Field::Sent).await
    }

    /// Sends a row of a staging table: its group, whether it was deleted where such rows stay, then the columns.
    pub(super) async fn staged_row(
        &mut self,
        group: i16,
        table: &TableMap,
        tuple: &Tuple,
        staged: Staged,
    ) -> Result<(), Error> {
        self.begin_staged(group, table, 0, staged == Staged::Deleted);
        let only_key = staged == Staged::Key;
        self.values(table, tuple, |key| if key || !only_key { Field::Sent } else { Field::Null }).await
    }

    fn begin_staged(&mut self, group: i16, table: &TableMap, more: usize, deleted: bool) {
        let softly = table.deletes_softly();
        encode::row(&mut self.buffer, table.columns.len() + 1 + usize::from(softly) + more);
        encode::group(&mut self.buffer, group);
        if softly {
            encode::value(&mut self.buffer, Some(1));
            self.buffer.extend_from_slice(&[u8::from(deleted)]);
        }
    }

    /// Sends a row of a staging table that moves to another key: its group, its values, its old key.
    pub(super) async fn moved_row(
        &mut self,
        group: i16,
        table: &TableMap,
        old: &Tuple,
        new: &Tuple,
        deleted: bool,
    ) -> Result<(), Error> {
        self.begin_staged(group, table, table.columns.iter().filter(|c| c.key).count(), deleted);
        self.values(table, new, |_| Field::Sent).await?;
        self.values(table, old, |key| if key { Field::Sent } else { Field::Absent }).await
    }

    async fn values(&mut self, table: &TableMap, tuple: &Tuple, field: impl Fn(bool) -> Field) -> Result<(), Error> {
        let mut values = tuple.values();
        let mut next = 0;
        for column in &table.columns {
            let value = values.nth(column.position - next);
            next = column.position + 1;
            match (field(column.key), value) {
                (Field::Absent, _) => {}
                (Field::Sent, Some(Value::Text(bytes) | Value::Binary(bytes))) => {
                    encode::value(&mut self.buffer, Some(bytes.len()));
                    let mut rest = bytes;
                    while self.buffer.len() + rest.len() > 2 * SEND_BYTES {
                        let (piece, after) = rest.split_at(rest.len().min(SEND_BYTES));
                        self.buffer.extend_from_slice(piece);
                        self.send().await?;
                        rest = after;
                    }
                    self.buffer.extend_from_slice(rest);
                }
                _ => encode::value(&mut self.buffer, None),
            }
        }
        if self.buffer.len() >= SEND_BYTES { self.send().await } else { Ok(()) }
    }

    async fn send(&mut self) -> Result<(), Error> {
        let filled = self.buffer.split().freeze();
        self.buffer.reserve(SEND_BYTES);
        self.sink.send(filled).await.map_err(|e| Error::sql(&self.peer, &e))
    }

    /// Ends the COPY; only then the rows are there.
    pub(super) async fn finish(mut self) -> Result<(), Error> {
        encode::finish(&mut self.buffer);
        self.send().await?;
        self.sink.as_mut().finish().await.map(|_| ()).map_err(|e| Error::sql(&self.peer, &e))
    }
}

/// What is staged of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Staged {
    /// Its key; the other values are NULL: an old key has no more.
    Key,
    /// All of it.
    Whole,
    /// All of it; it was deleted on the source, and stays.
    Deleted,
}

impl Staged {
    /// What is staged of one of the rows that are written.
    pub(super) fn whole(rows: &Sorted<'_>, row: &Tuple) -> Staged {
        if rows.is_deleted(row) { Staged::Deleted } else { Staged::Whole }
    }
}

/// What a column of a row is.
enum Field {
    /// What was sent; NULL if nothing was.
    Sent,
    /// NULL.
    Null,
    /// Not in the row at all.
    Absent,
}
