//! The publications of a mirror.
//!
//! There may be two: publishing UPDATE and DELETE of a table without replica identity would make the source refuse them to its own
//! users, so such tables are in one that publishes only what needs no identity.

use pg::SqlState;
use pg::name::quote_ident;

use crate::error::{Error, Problem};
use crate::schema::{RowIdentity, TablePlan};
use crate::session::PeerSession;

/// Returns the names of a mirror's publications, those that it may have.
pub fn names(object_name: &str) -> [String; 2] {
    [object_name.to_owned(), format!("{object_name}_inserts")]
}

/// How long making a publication may wait for a lock; everybody else would queue behind us meanwhile.
const LOCK_TIMEOUT: &str = "set lock_timeout = '5s'";

/// The mirror's publications as they should be: name, whether only inserts are published, and the tables.
fn wanted<'a>(object_name: &str, plans: &'a [TablePlan]) -> Vec<(String, bool, Vec<&'a TablePlan>)> {
    let [all, inserts] = names(object_name);
    let of = |only_inserts: bool| -> Vec<&TablePlan> {
        plans.iter().filter(|p| matches!(p.source.identity, RowIdentity::InsertsOnly) == only_inserts).collect()
    };
    [(all, false, of(false)), (inserts, true, of(true))]
        .into_iter()
        .filter(|(_, _, tables)| !tables.is_empty())
        .collect()
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
        let tables: Vec<String> = tables.iter().map(|p| p.source.name.quoted()).collect();
        let publish = if only_inserts { "insert, truncate" } else { "insert, update, delete, truncate" };
        let statement = format!(
            "create publication {} for table only {} with (publish = '{publish}', publish_via_partition_root = true)",
            quote_ident(&name),
            tables.join(", only "),
        );
        source.run(&statement).await?;
    }
    marks(source, object_name, plans).await
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
    /// The mirror's tables.
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
                    .hint("Drop the mirror and create it anew: only a new copy helps."),
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
        source.run(&format!("drop publication if exists {}", quote_ident(&name))).await?;
    }
    Ok(())
}
