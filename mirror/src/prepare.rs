//! Makes target tables ready for their copy, and says which cannot be: creates what is missing, empties what may be emptied, and makes a
//! stage for rows that are to be replaced.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use catalog::event::Event;
use catalog::mirror::{Bookkeeping, Ddl, Mirror, MirrorTable, Mode};
use pg::name::quote_ident;
use pg::{SqlState, TableName};

use crate::batch::Alter;
use crate::bookkeeping;
use crate::copy::Targets;
use crate::error::{Error, Problem};
use crate::schema::change::{self, Alteration, Surroundings};
use crate::schema::ddl::{self, Prerequisite};
use crate::schema::introspect::{target_tables, types};
use crate::schema::{SourceColumn, TablePlan, TargetTable, Types, make};
use crate::session::PeerSession;
use crate::sink::shapes::{self, Shape};
use crate::sink::{alter, progress_row};
use crate::source::preflight::Findings;
use crate::table_state::{Fill, Found, TableState, how_to_fill};
use crate::worker::Context;

/// What the catalog knows of the tables, by name on the source.
pub type Known = BTreeMap<TableName, MirrorTable>;

/// How a table is filled.
#[derive(Clone, Debug)]
pub struct Filling {
    /// How the target table is made ready.
    pub fill: Fill,
    /// What makes it like its source has become since its last copy.
    pub reshape: Option<Arc<Alter>>,
}

/// How each table is filled, by name on the source.
pub type Fills = BTreeMap<TableName, Filling>;

/// What is known of tables before they are made ready.
pub struct Before {
    /// Their targets.
    pub targets: Targets,
    /// The source's types.
    pub types: Types,
    /// What the catalog knows of the mirror's tables.
    pub known: Known,
    /// What tables looked like that were copied before, by the name that the catalog knows.
    pub shapes: BTreeMap<TableName, Shape>,
}

