//! What a mirror would do: which tables it takes, what it would make where, how much there is to copy, and all that keeps it from working.
//! Both peers are looked at as preflight looks at them; nothing is made, and nothing is locked.

mod report;

use std::time::Instant;

use catalog::mirror::query::QueryMirror;
use catalog::mirror::{Mirror, MirrorTable, Mode, Selection};
use catalog::rehearsal::Rehearsal;
use pg::name::quote_ident;

pub use self::report::{Explanation, Object, Problem, Taken};
use crate::bookkeeping;
use crate::error::Error;
use crate::prepare::{self, Before, Known};
use crate::query::{self, source::become_reader};
use crate::schema::introspect::leaves;
use crate::schema::{TablePlan, ddl, make};
use crate::session::PeerSession;
use crate::source::condition;
use crate::source::preflight::{self, Findings};
use crate::start::check_root;
use crate::table_state::Fill;
use crate::wishes::{self, Difference};

/// Rows by which the speed of reading is measured.
const SAMPLE_ROWS: i64 = 20_000;

/// Nothing here may wait for long, whatever goes on there.
const LIMITS: &str = "set statement_timeout = '10s'; set lock_timeout = '2s'";

/// Works out what a mirror would do. A peer that cannot be reached or looked at is among the problems.
pub async fn explain(rehearsal: &Rehearsal) -> Explanation {
    let mut explanation = Explanation::new(rehearsal);
    if let Err(error) = look(rehearsal, &mut explanation).await {
        let problem = error.problem().map_or_else(|| Problem::error(error.to_string()), Problem::from);
        explanation.problems.push(problem);
    }
    explanation
}

async fn look(rehearsal: &Rehearsal, explanation: &mut Explanation) -> Result<(), Error> {
    if !rehearsal.takes_tables {
        return Ok(());
    }
    let mirror = &rehearsal.mirror;
    let source = PeerSession::open(&mirror.source_name, &mirror.source).await?;
    let target = PeerSession::open(&mirror.target_name, &mirror.target).await?;
    source.run(LIMITS).await?;
    target.run(LIMITS).await?;
    if let Some(query) = &mirror.query {
        return look_at_query(query, &source, &target, explanation).await;
    }
    let mut findings = Findings::default();
    let plans = if rehearsal.is_new {
        preflight::plan_tables(mirror, &source, &mut findings).await?
    } else {
        let Difference { added, removed } = difference(rehearsal, &source).await?;
        explanation.left_out = removed;
        let added = added.into_iter().map(|t| (t.source, t.target));
        let anew = rehearsal.tables.iter().filter(|t| rehearsal.resyncs.contains(&t.source));
        let taken: Vec<_> = added.chain(anew.map(|t| (t.source.clone(), t.target.clone()))).collect();
        preflight::plan_known_tables(mirror, &source, &taken, &mut findings).await?
    };
    preflight::check_source(&source, &plans, &mut findings).await?;
    condition::check(&source, &plans, &mut findings).await?;
    preflight::check_target(&target, &mut findings).await?;
    let is_anew = |table: &MirrorTable| rehearsal.resyncs.contains(&table.source);
    let known: Known = rehearsal
        .tables
        .iter()
        .map(|t| (t.source.clone(), MirrorTable { replaces: t.replaces || is_anew(t), ..t.clone() }))
        .collect();
    let before = Before::look(mirror, known, &source, &target, &plans).await?;
    let (mut created, mut columns) = (Vec::new(), Vec::new());
    for plan in &plans {
        if let Some(found) = before.targets.get(&plan.target_name).filter(|_| mirror.options.create_tables) {
            let missing = bookkeeping::missing(&mirror.options.bookkeeping, found);
            let name = |column: &str| format!("column {} of {}", quote_ident(column), plan.target_name);
            columns.extend(missing.into_iter().map(|column| Object::made(&mirror.target_name, name(column))));
        }
        findings.check(check_root(plan, &plans));
        let fill = prepare::decide(mirror, plan, &before, &mut findings).fill;
        let may_create = mirror.options.create_tables && mirror.options.mode != Mode::StreamOnly;
        let lacking = !may_create && !before.targets.contains_key(&plan.target_name);
        if fill.creates() && !lacking {
            created.push(plan);
        }
        let (all_rows, bytes) = size(&source, plan).await?;
        let rows = match plan.condition {
            Some(_) => chosen_rows(&source, plan).await.map(|rows| rows.min(all_rows.unwrap_or(i64::MAX))),
            None => all_rows,
        };
        let copied = mirror.options.mode != Mode::StreamOnly;
        explanation.tables.push(Taken {
            source: plan.source.name.clone(),
            target: plan.target_name.clone(),
            action: if lacking { "none" } else { action(fill, copied) },
            key: plan.key().map(<[String]>::to_vec),
            rows,
            all_rows,
            bytes: Some(bytes),
            copy_seconds: None,
            warning: plan.warning(),
        });
    }
    explanation.problems.extend(findings.into_problems().iter().map(Problem::from));
    list_objects(rehearsal, &source, &target, &created, explanation).await?;
    explanation.objects.extend(columns);
    if mirror.options.mode != Mode::StreamOnly {
        let rate = measure(&source, &plans, &explanation.tables).await?;
        explanation.estimate(rate, mirror.options.copy_parallel_workers);
    }
    Ok(())
}

