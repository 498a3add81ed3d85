//! The start sequence: from nothing to a target that holds the source's rows as of a known position.
//!
//! preflight → target tables → publication → locks → slot with snapshot → copy, keys and indexes → progress row. The publication
//! precedes the slot, which decodes with the catalogs of its time, and the locks: it would queue behind whoever waits for them. The locks
//! are held, shortly, until the slot exists, so that no table changes its shape between being looked at and the snapshot; a rewrite
//! after that is found out by the copy.

use std::collections::BTreeMap;
use std::time::Duration;

use catalog::event::Event;
use catalog::mirror::{BegunTable, Mode, TableRow};
use catalog::task::TaskKind;
use pg::name::quote_ident;
use pg::{Lsn, SqlState, TableName};

use crate::copy::{self, Job, Targets};
use crate::error::{Error, Problem};
use crate::schema::ddl::{self, Prerequisite};
use crate::schema::introspect::{leaves, target_tables, types};
use crate::schema::{RowIdentity, TablePlan, Types};
use crate::session::PeerSession;
use crate::sink::postgres::PostgresSink;
use crate::sink::progress_row;
use crate::source::preflight::{self, Findings};
use crate::source::replication::{CreatedSlot, ReplicationConnection};
use crate::source::{publication, slot};
use crate::state::MirrorState;
use crate::worker::Context;

/// What earlier attempts have done, by source table.
type Begun = BTreeMap<TableName, BegunTable>;

/// How long a lock on a source table may be waited for; others queue behind us meanwhile.
const LOCK_TIMEOUT: &str = "set lock_timeout = '5s'";

/// How long the locks are held while the slot waits for transactions that were open before it. One of them may itself wait for a lock
/// that ours keep from it, and whoever comes after it waits too.
const LOCKS_HELD_MAX: Duration = Duration::from_secs(2);

/// Runs the start sequence. On return the target has the progress row at the copy's snapshot, and the catalog knows it.
///
/// # Errors
/// [`Error::Blocked`] with all that preflight found; [`Error::CopyAgain`] if the source's tables changed under the copy.
pub async fn run(context: &Context, source: &PeerSession, sink: &mut PostgresSink) -> Result<(), Error> {
    let mirror = &context.mirror;
    let begun = context.catalog.begun_tables(mirror.id).await?;
    let result = run_once(context, source, sink, begun).await;
    if matches!(result, Err(Error::Blocked(_) | Error::Transient(_) | Error::CopyAgain(_))) {
        // The copy begins anew in any case; until then the slot would hold the source's WAL for nothing. The next attempt makes sure.
        let _ = slot::drop(source, &mirror.object_name).await;
    }
    let snapshot = result?;
    // From here on the target may know that it has the copy, even if the answer is lost: then only this slot will do.
    fail_point!("copy complete");
    sink.record_copy(snapshot).await?;
    fail_point!("copy recorded on the target");
    context.event(&Event::info("copy", "copy complete").at(snapshot)).await?;
    record_copied(context).await
}

/// Everything up to a complete copy; returns the position of its snapshot.
async fn run_once(context: &Context, source: &PeerSession, sink: &PostgresSink, begun: Begun) -> Result<Lsn, Error> {
    let mirror = &context.mirror;
    context.set_state(MirrorState::Preflight).await?;
    let (plans, targets) = check(context, source, sink.session(), &begun).await?;
    remember_tables(context, &plans).await?;
    fail_point!("preflight passed");
    if sink.triggers_fire() {
        let event = Event::warning("schema", "triggers and foreign keys of the target fire while the mirror writes")
            .detail("The target's role may not set session_replication_role.")
            .hint("GRANT SET ON PARAMETER session_replication_role (PostgreSQL 15 and later), or use a superuser.");
        context.event(&event).await?;
    }

    context.set_state(MirrorState::Schema).await?;
    let created = make_tables(context, source, sink.session(), &plans, &targets, &begun).await?;
    let targets = describe_targets(sink.session(), &plans).await?;
    fail_point!("target tables made");

    context.set_state(MirrorState::Slot).await?;
    slot::drop(source, &mirror.object_name).await?;
    let publications = publication::create(source, &mirror.object_name, &plans).await?;
    fail_point!("publications made");
    context.catalog.set_mirror_publications(mirror.id, &publications).await?;
    fail_point!("publications recorded");
    let with_copy = mirror.options.mode != Mode::StreamOnly;
    let mut replication = ReplicationConnection::connect(&mirror.source_name, &source.attempt).await?;
    let identity = replication.identify_system().await?;
    let locks = lock_tables(context, &plans).await?;
    fail_point!("source tables locked");
    let made = make_slot(context, &mut replication, locks, with_copy, source.version).await?;
    fail_point!("slot made");
    context.catalog.set_mirror_slot(mirror.id, &identity.system_id, identity.timeline, made.consistent_point).await?;
    context
        .event(&Event::info("copy", format!("slot \"{}\" made", mirror.object_name)).at(made.consistent_point))
        .await?;

    fail_point!("slot recorded");
    if let Some(snapshot) = made.snapshot.filter(|_| with_copy) {
        context.set_state(MirrorState::Copying).await?;
        context.catalog.set_all_tables_state(mirror.id, "copying").await?;
        empty_tables(context, sink.session(), &plans, &created, &begun).await?;
        fail_point!("target tables emptied");
        let types = column_types(source, &plans).await?;
        let mut jobs = Vec::new();
        for plan in plans {
            let leaves = leaves(&source.client, plan.source.oid).await.map_err(|e| source.error(&e))?;
            let make_indexes = created.contains(&plan.target_name);
            jobs.push(Job::new(plan.clone(), leaves, make_indexes, &types, targets.get(&plan.target_name)));
        }
        copy::run(context, jobs, snapshot, source.version).await?;
    }
    // The snapshot lives as long as this connection.
    drop(replication);
    Ok(made.consistent_point)
}

