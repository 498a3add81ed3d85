//! A batch that was compacted does to a table what its changes do one by one.

use std::collections::BTreeMap;

use bytes::{BufMut, BytesMut};
use pg::TableName;
use proptest::prelude::*;

use super::*;
use crate::relation::MappedColumn;
use crate::schema::Passage;
use catalog::mirror::Bookkeeping;

/// A table `(id, a, b)` whose key is `id`.
fn table() -> Arc<TableMap> {
    let column = |position: usize, name: &str| MappedColumn {
        position,
        target: name.into(),
        target_type: "text".into(),
        staged_type: "text".into(),
        passage: Passage::AsIs,
        key: position == 0,
        identity_always: false,
        has_equality: true,
    };
    Arc::new(TableMap {
        oid: 1,
        source: TableName::new("public", "t"),
        target: TableName::new("public", "t"),
        alone: "t".into(),
        columns: vec![column(0, "id"), column(1, "a"), column(2, "b")],
        extras: Vec::new(),
        whole_old_rows: false,
        direct: true,
        other_unique: false,
        replace: false,
        cascades: false,
        bookkeeping: Bookkeeping::default(),
    })
}

/// The same, with a column that says of rows that they were deleted.
fn softly_deleting() -> Arc<TableMap> {
    let bookkeeping = Bookkeeping { soft_delete: Some("gone".into()), synced_at: None };
    Arc::new(TableMap { bookkeeping, direct: false, ..(*table()).clone() })
}

/// `None` is a value that was not sent.
fn tuple(values: &[Option<u8>]) -> Tuple {
    let mut bytes = BytesMut::new();
    bytes.put_u16(values.len() as u16);
    for value in values {
        match value {
            None => bytes.put_u8(b'u'),
            Some(value) => {
                bytes.put_slice(b"t\0\0\0\x01");
                bytes.put_u8(*value);
            }
        }
    }
    Tuple::split_from(&mut bytes.freeze()).unwrap()
}

fn key_tuple(id: u8) -> Tuple {
    let mut bytes = BytesMut::new();
    bytes.put_u16(3);
    bytes.put_slice(b"t\0\0\0\x01");
    bytes.put_u8(id);
    bytes.put_slice(b"nn");
    Tuple::split_from(&mut bytes.freeze()).unwrap()
}

fn values(tuple: &Tuple) -> Vec<Option<u8>> {
    tuple.values().map(|v| if let Value::Text(bytes) = v { Some(bytes[0]) } else { None }).collect()
}

/// Values by key, and whether the row was deleted and has stayed.
type Model = BTreeMap<u8, ([u8; 2], bool)>;

/// Writes a batch as a sink does: deletes, updates, inserts; a change that finds no row, or one that is in the way, is an error.
fn write(batch: &Batch, rows: &mut Model) -> Result<(), String> {
    for step in &batch.steps {
        match step {
            Step::Alter(_) => {}
            Step::Changes(tables) => {
                for changes in tables {
                    let sorted = changes.sorted();
                    let mut moved = Vec::new();
                    for (old, new) in &sorted.moves {
                        let (old, new) = (values(old), values(new));
                        let (row, false) =
                            *rows.get(&old[0].unwrap()).ok_or("a row to change the key of is missing")?
                        else {
                            return Err("a row to change the key of is deleted".into());
                        };
                        moved.push((new[0].unwrap(), [new[1].unwrap_or(row[0]), new[2].unwrap_or(row[1])]));
                    }
                    for old in &sorted.buries {
                        let (_, deleted) = rows.get_mut(&values(old)[0].unwrap()).ok_or("a row to mark is missing")?;
                        if std::mem::replace(deleted, true) {
                            return Err("a row to mark is deleted already".into());
                        }
                    }
                    for old in &sorted.deletes {
                        let (_, false) = rows.remove(&values(old)[0].unwrap()).ok_or("a row to delete is missing")?
                        else {
                            return Err("a row to delete is deleted".into());
                        };
                    }
                    for tuple in &sorted.updates {
                        let new = values(tuple);
                        let (row, deleted) = rows.get_mut(&new[0].unwrap()).ok_or("a row to update is missing")?;
                        *row = [new[1].unwrap_or(row[0]), new[2].unwrap_or(row[1])];
                        if std::mem::replace(deleted, sorted.is_deleted(tuple)) {
                            return Err("a row to update is deleted".into());
                        }
                    }
                    let comes = sorted.inserts.iter().copied().chain(sorted.moves.iter().map(|(_, new)| *new));
                    for key in comes.chain(sorted.clears.iter().copied()) {
                        let key = values(key)[0].unwrap();
                        if changes.table.deletes_softly() && rows.get(&key).is_some_and(|(_, deleted)| *deleted) {
                            rows.remove(&key);
                        }
                    }
                    for tuple in &sorted.inserts {
                        let new = values(tuple);
                        let (Some(id), Some(a), Some(b)) = (new[0], new[1], new[2]) else {
                            return Err("half a row".into());
                        };
                        if rows.insert(id, ([a, b], sorted.is_deleted(tuple))).is_some() {
                            return Err("a row is in the way".into());
                        }
                    }
                    for ((id, row), (_, tuple)) in moved.into_iter().zip(&sorted.moves) {
                        if rows.insert(id, (row, sorted.is_deleted(tuple))).is_some() {
                            return Err("a row is in the way".into());
                        }
                    }
                }
            }
            Step::Truncate { tables, .. } => happen_truncate(rows, tables[0].deletes_softly()),
            Step::InOrder(_) => return Err("nothing asked for an order".into()),
        }
    }
    Ok(())
}

