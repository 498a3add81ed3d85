//! What the engine reports of a mirror's tables.

use pg::{Lsn, TableName};
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use super::Failure;
use crate::{Catalog, Error};

/// What the engine reports of one table.
#[derive(Clone, Debug, Default)]
pub struct TableStatus {
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

/// A table that was renamed.
#[derive(Clone, Debug)]
pub struct RenamedTable {
    /// Its oid on the source.
    pub source_oid: u32,
    /// By which name it was known here.
    pub listed: TableName,
    /// Its name on the source now.
    pub source: TableName,
    /// Its name on the target now.
    pub target: TableName,
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
    /// Its oid on the source, if it was looked at.
    pub source_oid: Option<u32>,
}

/// A table of a mirror, as the catalog knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorTable {
    /// On the source.
    pub source: TableName,
    /// On the target.
    pub target: TableName,
    /// Its state.
    pub state: String,
    /// Oid of the target table that the mirror created, noted *before* it was created; `None`: it created none.
    pub created: Option<u32>,
    /// The target table holds rows of an earlier, complete copy, which a new copy replaces.
    pub replaces: bool,
    /// Its oid on the source, if it was looked at.
    pub source_oid: Option<u32>,
}

/// Reads tables of the mirror `$1`.
const TABLES: &str = "
    select source_schema, source_name, target_schema, target_name, state, created_oid, replaces, source_oid
    from peergate.mirror_table_runtime where mirror_id = $1";

fn mirror_table(row: &Row) -> MirrorTable {
    let name = |schema: usize| TableName { schema: row.get(schema), name: row.get(schema + 1) };
    MirrorTable {
        source: name(0),
        target: name(2),
        state: row.get(4),
        created: row.get(5),
        replaces: row.get(6),
        source_oid: row.get(7),
    }
}

