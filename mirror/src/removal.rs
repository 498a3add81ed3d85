//! Removes what a dropped mirror left on its peers.

use catalog::Catalog;
use catalog::event::Event;
use catalog::peer::PeerOptions;
use catalog::removal::Removal;
use catalog::task::TaskKind;
use serde_json::Value;

use crate::error::{Error, retry_delay};
use crate::late;
use crate::session::PeerSession;
use crate::sink::{origin, progress_row};
use crate::source::{publication, slot};

/// Carries a work order out: the slot first, since it holds WAL, then the publications and the target's progress row. What is already
/// gone is no error. An order that fails is kept and tried again, and its task says why.
pub async fn run(catalog: &Catalog, node_id: &str, removal: &Removal) {
    let id = removal.mirror_id;
    let result = async {
        catalog.advance_tasks(id, TaskKind::DropMirror, 0.0).await?;
        clean(catalog, removal).await?;
        let done = Event::info("drop", "slot, publication and progress were removed");
        catalog.record_event(id, &removal.mirror, node_id, &done).await?;
        catalog.advance_tasks(id, TaskKind::DropMirror, 1.0).await?;
        fail_point!("drop task completed");
        catalog.finish_removal(id).await?;
        Ok::<(), Error>(())
    };
    let Err(error) = result.await else {
        tracing::info!(mirror = removal.mirror, "mirror removed");
        return;
    };
    let delay = retry_delay(removal.attempt.cast_unsigned() + 1);
    tracing::warn!(mirror = removal.mirror, error = %error, retry_in = ?delay, "mirror not removed yet");
    if let Some(problem) = error.problem() {
        let sqlstate = problem.sqlstate.to_string();
        let _ = catalog.hold_up_tasks(id, &sqlstate, &problem.message, false).await;
    }
    let _ = catalog.postpone_removal(id, delay.as_secs_f64()).await;
}

async fn clean(catalog: &Catalog, removal: &Removal) -> Result<(), Error> {
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
    if !removal.keep_target_metadata {
        let target = open(catalog, &removal.target).await?;
        fail_point!("publications dropped");
        progress_row::remove(&target, &removal.object_name).await?;
        let source = removal.source.get("name").and_then(Value::as_str).unwrap_or_default();
        origin::remove(&target, &origin::name(source, &removal.mirror)).await?;
    }
    fail_point!("progress removed");
    Ok(())
}

async fn open(catalog: &Catalog, document: &Value) -> Result<PeerSession, Error> {
    let name = document.get("name").and_then(Value::as_str).unwrap_or_default();
    let options = PeerOptions::from_document(document, catalog.keyring()).map_err(catalog::Error::from)?;
    PeerSession::open(name, &options).await
}
