//! Makes target tables ready for their copy, and says which cannot be: creates what is missing, empties what may be emptied, and makes a
//! stage for rows that are to be replaced.

use std::collections::{BTreeMap, HashSet};

use catalog::event::Event;
use catalog::mirror::{MirrorTable, Mode};
use pg::name::quote_ident;
use pg::{SqlState, TableName};

use crate::copy::Targets;
use crate::error::{Error, Problem};
use crate::schema::ddl::{self, Prerequisite};
use crate::schema::introspect::{target_tables, types};
use crate::schema::{TablePlan, Types};
use crate::session::PeerSession;
use crate::sink::progress_row;
use crate::source::preflight::Findings;
use crate::table_state::{Fill, Found, TableState, how_to_fill};
use crate::worker::Context;

/// What the catalog knows of the tables, by name on the source.
pub type Known = BTreeMap<TableName, MirrorTable>;

/// How each table is filled, by name on the source.
pub type Fills = BTreeMap<TableName, Fill>;

/// Returns what the catalog knows of the mirror's tables.
///
/// # Errors
/// [`Error::Transient`] if the catalog cannot be reached.
pub async fn known_tables(context: &Context) -> Result<Known, Error> {
    let tables = context.catalog.mirror_tables(context.mirror.id).await?;
    Ok(tables.into_iter().map(|t| (t.source.clone(), t)).collect())
}

/// Decides how a table is filled. What keeps the target from taking its rows, or rows there that are not the mirror's, is put in
/// `findings`.
pub fn decide(context: &Context, plan: &TablePlan, targets: &Targets, known: &Known, findings: &mut Findings) -> Fill {
    let options = &context.mirror.options;
    let target = targets.get(&plan.target_name);
    let table = known.get(&plan.source.name);
    let begun = |t: &MirrorTable| {
        use TableState::{Catchup, Copied, Copying, Indexing};
        matches!(TableState::from_name(&t.state), Some(Copying | Indexing | Copied | Catchup))
    };
    let found = Found {
        oid: target.map(|t| t.oid),
        has_rows: target.is_some_and(|t| t.has_rows),
        created: table.and_then(|t| t.created),
        begun: table.is_some_and(begun),
        replaces: table.is_some_and(|t| t.replaces),
    };
    let name = &plan.target_name;
    let fill = if options.mode == Mode::StreamOnly && target.is_some() {
        // What is there stays, whosever it is.
        Some(Fill::Append)
    } else {
        how_to_fill(&found, options.truncate_target)
    };
    match target {
        Some(target) if fill != Some(Fill::Recreate) => findings.check(plan.check_target(target)),
        Some(_) => {}
        None if !options.create_tables || options.mode == Mode::StreamOnly => findings.add(
            Problem::new(SqlState::UNDEFINED_TABLE, format!("target table \"{name}\" does not exist"))
                .hint("Create it, or use create_tables = true and a mode that copies."),
        ),
        None => {}
    }
    if fill.is_none() {
        findings.add(
            Problem::new(SqlState::WRONG_STATE, format!("target table \"{name}\" is not empty"))
                .detail("The copy would add to its rows.")
                .hint("Empty it, or create the mirror with truncate_target = true."),
        );
    }
    fill.unwrap_or(Fill::Append)
}

/// Runs statements on the target in one transaction, which fails if another process has taken the mirror over.
///
/// # Errors
/// [`Error::Fenced`] then; else as the server's SQLSTATE says, and the session can go on.
pub async fn run_fenced(context: &Context, target: &PeerSession, statements: &str) -> Result<(), Error> {
    let result = async {
        target.run("begin").await?;
        progress_row::hold(target, &context.mirror.object_name, context.lane, context.epoch).await?;
        target.run(statements).await?;
        target.run("commit").await
    };
    undo_if_refused(target, result.await).await
}

/// Ends the transaction of a statement that the server refused, so that the session can go on.
async fn undo_if_refused(target: &PeerSession, result: Result<(), Error>) -> Result<(), Error> {
    if let Err(Error::Blocked(_)) = result {
        target.run("rollback").await?;
    }
    result
}

