//! Writes batches to a Postgres target.
//!
//! Changes are staged by COPY and moved by one statement for each kind and table; rows that only come are copied into the table itself.
//! The progress row is written in the same transaction.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use catalog::peer::PeerOptions;
use futures_util::SinkExt;
use pg::name::quote_ident;
use pg::pgoutput::Tuple;
use pg::{Lsn, SqlState};
use tokio_postgres::Statement;

use super::{Sink, encode, origin, progress_row, stage};
use crate::batch::{Batch, Sorted, Step, TableChanges, unchanged_mask};
use crate::error::{Error, Problem};
use crate::progress::DurableLsn;
use crate::relation::TableMap;
use crate::session::PeerSession;

/// Bytes that are gathered before they are handed to the connection.
const SEND_BYTES: usize = 256 << 10;

/// Relations whose staging tables and statements are kept; each staging table costs a little at every commit.
const RELATIONS_MAX: usize = 64;

/// How a sink's session writes.
///
/// The joins with a staging table must go by the target's index: the planner knows nothing of a staging table's size, and would rather
/// read the whole target. Who holds a lock that we need is told on by an error that passes, not by a lag that grows in silence. What is
/// acknowledged to the source must be on disk here.
const SETTINGS: &str = "
    set enable_hashjoin = off; set enable_mergejoin = off; set enable_seqscan = off; set plan_cache_mode = force_generic_plan;
    set temp_buffers = '64MB'; set lock_timeout = '30s'; set synchronous_commit = on;
";

/// A session that applies changes to one target.
pub struct PostgresSink {
    target: PeerSession,
    mirror: String,
    epoch: i64,
    applied: Lsn,
    in_transaction: bool,
    relations: HashMap<u32, Prepared>,
    uses: u64,
    triggers_fire: bool,
    /// The session holds the mirror's replication origin: each transaction is marked.
    marks: bool,
}

/// What the session keeps for a relation: its staging table, once it was needed, and the statements that were prepared.
struct Prepared {
    table: Arc<TableMap>,
    stage: Option<String>,
    statements: HashMap<String, Statement>,
    last_use: u64,
    /// The staging table holds rows of this transaction.
    staged: bool,
}

/// Opens a session for writing rows as replication does: ordinary triggers and foreign keys stay quiet, as the source has seen to them.
///
/// Returns whether they fire all the same, because the role may not switch them off.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn open_writer(peer: &str, options: &PeerOptions) -> Result<(PeerSession, bool), Error> {
    let target = PeerSession::open(peer, options).await?;
    match target.client.batch_execute("set session_replication_role = replica").await {
        Ok(()) => Ok((target, false)),
        Err(error) if error.code().is_some_and(|c| c.code() == SqlState::INSUFFICIENT_PRIVILEGE.as_str()) => {
            Ok((target, true))
        }
        Err(error) => Err(target.error(&error)),
    }
}

impl PostgresSink {
    /// Opens a session and takes the mirror's progress row over; [`PostgresSink::applied`] then tells where the target is.
    ///
    /// # Errors
    /// [`Error::Fenced`] if a newer owner has the row.
    pub async fn open(peer: &str, options: &PeerOptions, mirror: &str, epoch: i64) -> Result<PostgresSink, Error> {
        PostgresSink::on(open_writer(peer, options).await?, mirror, epoch).await
    }

    /// As [`PostgresSink::open`], for the beginning of an attempt: whatever an earlier one, here or in another process, still has open on
    /// the target is ended first. Its machine may be gone or stopped, and its locks would be in the way until the server noticed.
    ///
    /// # Errors
    /// As [`PostgresSink::open`].
    pub async fn take_over(peer: &str, options: &PeerOptions, mirror: &str, epoch: i64) -> Result<PostgresSink, Error> {
        let writer = open_writer(peer, options).await?;
        progress_row::end_earlier_sessions(&writer.0, mirror, epoch).await?;
        PostgresSink::on(writer, mirror, epoch).await
    }

