//! One mirror's life in this process: attempts, and what is done when one fails.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use catalog::Catalog;
use catalog::event::Event;
use catalog::mirror::{Mirror, OnError};
use catalog::task::TaskKind;
use pg::{Lsn, SqlState, TableName};
use tokio::sync::{Mutex, Notify, mpsc, watch};
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::apply::{Apply, Limits, Looking};
use crate::assemble::Assembler;
use crate::error::{Error, Problem};
use crate::known::Taken;
use crate::progress::{SourceFacts, Subject, check_continuity, switch_point};
use crate::session::PeerSession;
use crate::sink::postgres::PostgresSink;
use crate::sink::progress_row::MAIN_LANE;
use crate::sink::{marks, origin};
use crate::source::look::Looker;
use crate::source::replication::ReplicationConnection;
use crate::source::{publication, slot};
use crate::state::{Begin, Durable, MirrorState, begin};
use crate::status::{Tracker, report_forever};
use crate::table_state::TableState;
use crate::{hindsight, known, late, query, standing, start, verify, wishes};

/// Tells a worker to stop. Clones see the same wish.
#[derive(Clone)]
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Makes a wish that can be expressed later, by sending true.
    pub fn new() -> (watch::Sender<bool>, Stop) {
        let (sender, receiver) = watch::channel(false);
        (sender, Stop(receiver))
    }

    /// Waits until the worker is to stop; also when nobody is left who could say so.
    pub async fn wait(&self) {
        let _ = self.0.clone().wait_for(|stop| *stop).await;
    }
}

/// What all parts of a worker need.
#[derive(Clone)]
pub struct Context {
    /// The catalog.
    pub catalog: Catalog,
    /// This process.
    pub node_id: Arc<str>,
    /// The mirror as it was when the worker began.
    pub mirror: Arc<Mirror>,
    /// The lease's epoch.
    pub epoch: i64,
    /// The lane whose progress row fences what is written.
    pub lane: i32,
    /// The wish to stop.
    pub stop: Stop,
    /// Woken when a statement begins to wait for the mirror.
    pub waited_for: Arc<Notify>,
    /// Woken now and then while a statement's task is open.
    pub has_task: Arc<Notify>,
    /// Woken when a verification of the mirror is wanted.
    pub to_verify: Arc<Notify>,
    /// The target has caught up since the last failure.
    ran_well: Arc<AtomicBool>,
    /// Values are asked for as text, since a column's type has changed.
    as_text: Arc<AtomicBool>,
    /// Transactions that commit up to here are written one by one, since one of them cannot be applied.
    one_by_one_until: Arc<AtomicU64>,
    /// A value was refused, and both sides were looked at again for that.
    looked_again: Arc<AtomicBool>,
}

impl Context {
    /// Puts together what a worker needs.
    pub fn new(
        catalog: Catalog,
        node_id: Arc<str>,
        mirror: Mirror,
        epoch: i64,
        stop: Stop,
        [waited_for, has_task, to_verify]: [Arc<Notify>; 3],
    ) -> Context {
        let [ran_well, as_text, looked_again] = std::array::from_fn(|_| Arc::new(AtomicBool::new(false)));
        let one_by_one_until = Arc::default();
        Context {
            catalog,
            node_id,
            mirror: Arc::new(mirror),
            epoch,
            lane: MAIN_LANE,
            stop,
            waited_for,
            has_task,
            to_verify,
            ran_well,
            as_text,
            one_by_one_until,
            looked_again,
        }
    }

    /// Has transactions written one by one up to a position; false if that was so already.
    fn write_one_by_one(&self, until: Lsn) -> bool {
        self.one_by_one_until.fetch_max(until.0, Ordering::Relaxed) < until.0
    }

    /// Writes the mirror's state; the catalog records the change as an event.
    ///
    /// # Errors
    /// [`Error::Fenced`] if another process has the mirror, [`Error::Stopped`] if it was dropped, [`Error::Transient`] if the catalog
    /// cannot be reached.
    pub async fn set_state(&self, state: MirrorState) -> Result<(), Error> {
        let (id, name) = (self.mirror.id, state.as_str());
        let Some(before) = self.catalog.set_mirror_state(id, self.epoch, name).await? else {
            return Err(self.not_ours().await);
        };
        tracing::info!(state = name, before, "mirror state changed");
        if !MirrorState::from_name(&before).is_some_and(|before| before.may_become(state)) {
            // A bug of ours; what is durable decides what happens, so going on harms no row.
            debug_assert!(false, "{before} became {name}");
            self.event(&Event::warning("state", format!("{before} became {name}, which was not to be expected")))
                .await?;
        }
        Ok(())
    }

