//! Tables that come late: added to a mirror that streams, begun anew, or left over from a first copy that was interrupted.
//!
//! They get a slot and a snapshot of their own and are copied while the others stream. A lane of their own then applies what has
//! happened since, and hands them over: the main stream stands still at the end of a transaction, the lane applies exactly what commits
//! before that, the target notes it in a mark, and the main stream goes on with the tables from the mark's position. It stands still only
//! when the lane is less than about a second behind.
//!
//! A table without a mark is copied anew, whatever died when; so nothing here has to survive.

mod lane;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use catalog::event::Event;
use catalog::mirror::{MirrorTable, Mode};
use catalog::task::TaskKind;
use pg::name::quote_ident;
use pg::{Lsn, TableName};
use tokio::sync::{Mutex, mpsc, oneshot};

use crate::apply::Order;
use crate::copy::{self, Snapshot};
use crate::error::{Error, Problem, retry_delay};
use crate::known;
use crate::newcomers::Newcomers;
use crate::prepare::{self, Before, Fills};
use crate::schema::TablePlan;
use crate::session::PeerSession;
use crate::sink::postgres::open_writer;
use crate::sink::progress_row::{self, LATE_LANE};
use crate::source::preflight::{Findings, plan_known_tables};
use crate::source::publication::{self, Expected};
use crate::source::replication::ReplicationConnection;
use crate::source::{condition, slot};
use crate::start;
use crate::status::Tracker;
use crate::table_state::TableState;
use crate::wishes;
use crate::worker::Context;

/// How often it is looked for tables that wait while there is something to do.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How often it is looked for tables that are new on the source.
const NEWCOMERS_INTERVAL: Duration = Duration::from_secs(5);

/// How long the main stream stands still at most; then it goes on without the tables, and they try again.
const HOLD_MAX: Duration = Duration::from_secs(10);

/// The tasks that late tables are part of.
const TASKS: &[TaskKind] = &[TaskKind::CreateMirror, TaskKind::AlterMirror, TaskKind::ResyncMirror];

/// The main stream, as far as those need it that work beside it.
pub struct Main {
    /// Tells it.
    pub orders: mpsc::Sender<Order>,
    /// What its publications should be.
    pub expected: Arc<Mutex<Expected>>,
    /// Its values come in binary.
    pub binary: bool,
    /// Schemas whose operators its session finds.
    pub type_schemas: BTreeSet<String>,
    /// How far it is.
    pub tracker: Tracker,
    /// There may be something on the source that [`clean`] removes.
    pub left_behind: Arc<AtomicBool>,
    /// Hears what happens on the target.
    pub tell: mpsc::UnboundedSender<Event>,
}

impl Main {
    /// Has the main stream leave the changes of these tables out. On return nothing is written to them any more.
    ///
    /// # Errors
    /// [`Error::Stopped`] if it has ended.
    pub async fn ignore(&self, tables: Vec<TableName>) -> Result<(), Error> {
        let (settled, told) = oneshot::channel();
        self.tell(Order::Ignore { tables, settled }).await?;
        told.await.map_err(|_| Error::Stopped)
    }

    /// Tells it something.
    ///
    /// # Errors
    /// [`Error::Stopped`] if it has ended.
    pub async fn tell(&self, order: Order) -> Result<(), Error> {
        self.orders.send(order).await.map_err(|_| Error::Stopped)
    }
}

/// Returns the name of the slot and the publications of late tables.
pub fn object_name(mirror: &str) -> String {
    format!("{mirror}_late")
}

