//! A target in memory, for the simulation: what [`super::postgres`] promises of order, atomicity and fencing, without a server.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pg::pgoutput::{Tuple, Value};
use pg::{Lsn, SqlState, TableName};

use super::Sink;
use crate::batch::{Batch, Change, Sorted, Step, TableChanges};
use crate::error::{Error, Problem};
use crate::progress::DurableLsn;
use crate::relation::TableMap;

/// A value; `None` is NULL.
pub(crate) type Field = Option<Vec<u8>>;

/// Rows, each as often as it is there.
pub(crate) type Rows = BTreeMap<Vec<Field>, usize>;

/// Tables with their rows. One without rows is left out.
pub(crate) type State = BTreeMap<TableName, Rows>;

/// What a server would keep: committed rows, and the mirror's progress row.
#[derive(Clone, Debug, Default)]
pub(crate) struct Target {
    pub(crate) state: State,
    pub(crate) epoch: i64,
    pub(crate) applied: Lsn,
    /// Counts what was committed.
    pub(crate) version: u64,
}

/// The target as everybody sees it.
pub(crate) type SharedTarget = Arc<Mutex<Target>>;

/// Looks at what is committed.
pub(crate) fn look(target: &SharedTarget) -> MutexGuard<'_, Target> {
    target.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes batches to a [`Target`].
pub(crate) struct MemorySink {
    target: SharedTarget,
    epoch: i64,
    applied: Lsn,
    /// The open transaction's view.
    open: Option<State>,
}

impl MemorySink {
    /// Takes the progress row over.
    pub(crate) fn claim(target: &SharedTarget, epoch: i64) -> Result<MemorySink, Error> {
        let mut seen = look(target);
        if seen.epoch > epoch {
            return Err(Error::Fenced);
        }
        seen.epoch = epoch;
        Ok(MemorySink { target: target.clone(), epoch, applied: seen.applied, open: None })
    }

    /// Where the target was when the row was taken over, or this sink last committed.
    pub(crate) fn applied(&self) -> Lsn {
        self.applied
    }

    /// Changes committed rows under the fence, as a copy's transactions do.
    pub(crate) fn run_fenced(&self, change: impl FnOnce(&mut State)) -> Result<(), Error> {
        let mut target = look(&self.target);
        if target.epoch != self.epoch {
            return Err(Error::Fenced);
        }
        change(&mut target.state);
        target.version += 1;
        Ok(())
    }
}

impl Sink for MemorySink {
    async fn apply(&mut self, batch: &Batch) -> Result<Option<DurableLsn>, Error> {
        let mut state = self.open.take().unwrap_or_else(|| look(&self.target).state.clone());
        for step in &batch.steps {
            write(&mut state, step)?;
        }
        let Some(end) = batch.end else {
            self.open = Some(state);
            return Ok(None);
        };
        let mut target = look(&self.target);
        if (target.epoch, target.applied) != (self.epoch, self.applied) {
            return Err(Error::Fenced);
        }
        target.state = state;
        target.applied = end.end_lsn;
        target.version += 1;
        self.applied = end.end_lsn;
        Ok(Some(DurableLsn::recorded(end.end_lsn)))
    }
}

fn write(state: &mut State, step: &Step) -> Result<(), Error> {
    match step {
        // Its tables have no shape.
        Step::Alter(_) => Ok(()),
        Step::Changes(tables) => tables.iter().try_for_each(|changes| write_table(state, changes)),
        Step::Truncate { tables, .. } => {
            for table in tables {
                let rows = state.remove(&table.target).unwrap_or_default();
                if table.deletes_softly() {
                    let buried = state.entry(table.target.clone()).or_default();
                    rows.into_iter().for_each(|(row, count)| *buried.entry(marked(row)).or_default() += count);
                }
            }
            state.retain(|_, rows| !rows.is_empty());
            Ok(())
        }
        Step::InOrder(changes) => changes.iter().try_for_each(|(table, change)| write_row(state, table, change)),
    }
}

/// Deletes, then updates, then inserts, each as a set: a unique value may pass from row to row.
fn write_table(state: &mut State, changes: &TableChanges) -> Result<(), Error> {
    let table = &changes.table;
    let sorted = changes.sorted();
    let Sorted { deletes, updates, moves, inserts, keyless, clears, buries, .. } = &sorted;
    let written = |new: &Tuple, row: Vec<Field>| if sorted.is_deleted(new) { marked(row) } else { row };
    let mut moved = Vec::new();
    for (old, new) in moves {
        let before = find(state, table, old)?;
        moved.push(written(new, row_of(table, new, Some(&before))));
    }
    buries.iter().try_for_each(|old| bury(state, table, old))?;
    for old in deletes {
        take_out(state, table, old)?;
    }
    let before = updates.iter().map(|new| take_out(state, table, new)).collect::<Result<Vec<_>, _>>()?;
    for (new, before) in updates.iter().zip(&before) {
        put_in(state, table, written(new, row_of(table, new, Some(before))))?;
    }
    if table.deletes_softly() && table.has_key() {
        let comes = moves.iter().map(|(_, new)| *new).chain(inserts.iter().copied());
        comes.chain(clears.iter().copied()).for_each(|new| clear(state, table, new));
    }
    moved.into_iter().try_for_each(|row| put_in(state, table, row))?;
    inserts.iter().try_for_each(|new| put_in(state, table, written(new, row_of(table, new, None))))?;
    keyless.iter().try_for_each(|change| write_row(state, table, change))
}

