//! The start sequence: from nothing to a target that holds the source's rows as of a known position.
//!
//! preflight → target tables → publication → locks → slot with snapshot → copy, keys and indexes → progress row. The publication
//! precedes the slot, which decodes with the catalogs of its time, and the locks: it would queue behind whoever waits for them. The locks
//! are held, shortly, until the slot exists, so that no table changes its shape between being looked at and the snapshot; a rewrite
//! after that is found out by the copy.

use std::time::Duration;

use catalog::event::Event;
use catalog::mirror::{Mode, OnError, TableRow};
use catalog::task::TaskKind;
use pg::{Lsn, SqlState, TableName};

use crate::copy::{self, Job, Targets};
use crate::error::{Error, Problem};
use crate::late;
use crate::prepare::{self, Before, Fills, column_types, describe_targets};
use crate::schema::introspect::leaves;
use crate::schema::{RowIdentity, TablePlan};
use crate::session::PeerSession;
use crate::sink::postgres::PostgresSink;
use crate::sink::{marks, progress_row, shapes};
use crate::source::preflight::{self, Findings};
use crate::source::replication::{CreatedSlot, ReplicationConnection};
use crate::source::{condition, publication, slot};
use crate::state::MirrorState;
use crate::table_state::TableState;
use crate::worker::Context;

/// How long a lock on a source table may be waited for; others queue behind us meanwhile.
const LOCK_TIMEOUT: &str = "set lock_timeout = '5s'";

/// How long the locks are held while the slot waits for transactions that were open before it. One of them may itself wait for a lock
/// that ours keep from it, and whoever comes after it waits too.
const LOCKS_HELD_MAX: Duration = Duration::from_secs(2);

/// Runs the start sequence. On return the target has the progress row at the copy's snapshot and marks of the tables that are complete,
/// and the catalog knows it. Tables that changed under the copy are left for copies of their own.
///
/// # Errors
/// [`Error::Blocked`] with all that preflight found, or what a table's copy met; [`Error::CopyAgain`] if no table could be copied.
pub async fn run(context: &Context, source: &PeerSession, sink: &mut PostgresSink) -> Result<(), Error> {
    let mirror = &context.mirror;
    let result = run_once(context, source, sink).await;
    if matches!(result, Err(Error::Blocked(_) | Error::Transient(_) | Error::CopyAgain(_)))
        && marks::read(sink.session(), &mirror.object_name).await.is_ok_and(|marks| marks.is_empty())
    {
        // The copy begins anew; until then the slot would hold the source's WAL for nothing. The next attempt makes sure.
        let _ = slot::drop(source, &mirror.object_name).await;
    }
    let snapshot = result?;
    fail_point!("copy complete");
    context.event(&Event::info("copy", "copy complete").at(snapshot)).await?;
    record_copied(context, sink.session()).await
}

