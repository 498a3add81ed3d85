//! Writes what a table's rows come to as sets: staged by COPY, moved by one statement for each kind.

use std::sync::Arc;

use pg::pgoutput::Tuple;

use super::PostgresSink;
use super::copy_in::{CopyWriter, Staged};
use super::errors::{expect_rows, in_table, is_collision};
use super::rows::one_by_one;
use crate::batch::{Change, Sorted, TableChanges, unchanged_mask};
use crate::error::Error;
use crate::relation::TableMap;
use crate::sink::stage;

/// So many rows that change or go are written one by one: a staging table costs more.
const FEW_ROWS: usize = 8;

/// So many inserts in a row are worth a COPY among changes that are written one by one.
const MANY_INSERTS: usize = 64;

/// Rows that leave the same values out: one statement each.
type Groups<'a, T> = Vec<(Vec<bool>, Vec<&'a T>)>;

/// A row that moves: old key, new row.
type Move<'a> = (&'a Tuple, &'a Tuple);

impl PostgresSink {
    /// Writes a table's changes.
    pub(super) async fn apply_table(&mut self, changes: &TableChanges) -> Result<(), Error> {
        let table = &changes.table;
        let sorted = changes.sorted();
        if table.replace {
            return self.replace(table, &sorted).await.map_err(|e| in_table(table, e));
        }
        if !table.other_unique || !table.has_key() {
            return self.write(table, &sorted).await.map_err(|e| in_table(table, e));
        }
        // A value that must be unique may pass from one row to another: row by row that is fine, set by set it may collide.
        // Then all rows that change are taken out before they are put back.
        if !is_few(table, &sorted) {
            // Made in the savepoint it would be gone with it.
            self.stage_for(table).await?;
        }
        self.target.run("savepoint peergate_table").await?;
        match self.write(table, &sorted).await {
            Ok(()) => self.target.run("release savepoint peergate_table").await,
            Err(error) if is_collision(&error) => {
                self.suspect = None;
                self.target.run("rollback to savepoint peergate_table").await?;
                self.replace(table, &sorted).await.map_err(|e| in_table(table, e))
            }
            Err(error) => Err(in_table(table, error)),
        }
    }

    /// Deletes, then changes, then adds rows.
    async fn write(&mut self, table: &Arc<TableMap>, rows: &Sorted<'_>) -> Result<(), Error> {
        if !rows.keyless.is_empty() {
            return self.write_keyless(table, rows.keyless).await;
        }
        let staged_inserts: &[&Tuple] = if table.direct { &[] } else { &rows.inserts };
        if is_few(table, rows) {
            let few = if table.direct { one_by_one(table, &rows.without_inserts()) } else { one_by_one(table, rows) };
            self.write_rows(table, &few).await?;
        } else {
            let groups = group_by_unchanged(&rows.updates, |row| row);
            self.fill_stage(table, rows, &groups, staged_inserts).await?;
            self.complete_moves(table, &rows.moves).await?;
            self.bury(table, rows).await?;
            if !rows.deletes.is_empty() {
                let done =
                    self.run_staged(table, |s| stage::delete(s, table), &[&stage::DELETE, &stage::DELETE]).await?;
                expect_rows(table, "delete", rows.deletes.len(), done)?;
            }
            for (n, (mask, members)) in groups.iter().enumerate() {
                let done = self.run_staged(table, |s| stage::update(s, table, mask), &[&update_group(n)]).await?;
                expect_rows(table, "update", members.len(), done)?;
            }
            self.clear(table, rows).await?;
            if !staged_inserts.is_empty() {
                self.run_staged(table, |s| stage::insert(s, table), &[]).await?;
            }
            self.put_moves_back(table, &rows.moves).await?;
        }
        if table.direct && !rows.inserts.is_empty() {
            self.copy_rows(table, rows.inserts.iter().copied()).await?;
        }
        Ok(())
    }

