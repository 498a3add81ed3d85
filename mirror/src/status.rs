//! What a running mirror tells the catalog about itself, at least each second while it is busy.

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::event::Event;
use catalog::mirror::{Applied, Status, TableStatus};
use pg::{Lsn, TableName};
use tokio::sync::{Mutex, watch};

use crate::assemble::LeftOut;
use crate::error::Error;
use crate::sequences::Sequences;
use crate::session::PeerSession;
use crate::source::publication::Expected;
use crate::source::replication::postgres_clock;
use crate::source::slot;
use crate::worker::Context;

/// How often the catalog is told while there is something to tell.
const BUSY_INTERVAL: Duration = Duration::from_millis(500);

/// How often the source is asked for its position.
const SOURCE_INTERVAL: Duration = Duration::from_secs(5);

/// How often the source is asked again after a WAIT FOR MIRROR was announced: it may have been so before the statement took its time.
const ANNOUNCED_SAMPLES: u32 = 4;

/// Pause between these.
const ANNOUNCED_PAUSE: Duration = Duration::from_millis(60);

/// How often the catalog is told while a statement waits for it.
const WAITED_FOR_INTERVAL: Duration = Duration::from_millis(10);

/// What is told. Shared by the tasks of one mirror; each change marks it.
#[derive(Clone, Default)]
pub struct Tracker {
    inner: Arc<std::sync::Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    status: Status,
    /// Commit time of the oldest transaction that was received and is not applied.
    oldest_pending: Option<i64>,
    tables: BTreeMap<TableName, TableStatus>,
    left_out: Vec<LeftOut>,
    changed: bool,
}

impl Tracker {
    /// Begins with what was applied in earlier lives of the mirror.
    pub fn new(totals: Applied, applied: Lsn) -> Tracker {
        let tracker = Tracker::default();
        tracker.update(|s| {
            s.totals = totals;
            s.applied = applied;
            s.flushed = applied;
            s.received = applied;
        });
        tracker
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while it holds the lock; if it did, what is told would still be whole.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what is told of the mirror.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        let mut inner = self.lock();
        change(&mut inner.status);
        inner.changed = true;
    }

    /// Notes that nothing before `position` waits to be applied.
    pub fn note_applied(&self, position: Lsn) {
        let mut inner = self.lock();
        if position > inner.status.applied {
            inner.status.applied = position;
            inner.changed = true;
        }
    }

    /// Notes the oldest transaction that waits to be applied, if any.
    pub fn set_pending(&self, oldest_commit_time: Option<i64>) {
        self.lock().oldest_pending = oldest_commit_time;
    }

    /// Notes that a transaction was left out.
    pub fn note_left_out(&self, left_out: LeftOut) {
        let mut inner = self.lock();
        inner.left_out.push(left_out);
        inner.changed = true;
    }

    /// Changes what is told of a table.
    pub fn update_table(&self, table: &TableName, change: impl FnOnce(&mut TableStatus)) {
        let mut inner = self.lock();
        if let Some(status) = inner.tables.get_mut(table) {
            change(status);
        } else {
            change(inner.tables.entry(table.clone()).or_default());
        }
        inner.changed = true;
    }

    /// Takes what there is to tell, or `None` if nothing has changed.
    fn take(&self) -> Option<(Status, Vec<(TableName, TableStatus)>)> {
        let mut inner = self.lock();
        if !std::mem::take(&mut inner.changed) && inner.oldest_pending.is_none() {
            return None;
        }
        let waited = inner.oldest_pending.map_or(0, |oldest| postgres_clock().saturating_sub(oldest).max(0));
        inner.status.lag = Duration::from_micros(waited.unsigned_abs());
        let tables = std::mem::take(&mut inner.tables).into_iter().collect();
        Some((inner.status.clone(), tables))
    }

    /// Returns the position up to which everything is applied.
    pub fn applied(&self) -> Lsn {
        self.lock().status.applied
    }

    fn flushed(&self) -> Lsn {
        self.lock().status.flushed
    }

    /// Tells the catalog what has changed since it was last told.
    ///
    /// # Errors
    /// [`Error::Fenced`] if another process has the mirror, [`Error::Stopped`] if it was dropped, [`Error::Transient`] if the catalog
    /// cannot be reached.
    pub async fn report(&self, context: &Context) -> Result<(), Error> {
        let left_out = std::mem::take(&mut self.lock().left_out);
        for left_out in left_out {
            let event = Event::warning("skip", left_out.to_string()).at(left_out.commit_lsn);
            context.event(&event.hint("RESYNC MIRROR … TABLE brings the tables back to what the source has.")).await?;
        }
        let Some((status, tables)) = self.take() else { return Ok(()) };
        let (catalog, mirror_id) = (&context.catalog, context.mirror.id);
        if !catalog.set_mirror_status(mirror_id, context.epoch, &status).await? {
            return Err(context.not_ours().await);
        }
        catalog.set_table_status(mirror_id, &tables).await?;
        Ok(())
    }

