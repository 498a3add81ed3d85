//! Writes rows one by one, in a given order.
//!
//! Statements are on their way to the server while earlier ones run, so that this costs no round trip for each. It is the way for a
//! few rows, for which a staging table costs more; for rows without a key; for tables that depend on each other; and for finding out
//! which row of a batch is at fault.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::BytesMut;
use futures_util::stream::{FuturesOrdered, StreamExt};
use pg::pgoutput::Tuple;
use tokio_postgres::Statement;
use tokio_postgres::types::{IsNull, ToSql, Type};

use super::PostgresSink;
use super::errors::{expect_rows, in_table};
use crate::batch::{Batch, Change, Sorted, Step};
use crate::error::{Error, Problem};
use crate::relation::TableMap;
use crate::sink::row;

/// Statements that are on their way at a time.
const UNDER_WAY_MAX: usize = 128;

/// Bytes of their parameters that are.
const UNDER_WAY_BYTES: usize = 1 << 20;

/// The largest batch in which the row at fault is looked for.
const LOCATE_ROWS_MAX: usize = 20_000;

/// A parameter whose bytes are what the server wants: the binary form of its type, which for text is the text.
#[derive(Debug)]
struct Raw<'a>(Option<&'a [u8]>);

impl ToSql for Raw<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        match self.0 {
            Some(bytes) => {
                out.extend_from_slice(bytes);
                Ok(IsNull::No)
            }
            None => Ok(IsNull::Yes),
        }
    }

    fn accepts(_: &Type) -> bool {
        true
    }

    fn to_sql_checked(
        &self,
        ty: &Type,
        out: &mut BytesMut,
    ) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        self.to_sql(ty, out)
    }
}

/// A statement that is ready to be sent.
struct Prepared<'a> {
    table: &'a Arc<TableMap>,
    change: &'a Change,
    statement: Statement,
    values: Vec<Option<&'a [u8]>>,
    /// There may be no such row.
    optional: bool,
}

impl PostgresSink {
    /// Writes changes of one table in this order.
    pub(super) async fn write_rows(&mut self, table: &Arc<TableMap>, changes: &[Change]) -> Result<(), Error> {
        self.write_each(changes.iter().map(|change| (table, change))).await
    }

    /// Writes changes of any tables in this order.
    pub(super) async fn write_in_order(&mut self, changes: &[(Arc<TableMap>, Change)]) -> Result<(), Error> {
        self.write_each(changes.iter().map(|(table, change)| (table, change))).await
    }

