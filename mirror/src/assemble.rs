//! Turns the output plugin's messages into batches. No I/O: what it must know of tables was looked up before, or it asks for a look.
//!
//! A RELATION message says that a table may have changed: [`Assembler::undescribed`] returns it, whoever calls looks the table up on the
//! source, and [`Assembler::describe`] works out what has changed and puts that into the batch, before the rows that follow. What no
//! message tells (a default, an index, a column of a table without new rows) is found by a look now and then, and taken up by
//! [`Assembler::take_up`] when everything before that look has been gathered.

mod follow;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use catalog::mirror::Ddl;
use pg::pgoutput::{Message, Relation};
use pg::{Lsn, SqlState, TableName};

use crate::batch::Batch;
use crate::copy::Targets;
use crate::error::{Error, Problem};
use crate::relation::TableMap;
use crate::schema::{TablePlan, Types};
use crate::table_state::Route;

/// What is known of a stream's tables on both sides.
pub struct Tables {
    /// The mirror's tables, by their oid on the source.
    pub known: HashMap<u32, Known>,
    /// The target's tables, by their name there.
    pub targets: Targets,
    /// The source's types.
    pub types: Types,
    /// Values come in binary, where their types have such a form.
    pub binary: bool,
    /// The built-in types that the target has.
    pub builtin: HashSet<u32>,
    /// Changes are written in their own order, across tables: on the target they depend on each other.
    pub in_order: bool,
    /// What is done about changes of schema.
    pub ddl: Ddl,
    /// Which changes of the mirror's tables are taken, by the name that the catalog knows.
    pub routes: HashMap<TableName, Route>,
    /// Rows of tables that have no route come too, and are left out. Else they are not to be expected.
    pub others_come: bool,
}

/// One of the mirror's tables.
#[derive(Clone, Debug)]
pub struct Known {
    /// By which name the catalog knows it.
    pub listed: TableName,
    /// What it looks like on the source at this place of the stream, as the target has it.
    pub plan: TablePlan,
    /// Indexes are carried over.
    pub indexes: bool,
    /// CHECK and foreign key constraints are carried over.
    pub constraints: bool,
}

/// A relation as the source described it last.
struct Described {
    relation: Relation,
    route: Route,
    /// One that cannot be mapped is a problem only when a row of it is taken: partitions are described too, although their rows come as
    /// their root's.
    map: Result<Arc<TableMap>, Problem>,
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
        /// Its number on the source.
        xid: u32,
    },
    /// In a transaction that the target has already.
    Skipping,
}

/// Gathers changes into an open batch.
pub struct Assembler {
    tables: Tables,
    /// Relations by oid.
    relations: HashMap<u32, Described>,
    position: Position,
    /// Transactions that end at or before this are on the target.
    applied: Lsn,
    batch: Batch,
    /// Everything before this was seen.
    passed: Lsn,
    /// Transactions that commit at or after this are not taken.
    until: Option<Lsn>,
    /// One of those has come: nothing before `until` is missing any more.
    beyond: bool,
    /// Transactions that commit exactly here are left out, since a person said so.
    left_out: BTreeSet<Lsn>,
    /// What is left out of the transaction that is under way.
    leaving_out: Option<LeftOut>,
    /// What was left out and is to be told.
    to_tell: Vec<LeftOut>,
    /// Descriptions that call for a look before anything is made of the rows that follow.
    undescribed: VecDeque<Relation>,
    /// When each table was last looked at because it was described, by oid.
    looked_at: HashMap<u32, Instant>,
    /// Tables that were emptied since they were last changed, by oid, with the transaction that did it last.
    emptied: HashMap<u32, u32>,
    /// The relation that was described last, if no row has come since.
    described_last: Option<u32>,
    /// Partitioned tables and partitions of theirs that the target does not know of yet.
    new_partitions: Vec<(u32, u32)>,
}

/// A source transaction that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// Where it commits.
    pub commit_lsn: Lsn,
    /// Its rows inserted, updated and deleted, and truncates, by table.
    pub changes: BTreeMap<TableName, [u64; 4]>,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the source transaction that commits at {} was skipped", self.commit_lsn)?;
        for (n, (table, [inserts, updates, deletes, truncates])) in self.changes.iter().enumerate() {
            let lead = if n == 0 { ": " } else { "; " };
            write!(f, "{lead}table \"{table}\" lacks {inserts} inserts, {updates} updates, {deletes} deletes")?;
            if *truncates > 0 {
                write!(f, ", {truncates} truncates")?;
            }
        }
        Ok(())
    }
}

impl Assembler {
    /// Begins where the target is.
    pub fn new(tables: Tables, applied: Lsn) -> Assembler {
        let batch = Batch::new(tables.in_order);
        Assembler {
            tables,
            relations: HashMap::new(),
            position: Position::Between,
            applied,
            batch,
            passed: applied,
            until: None,
            beyond: false,
            left_out: BTreeSet::new(),
            leaving_out: None,
            to_tell: Vec::new(),
            undescribed: VecDeque::new(),
            looked_at: HashMap::new(),
            emptied: HashMap::new(),
            described_last: None,
            new_partitions: Vec::new(),
        }
    }