    /// Tells the catalog how the tables stand, while there is no position yet.
    ///
    /// # Errors
    /// [`Error::Transient`] if the catalog cannot be reached.
    pub async fn report_tables(&self, catalog: &Catalog, mirror_id: i64) -> Result<(), Error> {
        if let Some((_, tables)) = self.take() {
            catalog.set_table_status(mirror_id, &tables).await?;
        }
        Ok(())
    }
}

/// A message of a few bytes that travels from the source's WAL to the target's disk now and then: how long that takes is the mirror's
/// latency when nothing else happens.
struct Heartbeat {
    interval: Duration,
    sent: Instant,
    /// Where the one that is under way is.
    awaited: Option<Lsn>,
}

impl Heartbeat {
    fn new(interval: Duration) -> Heartbeat {
        Heartbeat { interval, sent: Instant::now(), awaited: None }
    }

    /// Whether the next one is due. One at a time: a late one is not hidden by the next.
    fn is_due(&self) -> bool {
        !self.interval.is_zero() && self.awaited.is_none() && self.sent.elapsed() >= self.interval
    }

    /// Returns how long the one that is under way has taken, if `flushed` has reached it.
    fn arrived(&mut self, flushed: Lsn) -> Option<Duration> {
        self.awaited.take_if(|position| flushed >= *position).map(|_| self.sent.elapsed())
    }
}

/// Reports until an error: at a steady pace while something changes, and promptly while a statement waits for the mirror. Now and then
/// also looks whether the source still publishes all that it should, as nothing else would tell, and moves the target's sequences on.
///
/// When a WAIT FOR MIRROR begins ([`Context::waited_for`]), the position to reach is put in `wanted`.
///
/// # Errors
/// [`Error::Transient`] if the catalog or the source cannot be reached, [`Error::ResyncRequired`] if something is not published.
pub async fn report_forever(
    context: &Context,
    tracker: Tracker,
    source: PeerSession,
    expected: &Mutex<Expected>,
    wanted: watch::Sender<Lsn>,
) -> Result<std::convert::Infallible, Error> {
    let catalog = &context.catalog;
    let mut sequences = Sequences::default();
    let mut sampled: Option<Instant> = None;
    let mut announced = 0;
    let mut heartbeat = Heartbeat::new(context.mirror.options.heartbeat_interval);
    loop {
        let waiting = announced > 0 || heartbeat.awaited.is_some() || *wanted.borrow() > tracker.applied();
        let pause = if waiting { WAITED_FOR_INTERVAL } else { BUSY_INTERVAL };
        tokio::select! {
            () = context.waited_for.notified() => announced = ANNOUNCED_SAMPLES,
            () = tokio::time::sleep(pause) => {}
        }
        // Each time a little later than the last.
        let since = sampled.map_or(SOURCE_INTERVAL, |at| at.elapsed());
        let asked = announced > 0 && (announced == ANNOUNCED_SAMPLES || since >= ANNOUNCED_PAUSE);
        announced -= u32::from(asked);
        let due = since >= SOURCE_INTERVAL;
        if due {
            // Whoever changes the publications holds this meanwhile.
            expected.lock().await.check(&source).await?;
        }
        if asked || due {
            if let Ok(expected) = expected.try_lock() {
                sequences.keep(&expected.plans);
            }
            sequences.keep_up(context, &source).await?;
            // The clock is read before the position: whoever began to wait before it is served by the position.
            let at = catalog.now().await?;
            let position = if asked { slot::push_wal(&source).await? } else { slot::wal_end(&source).await? };
            sampled = Some(Instant::now());
            tracker.update(|s| s.source = Some((position, at)));
            if asked {
                wanted.send_replace(position);
            }
        }
        if let Some(latency) = heartbeat.arrived(tracker.flushed()) {
            tracker.update(|s| s.latency = Some(latency));
        } else if heartbeat.is_due() {
            heartbeat.sent = Instant::now();
            let position = slot::push_wal(&source).await?;
            heartbeat.awaited = Some(position);
            wanted.send_if_modified(|wanted| std::mem::replace(wanted, position.max(*wanted)) < position);
        }
        tracker.report(context).await?;
    }
}
