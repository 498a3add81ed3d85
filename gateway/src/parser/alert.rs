//! `CREATE`, `ALTER`, `DROP`, `TEST`, `WAIT FOR` and `SHOW ALERT`.

use super::cursor::{Cursor, Punctuation};
use super::options::{interval, options, options_of, with_options};
use super::peer::names;
use super::{Ours, Refusal, Spans};
use crate::statement::{AlertChange, AlertChannel, AlertCondition, AlertOn, AlterAlert, CreateAlert, Statement};

/// `CREATE [OR REPLACE] ALERT [IF NOT EXISTS] name ON … WHEN … NOTIFY … [WITH ( option, … )]`
pub(super) fn create(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["CREATE"])?;
    let or_replace = cursor.eat_condition(&["OR", "REPLACE"])?;
    cursor.expect_words(&["ALERT"])?;
    let if_not_exists = !or_replace && cursor.eat_condition(&["IF", "NOT", "EXISTS"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    cursor.expect_words(&["ON"])?;
    let on = subject(cursor, &mut spans)?;
    cursor.expect_words(&["WHEN"])?;
    let conditions = conditions(cursor, &mut spans)?;
    cursor.expect_words(&["NOTIFY"])?;
    let channels = channels(cursor, &mut spans)?;
    let options = with_options(cursor, &mut spans)?;
    let alert = CreateAlert { name, or_replace, if_not_exists, on, conditions, channels, options };
    Ok(Ours { statement: Statement::CreateAlert(alert), spans })
}

/// `ALTER ALERT [IF EXISTS] name { [ON …] [WHEN …] [NOTIFY …] | SET ( … ) | RESET ( … ) | ENABLE | DISABLE | RENAME TO name }`
pub(super) fn alter(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["ALTER", "ALERT"])?;
    let if_exists = cursor.eat_condition(&["IF", "EXISTS"])?;
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    spans.add("options", cursor.position());
    let change = if cursor.eat_word("SET") {
        AlertChange::Set(options(cursor, &mut spans)?)
    } else if cursor.eat_word("RESET") {
        AlertChange::Reset(cursor.parenthesized(|cursor| {
            let at = cursor.position();
            let option = cursor.ident()?;
            spans.add(format!("option.{option}"), at);
            Ok(option)
        })?)
    } else if cursor.eat_word("ENABLE") {
        AlertChange::Enable(true)
    } else if cursor.eat_word("DISABLE") {
        AlertChange::Enable(false)
    } else if cursor.eat_word("RENAME") {
        cursor.expect_words(&["TO"])?;
        spans.add("new_name", cursor.position());
        AlertChange::RenameTo(cursor.long_ident()?)
    } else {
        let on = if cursor.eat_word("ON") { Some(subject(cursor, &mut spans)?) } else { None };
        let conditions = if cursor.eat_word("WHEN") { conditions(cursor, &mut spans)? } else { Vec::new() };
        let channels = if cursor.eat_word("NOTIFY") { channels(cursor, &mut spans)? } else { Vec::new() };
        if on.is_none() && conditions.is_empty() && channels.is_empty() {
            return Err(cursor.unexpected());
        }
        AlertChange::Define { on, conditions, channels }
    };
    Ok(Ours { statement: Statement::AlterAlert(AlterAlert { name, if_exists, change }), spans })
}

/// `DROP ALERT [IF EXISTS] name, …`
pub(super) fn drop(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["DROP", "ALERT"])?;
    let if_exists = cursor.eat_condition(&["IF", "EXISTS"])?;
    Ok(Ours { statement: Statement::DropAlert { names: names(cursor, &mut spans)?, if_exists }, spans })
}

/// `TEST ALERT name`
pub(super) fn test(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let (name, spans) = named(cursor, &["TEST", "ALERT"])?;
    Ok(Ours { statement: Statement::TestAlert { name }, spans })
}

