//! `CREATE`, `ALTER`, `RESYNC`, `VERIFY`, `DROP`, `PAUSE`, `RESUME`, `EXECUTE`, `WAIT FOR` and `SHOW MIRROR`. Which tables: see `tables`.

use super::cursor::Cursor;
use super::options::{interval, options, with_options};
use super::peer::names;
use super::tables::{item, items, selection, tables};
use super::{Ours, Refusal, Spans};
use crate::statement::{CreateMirror, MirrorChange, Statement, Until};

/// `CREATE MIRROR [IF NOT EXISTS] name FROM source TO target tables [WITH ( option, … )]`
pub(super) fn create(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["CREATE", "MIRROR"])?;
    let if_not_exists = cursor.eat_condition(&["IF", "NOT", "EXISTS"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    cursor.expect_words(&["FROM"])?;
    spans.add("source", cursor.position());
    let source = cursor.ident()?;
    cursor.expect_words(&["TO"])?;
    spans.add("target", cursor.position());
    let target = cursor.ident()?;
    let selection = selection(cursor, &mut spans)?;
    let options = with_options(cursor, &mut spans)?;
    let statement = Statement::CreateMirror(CreateMirror { name, if_not_exists, source, target, selection, options });
    Ok(Ours { statement, spans })
}

/// `DROP MIRROR [IF EXISTS] name, … [KEEP TARGET METADATA] [FORCE]`
pub(super) fn drop(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["DROP", "MIRROR"])?;
    let if_exists = cursor.eat_condition(&["IF", "EXISTS"])?;
    let names = names(cursor, &mut spans)?;
    let keep_target_metadata = cursor.eat_condition(&["KEEP", "TARGET", "METADATA"])?;
    let force = cursor.eat_word("FORCE");
    Ok(Ours { statement: Statement::DropMirror { names, if_exists, keep_target_metadata, force }, spans })
}

/// `ALTER MIRROR name { ADD TABLE item, … | ALTER TABLE item | DROP TABLE table, … | REFRESH TABLES | SKIP TO LSN 'lsn' | SET ( … ) | RESET ( … ) | RENAME TO name }`
pub(super) fn alter(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["ALTER", "MIRROR"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    spans.add("tables", cursor.position());
    spans.add("options", cursor.position());
    let change = if cursor.eat_word("ADD") {
        cursor.expect_words(&["TABLE"])?;
        MirrorChange::AddTables(items(cursor, &mut spans)?)
    } else if cursor.eat_word("ALTER") {
        cursor.expect_words(&["TABLE"])?;
        MirrorChange::AlterTable(item(cursor, &mut spans, &mut 0)?)
    } else if cursor.eat_word("DROP") {
        cursor.expect_words(&["TABLE"])?;
        MirrorChange::DropTables(tables(cursor, &mut spans)?)
    } else if cursor.eat_word("REFRESH") {
        cursor.expect_words(&["TABLES"])?;
        MirrorChange::RefreshTables
    } else if cursor.eat_word("SKIP") {
        cursor.expect_words(&["TO", "LSN"])?;
        spans.add("lsn", cursor.position());
        MirrorChange::SkipTo(cursor.value()?)
    } else if cursor.eat_word("SET") {
        MirrorChange::Set(options(cursor, &mut spans)?)
    } else if cursor.eat_word("RESET") {
        MirrorChange::Reset(cursor.parenthesized(|cursor| {
            let at = cursor.position();
            let option = cursor.ident()?;
            spans.add(format!("option.{option}"), at);
            Ok(option)
        })?)
    } else {
        cursor.expect_words(&["RENAME", "TO"])?;
        spans.add("new_name", cursor.position());
        MirrorChange::RenameTo(cursor.long_ident()?)
    };
    Ok(Ours { statement: Statement::AlterMirror { name, change }, spans })
}

/// `RESYNC MIRROR [IF EXISTS] name [TABLE table, …]`
pub(super) fn resync(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["RESYNC", "MIRROR"])?;
    let if_exists = cursor.eat_condition(&["IF", "EXISTS"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    let tables = if cursor.eat_word("TABLE") { tables(cursor, &mut spans)? } else { Vec::new() };
    Ok(Ours { statement: Statement::ResyncMirror { name, if_exists, tables }, spans })
}

/// `VERIFY MIRROR name [TABLE table, …] [REPAIR]`
pub(super) fn verify(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["VERIFY", "MIRROR"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    let tables = if cursor.eat_word("TABLE") { tables(cursor, &mut spans)? } else { Vec::new() };
    let repair = cursor.eat_word("REPAIR");
    Ok(Ours { statement: Statement::VerifyMirror { name, tables, repair }, spans })
}

/// `PAUSE MIRROR [IF EXISTS] name` and `RESUME MIRROR [IF EXISTS] name`
pub(super) fn pause_or_resume(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    let pause = cursor.eat_word("PAUSE");
    if !pause {
        cursor.expect_words(&["RESUME"])?;
    }
    cursor.expect_words(&["MIRROR"])?;
    let if_exists = cursor.eat_condition(&["IF", "EXISTS"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    let statement =
        if pause { Statement::PauseMirror { name, if_exists } } else { Statement::ResumeMirror { name, if_exists } };
    Ok(Ours { statement, spans })
}

/// `EXECUTE MIRROR [IF EXISTS] name`
pub(super) fn execute(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["EXECUTE", "MIRROR"])?;
    let if_exists = cursor.eat_condition(&["IF", "EXISTS"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    Ok(Ours { statement: Statement::ExecuteMirror { name, if_exists }, spans })
}

/// `WAIT FOR MIRROR name [LSN 'lsn' | STATE state] [TIMEOUT interval]`
pub(super) fn wait(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["WAIT", "FOR", "MIRROR"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    let until = if cursor.eat_word("LSN") {
        spans.add("lsn", cursor.position());
        Until::Lsn(cursor.value()?)
    } else if cursor.eat_word("STATE") {
        spans.add("state", cursor.position());
        Until::State(cursor.value()?)
    } else {
        Until::CaughtUp
    };
    let timeout = if cursor.eat_word("TIMEOUT") { Some(interval(cursor, &mut spans, "timeout")?) } else { None };
    Ok(Ours { statement: Statement::WaitForMirror { name, until, timeout }, spans })
}

/// `SHOW MIRROR name`
pub(super) fn show(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["SHOW", "MIRROR"])?;
    spans.add("name", cursor.position());
    Ok(Ours { statement: Statement::ShowMirror { name: cursor.long_ident()? }, spans })
}
