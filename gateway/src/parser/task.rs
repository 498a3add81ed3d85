//! `SHOW TASK` and `CANCEL TASK`.

use super::cursor::Cursor;
use super::{Ours, Refusal, Spans};
use crate::statement::{Statement, Value};

/// `SHOW TASK id`
pub(super) fn show(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    cursor.expect_words(&["SHOW", "TASK"])?;
    let (id, spans) = id(cursor)?;
    Ok(Ours { statement: Statement::ShowTask { id }, spans })
}

/// `CANCEL TASK id`
pub(super) fn cancel(cursor: &mut Cursor<'_>) -> Result<Ours, Refusal> {
    cursor.expect_words(&["CANCEL", "TASK"])?;
    let (id, spans) = id(cursor)?;
    Ok(Ours { statement: Statement::CancelTask { id }, spans })
}

fn id(cursor: &mut Cursor<'_>) -> Result<(Value, Spans), Refusal> {
    let mut spans = Spans::default();
    spans.add("task", cursor.position());
    Ok((cursor.value()?, spans))
}
