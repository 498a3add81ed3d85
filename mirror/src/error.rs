//! What can go wrong with a mirror, by what is done about it.

use std::time::Duration;

use catalog::connect::{ConnectError, chain};
use catalog::mirror::Failure;
use pg::pgoutput::DecodeError;
use pg::{Lsn, SqlState, TableName};

/// Longest pause between two attempts.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// What went wrong, in the words that `mirror_status` and `mirror_events` show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What kind.
    pub sqlstate: SqlState,
    /// What happened: lower case, no full stop.
    pub message: String,
    /// More about it, as sentences.
    pub detail: Option<String>,
    /// What to do about it, as sentences.
    pub hint: Option<String>,
    /// Where in the source's WAL, if it has a place there: the commit record of the transaction that cannot be applied.
    pub lsn: Option<Lsn>,
    /// The source table whose rows it is about, if it is about one's.
    pub table: Option<Box<TableName>>,
}

impl Problem {
    /// Makes a problem of its kind and message.
    pub fn new(sqlstate: SqlState, message: impl Into<String>) -> Problem {
        Problem { sqlstate, message: message.into(), detail: None, hint: None, lsn: None, table: None }
    }

    /// Says more about it.
    pub fn detail(self, detail: impl Into<String>) -> Problem {
        Problem { detail: Some(detail.into()), ..self }
    }

    /// Says what to do about it.
    pub fn hint(self, hint: impl Into<String>) -> Problem {
        Problem { hint: Some(hint.into()), ..self }
    }

    /// Returns the problem as `mirror_status` shows it, after this many attempts; `retry_in` is `None` when a person must act.
    pub fn failure(&self, attempt: u32, retry_in: Option<Duration>) -> Failure {
        Failure {
            sqlstate: self.sqlstate,
            message: self.message.clone(),
            detail: self.detail.clone(),
            hint: self.hint.clone(),
            lsn: self.lsn,
            attempt: attempt.cast_signed(),
            retry_in: retry_in.map(|d| d.as_secs_f64()),
        }
    }

    /// Says which source table's rows it is about.
    pub fn table(self, table: &TableName) -> Problem {
        Problem { table: Some(Box::new(table.clone())), ..self }
    }

    /// Says where in the source's WAL it happened, unless that is known already.
    pub fn at(self, lsn: Lsn) -> Problem {
        Problem { lsn: self.lsn.or(Some(lsn)), ..self }
    }
}

/// Why a mirror's worker stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It will pass: the connection broke, the server is starting or out of room, a lock was not to be had.
    #[error("{}", .0.message)]
    Transient(Problem),
    /// It stays so until a person acts; nothing after it is applied.
    #[error("{}", .0.message)]
    Blocked(Problem),
    /// The source no longer has what the target lacks: only a new copy helps.
    #[error("{}", .0.message)]
    ResyncRequired(Problem),
    /// What the copy began with is no longer so; it starts anew, with a new snapshot. With [`Problem::table`], that table alone: the stream
    /// can do no more for it.
    #[error("{}", .0.message)]
    CopyAgain(Problem),
    /// A column's type is another than when it was decided that values come in binary: they must come as text.
    #[error("values must come as text")]
    TextNeeded,
    /// One of several transactions that are written together cannot be applied. They are to be written one by one as far as `until`,
    /// where the last of them commits: what precedes the one at fault is applied then, and it is known which one that is.
    #[error("{}", .problem.message)]
    OneByOne {
        /// Where the last of them commits.
        until: Lsn,
        /// What went wrong.
        problem: Problem,
    },
    /// What the attempt was made with has changed: the next one begins at once.
    #[error("the attempt begins anew")]
    Restart,
    /// Another process has taken the mirror over; nothing more may be written.
    #[error("another process has taken the mirror over")]
    Fenced,
    /// The worker was told to stop.
    #[error("stopped")]
    Stopped,
}

impl Error {
    /// Sorts an error of a SQL session on `peer`.
    pub fn sql(peer: &str, error: &tokio_postgres::Error) -> Error {
        match error.as_db_error() {
            Some(db) => {
                let context = db.where_().map(|w| format!(" Context: {w}."));
                let detail = match (db.detail(), context) {
                    (None, None) => None,
                    (detail, context) => Some(format!("{}{}", detail.unwrap_or_default(), context.unwrap_or_default())),
                };
                let sqlstate = SqlState::from_text(db.code().code()).unwrap_or(SqlState::INTERNAL_ERROR);
                Error::server(Problem {
                    sqlstate,
                    message: format!("peer \"{peer}\": {}", db.message()),
                    detail,
                    hint: db.hint().map(str::to_owned),
                    lsn: None,
                    table: None,
                })
            }
            None => Error::connection(peer, &chain(error)),
        }
    }

