//! Removes what a dropped mirror left on its peers.

use catalog::Catalog;
use catalog::event::Event;
use catalog::peer::PeerOptions;
use catalog::removal::Removal;
use catalog::task::TaskKind;
use serde_json::Value;

use crate::error::{Error, Problem, retry_delay};
use crate::late;
use crate::session::PeerSession;
use crate::sink::{origin, progress_row};
use crate::source::{publication, slot};

/// What could not be removed from a peer, and why.
struct Leftover {
    /// The peer and the objects, as people read it.
    what: String,
    problem: Problem,
}

/// Carries a work order out: the slot first, since it holds WAL, then the publications, the target's progress row and origin. What is
/// already gone is no error. One peer that cannot be reached does not keep the other from being cleaned up. An order that fails is kept
/// and tried again, and its task says why; one that is forced ends all the same, and its task says what is left where.
pub async fn run(catalog: &Catalog, node_id: &str, removal: &Removal) {
    if let Err(error) = carry_out(catalog, node_id, removal).await {
        // Only the catalog fails here; the order is still there.
        tracing::warn!(mirror = removal.mirror, error = %error, "mirror not removed yet");
    }
}

async fn carry_out(catalog: &Catalog, node_id: &str, removal: &Removal) -> Result<(), Error> {
    let id = removal.mirror_id;
    catalog.advance_tasks(id, TaskKind::DropMirror, 0.0).await?;
    let left = clean(catalog, removal).await?;
    let Some(first) = left.first() else {
        let done = Event::info("drop", "slot, publication and progress were removed");
        catalog.record_event(id, &removal.mirror, node_id, &done).await?;
        catalog.advance_tasks(id, TaskKind::DropMirror, 1.0).await?;
        fail_point!("drop task completed");
        catalog.finish_removal(id).await?;
        tracing::info!(mirror = removal.mirror, "mirror removed");
        return Ok(());
    };
    let sqlstate = first.problem.sqlstate.to_string();
    if !removal.force {
        let delay = retry_delay(removal.attempt.cast_unsigned() + 1);
        let error = &first.problem.message;
        tracing::warn!(mirror = removal.mirror, error, retry_in = ?delay, "mirror not removed yet");
        catalog.hold_up_tasks(id, &sqlstate, error, false).await?;
        catalog.postpone_removal(id, delay.as_secs_f64()).await?;
        return Ok(());
    }
    for Leftover { what, problem } in &left {
        tracing::warn!(mirror = removal.mirror, left = what, error = problem.message, "given up");
        let event =
            Event { sqlstate: Some(problem.sqlstate), ..Event::warning("drop", format!("left behind on {what}")) };
        let detail = problem.detail.as_ref().map(|d| format!(" {d}")).unwrap_or_default();
        let event = event.detail(format!("{}.{detail}", problem.message)).hint(
            "Remove it by hand when the peer is back: a slot keeps the server from removing WAL until its disk is full.",
        );
        catalog.record_event(id, &removal.mirror, node_id, &event).await?;
    }
    let report: Vec<&str> = left.iter().map(|l| l.what.as_str()).collect();
    catalog.give_up_removal(id, &sqlstate, &format!("left behind on {}", report.join("; "))).await?;
    Ok(())
}

/// Removes everything from both peers, and returns what could not be.
async fn clean(catalog: &Catalog, removal: &Removal) -> Result<Vec<Leftover>, Error> {
    let object_name = &removal.object_name;
    let source_name = name(&removal.source);
    let mut left = Vec::new();
    if let Err(error) = clean_source(catalog, removal).await {
        let publications = publication::names(object_name).map(|p| format!("\"{p}\"")).join(", ");
        let late = late::object_name(object_name);
        let what = format!(
            "peer \"{source_name}\": replication slot \"{object_name}\", publications {publications}, or those of \"{late}\""
        );
        left.push(Leftover { what, problem: problem(error)? });
    }
    if !removal.keep_target_metadata
        && let Err(error) = clean_target(catalog, removal).await
    {
        let origin = origin::name(source_name, &removal.mirror);
        let what = format!(
            "peer \"{}\": row \"{object_name}\" of table peergate.progress, replication origin \"{origin}\"",
            name(&removal.target)
        );
        left.push(Leftover { what, problem: problem(error)? });
    }
    Ok(left)
}

/// What people are told of an error; those that are none of a peer's go on as they are.
fn problem(error: Error) -> Result<Problem, Error> {
    error.problem().cloned().ok_or(error)
}

async fn clean_source(catalog: &Catalog, removal: &Removal) -> Result<(), Error> {
    let source = open(catalog, &removal.source).await?;
    fail_point!("removal begun");
    let late = late::object_name(&removal.object_name);
    for name in [&removal.object_name, &late] {
        slot::drop(&source, name).await?;
    }
    fail_point!("slot dropped");
    for name in [&removal.object_name, &late] {
        publication::drop(&source, name).await?;
    }
    fail_point!("publications dropped");
    Ok(())
}

async fn clean_target(catalog: &Catalog, removal: &Removal) -> Result<(), Error> {
    let target = open(catalog, &removal.target).await?;
    progress_row::end_earlier_sessions(&target, &removal.object_name, progress_row::AFTER_ALL).await?;
    progress_row::remove(&target, &removal.object_name).await?;
    fail_point!("progress removed");
    origin::remove(&target, &origin::name(name(&removal.source), &removal.mirror)).await
}

fn name(peer: &Value) -> &str {
    peer.get("name").and_then(Value::as_str).unwrap_or_default()
}

async fn open(catalog: &Catalog, document: &Value) -> Result<PeerSession, Error> {
    let options = PeerOptions::from_document(document, catalog.keyring()).map_err(catalog::Error::from)?;
    PeerSession::open(name(document), &options).await
}