impl Catalog {
    /// Returns the mirror's tables, by name on the source.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn mirror_tables(&self, mirror_id: i64) -> Result<Vec<MirrorTable>, Error> {
        let tables = format!("{TABLES} order by 1, 2");
        Ok(self.client().await?.query(&tables, &[&mirror_id]).await?.iter().map(mirror_table).collect())
    }

    /// Returns the tables that have no complete copy and are to get one.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn late_tables(&self, mirror_id: i64) -> Result<Vec<MirrorTable>, Error> {
        let tables = format!("{TABLES} and from_lsn is null and state not in ('blocked', 'removed') order by 1, 2");
        Ok(self.client().await?.query(&tables, &[&mirror_id]).await?.iter().map(mirror_table).collect())
    }

    /// Removes the rows of all tables but these.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn keep_tables(&self, mirror_id: i64, tables: &[TableName]) -> Result<(), Error> {
        let remove = "delete from peergate.mirror_table_runtime where mirror_id = $1
                      and (source_schema, source_name) not in (select * from unnest($2::text[], $3::text[]))";
        let (schemas, names) = split(tables);
        self.execute(remove, &[&mirror_id, &schemas, &names]).await?;
        Ok(())
    }

    /// Stores what is known of tables before they are copied; rows that are missing are added.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_tables(&self, mirror_id: i64, tables: &[TableRow]) -> Result<(), Error> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let add = "
            insert into peergate.mirror_table_runtime as t (mirror_id, source_schema, source_name, target_schema, target_name, key_columns, warning, source_oid)
            values ($1, $2, $3, $4, $5, $6, $7, $8)
            on conflict (mirror_id, source_schema, source_name) do update
            set created_oid = case when (t.target_schema, t.target_name) = (excluded.target_schema, excluded.target_name) then t.created_oid end,
                replaces = t.replaces and (t.target_schema, t.target_name) = (excluded.target_schema, excluded.target_name),
                target_schema = excluded.target_schema, target_name = excluded.target_name, key_columns = excluded.key_columns,
                warning = excluded.warning, source_oid = coalesce(excluded.source_oid, t.source_oid), updated_at = clock_timestamp()";
        let add = transaction.prepare(add).await?;
        for table in tables {
            let (source, target) = (&table.source, &table.target);
            let parameters: [&(dyn ToSql + Sync); 8] = [
                &mirror_id,
                &source.schema,
                &source.name,
                &target.schema,
                &target.name,
                &table.key_columns,
                &table.warning,
                &table.source_oid,
            ];
            transaction.execute(&add, &parameters).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Tables of the mirror have other names now, which may pass from table to table. What the mirror was asked to take names them by
    /// those too. Can be repeated.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn rename_tables(&self, mirror_id: i64, tables: &[RenamedTable]) -> Result<(), Error> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let find = "update peergate.mirror_table_runtime set source_oid = $4
                    where mirror_id = $1 and source_schema = $2 and source_name = $3 and source_oid is null";
        // A name may be that of the next: out of the way first, but what has its name already.
        let aside = "update peergate.mirror_table_runtime
                     set source_schema = '', source_name = 'renamed ' || source_oid, target_schema = '', target_name = 'renamed ' || source_oid
                     where mirror_id = $1 and source_schema = $2 and source_name = $3 and source_oid = $4";
        let rename = "update peergate.mirror_table_runtime
                      set source_schema = $3, source_name = $4, target_schema = $5, target_name = $6, updated_at = clock_timestamp()
                      where mirror_id = $1 and source_oid = $2";
        let mut renamed = Vec::new();
        for table in tables {
            let listed: [&(dyn ToSql + Sync); 4] =
                [&mirror_id, &table.listed.schema, &table.listed.name, &table.source_oid];
            transaction.execute(find, &listed).await?;
            if transaction.execute(aside, &listed).await? > 0 {
                renamed.push(table);
            }
        }
        for RenamedTable { source_oid, source, target, .. } in &renamed {
            let names: [&(dyn ToSql + Sync); 6] =
                [&mirror_id, source_oid, &source.schema, &source.name, &target.schema, &target.name];
            transaction.execute(rename, &names).await?;
        }
        let object = |name: &TableName| serde_json::json!({"schema": name.schema, "name": name.name});
        let renamed = renamed.iter().map(
            |t| serde_json::json!({"listed": object(&t.listed), "from": object(&t.source), "to": object(&t.target)}),
        );
        let selection = "
            update peergate.mirror_definitions d
            set selection = jsonb_set(d.selection, '{tables}', (
                select jsonb_agg(t || coalesce((select jsonb_build_object('from', r -> 'from', 'to', r -> 'to')
                                                from jsonb_array_elements($2::jsonb) r where r -> 'listed' = t -> 'from'), '{}') order by n)
                from jsonb_array_elements(d.selection -> 'tables') with ordinality u (t, n)))
            where d.id = $1 and d.selection ? 'tables'";
        transaction.execute(selection, &[&mirror_id, &serde_json::Value::from_iter(renamed)]).await?;
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
            set bytes_total = coalesce(n.bytes_total, t.bytes_total),
                bytes_copied = coalesce(n.bytes_copied, t.bytes_copied), rows_copied = coalesce(n.rows_copied, t.rows_copied),
                copy_fraction = coalesce(n.copy_fraction, t.copy_fraction), rows_inserted = t.rows_inserted + n.inserted,
                rows_updated = t.rows_updated + n.updated, rows_deleted = t.rows_deleted + n.deleted,
                truncates = t.truncates + n.truncates, updated_at = clock_timestamp()
            from unnest($2::text[], $3::text[], $4::int8[], $5::int8[], $6::int8[], $7::float8[],
                        $8::int8[], $9::int8[], $10::int8[], $11::int8[])
                 as n (source_schema, source_name, bytes_total, bytes_copied, rows_copied, copy_fraction,
                       inserted, updated, deleted, truncates)
            where t.mirror_id = $1 and t.source_schema = n.source_schema and t.source_name = n.source_name";
        fn column<T>(tables: &[(TableName, TableStatus)], value: impl Fn(&(TableName, TableStatus)) -> T) -> Vec<T> {
            tables.iter().map(value).collect()
        }
        let changes = |kind: usize| column(tables, move |(_, s)| s.changes[kind]);
        let parameters: [&(dyn ToSql + Sync); 11] = [
            &mirror_id,
            &column(tables, |(n, _)| n.schema.clone()),
            &column(tables, |(n, _)| n.name.clone()),
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

    /// Puts tables of a mirror into a state; what stopped them is forgotten. The catalog records each change as an event.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_table_states(&self, mirror_id: i64, tables: &[TableName], state: &str) -> Result<(), Error> {
        let statement = "
            update peergate.mirror_table_runtime t
            set state = $4, replaces = t.replaces or $4 = 'live', updated_at = clock_timestamp(), error_sqlstate = null, error_message = null,
                error_detail = null, error_hint = null, error_lsn = null, error_at = null
            from unnest($2::text[], $3::text[]) n (source_schema, source_name)
            where t.mirror_id = $1 and t.source_schema = n.source_schema and t.source_name = n.source_name and t.state <> $4";
        let (schemas, names) = split(tables);
        self.execute(statement, &[&mirror_id, &schemas, &names, &state]).await?;
        Ok(())
    }

    /// Stores from where on the changes of tables come by the stream; `None`: they have no complete copy.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_tables_from(&self, mirror_id: i64, tables: &[TableName], from: Option<Lsn>) -> Result<(), Error> {
        let statement = "
            update peergate.mirror_table_runtime t set from_lsn = $4::text::pg_lsn
            from unnest($2::text[], $3::text[]) n (source_schema, source_name)
            where t.mirror_id = $1 and t.source_schema = n.source_schema and t.source_name = n.source_name";
        let (schemas, names) = split(tables);
        self.execute(statement, &[&mirror_id, &schemas, &names, &from.map(|l| l.to_string())]).await?;
        Ok(())
    }

    /// Stops one table, and says why.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_table_failure(
        &self,
        mirror_id: i64,
        table: &TableName,
        failure: &Failure,
        lsn: Option<Lsn>,
    ) -> Result<(), Error> {
        let statement = "
            update peergate.mirror_table_runtime
            set state = 'blocked', error_sqlstate = $4, error_message = $5, error_detail = $6, error_hint = $7, error_lsn = $8::text::pg_lsn,
                error_at = clock_timestamp(), updated_at = clock_timestamp()
            where mirror_id = $1 and source_schema = $2 and source_name = $3";
        let parameters: [&(dyn ToSql + Sync); 8] = [
            &mirror_id,
            &table.schema,
            &table.name,
            &failure.sqlstate.to_string(),
            &failure.message,
            &failure.detail,
            &failure.hint,
            &lsn.map(|l| l.to_string()),
        ];
        self.execute(statement, &parameters).await?;
        Ok(())
    }
}

fn split(tables: &[TableName]) -> (Vec<&str>, Vec<&str>) {
    tables.iter().map(|t| (t.schema.as_str(), t.name.as_str())).unzip()
}