/// Everything up to a complete copy; returns the position of its snapshot.
async fn run_once(context: &Context, source: &PeerSession, sink: &mut PostgresSink) -> Result<Lsn, Error> {
    let mirror = &context.mirror;
    context.set_state(MirrorState::Preflight).await?;
    let (plans, fills) = check(context, source, sink.session()).await?;
    remember_tables(context, &plans).await?;
    fail_point!("preflight passed");
    if sink.triggers_fire() {
        if mirror.options.mode != Mode::StreamOnly {
            check_foreign_keys(&describe_targets(sink.session(), &plans, &mirror.options.bookkeeping).await?)?;
        }
        let event = Event::warning("schema", "triggers and foreign keys of the target fire while the mirror writes")
            .detail("The target's role may not set session_replication_role. So changes are written one by one, in the order of the source, which is slower; \
                foreign keys that are DEFERRABLE wait for the end of each transaction; what ordinary triggers change besides is not undone.")
            .hint("GRANT SET ON PARAMETER session_replication_role (PostgreSQL 15 and later), or use a superuser.");
        context.event(&event).await?;
    }

    context.set_state(MirrorState::Schema).await?;
    prepare::make_tables(context, source, sink.session(), &plans, &fills).await?;
    fail_point!("target tables made");

    context.set_state(MirrorState::Slot).await?;
    // What an earlier slot's copy left counts no more once that slot is gone.
    sink.reset().await?;
    fail_point!("progress reset");
    slot::drop(source, &mirror.object_name).await?;
    let publications = publication::create(source, &mirror.object_name, &plans).await?;
    fail_point!("publications made");
    context.catalog.set_mirror_publications(mirror.id, &publications).await?;
    fail_point!("publications recorded");
    let with_copy = mirror.options.mode != Mode::StreamOnly;
    let mut replication = ReplicationConnection::connect(&mirror.source_name, &source.attempt).await?;
    replication.make_failover_slots(mirror.options.failover_slot);
    let identity = replication.identify_system().await?;
    let locks = lock_tables(context, &plans).await?;
    fail_point!("source tables locked");
    let made = make_slot(context, &mut replication, &mirror.object_name, locks, with_copy, source.version).await?;
    fail_point!("slot made");
    let from = made.consistent_point;
    context.catalog.set_mirror_slot(mirror.id, &identity.system_id, identity.timeline, from).await?;
    context.event(&Event::info("copy", format!("slot \"{}\" made", mirror.object_name)).at(from)).await?;
    fail_point!("slot recorded");
    // From here on tables that are complete on the target count, whatever becomes of the others: then only this slot will do.
    sink.record_snapshot(from).await?;
    fail_point!("snapshot recorded on the target");

    let names: Vec<TableName> = plans.iter().map(|p| p.source.name.clone()).collect();
    let Some(snapshot) = made.snapshot.filter(|_| with_copy) else {
        mark_all(context, sink.session(), &plans, from).await?;
        return Ok(from);
    };
    context.set_state(MirrorState::Copying).await?;
    context.catalog.set_table_states(mirror.id, &names, TableState::Copying.as_str()).await?;
    prepare::empty_tables(context, sink.session(), &plans, &fills).await?;
    fail_point!("target tables emptied");
    let snapshot = copy::Snapshot { name: snapshot, source_version: source.version, mark_at: Some(from) };
    let jobs = make_jobs(context, source, sink.session(), plans.clone(), &fills).await?;
    let tasks = &[TaskKind::CreateMirror, TaskKind::ResyncMirror];
    let stops = mirror.options.on_error == OnError::Stop;
    let failed = copy::run(context, jobs, snapshot, tasks, stops).await?;
    // The snapshot lives as long as this connection.
    drop(replication);
    let complete: Vec<TablePlan> =
        plans.into_iter().filter(|p| !failed.iter().any(|(table, _)| *table == p.source.name)).collect();
    prepare::add_constraints(context, sink.session(), sink.triggers_fire(), &complete, &fills).await?;
    let all_failed = failed.len() == names.len();
    for (table, error) in failed {
        if all_failed {
            return Err(error);
        }
        match error {
            Error::CopyAgain(problem) => {
                let message = format!("table \"{table}\" is copied once more: {}", problem.message);
                context.event(&Event::warning("copy", message)).await?;
            }
            Error::Blocked(problem) => late::block(context, &table, problem).await?,
            other => return Err(other),
        }
    }
    Ok(from)
}

/// Marks tables that need no copy, with what they look like.
async fn mark_all(context: &Context, target: &PeerSession, plans: &[TablePlan], from: Lsn) -> Result<(), Error> {
    let mirror = &context.mirror.object_name;
    let names: Vec<TableName> = plans.iter().map(|p| p.source.name.clone()).collect();
    target.run("begin").await?;
    progress_row::hold(target, mirror, context.lane, context.epoch).await?;
    for plan in plans {
        shapes::record_copied(target, mirror, plan).await?;
    }
    marks::set(target, mirror, &names, from).await?;
    target.run("commit").await
}

