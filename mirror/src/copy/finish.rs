//! What is done with a table whose rows are all on the target: keys and indexes, or the place of the rows that were there before.

use std::sync::Arc;

use catalog::event::Event;
use pg::SqlState;
use pg::name::quote_ident;

use super::{Job, Shared, in_table};
use crate::batch::Alter;
use crate::error::{Error, Problem};
use crate::prepare::run_fenced;
use crate::schema::{RowIdentity, SourceIndex, TablePlan, TargetTable, ddl};
use crate::session::PeerSession;
use crate::sink::{alter, marks, progress_row, shapes};
use crate::table_state::TableState;
use crate::worker::Context;

/// What replaces a table's rows, in one transaction.
pub(super) struct Replace {
    /// What takes those away that are there.
    pub(super) delete: String,
    /// What makes the target like its source has become.
    pub(super) reshape: Option<Arc<Alter>>,
    /// What puts the staged ones there.
    pub(super) insert: String,
}

/// Where rows that were deleted on the source stay: marks those of the target that are not in the stage, and takes those away that are.
/// Without a key rows cannot be told apart: those that are there go, and those that are marked stay. `None` where they do not stay.
pub(super) fn bury_missing(plan: &TablePlan, target: &TargetTable, stage: &str) -> Option<String> {
    let mark = target.bookkeeping.soft_delete.as_ref().map(|name| quote_ident(name))?;
    let alone = target.alone();
    let Some(key) = plan.key() else { return Some(format!("delete from {alone} t where t.{mark} is not true")) };
    let same: Vec<String> = key.iter().map(|c| quote_ident(c)).map(|c| format!("t.{c} = s.{c}")).collect();
    let same = same.join(" and ");
    let time = target.bookkeeping.synced_at.as_ref();
    let time = time.map(|name| format!(", {} = pg_catalog.now()", quote_ident(name))).unwrap_or_default();
    Some(format!(
        "update {alone} t set {mark} = true{time} where t.{mark} is not true and not exists (select from {stage} s where {same});
         delete from {alone} t using {stage} s where {same}"
    ))
}

/// Makes keys and indexes of a table whose rows are all there, or puts them in the place of the old ones; lets the target look at them,
/// and marks the table as complete.
pub(super) async fn finish_table(
    shared: &Shared,
    job: &Job,
    target: &PeerSession,
    triggers_fire: bool,
) -> Result<(), Error> {
    let name = &job.plan.source.name;
    let Context { catalog, mirror, .. } = &shared.context;
    catalog.set_table_states(mirror.id, std::slice::from_ref(name), TableState::Indexing.as_str()).await?;
    if let Some(replace) = &job.replace {
        if triggers_fire {
            let message = format!("the rows of target table \"{}\" cannot be replaced", job.plan.target_name);
            return Err(Error::Blocked(
                Problem::new(SqlState::INSUFFICIENT_PRIVILEGE, message)
                    .detail("The target's role may not set session_replication_role, so triggers and foreign keys would take more rows with them.")
                    .hint("GRANT SET ON PARAMETER session_replication_role (PostgreSQL 15 and later), or use a superuser; or empty the table yourself."),
            ));
        }
        fail_point!("stage filled");
        replace_rows(&shared.context, target, replace).await.map_err(|e| in_table(&job.plan.target_name, e))?;
        fail_point!("rows replaced");
    }
    if job.make_indexes {
        let indexes_too = shared.context.mirror.options.copy_indexes;
        // Without a key deletes are not replicated, and a value that was deleted may come again.
        let unique_too = !matches!(job.plan.source.identity, RowIdentity::InsertsOnly);
        let wanted = |i: &&SourceIndex| i.primary || i.identity || (indexes_too && (unique_too || !i.unique));
        for index in job.plan.source.indexes.iter().filter(wanted) {
            let softly = shared.context.mirror.options.bookkeeping.soft_delete.is_some();
            let statement = ddl::create_index(&job.plan.target_name, index, softly);
            let needed = (index.primary && !softly) || index.identity;
            if let Err(error) = make_index(&shared.context, target, &statement, &index.name).await {
                match error {
                    Error::Blocked(problem) if !needed => {
                        let event =
                            Event::warning("schema", format!("index \"{}\" was not created on the target", index.name))
                                .detail(format!("{}.", problem.message));
                        shared.context.event(&event).await?;
                    }
                    other => return Err(in_table(&job.plan.target_name, other)),
                }
            }
        }
    }
    fail_point!("indexes made");
    target.run(&format!("analyze {}", job.plan.target_name.quoted())).await?;
    if let Some(at) = shared.snapshot.mark_at {
        let mirror = &mirror.object_name;
        target.run("begin").await?;
        progress_row::hold(target, mirror, shared.context.lane, shared.context.epoch).await?;
        shapes::record_copied(target, mirror, &job.plan).await?;
        marks::set(target, mirror, std::slice::from_ref(name), at).await?;
        target.run("commit").await?;
        fail_point!("table marked");
    }
    catalog.set_table_states(mirror.id, std::slice::from_ref(name), TableState::Copied.as_str()).await?;
    Ok(())
}

/// Puts the staged rows in the place of those that are there, in a table that looks like its source from then on.
async fn replace_rows(context: &Context, target: &PeerSession, replace: &Replace) -> Result<(), Error> {
    let mirror = &context.mirror.object_name;
    target.run("begin").await?;
    progress_row::hold(target, mirror, context.lane, context.epoch).await?;
    target.run(&replace.delete).await?;
    let events = match &replace.reshape {
        Some(reshape) => alter::run(target, mirror, reshape).await?,
        None => Vec::new(),
    };
    target.run(&replace.insert).await?;
    target.run("commit").await?;
    for event in &events {
        context.event(event).await?;
    }
    Ok(())
}

/// An index's name is one of its schema's names, and may be taken there by another table's index: then the target chooses one.
async fn make_index(context: &Context, target: &PeerSession, statement: &str, name: &str) -> Result<(), Error> {
    match run_fenced(context, target, statement).await {
        Err(Error::Blocked(problem)) if problem.sqlstate.as_str() == "42P07" => {
            let quoted = quote_ident(name);
            let unnamed = statement.replacen(&format!("add constraint {quoted} "), "add ", 1).replacen(
                &format!("index {quoted} on"),
                "index on",
                1,
            );
            run_fenced(context, target, &unnamed).await
        }
        other => other,
    }
}