    /// Returns the number, on the source, of the transaction that is being gathered.
    pub fn transaction(&self) -> Option<u32> {
        match self.position {
            Position::Inside { xid, .. } => Some(xid),
            _ => None,
        }
    }

    /// Returns what is known of a table, by its oid.
    pub fn known(&self, oid: u32) -> Option<&Known> {
        self.tables.known.get(&oid)
    }

    /// Leaves out transactions that commit exactly at one of these.
    pub fn leaving_out(self, commits: &[Lsn]) -> Assembler {
        Assembler { left_out: commits.iter().copied().collect(), ..self }
    }

    /// Takes what was left out since this was last asked.
    pub fn take_left_out(&mut self) -> Vec<LeftOut> {
        std::mem::take(&mut self.to_tell)
    }

    /// Returns whether the open batch holds whole transactions only.
    pub fn between_transactions(&self) -> bool {
        !matches!(self.position, Position::Inside { .. })
    }

    /// Returns the position before which all transactions that commit were taken in, and none after it; `None` amid one.
    pub fn boundary(&self) -> Option<Lsn> {
        (self.position == Position::Between).then_some(self.passed)
    }

    /// Takes no transaction that commits at `until` or after it; returns where that leaves off, which is later if more was taken already.
    pub fn stop_at(&mut self, until: Lsn) -> Lsn {
        let taken = match self.position {
            Position::Inside { commit_lsn, .. } => Lsn(commit_lsn.0 + 1),
            Position::Between | Position::Skipping => self.passed,
        };
        let until = until.max(taken);
        self.until = Some(until);
        until
    }

    /// Leaves the changes of these tables out from now on.
    pub fn ignore(&mut self, tables: &[TableName]) {
        for name in tables {
            self.tables.routes.insert(name.clone(), Route::Ignore);
        }
        self.describe_anew();
    }

    /// Takes further tables in, by the routes given with them.
    pub fn take_over(&mut self, more: Tables) {
        self.tables.known.extend(more.known);
        self.tables.targets.extend(more.targets);
        self.tables.types.extend(more.types);
        self.tables.routes.extend(more.routes);
        self.describe_anew();
    }

    /// Relations are described once; what is made of them depends on the tables.
    fn describe_anew(&mut self) {
        for (oid, described) in std::mem::take(&mut self.relations) {
            // A map that stays the same stays the same object: it stands for what the sink has prepared.
            let route = self.route(&described.relation);
            let described = if route == described.route { described } else { self.as_known(described.relation) };
            self.relations.insert(oid, described);
        }
    }

    fn route(&self, relation: &Relation) -> Route {
        match self.known(relation.oid) {
            Some(known) => self.route_by_name(&known.listed),
            None => self.route_by_name(&TableName::new(&relation.schema, &relation.name)),
        }
    }

    fn route_by_name(&self, listed: &TableName) -> Route {
        let unknown = if self.tables.others_come { Route::Ignore } else { Route::From(Lsn::ZERO) };
        self.tables.routes.get(listed).copied().unwrap_or(unknown)
    }

    /// Takes a relation as one that has not changed since it was last known.
    fn as_known(&self, relation: Relation) -> Described {
        let route = self.route(&relation);
        let map = self.map_relation(&relation).map(Arc::new);
        Described { relation, route, map }
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
        let passed = if self.beyond { self.until.unwrap_or(self.passed) } else { self.passed };
        (self.between_transactions() && self.batch.is_empty()).then_some(passed)
    }

    /// The walsender has decoded everything before `end`.
    pub fn keepalive(&mut self, end: Lsn) {
        if self.idle_position().is_some() {
            self.passed = self.passed.max(self.until.map_or(end, |until| until.min(end)));
        }
    }

    /// Takes one message of the output plugin. After each, [`Assembler::undescribed`] is to be asked.
    ///
    /// # Errors
    /// [`Error::Blocked`] if it cannot be decoded, or the target's tables cannot take what it says.
    pub fn message(&mut self, start: Lsn, body: Bytes) -> Result<(), Error> {
        let message = Message::decode(body).map_err(|e| Error::from(e).at(start))?;
        self.handle(message).map_err(|e| e.at(self.place().unwrap_or(start)))
    }

    /// Where the open transaction commits.
    fn place(&self) -> Option<Lsn> {
        match self.position {
            Position::Inside { commit_lsn, .. } => Some(commit_lsn),
            _ => None,
        }
    }

    /// Returns a description of one of the mirror's tables that calls for a look at the source, then [`Assembler::describe`], before the
    /// next message.
    pub fn undescribed(&mut self) -> Option<Relation> {
        self.place().and_then(|_| self.undescribed.pop_front())
    }

    /// Relations are described once, be it in a transaction that the target has: what has changed by then is known already. What changed
    /// in one that is left out is not: the next one begins with that.
    fn relation(&mut self, relation: Relation) {
        let described = self.as_known(relation);
        let place = self.place().or(self.leaving_out.as_ref().map(|l| l.commit_lsn));
        if self.known(described.relation.oid).is_some() && place.is_some_and(|at| described.route.takes(at)) {
            self.undescribed.push_back(described.relation.clone());
        }
        self.relations.insert(described.relation.oid, described);
    }