    async fn on((target, triggers_fire): (PeerSession, bool), mirror: &str, epoch: i64) -> Result<PostgresSink, Error> {
        let applied = progress_row::claim(&target, mirror, epoch).await?;
        target.run(SETTINGS).await?;
        let mirror = mirror.to_owned();
        Ok(PostgresSink {
            target,
            mirror,
            epoch,
            applied,
            in_transaction: false,
            relations: HashMap::new(),
            uses: 0,
            triggers_fire,
            marks: false,
        })
    }

    /// Marks the transactions from now on with a replication origin; returns why not, if it cannot be had: they count all the same.
    ///
    /// # Errors
    /// [`Error::Transient`] if the session was lost.
    pub async fn tag(&mut self, origin: &str) -> Result<Option<Problem>, Error> {
        match origin::set_up(&self.target, origin).await {
            Ok(()) => self.marks = true,
            Err(problem) if problem.sqlstate.class() == "08" => return Err(Error::Transient(problem)),
            Err(problem) => return Ok(Some(problem)),
        }
        Ok(None)
    }

    /// Returns the position up to which the target has everything; zero: the copy is not complete.
    pub fn applied(&self) -> Lsn {
        self.applied
    }

    /// Returns whether ordinary triggers and foreign keys of the target fire, because the role may not switch them off.
    pub fn triggers_fire(&self) -> bool {
        self.triggers_fire
    }

    /// Returns the session, for looking at the target's tables.
    pub fn session(&self) -> &PeerSession {
        &self.target
    }

