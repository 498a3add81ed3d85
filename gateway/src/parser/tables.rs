//! Which tables a mirror copies: the forms of `FOR …`, and PeerDB's `WITH TABLE MAPPING` and `WITH SCHEMA MAPPING`.
//!
//! Parts that the engine cannot do yet are read as far as needed to say so where they stand.

use super::cursor::{Cursor, Punctuation};
use super::{Refusal, Spans};
use crate::statement::{SchemaMap, Selection, Table, TableMap};

/// Reads which tables.
pub(super) fn selection(cursor: &mut Cursor<'_>, spans: &mut Spans) -> Result<Selection, Refusal> {
    spans.add("tables", cursor.position());
    if cursor.is_word("WITH") && cursor.is_word_ahead(2, "MAPPING") {
        cursor.expect_words(&["WITH"])?;
        let by_schema = cursor.eat_word("SCHEMA");
        if !by_schema {
            cursor.expect_words(&["TABLE"])?;
        }
        cursor.expect_words(&["MAPPING"])?;
        return if by_schema {
            let schemas = cursor.parenthesized(schema_mapping)?;
            Ok(Selection::Schemas { schemas, except: Vec::new() })
        } else {
            let mut count = 0;
            cursor.parenthesized(|c| mapping(c, spans, &mut count)).map(Selection::Tables)
        };
    }
    cursor.expect_words(&["FOR"])?;
    if cursor.is_string() || cursor.is_parameter() {
        spans.add("query", cursor.position());
        return cursor.value().map(Selection::Query);
    }
    if cursor.eat_word("ALL") {
        cursor.expect_words(&["TABLES"])?;
        return Ok(Selection::All { except: except(cursor)? });
    }
    if cursor.eat_word("TABLES") {
        cursor.expect_words(&["IN", "SCHEMA"])?;
        let schemas = cursor.list(schema)?;
        return Ok(Selection::Schemas { schemas, except: except(cursor)? });
    }
    cursor.expect_words(&["TABLE"])?;
    items(cursor, spans).map(Selection::Tables)
}

/// `item, …`, as ADD TABLE has them.
pub(super) fn items(cursor: &mut Cursor<'_>, spans: &mut Spans) -> Result<Vec<TableMap>, Refusal> {
    let mut count = 0;
    cursor.list(|c| item(c, spans, &mut count))
}

/// `table, …`
pub(super) fn tables(cursor: &mut Cursor<'_>, spans: &mut Spans) -> Result<Vec<Table>, Refusal> {
    let mut count = 0;
    cursor.list(|c| {
        note_table(c, spans, &mut count);
        table(c)
    })
}

fn note_table(cursor: &Cursor<'_>, spans: &mut Spans, count: &mut usize) {
    *count += 1;
    spans.add(format!("table.{count}"), cursor.position());
}

/// `[schema.]table`
fn table(cursor: &mut Cursor<'_>) -> Result<Table, Refusal> {
    let first = cursor.ident()?;
    if cursor.eat(&Punctuation::Period) {
        return Ok(Table { schema: first, name: cursor.ident()? });
    }
    Ok(Table { schema: "public".to_owned(), name: first })
}

/// `EXCEPT ( table, … )`, if it is there.
fn except(cursor: &mut Cursor<'_>) -> Result<Vec<Table>, Refusal> {
    if cursor.eat_word("EXCEPT") { cursor.parenthesized(table) } else { Ok(Vec::new()) }
}

/// `schema [TO schema]`
fn schema(cursor: &mut Cursor<'_>) -> Result<SchemaMap, Refusal> {
    let from = cursor.ident()?;
    let to = if cursor.eat_word("TO") { cursor.ident()? } else { from.clone() };
    Ok(SchemaMap { from, to })
}

/// `schema:schema`
fn schema_mapping(cursor: &mut Cursor<'_>) -> Result<SchemaMap, Refusal> {
    let from = cursor.ident()?;
    cursor.expect(&Punctuation::Colon)?;
    Ok(SchemaMap { from, to: cursor.ident()? })
}

/// `table [( column, … ) | EXCEPT ( column, … )] [WHERE ( condition )] [SET …] [TO table [( column, … )]]`
pub(super) fn item(cursor: &mut Cursor<'_>, spans: &mut Spans, count: &mut usize) -> Result<TableMap, Refusal> {
    note_table(cursor, spans, count);
    let from = table(cursor)?;
    let columns = if cursor.is(&Punctuation::LParen) { cursor.parenthesized(Cursor::ident)? } else { Vec::new() };
    let exclude =
        if columns.is_empty() && cursor.eat_word("EXCEPT") { cursor.parenthesized(Cursor::ident)? } else { Vec::new() };
    let condition = if cursor.eat_word("WHERE") { Some(cursor.parenthesized_text()?) } else { None };
    if cursor.is_word("SET") {
        return Err(Refusal::unsupported("a column expression (SET)", cursor.position()));
    }
    let to = if cursor.eat_word("TO") { table(cursor)? } else { from.clone() };
    if cursor.is(&Punctuation::LParen) {
        return Err(Refusal::unsupported("renaming columns", cursor.position()));
    }
    Ok(TableMap { columns, exclude, condition, ..TableMap::new(from, to) })
}

/// `table:table` or `{from: table, to: table [, key: column] [, exclude: [column, …]]}`, its parts in any order. By the key PeerDB divides
/// a table for its copy; here that is done by its blocks.
fn mapping(cursor: &mut Cursor<'_>, spans: &mut Spans, count: &mut usize) -> Result<TableMap, Refusal> {
    note_table(cursor, spans, count);
    if !cursor.eat(&Punctuation::LBrace) {
        let from = table(cursor)?;
        cursor.expect(&Punctuation::Colon)?;
        return Ok(TableMap::new(from, table(cursor)?));
    }
    let (mut from, mut to, mut exclude) = (None, None, Vec::new());
    loop {
        if from.is_none() && cursor.eat_word("FROM") {
            cursor.expect(&Punctuation::Colon)?;
            from = Some(table(cursor)?);
        } else if to.is_none() && cursor.eat_word("TO") {
            cursor.expect(&Punctuation::Colon)?;
            to = Some(table(cursor)?);
        } else if cursor.eat_word("KEY") {
            cursor.expect(&Punctuation::Colon)?;
            cursor.ident()?;
        } else if exclude.is_empty() && cursor.eat_word("EXCLUDE") {
            cursor.expect(&Punctuation::Colon)?;
            cursor.expect(&Punctuation::LBracket)?;
            exclude = columns_in_brackets(cursor)?;
        } else {
            return Err(cursor.unexpected());
        }
        if !cursor.eat(&Punctuation::Comma) {
            break;
        }
    }
    match (from, to) {
        (Some(from), Some(to)) if cursor.eat(&Punctuation::RBrace) => {
            Ok(TableMap { exclude, ..TableMap::new(from, to) })
        }
        _ => Err(cursor.unexpected()),
    }
}

/// `column, … [,] ]`: PeerDB allows a comma before the bracket.
fn columns_in_brackets(cursor: &mut Cursor<'_>) -> Result<Vec<String>, Refusal> {
    let mut columns = vec![cursor.ident()?];
    while !cursor.eat(&Punctuation::RBracket) {
        cursor.expect(&Punctuation::Comma)?;
        if cursor.eat(&Punctuation::RBracket) {
            break;
        }
        columns.push(cursor.ident()?);
    }
    Ok(columns)
}
