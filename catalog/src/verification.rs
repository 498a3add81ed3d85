//! Verifications: comparisons of both sides of a mirror, as tasks, and what they find.

use pg::{Lsn, SqlState, TableName};
use serde_json::Value;

use crate::{Catalog, Error};

/// Differing rows that are kept for each table of a run; all are counted.
pub const DIFFERENCES_KEPT_MAX: usize = 10_000;

/// A verification that is to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verification {
    /// Its task.
    pub task_id: i64,
    /// The tables to compare, by name on the source; `None`: all of the mirror.
    pub tables: Option<Vec<TableName>>,
    /// Rows that differ are to be mended.
    pub repair: bool,
}

/// What was found of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableResult {
    /// Both sides hold the same rows.
    Equal,
    /// They do not.
    Different,
    /// They did not, and all of it was mended.
    Repaired,
    /// They could not be compared.
    Skipped,
}

impl TableResult {
    fn as_str(self) -> &'static str {
        match self {
            TableResult::Equal => "equal",
            TableResult::Different => "different",
            TableResult::Repaired => "repaired",
            TableResult::Skipped => "skipped",
        }
    }
}

/// A table, and what was found of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifiedTable {
    /// On the source.
    pub source: TableName,
    /// On the target.
    pub target: TableName,
    /// What was found.
    pub result: TableResult,
    /// Where both sides were compared; `None` when they were not.
    pub lsn: Option<Lsn>,
    /// Rows on the source and the target; `None` when they were not counted.
    pub rows: Option<[i64; 2]>,
    /// Rows that the target lacks.
    pub missing: i64,
    /// Rows with other values.
    pub different: i64,
    /// Rows that the source lacks.
    pub extra: i64,
    /// Rows that were mended.
    pub repaired: i64,
    /// Why the table was skipped, or rows were not mended.
    pub message: Option<String>,
}

/// How a row differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DifferenceKind {
    /// The target lacks it.
    Missing,
    /// Both sides have it by its key, with other values.
    Different,
    /// The source lacks it.
    Extra,
}

impl DifferenceKind {
    fn as_str(self) -> &'static str {
        match self {
            DifferenceKind::Missing => "missing",
            DifferenceKind::Different => "different",
            DifferenceKind::Extra => "extra",
        }
    }
}

/// A row that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// How.
    pub kind: DifferenceKind,
    /// Its key, or the row itself, as a person reads it.
    pub key: String,
    /// How many rows it is about.
    pub copies: i64,
}

/// A run that nobody wants any more: its task was canceled, or the session is gone that waited for it.
const GONE: &str = "
    k.state not in ('pending', 'running')
    or v.waiter is not null and not exists (
        select from pg_locks l where l.locktype = 'advisory' and l.objsubid = 1 and l.granted
            and l.database = (select d.oid from pg_database d where d.datname = current_database())
            and l.classid = ((v.waiter >> 32) & 4294967295)::oid and l.objid = (v.waiter & 4294967295)::oid)";

impl Catalog {
    /// Makes the task of a verification for which a session waits that holds the advisory lock `waiter`. `asked_by` is its role.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached, or the mirror is gone.
    pub async fn begin_verification(
        &self,
        mirror_id: i64,
        tables: Option<&[TableName]>,
        repair: bool,
        asked_by: &str,
        waiter: i64,
    ) -> Result<i64, Error> {
        let named = |t: &TableName| serde_json::json!({"schema": t.schema, "name": t.name});
        let tables = tables.map(|tables| Value::Array(tables.iter().map(named).collect()));
        let statement = "select peergate.begin_verification($1, $2, $3, $4, $5)";
        let row =
            self.client().await?.query_one(statement, &[&mirror_id, &tables, &repair, &asked_by, &waiter]).await?;
        Ok(row.get(0))
    }

