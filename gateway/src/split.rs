//! Bounds and first words of the statements in a query text, by the rules of psql's lexer.
//!
//! Pure, and works on bytes: a text in any encoding whose second bytes are never ASCII can be split. It is not a parser: what the
//! words mean is for `parser` to say.
//!
//! Source: PostgreSQL source, `src/fe_utils/psqlscan.l`; PostgreSQL docs, sql-syntax-lexical.

mod tokens;

use std::ops::Range;

pub(crate) use tokens::{TokenKind, tokens};

/// How many leading words of a statement are remembered.
const WORDS_MAX: usize = 5;

/// One statement of a text, without the semicolon and without the space and comments around it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Where it is, in bytes.
    pub range: Range<usize>,
    words: [(usize, usize); WORDS_MAX],
    word_count: usize,
}

impl Slice {
    /// Returns whether the statement begins with these words (upper case), none of them quoted.
    pub fn begins_with(&self, text: &[u8], words: &[&str]) -> bool {
        words.len() <= self.word_count
            && words
                .iter()
                .zip(&self.words)
                .all(|(word, (from, to))| text[*from..*to].eq_ignore_ascii_case(word.as_bytes()))
    }

    /// Returns where the leading word with that index is, in bytes.
    pub fn word(&self, index: usize) -> Option<Range<usize>> {
        self.words[..self.word_count].get(index).map(|(from, to)| *from..*to)
    }
}

/// Returns whether one of our statements could be in the text: a cheap look that has false alarms but misses none.
pub fn may_be_ours(text: &[u8]) -> bool {
    // Most texts have none of these pairs, and pairs can be looked for in many places at once.
    has_rare_pair(text) && has_word_of_ours(text)
}

/// Starts of words that are compared at once.
const BLOCK: usize = 16;

/// The longest piece that is looked for, in letters.
const PIECE: usize = 4;

/// Returns whether letters are in the text that each of our words has and few others do: pEEr, miRRor, taSK, heLP, aLeRT.
///
/// No two neighbours of ALERT are rare in SQL (ALTER, SELECT, INSERT, TABLE), but L and RT with any letter between are; L and R alone would
/// take texts as common as pgbench_teLLeRs to the slower look.
fn has_rare_pair(text: &[u8]) -> bool {
    let (mut found, mut rest) = (u8::MAX, text);
    while let Some(block) = rest.first_chunk::<{ BLOCK + PIECE - 1 }>() {
        found = found.min(least_miss(block));
        rest = &rest[BLOCK..];
    }
    // What is left is shorter than a block is long, but pairs may begin in it up to one place beyond a block's last start.
    let mut last = [0; BLOCK + PIECE];
    last[..rest.len()].copy_from_slice(rest);
    found.min(least_miss(&last)) == 0
}

/// Returns 0 if such letters begin in the block, but for its last places. Without a branch, and over a fixed number of starts, the compiler makes
/// vector instructions of it, with no rest to be looked at letter by letter: that pays for the piece of four.
fn least_miss<const LENGTH: usize>(block: &[u8; LENGTH]) -> u8 {
    let miss = |n: usize| {
        let [a, b, c, d] = [block[n] | 0x20, block[n + 1] | 0x20, block[n + 2] | 0x20, block[n + 3] | 0x20];
        let doubled = (a ^ b) | (a ^ b'e').min(a ^ b'r');
        doubled.min((a ^ b's') | (b ^ b'k')).min((a ^ b'l') | (b ^ b'p').min((c ^ b'r') | (d ^ b't')))
    };
    (0..=LENGTH - PIECE).fold(u8::MAX, |least, n| least.min(miss(n)))
}

fn has_word_of_ours(text: &[u8]) -> bool {
    let follows =
        |at: usize, rest: &[u8]| text.get(at + 1..at + 1 + rest.len()).is_some_and(|t| t.eq_ignore_ascii_case(rest));
    let mut about_tasks = false;
    for (at, byte) in text.iter().enumerate() {
        match byte | 0x20 {
            b'p' if follows(at, b"eer") => return true,
            b'm' if follows(at, b"irror") => return true,
            b's' if follows(at, b"how") => about_tasks = true,
            b'c' if follows(at, b"ancel") => about_tasks = true,
            b'a' if follows(at, b"lert") => return true,
            b'h' if follows(at, b"elp") => return true,
            b't' if about_tasks && follows(at, b"ask") => return true,
            _ => {}
        }
    }
    false
}

