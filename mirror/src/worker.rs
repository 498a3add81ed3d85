//! One mirror's life in this process: attempts, and what is done when one fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use catalog::Catalog;
use catalog::event::Event;
use catalog::mirror::Mirror;
use catalog::task::TaskKind;
use pg::{Lsn, SqlState};
use tokio::sync::{Notify, watch};

use crate::apply::{Apply, Limits};
use crate::assemble::{Assembler, Tables};
use crate::error::{Error, Problem};
use crate::progress::{SourceFacts, Subject, check_continuity, switch_point};
use crate::schema::{TablePlan, all_binary};
use crate::session::PeerSession;
use crate::sink::origin;
use crate::sink::postgres::PostgresSink;
use crate::source::preflight::{Findings, plan_known_tables};
use crate::source::replication::ReplicationConnection;
use crate::source::{publication, slot};
use crate::start;
use crate::state::{Begin, MirrorState, begin};
use crate::status::{Tracker, report_forever};

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
    /// The wish to stop.
    pub stop: Stop,
    /// Woken when a statement begins to wait for the mirror.
    pub waited_for: Arc<Notify>,
    /// The target has caught up since the last failure.
    ran_well: Arc<AtomicBool>,
    /// Values are asked for as text, since a column's type has changed.
    as_text: Arc<AtomicBool>,
    /// Transactions that commit up to here are written one by one, since one of them cannot be applied.
    one_by_one_until: Arc<AtomicU64>,
}

impl Context {
    /// Puts together what a worker needs.
    pub fn new(
        catalog: Catalog,
        node_id: Arc<str>,
        mirror: Mirror,
        epoch: i64,
        stop: Stop,
        waited_for: Arc<Notify>,
    ) -> Context {
        let (ran_well, as_text) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let one_by_one_until = Arc::default();
        Context {
            catalog,
            node_id,
            mirror: Arc::new(mirror),
            epoch,
            stop,
            waited_for,
            ran_well,
            as_text,
            one_by_one_until,
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
    let mut attempt = 0;
    loop {
        let error = match attempt_once(&context).await {
            Ok(()) => return Outcome::Completed,
            Err(Error::Stopped) => return Outcome::Stopped,
            Err(Error::OneByOne { until, problem }) if context.write_one_by_one(until) => {
                tracing::info!(error = problem.message, %until, "a batch failed: its transactions are written one by one");
                continue;
            }
            Err(Error::TextNeeded) if !context.as_text.swap(true, Ordering::Relaxed) => continue,
            Err(Error::Fenced) => {
                tracing::warn!("another process has taken the mirror over");
                return Outcome::Fenced;
            }
            Err(error) => error,
        };
        if context.ran_well.swap(false, Ordering::Relaxed) {
            attempt = 0;
        }
        attempt += 1;
        let (state, delay) = MirrorState::after(&error, attempt).unwrap_or((MirrorState::Blocked, None));
        if let Some(problem) = error.problem() {
            // The catalog itself may be what is out of reach: then the next attempt tells.
            match tell_failure(&context, state, problem, attempt, delay).await {
                Ok(()) => {}
                Err(Error::Fenced) => return Outcome::Fenced,
                Err(Error::Stopped) => return Outcome::Stopped,
                Err(error) => tracing::warn!(error = %error, "failure not recorded"),
            }
        }
        let Some(delay) = delay else { return Outcome::GaveUp };
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = context.stop.wait() => return Outcome::Stopped,
        }
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
    let fresh = context.catalog.mirror(context.mirror.id).await?.ok_or(Error::Stopped)?;
    let context = Context { mirror: Arc::new(fresh), ..context.clone() };
    tokio::select! {
        result = work(&context) => result,
        // Streaming sees the wish itself and finishes its batch; everything before that is simply left.
        () = async { context.stop.wait().await; tokio::time::sleep(STOP_PATIENCE).await } => Err(Error::Stopped),
    }
}

/// How long a worker may take to stop by itself.
const STOP_PATIENCE: Duration = Duration::from_secs(12);

async fn work(context: &Context) -> Result<(), Error> {
    let mirror = &context.mirror;
    let (source, mut sink) = tokio::select! {
        opened = open_both(context) => opened?,
        () = context.stop.wait() => return Err(Error::Stopped),
    };
    fail_point!("both sides connected");
    match begin(mirror.options.mode, mirror.copied, mirror.snapshot_lsn, sink.applied()) {
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
        Begin::Anew if sink.applied() > Lsn::ZERO => Err(unknown_progress(sink.applied())),
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
            .hint("Drop the mirror and create it anew."),
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
        // The copy was complete, and whoever made it died before the catalog knew.
        start::record_copied(context).await?;
    }
    let (plans, tables) = look_up_tables(context, &source, &sink).await?;
    let (object_name, made) = (mirror.object_name.clone(), mirror.publications.clone());
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
    let limits = Limits {
        rows: mirror.options.batch_rows_max,
        bytes: mirror.options.batch_bytes_max,
        sync_interval: mirror.options.sync_interval,
        one_by_one_until: Lsn(context.one_by_one_until.load(Ordering::Relaxed)),
    };
    let mut apply =
        Apply::new(stream, Assembler::new(tables, applied), sink, limits, applied, tracker.clone(), wanted_changes);
    let caught_up = || async {
        tracker.report(context).await?;
        fail_point!("caught up");
        context.catalog.set_all_tables_state(mirror.id, "live").await?;
        context.catalog.advance_tasks(mirror.id, TaskKind::CreateMirror, 1.0).await?;
        context.catalog.advance_tasks(mirror.id, TaskKind::ResumeMirror, 1.0).await?;
        fail_point!("tasks completed");
        context.set_state(MirrorState::Running).await?;
        context.ran_well.store(true, Ordering::Relaxed);
        Ok(())
    };
    let reporter = report_forever(context, tracker.clone(), source, &expected, wanted);
    let result = tokio::select! {
        result = apply.run(&context.stop, goal, caught_up) => result,
        result = reporter => result.map(|never| match never {}),
    };
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

/// Looks at the mirror's tables on both sides, as the stream's rows will need to know them.
async fn look_up_tables(
    context: &Context,
    source: &PeerSession,
    sink: &PostgresSink,
) -> Result<(Vec<TablePlan>, Tables), Error> {
    let mut findings = Findings::default();
    let known = context.catalog.table_names(context.mirror.id).await?;
    let plans = plan_known_tables(&context.mirror, source, &known, &mut findings).await?;
    let targets = start::describe_targets(sink.session(), &plans).await?;
    for plan in &plans {
        match targets.get(&plan.target_name) {
            Some(target) => findings.check(plan.check_target(target)),
            None => findings.add(Problem::new(
                SqlState::UNDEFINED_TABLE,
                format!("target table \"{}\" does not exist", plan.target_name),
            )),
        }
    }
    findings.into_result()?;
    sink.use_operators_of(&targets.values().flat_map(|t| t.type_schemas.iter().cloned()).collect()).await?;
    let types = start::column_types(source, &plans).await?;
    let binary =
        source.version >= 140_000 && !context.as_text.load(Ordering::Relaxed) && all_binary(&plans, &types, &targets);
    let by_name = plans.iter().map(|plan| (plan.source.name.clone(), plan.clone())).collect();
    Ok((plans, Tables { plans: by_name, targets, types, binary, in_order: sink.triggers_fire() }))
}
