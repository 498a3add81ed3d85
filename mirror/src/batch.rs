//! Groups row changes into batches that a sink can write as sets.
//!
//! Within a batch every key keeps only what it comes to: an insert, an update or a delete. The order in which a sink writes them
//! (deletes, updates, inserts) gives what the changes in their own order would have given, for what one transaction or several whole
//! ones did to a table. What does not commute (TRUNCATE) ends a step. Rows without a key keep their order, and so does everything when
//! tables depend on each other on the target.
//!
//! Pure: no I/O, no clock. What a key comes to is checked against row-by-row application in the tests below.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use catalog::event::Event;
use pg::pgoutput::{Tuple, Value};
use pg::{Lsn, TableName};

use crate::relation::TableMap;
use crate::schema::TablePlan;
use crate::schema::change::Statement;
use crate::schema::ddl::Prerequisite;

/// What a row change takes in memory besides its bytes: its key, its place among the table's rows, and what refers to its bytes.
const ROW_OVERHEAD: usize = 256;

/// Where a batch ends: at the end of a source transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchEnd {
    /// Just past the last transaction's commit record; progress once the batch is applied.
    pub end_lsn: Lsn,
    /// Its commit time, in microseconds since 2000-01-01 UTC; `None` when the batch only moves the position.
    pub commit_time: Option<i64>,
}

/// Changes that are written in one transaction on the target.
#[derive(Debug, Default)]
pub struct Batch {
    /// What to do, in this order.
    pub steps: Vec<Step>,
    /// Row changes that went in, before they were compacted.
    pub rows: usize,
    /// Bytes of them.
    pub bytes: usize,
    /// About how much memory they take.
    pub memory: usize,
    /// Whole source transactions.
    pub transactions: usize,
    /// Commit time of the first transaction, for lag.
    pub first_commit_time: Option<i64>,
    /// Where the first transaction commits, for errors.
    pub first_commit_lsn: Option<Lsn>,
    /// Where the last transaction commits that has begun.
    pub last_commit_lsn: Option<Lsn>,
    /// Changes are kept as they came, across all tables.
    pub in_order: bool,
    /// It goes on with a transaction of which the sink has a part already.
    pub continues: bool,
    /// Where it ends; `None` when the last transaction goes on in the next batch, which then belongs to the same target transaction.
    pub end: Option<BatchEnd>,
    /// Where the tables of the last step are in it, by the address of their map.
    places: HashMap<usize, usize>,
}

/// A part of a batch whose order does not matter within itself.
#[derive(Debug)]
pub enum Step {
    /// Changes by table.
    Changes(Vec<TableChanges>),
    /// Tables are emptied together.
    Truncate {
        /// The tables.
        tables: Vec<Arc<TableMap>>,
        /// Their sequences are reset.
        restart_identity: bool,
    },
    /// Changes to any tables, one after the other.
    InOrder(Vec<(Arc<TableMap>, Change)>),
    /// A table is altered as its source was.
    Alter(Box<Alter>),
}

/// A change to one row, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A row comes.
    Insert(Tuple),
    /// A row changes.
    Update {
        /// Its old key, or the whole old row; `None`: its key is that of the new row.
        old: Option<Tuple>,
        /// The row, perhaps with unchanged values.
        new: Tuple,
    },
    /// A row goes; this is its key, or the whole row.
    Delete(Tuple),
    /// Where deleted rows stay, a row really goes, if it is there: it has got another key.
    Remove(Tuple),
}

/// A change of a table on the target, at its place among the rows.
#[derive(Debug)]
pub struct Alter {
    /// The table on the source, by the name that it has in the catalog.
    pub listed: TableName,
    /// What the table needs besides itself.
    pub prerequisites: Vec<Prerequisite>,
    /// What to do.
    pub statements: Vec<Statement>,
    /// The table as the mirror knows it from then on: kept on the target.
    pub plan: TablePlan,
    /// What a person should know, once it is done.
    pub events: Vec<Event>,
}

/// What one table's rows come to.
#[derive(Debug)]
pub struct TableChanges {
    /// The table.
    pub table: Arc<TableMap>,
    /// What was counted: inserts, updates, deletes.
    pub counts: [i64; 3],
    rows: HashMap<Box<[u8]>, Row>,
    /// What happened to rows without a key, in that order.
    keyless: Vec<Change>,
}