#[derive(Clone, Debug)]
enum Change {
    Insert(u8, u8, u8),
    /// Key before, key after, values; without a value it is unchanged and not sent.
    Update(u8, u8, Option<u8>, Option<u8>),
    Delete(u8),
    Truncate,
}

fn change() -> impl Strategy<Value = Change> {
    let key = || 0u8..5;
    prop_oneof![
        4 => (key(), any::<u8>(), any::<u8>()).prop_map(|(k, a, b)| Change::Insert(k, a, b)),
        4 => (key(), key(), any::<Option<u8>>(), any::<Option<u8>>()).prop_map(|(k, n, a, b)| Change::Update(k, n, a, b)),
        3 => (key(), key(), any::<Option<u8>>(), any::<Option<u8>>()).prop_map(|(k, _, a, b)| Change::Update(k, k, a, b)),
        3 => key().prop_map(Change::Delete),
        1 => Just(Change::Truncate),
    ]
}

/// Does a change to the rows if it is possible on the source, and says whether it was. With `softly` deleted rows stay.
fn happen(change: &Change, rows: &mut Model, softly: bool) -> bool {
    let is_there = |rows: &Model, key: u8| rows.get(&key).is_some_and(|(_, deleted)| !deleted);
    match *change {
        Change::Insert(key, ..) if is_there(rows, key) => false,
        Change::Insert(key, a, b) => {
            rows.insert(key, ([a, b], false));
            true
        }
        Change::Update(key, new_key, a, b) => {
            if !is_there(rows, key) || (new_key != key && is_there(rows, new_key)) {
                return false;
            }
            let (row, _) = rows.remove(&key).unwrap();
            rows.insert(new_key, ([a.unwrap_or(row[0]), b.unwrap_or(row[1])], false));
            true
        }
        Change::Delete(key) => {
            let there = is_there(rows, key);
            match rows.get_mut(&key).filter(|_| softly) {
                Some((_, deleted)) => *deleted = true,
                None => drop(rows.remove(&key)),
            }
            there
        }
        Change::Truncate => {
            happen_truncate(rows, softly);
            true
        }
    }
}

fn happen_truncate(rows: &mut Model, softly: bool) {
    rows.values_mut().for_each(|(_, deleted)| *deleted = true);
    rows.retain(|_, _| softly);
}

fn add(change: &Change, batch: &mut Batch, table: &Arc<TableMap>) {
    match *change {
        Change::Insert(key, a, b) => batch.insert(table, tuple(&[Some(key), Some(a), Some(b)])),
        Change::Update(key, new_key, a, b) => {
            let old = (key != new_key).then(|| key_tuple(key));
            assert!(batch.update(table, old, tuple(&[Some(new_key), a, b])));
        }
        Change::Delete(key) => assert!(batch.delete(table, key_tuple(key))),
        Change::Truncate => batch.truncate(vec![table.clone()], false),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(5_000))]

    #[test]
    fn a_batch_does_what_its_changes_do_one_by_one(
        before in proptest::collection::btree_map(0u8..5, any::<([u8; 2], bool)>(), 0..5),
        softly in any::<bool>(),
        changes in proptest::collection::vec(change(), 0..40),
        cuts in proptest::collection::vec(0usize..40, 0..3),
    ) {
        let table = if softly { softly_deleting() } else { table() };
        let before: Model = before.into_iter().filter(|(_, (_, deleted))| softly || !deleted).collect();
        let (mut source, mut target) = (before.clone(), before);
        let mut batch = Batch::default();
        for (n, change) in changes.iter().enumerate() {
            if happen(change, &mut source, softly) {
                add(change, &mut batch, &table);
            }
            if cuts.contains(&n) {
                prop_assert_eq!(write(&std::mem::take(&mut batch), &mut target), Ok(()));
                prop_assert_eq!(&source, &target);
            }
        }
        prop_assert_eq!(write(&batch, &mut target), Ok(()));
        prop_assert_eq!(source, target);
    }
}