    /// Says why the catalog took nothing from us.
    pub async fn not_ours(&self) -> Error {
        match self.catalog.mirror(self.mirror.id).await {
            Ok(None) => Error::Stopped,
            _ => Error::Fenced,
        }
    }

    /// Returns the same with the mirror as it is now.
    pub fn with_mirror(self, mirror: Mirror) -> Context {
        Context { mirror: Arc::new(mirror), ..self }
    }

    /// Returns the same for what is fenced by another lane.
    pub fn for_lane(self, lane: i32) -> Context {
        Context { lane, ..self }
    }

    /// Returns whether values are asked for as text although all types would travel in binary.
    pub fn values_come_as_text(&self) -> bool {
        self.as_text.load(Ordering::Relaxed)
    }

    /// Records an event.
    ///
    /// # Errors
    /// [`Error::Transient`] if the catalog cannot be reached.
    pub async fn event(&self, event: &Event) -> Result<(), Error> {
        self.catalog.record_event(self.mirror.id, &self.mirror.name, &self.node_id, event).await?;
        Ok(())
    }
}

/// Why a worker ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was told to.
    Stopped,
    /// A copy that was all that was asked for is done.
    Completed,
    /// A person must act.
    GaveUp,
    /// Another process has the mirror.
    Fenced,
}

