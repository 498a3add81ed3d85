//! Makes on a target what tables need besides themselves: schemas, extensions, types and sequences.

use pg::name::quote_ident;

use super::ddl::Prerequisite;
use crate::error::Error;
use crate::session::PeerSession;

/// Makes the schema unless it is there.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn schema(target: &PeerSession, schema: &str) -> Result<(), Error> {
    let exists = "select exists (select from pg_catalog.pg_namespace where nspname = $1)";
    let row = target.client.query_one(exists, &[&schema]).await.map_err(|e| target.error(&e))?;
    if row.get(0) { Ok(()) } else { target.run(&format!("create schema if not exists {}", quote_ident(schema))).await }
}

/// Makes what a table needs unless it is there, and returns whether it was made.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn prerequisite(target: &PeerSession, prerequisite: &Prerequisite) -> Result<bool, Error> {
    if exists(target, prerequisite).await? {
        return Ok(false);
    }
    match prerequisite {
        Prerequisite::Extension(name, in_schema) => {
            // Its types are named with the schema that they have on the source.
            schema(target, in_schema).await?;
            let in_schema = quote_ident(in_schema);
            let name = quote_ident(name);
            target.run(&format!("create extension if not exists {name} with schema {in_schema} cascade")).await?;
        }
        Prerequisite::Object { schema: in_schema, statement, .. } => {
            schema(target, in_schema).await?;
            target.run(statement).await?;
        }
    }
    Ok(true)
}

/// Returns whether the target has something of that name.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn exists(target: &PeerSession, prerequisite: &Prerequisite) -> Result<bool, Error> {
    let (exists, name) = match prerequisite {
        Prerequisite::Extension(name, _) => {
            ("select exists (select from pg_catalog.pg_extension where extname = $1)", name)
        }
        Prerequisite::Object { kind: "type", name, .. } => ("select pg_catalog.to_regtype($1) is not null", name),
        Prerequisite::Object { name, .. } => ("select pg_catalog.to_regclass($1) is not null", name),
    };
    Ok(target.client.query_one(exists, &[name]).await.map_err(|e| target.error(&e))?.get(0))
}