/// What is known of one key: whether the target has it, and what it comes to.
#[derive(Debug)]
struct Row {
    /// The first change was not an insert, so the target has the row.
    existed: bool,
    /// Orders the rows as they came, for locality on the target.
    order: usize,
    change: RowChange,
    /// Where deleted rows stay: it was deleted in the end.
    buried: bool,
}

#[derive(Debug)]
enum RowChange {
    Write(Tuple),
    /// The row comes from another key, with values that only the target has.
    Move {
        old: Tuple,
        new: Tuple,
    },
    Delete(Tuple),
}

/// What a table's rows come to, sorted by how they are written.
#[derive(Clone, Debug, Default)]
pub struct Sorted<'a> {
    /// Rows that go, by key. Each must be there.
    pub deletes: Vec<&'a Tuple>,
    /// Rows that change. Each must be there. Some of their values may be [`Value::Unchanged`].
    pub updates: Vec<&'a Tuple>,
    /// Rows that get a new key and keep values of the row with the old one, which is among the deletes: old key, new row.
    pub moves: Vec<(&'a Tuple, &'a Tuple)>,
    /// Rows that come. None may be there, but for deleted ones that stayed, which make room for those and for rows that move.
    pub inserts: Vec<&'a Tuple>,
    /// Keys under which only deleted rows that stayed can be, and which go.
    pub clears: Vec<&'a Tuple>,
    /// Rows that stay as they are and are marked as deleted. Each must be there.
    pub buries: Vec<&'a Tuple>,
    /// Which of the rows that are written were deleted after all, and stay with these values: where they are in memory.
    deleted: HashSet<usize>,
    /// What happened to rows without a key, when it was not only inserts.
    pub keyless: &'a [Change],
}

impl Sorted<'_> {
    /// Returns the same without rows that come.
    pub fn without_inserts(&self) -> Self {
        Sorted { inserts: Vec::new(), ..self.clone() }
    }

    /// Returns whether one of the rows that are written is a deleted one, which stays.
    pub fn is_deleted(&self, row: &Tuple) -> bool {
        self.deleted.contains(&std::ptr::from_ref(row).addr())
    }
}

impl TableChanges {
    fn new(table: Arc<TableMap>) -> TableChanges {
        TableChanges { table, counts: [0; 3], rows: HashMap::new(), keyless: Vec::new() }
    }