/// Runs a mirror until it is told to stop, it is done, or only a person can help.
pub async fn run(context: Context) -> Outcome {
    if context.mirror.query.is_some() {
        return query::run(context).await;
    }
    let (mut attempt, mut seen) = (0, BTreeSet::new());
    loop {
        let error = match attempt_once(&context).await {
            Ok(()) => return Outcome::Completed,
            Err(Error::Stopped) => return Outcome::Stopped,
            Err(Error::OneByOne { until, problem }) if context.write_one_by_one(until) => {
                tracing::info!(error = problem.message, %until, "a batch failed: its transactions are written one by one");
                continue;
            }
            // A label of an enum that the source has and the target lacks is added when streaming begins.
            Err(Error::Blocked(problem))
                if problem.sqlstate == SqlState::INVALID_TEXT
                    && (context.ran_well.swap(false, Ordering::Relaxed)
                        | !context.looked_again.swap(true, Ordering::Relaxed)) =>
            {
                continue;
            }
            Err(Error::TextNeeded) if !context.as_text.swap(true, Ordering::Relaxed) => continue,
            Err(Error::Restart) => continue,
            Err(Error::Fenced) => {
                tracing::warn!("another process has taken the mirror over");
                return Outcome::Fenced;
            }
            Err(Error::CopyAgain(problem)) if problem.table.is_some() => {
                // The others go on; the next attempt begins at once.
                match copy_table_again(&context, &problem).await {
                    Ok(()) => continue,
                    Err(error) => error,
                }
            }
            // A person has asked for a new copy already, which may be what mends it.
            Err(Error::Blocked(_)) if wishes::are_new(&context, &mut seen).await => continue,
            Err(Error::Blocked(problem)) if quarantined(&context, &problem).is_some() => {
                // Its changes are left out from the next attempt on, which begins at once.
                match quarantine(&context, problem).await {
                    Ok(()) => continue,
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        if context.ran_well.swap(false, Ordering::Relaxed) {
            attempt = 0;
        }
        attempt += 1;
        if let Some(outcome) = pause_after(&context, &error, attempt).await {
            return outcome;
        }
    }
}

/// Tells of an error that has ended attempt `attempt`, and waits until the next one is due. Returns how the worker ends, if there is to be none.
pub(crate) async fn pause_after(context: &Context, error: &Error, attempt: u32) -> Option<Outcome> {
    let (state, delay) = MirrorState::after(error, attempt).unwrap_or((MirrorState::Blocked, None));
    if let Some(problem) = error.problem() {
        // The catalog itself may be what is out of reach: then the next attempt tells.
        match tell_failure(context, state, problem, attempt, delay).await {
            Ok(()) => {}
            Err(Error::Fenced) => return Some(Outcome::Fenced),
            Err(Error::Stopped) => return Some(Outcome::Stopped),
            Err(error) => tracing::warn!(error = %error, "failure not recorded"),
        }
    }
    let Some(delay) = delay else { return Some(Outcome::GaveUp) };
    tokio::select! {
        () = tokio::time::sleep(delay) => None,
        () = context.stop.wait() => Some(Outcome::Stopped),
    }
}

/// Returns the table that a problem stops alone, if the mirror is to go on without it.
fn quarantined<'a>(context: &Context, problem: &'a Problem) -> Option<&'a TableName> {
    problem.table.as_deref().filter(|_| context.mirror.options.on_error == OnError::QuarantineTable)
}

/// Wants a table anew that the stream can do no more for; its changes are left out from the next attempt on.
async fn copy_table_again(context: &Context, problem: &Problem) -> Result<(), Error> {
    let Some(table) = problem.table.as_deref() else { return Err(Error::CopyAgain(problem.clone())) };
    let event = Event::warning("copy", format!("table \"{table}\" is copied once more: {}", problem.message));
    let event = Event { lsn: problem.lsn, detail: problem.detail.clone(), ..event };
    context.event(&event).await?;
    context.catalog.take_resync_of_tables(context.mirror.id, std::slice::from_ref(table), &[]).await?;
    Ok(())
}

async fn quarantine(context: &Context, problem: Problem) -> Result<(), Error> {
    match quarantined(context, &problem).cloned() {
        Some(table) => late::block(context, &table, problem).await,
        None => Err(Error::Blocked(problem)),
    }
}

async fn tell_failure(
    context: &Context,
    state: MirrorState,
    problem: &Problem,
    attempt: u32,
    delay: Option<Duration>,
) -> Result<(), Error> {
    let name = state.as_str();
    match delay {
        Some(retry_in) => {
            tracing::warn!(state = name, sqlstate = %problem.sqlstate, error = problem.message, attempt, ?retry_in, "mirror failed")
        }
        None => tracing::error!(state = name, sqlstate = %problem.sqlstate, error = problem.message, "mirror stopped"),
    }
    let id = context.mirror.id;
    context.catalog.hold_up_tasks(id, &problem.sqlstate.to_string(), &problem.message, delay.is_none()).await?;
    // Last: whoever waits for the mirror sees this, and finds the rest in place.
    if context.catalog.set_mirror_failure(id, context.epoch, name, &problem.failure(attempt, delay)).await? {
        Ok(())
    } else {
        Err(context.not_ours().await)
    }
}

/// One attempt, from connecting to whatever ends it. `Ok` means that there is nothing more to do.
async fn attempt_once(context: &Context) -> Result<(), Error> {
    // What is durable may have changed since the last attempt.
    let resyncs = wishes::take_resync(context).await?;
    let fresh = context.catalog.mirror(context.mirror.id).await?.ok_or(Error::Stopped)?;
    let context = context.clone().with_mirror(fresh);
    tokio::select! {
        result = work(&context, resyncs) => result,
        // Streaming sees the wish itself and finishes its batch; everything before that is simply left.
        () = async { context.stop.wait().await; tokio::time::sleep(STOP_PATIENCE).await } => Err(Error::Stopped),
    }
}

/// How long a worker may take to stop by itself.
const STOP_PATIENCE: Duration = Duration::from_secs(12);

async fn work(context: &Context, resyncs: bool) -> Result<(), Error> {
    let mirror = &context.mirror;
    let (source, mut sink) = tokio::select! {
        opened = open_both(context) => opened?,
        () = context.stop.wait() => return Err(Error::Stopped),
    };
    fail_point!("both sides connected");
    let marks = marks::read(sink.session(), &mirror.object_name).await?;
    // An interrupted copy whose slot is gone has lost what came after its snapshot.
    let slot_is_there =
        mirror.copied || slot::facts(&source, &mirror.object_name).await?.is_some_and(|slot| slot.lost.is_none());
    let durable = Durable {
        copied: mirror.copied,
        snapshot: mirror.snapshot_lsn,
        applied: sink.applied(),
        marks: !marks.is_empty() && slot_is_there,
    };
    match begin(mirror.options.mode, &durable) {
        Begin::Nothing => {
            // An attempt that died right after the copy may have left them.
            slot::drop(&source, &mirror.object_name).await?;
            fail_point!("slot of a copy dropped");
            publication::drop(&source, &mirror.object_name).await?;
            context.catalog.advance_tasks(mirror.id, TaskKind::CreateMirror, 1.0).await?;
            context.catalog.advance_tasks(mirror.id, TaskKind::ResumeMirror, 1.0).await?;
            context.set_state(MirrorState::Completed).await
        }
        Begin::Stream => stream(context, source, sink).await,
        Begin::Anew if sink.applied() > Lsn::ZERO && !durable.is_in_copy() && !resyncs => {
            Err(unknown_progress(sink.applied()))
        }
        Begin::Anew => {
            start::run(context, &source, &mut sink).await?;
            // Begin again with what is durable now.
            drop((source, sink));
            Box::pin(attempt_once(context)).await
        }
    }
}

fn unknown_progress(applied: Lsn) -> Error {
    Error::ResyncRequired(
        Problem::new(SqlState::WRONG_STATE, "the target has progress that the catalog does not know of")
            .detail(format!(
                "Its progress row is at {applied}. The catalog was set back, or restored from an older backup."
            ))
            .hint("RESYNC MIRROR copies everything anew."),
    )
}

async fn open_both(context: &Context) -> Result<(PeerSession, PostgresSink), Error> {
    let mirror = &context.mirror;
    let source = PeerSession::open(&mirror.source_name, &mirror.source).await?;
    // The older owner, if there is one, is locked out here, before anything of what it may still do is looked at.
    let sink = PostgresSink::take_over(&mirror.target_name, &mirror.target, &mirror.object_name, context.epoch).await?;
    Ok((source, sink))
}

/// Streams from where the target is.
async fn stream(context: &Context, source: PeerSession, mut sink: PostgresSink) -> Result<(), Error> {
    let mirror = &context.mirror;
    let mut replication = ReplicationConnection::connect(&mirror.source_name, &source.attempt).await?;
    let applied = check_start(context, &source, &mut replication, sink.applied()).await?;
    // Not before that check: a mirror that lacks something does not look as if it went on.
    context.set_state(MirrorState::Catchup).await?;
    if !mirror.copied {
        // The copy was complete, or as far as it got; whoever made it died before the catalog knew.
        start::record_copied(context, sink.session()).await?;
    }
    known::follow_renames(context, sink.session()).await?;
    wishes::obey(context, None).await?;
    let sorted = standing::sort(context, &sink).await?;
    let taken = Taken { names: sorted.names(), routes: sorted.routes().collect(), others_come: false };
    let tables = known::look_up(context, &source, sink.session(), sink.triggers_fire(), taken).await?;
    sink.use_operators_of(&tables.type_schemas()).await?;
    let plans = tables.plans();
    let (object_name, made) = (mirror.object_name.clone(), mirror.publications.clone());
    let known_now = plans.iter().map(|plan| (plan.source.oid, plan.source.clone())).collect();
    let expected = publication::Expected { object_name, made, plans };
    let publications = expected.check(&source).await?;
    fail_point!("continuity checked");
    slot::free(&source, &mirror.object_name).await?;
    let mut stream = replication.start(&mirror.object_name, applied, &publications, tables.binary).await?;
    stream.set_silence_max(mirror.options.silence_max);
    fail_point!("streaming begun");
    tag(context, &mut sink).await?;
    let goal = slot::push_wal(&source).await?;
    let tracker = Tracker::new(mirror.applied, applied);
    let (wanted, wanted_changes) = watch::channel(Lsn::ZERO);
    let (orders, incoming_orders) = mpsc::channel(1);
    let (tell, events) = mpsc::unbounded_channel();
    sink.tell(tell.clone());
    let expected = Arc::new(Mutex::new(expected));
    let left_behind = Arc::new(AtomicBool::new(false));
    let main = Arc::new(late::Main {
        orders,
        expected: expected.clone(),
        binary: tables.binary,
        type_schemas: tables.type_schemas(),
        tracker: tracker.clone(),
        left_behind: left_behind.clone(),
        tell: tell.clone(),
    });
    let (seen_by, seen) = mpsc::channel(1);
    let (watch, watched) = mpsc::unbounded_channel();
    let looking = Looking { looker: Looker::new(&mirror.source_name, &mirror.source), seen, watch };
    let (assembler, limits) = (Assembler::new(tables, applied).leaving_out(&mirror.skips), Limits::of(&mirror.options));
    let one_by_one_until = Lsn(context.one_by_one_until.load(Ordering::Relaxed));
    let limits = Limits { one_by_one_until, ..limits };
    let mut apply =
        Apply::new(stream, assembler, looking, sink, limits, applied, tracker.clone(), wanted_changes, incoming_orders);
    let names: Vec<TableName> = sorted.streams.keys().cloned().collect();
    let caught_up = async || {
        tracker.report(context).await?;
        fail_point!("caught up");
        context.catalog.set_table_states(mirror.id, &names, TableState::Live.as_str()).await?;
        if sorted.late.is_empty() {
            context.catalog.advance_tasks(mirror.id, TaskKind::CreateMirror, 1.0).await?;
        }
        context.catalog.advance_tasks(mirror.id, TaskKind::ResumeMirror, 1.0).await?;
        fail_point!("tasks completed");
        context.set_state(MirrorState::Running).await?;
        context.ran_well.store(true, Ordering::Relaxed);
        Ok::<(), Error>(())
    };
    let streaming = async {
        apply.run_to(&context.stop, Some(goal)).await?;
        caught_up().await?;
        apply.run_to(&context.stop, None).await
    };
    let reporter = report_forever(context, tracker.clone(), source, &expected, wanted);
    // In tasks of their own, which end with the set.
    let mut beside = JoinSet::new();
    beside.spawn(late::run(context.clone(), main.clone()).in_current_span());
    beside.spawn(verify::run(context.clone(), main).in_current_span());
    let result = tokio::select! {
        result = streaming => result,
        result = reporter => result.map(|never| match never {}),
        result = record_events(context, events) => result,
        result = hindsight::look_forever(context, known_now, seen_by, watched) => result.map(|never| match never {}),
        Some(result) = beside.join_next() => match result {
            Ok(result) => result.map(|never| match never {}),
            Err(panic) => Err(Error::Blocked(Problem::new(SqlState::INTERNAL_ERROR, format!("what works beside the stream failed: {panic}")))),
        },
    };
    drop(apply);
    beside.shutdown().await;
    if left_behind.load(Ordering::Relaxed) {
        // The next attempt may be long in coming.
        late::clean(context).await;
    }
    // What was applied last is told, whatever ended the stream; it is not what decides about the stream's end.
    let _ = tracker.report(context).await;
    result
}

/// Has the target's transactions marked with the mirror's replication origin, where that is wanted and possible.
async fn tag(context: &Context, sink: &mut PostgresSink) -> Result<(), Error> {
    let mirror = &context.mirror;
    if !mirror.options.replication_origin {
        return Ok(());
    }
    let Some(problem) = sink.tag(&origin::name(&mirror.source_name, &mirror.name)).await? else { return Ok(()) };
    let event = Event::warning("state", "transactions on the target are not marked with a replication origin");
    context.event(&event.detail(format!("{}.", problem.message)).hint(origin::HINT)).await
}

/// Records what the sinks tell, for as long as one of them lives.
async fn record_events(context: &Context, mut events: mpsc::UnboundedReceiver<Event>) -> Result<(), Error> {
    while let Some(event) = events.recv().await {
        tracing::info!(lsn = ?event.lsn, "{}", event.message);
        context.event(&event).await?;
    }
    // What ended them is told by whoever runs them.
    std::future::pending().await
}

/// Checks that everything the target lacks will come, and returns where the target is.
async fn check_start(
    context: &Context,
    source: &PeerSession,
    replication: &mut ReplicationConnection,
    applied: Lsn,
) -> Result<Lsn, Error> {
    let mirror = &context.mirror;
    let identity = replication.identify_system().await?;
    let slot = slot::facts(source, &mirror.object_name).await?;
    let known = mirror.system_id.as_deref();
    let wal_end = slot::wal_end(source).await?;
    let left_ours_at = match mirror.timeline {
        Some(timeline) if timeline != identity.timeline => {
            let history = replication.timeline_history(identity.timeline).await?;
            // A timeline that never was on ours went another way from the start.
            Some(switch_point(&history, timeline).unwrap_or(Lsn::ZERO))
        }
        _ => None,
    };
    let facts = SourceFacts { system: &identity.system_id, wal_end, left_ours_at };
    let subject =
        Subject { mirror: &mirror.name, peer: &mirror.source_name, slot: &mirror.object_name, known_system: known };
    let applied = check_continuity(known, facts, slot.as_ref(), Some(applied))
        .map_err(|gap| Error::ResyncRequired(gap.problem(&subject, facts)))?;
    if left_ours_at.is_some() {
        let event = Event::warning("state", format!("the source is now on timeline {}", identity.timeline)).at(applied);
        context.event(&event).await?;
        context.catalog.set_mirror_timeline(mirror.id, identity.timeline).await?;
    }
    Ok(applied)
}
