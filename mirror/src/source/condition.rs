//! Checks which rows a mirror is to take of a table (`WHERE`), before anything is made.
//!
//! The source's publication evaluates the condition, so that rows which come to fulfil it arrive as inserted and those which cease to as
//! deleted; the copy reads by the same text.

use pg::SqlState;
use pg::name::quote_ident;

use crate::error::{Error, Problem};
use crate::schema::{RowIdentity, TablePlan};
use crate::session::PeerSession;
use crate::source::preflight::Findings;
use crate::source::publication::FILTERS_SINCE;

/// Columns of a trial's condition that the table's replica identity has not: with them in it, the source would refuse its users' UPDATE
/// and DELETE.
///
/// Source: PostgreSQL docs, logical-replication-row-filter, "Row Filter Rules".
const OUTSIDE_IDENTITY: &str = "
    select a.attname::text
    from pg_catalog.pg_publication p
        join pg_catalog.pg_publication_rel r on r.prpubid = p.oid
        join pg_catalog.pg_class c on c.oid = r.prrelid
        join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_publication_rel'::pg_catalog.regclass and d.objid = r.oid
                                   and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.refobjid = c.oid
        join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = d.refobjsubid
    where p.pubname = $1 and c.relreplident <> 'f'
        and not exists (select from pg_catalog.pg_index i
                        where i.indrelid = c.oid and a.attnum = any (i.indkey::int2[])
                              and case c.relreplident when 'd' then i.indisprimary when 'i' then i.indisreplident end)
    order by a.attnum";

/// Puts in `findings` what is wrong with the conditions of these tables. `source` must not be in a transaction.
///
/// # Errors
/// [`Error`] of what has nothing to do with them, such as a broken connection.
pub async fn check(source: &PeerSession, plans: &[TablePlan], findings: &mut Findings) -> Result<(), Error> {
    for plan in plans.iter().filter(|plan| plan.condition.is_some()) {
        let name = &plan.source.name;
        if source.version < FILTERS_SINCE {
            findings.add(
                Problem::new(
                    SqlState::FEATURE_NOT_SUPPORTED,
                    format!("table \"{name}\" has a row filter, which peer \"{}\" cannot evaluate", source.peer),
                )
                .detail("Publications have row filters from PostgreSQL 15 on."),
            );
            continue;
        }
        source.run("begin").await?;
        let tried = try_out(source, plan).await;
        source.run("rollback").await?;
        match tried {
            Ok(outside) => findings.check(inside_identity(plan, &outside)),
            Err(Error::Blocked(problem)) => {
                findings.add(Problem {
                    message: format!("row filter of table \"{name}\": {}", problem.message),
                    ..problem
                });
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads by the condition, and publishes by it in a transaction that is undone. Returns its columns outside of the replica identity.
async fn try_out(source: &PeerSession, plan: &TablePlan) -> Result<Vec<String>, Error> {
    let (table, condition) = (plan.source.name.quoted(), plan.where_clause());
    // Prepared, which takes one statement: a text that ends the condition and begins another statement gets no further.
    let select = format!("select from only {table} as {}{condition}", quote_ident(&plan.source.name.name));
    source.client.prepare(&select).await.map_err(|e| source.error(&e))?;
    let trial = format!("peergate_trial_{:016x}", rand::random::<u64>());
    let publication = format!(
        "create publication {} for table only {table}{condition} with (publish_via_partition_root = true)",
        quote_ident(&trial)
    );
    source.run(&publication).await?;
    let outside = source.client.query(OUTSIDE_IDENTITY, &[&trial]).await.map_err(|e| source.error(&e))?;
    Ok(outside.iter().map(|row| row.get(0)).collect())
}

/// Checks that updates and deletes of the table will not be refused.
fn inside_identity(plan: &TablePlan, outside: &[String]) -> Result<(), Problem> {
    let Some(column) = outside.first().filter(|_| !matches!(plan.source.identity, RowIdentity::InsertsOnly)) else {
        return Ok(());
    };
    let name = &plan.source.name;
    let what = format!("row filter of table \"{name}\" has column \"{column}\", which its replica identity has not");
    Err(Problem::new(SqlState::WRONG_STATE, what)
        .detail("The source would refuse each UPDATE and DELETE of the table.")
        .hint(format!("ALTER TABLE {} REPLICA IDENTITY FULL lets rows be told apart by all columns.", name.quoted())))
}
