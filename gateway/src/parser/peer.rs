//! `CREATE`, `ALTER`, `DROP`, `VALIDATE` and `SHOW PEER`.

use super::cursor::Cursor;
use super::options::{options, with_options};
use super::privileges::role;
use super::{Ours, Refusal, Spans};
use crate::statement::{AlterPeer, CreatePeer, PeerChange, Statement};

/// `CREATE [OR REPLACE] PEER [IF NOT EXISTS] name FROM type [WITH ( option, … )]`
pub(super) fn create(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["CREATE"])?;
    let or_replace = cursor.eat_condition(&["OR", "REPLACE"])?;
    cursor.expect_words(&["PEER"])?;
    // One says to leave an existing one and the other to change it: as in PostgreSQL, a statement says one of them.
    let if_not_exists = !or_replace && cursor.eat_condition(&["IF", "NOT", "EXISTS"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    cursor.expect_words(&["FROM"])?;
    spans.add("type", cursor.position());
    let kind = cursor.ident()?;
    let options = with_options(cursor, &mut spans)?;
    let statement = Statement::CreatePeer(CreatePeer { name, or_replace, if_not_exists, kind, options });
    Ok(Ours { statement, spans })
}

/// `ALTER PEER [IF EXISTS] name { SET ( option, … ) | RESET ( name, … ) | RENAME TO name | OWNER TO role |
/// REFRESH SCHEMA [schema, …] }`
pub(super) fn alter(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["ALTER", "PEER"])?;
    let if_exists = cursor.eat_condition(&["IF", "EXISTS"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    spans.add("options", cursor.position());
    let change = if cursor.eat_word("SET") {
        PeerChange::Set(options(cursor, &mut spans)?)
    } else if cursor.eat_word("RESET") {
        PeerChange::Reset(cursor.parenthesized(|cursor| {
            let at = cursor.position();
            let name = cursor.ident()?;
            spans.add(format!("option.{name}"), at);
            Ok(name)
        })?)
    } else if cursor.eat_word("RENAME") {
        cursor.expect_words(&["TO"])?;
        spans.add("new_name", cursor.position());
        PeerChange::Rename(cursor.long_ident()?)
    } else if cursor.eat_word("OWNER") {
        cursor.expect_words(&["TO"])?;
        spans.add("role", cursor.position());
        PeerChange::Owner(role(cursor)?)
    } else if cursor.eat_word("REFRESH") {
        cursor.expect_words(&["SCHEMA"])?;
        let schemas = if cursor.at_end() { Vec::new() } else { listed(cursor, &mut spans, "schema")? };
        PeerChange::Refresh(schemas)
    } else {
        return Err(cursor.unexpected());
    };
    Ok(Ours { statement: Statement::AlterPeer(AlterPeer { name, if_exists, change }), spans })
}

/// `VALIDATE PEER name [VERBOSE]`
pub(super) fn validate(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["VALIDATE", "PEER"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    let verbose = cursor.eat_word("VERBOSE");
    Ok(Ours { statement: Statement::ValidatePeer { name, verbose }, spans })
}

/// `SHOW PEER name`
pub(super) fn show(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["SHOW", "PEER"])?;
    spans.add("name", cursor.position());
    Ok(Ours { statement: Statement::ShowPeer { name: cursor.long_ident()? }, spans })
}

/// `DROP PEER [IF EXISTS] name, … [CASCADE | RESTRICT]`
pub(super) fn drop(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["DROP", "PEER"])?;
    let if_exists = cursor.eat_condition(&["IF", "EXISTS"])?;
    let names = names(cursor, &mut spans)?;
    let cascade = cursor.eat_word("CASCADE");
    if !cascade {
        cursor.eat_word("RESTRICT");
    }
    Ok(Ours { statement: Statement::DropPeer { names, if_exists, cascade }, spans })
}

/// Reads `name, …` and notes where each is.
pub(super) fn names(cursor: &mut Cursor<'_>, spans: &mut Spans) -> Result<Vec<String>, Refusal> {
    listed(cursor, spans, "name")
}

/// Reads names and notes where each is, as `key.1` and so on.
fn listed(cursor: &mut Cursor<'_>, spans: &mut Spans, key: &str) -> Result<Vec<String>, Refusal> {
    let mut count = 0;
    cursor.list(|cursor| {
        count += 1;
        spans.add(format!("{key}.{count}"), cursor.position());
        cursor.long_ident()
    })
}
