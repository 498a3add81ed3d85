//! `EXECUTE peer ($$ … $$)`: a whole statement for a peer.
//!
//! PostgreSQL has an EXECUTE of its own, for prepared statements. Ours is one whose name is a peer's and whose only argument is
//! one string literal; everything else is PostgreSQL's. It is read as bytes: the text goes to the peer in the client's encoding.

use std::ops::Range;

use crate::encoding::Encoding;
use crate::peers::Peers;
use crate::split::{Slice, TokenKind, tokens};

use super::truncated;

/// A text for a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecutePeer {
    /// The peer's name.
    pub peer: String,
    /// Where that stands, in characters from the start of the statement.
    pub(crate) peer_at: usize,
    /// What it is to run, in the client's encoding.
    pub text: Vec<u8>,
    /// Where each byte of the text stands in the statement; one more for its end.
    pub(crate) offsets: Vec<u32>,
}

/// Reads the statement in `slice` of `query`; `None` when it is PostgreSQL's.
pub(crate) fn read(
    slice: &Slice,
    query: &[u8],
    encoding: Encoding,
    conforming: bool,
    peers: &Peers,
) -> Option<ExecutePeer> {
    if !slice.begins_with(query, &["EXECUTE"]) {
        return None;
    }
    let bytes = &query[slice.range.clone()];
    // No more than six are looked at: with one more it is something else.
    let all: Vec<_> = tokens(bytes, conforming).take(6).collect();
    let (name, literal) = match &all[..] {
        [_, name, literal] => (name, literal),
        [_, name, open, literal, close] if bytes[open.range.start] == b'(' && bytes[close.range.start] == b')' => {
            (name, literal)
        }
        _ => return None,
    };
    let peer = identifier(&bytes[name.range.clone()], name.kind, encoding)?;
    peers.get(&peer)?;
    let (text, offsets) = decode(bytes, literal.range.clone(), encoding, conforming)?;
    let peer_at = encoding.characters(&bytes[..name.range.start]);
    Some(ExecutePeer { peer, peer_at, text, offsets })
}

/// Returns the name that an identifier stands for.
pub(crate) fn identifier(bytes: &[u8], kind: TokenKind, encoding: Encoding) -> Option<String> {
    let text = encoding.decode(bytes)?;
    let name = match kind {
        TokenKind::Word => text.to_ascii_lowercase(),
        TokenKind::Quoted => text.strip_prefix('"')?.strip_suffix('"')?.replace("\"\"", "\""),
        _ => return None,
    };
    (!name.is_empty()).then(|| truncated(&name).to_owned())
}

/// Returns what a literal says, and where each of its bytes stands. `None` for what is no literal, and for forms that are not
/// taken: `U&'…'`, and those in several parts.
fn decode(bytes: &[u8], range: Range<usize>, encoding: Encoding, conforming: bool) -> Option<(Vec<u8>, Vec<u32>)> {
    let literal = &bytes[range.clone()];
    let (from, to, escapes) = match literal {
        [b'$', ..] => {
            let tag = literal.iter().skip(1).position(|b| *b == b'$')? + 2;
            let to = literal.len().checked_sub(tag).filter(|to| *to >= tag && literal[*to..] == literal[..tag])?;
            return Some((literal[tag..to].to_vec(), (tag..=to).map(|at| (range.start + at) as u32).collect()));
        }
        [b'\'', .., b'\''] if literal.len() > 1 => (1, literal.len() - 1, !conforming),
        [b'e' | b'E', b'\'', .., b'\''] if literal.len() > 2 => (2, literal.len() - 1, true),
        _ => return None,
    };
    let (mut text, mut offsets) = (Vec::new(), Vec::new());
    let mut at = from;
    while at < to {
        let (length, said) = match &literal[at..to] {
            [b'\'', b'\'', ..] => (2, vec![b'\'']),
            // The first part of several.
            [b'\'', ..] => return None,
            [b'\\', rest @ ..] if escapes => escape(rest, encoding)?,
            [byte, ..] => (1, vec![*byte]),
            [] => break,
        };
        offsets.extend(said.iter().map(|_| (range.start + at) as u32));
        text.extend(said);
        at += length;
    }
    offsets.push((range.start + to) as u32);
    (!text.contains(&0)).then_some((text, offsets))
}

