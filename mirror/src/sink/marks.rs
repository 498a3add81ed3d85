//! Marks on the target: which tables of a mirror have a complete copy there, and from where on their changes come by the stream.
//!
//! A mark is committed after the table's rows, on the same server, so whatever dies, where there is a mark there are the rows. Restored
//! from a backup, both are what they were.

use std::collections::BTreeMap;

use pg::{Lsn, TableName};

use super::progress_row;
use crate::error::Error;
use crate::session::PeerSession;

/// What is made on the target, with the progress table.
pub(super) const SCHEMA: &str = "
    create table if not exists peergate.progress_tables (
        mirror        text not null,
        source_schema text not null,
        source_name   text not null,
        from_lsn      pg_lsn not null,
        primary key (mirror, source_schema, source_name)
    );
    comment on table  peergate.progress_tables               is 'Which tables of each Peergate mirror have a complete copy on this target. Written after the rows, by the mirror.';
    comment on column peergate.progress_tables.mirror        is 'The mirror''s object name, as in peergate.progress.';
    comment on column peergate.progress_tables.source_schema is 'Schema of the table on the source.';
    comment on column peergate.progress_tables.source_name   is 'Name of the table on the source.';
    comment on column peergate.progress_tables.from_lsn      is 'Changes that commit before this are in the copy; those after it come by the stream.';
";

/// Returns the tables that have a mark.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn read(target: &PeerSession, mirror: &str) -> Result<BTreeMap<TableName, Lsn>, Error> {
    let query = "select source_schema, source_name, from_lsn::text from peergate.progress_tables where mirror = $1";
    let rows = target.client.query(query, &[&mirror]).await.map_err(|e| target.error(&e))?;
    let mark = |row: &tokio_postgres::Row| {
        let from = row.get::<_, &str>(2).parse().map_err(|e| Error::protocol(&target.peer, e))?;
        Ok((TableName { schema: row.get(0), name: row.get(1) }, from))
    };
    rows.iter().map(mark).collect()
}

/// Marks tables as complete, within the transaction of the session.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn set(target: &PeerSession, mirror: &str, tables: &[TableName], from: Lsn) -> Result<(), Error> {
    let statement = "
        insert into peergate.progress_tables (mirror, source_schema, source_name, from_lsn)
        select $1, t.source_schema, t.source_name, $4::text::pg_lsn from unnest($2::text[], $3::text[]) t (source_schema, source_name)
        on conflict (mirror, source_schema, source_name) do update set from_lsn = excluded.from_lsn";
    let (schemas, names): (Vec<&str>, Vec<&str>) = tables.iter().map(|t| (t.schema.as_str(), t.name.as_str())).unzip();
    let from = from.to_string();
    target.client.execute(statement, &[&mirror, &schemas, &names, &from]).await.map_err(|e| target.error(&e))?;
    Ok(())
}

/// Takes the marks of tables away: from now on they have no copy that counts.
///
/// # Errors
/// [`Error::Fenced`] if another process has taken over.
pub async fn clear(
    target: &PeerSession,
    mirror: &str,
    lane: i32,
    epoch: i64,
    tables: &[TableName],
) -> Result<(), Error> {
    let statement = "
        delete from peergate.progress_tables p using unnest($2::text[], $3::text[]) t (source_schema, source_name)
        where p.mirror = $1 and p.source_schema = t.source_schema and p.source_name = t.source_name";
    let (schemas, names): (Vec<&str>, Vec<&str>) = tables.iter().map(|t| (t.schema.as_str(), t.name.as_str())).unzip();
    target.run("begin").await?;
    progress_row::hold(target, mirror, lane, epoch).await?;
    target.client.execute(statement, &[&mirror, &schemas, &names]).await.map_err(|e| target.error(&e))?;
    target.run("commit").await
}
