//! What the gateway must know of a session's `client_encoding` to look into its texts. It converts nothing that it relays.
//!
//! Source: PostgreSQL docs, multibyte, "Supported Character Sets".

use std::borrow::Cow;

/// How a client's texts are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// UTF-8.
    Utf8,
    /// One byte is one character, with Unicode's first 256 code points.
    Latin1,
    /// ASCII bytes are ASCII characters, but what the others mean is not known here.
    AsciiSafe,
    /// ASCII bytes may be the second half of a character: only texts that are all ASCII can be looked into.
    Unsafe,
}

impl Encoding {
    /// Returns the encoding by the name that the server reports.
    pub fn from_name(name: &[u8]) -> Encoding {
        match name.to_ascii_uppercase().as_slice() {
            b"UTF8" => Encoding::Utf8,
            b"LATIN1" => Encoding::Latin1,
            b"SJIS" | b"SHIFT_JIS_2004" | b"BIG5" | b"GBK" | b"UHC" | b"GB18030" | b"JOHAB" => Encoding::Unsafe,
            _ => Encoding::AsciiSafe,
        }
    }

    /// Returns whether the bounds of statements can be found in `text`.
    pub fn can_split(self, text: &[u8]) -> bool {
        self != Encoding::Unsafe || text.is_ascii()
    }

    /// Reads `text`; `None` when it holds characters that are not known here.
    pub fn decode(self, text: &[u8]) -> Option<Cow<'_, str>> {
        match self {
            Encoding::Latin1 if !text.is_ascii() => Some(text.iter().map(|b| char::from(*b)).collect()),
            // SQL_ASCII most often holds UTF-8; another encoding that is not ASCII is very unlikely to be valid UTF-8.
            Encoding::AsciiSafe if !text.is_ascii() => None,
            _ => std::str::from_utf8(text).ok().map(Cow::Borrowed),
        }
    }

    /// Writes `text`; characters that the encoding lacks become question marks.
    pub fn encode(self, text: &str) -> Vec<u8> {
        match self {
            Encoding::Utf8 => text.as_bytes().to_vec(),
            Encoding::Latin1 => text.chars().map(|c| u8::try_from(u32::from(c)).unwrap_or(b'?')).collect(),
            Encoding::AsciiSafe | Encoding::Unsafe => {
                text.chars().map(|c| if c.is_ascii() { c as u8 } else { b'?' }).collect()
            }
        }
    }

    /// Counts the characters of `text`, as the server counts an error's position.
    pub fn characters(self, text: &[u8]) -> usize {
        match self {
            Encoding::Utf8 => text.iter().filter(|b| **b & 0xc0 != 0x80).count(),
            _ => text.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_counted_as_the_server_does() {
        assert_eq!(Encoding::Utf8.characters("aé😀".as_bytes()), 3);
        assert_eq!(Encoding::Latin1.characters(b"a\xe9"), 2);
    }

    #[test]
    fn latin1_round_trips_and_others_are_left_alone() {
        assert_eq!(Encoding::Latin1.decode(b"a\xe9").as_deref(), Some("aé"));
        assert_eq!(Encoding::Latin1.encode("aé"), b"a\xe9");
        assert_eq!(Encoding::from_name(b"KOI8R").decode(b"\xe9"), None);
        assert!(!Encoding::from_name(b"SJIS").can_split(b"\x83\x5c"));
        assert!(Encoding::from_name(b"SJIS").can_split(b"create peer"));
        assert_eq!(Encoding::Utf8.decode(b"\xff"), None);
    }
}