/// Reads what follows a backslash; returns how long it is with the backslash, and what it stands for.
///
/// Source: PostgreSQL docs, sql-syntax-lexical, "String Constants with C-Style Escapes".
fn escape(rest: &[u8], encoding: Encoding) -> Option<(usize, Vec<u8>)> {
    let number = |from: usize, most: usize, radix: u32| {
        let digits = rest[from..].iter().take(most).take_while(|b| char::from(**b).is_digit(radix)).count();
        let value = u32::from_str_radix(std::str::from_utf8(&rest[from..from + digits]).ok()?, radix).ok()?;
        Some((digits, value))
    };
    Some(match rest.first()? {
        b'b' => (2, vec![8]),
        b'f' => (2, vec![12]),
        b'n' => (2, vec![b'\n']),
        b'r' => (2, vec![b'\r']),
        b't' => (2, vec![b'\t']),
        b'v' => (2, vec![11]),
        b'0'..=b'7' => {
            let (digits, value) = number(0, 3, 8)?;
            (1 + digits, vec![value as u8])
        }
        b'x' if rest.get(1).is_some_and(u8::is_ascii_hexdigit) => {
            let (digits, value) = number(1, 2, 16)?;
            (2 + digits, vec![value as u8])
        }
        kind @ (b'u' | b'U') => {
            let most = if *kind == b'u' { 4 } else { 8 };
            let (digits, value) = number(1, most, 16)?;
            let character = char::from_u32(value).filter(|_| digits == most && encoding == Encoding::Utf8)?;
            (2 + digits, character.to_string().into_bytes())
        }
        other => (2, vec![*other]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::split;

    fn parsed(text: &str) -> Option<ExecutePeer> {
        let peers = Peers::new(["shop".to_owned(), "Odd Peer".to_owned()]);
        let slices = split(text.as_bytes(), true);
        read(&slices[0], text.as_bytes(), Encoding::Utf8, true, &peers)
    }

    fn said(text: &str) -> Option<String> {
        parsed(text).map(|e| String::from_utf8(e.text).unwrap())
    }

    #[test]
    fn one_literal_for_a_peer_is_ours() {
        for (text, expected) in [
            ("execute shop ($$select 'é'$$)", "select 'é'"),
            ("EXECUTE /* x */ SHOP($q$select $$a$$$q$)", "select $$a$$"),
            ("execute \"Odd Peer\" ('it''s')", "it's"),
            (r"execute shop (E'a\'b\n\x41\101\u00e9\\')", "a'b\nAAé\\"),
            (r"execute shop ('a\')", r"a\"),
            ("execute shop $$select 1$$", "select 1"),
            ("execute shop ('')", ""),
        ] {
            assert_eq!(said(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn everything_else_is_postgres() {
        for text in [
            "execute shop",
            "execute shop()",
            "execute shop (1)",
            "execute shop ($1)",
            "execute shop ('a', 'b')",
            "execute shop ('a' || 'b')",
            "execute shop ('a'::text)",
            "execute shop ('a'\n'b')",
            "execute shop (E'a'\n'b')",
            "execute shop (U&'a')",
            "execute shop (E'\\0')",
            "execute shop ($$a$$",
            "execute shop ('a",
            "execute other ($$select 1$$)",
            "execute \"SHOP\" ($$select 1$$)",
            "select shop ('a')",
        ] {
            assert_eq!(parsed(text), None, "{text}");
        }
    }

    #[test]
    fn each_byte_is_found_again() {
        let text = "execute shop ('a''b')";
        let offsets = parsed(text).unwrap().offsets;
        assert_eq!(offsets, [15, 16, 18, 19]);
        let text = "execute shop ($x$ab$x$)";
        assert_eq!(parsed(text).unwrap().offsets, [17, 18, 19]);
    }
}