impl Before {
    /// Looks at both sides. `known` is what the catalog knows.
    ///
    /// # Errors
    /// [`Error`] as the servers' SQLSTATE says.
    pub async fn look(
        mirror: &Mirror,
        known: Known,
        source: &PeerSession,
        target: &PeerSession,
        plans: &[TablePlan],
    ) -> Result<Before, Error> {
        // A target of no mirror has no such table.
        let shapes =
            if shapes::are_kept(target).await? { shapes::load(target, &mirror.object_name).await? } else { Vec::new() };
        Ok(Before {
            targets: describe_targets(target, plans, &mirror.options.bookkeeping).await?,
            types: column_types(source, plans).await?,
            known,
            shapes: shapes.into_iter().map(|shape| (shape.listed.clone(), shape)).collect(),
        })
    }
}

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
pub fn decide(mirror: &Mirror, plan: &TablePlan, before: &Before, findings: &mut Findings) -> Filling {
    let options = &mirror.options;
    let target = before.targets.get(&plan.target_name);
    let table = before.known.get(&plan.source.name);
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
    bookkeeping::check(&options.bookkeeping, plan, target, options.create_tables, findings);
    let mut altered = None;
    match target {
        Some(target) if fill != Some(Fill::Recreate) => {
            altered = table.filter(|t| t.replaces).and_then(|table| reshape(mirror, plan, target, table, before));
            findings.check(plan.check_target(altered.as_ref().map_or(target, |altered| &altered.target)));
        }
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
    let alter = |altered: Alteration| {
        let told: Vec<&str> = altered.statements.iter().map(|s| s.sql.as_str()).collect();
        let message = format!("table \"{}\" was altered as on the source: {}", plan.source.name, told.join("; "));
        Arc::new(Alter {
            listed: plan.source.name.clone(),
            prerequisites: Vec::new(),
            events: vec![Event::info("schema", message)],
            statements: altered.statements,
            plan: plan.clone(),
        })
    };
    Filling { fill: fill.unwrap_or(Fill::Append), reshape: altered.map(alter) }
}

/// Works out what makes a target table, which has a complete copy, like its source has become since; `None` if there is nothing to do.
fn reshape(
    mirror: &Mirror,
    plan: &TablePlan,
    target: &TargetTable,
    table: &MirrorTable,
    before: &Before,
) -> Option<Alteration> {
    let options = &mirror.options;
    let shape = before.shapes.get(&plan.source.name).filter(|_| options.ddl == Ddl::Apply)?;
    let created = table.created.is_some();
    let earlier = TablePlan {
        source: change::as_earlier(&shape.plan.source, &plan.source),
        target_name: plan.target_name.clone(),
        columns: plan.columns.clone(),
        condition: plan.condition.clone(),
    };
    let around = Surroundings {
        types: &before.types,
        rewritten: false,
        rows_gone: &[],
        emptied: false,
        replaced: true,
        indexes: created && options.copy_indexes,
        constraints: created && options.copy_constraints,
        target_of: &|oid| target_of(&before.known, oid),
    };
    change::alter(&earlier, &plan.source, target, &around).ok().filter(|altered| !altered.statements.is_empty())
}

/// Returns the target of one of the mirror's tables, by its oid on the source.
fn target_of(known: &Known, oid: u32) -> Option<TableName> {
    known.values().find(|table| table.source_oid == Some(oid)).map(|table| table.target.clone())
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

/// Describes the targets of these tables, with each mirror's key and own columns known to them.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn describe_targets(
    target: &PeerSession,
    plans: &[TablePlan],
    bookkeeping: &Bookkeeping,
) -> Result<Targets, Error> {
    let names: Vec<&TableName> = plans.iter().map(|p| &p.target_name).collect();
    let mut targets = target_tables(&target.client, &names, target.version).await.map_err(|e| target.error(&e))?;
    for plan in plans {
        if let Some(found) = targets.get_mut(&plan.target_name) {
            found.set_key(plan.key());
            found.bookkeeping = bookkeeping.clone();
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
    let (mut created, mut changed) = (Vec::new(), Vec::new());
    for plan in plans {
        let Some(Filling { fill, reshape }) = fills.get(&plan.source.name) else { continue };
        if *fill == Fill::Recreate {
            // Its keys and indexes would be in the way of the next copy.
            run_fenced(context, target, &format!("drop table {}", plan.target_name.quoted())).await?;
        }
        if fill.creates() {
            created.push(plan);
        }
        if fill.creates() || reshape.is_some() {
            changed.push(&plan.source);
        }
    }
    if changed.is_empty() {
        return Ok(());
    }
    for prerequisite in ddl::prerequisites(&source.client, &changed).await.map_err(|e| source.error(&e))? {
        if make::prerequisite(target, &prerequisite).await?
            && let Prerequisite::Extension(name, _) = &prerequisite
        {
            context.event(&Event::info("schema", format!("extension \"{name}\" created on the target"))).await?;
        }
    }
    if created.is_empty() {
        return Ok(());
    }
    for plan in &created {
        make::schema(target, &plan.target_name.schema).await?;
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
        target.run(&ddl::create_table(plan, &context.mirror.options.bookkeeping)).await?;
        let query = "select pg_catalog.to_regclass($1)::oid";
        let row = target.client.query_one(query, &[&plan.target_name.quoted()]).await.map_err(|e| target.error(&e))?;
        fail_point!("target table created");
        context.catalog.set_table_created(context.mirror.id, &plan.source.name, row.get(0)).await?;
        fail_point!("target table noted");
        target.run("commit").await
    };
    undo_if_refused(target, result.await).await
}

/// Makes the CHECK and foreign key constraints of the tables that the mirror created. The rows that are there were checked by the source.
///
/// # Errors
/// [`Error`] as the target's SQLSTATE says; what it refuses is told.
pub async fn add_constraints(
    context: &Context,
    target: &PeerSession,
    triggers_fire: bool,
    plans: &[TablePlan],
    fills: &Fills,
) -> Result<(), Error> {
    if !context.mirror.options.copy_constraints {
        return Ok(());
    }
    let known = known_tables(context).await?;
    for plan in plans.iter().filter(|p| fills.get(&p.source.name).is_some_and(|f| f.fill.creates())) {
        for constraint in &plan.source.constraints {
            let what =
                format!("constraint \"{}\" of target table \"{}\" was not made", constraint.name, plan.target_name);
            let fires = constraint.references.is_some() && triggers_fire;
            let problem = match ddl::add_constraint(&plan.target_name, constraint, |oid| target_of(&known, oid)) {
                None => "The mirror does not take the table that it references.".to_owned(),
                // Its actions would do on the target what the source has done and sends.
                Some(_) if fires => {
                    "Foreign keys fire on the target, as the role may not set session_replication_role.".to_owned()
                }
                Some(statement) => match run_fenced(context, target, &statement).await {
                    Err(Error::Blocked(problem)) => format!("{}.", problem.message),
                    result => {
                        result?;
                        continue;
                    }
                },
            };
            context.event(&Event::warning("schema", what).detail(problem)).await?;
        }
    }
    Ok(())
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
    bookkeeping::provide(context, target, plans).await?;
    let targets = describe_targets(target, plans, &context.mirror.options.bookkeeping).await?;
    let mut names = Vec::new();
    for plan in plans {
        let Some(Filling { fill, reshape }) = fills.get(&plan.source.name) else { continue };
        if let (Fill::Append, Some(reshape)) = (fill, reshape) {
            alter_empty(context, target, reshape).await?;
        }
        let Some(found) = targets.get(&plan.target_name).filter(|t| t.has_rows) else { continue };
        match fill {
            Fill::Create | Fill::Recreate | Fill::Truncate => names.push(found.alone()),
            Fill::Replace => run_fenced(context, target, &make_stage(context, plan, reshape.is_some())).await?,
            Fill::Append => {
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

/// Alters a table that holds no rows.
async fn alter_empty(context: &Context, target: &PeerSession, reshape: &Alter) -> Result<(), Error> {
    let mirror = &context.mirror.object_name;
    let altering = async {
        target.run("begin").await?;
        progress_row::hold(target, mirror, context.lane, context.epoch).await?;
        let events = alter::run(target, mirror, reshape).await?;
        target.run("commit").await?;
        Ok(events)
    };
    match altering.await {
        Ok(events) => {
            for event in &events {
                context.event(event).await?;
            }
            Ok(())
        }
        Err(error) => undo_if_refused(target, Err(error)).await,
    }
}

/// Makes an empty table like the target's columns that are copied, or like the source's, which the target's are to become; one of an
/// earlier attempt goes first.
fn make_stage(context: &Context, plan: &TablePlan, like_source: bool) -> String {
    let stage = progress_row::stage_table(&context.mirror.object_name, plan.source.oid);
    let columns = |typed: bool| {
        let column = |c: &SourceColumn| {
            let name = quote_ident(&c.name);
            if typed { format!("{name} {}", c.type_sql) } else { name }
        };
        plan.replicated_columns().map(column).collect::<Vec<_>>().join(", ")
    };
    let made = if like_source {
        format!("({})", columns(true))
    } else {
        format!("as select {} from {} with no data", columns(false), plan.target_name.quoted())
    };
    format!("drop table if exists {stage}; create table {stage} {made}")
}