/// Copies tables that come late and hands them over, for as long as the main stream runs. What fails is tried again, and stops nobody else.
///
/// # Errors
/// [`Error::Restart`] if the main stream must begin anew to take tables in; [`Error::Fenced`] if another process has taken over.
pub async fn run(context: Context, main: Arc<Main>) -> Result<Infallible, Error> {
    let context = context.for_lane(LATE_LANE);
    // An earlier process may have left its slot behind.
    clean(&context).await;
    let (mut attempt, mut told) = (0, false);
    let mut newcomers = Newcomers::default();
    loop {
        match look(&context, &main, &mut told).await {
            Ok(busy) => {
                attempt = 0;
                if busy {
                    tokio::time::sleep(LOOK_INTERVAL).await;
                } else {
                    until_wanted(&context, &mut newcomers).await;
                }
            }
            Err(error @ (Error::Fenced | Error::Restart | Error::Stopped | Error::TextNeeded)) => return Err(error),
            Err(error) => {
                attempt += 1;
                let delay = retry_delay(attempt);
                if let Some(problem) = error.problem() {
                    tracing::warn!(sqlstate = %problem.sqlstate, error = problem.message, attempt, retry_in = ?delay, "copy of late tables failed");
                    tell(&context, problem).await;
                }
                // Until the next attempt its slot would hold the source's WAL for nothing.
                clean(&context).await;
                tokio::time::sleep(delay).await;
            }
        }
    }
}

/// Waits until a statement wants something of the mirror's tables, or there are new ones.
async fn until_wanted(context: &Context, newcomers: &mut Newcomers) {
    loop {
        tokio::select! {
            () = context.has_task.notified() => return,
            () = tokio::time::sleep(NEWCOMERS_INTERVAL) => {
                if newcomers.take_in(context).await {
                    return;
                }
            }
        }
    }
}

/// Says what failed; the catalog itself may be what is out of reach.
async fn tell(context: &Context, problem: &Problem) {
    let event = Event {
        sqlstate: Some(problem.sqlstate),
        detail: problem.detail.clone(),
        hint: problem.hint.clone(),
        ..Event::warning("copy", format!("the copy of late tables failed: {}", problem.message))
    };
    if let Err(error) = context.event(&event).await {
        tracing::warn!(error = %error, "failure not recorded");
    }
    let (id, sqlstate) = (context.mirror.id, problem.sqlstate.to_string());
    let _ = context.catalog.hold_up_tasks(id, &sqlstate, &problem.message, false).await;
}

/// Removes what an attempt leaves on the source, as well as that can be done.
pub async fn clean(context: &Context) {
    let mirror = &context.mirror;
    let name = object_name(&mirror.object_name);
    let cleaning = async {
        let source = PeerSession::open(&mirror.source_name, &mirror.source).await?;
        slot::drop(&source, &name).await?;
        publication::drop(&source, &name).await
    };
    match tokio::time::timeout(HOLD_MAX, cleaning).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(error = %error, "slot of late tables not removed yet"),
        Err(_) => tracing::debug!("slot of late tables not removed in time"),
    }
}

/// Looks for tables that wait, and copies them. When there are none, `told` says whether the tasks know. Returns whether there may be more
/// to do.
async fn look(context: &Context, main: &Main, told: &mut bool) -> Result<bool, Error> {
    let has_task = wishes::obey(context, Some(main)).await?;
    *told &= !has_task;
    let waiting = context.catalog.late_tables(context.mirror.id).await?;
    if waiting.is_empty() {
        if !*told {
            for kind in TASKS {
                context.catalog.advance_tasks(context.mirror.id, *kind, 1.0).await?;
            }
            *told = true;
        }
        return Ok(has_task);
    }
    *told = false;
    // The definition may have changed since the attempt began.
    let fresh = context.catalog.mirror(context.mirror.id).await?.ok_or(Error::Stopped)?;
    let context = &context.clone().with_mirror(fresh);
    Group { context, main, name: object_name(&context.mirror.object_name) }.copy(&waiting).await?;
    Ok(true)
}

/// Tables that are copied together.
struct Group<'a> {
    context: &'a Context,
    main: &'a Main,
    /// Name of their slot and publications.
    name: String,
}

