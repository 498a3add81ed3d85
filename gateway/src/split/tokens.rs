//! The tokens of a text, one by one: for those who look for names in statements that are not ours.

use std::ops::Range;

use super::{Scanner, is_ident, is_ident_start, is_space};

/// What a token is, as far as anybody here asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// A word that is not quoted: a keyword or a name.
    Word,
    /// A name in double quotes.
    Quoted,
    /// `.`
    Dot,
    /// Anything else, such as a literal.
    Other,
}

/// A token and where it is, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) kind: TokenKind,
    pub(crate) range: Range<usize>,
}

/// Returns the tokens of `text`; space and comments are left out.
pub(crate) fn tokens(text: &[u8], conforming: bool) -> impl Iterator<Item = Token> {
    let mut scanner = Scanner { text, at: 0, conforming, slices: Vec::new(), current: super::Current::default() };
    std::iter::from_fn(move || {
        loop {
            let (from, byte) = (scanner.at, *text.get(scanner.at)?);
            match byte {
                _ if is_space(byte) => scanner.at += 1,
                b'-' if scanner.peek(1) == Some(b'-') => scanner.skip_line_comment(),
                b'/' if scanner.peek(1) == Some(b'*') => scanner.skip_block_comment(),
                _ => {
                    scanner.skip_token(byte);
                    let range = from..scanner.at;
                    let kind = match byte {
                        b'.' => TokenKind::Dot,
                        b'"' => TokenKind::Quoted,
                        _ if is_ident_start(byte) && text[range.clone()].iter().all(|b| is_ident(*b)) => {
                            TokenKind::Word
                        }
                        _ => TokenKind::Other,
                    };
                    return Some(Token { kind, range });
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_from_what_hides_them() {
        let text = br#"select a."B""c".d, 'a.b' /* x.y */, E'\'z', $$ q.r $$, 1.5, U&"d\0061t" -- v.w"#;
        let found: Vec<_> = tokens(text, true)
            .filter(|t| t.kind != TokenKind::Other)
            .map(|t| String::from_utf8_lossy(&text[t.range]).into_owned())
            .collect();
        assert_eq!(found, ["select", "a", ".", r#""B""c""#, ".", "d"]);
    }
}