    /// Copies rows into the table itself.
    async fn copy_rows(&mut self, table: &Arc<TableMap>, rows: impl Iterator<Item = &Tuple>) -> Result<(), Error> {
        let statement = self.prepare(table, stage::copy_direct(table)).await?;
        let mut copy = CopyWriter::open(&self.target, &statement).await?;
        for row in rows {
            copy.row(table, row).await?;
        }
        copy.finish().await
    }

    /// Writes what happened to rows without a key in its order; many inserts at a stretch go by COPY.
    async fn write_keyless(&mut self, table: &Arc<TableMap>, changes: &[Change]) -> Result<(), Error> {
        for stretch in changes.chunk_by(|a, b| matches!((a, b), (Change::Insert(_), Change::Insert(_)))) {
            if table.direct && stretch.len() >= MANY_INSERTS {
                let rows = stretch.iter().filter_map(|c| if let Change::Insert(new) = c { Some(new) } else { None });
                self.copy_rows(table, rows).await?;
            } else {
                self.write_rows(table, stretch).await?;
            }
        }
        Ok(())
    }

    /// Takes all rows that change out and puts them back whole: the way for rows that collide on their way, and for columns that no
    /// UPDATE may set.
    async fn replace(&mut self, table: &Arc<TableMap>, rows: &Sorted<'_>) -> Result<(), Error> {
        if !rows.keyless.is_empty() {
            return self.write_keyless(table, rows.keyless).await;
        }
        let groups = group_by_unchanged(&rows.updates, |row| row);
        self.fill_stage(table, rows, &groups, &rows.inserts).await?;
        self.complete_moves(table, &rows.moves).await?;
        self.bury(table, rows).await?;
        for (n, (mask, members)) in groups.iter().enumerate() {
            if stage::complete("", table, mask).is_some() {
                let complete = |s: &str| stage::complete(s, table, mask).expect("checked above");
                let done = self.run_staged(table, complete, &[&update_group(n)]).await?;
                expect_rows(table, "update", members.len(), done)?;
            }
        }
        let done = self.run_staged(table, |s| stage::delete(s, table), &[&stage::DELETE, &i16::MAX]).await?;
        expect_rows(table, "update or delete", rows.deletes.len() + rows.updates.len(), done)?;
        if !groups.is_empty() {
            self.run_staged(table, |s| stage::put_back(s, table), &[&stage::FIRST_UPDATE, &i16::MAX]).await?;
        }
        self.clear(table, rows).await?;
        if !rows.inserts.is_empty() {
            self.run_staged(table, |s| stage::insert(s, table), &[]).await?;
        }
        self.put_moves_back(table, &rows.moves).await
    }

    /// Makes room where deleted rows have stayed.
    async fn clear(&mut self, table: &Arc<TableMap>, rows: &Sorted<'_>) -> Result<(), Error> {
        if stage::clear("", table).is_some() && rows.inserts.len() + rows.moves.len() + rows.clears.len() > 0 {
            self.run_staged(table, |s| stage::clear(s, table).expect("checked above"), &[]).await?;
        }
        Ok(())
    }

    /// Marks rows that were deleted on the source and stay.
    async fn bury(&mut self, table: &Arc<TableMap>, rows: &Sorted<'_>) -> Result<(), Error> {
        if rows.buries.is_empty() {
            return Ok(());
        }
        let done = self.run_staged(table, |s| stage::bury(s, table), &[]).await?;
        expect_rows(table, "delete", rows.buries.len(), done)
    }

