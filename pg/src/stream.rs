//! What travels inside CopyData while a walsender streams.
//!
//! Not for: the frames around it (see the replication client), nor what is inside the WAL data (see [`crate::pgoutput`]).

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::lsn::Lsn;
use crate::pgoutput::DecodeError;

/// One CopyData message from a walsender.
///
/// Source: PostgreSQL docs, protocol-replication, "START_REPLICATION".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamMessage {
    /// `w`: one message of the output plugin.
    XLogData {
        /// Where the data begins in the WAL.
        start: Lsn,
        /// The walsender's end of WAL when it sent this.
        end: Lsn,
        /// The output plugin's message.
        body: Bytes,
    },
    /// `k`: the walsender says where it is, and may ask for an answer.
    Keepalive {
        /// Everything before this has been decoded; when no transaction is pending, nothing of ours is before it any more.
        end: Lsn,
        /// The walsender drops the connection unless it gets a status soon.
        reply_requested: bool,
    },
}

impl StreamMessage {
    /// Decodes the body of a CopyData message.
    ///
    /// # Errors
    /// [`DecodeError`] if the tag is unknown or the body ends early. Never panics: the body comes from the network.
    pub fn decode(mut body: Bytes) -> Result<StreamMessage, DecodeError> {
        if body.is_empty() {
            return Err(DecodeError::Truncated);
        }
        match body.get_u8() {
            b'w' if body.len() >= 24 => {
                let start = Lsn(body.get_u64());
                let end = Lsn(body.get_u64());
                body.advance(8);
                Ok(StreamMessage::XLogData { start, end, body })
            }
            b'k' if body.len() >= 17 => {
                let end = Lsn(body.get_u64());
                body.advance(8);
                Ok(StreamMessage::Keepalive { end, reply_requested: body.get_u8() == 1 })
            }
            b'w' | b'k' => Err(DecodeError::Truncated),
            tag => Err(DecodeError::UnknownTag(tag)),
        }
    }
}

/// What a receiver reports to the walsender.
///
/// Source: PostgreSQL docs, protocol-replication, "Standby status update".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandbyStatus {
    /// Everything before this was read.
    pub received: Lsn,
    /// Everything before this is durable at the target and recorded there; the source may forget it.
    pub flushed: Lsn,
    /// The walsender is asked to answer at once, which shows that it is alive.
    pub reply_requested: bool,
}

impl StandbyStatus {
    /// Appends the CopyData body. `clock` is microseconds since 2000-01-01, which the server only shows.
    pub fn encode(&self, clock: i64, out: &mut BytesMut) {
        out.put_u8(b'r');
        out.put_u64(self.received.0);
        out.put_u64(self.flushed.0);
        out.put_u64(self.flushed.0);
        out.put_i64(clock);
        out.put_u8(u8::from(self.reply_requested));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keepalive_and_data_are_told_apart() {
        let mut body = BytesMut::new();
        body.put_u8(b'k');
        body.put_u64(7);
        body.put_i64(0);
        body.put_u8(1);
        assert_eq!(
            StreamMessage::decode(body.freeze()),
            Ok(StreamMessage::Keepalive { end: Lsn(7), reply_requested: true })
        );
        let mut body = BytesMut::new();
        body.put_u8(b'w');
        body.put_u64(5);
        body.put_u64(9);
        body.put_i64(0);
        body.put_slice(b"B...");
        assert_eq!(
            StreamMessage::decode(body.freeze()),
            Ok(StreamMessage::XLogData { start: Lsn(5), end: Lsn(9), body: Bytes::from_static(b"B...") })
        );
    }

    #[test]
    fn an_unknown_or_short_message_is_an_error() {
        for body in [&b""[..], b"x", b"w", b"k1234567812345678", b"w12345678123456781234567"] {
            assert!(StreamMessage::decode(Bytes::copy_from_slice(body)).is_err());
        }
    }

    #[test]
    fn status_has_the_documented_length() {
        let mut out = BytesMut::new();
        StandbyStatus { received: Lsn(3), flushed: Lsn(2), reply_requested: false }.encode(0, &mut out);
        assert_eq!(out.len(), 34);
        assert_eq!(&out[1..9], &3u64.to_be_bytes());
        assert_eq!(&out[9..17], &2u64.to_be_bytes());
    }
}
