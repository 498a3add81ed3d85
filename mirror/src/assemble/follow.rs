//! Follows changes of the source's tables: what a description or a look tells becomes a step of the batch.

use std::sync::Arc;
use std::time::Instant;

use catalog::mirror::Ddl;
use pg::pgoutput::{Message, Relation};
use pg::{Lsn, SqlState, TableName};

use super::{Assembler, Described, Known, Tables, undescribed};
use crate::batch::{Alter, BatchEnd};
use crate::error::{Error, Problem};
use crate::relation::TableMap;
use crate::schema::change::{self, Surroundings};
use crate::schema::ddl::Prerequisite;
use crate::schema::policy::{self, Followed};
use crate::schema::storage::Doubt;
use crate::schema::{Passage, SourceTable, TargetColumn, Types, passage, storage, then};
use crate::source::look::Look;
use crate::table_state::Route;

impl Assembler {
    /// Takes a description of a table, with what a look at the source's catalogs says of it now: what has changed on the source is
    /// changed on the target, here, before the rows that follow.
    ///
    /// # Errors
    /// [`Error::CopyAgain`] if it cannot be told what has changed, or its rows have values that were not sent; [`Error::Blocked`] if
    /// `ddl = block` and the target is to be changed.
    pub fn describe(&mut self, relation: &Relation, look: Look) -> Result<(), Error> {
        let place = self.place().unwrap_or(self.passed);
        let known = self.known(relation.oid).ok_or_else(|| undescribed(relation.oid))?;
        let then = then::at_relation(&known.plan.source, look.table.as_ref(), relation).map_err(|then::Unclear| {
            let name = &known.plan.source.name;
            let message = format!("table \"{name}\" was altered more than once before the mirror looked at it");
            Error::CopyAgain(Problem::new(SqlState::WRONG_STATE, message).table(&known.listed)).at(place)
        })?;
        self.looked_at.insert(relation.oid, look.taken);
        self.change(then.table, then.rewritten, &[], look.types, look.prerequisites).map_err(|e| e.at(place))?;
        let described = self.as_known(relation.clone());
        self.relations.insert(relation.oid, described);
        Ok(())
    }

    /// Takes a look at a table up: that everything before `at` has been gathered, and `at` was the end of the source's WAL after the look,
    /// is the caller's to know. A table that was described, and looked at for that, since `begun` may have been seen as it was before: it
    /// is left for another look, and so is one whose changes are taken from a later position on.
    ///
    /// Returns the oid of a table that is to be looked at again.
    ///
    /// # Errors
    /// As [`Assembler::describe`].
    pub fn take_up(&mut self, look: Look, begun: Instant, at: Lsn) -> Result<Option<u32>, Error> {
        let Some(table) = look.table else { return Ok(None) };
        let oid = table.oid;
        let Some(known) = self.known(oid) else { return Ok(None) };
        let was_described = self.looked_at.get(&oid).is_some_and(|taken| *taken >= begun);
        match self.route_by_name(&known.listed) {
            // A copy is on its way, and will show it.
            Route::Ignore => return Ok(None),
            Route::From(from) if was_described || at < from => return Ok(Some(oid)),
            Route::From(_) => {}
        }
        if known.plan.source == table {
            self.tables.types.extend(look.types);
            return Ok(None);
        }
        let rows_gone = if storage::changed(&known.plan.source, &table) {
            if look.doubted_since != known.plan.source.files {
                return Ok(Some(oid));
            }
            self.rows_gone(known, &table, &look.doubts).map_err(|e| e.at(at))?
        } else {
            Vec::new()
        };
        let rewritten = !table.same_files(&known.plan.source);
        let same_rows = table.name == known.plan.source.name && table.same_rows(&known.plan.source);
        self.change(table, rewritten, &rows_gone, look.types, look.prerequisites).map_err(|e| e.at(at))?;
        self.emptied.remove(&oid);
        // A batch that ends here, although no transaction does.
        if self.batch.end.is_none() {
            self.batch.end = Some(BatchEnd { end_lsn: self.passed, commit_time: None });
        }
        // The source describes rows that look otherwise; if not, their map only learns what they may collide with now.
        let target = self.known(oid).and_then(|k| self.tables.targets.get(&k.plan.target_name));
        let other_unique = target.is_some_and(|target| target.other_unique);
        match self.relations.remove(&oid) {
            Some(Described { relation, route, map: Ok(map) }) if same_rows => {
                let map = Ok(Arc::new(TableMap { other_unique, ..(*map).clone() }));
                self.relations.insert(oid, Described { relation, route, map });
            }
            _ => {}
        }
        Ok(None)
    }