/// Splits a text into its statements; empty ones are left out.
///
/// `conforming` is the session's `standard_conforming_strings`: when off, a backslash escapes in plain strings too. Never fails:
/// what is not closed reaches to the end of the text.
pub fn split(text: &[u8], conforming: bool) -> Vec<Slice> {
    Scanner { text, at: 0, conforming, slices: Vec::new(), current: Current::default() }.run()
}

/// What is known of the statement that is being scanned.
#[derive(Default)]
struct Current {
    /// First byte of its first token and end of its last; equal when there is none yet.
    start: usize,
    end: usize,
    begun: bool,
    words: [(usize, usize); WORDS_MAX],
    word_count: usize,
    /// A token that is not a word has been seen.
    words_over: bool,
    parens: usize,
    /// First letters of leading `create`, `or`, `replace`, `function`, `procedure`, and how many identifiers there were.
    routine: [u8; 4],
    identifiers: usize,
    /// Nesting of BEGIN and CASE in the body of a routine.
    begins: usize,
}

struct Scanner<'a> {
    text: &'a [u8],
    at: usize,
    conforming: bool,
    slices: Vec<Slice>,
    current: Current,
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

fn is_ident_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

fn is_ident(byte: u8) -> bool {
    is_ident_start(byte) || byte.is_ascii_digit() || byte == b'$'
}

