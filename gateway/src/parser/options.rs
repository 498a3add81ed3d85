//! `WITH ( name = value, … )`, and the second form `name 'value'` that CREATE SERVER has.

use pg::SqlState;

use super::cursor::{Cursor, Punctuation};
use super::{Refusal, Spans};
use crate::statement::{GivenOption, Value};

/// Reads `WITH ( … )` if it is there.
pub(super) fn with_options(cursor: &mut Cursor<'_>, spans: &mut Spans) -> Result<Vec<GivenOption>, Refusal> {
    let at = cursor.position();
    if !cursor.eat_word("WITH") {
        return Ok(Vec::new());
    }
    spans.add("options", at);
    options(cursor, spans)
}

/// Reads `( name = value, … )`.
pub(super) fn options(cursor: &mut Cursor<'_>, spans: &mut Spans) -> Result<Vec<GivenOption>, Refusal> {
    options_of(cursor, spans, "option")
}

/// As [`options`]; the parts are named after `part`.
pub(super) fn options_of(cursor: &mut Cursor<'_>, spans: &mut Spans, part: &str) -> Result<Vec<GivenOption>, Refusal> {
    let mut seen: Vec<String> = Vec::new();
    cursor.parenthesized(|cursor| {
        let at = cursor.position();
        let name = cursor.ident()?;
        if seen.contains(&name) {
            return Err(Refusal {
                sqlstate: SqlState::SYNTAX_ERROR,
                message: format!("option \"{name}\" provided more than once"),
                detail: None,
                hint: None,
                at,
            });
        }
        seen.push(name.clone());
        spans.add(format!("{part}.{name}"), at);
        if !cursor.eat(&Punctuation::Eq) && !cursor.is_string() && !cursor.is(&Punctuation::LParen) {
            return Err(cursor.unexpected());
        }
        spans.add(format!("{part}.{name}.value"), cursor.position());
        Ok(GivenOption { name, value: cursor.value()? })
    })
}

/// An interval. As everywhere in our options, a bare number is seconds.
pub(super) fn interval(cursor: &mut Cursor<'_>, spans: &mut Spans, part: &str) -> Result<Value, Refusal> {
    cursor.eat_word("INTERVAL");
    spans.add(part, cursor.position());
    Ok(match cursor.value()? {
        Value::Text(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit() || b == b'.') => {
            Value::Text(format!("{text} seconds"))
        }
        value => value,
    })
}