    /// Learns of partitions from the stream: one is described right before its first row, which comes as its root's. That it has rows is
    /// recorded with them, as it may be gone before anybody looks.
    pub(super) fn notice_partition(&mut self, message: &Message) {
        match message {
            Message::Relation(relation) => self.described_last = Some(relation.oid),
            Message::Insert { relation, .. } | Message::Update { relation, .. } | Message::Delete { relation, .. } => {
                let described = self.described_last.take().filter(|described| described != relation);
                self.new_partitions.extend(described.map(|partition| (*relation, partition)));
            }
            _ => {}
        }
        let Some(place) = self.place().filter(|_| !self.new_partitions.is_empty()) else { return };
        for (root, partition) in std::mem::take(&mut self.new_partitions) {
            let Some(known) = self.tables.known.get(&root) else { continue };
            let is_taken = self.route_by_name(&known.listed).takes(place);
            let is_new = known.plan.source.partitioned && !known.plan.source.files.contains_key(&partition);
            if let Some(known) = self.tables.known.get_mut(&root).filter(|_| is_taken && is_new) {
                known.plan.source.files.insert(partition, storage::NOT_LOOKED_AT);
                let (listed, plan) = (known.listed.clone(), known.plan.clone());
                self.batch.alter(Alter {
                    listed,
                    prerequisites: Vec::new(),
                    statements: Vec::new(),
                    plan,
                    events: Vec::new(),
                });
            }
        }
    }

    /// Works out which rows went with the partitions that are gone since a table was known.
    fn rows_gone(&self, known: &Known, now: &SourceTable, doubts: &[Doubt]) -> Result<Vec<String>, Error> {
        let truncated_by = self.emptied.get(&now.oid).copied();
        let gone = storage::rows_gone(&known.plan.source, now, doubts, truncated_by);
        // The target may not have the columns by which a partition takes its rows.
        let all_columns = known.plan.columns.only.is_none() && known.plan.columns.except.is_empty();
        match (self.tables.ddl, gone) {
            (_, Ok(gone)) if gone.is_empty() => Ok(gone),
            (Ddl::Apply, Ok(_)) if !all_columns => Err(Error::CopyAgain(storage::not_told(now).table(&known.listed))),
            (Ddl::Apply | Ddl::Ignore, gone) => gone.map_err(|problem| Error::CopyAgain(problem.table(&known.listed))),
            (Ddl::Block, gone) => {
                let problem = gone.map_or_else(|problem| problem, |_| storage::not_told(now));
                let hint = "RESYNC MIRROR … TABLE copies the table anew; with ALTER MIRROR … SET (ddl = apply) the mirror follows by itself.";
                Err(Error::Blocked(problem.hint(hint).table(&known.listed)))
            }
        }
    }

    /// Returns whether everything before `at` has been gathered, and nothing of what comes after it is open.
    pub fn has_reached(&self, at: Lsn) -> bool {
        self.boundary().is_some_and(|passed| passed >= at)
    }