impl Scanner<'_> {
    fn run(mut self) -> Vec<Slice> {
        while let Some(&byte) = self.text.get(self.at) {
            let from = self.at;
            match byte {
                _ if is_space(byte) => {
                    self.at += 1;
                    continue;
                }
                b'-' if self.peek(1) == Some(b'-') => {
                    self.skip_line_comment();
                    continue;
                }
                b'/' if self.peek(1) == Some(b'*') => {
                    self.skip_block_comment();
                    continue;
                }
                b';' if self.current.parens == 0 && self.current.begins == 0 => {
                    self.finish();
                    self.at += 1;
                    continue;
                }
                _ => self.skip_token(byte),
            }
            self.token(from);
        }
        self.finish();
        self.slices
    }

    /// Skips one token, which begins with `byte` and is neither space nor a comment.
    fn skip_token(&mut self, byte: u8) {
        match byte {
            b'\'' => self.skip_quoted(b'\'', !self.conforming),
            b'"' => self.skip_quoted(b'"', false),
            b'$' => self.skip_dollar(),
            _ if is_ident_start(byte) => self.scan_word(),
            // A number takes its letters along, so that 1$a$ opens no dollar quote where the server sees none.
            b'0'..=b'9' => self.at = self.end_of(self.at, |b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.'),
            b'(' => {
                self.current.parens += 1;
                self.at += 1;
            }
            b')' => {
                self.current.parens = self.current.parens.saturating_sub(1);
                self.at += 1;
            }
            _ => self.at += 1,
        }
    }

    fn peek(&self, ahead: usize) -> Option<u8> {
        self.text.get(self.at + ahead).copied()
    }

    fn end_of(&self, from: usize, belongs: impl Fn(u8) -> bool) -> usize {
        self.text[from..].iter().position(|b| !belongs(*b)).map_or(self.text.len(), |n| from + n)
    }

    /// Notes that a token reached from `from` to here.
    fn token(&mut self, from: usize) {
        let current = &mut self.current;
        if !current.begun {
            current.begun = true;
            current.start = from;
        }
        current.end = self.at;
        let is_word = is_ident_start(self.text[from]) && self.text[from..self.at].iter().all(|b| is_ident(*b));
        if !is_word {
            current.words_over = true;
        } else if !current.words_over && current.word_count < WORDS_MAX {
            current.words[current.word_count] = (from, self.at);
            current.word_count += 1;
        }
    }

    fn finish(&mut self) {
        let current = std::mem::take(&mut self.current);
        if current.begun {
            self.slices.push(Slice {
                range: current.start..current.end,
                words: current.words,
                word_count: current.word_count,
            });
        }
    }

    fn skip_line_comment(&mut self) {
        self.at = self.end_of(self.at, |b| b != b'\n' && b != b'\r');
    }

    fn skip_block_comment(&mut self) {
        let mut depth = 0;
        while self.at < self.text.len() {
            match (self.text[self.at], self.peek(1)) {
                (b'/', Some(b'*')) => {
                    depth += 1;
                    self.at += 2;
                }
                (b'*', Some(b'/')) => {
                    depth -= 1;
                    self.at += 2;
                    if depth == 0 {
                        return;
                    }
                }
                _ => self.at += 1,
            }
        }
    }

    /// Skips from an opening quote past its closing one. A doubled quote needs no care: it closes and opens again.
    fn skip_quoted(&mut self, quote: u8, backslash: bool) {
        self.at += 1;
        while let Some(&byte) = self.text.get(self.at) {
            self.at += 1;
            if byte == quote {
                // 'a' and 'b' on the next line are one string, of the same kind.
                match backslash.then(|| self.continuation()).flatten() {
                    Some(next) => self.at = next + 1,
                    None if self.peek(0) == Some(quote) => self.at += 1,
                    None => return,
                }
            } else if byte == b'\\' && backslash {
                self.at = (self.at + 1).min(self.text.len());
            }
        }
    }

    /// Where the string that just ended goes on: a quote behind space that holds a newline.
    fn continuation(&self) -> Option<usize> {
        let mut at = self.at;
        let mut newline = false;
        loop {
            match self.text.get(at)? {
                b'\n' | b'\r' => {
                    newline = true;
                    at += 1;
                }
                byte if is_space(*byte) => at += 1,
                b'-' if self.text.get(at + 1) == Some(&b'-') => at = self.end_of(at, |b| b != b'\n' && b != b'\r'),
                b'\'' if newline => return Some(at),
                _ => return None,
            }
        }
    }

    /// Skips a dollar-quoted string, a parameter, or a lone dollar sign.
    fn skip_dollar(&mut self) {
        let tag_end = match self.peek(1) {
            Some(byte) if is_ident_start(byte) => self.end_of(self.at + 1, |b| is_ident(b) && b != b'$'),
            _ => self.at + 1,
        };
        if self.text.get(tag_end) != Some(&b'$') {
            self.at = self.end_of(self.at + 1, |b| b.is_ascii_digit());
            return;
        }
        let delimiter = &self.text[self.at..=tag_end];
        let body = tag_end + 1;
        let close = find(&self.text[body..], delimiter);
        self.at = close.map_or(self.text.len(), |n| body + n + delimiter.len());
    }

    fn scan_word(&mut self) {
        let from = self.at;
        let end = self.end_of(from, is_ident);
        let word = &self.text[from..end];
        match (word, self.text.get(end), self.text.get(end + 1)) {
            (b"e" | b"E", Some(b'\''), _) => {
                self.at = end;
                return self.skip_quoted(b'\'', true);
            }
            (b"b" | b"B" | b"x" | b"X", Some(b'\''), _) => {
                self.at = end;
                return self.skip_quoted(b'\'', false);
            }
            (b"n" | b"N", Some(b'\''), _) => {
                self.at = end;
                return self.skip_quoted(b'\'', !self.conforming);
            }
            (b"u" | b"U", Some(b'&'), Some(quote @ (b'\'' | b'"'))) => {
                self.at = end + 1;
                return self.skip_quoted(*quote, false);
            }
            _ => self.at = end,
        }
        self.follow_routine(word.to_ascii_lowercase().as_slice());
    }

    /// Tracks whether we are in a BEGIN ATOMIC … END body, whose semicolons end no statement. The same heuristic as psql's.
    fn follow_routine(&mut self, word: &[u8]) {
        let current = &mut self.current;
        if current.identifiers < current.routine.len()
            && matches!(word, b"create" | b"or" | b"replace" | b"function" | b"procedure")
        {
            current.routine[current.identifiers] = word[0];
        }
        current.identifiers += 1;
        let in_routine = matches!(current.routine, [b'c', b'f' | b'p', ..] | [b'c', b'o', b'r', b'f' | b'p']);
        if in_routine && current.parens == 0 {
            match word {
                b"begin" => current.begins += 1,
                b"case" if current.begins > 0 => current.begins += 1,
                b"end" => current.begins = current.begins.saturating_sub(1),
                _ => {}
            }
        }
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    text.windows(what.len()).position(|window| window == what)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(text: &str) -> Vec<&str> {
        split(text.as_bytes(), true).iter().map(|s| &text[s.range.clone()]).collect()
    }

    #[test]
    fn semicolons_separate_except_where_they_are_hidden() {
        for (text, expected) in [
            ("", vec![]),
            (" ; -- nothing;\n; /* ; /* nested; */ ; */ ", vec![]),
            ("select 1; select 2", vec!["select 1", "select 2"]),
            ("select ';'; b", vec!["select ';'", "b"]),
            ("select 'it''s;'; b", vec!["select 'it''s;'", "b"]),
            (r"select 'a\'; b", vec![r"select 'a\'", "b"]),
            (r"select E'a\';b'; c", vec![r"select E'a\';b'", "c"]),
            ("select E'a'\n 'b\\';c'; d", vec!["select E'a'\n 'b\\';c'", "d"]),
            (r"select U&'a\'; b", vec![r"select U&'a\'", "b"]),
            (r#"select "a;""b;"; c"#, vec![r#"select "a;""b;""#, "c"]),
            ("select $$;$$, $a$;$$;$b$;$a$; c", vec!["select $$;$$, $a$;$$;$b$;$a$", "c"]),
            ("select $1;$2", vec!["select $1", "$2"]),
            ("select a$b$;c$b$", vec!["select a$b$", "c$b$"]),
            ("create rule r as on insert to t do (a; b); c", vec!["create rule r as on insert to t do (a; b)", "c"]),
            (
                "create or replace function f() begin atomic select case when a then b end; select 2; end; c",
                vec!["create or replace function f() begin atomic select case when a then b end; select 2; end", "c"],
            ),
            ("begin; select 1; end; c", vec!["begin", "select 1", "end", "c"]),
            ("select 1 -- ;\n + 2 /* ; */ ; b -- x", vec!["select 1 -- ;\n + 2", "b"]),
            ("select 'open; b", vec!["select 'open; b"]),
            ("select $x$ open; b", vec!["select $x$ open; b"]),
            ("größe; é", vec!["größe", "é"]),
        ] {
            assert_eq!(pieces(text), expected, "{text}");
        }
    }

    #[test]
    fn a_backslash_escapes_in_plain_strings_when_they_do_not_conform() {
        let text = br"select 'a\'; b'; c";
        assert_eq!(split(text, false).len(), 2);
        assert_eq!(split(text, true).len(), 2);
        assert_eq!(split(text, false)[1].range, 17..18);
    }

    #[test]
    fn words_end_at_the_first_other_token() {
        let text = b"/* x */ Create\n--y\nPEER if not exists; drop \"peer\" a; peer.x";
        let slices = split(text, true);
        assert!(slices[0].begins_with(text, &["CREATE", "PEER", "IF", "NOT", "EXISTS"]));
        assert!(!slices[1].begins_with(text, &["DROP", "PEER"]));
        assert!(slices[2].begins_with(text, &["PEER"]) && !slices[2].begins_with(text, &["PEER", "X"]));
        assert_eq!(slices[0].word(1), Some(19..23));
        assert_eq!(slices[2].word(1), None);
    }

    #[test]
    fn the_prefilter_finds_a_word_wherever_it_is() {
        for word in ["peer", "mirror", "show tasks", "help", "alert"] {
            for (before, after) in (0..70).flat_map(|before| (0..20).map(move |after| (before, after))) {
                let text = format!("{}{word}{}", "x ".repeat(before), " x".repeat(after));
                assert!(may_be_ours(text.as_bytes()), "{text}");
            }
        }
    }

    #[test]
    fn the_prefilter_misses_nothing() {
        for text in [
            "CREATE pEEr x",
            "show MIRRORS",
            "Show  Tasks",
            "select 1; pause mirror x",
            "show task 1",
            "Cancel TASK 1",
            "peer",
            "show peers",
            "Help",
            "drop aLERt a",
        ] {
            assert!(may_be_ours(text.as_bytes()), "{text}");
        }
        for text in [
            "",
            "p",
            "select * from pgbench_accounts where aid = 1",
            "select tasks",
            "mirro",
            "create table t (pee int)",
        ] {
            assert!(!may_be_ours(text.as_bytes()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn slices_lie_in_order_and_only_separators_lie_between(text in "[-a-z'\"$;()/*\\\\ \n1é]{0,60}", conforming: bool) {
            let bytes = text.as_bytes();
            let slices = split(bytes, conforming);
            let mut end = 0;
            for slice in &slices {
                prop_assert!(slice.range.start >= end && slice.range.end > slice.range.start && slice.range.end <= bytes.len());
                prop_assert!(text.is_char_boundary(slice.range.start) && text.is_char_boundary(slice.range.end));
                end = slice.range.end;
            }
        }

        #[test]
        fn any_bytes_can_be_split(bytes in proptest::collection::vec(any::<u8>(), 0..200), conforming: bool) {
            let _ = (split(&bytes, conforming), may_be_ours(&bytes));
        }
    }
}
