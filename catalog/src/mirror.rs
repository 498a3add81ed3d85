//! Mirrors: what was asked for, and what the engine reports.

use std::collections::BTreeMap;
use std::time::Duration;

use pg::{Lsn, SqlState, TableName};
use serde_json::Value;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

use crate::peer::PeerOptions;
use crate::{Catalog, Error};

/// What a mirror does with the rows that are there when it is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Copy them, then stream what changes.
    CopyAndStream,
    /// Copy them and be done.
    CopyOnly,
    /// Stream what changes from now on.
    StreamOnly,
}

/// A mirror's options, with defaults filled in.
#[derive(Clone, Debug)]
pub struct MirrorOptions {
    /// Copy, stream, or both.
    pub mode: Mode,
    /// Create tables that the target lacks.
    pub create_tables: bool,
    /// Create secondary indexes on tables that the mirror created.
    pub copy_indexes: bool,
    /// Empty target tables that hold rows before they are copied.
    pub truncate_target: bool,
    /// Sessions that copy at the same time; at least 1.
    pub copy_parallel_workers: usize,
    /// Row changes after which a batch is written; at least 1.
    pub batch_rows_max: usize,
    /// Bytes of row changes after which a batch is written.
    pub batch_bytes_max: usize,
    /// Shortest time between two commits on the target; zero: none.
    pub sync_interval: Duration,
}

impl MirrorOptions {
    fn from_value(value: &Value) -> Result<MirrorOptions, Error> {
        let text = |name: &str| {
            value
                .get(name)
                .and_then(Value::as_str)
                .ok_or_else(|| Error::Unexpected(format!("option {name} is missing")))
        };
        let number = |name: &str| -> Result<usize, Error> {
            text(name)?.parse().map_err(|_| Error::Unexpected(format!("option {name} is not a number")))
        };
        Ok(MirrorOptions {
            mode: match text("mode")? {
                "copy_and_stream" => Mode::CopyAndStream,
                "copy_only" => Mode::CopyOnly,
                "stream_only" => Mode::StreamOnly,
                other => return Err(Error::Unexpected(format!("mode {other}"))),
            },
            create_tables: text("create_tables")? == "true",
            copy_indexes: text("copy_indexes")? == "true",
            truncate_target: text("truncate_target")? == "true",
            copy_parallel_workers: number("copy_parallel_workers")?.max(1),
            batch_rows_max: number("batch_rows_max")?.max(1),
            batch_bytes_max: number("batch_bytes_max")?,
            sync_interval: Duration::from_secs_f64(
                text("sync_interval")?.parse::<f64>().ok().filter(|s| s.is_finite() && *s > 0.0).unwrap_or(0.0),
            ),
        })
    }
}

/// Which columns of a table a mirror takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ColumnChoice {
    /// Only these; `None`: all.
    pub only: Option<Vec<String>>,
    /// Not these.
    pub except: Vec<String>,
}

impl ColumnChoice {
    /// Returns whether the mirror takes the column.
    pub fn takes(&self, column: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only.iter().any(|c| c == column))
            && !self.except.iter().any(|c| c == column)
    }
}

/// One table that a mirror names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SelectedTable {
    /// On the source.
    pub source: TableName,
    /// On the target.
    pub target: TableName,
    /// Which of its columns.
    pub columns: ColumnChoice,
}

/// Which tables a mirror takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// All tables of the database but these.
    All {
        /// Tables that are left out.
        except: Vec<TableName>,
    },
    /// All tables of these schemas (source schema → target schema) but these.
    Schemas {
        /// Target schema by source schema.
        schemas: BTreeMap<String, String>,
        /// Tables that are left out.
        except: Vec<TableName>,
    },
    /// These tables.
    Tables(Vec<SelectedTable>),
}