/// Tells the catalog that the copy is complete on the target. Repeated when whoever completed it died before that.
///
/// # Errors
/// [`Error::Transient`] if the catalog cannot be reached.
pub async fn record_copied(context: &Context) -> Result<(), Error> {
    let mirror = &context.mirror;
    let state = if mirror.options.mode == Mode::CopyOnly { "copied" } else { "catchup" };
    context.catalog.set_all_tables_state(mirror.id, state).await?;
    fail_point!("tables recorded as copied");
    context.catalog.set_mirror_copied(mirror.id).await?;
    fail_point!("copy recorded in the catalog");
    context.catalog.advance_tasks(mirror.id, TaskKind::CreateMirror, 0.95).await?;
    Ok(())
}

/// Preflight: finds the tables and checks both sides. All that is wrong is said at once.
async fn check(
    context: &Context,
    source: &PeerSession,
    target: &PeerSession,
    begun: &Begun,
) -> Result<(Vec<TablePlan>, Targets), Error> {
    let mirror = &context.mirror;
    let mut findings = Findings::default();
    let plans = preflight::plan_tables(mirror, source, &mut findings).await?;
    preflight::check_source(source, &plans, &mut findings).await?;
    preflight::check_target(target, &mut findings).await?;
    let targets = describe_targets(target, &plans).await?;
    for plan in &plans {
        if let Some(root) = plan.source.root.and_then(|oid| plans.iter().find(|p| p.source.oid == oid)) {
            let (part, root) = (&plan.source.name, &root.source.name);
            findings.add(
                Problem::new(
                    SqlState::INVALID_PARAMETER_VALUE,
                    format!("table \"{part}\" is a partition of \"{root}\", which is mirrored too"),
                )
                .detail("Its rows are published as the other's.")
                .hint("Name one of the two."),
            );
        }
        match targets.get(&plan.target_name) {
            None if !mirror.options.create_tables || mirror.options.mode == Mode::StreamOnly => findings.add(
                Problem::new(
                    SqlState::UNDEFINED_TABLE,
                    format!("target table \"{}\" does not exist", plan.target_name),
                )
                .hint("Create it, or use create_tables = true and a mode that copies."),
            ),
            None => {}
            Some(_) if is_leftover(begun, plan, &targets) => {}
            Some(found) => {
                let filled = is_refillable(begun, plan);
                findings.check(plan.check_target(found));
                if found.has_rows
                    && !filled
                    && !mirror.options.truncate_target
                    && mirror.options.mode != Mode::StreamOnly
                {
                    findings.add(
                        Problem::new(
                            SqlState::WRONG_STATE,
                            format!("target table \"{}\" is not empty", plan.target_name),
                        )
                        .detail("The copy would add to its rows.")
                        .hint("Empty it, or create the mirror with truncate_target = true."),
                    );
                }
            }
        }
    }
    findings.into_result()?;
    Ok((plans, targets))
}

/// Returns whether the target table is the very one that an earlier attempt created and did not finish: it may be dropped. One of the
/// same name that somebody else made since is theirs.
fn is_leftover(begun: &Begun, plan: &TablePlan, targets: &Targets) -> bool {
    let created = begun.get(&plan.source.name).and_then(|b| b.created);
    created.is_some_and(|oid| targets.get(&plan.target_name).is_some_and(|t| t.oid == oid))
}

/// Returns whether a table that the mirror did not create holds rows of an earlier attempt of its own, and none of others: it was empty
/// when that attempt began.
fn is_refillable(begun: &Begun, plan: &TablePlan) -> bool {
    begun.get(&plan.source.name).is_some_and(|b| b.filled && b.created.is_none())
}