    fn handle(&mut self, message: Message) -> Result<(), Error> {
        self.notice_partition(&message);
        match message {
            Message::Begin { commit_lsn, commit_time, xid } => {
                // The server resumes after what we name, but only we know what the target has.
                self.beyond |= self.until.is_some_and(|until| commit_lsn >= until);
                let leaves_out = commit_lsn >= self.applied && !self.beyond && self.left_out.contains(&commit_lsn);
                self.leaving_out = leaves_out.then(|| LeftOut { commit_lsn, changes: BTreeMap::new() });
                self.position = if commit_lsn < self.applied || self.beyond || leaves_out {
                    Position::Skipping
                } else {
                    Position::Inside { commit_lsn, xid }
                };
                if let Position::Inside { .. } = self.position {
                    self.batch.begin(commit_lsn, commit_time);
                }
                Ok(())
            }
            Message::Commit { end_lsn, commit_time, .. } => {
                if let Position::Inside { .. } = self.position {
                    self.commit(end_lsn, commit_time);
                }
                if let Some(left_out) = self.leaving_out.take() {
                    self.to_tell.push(left_out);
                    if self.batch.is_empty() {
                        self.passed = self.passed.max(end_lsn);
                    }
                }
                self.position = Position::Between;
                Ok(())
            }
            Message::Relation(relation) => {
                self.relation(relation);
                Ok(())
            }
            message if self.position == Position::Skipping => {
                self.count_left_out(&message);
                Ok(())
            }
            Message::Insert { relation, new } => {
                if let Some(table) = self.map(relation)? {
                    self.batch.insert(&table, new);
                }
                Ok(())
            }
            Message::Update { relation, old, new } => {
                let Some(table) = self.map(relation)? else { return Ok(()) };
                if self.batch.update(&table, old, new) { Ok(()) } else { Err(no_key(&table, "updated")) }
            }
            Message::Delete { relation, old } => {
                let Some(table) = self.map(relation)? else { return Ok(()) };
                if self.batch.delete(&table, old) { Ok(()) } else { Err(no_key(&table, "deleted")) }
            }
            Message::Truncate { relations, restart_identity, .. } => {
                let mut tables = Vec::new();
                for oid in relations {
                    tables.extend(self.map(oid)?);
                }
                if let Position::Inside { xid, .. } = self.position {
                    self.emptied.extend(tables.iter().map(|t| (t.oid, xid)));
                }
                if !tables.is_empty() {
                    self.batch.truncate(tables, restart_identity);
                }
                Ok(())
            }
            Message::Origin { .. } | Message::Type { .. } | Message::Message { .. } => Ok(()),
        }
    }

    fn count_left_out(&mut self, message: &Message) {
        let Some(left_out) = &mut self.leaving_out else { return };
        let (oids, kind) = match message {
            Message::Insert { relation, .. } => (std::slice::from_ref(relation), 0),
            Message::Update { relation, .. } => (std::slice::from_ref(relation), 1),
            Message::Delete { relation, .. } => (std::slice::from_ref(relation), 2),
            Message::Truncate { relations, .. } => (relations.as_slice(), 3),
            _ => return,
        };
        for described in oids.iter().filter_map(|oid| self.relations.get(oid)) {
            let Relation { schema, name, .. } = &described.relation;
            left_out.changes.entry(TableName::new(schema, name)).or_default()[kind] += 1;
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

    /// Returns how a change's row becomes a row of the target; `None` when the change is not this stream's.
    fn map(&self, oid: u32) -> Result<Option<Arc<TableMap>>, Error> {
        let described = self.relations.get(&oid).ok_or_else(|| undescribed(oid))?;
        if self.place().is_some_and(|commit_lsn| !described.route.takes(commit_lsn)) {
            return Ok(None);
        }
        match &described.map {
            Ok(map) => Ok(Some(map.clone())),
            // As text, the target's type reads or refuses what comes; the same rows are asked for again.
            Err(problem) if problem.sqlstate == SqlState::DATATYPE_MISMATCH => Err(Error::TextNeeded),
            Err(problem) => {
                let Relation { schema, name, .. } = &described.relation;
                let table = self.known(oid).map_or_else(|| TableName::new(schema, name), |known| known.listed.clone());
                Err(Error::Blocked(problem.clone().table(&table)))
            }
        }
    }
}

fn undescribed(oid: u32) -> Error {
    let message = format!("the source sends a row of relation {oid} without describing it");
    Error::Blocked(Problem::new(SqlState::PROTOCOL_VIOLATION, message))
}

fn no_key(table: &TableMap, what: &str) -> Error {
    Error::Blocked(
        Problem::new(
            SqlState::WRONG_STATE,
            format!("a row of table \"{}\" was {what}, and there is nothing to find it by", table.source),
        )
        .hint("Give the table a primary key or a replica identity; RESYNC MIRROR … TABLE then copies it anew.")
        .table(&table.source),
    )
}