impl Selection {
    /// Reads the selection as `mirror_definitions.selection` holds it.
    ///
    /// # Errors
    /// [`Error::Unexpected`] if it has none of the documented forms.
    pub fn from_value(value: &Value) -> Result<Selection, Error> {
        let bad = || Error::Unexpected(format!("selection {value}"));
        let table = |v: &Value| -> Option<TableName> {
            Some(TableName::new(v.get("schema")?.as_str()?, v.get("name")?.as_str()?))
        };
        let names = |v: Option<&Value>| -> Option<Vec<String>> {
            v?.as_array()?.iter().map(|n| n.as_str().map(str::to_owned)).collect()
        };
        let except = || -> Option<Vec<TableName>> {
            value.get("except").map_or(Some(Vec::new()), |e| e.as_array()?.iter().map(table).collect())
        };
        if value.get("all").and_then(Value::as_bool) == Some(true) {
            return Ok(Selection::All { except: except().ok_or_else(bad)? });
        }
        if let Some(schemas) = value.get("schemas") {
            let pair = |v: &Value| Some((v.get("from")?.as_str()?.to_owned(), v.get("to")?.as_str()?.to_owned()));
            let schemas = schemas.as_array().and_then(|s| s.iter().map(pair).collect());
            return Ok(Selection::Schemas { schemas: schemas.ok_or_else(bad)?, except: except().ok_or_else(bad)? });
        }
        let selected = |v: &Value| {
            Some(SelectedTable {
                source: table(v.get("from")?)?,
                target: table(v.get("to")?)?,
                columns: ColumnChoice {
                    only: match v.get("columns") {
                        None | Some(Value::Null) => None,
                        given => Some(names(given)?),
                    },
                    except: v.get("exclude").map_or(Some(Vec::new()), |e| names(Some(e)))?,
                },
            })
        };
        let tables = value.get("tables").and_then(Value::as_array).and_then(|t| t.iter().map(selected).collect());
        tables.map(Selection::Tables).ok_or_else(bad)
    }
}

/// A mirror as the engine needs it.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// Identifies the mirror.
    pub id: i64,
    /// Its name.
    pub name: String,
    /// Name of its slot, publication and progress.
    pub object_name: String,
    /// The source peer's name.
    pub source_name: String,
    /// How to connect to the source.
    pub source: PeerOptions,
    /// The target peer's name.
    pub target_name: String,
    /// How to connect to the target.
    pub target: PeerOptions,
    /// Which tables.
    pub selection: Selection,
    /// How.
    pub options: MirrorOptions,
    /// What the state was when it was read.
    pub state: String,
    /// The source's system identifier when the slot was made.
    pub system_id: Option<String>,
    /// The source's timeline when it was last seen.
    pub timeline: Option<i32>,
    /// Oids of the mirror's publications.
    pub publications: Vec<u32>,
    /// The slot's consistent point; `None` before the slot is made.
    pub snapshot_lsn: Option<Lsn>,
    /// The copy is complete on the target.
    pub copied: bool,
    /// Row changes, bytes and transactions applied so far.
    pub applied: Applied,
}

/// How much was applied by streaming since the mirror was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Row changes.
    pub rows: i64,
    /// Bytes of row changes.
    pub bytes: i64,
    /// Source transactions.
    pub transactions: i64,
}

/// What the engine reports of a mirror that streams.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Everything before this was read.
    pub received: Lsn,
    /// Everything before this is durable on the target.
    pub applied: Lsn,
    /// What was acknowledged to the slot.
    pub flushed: Lsn,
    /// The source's end of WAL, and when it was asked for (catalog clock, as text).
    pub source: Option<(Lsn, String)>,
    /// Commit time of the last transaction applied, in microseconds since 2000-01-01 UTC.
    pub commit_time: Option<i64>,
    /// How long the oldest change that is not applied has waited.
    pub lag: Duration,
    /// Totals.
    pub totals: Applied,
}

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

/// An error as `mirror_status` shows it.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What kind.
    pub sqlstate: SqlState,
    /// What happened.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// What to do.
    pub hint: Option<String>,
    /// Failed attempts so far.
    pub attempt: i32,
    /// Seconds until the next attempt; `None`: a person must act.
    pub retry_in: Option<f64>,
}

fn lsn(row: &Row, column: usize) -> Option<Lsn> {
    row.get::<_, Option<&str>>(column).and_then(|t| t.parse().ok())
}

