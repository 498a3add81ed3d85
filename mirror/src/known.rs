//! A stream's tables as they are when it begins: what the target has of them, and what is there on both sides.

use std::collections::{BTreeSet, HashMap};

use catalog::event::Event;
use catalog::mirror::{Ddl, MirrorTable, RenamedTable};
use pg::{SqlState, TableName};

use crate::assemble::{Known, Tables};
use crate::bookkeeping;
use crate::enums;
use crate::error::{Error, Problem};
use crate::prepare::{self, builtin_types, column_types, describe_targets};
use crate::schema::{TablePlan, all_binary, change};
use crate::session::PeerSession;
use crate::sink::shapes::{self, Shape};
use crate::source::preflight::{Findings, plan_known_tables};
use crate::table_state::Route;
use crate::worker::Context;

/// From this version on, values may come in binary.
const BINARY: u32 = 140_000;

/// Which tables a stream takes.
pub struct Taken {
    /// By their names on the source and on the target.
    pub names: Vec<(TableName, TableName)>,
    /// See [`Tables::routes`].
    pub routes: HashMap<TableName, Route>,
    /// See [`Tables::others_come`].
    pub others_come: bool,
}

/// Looks at a stream's tables on both sides, as its rows will need to know them. `triggers_fire` says whether the target's do while rows
/// are written.
///
/// # Errors
/// [`Error::Blocked`] with all that keeps the target from taking the rows.
pub async fn look_up(
    context: &Context,
    source: &PeerSession,
    target: &PeerSession,
    triggers_fire: bool,
    taken: Taken,
) -> Result<Tables, Error> {
    let options = &context.mirror.options;
    let mut findings = Findings::default();
    let mut recorded: HashMap<TableName, Shape> = shapes::load(target, &context.mirror.object_name)
        .await?
        .into_iter()
        .filter(|shape| taken.routes.contains_key(&shape.listed))
        .map(|shape| (shape.listed.clone(), shape))
        .collect();
    let mut shapes = Vec::new();
    let mut unknown = Vec::new();
    for (listed, target_name) in taken.names {
        match recorded.remove(&listed) {
            Some(shape) => shapes.push(shape),
            None => unknown.push((listed, target_name)),
        }
    }
    // One that is not recorded yet is taken as it is on the source now.
    for plan in plan_known_tables(&context.mirror, source, &unknown, &mut findings).await? {
        let listed = plan.source.name.clone();
        shapes::record(target, &context.mirror.object_name, &listed, &plan).await?;
        shapes.push(Shape { listed, plan });
    }
    let plans: Vec<TablePlan> = shapes.iter().map(|s| s.plan.clone()).collect();
    bookkeeping::provide(context, target, &plans).await?;
    let targets = describe_targets(target, &plans, &options.bookkeeping).await?;
    for plan in &plans {
        bookkeeping::check(&options.bookkeeping, plan, targets.get(&plan.target_name), false, &mut findings);
        match targets.get(&plan.target_name) {
            // What it lacks is done without.
            Some(_) if options.ddl == Ddl::Ignore => {}
            Some(target) => findings.check(plan.check_target(target)),
            None => findings.add(Problem::new(
                SqlState::UNDEFINED_TABLE,
                format!("target table \"{}\" does not exist", plan.target_name),
            )),
        }
    }
    findings.into_result()?;
    let oids: Vec<u32> = plans.iter().flat_map(|p| p.source.columns.iter().map(|c| c.type_oid)).collect();
    enums::follow(context, source, target, &oids).await?;
    let types = column_types(source, &plans).await?;
    let builtin = builtin_types(target).await?;
    let binary = source.version >= BINARY
        && !context.values_come_as_text()
        && all_binary(&plans, &types, &targets, |oid| builtin.contains(&oid));
    let listed = prepare::known_tables(context).await?;
    let known = |shape: Shape| {
        let created = listed.get(&shape.listed).is_some_and(|t| t.created.is_some());
        let known = Known {
            indexes: created && options.copy_indexes,
            constraints: created && options.copy_constraints && !triggers_fire,
            listed: shape.listed,
            plan: shape.plan,
        };
        (known.plan.source.oid, known)
    };
    Ok(Tables {
        // Those that are not taken are told from others by their oids too, whatever they are called by now.
        known: recorded.into_values().chain(shapes).map(known).collect(),
        targets,
        types,
        binary,
        builtin,
        in_order: triggers_fire,
        ddl: options.ddl,
        routes: taken.routes,
        others_come: taken.others_come,
    })
}

