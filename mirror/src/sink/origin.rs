//! Replication origins: they mark the target's transactions as ours, and nothing else.
//!
//! Progress is never read from them. PostgreSQL 16 to 18 advance an origin when a transaction that was marked is rolled back, so whoever
//! resumed from it would skip what failed. Marking is the last thing before COMMIT, in the same message.

use std::time::Duration;

use pg::name::quote_literal;
use pg::{Lsn, SqlState};

use crate::error::Problem;
use crate::session::PeerSession;

/// What to do when a role may not use origins.
pub const HINT: &str = "Marks serve those who read the target's WAL and must not take these rows for the target's own. GRANT EXECUTE ON FUNCTION pg_replication_origin_oid(text), \
    pg_replication_origin_create(text), pg_replication_origin_session_setup(text), pg_replication_origin_xact_setup(pg_lsn, timestamptz), pg_replication_origin_drop(text) (PostgreSQL 14 and later), \
    or create the mirror with replication_origin = false.";

/// How often an origin is asked for that an ended session has not let go yet.
const BUSY_ATTEMPTS: u32 = 20;

/// Pause between these.
const BUSY_PAUSE: Duration = Duration::from_millis(100);

/// Returns the name of a mirror's origin. Origins are of the whole server, not of a database.
pub fn name(source_peer: &str, mirror: &str) -> String {
    format!("peergate/{source_peer}/{mirror}")
}

/// Makes the origin if it is missing and binds the session to it; returns why not, if it cannot be had.
///
/// One session at a time may hold an origin; who held it before has been ended by whoever takes the target over.
pub async fn set_up(target: &PeerSession, origin: &str) -> Result<(), Problem> {
    let quoted = quote_literal(origin);
    let make = format!(
        "select case when pg_catalog.pg_replication_origin_oid({quoted}) is null then pg_catalog.pg_replication_origin_create({quoted}) end"
    );
    let bind = format!("select pg_catalog.pg_replication_origin_session_setup({quoted})");
    run(target, &make).await?;
    for _ in 0..BUSY_ATTEMPTS {
        match run(target, &bind).await {
            Err(problem) if problem.sqlstate == SqlState::OBJECT_IN_USE => tokio::time::sleep(BUSY_PAUSE).await,
            result => return result,
        }
    }
    run(target, &bind).await
}

async fn run(target: &PeerSession, statement: &str) -> Result<(), Problem> {
    let lost = || Problem::new(SqlState::CONNECTION_EXCEPTION, "the session was lost");
    target.run(statement).await.map_err(|error| error.problem().cloned().unwrap_or_else(lost))
}

/// The statement that marks the open transaction as the source's up to `end`, committed there at `commit_time` (microseconds since 2000).
/// A transaction without one, which only moves the position, has no time of its own: now.
pub fn mark(end: Lsn, commit_time: Option<i64>) -> String {
    let at = match commit_time {
        // Not as one literal: before 15 an interval's field holds no more than 32 bits.
        Some(time) => format!("'2000-01-01 00:00:00+00'::timestamptz + {time} * interval '1 microsecond'"),
        None => "pg_catalog.clock_timestamp()".to_owned(),
    };
    format!("select pg_catalog.pg_replication_origin_xact_setup('{end}', {at})")
}

/// Removes the origin if it is there and the role may; a role that may not has not made it.
///
/// # Errors
/// [`crate::error::Error`] as the server's SQLSTATE says: 55006 while a session holds it.
pub async fn remove(target: &PeerSession, origin: &str) -> Result<(), crate::error::Error> {
    let query = "select roname from pg_catalog.pg_replication_origin where roname = $1";
    if target.client.query_opt(query, &[&origin]).await.map_err(|e| target.error(&e))?.is_none() {
        return Ok(());
    }
    target.run(&format!("select pg_catalog.pg_replication_origin_drop({})", quote_literal(origin))).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_carry_the_sources_position_and_time() {
        assert_eq!(
            mark(Lsn(0x16_B374_D848), Some(-5)),
            "select pg_catalog.pg_replication_origin_xact_setup('16/B374D848', '2000-01-01 00:00:00+00'::timestamptz + -5 * interval '1 microsecond')"
        );
        assert!(mark(Lsn(1), None).contains("clock_timestamp"));
    }
}