    /// Tells a session that waits for a verification that it cannot be, and why.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached, or the mirror is gone.
    pub async fn refuse_verification(
        &self,
        mirror_id: i64,
        asked_by: &str,
        waiter: i64,
        sqlstate: SqlState,
        message: &str,
    ) -> Result<(), Error> {
        let statement = "select peergate.refuse_verification($1, $2, $3, $4, $5)";
        let sqlstate = sqlstate.to_string();
        self.client().await?.execute(statement, &[&mirror_id, &asked_by, &waiter, &sqlstate, &message]).await?;
        Ok(())
    }

    /// Takes the oldest verification of a mirror that is wanted and not done, from its beginning: what an earlier attempt at it found is
    /// gone. Those that nobody waits for any more are canceled.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn take_verification(&self, mirror_id: i64) -> Result<Option<Verification>, Error> {
        let mut client = self.client().await?;
        let open = "select exists (select from peergate.tasks where mirror_id = $1 and state in ('pending', 'running') and kind = 'verify_mirror')";
        if !client.query_one(open, &[&mirror_id]).await?.get::<_, bool>(0) {
            return Ok(None);
        }
        let transaction = client.transaction().await?;
        let cancel = format!(
            "update peergate.tasks k set state = 'canceled', finished_at = clock_timestamp() from peergate.verification_runs v
             where v.task_id = k.id and k.mirror_id = $1 and k.state in ('pending', 'running') and ({GONE})"
        );
        transaction.execute(&cancel, &[&mirror_id]).await?;
        let take = "
            update peergate.tasks k
            set state = 'running', taken_at = clock_timestamp(), started_at = coalesce(k.started_at, clock_timestamp()), progress = 0,
                error_sqlstate = null, error_message = null
            from peergate.verification_runs v
            where v.task_id = k.id and k.id = (select min(o.id) from peergate.tasks o where o.mirror_id = $1 and o.kind = 'verify_mirror'
                                               and o.state in ('pending', 'running'))
            returning k.id, k.tables, v.repair";
        let Some(row) = transaction.query_opt(take, &[&mirror_id]).await? else {
            transaction.commit().await?;
            return Ok(None);
        };
        let task_id: i64 = row.get(0);
        transaction.execute("delete from peergate.verification_tables where task_id = $1", &[&task_id]).await?;
        transaction.execute("delete from peergate.verification_differences where task_id = $1", &[&task_id]).await?;
        transaction.commit().await?;
        let table = |t: &Value| Some(TableName::new(t.get("schema")?.as_str()?, t.get("name")?.as_str()?));
        let tables = match row.get::<_, Option<Value>>(1) {
            None | Some(Value::Null) => None,
            Some(given) => Some(
                given
                    .as_array()
                    .and_then(|tables| tables.iter().map(table).collect())
                    .ok_or_else(|| Error::Unexpected(format!("tables {given}")))?,
            ),
        };
        Ok(Some(Verification { task_id, tables, repair: row.get(2) }))
    }

    /// Returns whether a verification that is under way is still wanted.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn is_verification_wanted(&self, task_id: i64) -> Result<bool, Error> {
        let query = format!(
            "select not ({GONE}) from peergate.verification_runs v join peergate.tasks k on k.id = v.task_id where v.task_id = $1"
        );
        Ok(self.client().await?.query_opt(&query, &[&task_id]).await?.is_some_and(|row| row.get(0)))
    }

    /// Notes how far a verification is, from 0 to 1.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn advance_verification(&self, task_id: i64, progress: f64) -> Result<(), Error> {
        let statement = "update peergate.tasks set progress = $2::float8 where id = $1 and state = 'running'";
        self.client().await?.execute(statement, &[&task_id, &progress.clamp(0.0, 1.0)]).await?;
        Ok(())
    }

    /// Notes at which position both sides are compared, with a line in the task's log.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_verification_lsn(&self, task_id: i64, lsn: Lsn, message: &str) -> Result<(), Error> {
        let statement = "
            with run as (update peergate.verification_runs set lsn = $2::text::pg_lsn where task_id = $1)
            insert into peergate.task_log (task_id, message) values ($1, $3)";
        self.client().await?.execute(statement, &[&task_id, &lsn.to_string(), &message]).await?;
        Ok(())
    }

    /// Adds a line to a task's log.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn log_task(&self, task_id: i64, message: &str) -> Result<(), Error> {
        let statement = "insert into peergate.task_log (task_id, message) values ($1, $2)";
        self.client().await?.execute(statement, &[&task_id, &message]).await?;
        Ok(())
    }

    /// Forgets which rows of a table differ: it is compared anew.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn clear_differences(&self, task_id: i64, table: &TableName) -> Result<(), Error> {
        let statement = "delete from peergate.verification_differences where task_id = $1 and source_schema = $2 and source_name = $3";
        self.client().await?.execute(statement, &[&task_id, &table.schema, &table.name]).await?;
        Ok(())
    }

    /// Keeps rows of a table that differ.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn add_differences(&self, task_id: i64, table: &TableName, rows: &[Difference]) -> Result<(), Error> {
        let statement = "
            insert into peergate.verification_differences (task_id, source_schema, source_name, kind, key, copies)
            select $1, $2, $3, d.kind, d.key, d.copies
            from unnest($4::text[], $5::text[], $6::int8[]) with ordinality d (kind, key, copies, n) order by d.n";
        let kinds: Vec<&str> = rows.iter().map(|d| d.kind.as_str()).collect();
        let keys: Vec<&str> = rows.iter().map(|d| d.key.as_str()).collect();
        let copies: Vec<i64> = rows.iter().map(|d| d.copies).collect();
        let client = self.client().await?;
        client.execute(statement, &[&task_id, &table.schema, &table.name, &kinds, &keys, &copies]).await?;
        Ok(())
    }

    /// Keeps what was found of a table.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_verified_table(&self, task_id: i64, table: &VerifiedTable) -> Result<(), Error> {
        let statement = "
            insert into peergate.verification_tables (task_id, source_schema, source_name, target_schema, target_name, result, lsn, source_rows,
                target_rows, missing, different, extra, repaired, message)
            values ($1, $2, $3, $4, $5, $6, $7::text::pg_lsn, $8, $9, $10, $11, $12, $13, $14)";
        let client = self.client().await?;
        client
            .execute(
                statement,
                &[
                    &task_id,
                    &table.source.schema,
                    &table.source.name,
                    &table.target.schema,
                    &table.target.name,
                    &table.result.as_str(),
                    &table.lsn.map(|lsn| lsn.to_string()),
                    &table.rows.map(|r| r[0]),
                    &table.rows.map(|r| r[1]),
                    &table.missing,
                    &table.different,
                    &table.extra,
                    &table.repaired,
                    &table.message,
                ],
            )
            .await?;
        Ok(())
    }

    /// Ends a verification that is done.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn complete_verification(&self, task_id: i64) -> Result<(), Error> {
        let statement = "update peergate.tasks set state = 'completed', progress = 1, finished_at = clock_timestamp() where id = $1 and state = 'running'";
        self.client().await?.execute(statement, &[&task_id]).await?;
        Ok(())
    }

    /// Ends a verification that nobody wants any more.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn cancel_verification(&self, task_id: i64) -> Result<(), Error> {
        let statement = "update peergate.tasks set state = 'canceled', finished_at = clock_timestamp() where id = $1 and state in ('pending', 'running')";
        self.client().await?.execute(statement, &[&task_id]).await?;
        Ok(())
    }

    /// Ends a verification that cannot go on.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn fail_verification(
        &self,
        task_id: i64,
        sqlstate: &str,
        message: &str,
        detail: Option<&str>,
        hint: Option<&str>,
    ) -> Result<(), Error> {
        let statement = "
            with run as (update peergate.verification_runs set error_detail = $4, error_hint = $5 where task_id = $1)
            update peergate.tasks set state = 'failed', error_sqlstate = $2, error_message = $3, finished_at = clock_timestamp()
            where id = $1 and state in ('pending', 'running')";
        self.client().await?.execute(statement, &[&task_id, &sqlstate, &message, &detail, &hint]).await?;
        Ok(())
    }
}
