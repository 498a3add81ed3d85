//! Turns the output plugin's messages into batches. No I/O: what it must know of tables was looked up before.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use pg::pgoutput::{Message, Relation};
use pg::{Lsn, SqlState, TableName};

use crate::batch::Batch;
use crate::copy::Targets;
use crate::error::{Error, Problem};
use crate::relation::TableMap;
use crate::schema::{TablePlan, TargetColumn, Types, is_same_type};

/// What is known of the mirror's tables on both sides.
pub struct Tables {
    /// The mirror's tables, by their name on the source.
    pub plans: HashMap<TableName, TablePlan>,
    /// The target's tables, by their name there.
    pub targets: Targets,
    /// The source's types.
    pub types: Types,
    /// Values come in binary.
    pub binary: bool,
    /// Changes are written in their own order, across tables: on the target they depend on each other.
    pub in_order: bool,
}

/// Where the stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Position {
    /// Between transactions.
    Between,
    /// In a transaction that is to be applied.
    Inside {
        /// Where it commits, for errors.
        commit_lsn: Lsn,
    },
    /// In a transaction that the target has already.
    Skipping,
}

/// Gathers changes into an open batch.
pub struct Assembler {
    tables: Tables,
    /// Relations by oid. One that cannot be mapped is a problem only when a row of it comes: partitions are described too, although
    /// their rows come as their root's.
    maps: HashMap<u32, Result<Arc<TableMap>, Problem>>,
    position: Position,
    /// Transactions that end at or before this are on the target.
    applied: Lsn,
    batch: Batch,
    /// Everything before this was seen, and nothing of it waits in the batch.
    passed: Lsn,
}

impl Assembler {
    /// Begins where the target is.
    pub fn new(tables: Tables, applied: Lsn) -> Assembler {
        let batch = Batch::new(tables.in_order);
        Assembler { tables, maps: HashMap::new(), position: Position::Between, applied, batch, passed: applied }
    }

    /// Returns whether the open batch holds whole transactions only.
    pub fn between_transactions(&self) -> bool {
        self.position == Position::Between
    }

    /// Returns the open batch.
    pub fn open(&self) -> &Batch {
        &self.batch
    }

    /// Takes the open batch; the next change begins a new one.
    pub fn take(&mut self) -> Batch {
        let batch = self.begin_anew();
        // A transaction that goes on belongs to the next batch too.
        if let (None, Position::Inside { .. }) = (batch.end, self.position) {
            self.batch.first_commit_time = batch.first_commit_time;
            self.batch.first_commit_lsn = batch.last_commit_lsn;
            self.batch.last_commit_lsn = batch.last_commit_lsn;
            self.batch.continues = true;
        }
        batch
    }

    fn begin_anew(&mut self) -> Batch {
        std::mem::replace(&mut self.batch, Batch::new(self.tables.in_order))
    }

    /// Returns the position before which nothing waits to be applied, when the open batch is empty.
    pub fn idle_position(&self) -> Option<Lsn> {
        (self.between_transactions() && self.batch.is_empty()).then_some(self.passed)
    }

    /// The walsender has decoded everything before `end`.
    pub fn keepalive(&mut self, end: Lsn) {
        if self.idle_position().is_some() {
            self.passed = self.passed.max(end);
        }
    }

    /// Takes one message of the output plugin.
    ///
    /// # Errors
    /// [`Error::Blocked`] if it cannot be decoded, or the target's tables cannot take what it says.
    pub fn message(&mut self, start: Lsn, body: Bytes) -> Result<(), Error> {
        let message = Message::decode(body).map_err(|e| Error::from(e).at(start))?;
        self.handle(message).map_err(|e| match self.position {
            Position::Inside { commit_lsn } => e.at(commit_lsn),
            _ => e.at(start),
        })
    }

