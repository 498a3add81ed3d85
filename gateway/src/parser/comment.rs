//! `COMMENT ON PEER`, `MIRROR` and `ALERT`.

use super::cursor::Cursor;
use super::{Ours, Refusal, Spans};
use crate::statement::{Noun, Statement};

/// `COMMENT ON { PEER | MIRROR | ALERT } name IS { text | NULL }`
pub(super) fn comment(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    let mut spans = Spans::default();
    cursor.expect_words(&["COMMENT", "ON"])?;
    let noun = if cursor.eat_word("PEER") {
        Noun::Peer
    } else if cursor.eat_word("ALERT") {
        Noun::Alert
    } else {
        cursor.expect_words(&["MIRROR"])?;
        Noun::Mirror
    };
    spans.add("name", cursor.position());
    let name = cursor.long_ident()?;
    cursor.expect_words(&["IS"])?;
    spans.add("comment", cursor.position());
    let comment = if cursor.eat_word("NULL") { None } else { Some(cursor.text()?) };
    Ok(Ours { statement: Statement::CommentOn { noun, name, comment }, spans })
}