    /// Returns the rows by how they are written, each sort in the order in which they came.
    pub fn sorted(&self) -> Sorted<'_> {
        let mut rows: Vec<&Row> = self.rows.values().collect();
        rows.sort_unstable_by_key(|r| r.order);
        let mut sorted = Sorted::default();
        let softly = self.deletes_softly();
        for row in rows {
            if let (RowChange::Write(new) | RowChange::Move { new, .. }, true) = (&row.change, row.buried) {
                sorted.deleted.insert(std::ptr::from_ref(new).addr());
            }
            match (&row.change, row.existed) {
                (RowChange::Delete(old), _) if row.buried => sorted.buries.push(old),
                (RowChange::Delete(old), false) if softly => sorted.clears.push(old),
                (RowChange::Delete(old), _) => sorted.deletes.push(old),
                (RowChange::Write(new), true) => sorted.updates.push(new),
                (RowChange::Write(new), false) => sorted.inserts.push(new),
                (RowChange::Move { old, new }, existed) => {
                    // The row that was there goes; another takes its key.
                    sorted.deletes.extend(existed.then_some(new));
                    sorted.moves.push((old, new));
                }
            }
        }
        let inserted = |change: &'_ Change| matches!(change, Change::Insert(_));
        if self.keyless.iter().all(inserted) {
            let rows = self.keyless.iter().filter_map(|c| if let Change::Insert(new) = c { Some(new) } else { None });
            sorted.inserts.extend(rows);
        } else {
            sorted.keyless = &self.keyless;
        }
        sorted
    }

    fn deletes_softly(&self) -> bool {
        self.table.deletes_softly() && self.table.has_key()
    }

    fn next_order(&self) -> usize {
        self.rows.len()
    }

    fn insert(&mut self, new: Tuple) {
        let Some(key) = self.table.key_of(&new) else {
            self.keyless.push(Change::Insert(new));
            return;
        };
        let order = self.next_order();
        match self.rows.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Row { existed: false, order, change: RowChange::Write(new), buried: false });
            }
            // Deleted and inserted again: the row that was there gets all its values anew.
            Entry::Occupied(mut entry) => entry.get_mut().become_change(RowChange::Write(new)),
        }
    }

    fn update(&mut self, key: Box<[u8]>, new: Tuple) {
        let order = self.next_order();
        match self.rows.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Row { existed: true, order, change: RowChange::Write(new), buried: false });
            }
            Entry::Occupied(mut entry) => {
                let row = entry.get_mut();
                let change = match &row.change {
                    RowChange::Write(older) => RowChange::Write(new.filled_from(older)),
                    RowChange::Move { old, new: older } => {
                        RowChange::Move { old: old.clone(), new: new.filled_from(older) }
                    }
                    RowChange::Delete(_) => RowChange::Write(new),
                };
                row.become_change(change);
            }
        }
    }

    /// A row is deleted on the source. Where such rows stay it does so with the values that it had last, in whatever batches they came.
    fn delete(&mut self, key: Box<[u8]>, old: Tuple) {
        if !self.deletes_softly() {
            return self.remove(key, old);
        }
        let order = self.next_order();
        match self.rows.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Row { existed: true, order, change: RowChange::Delete(old), buried: true });
            }
            Entry::Occupied(mut entry) => entry.get_mut().buried = true,
        }
    }

    /// A row is no longer there under its key.
    fn remove(&mut self, key: Box<[u8]>, old: Tuple) {
        let (order, softly) = (self.next_order(), self.deletes_softly());
        match self.rows.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Row { existed: true, order, change: RowChange::Delete(old), buried: false });
            }
            // Where deleted rows stay, one that had the key before may be there although the target never had this one.
            Entry::Occupied(mut entry) if entry.get().existed || softly => {
                entry.get_mut().become_change(RowChange::Delete(old));
            }
            // Came and went within the batch: the target never had it.
            Entry::Occupied(entry) => {
                entry.remove();
            }
        }
    }

    /// Gives a row another key. What the row had under the old one comes from the batch as far as it knows it, the rest from the target.
    fn rekey(&mut self, old_key: Box<[u8]>, new_key: Box<[u8]>, old: Tuple, new: Tuple) {
        let (from, new) = match self.rows.get(&old_key).map(|r| (&r.change, r.existed)) {
            Some((RowChange::Write(older), existed)) => (existed.then(|| old.clone()), new.filled_from(older)),
            Some((RowChange::Move { old: from, new: older }, _)) => (Some(from.clone()), new.filled_from(older)),
            _ => (Some(old.clone()), new),
        };
        self.remove(old_key, old);
        let order = self.next_order();
        // Columns that only the target has move with the row.
        let moves = new.has_unchanged() || !self.table.extras.is_empty();
        let change = match from {
            Some(old) if moves => RowChange::Move { old, new },
            _ => RowChange::Write(new),
        };
        match self.rows.entry(new_key) {
            Entry::Vacant(entry) => {
                entry.insert(Row { existed: false, order, change, buried: false });
            }
            Entry::Occupied(mut entry) => entry.get_mut().become_change(change),
        }
    }
}

impl Row {
    fn become_change(&mut self, change: RowChange) {
        self.change = change;
        self.buried = false;
    }
}

impl Batch {
    /// Begins a batch; with `in_order` its changes are kept as they came, across all tables.
    pub fn new(in_order: bool) -> Batch {
        Batch { in_order, ..Batch::default() }
    }

    /// Makes a batch that only moves the position.
    pub fn position(end_lsn: Lsn) -> Batch {
        Batch { end: Some(BatchEnd { end_lsn, commit_time: None }), ..Batch::default() }
    }

