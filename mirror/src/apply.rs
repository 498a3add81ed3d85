//! The stream's loop: what comes from the source is gathered, handed to the sink, and acknowledged when it is durable.
//!
//! Two batches exist: one is being applied, one fills. The open one is handed over as soon as the sink is idle, so batches are small
//! when there is little to do and large under load. When both are full nothing is read, and the walsender waits.

mod looking;
mod orders;

use std::time::{Duration, Instant};

use catalog::mirror::MirrorOptions;
use pg::{Lsn, SqlState, TableName};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::assemble::Assembler;
use crate::batch::{Batch, Change, Step};
use crate::error::{Error, Problem};
use crate::hindsight::Hindsight;
use crate::progress::DurableLsn;
use crate::sink::Sink;
use crate::source::replication::{Incoming, ReplicationStream};
use crate::status::Tracker;
use crate::verify::brake::Brake;
use crate::worker::Stop;

pub use self::looking::Looking;
use self::orders::Hold;
pub use self::orders::Order;

/// How often a position without changes is recorded on the target; until then the source keeps its WAL.
const IDLE_INTERVAL: Duration = Duration::from_secs(10);

/// Rows that make a batch worth handing over although more has been read already.
const WORTHWHILE_ROWS: usize = 2_000;

/// Rows that make a part of a transaction worth handing over: the sink works while the rest comes.
const PART_ROWS: usize = 20_000;

/// Bytes that do.
const PART_BYTES: usize = 4 << 20;

/// How long a stop waits for the batch that is being applied.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// When a batch is handed over.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Row changes.
    pub rows: usize,
    /// Bytes.
    pub bytes: usize,
    /// Memory; two batches may take twice that.
    pub memory: usize,
    /// Shortest time between two commits.
    pub sync_interval: Duration,
    /// Transactions that commit up to here are batches of their own: one of them cannot be applied.
    pub one_by_one_until: Lsn,
}

impl Limits {
    /// Returns what a mirror's options say.
    pub fn of(options: &MirrorOptions) -> Limits {
        Limits {
            rows: options.batch_rows_max,
            bytes: options.batch_bytes_max,
            memory: options.memory_max / 2,
            sync_interval: options.sync_interval,
            one_by_one_until: Lsn::ZERO,
        }
    }
}

/// What became of a batch.
struct Done {
    durable: DurableLsn,
    commit_time: Option<i64>,
    rows: usize,
    bytes: usize,
    transactions: usize,
    tables: Vec<(TableName, [i64; 4])>,
    /// A table has another name than the catalog knows.
    renamed: bool,
}

/// Counts of the batches of one target transaction.
#[derive(Default)]
struct Counts {
    rows: usize,
    bytes: usize,
    transactions: usize,
    tables: Vec<(TableName, [i64; 4])>,
    /// A table has another name than the catalog knows.
    renamed: bool,
}

impl Counts {
    fn add(&mut self, batch: &Batch) {
        self.rows += batch.rows;
        self.bytes += batch.bytes;
        self.transactions += batch.transactions;
        for step in &batch.steps {
            match step {
                Step::Changes(tables) => {
                    for changes in tables {
                        let [inserts, updates, deletes] = changes.counts;
                        self.tables.push((changes.table.source.clone(), [inserts, updates, deletes, 0]));
                    }
                }
                Step::Truncate { tables, .. } => {
                    self.tables.extend(tables.iter().map(|t| (t.source.clone(), [0, 0, 0, 1])))
                }
                Step::InOrder(changes) => {
                    for (table, change) in changes {
                        let counts = match change {
                            Change::Insert(_) => [1, 0, 0, 0],
                            Change::Update { .. } => [0, 1, 0, 0],
                            Change::Delete(_) | Change::Remove(_) => [0, 0, 1, 0],
                        };
                        self.tables.push((table.source.clone(), counts));
                    }
                }
                Step::Alter(alter) => self.renamed |= alter.listed != alter.plan.source.name,
            }
        }
    }
}