/// Runs statements on the target in one transaction, which fails if another process has taken the mirror over.
pub async fn run_fenced(context: &Context, target: &PeerSession, statements: &str) -> Result<(), Error> {
    target.run("begin").await?;
    progress_row::hold(target, &context.mirror.object_name, context.epoch).await?;
    target.run(statements).await?;
    target.run("commit").await
}

/// Locks the source's tables on a session of their own, and checks that they still are what they were when they were looked at.
async fn lock_tables(context: &Context, plans: &[TablePlan]) -> Result<PeerSession, Error> {
    let mirror = &context.mirror;
    let locks = PeerSession::open(&mirror.source_name, &mirror.source).await?;
    let names: Vec<String> = plans.iter().map(|p| p.source.name.quoted()).collect();
    locks.run(LOCK_TIMEOUT).await?;
    locks.run(&format!("begin; lock table {} in access share mode", names.join(", "))).await?;
    let mut findings = Findings::default();
    let locked = preflight::plan_tables(mirror, &locks, &mut findings).await?;
    findings.into_result()?;
    if !locked.iter().map(|p| &p.source).eq(plans.iter().map(|p| &p.source)) {
        let message = "tables of the source were changed before the copy began";
        return Err(Error::CopyAgain(Problem::new(SqlState::WRONG_STATE, message)));
    }
    Ok(locks)
}

/// Describes the targets of these tables, with each mirror's key known to them.
pub async fn describe_targets(target: &PeerSession, plans: &[TablePlan]) -> Result<Targets, Error> {
    let names: Vec<&TableName> = plans.iter().map(|p| &p.target_name).collect();
    let mut targets = target_tables(&target.client, &names).await.map_err(|e| target.error(&e))?;
    for plan in plans {
        if let Some(found) = targets.get_mut(&plan.target_name) {
            found.set_key(plan.key());
        }
    }
    Ok(targets)
}

/// Describes the built-in types and those of the tables' columns.
pub async fn column_types(source: &PeerSession, plans: &[TablePlan]) -> Result<Types, Error> {
    let oids: Vec<u32> = plans.iter().flat_map(|p| p.source.columns.iter().map(|c| c.type_oid)).collect();
    types(&source.client, &oids).await.map_err(|e| source.error(&e))
}

async fn remember_tables(context: &Context, plans: &[TablePlan]) -> Result<(), Error> {
    let rows: Vec<TableRow> = plans
        .iter()
        .map(|plan| TableRow {
            source: plan.source.name.clone(),
            target: plan.target_name.clone(),
            key_columns: plan.key().map(<[String]>::to_vec),
            warning: plan.warning(),
        })
        .collect();
    context.catalog.set_tables(context.mirror.id, &rows).await?;
    for plan in plans {
        let name = &plan.source.name;
        let event = match &plan.source.identity {
            RowIdentity::InsertsOnly => Event::warning("table", format!("only inserts into table \"{name}\" are replicated"))
                .detail("It has no primary key and no replica identity, so UPDATE and DELETE are not replicated.")
                .hint("Give it a primary key or a replica identity and create the mirror anew, if its rows are updated or deleted."),
            RowIdentity::WholeRow => Event::warning("table", format!("table \"{name}\" has no key"))
                .detail("For each UPDATE and DELETE the target is searched for one row that is the same, all of it without an index.")
                .hint("Give it a primary key, or an index on the target whose first column tells most rows apart."),
            RowIdentity::Key(_) => continue,
        };
        context.event(&event).await?;
    }
    Ok(())
}

/// Makes what the target lacks, and returns the tables that are the mirror's own making, those of earlier attempts included.
async fn make_tables(
    context: &Context,
    source: &PeerSession,
    target: &PeerSession,
    plans: &[TablePlan],
    targets: &Targets,
    begun: &Begun,
) -> Result<Vec<TableName>, Error> {
    let mut created = Vec::new();
    for plan in plans {
        if is_leftover(begun, plan, targets) {
            // Its keys and indexes would be in the way of the next copy.
            run_fenced(context, target, &format!("drop table {}", plan.target_name.quoted())).await?;
            created.push(plan);
        } else if !targets.contains_key(&plan.target_name) {
            created.push(plan);
        }
    }
    if created.is_empty() {
        return Ok(Vec::new());
    }
    let tables: Vec<_> = created.iter().map(|p| &p.source).collect();
    for prerequisite in ddl::prerequisites(&source.client, &tables).await.map_err(|e| source.error(&e))? {
        make_prerequisite(context, target, &prerequisite).await?;
    }
    for plan in &created {
        make_schema(target, &plan.target_name.schema).await?;
        create_table(context, target, plan).await?;
        for statement in ddl::set_defaults(plan) {
            // A default may call what the target does not have. Replicated rows bring their values, so it is no reason to stop.
            if let Err(Error::Blocked(problem)) = target.run(&statement).await {
                let event =
                    Event::warning("schema", format!("a default of target table \"{}\" was not set", plan.target_name))
                        .detail(format!("{}.", problem.message));
                context.event(&event).await?;
            }
        }
    }
    let names: Vec<TableName> = created.iter().map(|p| p.target_name.clone()).collect();
    context.event(&Event::info("schema", format!("{} tables created on the target", names.len()))).await?;
    Ok(names)
}