    /// Returns whether the sink would have nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.transactions == 0 && self.rows == 0 && !self.continues
    }

    fn changes(&mut self, table: &Arc<TableMap>) -> &mut TableChanges {
        if !matches!(self.steps.last(), Some(Step::Changes(_))) {
            self.steps.push(Step::Changes(Vec::new()));
            self.places.clear();
        }
        let Some(Step::Changes(tables)) = self.steps.last_mut() else { unreachable!("pushed above") };
        // Maps are compared by identity, since a table that was altered has a new one; the step keeps them where they are.
        let at = *self.places.entry(Arc::as_ptr(table).addr()).or_insert_with(|| {
            tables.push(TableChanges::new(table.clone()));
            tables.len() - 1
        });
        &mut tables[at]
    }

    fn keep_order(&mut self, table: &Arc<TableMap>, change: Change) {
        if let Some(Step::InOrder(changes)) = self.steps.last_mut() {
            changes.push((table.clone(), change));
        } else {
            self.steps.push(Step::InOrder(vec![(table.clone(), change)]));
        }
    }

    fn count(&mut self, size: usize) {
        self.rows += 1;
        self.bytes += size;
        self.memory += size + ROW_OVERHEAD;
    }

    /// Adds an inserted row.
    pub fn insert(&mut self, table: &Arc<TableMap>, new: Tuple) {
        self.count(new.size());
        if self.in_order {
            return self.keep_order(table, Change::Insert(new));
        }
        let changes = self.changes(table);
        changes.counts[0] += 1;
        changes.insert(new);
    }

    /// Adds an updated row. `old` is there when the key changed, or when the source sends whole old rows.
    ///
    /// Returns false, and adds nothing, if there is nothing by which to find the row.
    pub fn update(&mut self, table: &Arc<TableMap>, old: Option<Tuple>, new: Tuple) -> bool {
        self.count(new.size() + old.as_ref().map_or(0, Tuple::size));
        let whole_old = table.whole_old_rows;
        let new = match &old {
            Some(old) if whole_old => new.filled_from(old),
            // A large key that did not change is not sent with the row, but with the old key.
            Some(old) if new.has_unchanged() => new.filled_where(old, |position| table.is_key(position)),
            _ => new,
        };
        if table.by_whole_row() {
            let Some(old) = old else { return false };
            self.change_keyless(table, 1, Change::Update { old: Some(old), new });
            return true;
        }
        let Some(new_key) = table.key_of(&new) else { return false };
        if self.in_order {
            self.keep_order(table, Change::Update { old, new });
            return true;
        }
        let old_key = old.as_ref().and_then(|old| table.key_of(old));
        let changes = self.changes(table);
        changes.counts[1] += 1;
        match (old, old_key) {
            (Some(old), Some(old_key)) if old_key != new_key => changes.rekey(old_key, new_key, old, new),
            _ => changes.update(new_key, new),
        }
        true
    }

    /// Adds a deleted row.
    ///
    /// Returns false, and adds nothing, if there is nothing by which to find the row.
    pub fn delete(&mut self, table: &Arc<TableMap>, old: Tuple) -> bool {
        self.count(old.size());
        if table.by_whole_row() {
            self.change_keyless(table, 2, Change::Delete(old));
            return true;
        }
        let Some(key) = table.key_of(&old) else { return false };
        if self.in_order {
            self.keep_order(table, Change::Delete(old));
            return true;
        }
        let changes = self.changes(table);
        changes.counts[2] += 1;
        changes.delete(key, old);
        true
    }

    fn change_keyless(&mut self, table: &Arc<TableMap>, kind: usize, change: Change) {
        if self.in_order {
            return self.keep_order(table, change);
        }
        let changes = self.changes(table);
        changes.counts[kind] += 1;
        changes.keyless.push(change);
    }

    /// Adds a TRUNCATE.
    pub fn truncate(&mut self, tables: Vec<Arc<TableMap>>, restart_identity: bool) {
        self.count(0);
        self.steps.push(Step::Truncate { tables, restart_identity });
    }

    /// Adds a change of a table.
    pub fn alter(&mut self, alter: Alter) {
        self.count(0);
        self.steps.push(Step::Alter(Box::new(alter)));
    }

    /// Ends a source transaction.
    pub fn commit(&mut self, end_lsn: Lsn, commit_time: i64) {
        self.transactions += 1;
        self.end = Some(BatchEnd { end_lsn, commit_time: Some(commit_time) });
    }

    /// Begins a source transaction: the batch does not end where the last one did.
    pub fn begin(&mut self, commit_lsn: Lsn, commit_time: i64) {
        self.first_commit_time.get_or_insert(commit_time);
        self.first_commit_lsn.get_or_insert(commit_lsn);
        self.last_commit_lsn = Some(commit_lsn);
        self.end = None;
    }
}

/// Returns which values of a row were not sent, by column; equal masks are written by one statement.
pub fn unchanged_mask(tuple: &Tuple) -> Vec<bool> {
    tuple.values().map(|v| v == Value::Unchanged).collect()
}

#[cfg(test)]
mod tests;