    /// Lets the operators of these schemas be found: keys may be of types that are not built in, and compare by operators of their own.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn use_operators_of(&self, schemas: &BTreeSet<String>) -> Result<(), Error> {
        let path: Vec<String> = schemas.iter().map(|s| quote_ident(s)).collect();
        self.target
            .run(&format!("set search_path = {}", if path.is_empty() { "''".to_owned() } else { path.join(", ") }))
            .await
    }

    /// Records that the copy is complete: streaming begins at `snapshot`.
    ///
    /// # Errors
    /// [`Error::Fenced`] if another process has taken over.
    pub async fn record_copy(&mut self, snapshot: Lsn) -> Result<DurableLsn, Error> {
        progress_row::advance(&self.target, &self.mirror, self.epoch, self.applied, snapshot, None).await?;
        self.applied = snapshot;
        Ok(DurableLsn::recorded(snapshot))
    }

    async fn apply_step(&mut self, step: &Step) -> Result<(), Error> {
        match step {
            Step::Changes(tables) => {
                for changes in tables {
                    self.apply_table(changes).await?;
                }
                Ok(())
            }
            Step::Truncate { tables, restart_identity } => {
                let names: Vec<&str> = tables.iter().map(|t| t.alone.as_str()).collect();
                let restart = if *restart_identity { " restart identity" } else { "" };
                self.target.run(&format!("truncate table {}{restart}", names.join(", "))).await
            }
            Step::Rekey { table, old, new } => self.rekey(table, old, new).await,
        }
    }

    async fn apply_table(&mut self, changes: &TableChanges) -> Result<(), Error> {
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
        self.stage_for(table).await?;
        self.target.run("savepoint peergate_table").await?;
        match self.write(table, &sorted).await {
            Ok(()) => self.target.run("release savepoint peergate_table").await,
            Err(error) if is_collision(&error) => {
                self.target.run("rollback to savepoint peergate_table").await?;
                self.replace(table, &sorted).await.map_err(|e| in_table(table, e))
            }
            Err(error) => Err(in_table(table, error)),
        }
    }

    /// Deletes, then changes, then adds rows.
    async fn write(&mut self, table: &Arc<TableMap>, rows: &Sorted<'_>) -> Result<(), Error> {
        let groups = group_updates(&rows.updates);
        let direct = table.direct;
        let staged_inserts: &[&Tuple] = if direct { &[] } else { &rows.inserts };
        if !rows.deletes.is_empty() || !groups.is_empty() || !staged_inserts.is_empty() {
            self.fill_stage(table, &rows.deletes, &groups, staged_inserts).await?;
        }
        if !rows.deletes.is_empty() {
            let done = self.run_staged(table, |s| stage::delete(s, table), &[&stage::DELETE, &stage::DELETE]).await?;
            expect_rows(table, "delete", rows.deletes.len(), done)?;
        }
        for (n, (mask, members)) in groups.iter().enumerate() {
            let done = self.run_staged(table, |s| stage::update(s, table, mask), &[&update_group(n)]).await?;
            expect_rows(table, "update", members.len(), done)?;
        }
        if !staged_inserts.is_empty() {
            self.run_staged(table, |s| stage::insert(s, table), &[&stage::INSERT]).await?;
        }
        if direct && !rows.inserts.is_empty() {
            let statement = self.prepare(table, stage::copy_direct(table)).await?;
            let mut copy = CopyWriter::open(&self.target, &statement).await?;
            for row in &rows.inserts {
                encode::row(&mut copy.buffer, table, row);
                copy.send_if_full().await?;
            }
            copy.finish().await?;
        }
        Ok(())
    }

    /// Takes all rows that change out and puts them back whole: the way for rows that collide on their way, and for columns that no
    /// UPDATE may set.
    async fn replace(&mut self, table: &Arc<TableMap>, rows: &Sorted<'_>) -> Result<(), Error> {
        let groups = group_updates(&rows.updates);
        self.fill_stage(table, &rows.deletes, &groups, &rows.inserts).await?;
        for (n, (mask, members)) in groups.iter().enumerate() {
            if stage::complete("", table, mask).is_some() {
                let complete = |s: &str| stage::complete(s, table, mask).expect("checked above");
                let done = self.run_staged(table, complete, &[&update_group(n)]).await?;
                expect_rows(table, "update", members.len(), done)?;
            }
        }
        let done = self.run_staged(table, |s| stage::delete(s, table), &[&stage::DELETE, &i16::MAX]).await?;
        expect_rows(table, "update or delete", rows.deletes.len() + rows.updates.len(), done)?;
        self.run_staged(table, |s| stage::insert(s, table), &[&i16::MAX]).await?;
        Ok(())
    }

    async fn rekey(&mut self, table: &Arc<TableMap>, old: &Tuple, new: &Tuple) -> Result<(), Error> {
        let mask = unchanged_mask(new);
        let mut copy = self.open_stage(table).await?;
        encode::staged_row(&mut copy.buffer, stage::OLD_KEY, table, old, true);
        encode::staged_row(&mut copy.buffer, stage::FIRST_UPDATE, table, new, false);
        copy.finish().await?;
        // The row is completed, taken out by its old key and put back: no UPDATE may set a GENERATED ALWAYS identity.
        let done = self.run_staged(table, |s| stage::complete_by_old_key(s, table, &mask), &[]).await?;
        expect_rows(table, "update", 1, done)?;
        let done = self.run_staged(table, |s| stage::delete(s, table), &[&stage::OLD_KEY, &stage::OLD_KEY]).await?;
        expect_rows(table, "update", 1, done)?;
        self.run_staged(table, |s| stage::insert_group(s, table), &[&stage::FIRST_UPDATE]).await?;
        Ok(())
    }

    async fn fill_stage(
        &mut self,
        table: &Arc<TableMap>,
        deletes: &[&Tuple],
        updates: &[(Vec<bool>, Vec<&Tuple>)],
        inserts: &[&Tuple],
    ) -> Result<(), Error> {
        let mut copy = self.open_stage(table).await?;
        for row in deletes {
            encode::staged_row(&mut copy.buffer, stage::DELETE, table, row, true);
            copy.send_if_full().await?;
        }
        for (n, (_, members)) in updates.iter().enumerate() {
            for row in members {
                encode::staged_row(&mut copy.buffer, update_group(n), table, row, false);
                copy.send_if_full().await?;
            }
        }
        for row in inserts {
            encode::staged_row(&mut copy.buffer, stage::INSERT, table, row, false);
            copy.send_if_full().await?;
        }
        copy.finish().await
    }

    /// Opens the staging table for this transaction's next rows. Earlier rows of the transaction are done with.
    async fn open_stage(&mut self, table: &Arc<TableMap>) -> Result<CopyWriter, Error> {
        let stage = self.stage_for(table).await?;
        let prepared = self.relations.get_mut(&table.oid).expect("made by stage_for");
        if std::mem::replace(&mut prepared.staged, true) {
            self.target.run(&format!("truncate {stage}")).await?;
        }
        let statement = self.prepare(table, stage::copy_in(&stage)).await?;
        CopyWriter::open(&self.target, &statement).await
    }

    /// Returns the name of the relation's staging table, which is made unless it is there.
    async fn stage_for(&mut self, table: &Arc<TableMap>) -> Result<String, Error> {
        let name = format!("pg_temp.peergate_stage_{}", self.uses);
        let prepared = self.relation(table).await?;
        if let Some(stage) = &prepared.stage {
            return Ok(stage.clone());
        }
        prepared.stage = Some(name.clone());
        self.target.run(&stage::create(&name, table)).await?;
        Ok(name)
    }

    /// Returns what is kept for a relation. One that has changed begins anew, and the one that was not used for longest makes room.
    async fn relation(&mut self, table: &Arc<TableMap>) -> Result<&mut Prepared, Error> {
        self.uses += 1;
        if !self.relations.get(&table.oid).is_some_and(|r| Arc::ptr_eq(&r.table, table)) {
            self.forget(table.oid).await?;
            if self.relations.len() >= RELATIONS_MAX
                && let Some(oldest) = self.relations.iter().min_by_key(|(_, r)| r.last_use).map(|(oid, _)| *oid)
            {
                self.forget(oldest).await?;
            }
            let table = table.clone();
            let prepared = Prepared { stage: None, statements: HashMap::new(), last_use: 0, staged: false, table };
            self.relations.insert(prepared.table.oid, prepared);
        }
        let prepared = self.relations.get_mut(&table.oid).expect("inserted above");
        prepared.last_use = self.uses;
        Ok(prepared)
    }

    async fn forget(&mut self, oid: u32) -> Result<(), Error> {
        match self.relations.remove(&oid).and_then(|r| r.stage) {
            Some(stage) => self.target.run(&format!("drop table {stage}")).await,
            None => Ok(()),
        }
    }

    /// Prepares a statement once for as long as the relation stays as it is.
    async fn prepare(&mut self, table: &Arc<TableMap>, sql: String) -> Result<Statement, Error> {
        if let Some(statement) = self.relation(table).await?.statements.get(&sql) {
            return Ok(statement.clone());
        }
        let statement = self.target.client.prepare(&sql).await.map_err(|e| self.target.error(&e))?;
        self.relation(table).await?.statements.insert(sql, statement.clone());
        Ok(statement)
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

impl Sink for PostgresSink {
    async fn apply(&mut self, batch: &Batch) -> Result<Option<DurableLsn>, Error> {
        if !self.in_transaction {
            self.target.run("begin").await?;
            self.in_transaction = true;
        }
        for step in &batch.steps {
            self.apply_step(step).await?;
        }
        let Some(end) = batch.end else {
            fail_point!("part of a transaction written");
            return Ok(None);
        };
        fail_point!("batch written");
        progress_row::advance(&self.target, &self.mirror, self.epoch, self.applied, end.end_lsn, end.commit_time)
            .await?;
        fail_point!("progress written");
        if self.marks {
            // Last, and with the commit: what fails before it has marked nothing.
            self.target.run(&format!("{}; commit", origin::mark(end.end_lsn, end.commit_time))).await?;
        } else {
            self.target.run("commit").await?;
        }
        fail_point!("batch committed");
        self.in_transaction = false;
        self.relations.values_mut().for_each(|r| r.staged = false);
        self.applied = end.end_lsn;
        Ok(Some(DurableLsn::recorded(end.end_lsn)))
    }
}

/// A running COPY from here to the target.
struct CopyWriter {
    peer: String,
    sink: std::pin::Pin<Box<tokio_postgres::CopyInSink<Bytes>>>,
    buffer: BytesMut,
}

impl CopyWriter {
    async fn open(target: &PeerSession, statement: &Statement) -> Result<CopyWriter, Error> {
        let sink = target.client.copy_in(statement).await.map_err(|e| target.error(&e))?;
        let mut buffer = BytesMut::with_capacity(SEND_BYTES);
        encode::begin(&mut buffer);
        Ok(CopyWriter { peer: target.peer.clone(), sink: Box::pin(sink), buffer })
    }

    async fn send_if_full(&mut self) -> Result<(), Error> {
        if self.buffer.len() >= SEND_BYTES { self.send().await } else { Ok(()) }
    }

    async fn send(&mut self) -> Result<(), Error> {
        let filled = self.buffer.split().freeze();
        self.buffer.reserve(SEND_BYTES);
        self.sink.send(filled).await.map_err(|e| Error::sql(&self.peer, &e))
    }

    async fn finish(mut self) -> Result<(), Error> {
        encode::finish(&mut self.buffer);
        self.send().await?;
        self.sink.as_mut().finish().await.map(|_| ()).map_err(|e| Error::sql(&self.peer, &e))
    }
}

/// Puts updates together that leave the same values out: one statement each.
fn group_updates<'a>(updates: &[&'a Tuple]) -> Vec<(Vec<bool>, Vec<&'a Tuple>)> {
    let mut groups: Vec<(Vec<bool>, Vec<&Tuple>)> = Vec::new();
    for update in updates {
        // Whole rows are the rule, and need no mask.
        let mask = if update.has_unchanged() { unchanged_mask(update) } else { Vec::new() };
        match groups.iter_mut().find(|(m, _)| *m == mask) {
            Some((_, members)) => members.push(update),
            None => groups.push((mask, vec![update])),
        }
    }
    groups
}