/// Creates a target table. Which one it is, is noted before it is there for others: what was not noted is never dropped.
async fn create_table(context: &Context, target: &PeerSession, plan: &TablePlan) -> Result<(), Error> {
    target.run("begin").await?;
    progress_row::hold(target, &context.mirror.object_name, context.epoch).await?;
    target.run(&ddl::create_table(plan)).await?;
    let query = "select pg_catalog.to_regclass($1)::oid";
    let row = target.client.query_one(query, &[&plan.target_name.quoted()]).await.map_err(|e| target.error(&e))?;
    fail_point!("target table created");
    context.catalog.set_table_created(context.mirror.id, &plan.source.name, row.get(0)).await?;
    fail_point!("target table noted");
    target.run("commit").await
}

async fn make_schema(target: &PeerSession, schema: &str) -> Result<(), Error> {
    let exists = "select exists (select from pg_catalog.pg_namespace where nspname = $1)";
    let row = target.client.query_one(exists, &[&schema]).await.map_err(|e| target.error(&e))?;
    if row.get(0) { Ok(()) } else { target.run(&format!("create schema if not exists {}", quote_ident(schema))).await }
}

async fn make_prerequisite(context: &Context, target: &PeerSession, prerequisite: &Prerequisite) -> Result<(), Error> {
    match prerequisite {
        Prerequisite::Extension(name, schema) => {
            let exists = "select exists (select from pg_catalog.pg_extension where extname = $1)";
            let row = target.client.query_one(exists, &[name]).await.map_err(|e| target.error(&e))?;
            if row.get(0) {
                return Ok(());
            }
            context.event(&Event::info("schema", format!("creating extension \"{name}\" on the target"))).await?;
            // Its types are named with the schema that they have on the source.
            make_schema(target, schema).await?;
            let schema = quote_ident(schema);
            target
                .run(&format!("create extension if not exists {} with schema {schema} cascade", quote_ident(name)))
                .await
        }
        Prerequisite::Object { kind, name, schema, statement } => {
            make_schema(target, schema).await?;
            let find = if *kind == "type" { "to_regtype" } else { "to_regclass" };
            let exists = format!("select pg_catalog.{find}($1) is not null");
            let row = target.client.query_one(&exists, &[name]).await.map_err(|e| target.error(&e))?;
            if row.get(0) { Ok(()) } else { target.run(statement).await }
        }
    }
}

/// Makes the slot while the locks are held, so that the snapshot shows the tables as they were looked at. A slot waits for older
/// transactions; if that takes long, one of them may wait for our locks, which are then given up: the copy finds rewrites out by itself.
async fn make_slot(
    context: &Context,
    replication: &mut ReplicationConnection,
    locks: PeerSession,
    with_snapshot: bool,
    source_version: u32,
) -> Result<CreatedSlot, Error> {
    let creation = replication.create_slot(&context.mirror.object_name, with_snapshot, source_version);
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

/// Empties the target tables that hold rows and may be emptied: those of earlier attempts, and with truncate_target whatever is there.
/// Together, so that foreign keys among them are no hindrance. A table that was filled by somebody else meanwhile stops the copy.
async fn empty_tables(
    context: &Context,
    target: &PeerSession,
    plans: &[TablePlan],
    created: &[TableName],
    begun: &Begun,
) -> Result<(), Error> {
    let targets = describe_targets(target, plans).await?;
    let mut names = Vec::new();
    for plan in plans {
        let Some(found) = targets.get(&plan.target_name).filter(|t| t.has_rows) else { continue };
        let ours = created.contains(&plan.target_name) || is_refillable(begun, plan);
        if !ours && !context.mirror.options.truncate_target {
            let message = format!("target table \"{}\" is not empty", plan.target_name);
            return Err(Error::Blocked(
                Problem::new(SqlState::WRONG_STATE, message).detail("It was filled after preflight."),
            ));
        }
        names.push(found.alone());
    }
    if names.is_empty() {
        Ok(())
    } else {
        run_fenced(context, target, &format!("truncate table {}", names.join(", "))).await
    }
}