impl Catalog {
    /// Reads a mirror with its peers, their secrets opened; `None` when it was dropped.
    ///
    /// # Errors
    /// [`Error::Secret`] if a secret cannot be opened, [`Error::Unexpected`] if the definition cannot be read.
    pub async fn mirror(&self, mirror_id: i64) -> Result<Option<Mirror>, Error> {
        let query = "
            select d.name, d.object_name, s.name, peergate.peer_document(s.id), t.name, peergate.peer_document(t.id), d.selection,
                   (select jsonb_object_agg(o.name, case o.type when 'interval' then extract(epoch from v.value::interval)::text
                                                                when 'bytes' then pg_size_bytes(v.value)::text else v.value end)
                    from peergate.settings o, lateral (select coalesce(d.options ->> o.name, o.default_value) as value) v
                    where o.scope = 'mirror' and o.alias_of is null),
                   r.state, r.system_id, r.snapshot_lsn::text, r.copied_at is not null,
                   r.rows_applied, r.bytes_applied, r.transactions_applied, r.timeline, r.publications
            from peergate.mirror_definitions d
            join peergate.peers s on s.id = d.source_id
            join peergate.peers t on t.id = d.target_id
            join peergate.mirror_runtime r on r.mirror_id = d.id
            where d.id = $1";
        let Some(row) = self.client().await?.query_opt(query, &[&mirror_id]).await? else { return Ok(None) };
        Ok(Some(Mirror {
            id: mirror_id,
            name: row.get(0),
            object_name: row.get(1),
            source_name: row.get(2),
            source: PeerOptions::from_document(&row.get(3), self.keyring())?,
            target_name: row.get(4),
            target: PeerOptions::from_document(&row.get(5), self.keyring())?,
            selection: Selection::from_value(&row.get(6))?,
            options: MirrorOptions::from_value(&row.get(7))?,
            state: row.get(8),
            system_id: row.get(9),
            snapshot_lsn: lsn(&row, 10),
            copied: row.get(11),
            timeline: row.get(15),
            publications: row.get::<_, Option<Vec<u32>>>(16).unwrap_or_default(),
            applied: Applied { rows: row.get(12), bytes: row.get(13), transactions: row.get(14) },
        }))
    }

    async fn execute(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<u64, Error> {
        Ok(self.client().await?.execute(statement, parameters).await?)
    }

    /// Writes a mirror's state; a state in which it gets on clears the last error.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_state(&self, mirror_id: i64, state: &str) -> Result<(), Error> {
        let statement = "
            update peergate.mirror_runtime
            set state = $2, updated_at = clock_timestamp(), retry_at = null,
                attempt = case when $2 in ('running', 'completed', 'paused') then 0 else attempt end,
                error_sqlstate = case when not w.well then error_sqlstate end, error_message = case when not w.well then error_message end,
                error_detail = case when not w.well then error_detail end, error_hint = case when not w.well then error_hint end,
                error_at = case when not w.well then error_at end
            from (select $2 in ('copying', 'catchup', 'running', 'completed', 'paused') as well) w
            where mirror_id = $1";
        self.execute(statement, &[&mirror_id, &state]).await?;
        Ok(())
    }

