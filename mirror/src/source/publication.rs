//! The publications of a mirror.
//!
//! There may be two: publishing UPDATE and DELETE of a table without replica identity would make the source refuse them to its own
//! users, so such tables are in one that publishes only what needs no identity.

use pg::name::quote_ident;
use pg::{SqlState, TableName};

use crate::error::{Error, Problem};
use crate::schema::{RowIdentity, TablePlan};
use crate::session::PeerSession;

/// Returns the names of a mirror's publications. Both are always there: a stream names them when it begins, and a table that comes later
/// may need either.
pub fn names(object_name: &str) -> [String; 2] {
    [object_name.to_owned(), format!("{object_name}_inserts")]
}

/// Publications have row filters from this version on.
pub const FILTERS_SINCE: u32 = 150_000;

/// How long making a publication may wait for a lock; everybody else would queue behind us meanwhile.
const LOCK_TIMEOUT: &str = "set lock_timeout = '5s'";

/// The mirror's publications as they should be: name, whether only inserts are published, and the tables.
fn wanted<'a>(object_name: &str, plans: &'a [TablePlan]) -> Vec<(String, bool, Vec<&'a TablePlan>)> {
    let [all, inserts] = names(object_name);
    let of = |only_inserts: bool| -> Vec<&TablePlan> {
        plans.iter().filter(|p| matches!(p.source.identity, RowIdentity::InsertsOnly) == only_inserts).collect()
    };
    vec![(all, false, of(false)), (inserts, true, of(true))]
}

/// Makes the publications anew for these tables, and returns the [`marks`] of what was made.
///
/// To be done before the slot is made: a slot decodes with the catalogs of the past, in which a later publication does not exist.
/// Children of a table are not part of it (ONLY): they may lack the identity that publishing their updates needs.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn create(source: &PeerSession, object_name: &str, plans: &[TablePlan]) -> Result<Vec<u32>, Error> {
    source.run(LOCK_TIMEOUT).await?;
    drop(source, object_name).await?;
    for (name, only_inserts, tables) in wanted(object_name, plans) {
        let tables: Vec<String> = tables.iter().map(|p| p.source.name.quoted() + &p.where_clause()).collect();
        let publish = if only_inserts { "insert, truncate" } else { "insert, update, delete, truncate" };
        let tables =
            if tables.is_empty() { String::new() } else { format!(" for table only {}", tables.join(", only ")) };
        let statement = format!(
            "create publication {}{tables} with (publish = '{publish}', publish_via_partition_root = true)",
            quote_ident(&name),
        );
        source.run(&statement).await?;
    }
    marks(source, object_name, plans).await
}

/// Adds a table to the publication that it belongs to, unless it is there; with its row filter as it is now.
///
/// To be done before the slot of its copy is made: then every transaction that the copy lacks has begun with the table published.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn add(source: &PeerSession, object_name: &str, plan: &TablePlan) -> Result<(), Error> {
    let [all, inserts] = names(object_name);
    let name = if matches!(plan.source.identity, RowIdentity::InsertsOnly) { inserts } else { all };
    let (publication, table) = (quote_ident(&name), plan.source.name.quoted());
    let add = format!("alter publication {publication} add table only {table}{}", plan.where_clause());
    let add = if !is_member(source, &name, plan.source.oid).await? {
        add
    } else if plan.condition.is_some() || is_filtered(source, &name, plan.source.oid).await? {
        // In one transaction, so that nothing is published by another filter or none.
        format!("begin; alter publication {publication} drop table only {table}; {add}; commit")
    } else {
        return Ok(());
    };
    source.run(LOCK_TIMEOUT).await?;
    let added = source.run(&add).await;
    if added.is_err() {
        source.run("rollback").await?;
    }
    added
}

/// Takes a table out of the publications, if it is there.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn remove(source: &PeerSession, object_name: &str, table: &TableName) -> Result<(), Error> {
    let query = "select c.oid from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where n.nspname = $1 and c.relname = $2";
    let row = source.client.query_opt(query, &[&table.schema, &table.name]).await.map_err(|e| source.error(&e))?;
    let Some(oid) = row.map(|r| r.get::<_, u32>(0)) else { return Ok(()) };
    for name in names(object_name) {
        if is_member(source, &name, oid).await? {
            source.run(LOCK_TIMEOUT).await?;
            let statement = format!("alter publication {} drop table only {}", quote_ident(&name), table.quoted());
            source.run(&statement).await?;
        }
    }
    Ok(())
}

async fn is_member(source: &PeerSession, publication: &str, table: u32) -> Result<bool, Error> {
    let query = "
        select exists (select from pg_catalog.pg_publication_rel r join pg_catalog.pg_publication p on p.oid = r.prpubid
                       where p.pubname = $1 and r.prrelid = $2)";
    Ok(source.client.query_one(query, &[&publication, &table]).await.map_err(|e| source.error(&e))?.get(0))
}