    /// Sorts an error that a server sent, by its SQLSTATE.
    pub fn server(problem: Problem) -> Error {
        if is_transient(problem.sqlstate) { Error::Transient(problem) } else { Error::Blocked(problem) }
    }

    /// The connection to `peer` broke, or could not be made.
    pub fn connection(peer: &str, what: &str) -> Error {
        Error::Transient(Problem::new(SqlState::CONNECTION_EXCEPTION, format!("connection to peer \"{peer}\": {what}")))
    }

    /// A session on `peer` could not be opened.
    pub fn connect(peer: &str, error: ConnectError) -> Error {
        let mut problem = Problem::new(SqlState::PEER_UNREACHABLE, format!("could not connect to peer \"{peer}\""))
            .detail(error.message);
        problem.hint = error.hint;
        // A wrong password will not get better by itself, but it may be mended on the peer: keep trying, seldom.
        problem.sqlstate = error.sqlstate.unwrap_or(SqlState::PEER_UNREACHABLE);
        Error::Transient(problem)
    }

    /// What a server sent is not what the protocol says.
    pub fn protocol(peer: &str, what: impl std::fmt::Display) -> Error {
        Error::Blocked(Problem::new(
            SqlState::PROTOCOL_VIOLATION,
            format!("peer \"{peer}\" broke the protocol: {what}"),
        ))
    }

    /// Returns what the catalog is to show; `None` for those that are no problem of the mirror.
    pub fn problem(&self) -> Option<&Problem> {
        match self {
            Error::Transient(p) | Error::Blocked(p) | Error::ResyncRequired(p) | Error::CopyAgain(p) => Some(p),
            Error::OneByOne { problem, .. } => Some(problem),
            Error::TextNeeded | Error::Restart | Error::Fenced | Error::Stopped => None,
        }
    }

    /// Adds the place in the WAL where it happened.
    pub fn at(self, lsn: Lsn) -> Error {
        match self {
            Error::Transient(p) => Error::Transient(p.at(lsn)),
            Error::Blocked(p) => Error::Blocked(p.at(lsn)),
            Error::ResyncRequired(p) => Error::ResyncRequired(p.at(lsn)),
            Error::CopyAgain(p) => Error::CopyAgain(p.at(lsn)),
            other => other,
        }
    }
}

/// The catalog not answering is never the mirror's fault.
impl From<catalog::Error> for Error {
    fn from(error: catalog::Error) -> Error {
        match error {
            catalog::Error::Secret(secret) => Error::Blocked(
                Problem::new(SqlState::INVALID_PASSWORD, secret.to_string())
                    .hint("Create the peer anew with its password, or bring back the key."),
            ),
            other => Error::Transient(Problem::new(SqlState::SYSTEM_ERROR, format!("catalog: {}", chain(&other)))),
        }
    }
}

impl From<DecodeError> for Error {
    fn from(error: DecodeError) -> Error {
        Error::Blocked(
            Problem::new(SqlState::PROTOCOL_VIOLATION, format!("cannot decode the replication stream: {error}")).hint(
                "This is a bug in Peergate or in the source's output plugin: report it with the server's version.",
            ),
        )
    }
}

/// Connection, resources, operator intervention, rollbacks, locks, timeouts, a server that is read-only for a while: these pass.
fn is_transient(sqlstate: SqlState) -> bool {
    matches!(sqlstate.class(), "08" | "40" | "53" | "57" | "58")
        || matches!(sqlstate.as_str(), "25006" | "25P03" | "25P04" | "55006" | "55P03")
}

/// Returns the pause before attempt `attempt` (1 is the first repetition): doubling from half a second, at most a minute.
pub fn retry_delay(attempt: u32) -> Duration {
    RETRY_MAX.min(Duration::from_millis(500) * 2u32.saturating_pow(attempt.saturating_sub(1).min(16)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_retried_and_what_does_not_is_not() {
        for code in ["08006", "53100", "57P01", "57P03", "40001", "40P01", "55006", "55P03", "57014", "25006"] {
            assert!(is_transient(SqlState::from_text(code).unwrap()), "{code}");
        }
        for code in ["23505", "42P01", "22P02", "42501", "XX000", "55000"] {
            assert!(!is_transient(SqlState::from_text(code).unwrap()), "{code}");
        }
    }

    #[test]
    fn pauses_double_and_are_capped() {
        assert_eq!(retry_delay(1), Duration::from_millis(500));
        assert_eq!(retry_delay(2), Duration::from_secs(1));
        assert_eq!(retry_delay(8), RETRY_MAX);
        assert_eq!(retry_delay(u32::MAX), RETRY_MAX);
    }
}
