//! The messages of the `pgoutput` plugin, protocol version 1, decoded without looking at values.
//!
//! A [`Tuple`] keeps the bytes as they came; what they mean is never parsed. Not for: streamed (in-progress) transactions and
//! two-phase messages, which protocol version 1 does not send.
//!
//! Source: PostgreSQL docs, protocol-logicalrep-message-formats.

mod decode;
mod relation;
mod tuple;

use bytes::Bytes;

use crate::lsn::Lsn;

pub use relation::{Column, Identity, Relation};
pub use tuple::{Tuple, Value};

/// A message was not what the protocol says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ends before its last field.
    #[error("message ends early")]
    Truncated,
    /// There is more than the message says there is.
    #[error("message has bytes after its end")]
    TrailingBytes,
    /// No message or value has this tag.
    #[error("unknown tag {0:#04x}")]
    UnknownTag(u8),
    /// A name is not UTF-8, although the session asked for it.
    #[error("name is not valid UTF-8")]
    NotUtf8,
}

/// One message of the output plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// `B`: a transaction begins.
    Begin {
        /// Start of the commit record.
        commit_lsn: Lsn,
        /// When it was committed, in microseconds since 2000-01-01 00:00 UTC.
        commit_time: i64,
        /// The transaction.
        xid: u32,
    },
    /// `C`: the transaction is complete.
    Commit {
        /// Start of the commit record.
        commit_lsn: Lsn,
        /// Just past the commit record: where streaming resumes once this transaction is applied.
        end_lsn: Lsn,
        /// When it was committed, in microseconds since 2000-01-01 00:00 UTC.
        commit_time: i64,
    },
    /// `O`: the transaction came from elsewhere.
    Origin {
        /// The commit's position at its origin.
        commit_lsn: Lsn,
        /// The replication origin's name.
        name: String,
    },
    /// `R`: what the rows that follow look like.
    Relation(Relation),
    /// `Y`: a type that is not built in.
    Type {
        /// The type on the source.
        oid: u32,
        /// Its schema; empty means `pg_catalog`.
        schema: String,
        /// Its name.
        name: String,
    },
    /// `I`: a row was inserted.
    Insert {
        /// The relation's oid.
        relation: u32,
        /// The new row.
        new: Tuple,
    },
    /// `U`: a row was updated.
    Update {
        /// The relation's oid.
        relation: u32,
        /// The old key (`K`) or row (`O`); absent when the key did not change.
        old: Option<Tuple>,
        /// The new row; a large value that did not change is [`Value::Unchanged`].
        new: Tuple,
    },
    /// `D`: a row was deleted.
    Delete {
        /// The relation's oid.
        relation: u32,
        /// The old key or row.
        old: Tuple,
    },
    /// `T`: tables were truncated.
    Truncate {
        /// The relations' oids.
        relations: Vec<u32>,
        /// `CASCADE` was given.
        cascade: bool,
        /// `RESTART IDENTITY` was given.
        restart_identity: bool,
    },
    /// `M`: a logical decoding message.
    Message {
        /// It belongs to the transaction around it.
        transactional: bool,
        /// Where it is.
        lsn: Lsn,
        /// What its sender called it.
        prefix: String,
        /// What it says.
        content: Bytes,
    },
}