impl Group<'_> {
    async fn copy(&self, waiting: &[MirrorTable]) -> Result<(), Error> {
        let mirror = &self.context.mirror;
        let source = PeerSession::open(&mirror.source_name, &mirror.source).await?;
        let (target, triggers_fire) = open_writer(&mirror.target_name, &mirror.target).await?;
        self.main.left_behind.store(true, Ordering::Relaxed);
        // What is written until the lane runs is fenced by it too: the main lane moves on meanwhile.
        let (name, epoch) = (&mirror.object_name, self.context.epoch);
        progress_row::open_late_lane(&target, name, epoch, Some(Lsn::ZERO)).await?;
        // One that is renamed now is looked for by its new name the next time.
        if known::follow_renames(self.context, &target).await? {
            return Ok(());
        }
        let mut renamed = false;
        for table in waiting {
            let result = known::rename_unfollowed(self.context, &source, &target, table).await;
            renamed |= matches!(result, Ok(true));
            renamed |= !self.passes(&table.source, result.map(drop)).await?;
        }
        if renamed {
            return Ok(());
        }
        let (plans, fills) = self.prepare(&source, &target, waiting).await?;
        if plans.is_empty() {
            return Ok(());
        }
        // The main stream hears of the tables from here on, and is to leave them out.
        let names: Vec<TableName> = plans.iter().map(|p| p.source.name.clone()).collect();
        self.main.ignore(names).await?;
        let plans = self.publish(&source, plans).await?;
        let (at, plans) = self.copy_rows(&source, &target, plans, &fills).await?;
        if !plans.is_empty() {
            prepare::add_constraints(self.context, &target, triggers_fire, &plans, &fills).await?;
            let names: Vec<TableName> = plans.iter().map(|p| p.source.name.clone()).collect();
            match self.catch_up(&source, &target, at, plans).await {
                Err(Error::Blocked(problem) | Error::OneByOne { problem, .. }) => {
                    self.block_some(&names, &problem).await?;
                }
                other => other?,
            }
        }
        slot::drop(&source, &self.name).await?;
        publication::drop(&source, &self.name).await?;
        self.main.left_behind.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Looks at the tables on both sides and makes what the target lacks. A table that cannot be copied stops alone.
    async fn prepare(
        &self,
        source: &PeerSession,
        target: &PeerSession,
        waiting: &[MirrorTable],
    ) -> Result<(Vec<TablePlan>, Fills), Error> {
        let context = self.context;
        let mut plans = Vec::new();
        for table in waiting {
            let mut findings = Findings::default();
            let name = [(table.source.clone(), table.target.clone())];
            let found = plan_known_tables(&context.mirror, source, &name, &mut findings).await?;
            condition::check(source, &found, &mut findings).await?;
            if self.passes(&table.source, findings.into_result()).await? {
                plans.extend(found);
            }
        }
        let known = prepare::known_tables(context).await?;
        let before = Before::look(&context.mirror, known, source, target, &plans).await?;
        let mut ready = Vec::new();
        let mut fills = Fills::new();
        for plan in plans {
            let name = plan.source.name.clone();
            let mut findings = Findings::default();
            let filling = prepare::decide(&context.mirror, &plan, &before, &mut findings);
            if !self.passes(&name, findings.into_result()).await? {
                continue;
            }
            fills.insert(name.clone(), filling);
            let made = prepare::make_tables(context, source, target, std::slice::from_ref(&plan), &fills).await;
            if self.passes(&name, made).await? {
                ready.push(plan);
            }
        }
        start::note_tables(context, &ready).await?;
        Ok((ready, fills))
    }

    /// Publishes the tables: with the mirror's others, and for the slot of their own.
    async fn publish(&self, source: &PeerSession, plans: Vec<TablePlan>) -> Result<Vec<TablePlan>, Error> {
        // Nobody looks at the publications meanwhile.
        let mut expected = self.main.expected.lock().await;
        let mut published = Vec::new();
        for plan in plans {
            let added = publication::add(source, &self.context.mirror.object_name, &plan).await;
            if self.passes(&plan.source.name, added).await? {
                published.push(plan);
            }
        }
        // The catalog knows them before they stream.
        let mirror = &self.context.mirror;
        expected.made.extend(publication::marks(source, &mirror.object_name, &published).await?);
        self.context.catalog.set_mirror_publications(mirror.id, &expected.made).await?;
        publication::create(source, &self.name, &published).await?;
        fail_point!("late tables published");
        Ok(published)
    }

    /// Copies the tables at a snapshot of their own; returns its position, and the tables that are complete there.
    async fn copy_rows(
        &self,
        source: &PeerSession,
        target: &PeerSession,
        mut plans: Vec<TablePlan>,
        fills: &Fills,
    ) -> Result<(Lsn, Vec<TablePlan>), Error> {
        let (context, mirror) = (self.context, &self.context.mirror);
        if plans.is_empty() {
            return Ok((Lsn::ZERO, plans));
        }
        let with_copy = mirror.options.mode != Mode::StreamOnly;
        let mut replication = ReplicationConnection::connect(&mirror.source_name, &source.attempt).await?;
        let locks = start::lock_tables(context, &plans).await?;
        let made = start::make_slot(context, &mut replication, &self.name, locks, with_copy, source.version).await?;
        let at = made.consistent_point;
        fail_point!("late slot made");
        let names: Vec<TableName> = plans.iter().map(|p| p.source.name.clone()).collect();
        context.event(&Event::info("copy", format!("{} late tables are copied", names.len())).at(at)).await?;
        let Some(snapshot) = made.snapshot.filter(|_| with_copy) else { return Ok((at, plans)) };
        context.catalog.set_table_states(mirror.id, &names, TableState::Copying.as_str()).await?;
        let mut ready = Vec::new();
        for plan in plans {
            let emptied = prepare::empty_tables(context, target, std::slice::from_ref(&plan), fills).await;
            if self.passes(&plan.source.name, emptied).await? {
                ready.push(plan);
            }
        }
        plans = ready;
        fail_point!("late target tables emptied");
        let snapshot = Snapshot { name: snapshot, source_version: source.version, mark_at: None };
        let jobs = start::make_jobs(context, source, target, plans.clone(), fills).await?;
        let copied = tokio::select! {
            copied = copy::run(context, jobs, snapshot, TASKS, false) => copied?,
            // The others are copied again, without it.
            () = wishes::are_unwanted(context, &names) => return Ok((at, Vec::new())),
        };
        for (table, error) in copied {
            plans.retain(|p| p.source.name != table);
            match error {
                Error::CopyAgain(problem) => {
                    let message = format!("table \"{table}\" is copied once more: {}", problem.message);
                    context.event(&Event::warning("copy", message)).await?;
                }
                other => drop(self.passes(&table, Err(other)).await?),
            }
        }
        fail_point!("late tables copied");
        Ok((at, plans))
    }

    /// Returns whether a table may go on; what stands in its way alone stops it, and all else is the caller's.
    async fn passes(&self, table: &TableName, result: Result<(), Error>) -> Result<bool, Error> {
        match result {
            Ok(()) => Ok(true),
            Err(Error::Blocked(problem)) => {
                self.block(table, problem).await?;
                Ok(false)
            }
            Err(other) => Err(other),
        }
    }

    /// What the lane cannot write stops the table that it is of; the others are copied once more. All of them, if it is of none.
    async fn block_some(&self, tables: &[TableName], problem: &Problem) -> Result<(), Error> {
        let of = problem.table.as_deref().filter(|t| tables.contains(t));
        for table in tables.iter().filter(|t| of.is_none_or(|of| of == *t)) {
            self.block(table, problem.clone()).await?;
        }
        Ok(())
    }

    async fn block(&self, table: &TableName, problem: Problem) -> Result<(), Error> {
        block(self.context, table, problem).await
    }
}

/// Stops a table; what has no hint yet says how to go on.
///
/// # Errors
/// [`Error::Transient`] if the catalog cannot be reached.
pub async fn block(context: &Context, table: &TableName, mut problem: Problem) -> Result<(), Error> {
    let again = format!("RESYNC MIRROR {} TABLE {} copies it anew.", quote_ident(&context.mirror.name), table.quoted());
    problem.hint = Some(match problem.hint.take() {
        Some(hint) => format!("{hint} {again}"),
        None => again,
    });
    tracing::error!(relation = %table, sqlstate = %problem.sqlstate, error = problem.message, "table stopped");
    let failure = problem.failure(1, None);
    context.catalog.set_table_failure(context.mirror.id, table, &failure, problem.lsn).await?;
    for kind in [TaskKind::AlterMirror, TaskKind::ResyncMirror] {
        let sqlstate = problem.sqlstate.to_string();
        context.catalog.fail_tasks(context.mirror.id, kind, &sqlstate, &problem.message).await?;
    }
    Ok(())
}