/// Returns whether a publication has a row filter for the table. There are none before version 15.
async fn is_filtered(source: &PeerSession, publication: &str, table: u32) -> Result<bool, Error> {
    if source.version < FILTERS_SINCE {
        return Ok(false);
    }
    let query = "
        select exists (select from pg_catalog.pg_publication_rel r join pg_catalog.pg_publication p on p.oid = r.prpubid
                       where p.pubname = $1 and r.prrelid = $2 and r.prqual is not null)";
    Ok(source.client.query_one(query, &[&publication, &table]).await.map_err(|e| source.error(&e))?.get(0))
}

/// Returns numbers by which the publications, and these tables' membership in them, are known again: oids, and the xid that wrote each
/// publication. What was altered and altered back in the meantime has others, and did not publish everything in between. To be stored
/// with the mirror whenever it changes its publications itself.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn marks(source: &PeerSession, object_name: &str, plans: &[TablePlan]) -> Result<Vec<u32>, Error> {
    let query = "
        select p.oid from pg_catalog.pg_publication p where p.pubname = any ($1)
        union select p.xmin::text::int8::oid from pg_catalog.pg_publication p where p.pubname = any ($1)
        union select r.oid from pg_catalog.pg_publication_rel r join pg_catalog.pg_publication p on p.oid = r.prpubid
              where p.pubname = any ($1) and r.prrelid = any ($2)";
    let names = names(object_name);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let tables: Vec<u32> = plans.iter().map(|p| p.source.oid).collect();
    let rows = source.client.query(query, &[&names, &tables]).await.map_err(|e| source.error(&e))?;
    Ok(rows.iter().map(|r| r.get(0)).collect())
}

/// The publications as they were made: what is compared with what there is.
pub struct Expected {
    /// The mirror's object name.
    pub object_name: String,
    /// Their [`marks`].
    pub made: Vec<u32>,
    /// The tables that stream.
    pub plans: Vec<TablePlan>,
}

impl Expected {
    /// Checks that the publications are those that were made, and publish the tables and all that they should of them; returns their
    /// names. A table that was dropped and made again is another one, and not published; one that is gone sends nothing any more.
    ///
    /// # Errors
    /// [`Error::ResyncRequired`] if not: what was not published meanwhile will never come.
    pub async fn check(&self, source: &PeerSession) -> Result<Vec<String>, Error> {
        let changed = |what: String| {
            Error::ResyncRequired(
                Problem::new(SqlState::WRONG_STATE, what)
                    .detail("What it did not publish meanwhile will not come.")
                    .hint("RESYNC MIRROR copies everything anew; nothing less helps."),
            )
        };
        let object_name = &self.object_name;
        let query = "
            select p.pubinsert and p.pubtruncate and ($2 or (p.pubupdate and p.pubdelete)) and p.pubviaroot and not p.puballtables,
                   array(select r.prrelid from pg_catalog.pg_publication_rel r where r.prpubid = p.oid)
            from pg_catalog.pg_publication p where p.pubname = $1";
        let exists = "select pg_catalog.to_regclass($1) is not null";
        let mut names = Vec::new();
        for (name, only_inserts, tables) in wanted(object_name, &self.plans) {
            let row = source.client.query_opt(query, &[&name, &only_inserts]).await.map_err(|e| source.error(&e))?;
            let Some(row) = row else {
                return Err(changed(format!("publication \"{name}\" does not exist on the source")));
            };
            let (whole, published): (bool, Vec<u32>) = (row.get(0), row.get(1));
            if !whole {
                return Err(changed(format!("publication \"{name}\" was altered on the source")));
            }
            for missing in tables.iter().filter(|t| !published.contains(&t.source.oid)) {
                let table = &missing.source.name;
                let row = source.client.query_one(exists, &[&table.quoted()]).await.map_err(|e| source.error(&e))?;
                if row.get(0) {
                    return Err(changed(format!("table \"{table}\" is no longer published by \"{name}\"")));
                }
            }
            names.push(name);
        }
        // A table that is gone is missed by nobody, so there may be fewer.
        if !marks(source, object_name, &self.plans).await?.iter().all(|mark| self.made.contains(mark)) {
            let what = "was dropped and made anew, or altered and altered back, on the source";
            return Err(changed(format!("publication \"{object_name}\" {what}")));
        }
        Ok(names)
    }
}

/// Removes the publications, if they are there.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn drop(source: &PeerSession, object_name: &str) -> Result<(), Error> {
    for name in names(object_name) {
        // A standby refuses to drop what is not there, too.
        let exists = "select exists (select from pg_catalog.pg_publication where pubname = $1)";
        if source.client.query_one(exists, &[&name]).await.map_err(|e| source.error(&e))?.get(0) {
            source.run(&format!("drop publication if exists {}", quote_ident(&name))).await?;
        }
    }
    Ok(())
}