    fn handle(&mut self, message: Message) -> Result<(), Error> {
        match message {
            Message::Begin { commit_lsn, commit_time, .. } => {
                // The server resumes after what we name, but only we know what the target has.
                self.position =
                    if commit_lsn < self.applied { Position::Skipping } else { Position::Inside { commit_lsn } };
                if let Position::Inside { .. } = self.position {
                    self.batch.begin(commit_lsn, commit_time);
                }
                Ok(())
            }
            Message::Commit { end_lsn, commit_time, .. } => {
                if let Position::Inside { .. } = self.position {
                    self.commit(end_lsn, commit_time);
                }
                self.position = Position::Between;
                Ok(())
            }
            // Relations are described once, be it in a transaction that is skipped.
            Message::Relation(relation) => {
                let map = self.map_relation(&relation).map(Arc::new);
                self.maps.insert(relation.oid, map);
                Ok(())
            }
            _ if self.position == Position::Skipping => Ok(()),
            Message::Insert { relation, new } => {
                let table = self.map(relation)?;
                self.batch.insert(&table, new);
                Ok(())
            }
            Message::Update { relation, old, new } => {
                let table = self.map(relation)?;
                if self.batch.update(&table, old, new) { Ok(()) } else { Err(no_key(&table, "updated")) }
            }
            Message::Delete { relation, old } => {
                let table = self.map(relation)?;
                if self.batch.delete(&table, old) { Ok(()) } else { Err(no_key(&table, "deleted")) }
            }
            Message::Truncate { relations, restart_identity, .. } => {
                let tables = relations.iter().map(|oid| self.map(*oid)).collect::<Result<_, _>>()?;
                self.batch.truncate(tables, restart_identity);
                Ok(())
            }
            Message::Origin { .. } | Message::Type { .. } | Message::Message { .. } => Ok(()),
        }
    }

    fn commit(&mut self, end_lsn: Lsn, commit_time: i64) {
        if self.batch.is_empty() {
            // Nothing of it concerns us; older servers send such transactions all the same.
            self.begin_anew();
            self.passed = self.passed.max(end_lsn);
        } else {
            self.batch.commit(end_lsn, commit_time);
            self.passed = end_lsn;
        }
    }

    fn map_relation(&self, relation: &Relation) -> Result<TableMap, Problem> {
        let name = TableName::new(&relation.schema, &relation.name);
        let plan = self.tables.plans.get(&name).ok_or_else(|| {
            let message = format!("the source sends rows of table \"{name}\", which the mirror does not know");
            Problem::new(SqlState::UNDEFINED_TABLE, message)
                .detail("The table was renamed, or the publication was changed by hand.")
                .hint("Undo that, then RESUME MIRROR; or drop the mirror and create it anew.")
        })?;
        let target = self.tables.targets.get(&plan.target_name).ok_or_else(|| {
            Problem::new(SqlState::UNDEFINED_TABLE, format!("target table \"{}\" does not exist", plan.target_name))
        })?;
        let same = |oid, column: &TargetColumn| is_same_type(self.tables.types.get(&oid), column);
        let takes = |column: &str| plan.columns.takes(column);
        TableMap::new(relation, target, same, takes, plan.key(), self.tables.binary)
    }

    fn map(&self, oid: u32) -> Result<Arc<TableMap>, Error> {
        match self.maps.get(&oid) {
            Some(Ok(map)) => Ok(map.clone()),
            // As text, the target's type reads or refuses what comes; the same rows are asked for again.
            Some(Err(problem)) if problem.sqlstate == SqlState::DATATYPE_MISMATCH => Err(Error::TextNeeded),
            Some(Err(problem)) => Err(Error::Blocked(problem.clone())),
            None => Err(Error::Blocked(Problem::new(
                SqlState::PROTOCOL_VIOLATION,
                format!("the source sends a row of relation {oid} without describing it"),
            ))),
        }
    }
}

fn no_key(table: &TableMap, what: &str) -> Error {
    Error::Blocked(
        Problem::new(
            SqlState::WRONG_STATE,
            format!("a row of table \"{}\" was {what}, and there is nothing to find it by", table.source),
        )
        .hint("Give the table a primary key or a replica identity, and create the mirror anew."),
    )
}
