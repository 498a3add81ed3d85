//! The publications of a mirror.
//!
//! There may be two: publishing UPDATE and DELETE of a table without replica identity would make the source refuse them to its own
//! users, so such tables are in one that publishes only what needs no identity.

use pg::name::quote_ident;

use crate::error::Error;
use crate::schema::{RowIdentity, TablePlan};
use crate::session::PeerSession;

/// Returns the names of a mirror's publications, those that it may have.
pub fn names(object_name: &str) -> [String; 2] {
    [object_name.to_owned(), format!("{object_name}_inserts")]
}

/// Makes the publications anew for these tables, and returns the names of those that there are.
///
/// To be done before the slot is made: a slot decodes with the catalogs of the past, in which a later publication does not exist.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn create(source: &PeerSession, object_name: &str, plans: &[TablePlan]) -> Result<Vec<String>, Error> {
    drop(source, object_name).await?;
    let [all, inserts] = names(object_name);
    let mut made = Vec::new();
    for (name, publish, only_inserts) in
        [(all, "insert, update, delete, truncate", false), (inserts, "insert, truncate", true)]
    {
        let tables: Vec<String> = plans
            .iter()
            .filter(|p| matches!(p.source.identity, RowIdentity::InsertsOnly) == only_inserts)
            .map(|p| p.source.name.quoted())
            .collect();
        if !tables.is_empty() {
            let statement = format!(
                "create publication {} for table {} with (publish = '{publish}', publish_via_partition_root = true)",
                quote_ident(&name),
                tables.join(", "),
            );
            source.run(&statement).await?;
            made.push(name);
        }
    }
    Ok(made)
}

/// Returns the names of the mirror's publications that are there.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn existing(source: &PeerSession, object_name: &str) -> Result<Vec<String>, Error> {
    let query = "select pubname::text from pg_catalog.pg_publication where pubname = any ($1) order by pubname";
    let names = names(object_name);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let rows = source.client.query(query, &[&names]).await.map_err(|e| source.error(&e))?;
    Ok(rows.iter().map(|r| r.get(0)).collect())
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
