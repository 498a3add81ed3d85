//! Groups row changes into batches that a sink can write as sets.
//!
//! Within a batch every key keeps only what it comes to: an insert, an update or a delete. The order in which a sink writes them
//! (deletes, updates, inserts) gives what the changes in their own order would have given, for what one transaction or several whole
//! ones did to a table. What does not commute (TRUNCATE, a new key with a value that was not sent) ends a step.
//!
//! Pure: no I/O, no clock. What a key comes to is checked against row-by-row application in the tests below.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use pg::Lsn;
use pg::pgoutput::{Tuple, Value};

use crate::relation::TableMap;

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
    /// Whole source transactions.
    pub transactions: usize,
    /// Commit time of the first transaction, for lag.
    pub first_commit_time: Option<i64>,
    /// Where the first transaction commits, for errors.
    pub first_commit_lsn: Option<Lsn>,
    /// It goes on with a transaction of which the sink has a part already.
    pub continues: bool,
    /// Where it ends; `None` when the last transaction goes on in the next batch, which then belongs to the same target transaction.
    pub end: Option<BatchEnd>,
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
    /// One row gets a new key and keeps values that were not sent.
    Rekey {
        /// The table.
        table: Arc<TableMap>,
        /// The row's old key.
        old: Tuple,
        /// The row, with unchanged values.
        new: Tuple,
    },
}

/// What one table's rows come to.
#[derive(Debug)]
pub struct TableChanges {
    /// The table.
    pub table: Arc<TableMap>,
    /// What was counted: inserts, updates, deletes.
    pub counts: [i64; 3],
    rows: HashMap<Box<[u8]>, Row>,
    /// Rows of a table without a key: only ever inserted.
    keyless: Vec<Tuple>,
}

/// What is known of one key: whether the target has it, and what it comes to.
#[derive(Debug)]
struct Row {
    /// The first change was not an insert, so the target has the row.
    existed: bool,
    /// Orders the rows as they came, for locality on the target.
    order: usize,
    change: RowChange,
}

#[derive(Debug)]
enum RowChange {
    Write(Tuple),
    Delete(Tuple),
}

/// What a table's rows come to, sorted by how they are written.
#[derive(Debug, Default)]
pub struct Sorted<'a> {
    /// Rows that go, by key. Each must be there.
    pub deletes: Vec<&'a Tuple>,
    /// Rows that change. Each must be there. Some of their values may be [`Value::Unchanged`].
    pub updates: Vec<&'a Tuple>,
    /// Rows that come. None may be there.
    pub inserts: Vec<&'a Tuple>,
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
        for row in rows {
            match (&row.change, row.existed) {
                (RowChange::Delete(old), _) => sorted.deletes.push(old),
                (RowChange::Write(new), true) => sorted.updates.push(new),
                (RowChange::Write(new), false) => sorted.inserts.push(new),
            }
        }
        sorted.inserts.extend(&self.keyless);
        sorted
    }

    fn next_order(&self) -> usize {
        self.rows.len()
    }

    fn insert(&mut self, new: Tuple) {
        let Some(key) = self.table.key_of(&new) else {
            self.keyless.push(new);
            return;
        };
        let order = self.next_order();
        match self.rows.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Row { existed: false, order, change: RowChange::Write(new) });
            }
            // Deleted and inserted again: the row that was there gets all its values anew.
            Entry::Occupied(mut entry) => entry.get_mut().change = RowChange::Write(new),
        }
    }

    fn update(&mut self, key: Box<[u8]>, new: Tuple) {
        let order = self.next_order();
        match self.rows.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Row { existed: true, order, change: RowChange::Write(new) });
            }
            Entry::Occupied(mut entry) => {
                let row = entry.get_mut();
                let new = if let RowChange::Write(older) = &row.change { new.filled_from(older) } else { new };
                row.change = RowChange::Write(new);
            }
        }
    }

    fn delete(&mut self, key: Box<[u8]>, old: Tuple) {
        let order = self.next_order();
        match self.rows.entry(key) {
            Entry::Vacant(entry) => {
                entry.insert(Row { existed: true, order, change: RowChange::Delete(old) });
            }
            Entry::Occupied(mut entry) if entry.get().existed => entry.get_mut().change = RowChange::Delete(old),
            // Came and went within the batch: the target never had it.
            Entry::Occupied(entry) => {
                entry.remove();
            }
        }
    }

    /// What the batch knows of the row with this key, if it has its image.
    fn image(&self, key: &[u8]) -> Option<&Tuple> {
        match self.rows.get(key).map(|r| &r.change) {
            Some(RowChange::Write(image)) => Some(image),
            _ => None,
        }
    }
}

