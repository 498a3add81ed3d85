//! Watches what the mirrors' slots hold back on their sources, whatever the mirrors' states are: a paused or failing mirror is the one
//! whose slot grows.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use catalog::Catalog;
use catalog::event::Event;
use catalog::peer::PeerOptions;
use catalog::slot::{SlotCheck, SlotHealth};
use pg::SqlState;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::error::Error;
use crate::session::PeerSession;
use crate::source::slot;

/// How often each slot is looked at, by one of the processes.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// How often mirrors that are due are asked for.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// How many are looked at together.
const TOGETHER: i64 = 8;

/// How long a source may take to answer; whether it can be reached at all is the mirror's own concern.
const PATIENCE: Duration = Duration::from_secs(20);

/// Looks at slots until it is dropped.
pub(crate) async fn watch(catalog: Catalog, node_id: Arc<str>) -> Infallible {
    let mut ticks = tokio::time::interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // A catalog that cannot be reached is told by the engine.
        let Ok(due) = catalog.due_slot_checks(CHECK_INTERVAL, TOGETHER).await else { continue };
        let mut checks = JoinSet::new();
        for check in due {
            let (catalog, node_id) = (catalog.clone(), node_id.clone());
            checks.spawn(async move {
                let looked = tokio::time::timeout(PATIENCE, look(&catalog, &node_id, &check)).await;
                let error = match looked {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => format!("no answer within {PATIENCE:?}"),
                };
                tracing::debug!(mirror = check.mirror, error, "slot not looked at");
            });
        }
        while checks.join_next().await.is_some() {}
    }
}

async fn look(catalog: &Catalog, node_id: &str, check: &SlotCheck) -> Result<(), Error> {
    let name = check.source.get("name").and_then(Value::as_str).unwrap_or_default();
    let options = PeerOptions::from_document(&check.source, catalog.keyring()).map_err(catalog::Error::from)?;
    let source = PeerSession::open(name, &options).await?;
    let health = slot::health(&source, &check.slot).await?;
    let over = is_over(check.budget, health.wal_bytes, check.was_over_budget);
    for event in events(check, &health, over) {
        catalog.record_event(check.mirror_id, &check.mirror, node_id, &event).await?;
    }
    if over && check.drop_over_budget {
        slot::drop(&source, &check.slot).await?;
        tracing::warn!(mirror = check.mirror, slot = check.slot, "slot dropped: it kept more than slot_wal_budget");
        let event = Event::error("slot", format!("replication slot \"{}\" was dropped to save the source", check.slot))
            .detail("It kept more than slot_wal_budget, and slot_wal_over_budget is drop_slot.")
            .hint("The mirror lacks what came since: RESYNC MIRROR copies it anew.");
        catalog.record_event(check.mirror_id, &check.mirror, node_id, &event).await?;
        return catalog.set_slot_health(check.mirror_id, &SlotHealth::missing(), false).await.map_err(Error::from);
    }
    catalog.set_slot_health(check.mirror_id, &health, over).await?;
    Ok(())
}

/// Whether a slot keeps more than its budget. One that did is over it until it has come down by a tenth, so that it is not told again and
/// again about one at the edge.
fn is_over(budget: i64, wal_bytes: Option<i64>, was_over: bool) -> bool {
    let limit = if was_over { budget - budget / 10 } else { budget };
    budget > 0 && wal_bytes.is_some_and(|bytes| bytes > limit)
}

/// What there is to say about a slot since it was last looked at.
fn events(check: &SlotCheck, health: &SlotHealth, over: bool) -> Vec<Event> {
    let slot = &check.slot;
    let mut events = Vec::new();
    let bytes = health.wal_bytes.unwrap_or_default();
    if over && !check.was_over_budget {
        let message = format!("the source keeps {bytes} bytes of WAL for replication slot \"{slot}\"");
        events.push(
            Event { sqlstate: Some(SqlState::CONFIGURATION_LIMIT_EXCEEDED), ..Event::warning("slot", message) }
                .detail(format!("That is more than slot_wal_budget, {} bytes.", check.budget))
                .hint("Let the mirror go on, or drop it: the source's disk fills until then."),
        );
    } else if check.was_over_budget && !over {
        events.push(Event::info(
            "slot",
            format!("the source keeps {bytes} bytes of WAL for replication slot \"{slot}\" again"),
        ));
    }
    let status = health.wal_status.as_str();
    if check.was_status.as_deref() != Some(status) {
        let told = |event: Event| Event { sqlstate: Some(SqlState::WRONG_STATE), ..event };
        match status {
            "unreserved" => events.push(told(
                Event::warning(
                    "slot",
                    format!("the source is about to remove WAL that replication slot \"{slot}\" needs"),
                )
                .hint("Let the mirror go on now, or raise max_slot_wal_keep_size on the source."),
            )),
            "lost" => events.push(told(
                Event::error("slot", format!("the source has removed WAL that replication slot \"{slot}\" needs"))
                    .hint("Only a new copy helps: RESYNC MIRROR makes one."),
            )),
            "missing" => events.push(told(
                Event::error("slot", format!("replication slot \"{slot}\" does not exist on the source"))
                    .hint("Only a new copy helps: RESYNC MIRROR makes one."),
            )),
            _ => {}
        }
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(budget: i64, was_over_budget: bool, was_status: Option<&str>) -> SlotCheck {
        SlotCheck {
            mirror_id: 1,
            mirror: "m".into(),
            slot: "s".into(),
            source: Value::Null,
            budget,
            drop_over_budget: false,
            was_over_budget,
            was_status: was_status.map(str::to_owned),
        }
    }

    fn health(wal_bytes: Option<i64>, wal_status: &str) -> SlotHealth {
        SlotHealth { wal_bytes, wal_status: wal_status.into(), ..SlotHealth::default() }
    }

    #[test]
    fn a_budget_is_passed_once_and_come_back_from_by_a_tenth() {
        assert!(!is_over(100, Some(100), false) && is_over(100, Some(101), false));
        assert!(is_over(100, Some(91), true) && !is_over(100, Some(90), true));
        assert!(!is_over(0, Some(i64::MAX), false), "0 means no limit");
        assert!(!is_over(100, None, true), "a slot that is lost keeps nothing");
    }

    #[test]
    fn what_is_new_about_a_slot_is_told_and_nothing_else() {
        let levels = |check: &SlotCheck, health: &SlotHealth, over: bool| -> Vec<&'static str> {
            events(check, health, over).iter().map(|e| e.level).collect()
        };
        let kept = |status: &str| health(Some(200), status);
        assert_eq!(levels(&check(100, false, Some("reserved")), &kept("reserved"), true), ["warning"]);
        assert!(levels(&check(100, true, Some("reserved")), &kept("reserved"), true).is_empty());
        assert_eq!(levels(&check(100, true, Some("reserved")), &kept("reserved"), false), ["info"]);
        assert_eq!(levels(&check(100, false, Some("extended")), &kept("unreserved"), false), ["warning"]);
        assert_eq!(levels(&check(100, false, None), &health(None, "lost"), false), ["error"]);
        assert_eq!(levels(&check(100, false, Some("reserved")), &SlotHealth::missing(), false), ["error"]);
        assert!(levels(&check(100, false, Some("missing")), &SlotHealth::missing(), false).is_empty());
        assert!(levels(&check(100, false, None), &kept("reserved"), false).is_empty());
    }
}
