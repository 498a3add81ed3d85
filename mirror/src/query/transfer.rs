//! Carries a partition from the source to the target: its rows and the note that they are there, in one transaction.

use bytes::{Bytes, BytesMut};
use catalog::mirror::query::QueryMode;
use futures_util::{SinkExt, StreamExt};
use pg::SqlState;
use pg::name::quote_ident;
use tokio::sync::watch;
use tokio_postgres::CopyInSink;

use super::preflight::{Plan, columns_of};
use super::progress::{self, Partition};
use super::source::{check_not_rewritten, of_reading};
use crate::error::{Error, Problem};
use crate::session::PeerSession;
use crate::sink::progress_row::{self, MAIN_LANE};
use crate::worker::Context;

/// Bytes that are gathered before they are handed to the target: the source sends each row by itself.
const SEND_BYTES: usize = 128 << 10;

/// The table of the session in which rows, or keys, gather that are then compared with those of the target table.
const TEMPORARY: &str = "pg_temp.peergate_rows";

/// Makes that table, with these columns of another one.
fn make_temporary(columns: &str, table: &str) -> String {
    format!("create temporary table peergate_rows on commit drop as select {columns} from {table} with no data")
}

/// What a partition came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Rows written.
    pub rows: i64,
    /// Bytes read.
    pub bytes: i64,
}

/// Where a round's rows go.
pub struct Destination<'a> {
    /// The worker's surroundings.
    pub context: &'a Context,
    /// The query.
    pub plan: &'a Plan,
    /// The table in which rows gather that are to replace what is there, as SQL.
    pub stage: Option<&'a str>,
    /// The number of the partition whose turn it is to be merged: a row of a later one has the last word.
    pub turn: &'a watch::Sender<i32>,
}

impl Destination<'_> {
    /// Carries a partition. The source's session is in a transaction with the round's snapshot.
    ///
    /// # Errors
    /// [`Error::Restart`] if the query's columns have changed, [`Error::CopyAgain`] if the snapshot did not show what was there, [`Error::Fenced`] if
    /// another process has taken over; else as the servers' SQLSTATEs say.
    pub async fn carry(
        &self,
        partition: &Partition,
        source: &PeerSession,
        target: &PeerSession,
    ) -> Result<Carried, Error> {
        let Destination { context, plan, stage, turn } = self;
        let mirror = &context.mirror.object_name;
        let query = plan.template.limited(&plan.limit, &partition.span, plan.takes_all());
        // Alone, a text that is more than one query is refused; and from now on nobody alters what it reads.
        let statement = source.client.prepare(&query).await.map_err(|e| of_reading(source, &e))?;
        if !plan.has_columns(&columns_of(&statement)) {
            return Err(Error::Restart);
        }
        let merges = plan.query.mode == QueryMode::Upsert && stage.is_none();
        target.run("begin").await?;
        progress_row::hold(target, mirror, MAIN_LANE, context.epoch).await?;
        let columns = plan.column_list();
        let table = plan.query.target.quoted();
        if merges {
            target.run(&make_temporary(&columns, &table)).await?;
        }
        let into = if merges { TEMPORARY } else { stage.unwrap_or(&table) };
        let (copied, bytes) = copy(plan, &query, source, target, &format!("{into} ({columns})")).await?;
        check_not_rewritten(source).await?;
        fail_point!("query rows copied");
        let rows = if merges {
            let mut turns = turn.subscribe();
            // Whoever has the turn before this one ends all of them when it fails.
            turns.wait_for(|turn| *turn >= partition.number).await.map_err(|_| Error::Stopped)?;
            merge(plan, target).await?
        } else {
            copied
        };
        progress::note_partition(target, mirror, partition.number, rows).await?;
        fail_point!("query partition noted");
        target.run("commit").await?;
        fail_point!("query partition committed");
        turn.send_modify(|turn| *turn = (*turn).max(partition.number + 1));
        Ok(Carried { rows, bytes })
    }
}

/// Copies the query's rows; returns how many they are, and how many bytes.
///
/// # Errors
/// [`Error`] as the servers' SQLSTATEs say.
async fn copy(
    plan: &Plan,
    query: &str,
    source: &PeerSession,
    target: &PeerSession,
    into: &str,
) -> Result<(i64, i64), Error> {
    let format = plan.format();
    let in_target = |error: &tokio_postgres::Error| in_table(plan, target.error(error));
    let rows = format!("copy ({query}\n) to stdout (format {format})");
    let rows = source.watched(source.client.copy_out(&rows)).await.map_err(|e| of_reading(source, &e))?;
    let insert = format!("copy {into} from stdin (format {format})");
    let sink: CopyInSink<Bytes> = target.client.copy_in(&insert).await.map_err(|e| in_target(&e))?;
    let mut rows = std::pin::pin!(rows);
    let mut sink = std::pin::pin!(sink);
    let mut gathered = BytesMut::with_capacity(SEND_BYTES);
    let mut bytes = 0;
    while let Some(row) = source.watched(rows.next()).await {
        gathered.extend_from_slice(&row.map_err(|e| of_reading(source, &e))?);
        if gathered.len() >= SEND_BYTES {
            bytes += gathered.len();
            sink.send(gathered.split().freeze()).await.map_err(|e| in_target(&e))?;
            gathered.reserve(SEND_BYTES);
        }
    }
    bytes += gathered.len();
    sink.send(gathered.freeze()).await.map_err(|e| in_target(&e))?;
    let copied = sink.finish().await.map_err(|e| in_target(&e))?;
    Ok((copied.cast_signed(), i64::try_from(bytes).unwrap_or(i64::MAX)))
}