/// Describes the targets of these tables, with each mirror's key known to them.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn describe_targets(target: &PeerSession, plans: &[TablePlan]) -> Result<Targets, Error> {
    let names: Vec<&TableName> = plans.iter().map(|p| &p.target_name).collect();
    let mut targets = target_tables(&target.client, &names, target.version).await.map_err(|e| target.error(&e))?;
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
    types(&source.client, &oids, source.version).await.map_err(|e| source.error(&e))
}

/// Returns the built-in types that a server has.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn builtin_types(server: &PeerSession) -> Result<HashSet<u32>, Error> {
    let types = types(&server.client, &[], server.version).await.map_err(|e| server.error(&e))?;
    Ok(types.into_values().filter(|t| t.builtin).map(|t| t.oid).collect())
}

/// Makes what the target lacks of these tables; their own unfinished ones are dropped before.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn make_tables(
    context: &Context,
    source: &PeerSession,
    target: &PeerSession,
    plans: &[TablePlan],
    fills: &Fills,
) -> Result<(), Error> {
    let mut created = Vec::new();
    for plan in plans {
        let fill = fills.get(&plan.source.name).copied();
        if fill == Some(Fill::Recreate) {
            // Its keys and indexes would be in the way of the next copy.
            run_fenced(context, target, &format!("drop table {}", plan.target_name.quoted())).await?;
        }
        if fill.is_some_and(Fill::creates) {
            created.push(plan);
        }
    }
    if created.is_empty() {
        return Ok(());
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
    context.event(&Event::info("schema", format!("{} tables created on the target", created.len()))).await
}

/// Creates a target table. Which one it is, is noted before it is there for others: what was not noted is never dropped.
async fn create_table(context: &Context, target: &PeerSession, plan: &TablePlan) -> Result<(), Error> {
    let result = async {
        target.run("begin").await?;
        progress_row::hold(target, &context.mirror.object_name, context.lane, context.epoch).await?;
        target.run(&ddl::create_table(plan)).await?;
        let query = "select pg_catalog.to_regclass($1)::oid";
        let row = target.client.query_one(query, &[&plan.target_name.quoted()]).await.map_err(|e| target.error(&e))?;
        fail_point!("target table created");
        context.catalog.set_table_created(context.mirror.id, &plan.source.name, row.get(0)).await?;
        fail_point!("target table noted");
        target.run("commit").await
    };
    undo_if_refused(target, result.await).await
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

/// Empties the target tables that hold rows and may be emptied, together, so that foreign keys among them are no hindrance; makes a
/// stage for those whose rows are to be replaced. A table that was filled by somebody else meanwhile stops the copy.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn empty_tables(
    context: &Context,
    target: &PeerSession,
    plans: &[TablePlan],
    fills: &Fills,
) -> Result<(), Error> {
    let targets = describe_targets(target, plans).await?;
    let mut names = Vec::new();
    for plan in plans {
        let Some(found) = targets.get(&plan.target_name).filter(|t| t.has_rows) else { continue };
        match fills.get(&plan.source.name) {
            Some(Fill::Create | Fill::Recreate | Fill::Truncate) => names.push(found.alone()),
            Some(Fill::Replace) => run_fenced(context, target, &make_stage(context, plan)).await?,
            Some(Fill::Append) | None => {
                let message = format!("target table \"{}\" is not empty", plan.target_name);
                return Err(Error::Blocked(
                    Problem::new(SqlState::WRONG_STATE, message).detail("It was filled after preflight."),
                ));
            }
        }
    }
    if names.is_empty() {
        Ok(())
    } else {
        run_fenced(context, target, &format!("truncate table {}", names.join(", "))).await
    }
}

/// Makes an empty table like the target's columns that are copied; one of an earlier attempt goes first.
fn make_stage(context: &Context, plan: &TablePlan) -> String {
    let stage = progress_row::stage_table(&context.mirror.object_name, plan.source.oid);
    let columns: Vec<String> = plan.replicated_columns().map(|c| quote_ident(&c.name)).collect();
    format!(
        "drop table if exists {stage}; create table {stage} as select {} from {} with no data",
        columns.join(", "),
        plan.target_name.quoted()
    )
}
