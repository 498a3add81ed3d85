//! From bytes to [`Message`].

use bytes::{Buf, Bytes};

use super::{Column, DecodeError, Identity, Message, Relation, Tuple};
use crate::lsn::Lsn;

impl Message {
    /// Decodes one message. Values stay slices of `body`.
    ///
    /// # Errors
    /// [`DecodeError`] if the tag is unknown, the message ends early or something follows it. Never panics: `body` comes from the
    /// network.
    pub fn decode(body: Bytes) -> Result<Message, DecodeError> {
        let mut reader = Reader(body);
        let message = match reader.u8()? {
            b'B' => Message::Begin { commit_lsn: reader.lsn()?, commit_time: reader.i64()?, xid: reader.u32()? },
            b'C' => {
                reader.u8()?; // flags, none are defined
                Message::Commit { commit_lsn: reader.lsn()?, end_lsn: reader.lsn()?, commit_time: reader.i64()? }
            }
            b'O' => Message::Origin { commit_lsn: reader.lsn()?, name: reader.string()? },
            b'R' => Message::Relation(reader.relation()?),
            b'Y' => Message::Type { oid: reader.u32()?, schema: reader.string()?, name: reader.string()? },
            b'I' => {
                let relation = reader.u32()?;
                match reader.u8()? {
                    b'N' => Message::Insert { relation, new: reader.tuple()? },
                    tag => return Err(DecodeError::UnknownTag(tag)),
                }
            }
            b'U' => {
                let relation = reader.u32()?;
                let (old, tag) = match reader.u8()? {
                    b'K' | b'O' => (Some(reader.tuple()?), reader.u8()?),
                    tag => (None, tag),
                };
                match tag {
                    b'N' => Message::Update { relation, old, new: reader.tuple()? },
                    tag => return Err(DecodeError::UnknownTag(tag)),
                }
            }
            b'D' => {
                let relation = reader.u32()?;
                match reader.u8()? {
                    b'K' | b'O' => Message::Delete { relation, old: reader.tuple()? },
                    tag => return Err(DecodeError::UnknownTag(tag)),
                }
            }
            b'T' => {
                let count = reader.u32()? as usize;
                let flags = reader.u8()?;
                // The count is not trusted for an allocation: each oid must really be there.
                let mut relations = Vec::new();
                for _ in 0..count {
                    relations.push(reader.u32()?);
                }
                Message::Truncate { relations, cascade: flags & 1 != 0, restart_identity: flags & 2 != 0 }
            }
            b'M' => {
                let flags = reader.u8()?;
                let lsn = reader.lsn()?;
                let prefix = reader.string()?;
                let length = reader.u32()? as usize;
                Message::Message { transactional: flags & 1 != 0, lsn, prefix, content: reader.take(length)? }
            }
            tag => return Err(DecodeError::UnknownTag(tag)),
        };
        if reader.0.is_empty() { Ok(message) } else { Err(DecodeError::TrailingBytes) }
    }
}

/// Takes fields off the front of a message, and never more than there are.
struct Reader(Bytes);

impl Reader {
    fn take(&mut self, length: usize) -> Result<Bytes, DecodeError> {
        if self.0.len() < length { Err(DecodeError::Truncated) } else { Ok(self.0.split_to(length)) }
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(self.take(2)?.get_u16())
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(self.take(4)?.get_u32())
    }

    fn i64(&mut self) -> Result<i64, DecodeError> {
        Ok(self.take(8)?.get_i64())
    }

    fn lsn(&mut self) -> Result<Lsn, DecodeError> {
        Ok(Lsn(self.take(8)?.get_u64()))
    }

    fn string(&mut self) -> Result<String, DecodeError> {
        let end = self.0.iter().position(|b| *b == 0).ok_or(DecodeError::Truncated)?;
        let text = self.take(end)?;
        self.u8()?; // the terminating zero
        std::str::from_utf8(&text).map(str::to_owned).map_err(|_| DecodeError::NotUtf8)
    }

    fn tuple(&mut self) -> Result<Tuple, DecodeError> {
        Tuple::split_from(&mut self.0)
    }

    /// Decodes the body of a `Relation` message after its tag:
    /// `oid u32, schema cstr, name cstr, identity u8, n u16, n × (flags u8, name cstr, type_oid u32, typmod i32)`.
    /// An empty schema means `pg_catalog`.
    fn relation(&mut self) -> Result<Relation, DecodeError> {
        let oid = self.u32()?;
        let mut schema = self.string()?;
        if schema.is_empty() {
            schema.push_str("pg_catalog");
        }
        let name = self.string()?;
        let identity = match self.u8()? {
            b'd' => Identity::Default,
            b'n' => Identity::Nothing,
            b'f' => Identity::Full,
            b'i' => Identity::Index,
            tag => return Err(DecodeError::UnknownTag(tag)),
        };
        let count = self.u16()?;
        let mut columns = Vec::new();
        for _ in 0..count {
            columns.push(Column {
                key: self.u8()? & 1 != 0,
                name: self.string()?,
                type_oid: self.u32()?,
                type_modifier: self.u32()?.cast_signed(),
            });
        }
        Ok(Relation { oid, schema, name, identity, columns })
    }
}