    /// Writes a mirror's state together with the error that put it there.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_failure(&self, mirror_id: i64, state: &str, failure: &Failure) -> Result<(), Error> {
        let statement = "
            update peergate.mirror_runtime
            set state = $2, error_sqlstate = $3, error_message = $4, error_detail = $5, error_hint = $6, attempt = $7,
                retry_at = clock_timestamp() + make_interval(secs => $8), error_at = clock_timestamp(), updated_at = clock_timestamp()
            where mirror_id = $1";
        let sqlstate = failure.sqlstate.to_string();
        self.execute(
            statement,
            &[
                &mirror_id,
                &state,
                &sqlstate,
                &failure.message,
                &failure.detail,
                &failure.hint,
                &failure.attempt,
                &failure.retry_in,
            ],
        )
        .await?;
        Ok(())
    }

    /// Stores which source the slot is on and where the copy's snapshot is.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_slot(
        &self,
        mirror_id: i64,
        system_id: &str,
        timeline: i32,
        snapshot: Lsn,
    ) -> Result<(), Error> {
        let statement = "
            update peergate.mirror_runtime
            set system_id = $2, timeline = $3, snapshot_lsn = $4::text::pg_lsn, copied_at = null, updated_at = clock_timestamp()
            where mirror_id = $1";
        self.execute(statement, &[&mirror_id, &system_id, &timeline, &snapshot.to_string()]).await?;
        Ok(())
    }

    /// Stores the mirror's publications.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_publications(&self, mirror_id: i64, oids: &[u32]) -> Result<(), Error> {
        let statement =
            "update peergate.mirror_runtime set publications = $2, updated_at = clock_timestamp() where mirror_id = $1";
        self.execute(statement, &[&mirror_id, &oids]).await?;
        Ok(())
    }

    /// Stores the source's timeline, after a failover that streaming may pass.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_timeline(&self, mirror_id: i64, timeline: i32) -> Result<(), Error> {
        let statement =
            "update peergate.mirror_runtime set timeline = $2, updated_at = clock_timestamp() where mirror_id = $1";
        self.execute(statement, &[&mirror_id, &timeline]).await?;
        Ok(())
    }

    /// Stores that the copy is complete on the target: a restart streams and does not copy.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_copied(&self, mirror_id: i64) -> Result<(), Error> {
        let statement = "update peergate.mirror_runtime set copied_at = clock_timestamp(), updated_at = clock_timestamp() where mirror_id = $1";
        self.execute(statement, &[&mirror_id]).await?;
        Ok(())
    }

    /// Writes how far a streaming mirror is.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_status(&self, mirror_id: i64, status: &Status) -> Result<(), Error> {
        let statement = "
            update peergate.mirror_runtime
            set received_lsn = $2::text::pg_lsn, applied_lsn = $3::text::pg_lsn, flushed_lsn = $4::text::pg_lsn,
                source_lsn = greatest(coalesce($5::text::pg_lsn, source_lsn), $3::text::pg_lsn),
                source_lsn_at = coalesce($6::text::timestamptz, source_lsn_at),
                commit_time = coalesce('2000-01-01 00:00:00+00'::timestamptz + $7 * interval '1 microsecond', commit_time),
                lag_seconds = $8, rows_applied = $9, bytes_applied = $10, transactions_applied = $11, updated_at = clock_timestamp()
            where mirror_id = $1";
        let (source, at) = status.source.clone().map(|(lsn, at)| (lsn.to_string(), at)).unzip();
        // As a double: microseconds since 2000 are exact in it until the year 2285.
        let commit_time = status.commit_time.map(|t| t as f64);
        let parameters: [&(dyn ToSql + Sync); 11] = [
            &mirror_id,
            &status.received.to_string(),
            &status.applied.to_string(),
            &status.flushed.to_string(),
            &source,
            &at,
            &commit_time,
            &status.lag.as_secs_f64(),
            &status.totals.rows,
            &status.totals.bytes,
            &status.totals.transactions,
        ];
        self.execute(statement, &parameters).await?;
        Ok(())
    }

    /// Returns the catalog's clock, as text.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn now(&self) -> Result<String, Error> {
        Ok(self.client().await?.query_one("select clock_timestamp()::text", &[]).await?.get(0))
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn selections_are_read_in_all_their_forms() {
        let table = |s: &str, n: &str| TableName::new(s, n);
        assert_eq!(
            Selection::from_value(&json!({"all": true, "except": [{"schema": "a", "name": "b"}]})).unwrap(),
            Selection::All { except: vec![table("a", "b")] }
        );
        assert_eq!(
            Selection::from_value(&json!({"schemas": [{"from": "a", "to": "b"}]})).unwrap(),
            Selection::Schemas { schemas: BTreeMap::from([("a".into(), "b".into())]), except: Vec::new() }
        );
        let tables = json!({"tables": [{"from": {"schema": "a", "name": "t"}, "to": {"schema": "b", "name": "u"}, "columns": null, "exclude": ["x"]}]});
        let Selection::Tables(tables) = Selection::from_value(&tables).unwrap() else { panic!("not tables") };
        assert_eq!((&tables[0].source, &tables[0].target), (&table("a", "t"), &table("b", "u")));
        assert!(tables[0].columns.takes("y") && !tables[0].columns.takes("x"));
    }

    #[test]
    fn what_is_no_selection_is_an_error() {
        for value in [
            json!({}),
            json!({"tables": [{}]}),
            json!({"schemas": 1}),
            json!({"all": false}),
            json!({"all": true, "except": [1]}),
        ] {
            assert!(Selection::from_value(&value).is_err(), "{value}");
        }
    }
}
