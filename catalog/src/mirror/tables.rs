//! What the engine reports of a mirror's tables.

use std::collections::BTreeMap;

use pg::TableName;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::{Catalog, Error};

/// What the engine reports of one table.
#[derive(Clone, Debug, Default)]
pub struct TableStatus {
    /// State, or `None` to leave it.
    pub state: Option<&'static str>,
    /// Size on the source in bytes when the copy began.
    pub bytes_total: Option<i64>,
    /// Bytes copied.
    pub bytes_copied: Option<i64>,
    /// Rows copied.
    pub rows_copied: Option<i64>,
    /// Part copied, from 0 to 1.
    pub copy_fraction: Option<f64>,
    /// Rows inserted, updated and deleted, and truncates, since the last report.
    pub changes: [i64; 4],
}

/// What is known of a table before it is copied.
#[derive(Clone, Debug)]
pub struct TableRow {
    /// On the source.
    pub source: TableName,
    /// On the target.
    pub target: TableName,
    /// Columns by which rows are found on the target.
    pub key_columns: Option<Vec<String>>,
    /// What a person should know.
    pub warning: Option<String>,
}

/// What an attempt has done with a table, as it was noted *before* it was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BegunTable {
    /// Oid of the target table that the mirror created; `None`: it created none.
    pub created: Option<u32>,
    /// The mirror has written rows to it.
    pub filled: bool,
}

impl Catalog {
    /// Returns the mirror's tables, by source name, that an attempt has begun with.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn begun_tables(&self, mirror_id: i64) -> Result<BTreeMap<TableName, BegunTable>, Error> {
        let query =
            "select source_schema, source_name, created_oid, state <> 'pending' from peergate.mirror_table_runtime
                     where mirror_id = $1 and (state <> 'pending' or created_oid is not null)";
        let rows = self.client().await?.query(query, &[&mirror_id]).await?;
        let begun = |row: Row| {
            let name = TableName { schema: row.get(0), name: row.get(1) };
            (name, BegunTable { created: row.get(2), filled: row.get(3) })
        };
        Ok(rows.into_iter().map(begun).collect())
    }

    /// Returns the mirror's tables: name on the source, name on the target.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn table_names(&self, mirror_id: i64) -> Result<Vec<(TableName, TableName)>, Error> {
        let query = "select source_schema, source_name, target_schema, target_name from peergate.mirror_table_runtime
                     where mirror_id = $1 order by 1, 2";
        let rows = self.client().await?.query(query, &[&mirror_id]).await?;
        let names = |row: &Row| {
            let name = |schema: usize| TableName { schema: row.get(schema), name: row.get(schema + 1) };
            (name(0), name(2))
        };
        Ok(rows.iter().map(names).collect())
    }

    /// Makes the mirror's table rows what they should be: missing ones are added, those of other tables removed.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_tables(&self, mirror_id: i64, tables: &[TableRow]) -> Result<(), Error> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let remove = "delete from peergate.mirror_table_runtime where mirror_id = $1
                      and (source_schema, source_name) not in (select * from unnest($2::text[], $3::text[]))";
        let schemas: Vec<&str> = tables.iter().map(|t| t.source.schema.as_str()).collect();
        let names: Vec<&str> = tables.iter().map(|t| t.source.name.as_str()).collect();
        transaction.execute(remove, &[&mirror_id, &schemas, &names]).await?;
        let add = "
            insert into peergate.mirror_table_runtime (mirror_id, source_schema, source_name, target_schema, target_name, key_columns, warning)
            values ($1, $2, $3, $4, $5, $6, $7)
            on conflict (mirror_id, source_schema, source_name) do update
            set target_schema = excluded.target_schema, target_name = excluded.target_name, key_columns = excluded.key_columns,
                warning = excluded.warning, updated_at = clock_timestamp()";
        let add = transaction.prepare(add).await?;
        for table in tables {
            let (source, target) = (&table.source, &table.target);
            let parameters: [&(dyn ToSql + Sync); 7] = [
                &mirror_id,
                &source.schema,
                &source.name,
                &target.schema,
                &target.name,
                &table.key_columns,
                &table.warning,
            ];
            transaction.execute(&add, &parameters).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Notes which table the mirror is creating on the target, before that is committed there: a restart knows that it may drop it.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_table_created(&self, mirror_id: i64, source: &TableName, oid: u32) -> Result<(), Error> {
        let statement = "update peergate.mirror_table_runtime set created_oid = $4
                         where mirror_id = $1 and source_schema = $2 and source_name = $3";
        self.execute(statement, &[&mirror_id, &source.schema, &source.name, &oid]).await?;
        Ok(())
    }

    /// Writes how tables stand, in one statement.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_table_status(&self, mirror_id: i64, tables: &[(TableName, TableStatus)]) -> Result<(), Error> {
        if tables.is_empty() {
            return Ok(());
        }
        let statement = "
            update peergate.mirror_table_runtime t
            set state = coalesce(n.state, t.state), bytes_total = coalesce(n.bytes_total, t.bytes_total),
                bytes_copied = coalesce(n.bytes_copied, t.bytes_copied), rows_copied = coalesce(n.rows_copied, t.rows_copied),
                copy_fraction = coalesce(n.copy_fraction, t.copy_fraction), rows_inserted = t.rows_inserted + n.inserted,
                rows_updated = t.rows_updated + n.updated, rows_deleted = t.rows_deleted + n.deleted,
                truncates = t.truncates + n.truncates, updated_at = clock_timestamp()
            from unnest($2::text[], $3::text[], $4::text[], $5::int8[], $6::int8[], $7::int8[], $8::float8[],
                        $9::int8[], $10::int8[], $11::int8[], $12::int8[])
                 as n (source_schema, source_name, state, bytes_total, bytes_copied, rows_copied, copy_fraction,
                       inserted, updated, deleted, truncates)
            where t.mirror_id = $1 and t.source_schema = n.source_schema and t.source_name = n.source_name";
        fn column<T>(tables: &[(TableName, TableStatus)], value: impl Fn(&(TableName, TableStatus)) -> T) -> Vec<T> {
            tables.iter().map(value).collect()
        }
        let changes = |kind: usize| column(tables, move |(_, s)| s.changes[kind]);
        let parameters: [&(dyn ToSql + Sync); 12] = [
            &mirror_id,
            &column(tables, |(n, _)| n.schema.clone()),
            &column(tables, |(n, _)| n.name.clone()),
            &column(tables, |(_, s)| s.state),
            &column(tables, |(_, s)| s.bytes_total),
            &column(tables, |(_, s)| s.bytes_copied),
            &column(tables, |(_, s)| s.rows_copied),
            &column(tables, |(_, s)| s.copy_fraction),
            &changes(0),
            &changes(1),
            &changes(2),
            &changes(3),
        ];
        self.execute(statement, &parameters).await?;
        Ok(())
    }

    /// Puts all tables of a mirror into one state.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_all_tables_state(&self, mirror_id: i64, state: &str) -> Result<(), Error> {
        let statement = "update peergate.mirror_table_runtime set state = $2, updated_at = clock_timestamp()
                         where mirror_id = $1 and state <> $2";
        self.execute(statement, &[&mirror_id, &state]).await?;
        Ok(())
    }
}