    /// Puts into the batch what makes the target follow a table that has become `new`.
    fn change(
        &mut self,
        new: SourceTable,
        rewritten: bool,
        rows_gone: &[String],
        types: Types,
        prerequisites: Vec<Prerequisite>,
    ) -> Result<(), Error> {
        self.tables.types.extend(types);
        let oid = new.oid;
        let Tables { known, targets, types, ddl, .. } = &self.tables;
        let (table, ddl) = (known.get(&oid).ok_or_else(|| undescribed(oid))?, *ddl);
        if table.plan.source == new {
            return Ok(());
        }
        let listed = table.listed.clone();
        let old_target = table.plan.target_name.clone();
        let target = targets.get(&old_target).ok_or_else(|| Error::Blocked(missing_target(&old_target)))?;
        let target_of = |oid: u32| known.get(&oid).map(|k| k.plan.target_name.clone());
        let (indexes, constraints) = (table.indexes, table.constraints);
        let emptied = self.emptied.contains_key(&oid);
        let around = Surroundings {
            types,
            rewritten,
            emptied,
            replaced: false,
            rows_gone,
            indexes,
            constraints,
            target_of: &target_of,
        };
        let not_sent = |problem: Problem| match ddl {
            Ddl::Block => Error::Blocked(problem),
            Ddl::Apply | Ddl::Ignore => Error::CopyAgain(problem.table(&listed)),
        };
        let mut altered = change::alter(&table.plan, &new, target, &around).map_err(not_sent)?;
        if altered.target.name != old_target && targets.contains_key(&altered.target.name) {
            // Its name on the target belongs to another of our tables, which will have been renamed too: the next look tells.
            let new = SourceTable { name: table.plan.source.name.clone(), ..new };
            altered = change::alter(&table.plan, &new, target, &around).map_err(not_sent)?;
        }
        let followed = policy::follow(ddl, altered, target, self.place().unwrap_or(self.passed))?;
        self.tables.targets.remove(&old_target);
        self.tables.targets.insert(followed.target.name.clone(), followed.target);
        if let Some(table) = self.tables.known.get_mut(&oid) {
            table.plan = followed.plan.clone();
        }
        let Followed { statements, plan, events, .. } = followed;
        self.batch.alter(Alter { listed, prerequisites, statements, plan, events });
        Ok(())
    }

    /// Works out how the relation's rows become rows of its target.
    pub(super) fn map_relation(&self, relation: &Relation) -> Result<TableMap, Problem> {
        let name = TableName::new(&relation.schema, &relation.name);
        let known = self.known(relation.oid).ok_or_else(|| {
            let message = format!("the source sends rows of table \"{name}\", which the mirror does not know");
            Problem::new(SqlState::UNDEFINED_TABLE, message)
                .detail("The publication was changed by hand.")
                .hint("Undo that, then RESUME MIRROR; or RESYNC MIRROR.")
        })?;
        let plan = &known.plan;
        let target = self.tables.targets.get(&plan.target_name).ok_or_else(|| missing_target(&plan.target_name))?;
        let as_text = (Passage::FromText, "pg_catalog.text".to_owned());
        let way = |oid: u32, column: &TargetColumn| {
            if !self.tables.binary {
                return Some(as_text.clone());
            }
            let of_source = self.tables.types.get(&oid);
            Some(match passage(of_source, column, |oid| self.tables.builtin.contains(&oid))? {
                Passage::AsIs => (Passage::AsIs, column.type_sql.clone()),
                Passage::FromText => as_text.clone(),
                Passage::ThroughText => (Passage::ThroughText, of_source?.sql.clone()),
            })
        };
        // A column that went again before the mirror could look at it is not known, and left out.
        let is_known = |column: &str| plan.source.columns.iter().any(|c| c.name == column);
        let ignores = |column: &str| self.tables.ddl == Ddl::Ignore && !target.columns.iter().any(|c| c.name == column);
        let takes = |column: &str| plan.columns.takes(column) && is_known(column) && !ignores(column);
        let map = TableMap::new(relation, target, way, takes, plan.key())?;
        // What is counted is counted under the name that the catalog knows.
        Ok(TableMap { source: known.listed.clone(), ..map })
    }
}

fn missing_target(name: &TableName) -> Problem {
    Problem::new(SqlState::UNDEFINED_TABLE, format!("target table \"{name}\" does not exist"))
}
