//! Reads tokens one by one, folding identifiers and literals as PostgreSQL does. The only file that knows the parser crate.
//!
//! Positions are characters from the start of the statement, counted from 0.

use pg::SqlState;
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::tokenizer::{Token, Tokenizer, Whitespace};

use super::Refusal;
use crate::statement::Value;

/// Identifiers longer than this are cut, as PostgreSQL's are.
pub(crate) const NAME_BYTES_MAX: usize = 63;

/// Punctuation of our grammar.
pub(super) use sqlparser::tokenizer::Token as Punctuation;

struct Placed {
    token: Token,
    start: usize,
    end: usize,
    /// There is a newline between the token before and this one.
    after_newline: bool,
}

/// The tokens of one statement, and how far they have been read.
pub(super) struct Cursor<'a> {
    text: &'a str,
    tokens: Vec<Placed>,
    next: usize,
    length: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(text: &'a str) -> Result<Cursor<'a>, Refusal> {
        let mut line_starts = vec![0];
        let mut length = 0;
        for c in text.chars() {
            length += 1;
            if c == '\n' {
                line_starts.push(length);
            }
        }
        let offset = |line: u64, column: u64| {
            let start = line_starts.get((line as usize).saturating_sub(1)).copied().unwrap_or(length);
            (start + (column as usize).saturating_sub(1)).min(length)
        };
        let dialect = PostgreSqlDialect {};
        let mut raw = Vec::new();
        // The tokenizer's own message may quote the text, and that may be a password.
        if let Err(error) = Tokenizer::new(&dialect, text).tokenize_with_location_into_buf(&mut raw) {
            let at = raw.last().map_or(0, |t| offset(t.span.end.line, t.span.end.column));
            let _ = error;
            return Err(syntax("unterminated or malformed literal".to_owned(), at));
        }
        let mut tokens: Vec<Placed> = Vec::with_capacity(raw.len());
        let mut after_newline = false;
        for token in raw {
            let (start, end) = (token.span.start, token.span.end);
            match &token.token {
                Token::EOF => {}
                Token::Whitespace(Whitespace::Newline | Whitespace::SingleLineComment { .. }) => after_newline = true,
                Token::Whitespace(_) => {}
                _ => {
                    tokens.push(Placed {
                        token: token.token,
                        start: offset(start.line, start.column),
                        end: offset(end.line, end.column),
                        after_newline,
                    });
                    after_newline = false;
                }
            }
        }
        Ok(Cursor { text, tokens, next: 0, length })
    }

    fn peek(&self) -> Option<&Placed> {
        self.tokens.get(self.next)
    }

    /// Where the next token begins, or the end of the text.
    pub(super) fn position(&self) -> usize {
        self.peek().map_or(self.length, |t| t.start)
    }

    pub(super) fn at_end(&self) -> bool {
        self.peek().is_none()
    }

    /// The error that PostgreSQL would raise at the next token.
    pub(super) fn unexpected(&self) -> Refusal {
        match self.peek() {
            None => syntax("syntax error at end of input".to_owned(), self.length),
            Some(t) => {
                let shown = match &t.token {
                    Token::Word(_) | Token::Number(..) | Token::Placeholder(_) => self.source(t),
                    token if is_string(token) => "'…'".to_owned(),
                    _ => self.source(t),
                };
                syntax(format!("syntax error at or near \"{shown}\""), t.start)
            }
        }
    }

    fn source(&self, token: &Placed) -> String {
        self.text.chars().skip(token.start).take(token.end - token.start).collect()
    }

    pub(super) fn expect_end(&self) -> Result<(), Refusal> {
        if self.at_end() { Ok(()) } else { Err(self.unexpected()) }
    }

    /// Returns whether the next token is that word (upper case), not quoted.
    pub(super) fn is_word(&self, word: &str) -> bool {
        self.is_word_ahead(0, word)
    }

    /// As [`Cursor::is_word`], of the token `ahead` tokens further on.
    pub(super) fn is_word_ahead(&self, ahead: usize, word: &str) -> bool {
        self.tokens.get(self.next + ahead).is_some_and(
            |t| matches!(&t.token, Token::Word(w) if w.quote_style.is_none() && w.value.eq_ignore_ascii_case(word)),
        )
    }

    pub(super) fn eat_word(&mut self, word: &str) -> bool {
        let found = self.is_word(word);
        self.next += usize::from(found);
        found
    }

    /// Takes all of these words, or fails at the first that is not there.
    pub(super) fn expect_words(&mut self, words: &[&str]) -> Result<(), Refusal> {
        words.iter().try_for_each(|word| if self.eat_word(word) { Ok(()) } else { Err(self.unexpected()) })
    }

    /// Takes `IF EXISTS` or `IF NOT EXISTS`, whichever `words` says, if its first word is there.
    pub(super) fn eat_condition(&mut self, words: &[&str]) -> Result<bool, Refusal> {
        if !self.is_word(words[0]) {
            return Ok(false);
        }
        self.expect_words(words).map(|()| true)
    }

    pub(super) fn is(&self, punctuation: &Punctuation) -> bool {
        self.peek().is_some_and(|t| t.token == *punctuation)
    }

    /// As [`Cursor::is`], of the token `ahead` tokens further on.
    pub(super) fn is_ahead(&self, ahead: usize, punctuation: &Punctuation) -> bool {
        self.tokens.get(self.next + ahead).is_some_and(|t| t.token == *punctuation)
    }

    pub(super) fn eat(&mut self, punctuation: &Punctuation) -> bool {
        let found = self.is(punctuation);
        self.next += usize::from(found);
        found
    }

    /// Takes whatever comes next.
    pub(super) fn skip(&mut self) {
        self.next += 1;
    }

    pub(super) fn expect(&mut self, punctuation: &Punctuation) -> Result<(), Refusal> {
        if self.eat(punctuation) { Ok(()) } else { Err(self.unexpected()) }
    }

    /// Reads items separated by commas; at least one.
    pub(super) fn list<T>(&mut self, mut item: impl FnMut(&mut Self) -> Result<T, Refusal>) -> Result<Vec<T>, Refusal> {
        let mut items = vec![item(self)?];
        while self.eat(&Token::Comma) {
            items.push(item(self)?);
        }
        Ok(items)
    }

    /// Reads `( item, … )`.
    pub(super) fn parenthesized<T>(
        &mut self,
        item: impl FnMut(&mut Self) -> Result<T, Refusal>,
    ) -> Result<Vec<T>, Refusal> {
        self.expect(&Token::LParen)?;
        let items = self.list(item)?;
        self.expect(&Token::RParen)?;
        Ok(items)
    }

    /// Reads what stands in parentheses and returns its text as it was written. It cannot have parameters: whoever reads it later has none.
    pub(super) fn parenthesized_text(&mut self) -> Result<String, Refusal> {
        self.expect(&Token::LParen)?;
        let (begin, mut depth) = (self.next, 1);
        while let Some(placed) = self.peek() {
            match &placed.token {
                Token::LParen => depth += 1,
                Token::RParen => depth -= 1,
                Token::Placeholder(_) => {
                    let hint = Some("Write the value itself.".to_owned());
                    let message = "a condition cannot have parameters".to_owned();
                    let sqlstate = SqlState::FEATURE_NOT_SUPPORTED;
                    return Err(Refusal { sqlstate, message, detail: None, hint, at: placed.start });
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
            self.next += 1;
        }
        let inside = &self.tokens[begin..self.next];
        let (Some(first), Some(last)) = (inside.first(), inside.last()) else { return Err(self.unexpected()) };
        let text = self.text.chars().skip(first.start).take(last.end - first.start).collect();
        self.expect(&Token::RParen)?;
        Ok(text)
    }

    /// Reads an identifier at its full length: folded when not quoted.
    pub(super) fn long_ident(&mut self) -> Result<String, Refusal> {
        let name = match self.peek().map(|t| &t.token) {
            Some(Token::Word(w)) if w.quote_style.is_none() => w.value.to_ascii_lowercase(),
            Some(Token::Word(w)) if w.quote_style == Some('"') => {
                if w.value.is_empty() {
                    return Err(syntax(
                        "zero-length delimited identifier at or near \"\"\"\"".to_owned(),
                        self.position(),
                    ));
                }
                w.value.clone()
            }
            _ => return Err(self.unexpected()),
        };
        self.next += 1;
        Ok(name)
    }

    /// Reads an identifier, cut to PostgreSQL's length.
    pub(super) fn ident(&mut self) -> Result<String, Refusal> {
        Ok(truncated(&self.long_ident()?).to_owned())
    }

    /// Returns whether a string begins here.
    pub(super) fn is_string(&self) -> bool {
        self.peek().is_some_and(|t| is_string(&t.token))
    }

    /// Returns whether a parameter stands here.
    pub(super) fn is_parameter(&self) -> bool {
        self.peek().is_some_and(|t| matches!(t.token, Token::Placeholder(_)))
    }

    /// Reads a string or a parameter.
    pub(super) fn text(&mut self) -> Result<Value, Refusal> {
        let begins = |token: &Token| is_string(token) || matches!(token, Token::Placeholder(_) | Token::LParen);
        if self.peek().is_some_and(|t| begins(&t.token)) { self.value() } else { Err(self.unexpected()) }
    }

    /// Reads a value: a literal, a word standing for one (`true`, `require`), or a parameter. It may stand in parentheses: pgjdbc puts
    /// values there when it writes them into a text.
    pub(super) fn value(&mut self) -> Result<Value, Refusal> {
        if !self.eat(&Punctuation::LParen) {
            return self.bare_value();
        }
        let value = self.bare_value()?;
        self.expect(&Punctuation::RParen)?;
        Ok(value)
    }

    fn bare_value(&mut self) -> Result<Value, Refusal> {
        let Some(placed) = self.peek() else { return Err(self.unexpected()) };
        let value = match &placed.token {
            token if is_string(token) => return self.string(),
            Token::Number(digits, false) => digits.clone(),
            Token::Minus | Token::Plus => {
                let minus = placed.token == Token::Minus;
                match self.tokens.get(self.next + 1).map(|t| &t.token) {
                    Some(Token::Number(digits, false)) => {
                        let signed = format!("{}{digits}", if minus { "-" } else { "" });
                        self.next += 1;
                        signed
                    }
                    _ => {
                        self.next += 1;
                        return Err(self.unexpected());
                    }
                }
            }
            Token::Placeholder(name) => {
                let number = name.strip_prefix('$').and_then(|n| n.parse().ok()).filter(|n| *n > 0);
                let Some(number) = number else { return Err(self.unexpected()) };
                self.next += 1;
                return Ok(Value::Parameter(number));
            }
            Token::Word(_) => return self.ident().map(Value::Text),
            _ => return Err(self.unexpected()),
        };
        self.next += 1;
        Ok(Value::Text(value))
    }

    /// Reads a string in any of its forms, and those that continue it on later lines.
    fn string(&mut self) -> Result<Value, Refusal> {
        let at = self.position();
        let mut text = String::new();
        while let Some(placed) = self.peek() {
            let part = match &placed.token {
                Token::SingleQuotedString(s) if text.is_empty() || placed.after_newline => s,
                Token::EscapedStringLiteral(s) | Token::UnicodeStringLiteral(s) | Token::NationalStringLiteral(s)
                    if placed.start == at =>
                {
                    s
                }
                Token::DollarQuotedString(s) if placed.start == at => &s.value,
                _ => break,
            };
            if placed.start != at && !placed.after_newline {
                break;
            }
            text.push_str(part);
            self.next += 1;
        }
        if text.contains('\0') {
            return Err(Refusal {
                sqlstate: SqlState(*b"22021"),
                message: "invalid byte sequence for encoding \"UTF8\": 0x00".to_owned(),
                detail: None,
                hint: None,
                at,
            });
        }
        Ok(Value::Text(text))
    }
}

fn is_string(token: &Token) -> bool {
    matches!(
        token,
        Token::SingleQuotedString(_)
            | Token::EscapedStringLiteral(_)
            | Token::UnicodeStringLiteral(_)
            | Token::NationalStringLiteral(_)
            | Token::DollarQuotedString(_)
    )
}

fn syntax(message: String, at: usize) -> Refusal {
    Refusal { sqlstate: SqlState::SYNTAX_ERROR, message, detail: None, hint: None, at }
}

/// Cuts a name to PostgreSQL's length, at a character's end.
pub(crate) fn truncated(name: &str) -> &str {
    &name[..name.floor_char_boundary(NAME_BYTES_MAX)]
}