/// `SHOW ALERT name`
pub(super) fn show(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let (name, spans) = named(cursor, &["SHOW", "ALERT"])?;
    Ok(Ours { statement: Statement::ShowAlert { name }, spans })
}

/// `WAIT FOR ALERT name [TIMEOUT interval]`
pub(super) fn wait(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let (name, mut spans) = named(cursor, &["WAIT", "FOR", "ALERT"])?;
    let timeout = if cursor.eat_word("TIMEOUT") { Some(interval(cursor, &mut spans, "timeout")?) } else { None };
    Ok(Ours { statement: Statement::WaitForAlert { name, timeout }, spans })
}

fn named(cursor: &mut Cursor<'_>, words: &[&str]) -> Result<(String, Spans), Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(words)?;
    spans.add("name", cursor.position());
    Ok((cursor.long_ident()?, spans))
}

/// `{ MIRROR name | PEER name | ALL MIRRORS | ALL PEERS }`
fn subject(cursor: &mut Cursor<'_>, spans: &mut Spans) -> Result<AlertOn, Refusal> {
    if cursor.eat_word("ALL") {
        let is_peer = cursor.eat_word("PEERS");
        if !is_peer {
            cursor.expect_words(&["MIRRORS"])?;
        }
        return Ok(AlertOn { is_peer, name: None });
    }
    let is_peer = cursor.eat_word("PEER");
    if !is_peer {
        cursor.expect_words(&["MIRROR"])?;
    }
    spans.add("on", cursor.position());
    Ok(AlertOn { is_peer, name: Some(cursor.ident()?) })
}

/// `metric operator value [FOR interval] [OR …]`
fn conditions(cursor: &mut Cursor<'_>, spans: &mut Spans) -> Result<Vec<AlertCondition>, Refusal> {
    let mut conditions = Vec::new();
    loop {
        let part = format!("condition.{}", conditions.len() + 1);
        spans.add(part.clone(), cursor.position());
        let metric = cursor.ident()?;
        spans.add(format!("{part}.op"), cursor.position());
        let operator = operator(cursor)?;
        spans.add(format!("{part}.value"), cursor.position());
        cursor.eat_word("INTERVAL");
        let value = cursor.value()?;
        let hold = if cursor.eat_word("FOR") { Some(interval(cursor, spans, &format!("{part}.for"))?) } else { None };
        conditions.push(AlertCondition { metric, operator, value, hold });
        if !cursor.eat_word("OR") {
            return Ok(conditions);
        }
    }
}

fn operator(cursor: &mut Cursor<'_>) -> Result<&'static str, Refusal> {
    let operators = [
        (Punctuation::Gt, ">"),
        (Punctuation::GtEq, ">="),
        (Punctuation::Lt, "<"),
        (Punctuation::LtEq, "<="),
        (Punctuation::Eq, "="),
        (Punctuation::Neq, "<>"),
    ];
    let found = operators.into_iter().find(|(token, _)| cursor.eat(token));
    found.map(|(_, operator)| operator).ok_or_else(|| cursor.unexpected())
}

/// `channel [( option, … )], …`
fn channels(cursor: &mut Cursor<'_>, spans: &mut Spans) -> Result<Vec<AlertChannel>, Refusal> {
    let mut count = 0;
    cursor.list(|cursor| {
        count += 1;
        let part = format!("channel.{count}");
        spans.add(part.clone(), cursor.position());
        let kind = cursor.ident()?;
        let is_empty = cursor.is(&Punctuation::LParen) && cursor.is_ahead(1, &Punctuation::RParen);
        let options = if is_empty {
            cursor.expect(&Punctuation::LParen)?;
            cursor.expect(&Punctuation::RParen)?;
            Vec::new()
        } else if cursor.is(&Punctuation::LParen) {
            options_of(cursor, spans, &format!("{part}.option"))?
        } else {
            Vec::new()
        };
        Ok(AlertChannel { kind, options })
    })
}
