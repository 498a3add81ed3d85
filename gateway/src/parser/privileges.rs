//! `GRANT USAGE ON PEER` and `REVOKE USAGE ON PEER`.

use super::cursor::Cursor;
use super::peer::names;
use super::{Ours, Refusal, Spans};
use crate::statement::{Role, Statement};

/// `GRANT { USAGE | ALL [PRIVILEGES] } ON PEER name, … TO role, …`
pub(super) fn grant(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    cursor.expect_words(&["GRANT"])?;
    let (peers, roles, spans) = privileges(cursor, "TO")?;
    let at = cursor.position();
    if cursor.eat_word("WITH") {
        cursor.expect_words(&["GRANT", "OPTION"])?;
        return Err(Refusal::unsupported("WITH GRANT OPTION", at));
    }
    Ok(Ours { statement: Statement::GrantPeer { peers, roles }, spans })
}

/// `REVOKE { USAGE | ALL [PRIVILEGES] } ON PEER name, … FROM role, … [CASCADE | RESTRICT]`
pub(super) fn revoke(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    cursor.expect_words(&["REVOKE"])?;
    let (peers, roles, spans) = privileges(cursor, "FROM")?;
    // Nothing depends on a privilege that cannot be passed on, so both mean the same.
    if !cursor.eat_word("CASCADE") {
        cursor.eat_word("RESTRICT");
    }
    Ok(Ours { statement: Statement::RevokePeer { peers, roles }, spans })
}

fn privileges(cursor: &mut Cursor<'_>, before_roles: &str) -> Result<(Vec<String>, Vec<Role>, Spans), Refusal> {
    let mut spans = Spans::default();
    if cursor.eat_word("ALL") {
        cursor.eat_word("PRIVILEGES");
    } else {
        cursor.expect_words(&["USAGE"])?;
    }
    cursor.expect_words(&["ON", "PEER"])?;
    let peers = names(cursor, &mut spans)?;
    cursor.expect_words(&[before_roles])?;
    let mut count = 0;
    let roles = cursor.list(|cursor| {
        count += 1;
        cursor.eat_word("GROUP");
        spans.add(format!("role.{count}"), cursor.position());
        role(cursor)
    })?;
    Ok((peers, roles, spans))
}

/// `name | CURRENT_USER | CURRENT_ROLE | SESSION_USER`
pub(super) fn role(cursor: &mut Cursor<'_>) -> Result<Role, Refusal> {
    if cursor.eat_word("CURRENT_USER") || cursor.eat_word("CURRENT_ROLE") {
        Ok(Role::Current)
    } else if cursor.eat_word("SESSION_USER") {
        Ok(Role::Session)
    } else {
        cursor.long_ident().map(Role::Named)
    }
}