/// A mirror of a query takes no tables: what is told is its target table, and what keeps it from working.
async fn look_at_query(
    query: &QueryMirror,
    source: &PeerSession,
    target: &PeerSession,
    explanation: &mut Explanation,
) -> Result<(), Error> {
    become_reader(source).await?;
    if query::preflight::try_out(query, source, target).await? {
        let name = format!("table {}", query.target.quoted());
        explanation.objects.push(Object { peer: target.peer.clone(), name });
    }
    Ok(())
}

/// The tables that come and go by the change of a mirror that there is.
async fn difference(rehearsal: &Rehearsal, source: &PeerSession) -> Result<Difference, Error> {
    match &rehearsal.mirror.selection {
        Selection::Tables(wanted) => Ok(wishes::difference(wanted, &rehearsal.tables)),
        selection => wishes::listed_difference(source, selection, &rehearsal.tables).await,
    }
}

/// What would be done with the target table.
fn action(fill: Fill, copied: bool) -> &'static str {
    match fill {
        Fill::Create | Fill::Recreate => "create and copy",
        Fill::Truncate => "empty and copy",
        Fill::Replace => "replace",
        Fill::Append if copied => "copy",
        Fill::Append => "stream",
    }
}

/// A table's rows, as the source estimates them, and its bytes.
async fn size(source: &PeerSession, plan: &TablePlan) -> Result<(Option<i64>, i64), Error> {
    let leaves = leaves(&source.client, plan.source.oid).await.map_err(|e| source.error(&e))?;
    let oids: Vec<u32> = leaves.iter().map(|leaf| leaf.oid).collect();
    // A table that was never analyzed has -1 there, or before PostgreSQL 14 zero.
    let query = "select case when pg_catalog.bool_and(c.reltuples >= 0 and (c.reltuples > 0 or c.relpages = 0))
                        then pg_catalog.sum(greatest(c.reltuples, 0))::int8 end
                 from pg_catalog.pg_class c where c.oid = any ($1)";
    let row = source.client.query_one(query, &[&oids]).await.map_err(|e| source.error(&e))?;
    let bytes = leaves.iter().map(|leaf| leaf.bytes).sum();
    Ok((if bytes == 0 { Some(0) } else { row.get(0) }, bytes))
}

/// How many rows of a table its condition takes, as the source's planner estimates it; `None` if it refuses the condition.
async fn chosen_rows(source: &PeerSession, plan: &TablePlan) -> Option<i64> {
    // Prepared, as conditions are when they are checked: the text can be one statement only.
    let explain = format!(
        "explain (format json) select from {} as {}{}",
        plan.source.name.quoted(),
        quote_ident(&plan.source.name.name),
        plan.where_clause()
    );
    let row = source.client.query_one(&explain, &[]).await.ok()?;
    let found: serde_json::Value = row.get(0);
    found[0]["Plan"]["Plan Rows"].as_f64().map(|rows| rows as i64)
}

/// What would be made besides the target tables themselves.
async fn list_objects(
    rehearsal: &Rehearsal,
    source: &PeerSession,
    target: &PeerSession,
    created: &[&TablePlan],
    explanation: &mut Explanation,
) -> Result<(), Error> {
    let Mirror { source_name, target_name, .. } = &rehearsal.mirror;
    let objects = &mut explanation.objects;
    if rehearsal.is_new {
        objects.push(Object::made(source_name, "publication"));
        objects.push(Object::made(source_name, "replication slot"));
        objects.push(Object::made(target_name, "progress row in schema peergate"));
    }
    let missing = "select distinct n.schema from unnest($1::text[]) n (schema)
                   where not exists (select from pg_catalog.pg_namespace p where p.nspname = n.schema) order by 1";
    let schemas: Vec<&str> = created.iter().map(|plan| plan.target_name.schema.as_str()).collect();
    for row in target.client.query(missing, &[&schemas]).await.map_err(|e| target.error(&e))? {
        objects.push(Object::made(target_name, format!("schema {}", quote_ident(row.get(0)))));
    }
    let tables: Vec<_> = created.iter().map(|plan| &plan.source).collect();
    for needed in ddl::prerequisites(&source.client, &tables).await.map_err(|e| source.error(&e))? {
        if !make::exists(target, &needed).await? {
            let what = match &needed {
                ddl::Prerequisite::Extension(name, _) => format!("extension {}", quote_ident(name)),
                ddl::Prerequisite::Object { kind, name, .. } => format!("{kind} {name}"),
            };
            objects.push(Object::made(target_name, what));
        }
    }
    Ok(())
}

/// Measures how many bytes a second a session reads from the source: the first rows of the largest table, as the copy would have them
/// written. `None` if there is nothing to read, or it may not be read.
async fn measure(source: &PeerSession, plans: &[TablePlan], tables: &[Taken]) -> Result<Option<f64>, Error> {
    let sizes = plans.iter().zip(tables);
    let Some((plan, taken)) = sizes.max_by_key(|(_, taken)| taken.bytes) else { return Ok(None) };
    let sample = format!(
        "select count(*), count(t::text) from (select * from {} limit {SAMPLE_ROWS}) t",
        plan.source.name.quoted()
    );
    let began = Instant::now();
    let Ok(row) = source.client.query_one(&sample, &[]).await else { return Ok(None) };
    let elapsed_s = began.elapsed().as_secs_f64().max(1e-6);
    let read: i64 = row.get(0);
    let rows = taken.all_rows.unwrap_or(0).max(read);
    if read == 0 || (read == SAMPLE_ROWS && taken.all_rows.is_none()) {
        return Ok(None);
    }
    Ok(Some(taken.bytes.unwrap_or(0) as f64 * read as f64 / rows as f64 / elapsed_s))
}
