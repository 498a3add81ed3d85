//! Columns that only the target's tables have and the mirror writes: whether a row was deleted on the source, and when it was written last
//! (`soft_delete_column`, `synced_at_column`). Tables that the mirror creates are created with them; others get them.

use catalog::event::Event;
use catalog::mirror::Bookkeeping;
use pg::name::quote_ident;
use pg::{SqlState, TableName};

use crate::error::{Error, Problem};
use crate::prepare::{describe_targets, run_fenced};
use crate::relation::taken_name;
use crate::schema::{TablePlan, TargetTable};
use crate::session::PeerSession;
use crate::source::preflight::Findings;
use crate::worker::Context;

/// Types that a column may have which says when a row was written.
const TIMES: [&str; 2] = ["timestamp with time zone", "timestamp without time zone"];

/// Returns the columns with what follows their names in `CREATE TABLE`. They have defaults, so that a copy need not bring them.
pub fn definitions(bookkeeping: &Bookkeeping) -> impl Iterator<Item = (&str, &'static str)> {
    let Bookkeeping { soft_delete, synced_at } = bookkeeping;
    let mark = soft_delete.as_deref().map(|name| (name, "boolean not null default false"));
    let time = synced_at.as_deref().map(|name| (name, "timestamp with time zone not null default pg_catalog.now()"));
    mark.into_iter().chain(time)
}

/// Puts in `findings` what keeps a table from having these columns. With `may_add` it is no problem that they are missing. `target` is
/// the target table, if there is one.
pub fn check(
    bookkeeping: &Bookkeeping,
    plan: &TablePlan,
    target: Option<&TargetTable>,
    may_add: bool,
    findings: &mut Findings,
) {
    if let Some(column) = plan.replicated_columns().find(|c| bookkeeping.has(&c.name)) {
        findings.add(taken_name(&plan.source.name, &column.name));
        return;
    }
    let Some(target) = target else { return };
    let Bookkeeping { soft_delete, synced_at } = bookkeeping;
    for (name, types) in [(soft_delete, &["boolean"][..]), (synced_at, &TIMES[..])] {
        let Some(name) = name else { continue };
        match target.columns.iter().find(|c| c.name == *name) {
            Some(column) if types.contains(&column.type_sql.as_str()) && !column.generated => {}
            Some(column) => findings.add(
                Problem::new(
                    SqlState::DATATYPE_MISMATCH,
                    format!("column \"{name}\" of target table \"{}\" is {}", target.name, column.type_sql),
                )
                .detail(format!("The mirror writes it, as {}.", types[0]))
                .hint("Choose another soft_delete_column or synced_at_column."),
            ),
            None if may_add => {}
            None => findings.add(
                Problem::new(
                    SqlState::UNDEFINED_COLUMN,
                    format!("target table \"{}\" lacks column \"{name}\"", target.name),
                )
                .hint(format!("{}, or use create_tables = true.", add(&target.name, bookkeeping, &[name.as_str()]))),
            ),
        }
    }
    let other = target.unique_keys.iter().find(|columns| {
        let is_key = |key: &[String]| key.len() == columns.len() && columns.iter().all(|c| key.contains(c));
        !plan.key().is_some_and(is_key)
    });
    if let (Some(name), Some(other)) = (soft_delete, other) {
        findings.add(
            Problem::new(
                SqlState::WRONG_STATE,
                format!("target table \"{}\" has a unique index on ({})", target.name, other.join(", ")),
            )
            .detail("Rows that were deleted on the source stay, and would keep their values from being used again.")
            .hint(format!("Drop the index, or make it one WHERE NOT {}.", quote_ident(name))),
        );
    }
}

/// Adds the columns to the target tables that are there and lack them, unless the mirror makes nothing there.
///
/// # Errors
/// [`Error`] as the target's SQLSTATE says.
pub async fn provide(context: &Context, target: &PeerSession, plans: &[TablePlan]) -> Result<(), Error> {
    let options = &context.mirror.options;
    if options.bookkeeping == Bookkeeping::default() || !options.create_tables {
        return Ok(());
    }
    let targets = describe_targets(target, plans, &options.bookkeeping).await?;
    for plan in plans {
        let Some(found) = targets.get(&plan.target_name) else { continue };
        let missing = missing(&options.bookkeeping, found);
        if missing.is_empty() {
            continue;
        }
        run_fenced(context, target, &add(&plan.target_name, &options.bookkeeping, &missing)).await?;
        let message = format!("target table \"{}\" got column {}", plan.target_name, missing.join(", "));
        context.event(&Event::info("schema", message)).await?;
    }
    Ok(())
}

/// Returns which of these columns a target table lacks.
pub fn missing<'a>(bookkeeping: &'a Bookkeeping, target: &TargetTable) -> Vec<&'a str> {
    let is_missing = |name: &&str| !target.columns.iter().any(|c| c.name == *name);
    definitions(bookkeeping).map(|(name, _)| name).filter(is_missing).collect()
}

/// The statement that adds those of the columns that are named.
fn add(table: &TableName, bookkeeping: &Bookkeeping, names: &[&str]) -> String {
    let wanted = definitions(bookkeeping).filter(|(name, _)| names.contains(name));
    let columns: Vec<String> =
        wanted.map(|(name, definition)| format!("add column {} {definition}", quote_ident(name))).collect();
    format!("alter table {} {}", table.quoted(), columns.join(", "))
}
