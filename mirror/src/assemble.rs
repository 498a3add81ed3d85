//! Turns the output plugin's messages into batches. No I/O: what it must know of tables was looked up before.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use pg::pgoutput::{Message, Relation};
use pg::{Lsn, SqlState, TableName};

use crate::batch::Batch;
use crate::copy::Targets;
use crate::error::{Error, Problem};
use crate::relation::TableMap;
use crate::schema::{Passage, TablePlan, TargetColumn, Types, passage};
use crate::table_state::Route;

/// What is known of a stream's tables on both sides.
pub struct Tables {
    /// The mirror's tables, by their name on the source.
    pub plans: HashMap<TableName, TablePlan>,
    /// The target's tables, by their name there.
    pub targets: Targets,
    /// The source's types.
    pub types: Types,
    /// Values come in binary, where their types have such a form.
    pub binary: bool,
    /// The built-in types that the target has.
    pub known: HashSet<u32>,
    /// Changes are written in their own order, across tables: on the target they depend on each other.
    pub in_order: bool,
    /// Which changes of the mirror's tables are taken, by name on the source.
    pub routes: HashMap<TableName, Route>,
    /// Rows of tables that have no route come too, and are left out. Else they are not to be expected.
    pub others_come: bool,
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
        }
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
            Position::Inside { commit_lsn } => Lsn(commit_lsn.0 + 1),
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
        self.tables.plans.extend(more.plans);
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
            let described = if route == described.route { described } else { self.describe(described.relation) };
            self.relations.insert(oid, described);
        }
    }

    fn route(&self, relation: &Relation) -> Route {
        let unknown = if self.tables.others_come { Route::Ignore } else { Route::From(Lsn::ZERO) };
        self.tables.routes.get(&TableName::new(&relation.schema, &relation.name)).copied().unwrap_or(unknown)
    }

    fn describe(&self, relation: Relation) -> Described {
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
                self.beyond |= self.until.is_some_and(|until| commit_lsn >= until);
                let leaves_out = commit_lsn >= self.applied && !self.beyond && self.left_out.contains(&commit_lsn);
                self.leaving_out = leaves_out.then(|| LeftOut { commit_lsn, changes: BTreeMap::new() });
                self.position = if commit_lsn < self.applied || self.beyond || leaves_out {
                    Position::Skipping
                } else {
                    Position::Inside { commit_lsn }
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
            // Relations are described once, be it in a transaction that is skipped.
            Message::Relation(relation) => {
                let described = self.describe(relation);
                self.relations.insert(described.relation.oid, described);
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

    fn map_relation(&self, relation: &Relation) -> Result<TableMap, Problem> {
        let name = TableName::new(&relation.schema, &relation.name);
        let plan = self.tables.plans.get(&name).ok_or_else(|| {
            let message = format!("the source sends rows of table \"{name}\", which the mirror does not know");
            Problem::new(SqlState::UNDEFINED_TABLE, message)
                .detail("The table was renamed, or the publication was changed by hand.")
                .hint("Undo that, then RESUME MIRROR; or RESYNC MIRROR.")
        })?;
        let target = self.tables.targets.get(&plan.target_name).ok_or_else(|| {
            Problem::new(SqlState::UNDEFINED_TABLE, format!("target table \"{}\" does not exist", plan.target_name))
        })?;
        let as_text = (Passage::FromText, "pg_catalog.text".to_owned());
        let way = |oid: u32, column: &TargetColumn| {
            if !self.tables.binary {
                return Some(as_text.clone());
            }
            let of_source = self.tables.types.get(&oid);
            Some(match passage(of_source, column, |oid| self.tables.known.contains(&oid))? {
                Passage::AsIs => (Passage::AsIs, column.type_sql.clone()),
                Passage::FromText => as_text.clone(),
                Passage::ThroughText => (Passage::ThroughText, of_source?.sql.clone()),
            })
        };
        let takes = |column: &str| plan.columns.takes(column);
        TableMap::new(relation, target, way, takes, plan.key())
    }

    /// Returns how a change's row becomes a row of the target; `None` when the change is not this stream's.
    fn map(&self, oid: u32) -> Result<Option<Arc<TableMap>>, Error> {
        let described = self.relations.get(&oid).ok_or_else(|| {
            let message = format!("the source sends a row of relation {oid} without describing it");
            Error::Blocked(Problem::new(SqlState::PROTOCOL_VIOLATION, message))
        })?;
        if let Position::Inside { commit_lsn } = self.position
            && !described.route.takes(commit_lsn)
        {
            return Ok(None);
        }
        match &described.map {
            Ok(map) => Ok(Some(map.clone())),
            // As text, the target's type reads or refuses what comes; the same rows are asked for again.
            Err(problem) if problem.sqlstate == SqlState::DATATYPE_MISMATCH => Err(Error::TextNeeded),
            Err(problem) => {
                let Relation { schema, name, .. } = &described.relation;
                Err(Error::Blocked(problem.clone().table(&TableName::new(schema, name))))
            }
        }
    }
}

fn no_key(table: &TableMap, what: &str) -> Error {
    Error::Blocked(
        Problem::new(
            SqlState::WRONG_STATE,
            format!("a row of table \"{}\" was {what}, and there is nothing to find it by", table.source),
        )
        .hint("Give the table a primary key or a replica identity, and create the mirror anew.")
        .table(&table.source),
    )
}

#[cfg(test)]
mod tests {
    use pg::pgoutput::{Identity, Tuple};

    use super::*;

    const NAMES: [&str; 2] = ["streams", "late"];

    /// Two tables: one streams from 50 on, the other does not. What is taken fails, as nothing is known of the tables.
    fn assembler() -> Assembler {
        let routes = [Route::From(Lsn(50)), Route::Ignore];
        let routes = NAMES.map(|n| TableName::new("public", n)).into_iter().zip(routes).collect();
        let tables = Tables {
            plans: HashMap::new(),
            targets: Targets::new(),
            types: Types::new(),
            binary: false,
            known: HashSet::new(),
            in_order: false,
            routes,
            others_come: true,
        };
        let mut assembler = Assembler::new(tables, Lsn(10));
        for (oid, name) in (1..).zip(NAMES.into_iter().chain(["theirs"])) {
            let (schema, name) = ("public".to_owned(), name.to_owned());
            let relation = Relation { oid, schema, name, identity: Identity::Default, columns: Vec::new() };
            assembler.handle(Message::Relation(relation)).unwrap();
        }
        assembler
    }

    fn insert(relation: u32) -> Message {
        Message::Insert { relation, new: Tuple::split_from(&mut Bytes::from_static(b"\0\x01n")).unwrap() }
    }

    /// A transaction of one row in each of these relations, whose commit record is ten long.
    fn transaction(assembler: &mut Assembler, commit: u64, relations: &[u32]) -> Result<(), Error> {
        let commit_lsn = Lsn(commit);
        assembler.handle(Message::Begin { commit_lsn, commit_time: 0, xid: 1 })?;
        for relation in relations {
            assembler.handle(insert(*relation))?;
        }
        assembler.handle(Message::Commit { commit_lsn, end_lsn: Lsn(commit + 10), commit_time: 0 })
    }

    #[test]
    fn what_is_in_a_copy_or_comes_another_way_is_left_out() {
        let mut assembler = assembler();
        transaction(&mut assembler, 20, &[1, 2, 3]).unwrap();
        assert_eq!(assembler.idle_position(), Some(Lsn(30)), "nothing of it waits");
        assert!(transaction(&mut assembler, 50, &[2, 3]).is_ok());
        assert!(transaction(&mut assembler, 60, &[1]).is_err(), "from its position on it is taken");
    }

    #[test]
    fn a_table_can_be_left_out_from_any_transaction_on() {
        let mut assembler = assembler();
        assembler.ignore(&[TableName::new("public", "streams")]);
        assert!(transaction(&mut assembler, 60, &[1, 2]).is_ok());
        assert_eq!(assembler.boundary(), Some(Lsn(70)));
    }

    #[test]
    fn a_lane_takes_what_commits_before_its_end_and_nothing_after_it() {
        let mut assembler = assembler();
        transaction(&mut assembler, 20, &[2]).unwrap();
        assert_eq!(assembler.stop_at(Lsn(60)), Lsn(60));
        assembler.keepalive(Lsn(45));
        assert_eq!(assembler.idle_position(), Some(Lsn(45)));
        // One that would fail if it were taken.
        transaction(&mut assembler, 60, &[1]).unwrap();
        assert_eq!(assembler.idle_position(), Some(Lsn(60)));
        assembler.keepalive(Lsn(90));
        assert_eq!(assembler.idle_position(), Some(Lsn(60)), "it stays there");
    }

    #[test]
    fn a_lane_that_has_gone_further_stops_where_it_is() {
        let mut assembler = assembler();
        transaction(&mut assembler, 20, &[2]).unwrap();
        assert_eq!(assembler.stop_at(Lsn(25)), Lsn(30));
        let mut amid = self::assembler();
        amid.handle(Message::Begin { commit_lsn: Lsn(40), commit_time: 0, xid: 1 }).unwrap();
        assert_eq!(amid.boundary(), None);
        assert_eq!(amid.stop_at(Lsn(25)), Lsn(41), "the transaction that is under way is taken whole");
    }

    #[test]
    fn a_transaction_that_is_skipped_is_told_and_passed() {
        let mut assembler = assembler().leaving_out(&[Lsn(60)]);
        transaction(&mut assembler, 60, &[1, 1, 2]).unwrap();
        let told = assembler.take_left_out();
        let changes =
            NAMES.map(|n| TableName::new("public", n)).into_iter().zip([[2, 0, 0, 0], [1, 0, 0, 0]]).collect();
        assert_eq!(told, [LeftOut { commit_lsn: Lsn(60), changes }]);
        assert_eq!((assembler.idle_position(), assembler.take_left_out()), (Some(Lsn(70)), Vec::new()));
        assert!(transaction(&mut assembler, 80, &[1]).is_err(), "only that one");
    }
}
