//! What statements want of a mirror that runs: which tables, and which of them anew.

use pg::TableName;
use serde_json::Value;
use tokio_postgres::Row;

use super::Selection;
use crate::task::TaskKind;
use crate::{Catalog, Error};

/// A task that is about a mirror's tables and is not done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableTask {
    /// Its number.
    pub id: i64,
    /// ALTER or RESYNC MIRROR.
    pub kind: TaskKind,
    /// The tables; `None`: the mirror as a whole.
    pub tables: Option<Vec<TableName>>,
    /// The engine has made it part of what it does.
    pub taken: bool,
}

/// What is wanted, as of one moment.
#[derive(Clone, Debug)]
pub struct Wishes {
    /// Which tables.
    pub selection: Selection,
    /// Tasks that are not done, in their order.
    pub tasks: Vec<TableTask>,
}

fn table_task(value: &Value) -> Option<TableTask> {
    let table = |t: &Value| Some(TableName::new(t.get("schema")?.as_str()?, t.get("name")?.as_str()?));
    Some(TableTask {
        id: value.get("id")?.as_i64()?,
        kind: if value.get("kind")? == "resync_mirror" { TaskKind::ResyncMirror } else { TaskKind::AlterMirror },
        tables: match value.get("tables")? {
            Value::Null => None,
            tables => Some(tables.as_array()?.iter().map(table).collect::<Option<_>>()?),
        },
        taken: value.get("taken")?.as_bool()?,
    })
}

impl Catalog {
    /// Returns what is wanted of a mirror; `None` when it was dropped.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if it cannot be read.
    pub async fn wishes(&self, mirror_id: i64) -> Result<Option<Wishes>, Error> {
        let query = "
            select d.selection,
                   (select coalesce(jsonb_agg(jsonb_build_object('id', t.id, 'kind', t.kind, 'tables', t.tables, 'taken', t.taken_at is not null) order by t.id), '[]')
                    from peergate.tasks t where t.mirror_id = d.id and t.kind in ('alter_mirror', 'resync_mirror') and t.state in ('pending', 'running'))
            from peergate.mirror_definitions d where d.id = $1";
        let row: Option<Row> = self.client().await?.query_opt(query, &[&mirror_id]).await?;
        let Some(row) = row else { return Ok(None) };
        let tasks: Value = row.get(1);
        let read = tasks.as_array().and_then(|tasks| tasks.iter().map(table_task).collect());
        let tasks = read.ok_or_else(|| Error::Unexpected(format!("tasks {tasks}")))?;
        Ok(Some(Wishes { selection: Selection::from_value(&row.get(0))?, tasks }))
    }

    /// Makes tasks part of what the engine does; what they want is so, or will be whatever happens now.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn take_tasks(&self, ids: &[i64]) -> Result<(), Error> {
        let statement = "
            update peergate.tasks set taken_at = clock_timestamp(), state = 'running', started_at = coalesce(started_at, clock_timestamp())
            where id = any ($1) and state in ('pending', 'running')";
        self.client().await?.execute(statement, &[&ids]).await?;
        Ok(())
    }

    /// Takes tasks that want tables anew: from now on they have no copy that counts, and what the target holds stays until the next one
    /// takes its place.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn take_resync_of_tables(&self, mirror_id: i64, tables: &[TableName], ids: &[i64]) -> Result<(), Error> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let statement = "
            update peergate.mirror_table_runtime t
            set state = 'pending', replaces = true, from_lsn = null, copy_fraction = 0, rows_copied = 0, bytes_copied = 0, error_sqlstate = null,
                error_message = null, error_detail = null, error_hint = null, error_lsn = null, error_at = null, updated_at = clock_timestamp()
            from unnest($2::text[], $3::text[]) n (source_schema, source_name)
            where t.mirror_id = $1 and t.source_schema = n.source_schema and t.source_name = n.source_name and t.state <> 'removed'";
        let (schemas, names): (Vec<&str>, Vec<&str>) =
            tables.iter().map(|t| (t.schema.as_str(), t.name.as_str())).unzip();
        transaction.execute(statement, &[&mirror_id, &schemas, &names]).await?;
        let take = "update peergate.tasks set taken_at = clock_timestamp(), state = 'running', started_at = coalesce(started_at, clock_timestamp())
                    where id = any ($1) and state in ('pending', 'running')";
        transaction.execute(take, &[&ids]).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Takes tasks that want all of a mirror anew: its slot and its copy count no more.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn take_resync_of_all(&self, mirror_id: i64, ids: &[i64]) -> Result<(), Error> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        for statement in [
            "update peergate.mirror_runtime set copied_at = null, snapshot_lsn = null, system_id = null where mirror_id = $1",
            "update peergate.mirror_table_runtime
             set state = 'pending', from_lsn = null, copy_fraction = 0, rows_copied = 0, bytes_copied = 0, error_sqlstate = null, error_message = null,
                 error_detail = null, error_hint = null, error_lsn = null, error_at = null, updated_at = clock_timestamp()
             where mirror_id = $1 and state <> 'removed' and (replaces or state = 'blocked')",
        ] {
            transaction.execute(statement, &[&mirror_id]).await?;
        }
        let take = "update peergate.tasks set taken_at = clock_timestamp(), state = 'running', started_at = coalesce(started_at, clock_timestamp())
                    where id = any ($1) and state in ('pending', 'running')";
        transaction.execute(take, &[&ids]).await?;
        transaction.commit().await?;
        Ok(())
    }
}