/// Prepares the copy of each table.
///
/// # Errors
/// [`Error`] as the servers' SQLSTATE says.
pub async fn make_jobs(
    context: &Context,
    source: &PeerSession,
    target: &PeerSession,
    plans: Vec<TablePlan>,
    fills: &Fills,
) -> Result<Vec<Job>, Error> {
    let targets = describe_targets(target, &plans, &context.mirror.options.bookkeeping).await?;
    let types = column_types(source, &plans).await?;
    let mut jobs = Vec::new();
    for plan in plans {
        let leaves = leaves(&source.client, plan.source.oid).await.map_err(|e| source.error(&e))?;
        let Some(filling) = fills.get(&plan.source.name) else { continue };
        let target = targets.get(&plan.target_name);
        jobs.push(Job::new(plan, leaves, filling, &context.mirror.object_name, &types, target));
    }
    Ok(jobs)
}

/// Tells the catalog what is complete on the target. Repeated when whoever completed it died before that.
///
/// # Errors
/// [`Error::Transient`] if the catalog cannot be reached.
pub async fn record_copied(context: &Context, target: &PeerSession) -> Result<(), Error> {
    let mirror = &context.mirror;
    let state = if mirror.options.mode == Mode::CopyOnly { TableState::Copied } else { TableState::Catchup };
    let marks = marks::read(target, &mirror.object_name).await?;
    let complete: Vec<TableName> = marks.keys().cloned().collect();
    // All at the one snapshot: none has come later yet.
    context.catalog.set_tables_from(mirror.id, &complete, marks.values().next().copied()).await?;
    context.catalog.set_table_states(mirror.id, &complete, state.as_str()).await?;
    fail_point!("tables recorded as copied");
    context.catalog.set_mirror_copied(mirror.id).await?;
    fail_point!("copy recorded in the catalog");
    context.catalog.advance_tasks(mirror.id, TaskKind::CreateMirror, 0.95).await?;
    Ok(())
}

/// The copy fills tables in no order that foreign keys could follow.
fn check_foreign_keys(targets: &Targets) -> Result<(), Error> {
    let mut names: Vec<&TableName> = targets.values().filter(|t| t.has_foreign_keys).map(|t| &t.name).collect();
    names.sort();
    let mut findings = Findings::default();
    for name in names {
        findings.add(
            Problem::new(
                SqlState::INSUFFICIENT_PRIVILEGE,
                format!("foreign keys of target table \"{name}\" cannot be switched off while it is copied"),
            )
            .detail("The target's role may not set session_replication_role.")
            .hint("GRANT SET ON PARAMETER session_replication_role (PostgreSQL 15 and later), use a superuser, or add the foreign keys after the copy."),
        );
    }
    findings.into_result()
}

/// Preflight: finds the tables and checks both sides. All that is wrong is said at once.
async fn check(
    context: &Context,
    source: &PeerSession,
    target: &PeerSession,
) -> Result<(Vec<TablePlan>, Fills), Error> {
    let mirror = &context.mirror;
    let mut findings = Findings::default();
    let plans = preflight::plan_tables(mirror, source, &mut findings).await?;
    preflight::check_source(source, &plans, &mut findings).await?;
    condition::check(source, &plans, &mut findings).await?;
    preflight::check_target(target, &mut findings).await?;
    let before = Before::look(mirror, prepare::known_tables(context).await?, source, target, &plans).await?;
    let mut fills = Fills::new();
    for plan in &plans {
        findings.check(check_root(plan, &plans));
        let filling = prepare::decide(mirror, plan, &before, &mut findings);
        fills.insert(plan.source.name.clone(), filling);
    }
    findings.into_result()?;
    Ok((plans, fills))
}

/// Checks that a partition is not mirrored besides its root.
///
/// # Errors
/// [`Problem`] if it is.
pub fn check_root(plan: &TablePlan, plans: &[TablePlan]) -> Result<(), Problem> {
    let Some(root) = plan.source.root.and_then(|oid| plans.iter().find(|p| p.source.oid == oid)) else { return Ok(()) };
    let (part, root) = (&plan.source.name, &root.source.name);
    let message = format!("table \"{part}\" is a partition of \"{root}\", which is mirrored too");
    Err(Problem::new(SqlState::INVALID_PARAMETER_VALUE, message)
        .detail("Its rows are published as the other's.")
        .hint("Name one of the two."))
}