/// A running stream: the loop's state.
pub struct Apply {
    stream: ReplicationStream,
    assembler: Assembler,
    looking: Looking,
    /// What was seen and is not taken up yet.
    hindsight: Option<Hindsight>,
    limits: Limits,
    tracker: Tracker,
    batches: mpsc::Sender<Batch>,
    done: mpsc::Receiver<Result<Option<Done>, Error>>,
    applier: JoinHandle<()>,
    in_flight: Option<i64>,
    applying: bool,
    /// What the sink has of whole transactions and not committed, since it has a part of a further one.
    uncommitted: usize,
    applied: Lsn,
    last_commit: Option<Instant>,
    wanted: watch::Receiver<Lsn>,
    orders: mpsc::Receiver<Order>,
    hold: Hold,
    brake: Brake,
    /// Batches that were handed over.
    handed_over: u64,
    /// Batches that were written, committed or not.
    written: u64,
    /// Who waits until a batch is committed.
    settling: Vec<(u64, oneshot::Sender<()>)>,
    idle_recorded: Instant,
    was_full: bool,
}

impl Drop for Apply {
    fn drop(&mut self) {
        self.applier.abort();
    }
}

impl Apply {
    /// Sets the loop up; `applied` is where the target is. `wanted` is a position that a statement waits for.
    #[allow(clippy::too_many_arguments, reason = "the loop's parts, each made elsewhere")]
    pub fn new(
        stream: ReplicationStream,
        assembler: Assembler,
        looking: Looking,
        sink: impl Sink + 'static,
        limits: Limits,
        applied: Lsn,
        tracker: Tracker,
        wanted: watch::Receiver<Lsn>,
        orders: mpsc::Receiver<Order>,
    ) -> Apply {
        let (batches, incoming) = mpsc::channel(1);
        let (results, done) = mpsc::channel(1);
        let applier = tokio::spawn(apply_batches(sink, incoming, results));
        Apply {
            stream,
            assembler,
            looking,
            hindsight: None,
            limits,
            tracker,
            batches,
            done,
            applier,
            in_flight: None,
            applying: false,
            uncommitted: 0,
            applied,
            last_commit: None,
            wanted,
            orders,
            hold: Hold::No,
            brake: Brake::default(),
            handed_over: 0,
            written: 0,
            settling: Vec::new(),
            idle_recorded: Instant::now(),
            was_full: false,
        }
    }

    /// Returns where the target is.
    pub fn applied(&self) -> Lsn {
        self.applied
    }

    /// Takes no transaction that commits at `until` or after it; returns where that leaves off, see [`Assembler::stop_at`].
    pub fn stop_at(&mut self, until: Lsn) -> Lsn {
        self.assembler.stop_at(until)
    }