fn in_table(plan: &Plan, error: Error) -> Error {
    match error {
        Error::Blocked(problem) => {
            let detail = problem.detail.clone().map(|d| format!("{d} ")).unwrap_or_default();
            Error::Blocked(
                problem.detail(format!("{detail}It happened while writing to table \"{}\".", plan.query.target)),
            )
        }
        other => other,
    }
}

fn keys_are_null(keys: &[String]) -> String {
    let conditions: Vec<String> = keys.iter().map(|key| format!("{} is null", quote_ident(key))).collect();
    conditions.join(" or ")
}

/// Adds the gathered rows to the table, or puts them in the place of those with the same key. Returns how many were new or different.
async fn merge(plan: &Plan, target: &PeerSession) -> Result<i64, Error> {
    let keys = &plan.query.key_columns;
    let look = format!("select exists (select from {TEMPORARY} where {})", keys_are_null(keys));
    if target.done(target.client.query_one(&look, &[])).await?.get::<_, bool>(0) {
        let message = format!("the query gives rows whose key ({}) is NULL", keys.join(", "));
        return Err(Error::Blocked(
            Problem::new(SqlState::from_text("23502").unwrap_or(SqlState::INVALID_PARAMETER_VALUE), message)
                .detail("Such a row would be added anew by each round.")
                .hint("Leave these rows out of the query, or choose other key_columns."),
        ));
    }
    let (columns, table) = (plan.column_list(), plan.query.target.quoted());
    let named = |prefix: &str, all: &[String]| -> String {
        all.iter().map(|c| format!("{prefix}{}", quote_ident(c))).collect::<Vec<_>>().join(", ")
    };
    let others: Vec<String> = plan.columns.iter().map(|c| c.name.clone()).filter(|c| !keys.contains(c)).collect();
    let action = if others.is_empty() {
        "do nothing".to_owned()
    } else {
        let set: Vec<String> = others.iter().map(|c| format!("{0} = excluded.{0}", quote_ident(c))).collect();
        // By their bytes, so that it works for types without equality; a row that is the same is not written anew.
        format!(
            "do update set {} where row({})::pg_catalog.record operator(pg_catalog.*<>) row({})::pg_catalog.record",
            set.join(", "),
            named("t.", &others),
            named("excluded.", &others)
        )
    };
    let statement = format!(
        "insert into {table} as t ({columns}) overriding system value select {columns} from {TEMPORARY} on conflict ({}) {action}",
        named("", keys)
    );
    let merged = target.watched(target.client.execute(&statement, &[])).await;
    let merged = merged.map_err(|e| match in_table(plan, target.error(&e)) {
        Error::Blocked(problem) if problem.sqlstate.as_str() == "21000" => Error::Blocked(
            Problem::new(
                problem.sqlstate,
                format!("the query gives several rows with the same key ({})", keys.join(", ")),
            )
            .detail(format!("One of them would be left in table \"{}\", and nothing says which.", plan.query.target))
            .hint("Have the query give one row for each key, for example by DISTINCT ON."),
        ),
        other => other,
    })?;
    Ok(merged.cast_signed())
}

/// Deletes the rows of the target whose keys the query does not give at the snapshot of the source's transaction, within the transaction of the target's session.
/// Returns how many there were.
///
/// # Errors
/// [`Error`] as the servers' SQLSTATEs say.
pub async fn delete_missing(plan: &Plan, source: &PeerSession, target: &PeerSession) -> Result<i64, Error> {
    let keys: Vec<String> = plan.query.key_columns.iter().map(|k| quote_ident(k)).collect();
    let keys = keys.join(", ");
    let table = plan.query.target.quoted();
    let whole = plan.template.whole(&plan.limit);
    source.client.prepare(&whole).await.map_err(|e| of_reading(source, &e))?;
    target.run(&make_temporary(&keys, &table)).await?;
    copy(plan, &format!("select {keys} from ({whole}\n) q"), source, target, &format!("{TEMPORARY} ({keys})")).await?;
    check_not_rewritten(source).await?;
    fail_point!("query keys copied");
    target.run(&format!("analyze {TEMPORARY}")).await?;
    let same: Vec<String> = plan.query.key_columns.iter().map(|k| format!("k.{0} = t.{0}", quote_ident(k))).collect();
    let delete = format!(
        "delete from {} t where not exists (select from {TEMPORARY} k where {})",
        plan.alone,
        same.join(" and ")
    );
    let deleted =
        target.watched(target.client.execute(&delete, &[])).await.map_err(|e| in_table(plan, target.error(&e)))?;
    Ok(deleted.cast_signed())
}