impl Batch {
    /// Returns whether the sink would have nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.transactions == 0 && self.rows == 0 && !self.continues
    }

    fn changes(&mut self, table: &Arc<TableMap>) -> &mut TableChanges {
        if !matches!(self.steps.last(), Some(Step::Changes(_))) {
            self.steps.push(Step::Changes(Vec::new()));
        }
        let Some(Step::Changes(tables)) = self.steps.last_mut() else { unreachable!("pushed above") };
        // A batch touches few tables; their maps are compared by identity, since a table that was altered has a new one.
        let at = tables.iter().position(|t| Arc::ptr_eq(&t.table, table)).unwrap_or_else(|| {
            tables.push(TableChanges::new(table.clone()));
            tables.len() - 1
        });
        &mut tables[at]
    }

    fn count(&mut self, size: usize) {
        self.rows += 1;
        self.bytes += size;
    }

    /// Adds an inserted row.
    pub fn insert(&mut self, table: &Arc<TableMap>, new: Tuple) {
        self.count(new.size());
        let changes = self.changes(table);
        changes.counts[0] += 1;
        changes.insert(new);
    }

    /// Adds an updated row. `old` is there when the key changed, or when the source sends whole old rows.
    ///
    /// Returns false, and adds nothing, if the table has no key by which to find the row.
    pub fn update(&mut self, table: &Arc<TableMap>, old: Option<Tuple>, new: Tuple) -> bool {
        self.count(new.size() + old.as_ref().map_or(0, Tuple::size));
        let whole_old = table.whole_old_rows;
        let new = match &old {
            Some(old) if whole_old => new.filled_from(old),
            // A large key that did not change is not sent with the row, but with the old key.
            Some(old) if new.has_unchanged() => new.filled_where(old, |position| table.is_key(position)),
            _ => new,
        };
        let Some(new_key) = table.key_of(&new) else { return false };
        let old_key = old.as_ref().and_then(|old| table.key_of(old));
        let changes = self.changes(table);
        changes.counts[1] += 1;
        match (old, old_key) {
            (Some(old), Some(old_key)) if old_key != new_key => {
                let new = changes.image(&old_key).map_or_else(|| new.clone(), |image| new.filled_from(image));
                if new.has_unchanged() {
                    self.steps.push(Step::Rekey { table: table.clone(), old, new });
                } else {
                    changes.delete(old_key, old);
                    changes.insert(new);
                }
            }
            _ => changes.update(new_key, new),
        }
        true
    }

    /// Adds a deleted row.
    ///
    /// Returns false, and adds nothing, if the table has no key by which to find the row.
    pub fn delete(&mut self, table: &Arc<TableMap>, old: Tuple) -> bool {
        self.count(old.size());
        let Some(key) = table.key_of(&old) else { return false };
        let changes = self.changes(table);
        changes.counts[2] += 1;
        changes.delete(key, old);
        true
    }

    /// Adds a TRUNCATE.
    pub fn truncate(&mut self, tables: Vec<Arc<TableMap>>, restart_identity: bool) {
        self.count(0);
        self.steps.push(Step::Truncate { tables, restart_identity });
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
        self.end = None;
    }
}

/// Returns which values of a row were not sent, by column; equal masks are written by one statement.
pub fn unchanged_mask(tuple: &Tuple) -> Vec<bool> {
    tuple.values().map(|v| v == Value::Unchanged).collect()
}

#[cfg(test)]
mod tests;
