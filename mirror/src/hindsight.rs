//! Looks at the source's tables now and then, for what the stream does not tell: a change after which no row has come, defaults,
//! constraints, indexes.
//!
//! A look is taken up when the target has everything that was on the source by then, see [`crate::assemble::Assembler::take_up`].

use std::collections::HashMap;
use std::convert::Infallible;
use std::time::{Duration, Instant};

use catalog::event::Event;
use pg::Lsn;
use tokio::sync::mpsc;
use tokio_postgres::error::SqlState;

use crate::error::Error;
use crate::schema::introspect::{fingerprints, source_table_by_oid};
use crate::schema::{SourceTable, storage};
use crate::session::PeerSession;
use crate::source::look::{self, LOCK_TIMEOUT, Look};
use crate::source::slot;
use crate::source::storage::doubts;
use crate::worker::Context;

/// Pause between two looks.
const INTERVAL: Duration = Duration::from_secs(5);

/// A look may take this part of the time.
const SHARE: u32 = 20;

/// Tables as they were on the source, and the end of its WAL after that.
#[derive(Debug)]
pub struct Hindsight {
    /// When the looks began.
    pub begun: Instant,
    /// Everything that they show is before this.
    pub at: Lsn,
    /// What was seen.
    pub looks: Vec<Look>,
}

/// Tells whoever looks to look at this table, once more if it is known already: the target has it like that.
#[derive(Debug)]
pub struct Watch(pub SourceTable);

/// Looks until an error. `known` are the tables as the target has them.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn look_forever(
    context: &Context,
    mut known: HashMap<u32, SourceTable>,
    seen: mpsc::Sender<Hindsight>,
    mut watch: mpsc::UnboundedReceiver<Watch>,
) -> Result<Infallible, Error> {
    let source = PeerSession::open(&context.mirror.source_name, &context.mirror.source).await?;
    source.run(LOCK_TIMEOUT).await?;
    let mut last: HashMap<u32, String> = HashMap::new();
    loop {
        let begun = Instant::now();
        while let Ok(told) = watch.try_recv() {
            let Watch(table) = told;
            last.remove(&table.oid);
            known.insert(table.oid, table);
        }
        let oids: Vec<u32> = known.keys().copied().collect();
        let (mut now, ended) = fingerprints(&source.client, &oids).await.map_err(|e| source.error(&e))?;
        let mut looks: Vec<(SourceTable, Look)> = Vec::new();
        for gone in known.keys().copied().filter(|oid| !now.contains_key(oid)).collect::<Vec<_>>() {
            let name = known.remove(&gone).map(|t| t.name.to_string()).unwrap_or_default();
            let event = Event::warning("table", format!("table \"{name}\" was dropped on the source"));
            context.event(&event.detail("Its rows stay on the target, and nothing more comes for it.")).await?;
        }
        let is_changed = |(oid, now): &(&u32, &String)| last.get(*oid) != Some(*now);
        let changed: Vec<u32> = now.iter().filter(is_changed).map(|(oid, _)| *oid).collect();
        // A transaction that changes one of the others from now on is not among those that had ended.
        for (_, table) in known.iter_mut().filter(|(oid, _)| last.contains_key(*oid) && last.get(*oid) == now.get(*oid))
        {
            table.storage.seen = ended;
        }
        for oid in changed {
            let Some(table) = known.get(&oid) else { continue };
            match source_table_by_oid(&source, oid).await {
                // Seen by the fingerprint, and gone since.
                Ok(None) => {}
                Ok(Some(found)) => {
                    looks.push((table.clone(), look::complete(&source, table, found).await?));
                }
                // It is being altered, and may be for long: next time.
                Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                    now.remove(&oid);
                }
                Err(error) => return Err(source.error(&error)),
            }
        }
        last = now;
        if !looks.is_empty() {
            // Written, so that the stream gets there.
            let at = slot::push_wal(&source).await?;
            let (looks, unsettled) = with_doubts(&source, looks).await.map_err(|e| source.error(&e))?;
            for oid in unsettled {
                last.remove(&oid);
            }
            known.extend(looks.iter().filter_map(|look| look.table.clone()).map(|t| (t.oid, t)));
            if seen.send(Hindsight { begun, at, looks }).await.is_err() {
                return Err(Error::Stopped);
            }
        }
        tokio::time::sleep(INTERVAL.max(begun.elapsed() * SHARE)).await;
    }
}

/// Asks which partitions brought rows along or lost some, now that the looks' place in the stream is known: rows that were there when it
/// was reached are seen. Returns the looks, and the oids of tables that are to be looked at anew, since their partitions have changed
/// again or cannot be read now.
async fn with_doubts(
    source: &PeerSession,
    looks: Vec<(SourceTable, Look)>,
) -> Result<(Vec<Look>, Vec<u32>), tokio_postgres::Error> {
    let (mut settled, mut unsettled) = (Vec::new(), Vec::new());
    for (known, mut look) in looks {
        if let Some(now) = look.table.as_ref().filter(|now| storage::changed(&known, now)) {
            match doubts(&source.client, &known, now).await {
                Ok(doubts) => look.doubts = doubts,
                // Somebody alters one, or has dropped it.
                Err(error)
                    if matches!(error.code(), Some(&(SqlState::LOCK_NOT_AVAILABLE | SqlState::UNDEFINED_TABLE))) =>
                {
                    unsettled.push(known.oid);
                    continue;
                }
                Err(error) => return Err(error),
            }
            let later = source_table_by_oid(source, known.oid).await?;
            if later.is_none_or(|later| later.files != now.files) {
                unsettled.push(known.oid);
                continue;
            }
        }
        look.doubted_since = known.files;
        settled.push(look);
    }
    Ok((settled, unsettled))
}