fn write_row(state: &mut State, table: &TableMap, change: &Change) -> Result<(), Error> {
    match change {
        Change::Insert(new) => {
            clear(state, table, new);
            put_in(state, table, row_of(table, new, None))
        }
        Change::Update { old, new } => {
            clear(state, table, new);
            let before = take_out(state, table, old.as_ref().unwrap_or(new))?;
            put_in(state, table, row_of(table, new, Some(&before)))
        }
        Change::Delete(old) if table.deletes_softly() => bury(state, table, old),
        Change::Delete(old) | Change::Remove(old) => take_out(state, table, old).map(drop),
    }
}

/// Takes a row away that was deleted and has stayed under that key.
fn clear(state: &mut State, table: &TableMap, key: &Tuple) {
    let key: Vec<Value<'_>> = key.values().collect();
    if let Some(rows) = state.get_mut(&table.target).filter(|_| table.deletes_softly() && table.has_key()) {
        rows.retain(|row, _| !(is_marked(row) && is_same_row(table, row, &key)));
    }
}

/// Marks a row that was deleted on the source.
fn bury(state: &mut State, table: &TableMap, key: &Tuple) -> Result<(), Error> {
    let row = take_out(state, table, key)?;
    *state.entry(table.target.clone()).or_default().entry(marked(row)).or_default() += 1;
    Ok(())
}

/// What a row becomes that was deleted on the source and stays: it has one field more.
pub(crate) fn marked(mut row: Vec<Field>) -> Vec<Field> {
    if !is_marked(&row) {
        row.push(Some(MARK.to_vec()));
    }
    row
}

/// Returns whether it is a row that was deleted on the source.
pub(crate) fn is_marked(row: &[Field]) -> bool {
    row.last().is_some_and(|field| field.as_deref() == Some(MARK))
}

/// What no value of a row is.
const MARK: &[u8] = b"deleted on the source";

/// The row as the target keeps it; a value that was not sent is what it was before.
fn row_of(table: &TableMap, tuple: &Tuple, before: Option<&Vec<Field>>) -> Vec<Field> {
    let values: Vec<Value<'_>> = tuple.values().collect();
    let field = |(n, position): (usize, usize)| match values[position] {
        Value::Null => None,
        Value::Text(bytes) | Value::Binary(bytes) => Some(bytes.to_vec()),
        Value::Unchanged => before.expect("a row that comes has all its values")[n].clone(),
    };
    table.columns.iter().map(|c| c.position).enumerate().map(field).collect()
}

/// By its key; without one, by all that it has.
fn is_same_row(table: &TableMap, row: &[Field], key: &[Value<'_>]) -> bool {
    let all = !table.has_key();
    table.columns.iter().zip(row).filter(|(column, _)| all || column.key).all(|(column, field)| {
        match (&key[column.position], field) {
            (Value::Text(a) | Value::Binary(a), Some(b)) => *a == b.as_slice(),
            (Value::Null, None) => all,
            _ => false,
        }
    })
}

fn find(state: &State, table: &TableMap, key: &Tuple) -> Result<Vec<Field>, Error> {
    let key: Vec<Value<'_>> = key.values().collect();
    let is_it = |row: &&Vec<Field>| !is_marked(row) && is_same_row(table, row, &key);
    let found = state.get(&table.target).and_then(|rows| rows.keys().find(is_it));
    found.cloned().ok_or_else(|| wrong(format!("a row of {} is missing", table.target)))
}

fn take_out(state: &mut State, table: &TableMap, key: &Tuple) -> Result<Vec<Field>, Error> {
    let row = find(state, table, key)?;
    let rows = state.entry(table.target.clone()).or_default();
    match rows.get_mut(&row) {
        Some(count) if *count > 1 => *count -= 1,
        _ => drop(rows.remove(&row)),
    }
    if rows.is_empty() {
        state.remove(&table.target);
    }
    Ok(row)
}

fn put_in(state: &mut State, table: &TableMap, row: Vec<Field>) -> Result<(), Error> {
    let rows = state.entry(table.target.clone()).or_default();
    let key = |row: &[Field]| -> Vec<Field> {
        table.columns.iter().zip(row).filter(|(c, _)| c.key).map(|(_, f)| f.clone()).collect()
    };
    if table.has_key() && rows.keys().any(|other| key(other) == key(&row)) {
        return Err(wrong(format!("a row of {} is in the way", table.target)));
    }
    *rows.entry(row).or_default() += 1;
    Ok(())
}

fn wrong(message: String) -> Error {
    Error::Blocked(Problem::new(SqlState::WRONG_STATE, message))
}
