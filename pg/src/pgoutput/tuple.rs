//! The values of a row, as bytes.

use bytes::{BufMut, Bytes, BytesMut};

use super::DecodeError;

/// One value of a [`Tuple`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// NULL.
    Null,
    /// A large value that the update did not change; the source does not send it.
    Unchanged,
    /// The type's text form.
    Text(&'a [u8]),
    /// The type's binary form.
    Binary(&'a [u8]),
}

/// The values of a row, checked once and kept as they came from the network.
///
/// Layout of `bytes`: for each value a kind byte `n`, `u`, `t` or `b`, the last two followed by a length (u32) and that many bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuple {
    bytes: Bytes,
    count: u16,
    unchanged: bool,
}

impl Tuple {
    /// Checks a tuple at the start of `body` and splits it off.
    ///
    /// # Errors
    /// [`DecodeError`] if it ends early or has an unknown kind byte. Never panics: `body` comes from the network.
    pub fn split_from(body: &mut Bytes) -> Result<Tuple, DecodeError> {
        let count = body.get(..2).map(|b| u16::from_be_bytes([b[0], b[1]])).ok_or(DecodeError::Truncated)?;
        let mut at = 2;
        let mut unchanged = false;
        for _ in 0..count {
            match body.get(at).ok_or(DecodeError::Truncated)? {
                b'n' => at += 1,
                b'u' => {
                    unchanged = true;
                    at += 1;
                }
                b't' | b'b' => {
                    let length = body.get(at + 1..at + 5).ok_or(DecodeError::Truncated)?;
                    let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]) as usize;
                    at += 5 + length;
                    if at > body.len() {
                        return Err(DecodeError::Truncated);
                    }
                }
                tag => return Err(DecodeError::UnknownTag(*tag)),
            }
        }
        let mut bytes = body.split_to(at);
        let _ = bytes.split_to(2);
        Ok(Tuple { bytes, count, unchanged })
    }

    /// Returns how many values there are.
    pub fn len(&self) -> usize {
        self.count.into()
    }

    /// Returns whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Returns whether a value is [`Value::Unchanged`], so that this is not the whole row.
    pub fn has_unchanged(&self) -> bool {
        self.unchanged
    }

    /// Returns how many bytes the values take.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Returns this row with its [`Value::Unchanged`] values taken from `older`, an earlier image of the same row.
    ///
    /// A value that is unchanged in both stays so; `older` with fewer columns leaves the rest unchanged.
    pub fn filled_from(&self, older: &Tuple) -> Tuple {
        self.filled_where(older, |_| true)
    }

    /// As [`Tuple::filled_from`], for the values at those positions only.
    pub fn filled_where(&self, older: &Tuple, wanted: impl Fn(usize) -> bool) -> Tuple {
        if !self.unchanged {
            return self.clone();
        }
        let mut bytes = BytesMut::with_capacity(self.bytes.len() + older.bytes.len());
        let mut unchanged = false;
        let mut older = older.values();
        for (position, value) in self.values().enumerate() {
            let earlier = older.next().unwrap_or(Value::Unchanged);
            let value = if value == Value::Unchanged && wanted(position) { earlier } else { value };
            unchanged |= value == Value::Unchanged;
            match value {
                Value::Null => bytes.put_u8(b'n'),
                Value::Unchanged => bytes.put_u8(b'u'),
                Value::Text(text) => put_value(&mut bytes, b't', text),
                Value::Binary(data) => put_value(&mut bytes, b'b', data),
            }
        }
        Tuple { bytes: bytes.freeze(), count: self.count, unchanged }
    }

    /// Goes through the values in the relation's column order.
    pub fn values(&self) -> impl Iterator<Item = Value<'_>> {
        let mut rest: &[u8] = &self.bytes;
        std::iter::from_fn(move || {
            let (kind, after) = rest.split_first()?;
            match kind {
                b't' | b'b' => {
                    let (length, after) = after.split_first_chunk::<4>()?;
                    let (value, after) = after.split_at_checked(u32::from_be_bytes(*length) as usize)?;
                    rest = after;
                    Some(if *kind == b't' { Value::Text(value) } else { Value::Binary(value) })
                }
                _ => {
                    rest = after;
                    Some(if *kind == b'u' { Value::Unchanged } else { Value::Null })
                }
            }
        })
    }
}

fn put_value(bytes: &mut BytesMut, kind: u8, value: &[u8]) {
    bytes.put_u8(kind);
    bytes.put_u32(u32::try_from(value.len()).expect("a value that was decoded has a 32-bit length"));
    bytes.put_slice(value);
}