    /// Streams until told to stop, until something fails, or until the target has everything up to `goal`. Can be called again.
    ///
    /// # Errors
    /// [`Error::Stopped`] when told so; else what failed.
    pub async fn run_to(&mut self, stop: &Stop, goal: Option<Lsn>) -> Result<(), Error> {
        loop {
            if goal.is_some_and(|goal| self.applied >= goal) {
                return Ok(());
            }
            if let Err(error) = self.take_up_hindsight() {
                return Err(self.apply_what_precedes(error, stop).await);
            }
            self.hand_over(goal).await;
            self.assembler.take_left_out().into_iter().for_each(|left_out| self.tracker.note_left_out(left_out));
            self.hold_if_asked();
            self.brake.look(self.assembler.boundary(), self.written());
            let full = self.is_full() || matches!(self.hold, Hold::Held(_)) || self.brake.stands();
            if std::mem::replace(&mut self.was_full, full) && !full {
                self.stream.listen_anew();
            }
            let pause = self.until_next_commit().unwrap_or(IDLE_INTERVAL);
            tokio::select! {
                biased;
                () = stop.wait() => return self.finish().await,
                result = self.done.recv() => self.note_done(result)?,
                Some(order) = self.orders.recv(), if self.brake.is_off() => self.obey(order),
                tables = orders::released(&mut self.hold) => self.go_on(tables?),
                kept = self.brake.changed() => if let Some((start, body)) = kept {
                    self.message(start, body).await?;
                },
                incoming = self.stream.next(), if !full => {
                    let incoming = incoming?;
                    let taken = match self.take_in(incoming).await {
                        Ok(()) => self.take_buffered().await,
                        error => error,
                    };
                    if let Err(error) = taken {
                        return Err(self.apply_what_precedes(error, stop).await);
                    }
                }
                Some(seen) = self.looking.seen.recv(), if self.hindsight.is_none() => self.hindsight = Some(seen),
                changed = self.wanted.changed() => if changed.is_err() { return Err(Error::Stopped) },
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    fn is_full(&self) -> bool {
        self.applying && (self.over_limits() || self.holds_one())
    }

    /// Whether the open batch is a transaction that is to be written by itself.
    fn holds_one(&self) -> bool {
        let first = self.assembler.open().first_commit_lsn;
        self.assembler.between_transactions() && first.is_some_and(|lsn| lsn <= self.limits.one_by_one_until)
    }

    /// What cannot be taken in stops the mirror, but not before all that precedes it is on the target.
    async fn apply_what_precedes(&mut self, error: Error, stop: &Stop) -> Error {
        let Error::Blocked(problem) = error else { return error };
        if let (1.., Some(until)) = (self.assembler.open().transactions + self.uncommitted, problem.lsn) {
            return Error::OneByOne { until, problem };
        }
        if self.applying {
            let result = tokio::select! {
                result = self.done.recv() => result,
                () = stop.wait() => return Error::Stopped,
            };
            if let Err(earlier) = self.note_done(result) {
                return earlier;
            }
        }
        Error::Blocked(problem)
    }

    /// Time until `sync_interval` allows the next commit; `None` when it does already.
    fn until_next_commit(&self) -> Option<Duration> {
        let left = self.limits.sync_interval.checked_sub(self.last_commit?.elapsed())?;
        (!left.is_zero()).then_some(left)
    }

    async fn take_in(&mut self, incoming: Incoming) -> Result<(), Error> {
        match incoming {
            Incoming::Data(start, body) if !self.brake.lets_pass(start, &body) => {}
            Incoming::Data(start, body) => {
                self.message(start, body).await?;
                self.tracker.update(|s| s.received = s.received.max(start));
            }
            Incoming::Keepalive(end) => {
                self.assembler.keepalive(end);
                self.tracker.update(|s| s.received = s.received.max(end));
            }
        }
        Ok(())
    }

    /// Takes in what has been read already, until there is a batch that is worth handing over or no room for more.
    async fn take_buffered(&mut self) -> Result<(), Error> {
        let mut received = Lsn::ZERO;
        while !self.over_limits() && !self.holds_one() && (self.applying || !self.is_worthwhile()) {
            let stops = matches!(self.hold, Hold::Asked(..)) || self.brake.is_asked() || self.brake.stands();
            if stops && self.assembler.boundary().is_some() {
                break;
            }
            match self.stream.next_buffered()? {
                None => break,
                Some(Incoming::Data(start, body)) if !self.brake.lets_pass(start, &body) => break,
                Some(Incoming::Data(start, body)) => {
                    self.message(start, body).await?;
                    received = start;
                }
                Some(Incoming::Keepalive(end)) => {
                    self.assembler.keepalive(end);
                    received = end;
                }
            }
        }
        self.tracker.update(|s| s.received = s.received.max(received));
        Ok(())
    }

    fn over_limits(&self) -> bool {
        let open = self.assembler.open();
        open.rows >= self.limits.rows || open.bytes >= self.limits.bytes || open.memory >= self.limits.memory
    }

    /// Whether an idle sink is better given the open batch than kept waiting for more.
    fn is_worthwhile(&self) -> bool {
        let open = self.assembler.open();
        if self.assembler.between_transactions() { open.rows >= WORTHWHILE_ROWS } else { is_part(open) }
    }

    /// Hands the open batch to the sink if the sink is idle and the batch may go: at the end of a transaction, or when there is much of
    /// one.
    ///
    /// A position without changes goes when it is wanted, or now and then.
    async fn hand_over(&mut self, goal: Option<Lsn>) {
        let open = self.assembler.open();
        self.tracker.set_pending(self.in_flight.or(open.first_commit_time.filter(|_| !open.is_empty())));
        if self.applying || self.brake.holds() {
            return;
        }
        if let Some(position) = self.assembler.idle_position() {
            // Nothing of ours is in what was passed, so it is as good as applied; only the source must not forget it yet.
            self.tracker.note_applied(position);
        }
        let whole = self.assembler.between_transactions() && !open.is_empty();
        let part = !self.assembler.between_transactions() && is_part(open);
        // Whoever has the stream stand still waits for what was taken in.
        let may_commit = self.until_next_commit().is_none() || self.brake.stands();
        let batch = if (whole && may_commit) || part || self.over_limits() || self.holds_one() {
            self.assembler.take()
        } else if let Some(position) = self.assembler.idle_position().filter(|p| *p > self.applied) {
            let asked = |wanted: Lsn| wanted > self.applied && position >= wanted;
            if !asked(*self.wanted.borrow()) && !goal.is_some_and(asked) && self.idle_recorded.elapsed() < IDLE_INTERVAL
            {
                return;
            }
            Batch::position(position)
        } else {
            return;
        };
        self.idle_recorded = Instant::now();
        self.in_flight = batch.first_commit_time;
        self.uncommitted = if batch.end.is_some() { 0 } else { self.uncommitted + batch.transactions };
        self.applying = true;
        self.handed_over += 1;
        // The channel has room for the one batch; if its receiver is gone, the applier's error is on its way.
        let _ = self.batches.send(batch).await;
    }

    fn note_done(&mut self, result: Option<Result<Option<Done>, Error>>) -> Result<(), Error> {
        self.applying = false;
        self.in_flight = None;
        let Some(result) = result else {
            let problem = Problem::new(SqlState::INTERNAL_ERROR, "the task that writes to the target failed");
            return Err(Error::Blocked(problem.hint("This is a bug in Peergate: report it with the log.")));
        };
        self.written += 1;
        let Some(done) = result? else { return Ok(()) };
        for (_, settled) in self.settling.extract_if(.., |(batch, _)| *batch <= self.written) {
            let _ = settled.send(());
        }
        self.applied = done.durable.lsn();
        self.stream.acknowledge(done.durable);
        if done.transactions > 0 {
            self.last_commit = Some(Instant::now());
        }
        for (table, counts) in &done.tables {
            self.tracker.update_table(table, |status| {
                for (total, more) in status.changes.iter_mut().zip(counts) {
                    *total += more;
                }
            });
        }
        let flushed = self.stream.flushed();
        self.tracker.update(|s| {
            s.applied = s.applied.max(self.applied);
            s.received = s.received.max(self.applied);
            s.flushed = flushed;
            s.commit_time = done.commit_time.or(s.commit_time);
            s.totals.rows += done.rows as i64;
            s.totals.bytes += done.bytes as i64;
            s.totals.transactions += done.transactions as i64;
        });
        if done.renamed { Err(Error::Restart) } else { Ok(()) }
    }

    /// Lets the batch that is being applied finish, so that nothing has to be done twice. What is still gathered is not applied; it
    /// comes again.
    async fn finish(&mut self) -> Result<(), Error> {
        if self.applying {
            match tokio::time::timeout(STOP_PATIENCE, self.done.recv()).await {
                Ok(result) => self.note_done(result)?,
                // Its connection is closed, and the target undoes what it had.
                Err(_) => return Err(Error::Stopped),
            }
        }
        Err(Error::Stopped)
    }
}

fn is_part(open: &Batch) -> bool {
    open.rows >= PART_ROWS || open.bytes >= PART_BYTES
}

async fn apply_batches(
    mut sink: impl Sink,
    mut batches: mpsc::Receiver<Batch>,
    results: mpsc::Sender<Result<Option<Done>, Error>>,
) {
    let mut counts = Counts::default();
    // Where the first transaction commits of those that the sink writes in one of its own.
    let mut first = None;
    while let Some(batch) = batches.recv().await {
        let begun = Instant::now();
        let applied = sink.apply(&batch).await;
        let elapsed_ms = begun.elapsed().as_millis();
        tracing::debug!(
            rows = batch.rows,
            bytes = batch.bytes,
            transactions = batch.transactions,
            elapsed_ms,
            "batch applied"
        );
        let result = match applied {
            Err(error) => Err(match (error, first.or(batch.first_commit_lsn), batch.last_commit_lsn) {
                (Error::Blocked(problem), Some(first), Some(until)) if first != until => {
                    Error::OneByOne { until, problem }
                }
                (error, _, Some(lsn)) => error.at(lsn),
                (error, _, None) => error,
            }),
            Ok(durable) => {
                counts.add(&batch);
                first = if durable.is_some() { None } else { first.or(batch.first_commit_lsn) };
                Ok(durable.map(|durable| {
                    let Counts { rows, bytes, transactions, tables, renamed } = std::mem::take(&mut counts);
                    Done {
                        durable,
                        commit_time: batch.end.and_then(|e| e.commit_time),
                        rows,
                        bytes,
                        transactions,
                        tables,
                        renamed,
                    }
                }))
            }
        };
        let failed = result.is_err();
        if results.send(result).await.is_err() || failed {
            return;
        }
    }
}
