//! `CREATE PEER` and `DROP PEER`.

use super::cursor::Cursor;
use super::options::with_options;
use super::{Ours, Refusal, Spans};
use crate::statement::{CreatePeer, Statement};

/// `CREATE PEER [IF NOT EXISTS] name FROM type [WITH ( option, … )]`
pub(super) fn create(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["CREATE", "PEER"])?;
    let if_not_exists = cursor.eat_condition(&["IF", "NOT", "EXISTS"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    cursor.expect_words(&["FROM"])?;
    spans.add("type", cursor.position());
    let kind = cursor.ident()?;
    let options = with_options(cursor, &mut spans)?;
    Ok(Ours { statement: Statement::CreatePeer(CreatePeer { name, if_not_exists, kind, options }), spans })
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
    let mut count = 0;
    cursor.list(|cursor| {
        count += 1;
        spans.add(format!("name.{count}"), cursor.position());
        cursor.long_ident()
    })
}