    async fn write_each<'a>(
        &mut self,
        changes: impl Iterator<Item = (&'a Arc<TableMap>, &'a Change)>,
    ) -> Result<(), Error> {
        let (mut ready, mut bytes) = (Vec::new(), 0);
        for (table, change) in changes {
            // What a cascade has done already shows only when all before it is done.
            let alone = self.triggers_fire && table.cascades;
            if alone {
                self.execute(&ready).await?;
                ready.clear();
            }
            for row::RowStatement { sql, values, optional } in row::statements(table, change) {
                bytes += values.iter().flatten().map(|v| v.len()).sum::<usize>();
                let statement = self.prepare(table, sql).await.map_err(|e| in_table(table, e))?;
                ready.push(Prepared { table, change, statement, values, optional });
            }
            if alone || ready.len() >= UNDER_WAY_MAX || bytes >= UNDER_WAY_BYTES {
                self.execute(&ready).await?;
                ready.clear();
                bytes = 0;
            }
        }
        self.execute(&ready).await
    }

    async fn execute(&mut self, ready: &[Prepared<'_>]) -> Result<(), Error> {
        let mut results = FuturesOrdered::new();
        for one in ready {
            let parameters = one.values.iter().map(|v| Raw(*v)).collect::<Vec<_>>();
            let mut running = Box::pin(self.target.client.execute_raw(&one.statement, parameters));
            // The first look at it sends it, and each is sent before the next one.
            let done = poll_fn(|cx| Poll::Ready(running.as_mut().poll(cx))).await;
            results.push_back(async move {
                match done {
                    Poll::Ready(result) => result,
                    Poll::Pending => running.await,
                }
            });
        }
        let mut results = pin!(results);
        for one in ready {
            let result = results.next().await.expect("one result for each statement");
            let written = match result {
                Ok(_) if one.optional => Ok(()),
                Ok(0) if self.triggers_fire && one.table.cascades => self.follow_cascade(one.table, one.change).await,
                Ok(count) => expect_rows(one.table, what(one.change), 1, count),
                Err(error) => Err(self.target.error(&error)),
            };
            if let Err(error) = written {
                let (Change::Insert(row)
                | Change::Delete(row)
                | Change::Remove(row)
                | Change::Update { old: Some(row), .. }
                | Change::Update { new: row, .. }) = one.change;
                self.suspect = Some((one.table.clone(), row.clone()));
                return Err(in_table(one.table, error));
            }
        }
        Ok(())
    }

    /// A row was not found where foreign keys of the target delete and change rows by themselves: they may have done it already, as those
    /// of the source did before the change was sent.
    async fn follow_cascade(&self, table: &Arc<TableMap>, change: &Change) -> Result<(), Error> {
        let Change::Update { old: Some(_), new } = change else {
            return if let Change::Delete(_) = change { Ok(()) } else { expect_rows(table, what(change), 1, 0) };
        };
        let by_new_key = Change::Update { old: None, new: new.clone() };
        let Some(row::RowStatement { sql, values, .. }) = row::statement(table, &by_new_key) else { return Ok(()) };
        let statement = self.target.client.prepare(&sql).await.map_err(|e| self.target.error(&e))?;
        let parameters = values.into_iter().map(Raw).collect::<Vec<_>>();
        let done = self.target.client.execute_raw(&statement, parameters).await.map_err(|e| self.target.error(&e))?;
        expect_rows(table, what(change), 1, done)
    }

    /// Adds to an error which row it is about, if it can be found out by writing the batch anew, row by row.
    ///
    /// The transaction is rolled back, whatever comes of it.
    pub(super) async fn locate(&mut self, batch: &Batch, problem: Problem) -> Problem {
        let whole = batch.end.is_some() && !batch.continues && batch.transactions == 1;
        if self.suspect.is_none() && whole && batch.rows <= LOCATE_ROWS_MAX {
            let found = self.write_batch_by_rows(batch).await;
            if !matches!(found, Err(Error::Blocked(again)) if again.sqlstate == problem.sqlstate && again.table == problem.table)
            {
                self.suspect = None;
            }
        }
        match self.describe_suspect().await {
            Ok(Some(key)) if !problem.detail.as_deref().is_some_and(|d| d.contains(&key)) => {
                let detail = problem.detail.clone().map(|d| format!("{d} ")).unwrap_or_default();
                problem.detail(format!("{detail}The row is {key}."))
            }
            _ => problem,
        }
    }

    async fn write_batch_by_rows(&mut self, batch: &Batch) -> Result<(), Error> {
        self.target.run("rollback").await?;
        self.begin().await?;
        for step in &batch.steps {
            match step {
                Step::Changes(tables) => {
                    for changes in tables {
                        let by_row = one_by_one(&changes.table, &changes.sorted());
                        self.write_rows(&changes.table, &by_row).await?;
                    }
                }
                other => self.apply_step(other).await?,
            }
        }
        Ok(())
    }

    async fn describe_suspect(&mut self) -> Result<Option<String>, Error> {
        self.target.run("rollback").await?;
        let Some((table, row)) = self.suspect.take() else { return Ok(None) };
        let row::RowStatement { sql, values, .. } = row::describe(&table, &row);
        let statement = self.target.client.prepare(&sql).await.map_err(|e| self.target.error(&e))?;
        let parameters = values.into_iter().map(Raw).collect::<Vec<_>>();
        let rows = self.target.client.query_raw(&statement, parameters).await.map_err(|e| self.target.error(&e))?;
        let rows: Vec<_> = rows.collect().await;
        Ok(rows.into_iter().flatten().next().and_then(|r| r.try_get(0).ok()))
    }
}

/// Returns what a table's rows come to as changes, in the order in which they are written.
pub(super) fn one_by_one(table: &TableMap, rows: &Sorted<'_>) -> Vec<Change> {
    let moved: Vec<&Tuple> = rows.moves.iter().map(|(old, _)| *old).collect();
    let go = if table.deletes_softly() { Change::Remove } else { Change::Delete };
    let deletes = rows.deletes.iter().filter(|d| !moved.contains(d)).map(|old| go((*old).clone()));
    let clears = rows.clears.iter().map(|old| Change::Remove((*old).clone()));
    let buries = rows.buries.iter().map(|old| Change::Delete((*old).clone()));
    // One that was deleted after all, and stays.
    let is_last = |change: Change, row: &Tuple| {
        let bury = rows.is_deleted(row).then(|| Change::Delete(row.clone()));
        std::iter::once(change).chain(bury)
    };
    let moves = rows
        .moves
        .iter()
        .flat_map(|(old, new)| is_last(Change::Update { old: Some((*old).clone()), new: (*new).clone() }, new));
    let updates = rows.updates.iter().flat_map(|new| is_last(Change::Update { old: None, new: (*new).clone() }, new));
    let inserts = rows.inserts.iter().flat_map(|new| is_last(Change::Insert((*new).clone()), new));
    let writes = buries.chain(deletes).chain(moves).chain(updates).chain(clears).chain(inserts);
    writes.chain(rows.keyless.iter().cloned()).collect()
}

fn what(change: &Change) -> &'static str {
    match change {
        Change::Insert(_) => "insert",
        Change::Update { .. } => "update",
        Change::Delete(_) | Change::Remove(_) => "delete",
    }
}
