//! `HELP`.

use super::cursor::Cursor;
use super::{Ours, Refusal, Spans};
use crate::help::help as find;
use crate::statement::Statement;

/// `HELP [word …]`
pub(super) fn help(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    cursor.expect_words(&["HELP"])?;
    let at = cursor.position();
    let mut words = Vec::new();
    while !cursor.at_end() {
        words.push(cursor.ident()?);
    }
    // What nobody knows is refused where it stands.
    find(&words, at)?;
    Ok(Ours { statement: Statement::Help { words }, spans: Spans::default() })
}
