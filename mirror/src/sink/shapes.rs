//! What the target knows of the mirror's tables on the source: their columns' numbers, names and types, as of the mirror's position.
//!
//! Kept on the target, and written in the transaction that alters the table: whatever dies, the two agree. The source's catalogs tell of
//! now, which may be long after.

use catalog::mirror::ColumnChoice;
use pg::TableName;
use tokio_postgres::types::Json;

use super::marks;
use crate::error::Error;
use crate::schema::{SourceTable, TablePlan};
use crate::session::PeerSession;

/// What is made on the target, with the progress table.
pub(super) const SCHEMA: &str = "
    create table if not exists peergate.relations (
        mirror        text not null,
        source_oid    oid not null,
        listed_schema text not null,
        listed_name   text not null,
        target_schema text not null,
        target_name   text not null,
        only_columns  text[],
        left_out      text[] not null,
        shape         jsonb not null,
        primary key (mirror, source_oid)
    );
    comment on table  peergate.relations               is 'What the tables of each Peergate mirror look like on its source, as of the mirror''s position. Written in the same transaction as the rows.';
    comment on column peergate.relations.mirror        is 'The mirror''s object name, which its slot on the source has too.';
    comment on column peergate.relations.source_oid    is 'The table on the source.';
    comment on column peergate.relations.listed_schema is 'Schema by which the catalog knows it.';
    comment on column peergate.relations.listed_name   is 'Name by which the catalog knows it.';
    comment on column peergate.relations.target_schema is 'Schema of the table here.';
    comment on column peergate.relations.target_name   is 'Name of the table here.';
    comment on column peergate.relations.only_columns  is 'The mirror takes only these columns; NULL: all.';
    comment on column peergate.relations.left_out      is 'The mirror does not take these columns.';
    comment on column peergate.relations.shape         is 'Columns, keys, indexes and constraints on the source.';
";

/// A table as it was recorded.
#[derive(Clone, Debug)]
pub struct Shape {
    /// By which name the catalog knows it.
    pub listed: TableName,
    /// What it looks like on the source, and where it goes.
    pub plan: TablePlan,
}

/// Returns whether the target is one of any mirror, so that there is something to [`load`].
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn are_kept(target: &PeerSession) -> Result<bool, Error> {
    let query = "select pg_catalog.to_regclass('peergate.relations') is not null";
    Ok(target.client.query_one(query, &[]).await.map_err(|e| target.error(&e))?.get(0))
}

/// Returns the tables that are recorded for a mirror.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn load(target: &PeerSession, mirror: &str) -> Result<Vec<Shape>, Error> {
    let query = "select shape, listed_schema, listed_name, target_schema, target_name, only_columns, left_out
                 from peergate.relations where mirror = $1 order by source_oid";
    let rows = target.client.query(query, &[&mirror]).await.map_err(|e| target.error(&e))?;
    let name = |row: &tokio_postgres::Row, n: usize| TableName { schema: row.get(n), name: row.get(n + 1) };
    rows.iter()
        .map(|row| {
            let Json(source) = row.try_get::<_, Json<SourceTable>>(0).map_err(|e| target.error(&e))?;
            let columns = ColumnChoice { only: row.get(5), except: row.get(6) };
            // Which rows come is for the source's publication to say.
            let plan = TablePlan { source, target_name: name(row, 3), columns, condition: None };
            Ok(Shape { listed: name(row, 1), plan })
        })
        .collect()
}

/// Records a table, within the transaction of the session if there is one.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn record(target: &PeerSession, mirror: &str, listed: &TableName, plan: &TablePlan) -> Result<(), Error> {
    let statement = "
        insert into peergate.relations
            (mirror, source_oid, listed_schema, listed_name, target_schema, target_name, only_columns, left_out, shape)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        on conflict (mirror, source_oid) do update
        set listed_schema = excluded.listed_schema, listed_name = excluded.listed_name, target_schema = excluded.target_schema,
            target_name = excluded.target_name, only_columns = excluded.only_columns, left_out = excluded.left_out, shape = excluded.shape";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 9] = [
        &mirror,
        &plan.source.oid,
        &listed.schema,
        &listed.name,
        &plan.target_name.schema,
        &plan.target_name.name,
        &plan.columns.only,
        &plan.columns.except,
        &Json(&plan.source),
    ];
    target.client.execute(statement, &parameters).await.map_err(|e| target.error(&e))?;
    Ok(())
}

/// Records a table that was copied, as [`record`]. One that had its name before, and was dropped, is forgotten.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn record_copied(target: &PeerSession, mirror: &str, plan: &TablePlan) -> Result<(), Error> {
    let forget = "delete from peergate.relations where mirror = $1 and listed_schema = $2 and listed_name = $3 and source_oid <> $4";
    let TableName { schema, name } = &plan.source.name;
    let earlier: [&(dyn tokio_postgres::types::ToSql + Sync); 4] = [&mirror, schema, name, &plan.source.oid];
    target.client.execute(forget, &earlier).await.map_err(|e| target.error(&e))?;
    record(target, mirror, &plan.source.name, plan).await
}

/// Records that a table has other names, within the transaction of the session.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn rename(
    target: &PeerSession,
    mirror: &str,
    source_oid: u32,
    source: &TableName,
    target_name: &TableName,
) -> Result<(), Error> {
    let statement = "
        update peergate.relations
        set target_schema = $5, target_name = $6, shape = pg_catalog.jsonb_set(shape, '{name}', pg_catalog.jsonb_build_array($3::text, $4::text))
        where mirror = $1 and source_oid = $2";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
        [&mirror, &source_oid, &source.schema, &source.name, &target_name.schema, &target_name.name];
    target.client.execute(statement, &parameters).await.map_err(|e| target.error(&e))?;
    Ok(())
}

/// Lists tables by the names that they have on the source now, and their marks with them. Within the transaction of the session.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn list_by_new_names(target: &PeerSession, mirror: &str) -> Result<(), Error> {
    // A mark's name may pass to another table of these: they are taken away and made anew.
    let statement = "
        with renamed as (
            update peergate.relations r set listed_schema = r.shape -> 'name' ->> 0, listed_name = r.shape -> 'name' ->> 1
            from peergate.relations o
            where r.mirror = $1 and o.mirror = r.mirror and o.source_oid = r.source_oid
              and (r.listed_schema, r.listed_name) <> (r.shape -> 'name' ->> 0, r.shape -> 'name' ->> 1)
            returning o.listed_schema, o.listed_name, r.listed_schema as new_schema, r.listed_name as new_name
        )
        select m.from_lsn::text, n.new_schema, n.new_name, m.source_schema, m.source_name
        from renamed n join peergate.progress_tables m
            on m.mirror = $1 and (m.source_schema, m.source_name) = (n.listed_schema, n.listed_name)";
    let marks = target.client.query(statement, &[&mirror]).await.map_err(|e| target.error(&e))?;
    let remove = "delete from peergate.progress_tables where mirror = $1 and source_schema = $2 and source_name = $3";
    for row in &marks {
        let (schema, name): (&str, &str) = (row.get(3), row.get(4));
        target.client.execute(remove, &[&mirror, &schema, &name]).await.map_err(|e| target.error(&e))?;
    }
    for row in &marks {
        let from = row.get::<_, &str>(0).parse().map_err(|e| Error::protocol(&target.peer, e))?;
        marks::set(target, mirror, &[TableName { schema: row.get(1), name: row.get(2) }], from).await?;
    }
    Ok(())
}
