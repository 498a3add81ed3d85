//! What is said of rows that cannot be written.

use pg::SqlState;

use crate::error::{Error, Problem};
use crate::relation::TableMap;

/// Returns whether a value that must be unique was there already.
pub(super) fn is_collision(error: &Error) -> bool {
    let collision = |p: &Problem| matches!(p.sqlstate, SqlState::UNIQUE_VIOLATION | SqlState::EXCLUSION_VIOLATION);
    matches!(error, Error::Blocked(p) if collision(p))
}

/// Says to which table an error belongs.
pub(super) fn in_table(table: &TableMap, error: Error) -> Error {
    match error {
        Error::Blocked(problem) if problem.table.is_none() => {
            let detail = problem.detail.clone().map(|d| format!("{d} ")).unwrap_or_default();
            let mut problem =
                problem.detail(format!("{detail}It happened while writing to table \"{}\".", table.target));
            problem.hint.get_or_insert_with(|| {
                "Nothing after this was applied. Mend the target, then RESUME MIRROR.".to_owned()
            });
            Error::Blocked(problem.table(&table.source))
        }
        other => other,
    }
}

/// A change that finds no row means that the target is not what the mirror made it: going on would hide it.
pub(super) fn expect_rows(table: &TableMap, what: &str, expected: usize, found: u64) -> Result<(), Error> {
    if u64::try_from(expected).is_ok_and(|e| e == found) {
        return Ok(());
    }
    Err(Error::Blocked(
        Problem::new(
            SqlState::WRONG_STATE,
            format!(
                "{} of {expected} rows to {what} are missing in target table \"{}\"",
                expected as i128 - i128::from(found),
                table.target
            ),
        )
        .detail("Somebody else has changed the table on the target."),
    ))
}