    /// Gives rows that move to another key what was not sent of them, before the rows with their old keys go.
    async fn complete_moves(&mut self, table: &Arc<TableMap>, moves: &[Move<'_>]) -> Result<(), Error> {
        for (n, (mask, members)) in group_by_unchanged(moves, |(_, new)| new).iter().enumerate() {
            if stage::complete_moves("", table, mask).is_some() {
                let complete = |s: &str| stage::complete_moves(s, table, mask).expect("checked above");
                let done = self.run_staged(table, complete, &[&move_group(n)]).await?;
                expect_rows(table, "update", members.len(), done)?;
            }
        }
        Ok(())
    }

    async fn put_moves_back(&mut self, table: &Arc<TableMap>, moves: &[Move<'_>]) -> Result<(), Error> {
        if !moves.is_empty() {
            self.run_staged(table, |s| stage::put_back(s, table), &[&i16::MIN, &stage::FIRST_MOVE]).await?;
        }
        Ok(())
    }

    async fn fill_stage(
        &mut self,
        table: &Arc<TableMap>,
        rows: &Sorted<'_>,
        updates: &Groups<'_, &Tuple>,
        inserts: &[&Tuple],
    ) -> Result<(), Error> {
        let stage = self.empty_stage(table).await?;
        let statement = self.prepare(table, stage::copy_in(&stage, table)).await?;
        let mut copy = CopyWriter::open(&self.target, &statement).await?;
        for row in &rows.deletes {
            copy.staged_row(stage::DELETE, table, row, Staged::Key).await?;
        }
        for (n, (_, members)) in updates.iter().enumerate() {
            for row in members {
                copy.staged_row(update_group(n), table, row, Staged::whole(rows, row)).await?;
            }
        }
        for row in inserts {
            copy.staged_row(stage::INSERT, table, row, Staged::whole(rows, row)).await?;
        }
        for (group, keys) in [(stage::CLEAR, &rows.clears), (stage::BURY, &rows.buries)] {
            for row in keys {
                copy.staged_row(group, table, row, Staged::Key).await?;
            }
        }
        copy.finish().await?;
        if rows.moves.is_empty() {
            return Ok(());
        }
        let statement = self.prepare(table, stage::copy_moves(&stage, table)).await?;
        let mut copy = CopyWriter::open(&self.target, &statement).await?;
        for (n, (_, members)) in group_by_unchanged(&rows.moves, |(_, new)| new).iter().enumerate() {
            for (old, new) in members {
                copy.moved_row(move_group(n), table, old, new, rows.is_deleted(new)).await?;
            }
        }
        copy.finish().await
    }

    async fn run_staged(
        &mut self,
        table: &Arc<TableMap>,
        sql: impl Fn(&str) -> String,
        groups: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<u64, Error> {
        let stage = self.stage_for(table).await?;
        let statement = self.prepare(table, sql(&stage)).await?;
        self.target.client.execute(&statement, groups).await.map_err(|e| self.target.error(&e))
    }
}

/// Returns whether rows are written one by one, since there are so few.
fn is_few(table: &TableMap, rows: &Sorted<'_>) -> bool {
    let staged_inserts = if table.direct { 0 } else { rows.inserts.len() };
    let keys = rows.clears.len() + rows.buries.len();
    rows.moves.is_empty() && rows.deletes.len() + rows.updates.len() + staged_inserts + keys <= FEW_ROWS
}

/// Puts rows together that leave the same values out.
fn group_by_unchanged<'a, T>(rows: &'a [T], new: impl Fn(&'a T) -> &'a Tuple) -> Groups<'a, T> {
    let mut groups: Groups<'a, T> = Vec::new();
    for row in rows {
        // Whole rows are the rule, and need no mask.
        let new = new(row);
        let mask = if new.has_unchanged() { unchanged_mask(new) } else { Vec::new() };
        match groups.iter_mut().find(|(m, _)| *m == mask) {
            Some((_, members)) => members.push(row),
            None => groups.push((mask, vec![row])),
        }
    }
    groups
}

fn update_group(n: usize) -> i16 {
    stage::FIRST_UPDATE + i16::try_from(n).expect("rows leave few different sets of values out")
}

fn move_group(n: usize) -> i16 {
    stage::FIRST_MOVE - i16::try_from(n).expect("rows leave few different sets of values out")
}
