//! Mirrors of queries: what was asked for.

use std::time::Duration;

use pg::TableName;
use tokio_postgres::{GenericClient, Row};

use crate::Error;

/// What a round does with the query's rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryMode {
    /// They are added.
    Append,
    /// They are added, or replace those with the same key.
    Upsert,
    /// They take the place of all that the table holds.
    Overwrite,
}

/// Which transactions that are open when a round's upper bound is chosen are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitFor {
    /// All of the database, and all that write.
    All,
    /// Those that write.
    Writers,
    /// None.
    Nothing,
}

/// The query of a mirror, and how its rows are written, with defaults filled in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryMirror {
    /// The query, as it was written.
    pub query: String,
    /// The table on the target.
    pub target: TableName,
    /// What a round does with the rows.
    pub mode: QueryMode,
    /// The column by which new rows are found; `xmin` is the system column.
    pub watermark_column: Option<String>,
    /// The table that is asked for the watermark's values; `None`: the query.
    pub watermark_table: Option<TableName>,
    /// The columns by which rows are found on the target; empty unless rows are upserted.
    pub key_columns: Vec<String>,
    /// Rows of a partition; at least 1.
    pub partition_rows: i64,
    /// Partitions that are read and written at the same time; at least 1.
    pub workers: usize,
    /// Pause between two rounds.
    pub refresh_interval: Duration,
    /// One round is all.
    pub run_once: bool,
    /// Rounds are run by statements only.
    pub on_demand: bool,
    /// Create the target table if it is missing.
    pub create_table: bool,
    /// The first round replaces what the target table holds.
    pub truncate_target: bool,
    /// Rows that the query has no more are deleted.
    pub detect_deletes: bool,
    /// Which transactions are waited for.
    pub wait_for: WaitFor,
}

impl QueryMirror {
    /// Returns whether one round is all that is wanted.
    pub fn ends(&self) -> bool {
        self.run_once && !self.on_demand
    }
}

/// Reads what was asked for of a mirror of a query.
pub(super) async fn query_mirror(client: &impl GenericClient, mirror_id: i64) -> Result<QueryMirror, Error> {
    let query = "
            select d.selection ->> 'query', peergate.parsed_name(d.options ->> 'target_table'), peergate.query_option(d.options, 'mode'),
                   (peergate.parsed_name(d.options ->> 'watermark_column'))[1], peergate.parsed_name(d.options ->> 'watermark_table'),
                   coalesce(peergate.parsed_columns(d.options ->> 'key_columns'), '{}'), peergate.query_option(d.options, 'partition_rows')::int8,
                   peergate.query_option(d.options, 'parallel_workers')::int8,
                   extract(epoch from peergate.query_option(d.options, 'refresh_interval')::interval)::float8,
                   peergate.query_option(d.options, 'run_once')::boolean, peergate.query_option(d.options, 'on_demand')::boolean,
                   peergate.query_option(d.options, 'create_table')::boolean, peergate.query_option(d.options, 'truncate_target')::boolean,
                   peergate.query_option(d.options, 'detect_deletes')::boolean, peergate.query_option(d.options, 'wait_for_transactions')
            from peergate.mirror_definitions d where d.id = $1";
    let row = client.query_one(query, &[&mirror_id]).await?;
    let table = |column: usize| match row.get::<_, Option<Vec<String>>>(column).as_deref() {
        None => Ok(None),
        Some([schema, name]) => Ok(Some(TableName::new(schema, name))),
        Some(other) => Err(Error::Unexpected(format!("table {other:?}"))),
    };
    Ok(QueryMirror {
        query: row.get(0),
        target: table(1)?.ok_or_else(|| Error::Unexpected("option target_table is missing".to_owned()))?,
        mode: match row.get::<_, &str>(2) {
            "append" => QueryMode::Append,
            "upsert" => QueryMode::Upsert,
            "overwrite" => QueryMode::Overwrite,
            other => return Err(Error::Unexpected(format!("mode {other}"))),
        },
        watermark_column: row.get(3),
        watermark_table: table(4)?,
        key_columns: row.get(5),
        partition_rows: row.get::<_, i64>(6).max(1),
        workers: usize::try_from(row.get::<_, i64>(7)).unwrap_or(1).max(1),
        refresh_interval: Duration::from_secs_f64(row.get::<_, f64>(8).clamp(1.0, 1e9)),
        run_once: row.get(9),
        on_demand: row.get(10),
        create_table: row.get(11),
        truncate_target: row.get(12),
        detect_deletes: row.get(13),
        wait_for: wait_for(&row)?,
    })
}

fn wait_for(row: &Row) -> Result<WaitFor, Error> {
    match row.get::<_, &str>(14) {
        "all" => Ok(WaitFor::All),
        "writers" => Ok(WaitFor::Writers),
        "none" => Ok(WaitFor::Nothing),
        other => Err(Error::Unexpected(format!("wait_for_transactions {other}"))),
    }
}
