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
use crate::schema::SourceTable;
use crate::schema::introspect::{fingerprints, source_table_by_oid};
use crate::session::PeerSession;
use crate::source::look::{self, LOCK_TIMEOUT, Look};
use crate::source::slot;
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

/// What whoever looks is told.
#[derive(Debug)]
pub enum Watch {
    /// To look at this table too, which the target has like that.
    Table(SourceTable),
    /// To look at the table of this oid once more.
    Again(u32),
}

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
            let oid = match told {
                Watch::Again(oid) => oid,
                Watch::Table(table) => {
                    let oid = table.oid;
                    known.insert(oid, table);
                    oid
                }
            };
            last.remove(&oid);
        }
        let oids: Vec<u32> = known.keys().copied().collect();
        let mut now = fingerprints(&source.client, &oids).await.map_err(|e| source.error(&e))?;
        let mut looks = Vec::new();
        for gone in known.keys().copied().filter(|oid| !now.contains_key(oid)).collect::<Vec<_>>() {
            let name = known.remove(&gone).map(|t| t.name.to_string()).unwrap_or_default();
            let event = Event::warning("table", format!("table \"{name}\" was dropped on the source"));
            context.event(&event.detail("Its rows stay on the target, and nothing more comes for it.")).await?;
        }
        let is_changed = |(oid, now): &(&u32, &String)| last.get(*oid) != Some(*now);
        let changed: Vec<u32> = now.iter().filter(is_changed).map(|(oid, _)| *oid).collect();
        for oid in changed {
            let Some(table) = known.get(&oid) else { continue };
            match source_table_by_oid(&source.client, oid).await {
                // Seen by the fingerprint, and gone since.
                Ok(None) => {}
                Ok(Some(found)) => {
                    let look = look::complete(&source, table, found).await?;
                    known.extend(look.table.clone().map(|t| (oid, t)));
                    looks.push(look);
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
            if seen.send(Hindsight { begun, at, looks }).await.is_err() {
                return Err(Error::Stopped);
            }
        }
        tokio::time::sleep(INTERVAL.max(begun.elapsed() * SHARE)).await;
    }
}