#[test]
fn deleted_rows_stay_as_they_were_last() {
    let (table, mut batch) = (softly_deleting(), Batch::default());
    for change in [
        Change::Insert(1, 2, 3),
        Change::Delete(1),
        Change::Update(2, 2, Some(7), None),
        Change::Delete(2),
        Change::Delete(3),
        Change::Insert(4, 1, 1),
        Change::Update(4, 5, None, None),
    ] {
        add(&change, &mut batch, &table);
    }
    let [Step::Changes(tables)] = &batch.steps[..] else { panic!("one step: {:?}", batch.steps) };
    let sorted = tables[0].sorted();
    let keys = |rows: &[&Tuple]| rows.iter().map(|row| values(row)[0].unwrap()).collect::<Vec<_>>();
    assert_eq!((keys(&sorted.inserts), keys(&sorted.updates), keys(&sorted.buries)), (vec![1, 5], vec![2], vec![3]));
    let deleted = |rows: &[&Tuple]| rows.iter().map(|row| sorted.is_deleted(row)).collect::<Vec<_>>();
    assert_eq!((deleted(&sorted.inserts), deleted(&sorted.updates)), (vec![true, false], vec![true]));
    assert_eq!((keys(&sorted.clears), keys(&sorted.deletes)), (vec![4], vec![]));
}

#[test]
fn a_row_that_came_and_went_is_not_written() {
    let (table, mut batch) = (table(), Batch::default());
    add(&Change::Insert(1, 2, 3), &mut batch, &table);
    add(&Change::Delete(1), &mut batch, &table);
    let Some(Step::Changes(tables)) = batch.steps.first() else { panic!("no changes") };
    let sorted = tables[0].sorted();
    assert!(sorted.deletes.is_empty() && sorted.updates.is_empty() && sorted.inserts.is_empty());
    assert_eq!(tables[0].counts, [1, 0, 1]);
}

#[test]
fn new_keys_without_all_values_are_one_step() {
    let (table, mut batch) = (table(), Batch::default());
    for id in 0..3 {
        add(&Change::Update(id, id + 10, None, Some(9)), &mut batch, &table);
    }
    add(&Change::Insert(1, 2, 3), &mut batch, &table);
    let [Step::Changes(tables)] = &batch.steps[..] else { panic!("one step: {:?}", batch.steps) };
    let sorted = tables[0].sorted();
    assert_eq!((sorted.moves.len(), sorted.deletes.len(), sorted.updates.len(), sorted.inserts.len()), (3, 2, 1, 0));
}

#[test]
fn what_only_the_target_has_moves_with_its_row() {
    let with_extra = Arc::new(TableMap { extras: vec![("note".into(), "text".into())], ..(*table()).clone() });
    let mut batch = Batch::default();
    add(&Change::Update(1, 2, Some(5), Some(9)), &mut batch, &with_extra);
    let [Step::Changes(tables)] = &batch.steps[..] else { panic!("one step: {:?}", batch.steps) };
    assert_eq!(tables[0].sorted().moves.len(), 1);
}

#[test]
fn rows_without_a_key_are_only_inserted() {
    let mut keyless = (*table()).clone();
    keyless.columns.iter_mut().for_each(|c| c.key = false);
    let (table, mut batch) = (Arc::new(keyless), Batch::default());
    for _ in 0..2 {
        batch.insert(&table, tuple(&[Some(1), Some(2), Some(3)]));
    }
    assert!(!batch.update(&table, None, tuple(&[Some(1), Some(2), Some(3)])));
    assert!(!batch.delete(&table, key_tuple(1)));
    let Some(Step::Changes(tables)) = batch.steps.first() else { panic!("no changes") };
    assert_eq!(tables[0].sorted().inserts.len(), 2);
}

#[test]
fn whole_old_rows_find_rows_without_a_key_in_their_order() {
    let mut keyless = (*table()).clone();
    keyless.columns.iter_mut().for_each(|c| c.key = false);
    keyless.whole_old_rows = true;
    let (table, mut batch) = (Arc::new(keyless), Batch::default());
    let (one, two) = (tuple(&[Some(1), Some(2), Some(3)]), tuple(&[Some(1), None, Some(4)]));
    batch.insert(&table, one.clone());
    assert!(batch.update(&table, Some(one.clone()), two));
    assert!(batch.delete(&table, one.clone()));
    assert!(!batch.update(&table, None, one.clone()), "nothing to find it by");
    let [Step::Changes(tables)] = &batch.steps[..] else { panic!("one step: {:?}", batch.steps) };
    let filled = tuple(&[Some(1), Some(2), Some(4)]);
    let expected = [
        super::Change::Insert(one.clone()),
        super::Change::Update { old: Some(one.clone()), new: filled },
        super::Change::Delete(one),
    ];
    assert_eq!(tables[0].sorted().keyless, expected);
    assert_eq!(tables[0].counts, [1, 1, 1]);
}

#[test]
fn with_an_order_changes_are_kept_as_they_came() {
    let (first, second) = (table(), table());
    let mut batch = Batch { in_order: true, ..Batch::default() };
    add(&Change::Insert(1, 2, 3), &mut batch, &first);
    add(&Change::Update(1, 2, None, Some(9)), &mut batch, &second);
    add(&Change::Delete(1), &mut batch, &first);
    let [Step::InOrder(changes)] = &batch.steps[..] else { panic!("one step: {:?}", batch.steps) };
    assert!(Arc::ptr_eq(&changes[1].0, &second) && changes.len() == 3);
}