impl Tables {
    /// Returns the tables that are taken, as they are on the source.
    pub fn plans(&self) -> Vec<TablePlan> {
        let is_taken = |known: &&Known| matches!(self.routes.get(&known.listed), Some(Route::From(_)));
        self.known.values().filter(is_taken).map(|known| known.plan.clone()).collect()
    }

    /// Returns the schemas whose operators are needed on the target.
    pub fn type_schemas(&self) -> BTreeSet<String> {
        self.targets.values().flat_map(|t| t.type_schemas.iter().cloned()).collect()
    }
}

/// Has the catalog know tables that were renamed by their new names, and the target's marks with it. Whatever dies in between, it is done
/// the next time: the catalog first, where it does not matter how often. Returns whether there were any.
///
/// # Errors
/// [`Error::Transient`] if the catalog or the target cannot be reached.
pub async fn follow_renames(context: &Context, target: &PeerSession) -> Result<bool, Error> {
    let mirror = &context.mirror;
    let mut shapes = shapes::load(target, &mirror.object_name).await?;
    shapes.retain(|shape| shape.listed != shape.plan.source.name);
    if shapes.is_empty() {
        return Ok(false);
    }
    let renamed = |shape: &Shape| RenamedTable {
        source_oid: shape.plan.source.oid,
        listed: shape.listed.clone(),
        source: shape.plan.source.name.clone(),
        target: shape.plan.target_name.clone(),
    };
    context.catalog.rename_tables(mirror.id, &shapes.iter().map(renamed).collect::<Vec<_>>()).await?;
    fail_point!("tables renamed in the catalog");
    target.run("begin").await?;
    shapes::list_by_new_names(target, &mirror.object_name).await?;
    target.run("commit").await?;
    for Shape { listed, plan } in &shapes {
        let event = Event::info("table", format!("table \"{listed}\" is now \"{}\"", plan.source.name));
        context.event(&event).await?;
    }
    Ok(true)
}

/// Has a table that was renamed on the source, and that no stream follows, go by its new name, on the target too if it is called alike
/// there. Returns whether it was.
///
/// # Errors
/// [`Error`] as the servers' SQLSTATE says.
pub async fn rename_unfollowed(
    context: &Context,
    source: &PeerSession,
    target: &PeerSession,
    table: &MirrorTable,
) -> Result<bool, Error> {
    let mirror = &context.mirror;
    let Some(oid) = table.source_oid else { return Ok(false) };
    let query = "select n.nspname::text, c.relname::text
                 from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = $1";
    let row = source.client.query_opt(query, &[&oid]).await.map_err(|e| source.error(&e))?;
    let now = row.map(|row| TableName { schema: row.get(0), name: row.get(1) });
    let Some(now) = now.filter(|now| *now != table.source) else { return Ok(false) };
    let (mut statements, name) = match mirror.options.ddl {
        Ddl::Apply => change::rename(&table.target, &table.source, &now),
        Ddl::Block | Ddl::Ignore => (Vec::new(), table.target.clone()),
    };
    let exists = "select pg_catalog.to_regclass($1) is not null";
    let row = target.client.query_one(exists, &[&table.target.quoted()]).await.map_err(|e| target.error(&e))?;
    if !row.get::<_, bool>(0) {
        statements.clear();
    }
    prepare::run_fenced(context, target, &statements.join("; ")).await?;
    fail_point!("late table renamed on the target");
    shapes::rename(target, &mirror.object_name, oid, &now, &name).await?;
    let listed = RenamedTable { source_oid: oid, listed: table.source.clone(), source: now, target: name };
    context.catalog.rename_tables(mirror.id, &[listed]).await?;
    follow_renames(context, target).await?;
    Ok(true)
}
