//! Alters a table on the target, amid the rows of the same transaction.

use catalog::event::Event;

use super::shapes;
use crate::batch::Alter;
use crate::error::{Error, Problem};
use crate::schema::change::Kind;
use crate::schema::make;
use crate::session::PeerSession;

/// How long a lock on a target table may be waited for: everybody else queues behind us meanwhile. The mirror tries again.
const LOCK_TIMEOUT: &str = "set local lock_timeout = '5s'";

/// Carries the change out and records what the table looks like from then on, within the transaction of the session. Returns what a
/// person should know when it is committed.
///
/// # Errors
/// [`Error::Blocked`] naming the statement that the target refuses; [`Error::Transient`] if a lock was not to be had.
pub async fn run(target: &PeerSession, mirror: &str, alter: &Alter) -> Result<Vec<Event>, Error> {
    let mut events = alter.events.clone();
    if !alter.statements.is_empty() {
        // Checks that were put off until the commit would keep the table from being altered.
        target.run(&format!("{LOCK_TIMEOUT}; set constraints all immediate")).await?;
        for prerequisite in &alter.prerequisites {
            make::prerequisite(target, prerequisite).await?;
        }
    }
    for statement in &alter.statements {
        if statement.kind != Kind::Optional {
            target.run(&statement.sql).await.map_err(|e| in_statement(&statement.sql, e))?;
            continue;
        }
        target.run("savepoint peergate_alter").await?;
        match target.run(&statement.sql).await {
            Ok(()) => target.run("release savepoint peergate_alter").await?,
            Err(Error::Blocked(problem)) => {
                target.run("rollback to savepoint peergate_alter; release savepoint peergate_alter").await?;
                events.push(
                    Event::warning(
                        "schema",
                        format!("not carried over to table \"{}\": {}", alter.plan.target_name, statement.sql),
                    )
                    .detail(format!("{}.", problem.message)),
                );
            }
            Err(other) => return Err(other),
        }
    }
    if !alter.statements.is_empty() {
        target.run("set local lock_timeout = '30s'; set constraints all deferred").await?;
    }
    shapes::record(target, mirror, &alter.listed, &alter.plan).await?;
    fail_point!("table altered on the target");
    Ok(events)
}

fn in_statement(statement: &str, error: Error) -> Error {
    match error {
        Error::Blocked(problem) => {
            let detail = problem.detail.clone().map(|d| format!("{d} ")).unwrap_or_default();
            let problem: Problem = problem.detail(format!("{detail}The statement on the target was: {statement}."));
            Error::Blocked(problem.hint("Nothing after this was applied. Mend the target, then RESUME MIRROR."))
        }
        other => other,
    }
}
