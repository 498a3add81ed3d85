//! The fields of an ErrorResponse or NoticeResponse, kept as bytes: the text is in the client's encoding, and fields that are not
//! known today pass unchanged.
//!
//! Source: PostgreSQL docs, protocol-error-fields.

use pg::frame::cstr;

/// The fields of one message, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fields(Vec<(u8, Vec<u8>)>);

impl Fields {
    /// Reads the body of an ErrorResponse or NoticeResponse; `None` if it is not one. Never panics.
    pub fn decode(body: &[u8]) -> Option<Fields> {
        let mut fields = Vec::new();
        let mut rest = body;
        loop {
            let (&key, after) = rest.split_first()?;
            if key == 0 {
                return Some(Fields(fields));
            }
            let (text, after) = cstr(after)?;
            fields.push((key, text.to_vec()));
            rest = after;
        }
    }

    /// Returns a field's text.
    pub fn get(&self, key: u8) -> Option<&[u8]> {
        self.0.iter().find(|(k, _)| *k == key).map(|(_, text)| text.as_slice())
    }

    /// Returns a field that is a number.
    pub fn number(&self, key: u8) -> Option<usize> {
        std::str::from_utf8(self.get(key)?).ok()?.parse().ok()
    }

    /// Puts a field in the place of the one that was there, or behind the others.
    pub fn set(&mut self, key: u8, text: impl Into<Vec<u8>>) {
        let mut text = text.into();
        text.retain(|b| *b != 0);
        match self.0.iter_mut().find(|(k, _)| *k == key) {
            Some(field) => field.1 = text,
            None => self.0.push((key, text)),
        }
    }

    /// Takes fields away.
    pub fn remove(&mut self, keys: &[u8]) {
        self.0.retain(|(key, _)| !keys.contains(key));
    }

    /// Writes the whole frame.
    pub fn encode(&self, tag: u8) -> Vec<u8> {
        let mut body = Vec::new();
        for (key, text) in &self.0 {
            body.push(*key);
            body.extend_from_slice(text);
            body.push(0);
        }
        body.push(0);
        frame(tag, &body)
    }
}

/// Writes a frame.
pub(crate) fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len() + 5);
    out.push(tag);
    // Bodies come from frames that were smaller than max_inspect_bytes, or from texts made of them.
    out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(body);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_decoded_is_encoded_alike() {
        let body = b"SERROR\0C42601\0Mno \xe9\0?new\0\0";
        let mut fields = Fields::decode(body).unwrap();
        assert_eq!(fields.encode(b'E'), frame(b'E', body));
        fields.set(b'P', "7");
        fields.set(b'M', "x\0y");
        fields.remove(b"?S");
        assert_eq!(fields.encode(b'N'), frame(b'N', b"C42601\0Mxy\0P7\0\0"));
        assert_eq!((fields.number(b'P'), fields.number(b'C'), fields.number(b'Z')), (Some(7), Some(42601), None));
    }

    #[test]
    fn truncated_bodies_are_none() {
        for body in [&b""[..], b"S", b"SERROR", b"SERROR\0", b"SERROR\0M"] {
            assert_eq!(Fields::decode(body), None);
        }
    }
}
