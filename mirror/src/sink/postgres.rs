//! Writes batches to a Postgres target.
//!
//! Changes are staged by COPY and moved by one statement for each kind and table (`sets`); rows that only come are copied into the
//! table itself; a few, or what must keep its order, are written one by one (`rows`). The progress row is written in the same
//! transaction.

mod copy_in;
mod errors;
mod rows;
mod sets;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use catalog::event::Event;
use catalog::peer::PeerOptions;
use pg::name::quote_ident;
use pg::pgoutput::Tuple;
use pg::{Lsn, SqlState};
use tokio::sync::mpsc;
use tokio_postgres::Statement;

use super::{Sink, alter, origin, progress_row, stage};
use crate::batch::{Batch, Step};
use crate::error::{Error, Problem};
use crate::progress::DurableLsn;
use crate::relation::TableMap;
use crate::session::PeerSession;

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
    lane: i32,
    epoch: i64,
    applied: Lsn,
    in_transaction: bool,
    relations: HashMap<u32, Prepared>,
    uses: u64,
    triggers_fire: bool,
    /// The session holds the mirror's replication origin: each transaction is marked.
    tagged: bool,
    /// The row that a statement for one row could not write.
    suspect: Option<(Arc<TableMap>, Tuple)>,
    /// What happened in the open transaction, told when it is committed.
    events: Vec<Event>,
    tell: Option<mpsc::UnboundedSender<Event>>,
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

    async fn on(writer: (PeerSession, bool), mirror: &str, epoch: i64) -> Result<PostgresSink, Error> {
        let applied = progress_row::claim(&writer.0, mirror, epoch).await?;
        PostgresSink::in_lane(writer, mirror, progress_row::MAIN_LANE, epoch, applied).await
    }

    /// Opens a further session for the lane of tables that come later: at their copy, or where the lane was left (`None`).
    ///
    /// # Errors
    /// [`Error::Fenced`] if a newer owner has the mirror.
    pub async fn open_late_lane(
        peer: &str,
        options: &PeerOptions,
        mirror: &str,
        epoch: i64,
        at: Option<Lsn>,
    ) -> Result<PostgresSink, Error> {
        let writer = open_writer(peer, options).await?;
        let applied = progress_row::open_late_lane(&writer.0, mirror, epoch, at).await?;
        PostgresSink::in_lane(writer, mirror, progress_row::LATE_LANE, epoch, applied).await
    }

    /// Opens a further session for rows that are written beside the stream, while it stands still at `applied`: what is written has its
    /// progress row as a fence, and does not move it.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn open_beside(
        peer: &str,
        options: &PeerOptions,
        mirror: &str,
        epoch: i64,
        applied: Lsn,
    ) -> Result<PostgresSink, Error> {
        let writer = open_writer(peer, options).await?;
        PostgresSink::in_lane(writer, mirror, progress_row::MAIN_LANE, epoch, applied).await
    }

    async fn in_lane(
        (target, triggers_fire): (PeerSession, bool),
        mirror: &str,
        lane: i32,
        epoch: i64,
        applied: Lsn,
    ) -> Result<PostgresSink, Error> {
        target.run(SETTINGS).await?;
        Ok(PostgresSink {
            target,
            mirror: mirror.to_owned(),
            lane,
            epoch,
            applied,
            in_transaction: false,
            relations: HashMap::new(),
            uses: 0,
            triggers_fire,
            tagged: false,
            suspect: None,
            events: Vec::new(),
            tell: None,
        })
    }

    /// Marks the transactions from now on with a replication origin; returns why not, if it cannot be had: they count all the same.
    ///
    /// # Errors
    /// [`Error::Transient`] if the session was lost.
    pub async fn tag(&mut self, origin: &str) -> Result<Option<Problem>, Error> {
        match origin::set_up(&self.target, origin).await {
            Ok(()) => self.tagged = true,
            Err(problem) if problem.sqlstate.class() == "08" => return Err(Error::Transient(problem)),
            Err(problem) => return Ok(Some(problem)),
        }
        Ok(None)
    }

    /// Has what happens on the target told to `listener`, once it is committed.
    pub fn tell(&mut self, listener: mpsc::UnboundedSender<Event>) {
        self.tell = Some(listener);
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

    /// Begins anew: nothing of an earlier copy counts any more.
    ///
    /// # Errors
    /// [`Error::Fenced`] if another process has taken over.
    pub async fn reset(&mut self) -> Result<(), Error> {
        progress_row::reset(&self.target, &self.mirror, self.epoch).await?;
        self.applied = Lsn::ZERO;
        Ok(())
    }

    /// Records where streaming begins: at the copy's snapshot.
    ///
    /// # Errors
    /// [`Error::Fenced`] if another process has taken over.
    pub async fn record_snapshot(&mut self, snapshot: Lsn) -> Result<DurableLsn, Error> {
        let (lane, from) = (self.lane, self.applied);
        progress_row::advance(&self.target, &self.mirror, lane, self.epoch, from, snapshot, None).await?;
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
                let (softly, really): (Vec<_>, Vec<_>) = tables.iter().partition(|t| t.deletes_softly());
                for table in softly {
                    let (set, deleted) = (table.bury(), table.is_deleted("t").expect("it deletes softly"));
                    self.target.run(&format!("update {} t set {set} where not ({deleted})", table.alone)).await?;
                }
                if really.is_empty() {
                    return Ok(());
                }
                let names: Vec<&str> = really.iter().map(|t| t.alone.as_str()).collect();
                let restart = if *restart_identity { " restart identity" } else { "" };
                self.target.run(&format!("truncate table {}{restart}", names.join(", "))).await
            }
            Step::InOrder(changes) => self.write_in_order(changes).await,
            Step::Alter(alter) => {
                // What was prepared for the table is of its old shape.
                self.forget(alter.plan.source.oid).await?;
                self.events.extend(alter::run(&self.target, &self.mirror, alter).await?);
                Ok(())
            }
        }
    }

    async fn begin(&self) -> Result<(), Error> {
        // Where foreign keys fire, those that may wait do so: what they refer to may come later in the transaction.
        self.target.run(if self.triggers_fire { "begin; set constraints all deferred" } else { "begin" }).await
    }

    async fn write_batch(&mut self, batch: &Batch) -> Result<Option<DurableLsn>, Error> {
        if !self.in_transaction {
            self.begin().await?;
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
        progress_row::advance(
            &self.target,
            &self.mirror,
            self.lane,
            self.epoch,
            self.applied,
            end.end_lsn,
            end.commit_time,
        )
        .await?;
        fail_point!("progress written");
        if self.tagged {
            // Last, and with the commit: what fails before it has marked nothing.
            self.target.run(&format!("{}; commit", origin::mark(end.end_lsn, end.commit_time))).await?;
        } else {
            self.target.run("commit").await?;
        }
        fail_point!("batch committed");
        self.in_transaction = false;
        self.relations.values_mut().for_each(|r| r.staged = false);
        self.applied = end.end_lsn;
        for event in self.events.drain(..) {
            if let Some(listener) = &self.tell {
                // Nobody listens when the mirror stops.
                let _ = listener.send(event);
            }
        }
        Ok(Some(DurableLsn::recorded(end.end_lsn)))
    }

    /// Returns the relation's staging table, without the rows of earlier parts of the transaction: they are done with.
    async fn empty_stage(&mut self, table: &Arc<TableMap>) -> Result<String, Error> {
        let stage = self.stage_for(table).await?;
        let prepared = self.relations.get_mut(&table.oid).expect("made by stage_for");
        if std::mem::replace(&mut prepared.staged, true) {
            self.target.run(&format!("truncate {stage}")).await?;
        }
        Ok(stage)
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
}

impl Sink for PostgresSink {
    async fn apply(&mut self, batch: &Batch) -> Result<Option<DurableLsn>, Error> {
        match self.write_batch(batch).await {
            Err(Error::Blocked(problem)) => Err(Error::Blocked(self.locate(batch, problem).await)),
            other => other,
        }
    }
}
