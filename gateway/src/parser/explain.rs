//! `EXPLAIN` of a statement about a mirror.

use pg::SqlState;

use super::cursor::{Cursor, Punctuation};
use super::{Ours, Refusal, mirror};
use crate::statement::{MirrorChange, Selection, Statement, Value};

/// Returns whether it is one of ours: what is explained is CREATE or ALTER MIRROR.
pub(super) fn is_ours(text: &str) -> bool {
    let Ok(mut cursor) = Cursor::new(text) else { return false };
    if !cursor.eat_word("EXPLAIN") {
        return false;
    }
    if cursor.eat(&Punctuation::LParen) {
        while !cursor.at_end() && !cursor.eat(&Punctuation::RParen) {
            cursor.skip();
        }
    }
    while cursor.eat_word("ANALYZE") || cursor.eat_word("VERBOSE") {}
    (cursor.is_word("CREATE") || cursor.is_word("ALTER")) && cursor.is_word_ahead(1, "MIRROR")
}

/// `EXPLAIN [( FORMAT { TEXT | JSON } )] { CREATE MIRROR … | ALTER MIRROR … }`
pub(super) fn explain(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    cursor.expect_words(&["EXPLAIN"])?;
    let mut json = false;
    if cursor.is(&Punctuation::LParen) {
        cursor.parenthesized(|cursor| {
            json = option(cursor)?;
            Ok(())
        })?;
    }
    if cursor.is_word("ANALYZE") || cursor.is_word("VERBOSE") {
        option(cursor)?;
    }
    let Ours { statement, spans } =
        if cursor.is_word("CREATE") { mirror::create(cursor)? } else { mirror::alter(cursor)? };
    if has_parameters(&statement) {
        // It is run once for a try, before values are known.
        let at = spans.find("options").or_else(|| spans.find("name")).unwrap_or(0);
        return Err(Refusal::unsupported("a parameter in EXPLAIN of a mirror", at));
    }
    Ok(Ours { statement: Statement::ExplainMirror { statement: Box::new(statement), json }, spans })
}

/// Reads one option; returns whether it asks for JSON.
fn option(cursor: &mut Cursor<'_>) -> Result<bool, Refusal> {
    let at = cursor.position();
    let name = cursor.ident()?;
    match name.as_str() {
        "format" => {
            let at = cursor.position();
            match cursor.ident()?.as_str() {
                "json" => Ok(true),
                "text" => Ok(false),
                other => Err(refusal(
                    SqlState::INVALID_PARAMETER_VALUE,
                    format!("unrecognized value for EXPLAIN option \"format\": \"{other}\""),
                    Some("It takes text or json."),
                    at,
                )),
            }
        }
        "analyze" => Err(refusal(
            SqlState::FEATURE_NOT_SUPPORTED,
            "EXPLAIN ANALYZE would have to make the mirror".to_owned(),
            Some("Use EXPLAIN."),
            at,
        )),
        _ => Err(refusal(
            SqlState::SYNTAX_ERROR,
            format!("unrecognized EXPLAIN option \"{name}\""),
            Some("For mirrors there is FORMAT."),
            at,
        )),
    }
}

fn refusal(sqlstate: SqlState, message: String, hint: Option<&str>, at: usize) -> Refusal {
    Refusal { sqlstate, message, detail: None, hint: hint.map(str::to_owned), at }
}

fn has_parameters(statement: &Statement) -> bool {
    let is_parameter = |value: &Value| matches!(value, Value::Parameter(_));
    match statement {
        Statement::CreateMirror(mirror) => {
            matches!(mirror.selection, Selection::Query(Value::Parameter(_)))
                || mirror.options.iter().any(|o| is_parameter(&o.value))
        }
        Statement::AlterMirror { change: MirrorChange::Set(options), .. } => {
            options.iter().any(|o| is_parameter(&o.value))
        }
        Statement::AlterMirror { change: MirrorChange::SkipTo(lsn), .. } => is_parameter(lsn),
        _ => false,
    }
}
