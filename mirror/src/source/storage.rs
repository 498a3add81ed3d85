//! Asks the source which partitions brought rows along or lost some, as far as its rows and catalogs tell.

use pg::TableName;
use pg::name::quote_literal;
use tokio_postgres::{Client, Row};

use crate::schema::SourceTable;
use crate::schema::storage::{Doubt, bounds_gone, to_inspect};

/// A transaction number is older than this, which stands for the 64-bit number `{seen}`; as 32 bits tell nothing of what is further back
/// than half of them, nothing is older then. Both ages are of the same moment.
const OLDER: &str = "(pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::int8 - {seen} < 2000000000
    and pg_catalog.age({xid}) > pg_catalog.age(({seen} % 4294967296)::text::xid))";

fn older(xid: &str, known: &SourceTable) -> String {
    OLDER.replace("{xid}", xid).replace("{seen}", &known.storage.seen.to_string())
}

/// Looks at the partitions that are not as they were `known`. Everything that this sees was so when the table was as `now`, or later.
///
/// # Errors
/// Those of the server.
pub async fn doubts(
    client: &Client,
    known: &SourceTable,
    now: &SourceTable,
) -> Result<Vec<Doubt>, tokio_postgres::Error> {
    let (came, moved) = to_inspect(known, now);
    let gone = bounds_gone(known, now);
    let mut doubts = Vec::new();
    for oid in came {
        let Some((leaf, name)) = name(client, oid).await? else { continue };
        if came_with_rows(client, known, oid, &leaf).await? {
            doubts.push(Doubt::Came { name });
            continue;
        }
        for bound in &gone {
            if exists(client, &leaf, bound).await? {
                doubts.push(Doubt::Like { name: name.clone() });
                break;
            }
        }
    }
    for oid in moved {
        let Some((leaf, name)) = name(client, oid).await? else { continue };
        // Statements that write a table anew keep its rows' transaction numbers.
        if !exists(client, &leaf, &older("xmin", known)).await? {
            let row =
                client.query_opt("select xmin::text::int8 from pg_catalog.pg_class where oid = $1", &[&oid]).await?;
            let xid = row.map_or(0, |row| row.get::<_, i64>(0)) as u32;
            doubts.push(Doubt::Emptied { name, xid });
        }
    }
    Ok(doubts)
}

/// Returns a relation's name as SQL, and for people; `None` if it is gone by now.
async fn name(client: &Client, oid: u32) -> Result<Option<(String, String)>, tokio_postgres::Error> {
    let query = "select n.nspname::text, c.relname::text
                 from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where c.oid = $1";
    let row = client.query_opt(query, &[&oid]).await?;
    let name = |row: Row| TableName::new(row.get::<_, &str>(0), row.get::<_, &str>(1));
    Ok(row.map(name).map(|name| (name.quoted(), name.to_string())))
}

async fn exists(client: &Client, leaf: &str, condition: &str) -> Result<bool, tokio_postgres::Error> {
    let query = format!("select exists (select from only {leaf} where {condition})");
    Ok(client.query_one(&query, &[]).await?.get(0))
}

/// Returns whether a partition may have rows from before it was one. It has none if it was made as a partition, by a transaction that
/// wrote none itself: nobody else could before that had committed. An ancestor that was in its place before counts as well.
async fn came_with_rows(
    client: &Client,
    known: &SourceTable,
    oid: u32,
    leaf: &str,
) -> Result<bool, tokio_postgres::Error> {
    let query = format!(
        "select coalesce(bool_and({older} or i.xmin = t.xmin), false), array_agg(i.xmin::text) filter (where not {older})
         from pg_catalog.pg_partition_ancestors($1::oid::regclass) a
         join pg_catalog.pg_inherits i on i.inhrelid = a.relid
         join pg_catalog.pg_class c on c.oid = a.relid
         join pg_catalog.pg_type t on t.oid = c.reltype",
        older = older("i.xmin", known)
    );
    let row = client.query_one(&query, &[&oid]).await?;
    let (made_there, makers): (bool, Option<Vec<String>>) = (row.get(0), row.get(1));
    if !made_there {
        return exists(client, leaf, "true").await;
    }
    let makers: Vec<String> =
        makers.unwrap_or_default().iter().map(|xid| format!("{}::xid", quote_literal(xid).trim())).collect();
    exists(client, leaf, &format!("xmin = any (array[{}]::xid[])", makers.join(", "))).await
}