fn update_group(n: usize) -> i16 {
    stage::FIRST_UPDATE + i16::try_from(n).expect("rows leave few different sets of values out")
}

fn is_collision(error: &Error) -> bool {
    let collision = |p: &Problem| matches!(p.sqlstate, SqlState::UNIQUE_VIOLATION | SqlState::EXCLUSION_VIOLATION);
    matches!(error, Error::Blocked(p) if collision(p))
}

/// Says to which table an error belongs.
fn in_table(table: &TableMap, error: Error) -> Error {
    match error {
        Error::Blocked(problem) => {
            let detail = problem.detail.clone().map(|d| format!("{d} ")).unwrap_or_default();
            let mut problem =
                problem.detail(format!("{detail}It happened while writing to table \"{}\".", table.target));
            problem.hint.get_or_insert_with(|| {
                "Nothing after this was applied. Mend the target, then RESUME MIRROR.".to_owned()
            });
            Error::Blocked(problem)
        }
        other => other,
    }
}

/// A change that finds no row means that the target is not what the mirror made it: going on would hide it.
fn expect_rows(table: &TableMap, what: &str, expected: usize, found: u64) -> Result<(), Error> {
    if u64::try_from(expected).is_ok_and(|e| e == found) {
        return Ok(());
    }
    Err(Error::Blocked(
        Problem::new(
            SqlState::WRONG_STATE,
            format!(
                "{} of {expected} rows to {what} are missing in target table \"{}\"",
                expected as i128 - i128::from(found),
                table.target
            ),
        )
        .detail("Somebody else has changed the table on the target."),
    ))
}