/// Locks the source's tables on a session of their own, and checks that they still are what they were when they were looked at.
pub async fn lock_tables(context: &Context, plans: &[TablePlan]) -> Result<PeerSession, Error> {
    let mirror = &context.mirror;
    let locks = PeerSession::open(&mirror.source_name, &mirror.source).await?;
    let names: Vec<String> = plans.iter().map(|p| p.source.name.quoted()).collect();
    locks.run(LOCK_TIMEOUT).await?;
    locks.run(&format!("begin; lock table {} in access share mode", names.join(", "))).await?;
    let mut findings = Findings::default();
    let known: Vec<_> = plans.iter().map(|p| (p.source.name.clone(), p.target_name.clone())).collect();
    let locked = preflight::plan_known_tables(mirror, &locks, &known, &mut findings).await?;
    findings.into_result()?;
    if !locked.iter().map(|p| &p.source).eq(plans.iter().map(|p| &p.source)) {
        let message = "tables of the source were changed before the copy began";
        return Err(Error::CopyAgain(Problem::new(SqlState::WRONG_STATE, message)));
    }
    Ok(locks)
}

/// Stores the mirror's tables in the catalog, and says which of them are replicated in part.
async fn remember_tables(context: &Context, plans: &[TablePlan]) -> Result<(), Error> {
    let sources: Vec<TableName> = plans.iter().map(|p| p.source.name.clone()).collect();
    context.catalog.keep_tables(context.mirror.id, &sources).await?;
    note_tables(context, plans).await
}

/// Stores what is known of tables in the catalog, and says which of them are replicated in part.
///
/// # Errors
/// [`Error::Transient`] if the catalog cannot be reached.
pub async fn note_tables(context: &Context, plans: &[TablePlan]) -> Result<(), Error> {
    let rows: Vec<TableRow> = plans
        .iter()
        .map(|plan| TableRow {
            source: plan.source.name.clone(),
            target: plan.target_name.clone(),
            key_columns: plan.key().map(<[String]>::to_vec),
            warning: plan.warning(),
            source_oid: Some(plan.source.oid),
        })
        .collect();
    context.catalog.set_tables(context.mirror.id, &rows).await?;
    for plan in plans {
        let name = &plan.source.name;
        let event = match &plan.source.identity {
            RowIdentity::InsertsOnly => Event::warning("table", format!("only inserts into table \"{name}\" are replicated"))
                .detail("It has no primary key and no replica identity, so UPDATE and DELETE are not replicated.")
                .hint("If its rows are updated or deleted: give it a primary key or a replica identity, then RESYNC MIRROR … TABLE."),
            RowIdentity::WholeRow => Event::warning("table", format!("table \"{name}\" has no key"))
                .detail("For each UPDATE and DELETE the target is searched for one row that is the same, all of it without an index.")
                .hint("Give it a primary key, or an index on the target whose first column tells most rows apart."),
            RowIdentity::Key(_) => continue,
        };
        context.event(&event).await?;
    }
    Ok(())
}

/// Makes the slot while the locks are held, so that the snapshot shows the tables as they were looked at. A slot waits for older
/// transactions; if that takes long, one of them may wait for our locks, which are then given up: the copy finds rewrites out by itself.
pub async fn make_slot(
    context: &Context,
    replication: &mut ReplicationConnection,
    slot: &str,
    locks: PeerSession,
    with_snapshot: bool,
    source_version: u32,
) -> Result<CreatedSlot, Error> {
    let creation = replication.create_slot(slot, with_snapshot, source_version);
    let mut creation = std::pin::pin!(creation);
    tokio::select! {
        made = &mut creation => return made,
        () = tokio::time::sleep(LOCKS_HELD_MAX) => drop(locks),
        () = context.stop.wait() => return Err(Error::Stopped),
    }
    context.event(&Event::info("copy", "the slot waits for older transactions on the source to end")).await?;
    tokio::select! {
        made = &mut creation => made,
        () = context.stop.wait() => Err(Error::Stopped),
    }
}
