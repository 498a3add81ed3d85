use pg::TableName;
use pg::pgoutput::{Column, Identity, Relation};

use super::super::SourceIndex;
use super::*;

const INT: u32 = 23;
const TEXT: u32 = 25;

fn column(number: i16, name: &str, type_oid: u32) -> SourceColumn {
    SourceColumn {
        number,
        name: name.into(),
        type_oid,
        type_modifier: -1,
        type_sql: if type_oid == INT { "integer" } else { "text" }.into(),
        collation: None,
        not_null: false,
        default: None,
        generated: None,
        identity: None,
        missing: None,
    }
}

/// A table of these columns, the first of which is its key; it never had more than `last_number`.
fn table(columns: &[(i16, &str, u32)], last_number: i16) -> SourceTable {
    SourceTable {
        oid: 1,
        name: TableName::new("public", "t"),
        columns: columns.iter().map(|(number, name, oid)| column(*number, name, *oid)).collect(),
        identity: RowIdentity::Key(vec![columns[0].1.into()]),
        indexes: Vec::new(),
        partitioned: false,
        root: None,
        files: [(1, 1)].into(),
        storage: Default::default(),
        constraints: Vec::new(),
        last_number,
    }
}

fn relation(columns: &[(&str, u32)]) -> Relation {
    let column = |(n, (name, oid)): (usize, &(&str, u32))| Column {
        key: n == 0,
        name: (*name).into(),
        type_oid: *oid,
        type_modifier: -1,
    };
    Relation {
        oid: 1,
        schema: "public".into(),
        name: "t".into(),
        identity: Identity::Default,
        columns: columns.iter().enumerate().map(column).collect(),
    }
}

fn numbers(known: &SourceTable, now: &SourceTable, sent: &Relation) -> Option<Vec<(i16, String)>> {
    let then = at_relation(known, Some(now), sent).ok()?;
    Some(then.table.columns.into_iter().map(|c| (c.number, c.name)).collect())
}

fn pairs(columns: &[(i16, &str)]) -> Option<Vec<(i16, String)>> {
    Some(columns.iter().map(|(number, name)| (*number, (*name).to_owned())).collect())
}

#[test]
fn a_renamed_column_keeps_its_number_and_one_that_came_for_another_has_a_new_one() {
    let known = table(&[(1, "id", INT), (2, "a", INT)], 2);
    let renamed = table(&[(1, "id", INT), (2, "b", INT)], 2);
    let replaced = table(&[(1, "id", INT), (3, "b", INT)], 3);
    let sent = relation(&[("id", INT), ("b", INT)]);
    assert_eq!(numbers(&known, &renamed, &sent), pairs(&[(1, "id"), (2, "b")]));
    assert_eq!(numbers(&known, &replaced, &sent), pairs(&[(1, "id"), (3, "b")]));
}

#[test]
fn names_that_pass_from_column_to_column_are_told_apart_by_order() {
    let known = table(&[(1, "id", INT), (2, "a", INT), (3, "b", INT)], 3);
    let now = table(&[(1, "id", INT), (2, "b", INT), (3, "a", INT)], 3);
    let sent = relation(&[("id", INT), ("b", INT), ("a", INT)]);
    assert_eq!(numbers(&known, &now, &sent), pairs(&[(1, "id"), (2, "b"), (3, "a")]));
    let before = relation(&[("id", INT), ("a", INT), ("b", INT)]);
    assert_eq!(numbers(&known, &now, &before), pairs(&[(1, "id"), (2, "a"), (3, "b")]));
}

#[test]
fn what_was_before_a_later_change_is_told_from_what_is_now() {
    let known = table(&[(1, "id", INT), (2, "a", INT)], 2);
    // Since then: c was added, a was dropped.
    let now = table(&[(1, "id", INT), (3, "c", TEXT)], 3);
    assert_eq!(numbers(&known, &now, &relation(&[("id", INT), ("a", INT)])), pairs(&[(1, "id"), (2, "a")]));
    let both = relation(&[("id", INT), ("a", INT), ("c", TEXT)]);
    assert_eq!(numbers(&known, &now, &both), pairs(&[(1, "id"), (2, "a"), (3, "c")]));
    assert_eq!(numbers(&known, &now, &relation(&[("id", INT), ("c", TEXT)])), pairs(&[(1, "id"), (3, "c")]));
}

#[test]
fn a_column_that_came_and_went_unseen_is_left_out() {
    let known = table(&[(1, "id", INT), (2, "a", INT)], 2);
    let now = table(&[(1, "id", INT), (2, "a", INT)], 4);
    let sent = relation(&[("id", INT), ("a", INT), ("scratch", TEXT)]);
    assert_eq!(numbers(&known, &now, &sent), pairs(&[(1, "id"), (2, "a")]));
}

#[test]
fn dropped_and_added_under_the_same_name_is_unclear_unless_the_type_tells() {
    let known = table(&[(1, "id", INT), (2, "x", INT)], 2);
    let sent = relation(&[("id", INT), ("x", INT)]);
    assert_eq!(numbers(&known, &table(&[(1, "id", INT), (3, "x", INT)], 3), &sent), None);
    let other_type = table(&[(1, "id", INT), (3, "x", TEXT)], 3);
    assert_eq!(numbers(&known, &other_type, &sent), pairs(&[(1, "id"), (2, "x")]));
    let sent = relation(&[("id", INT), ("x", TEXT)]);
    assert_eq!(numbers(&known, &other_type, &sent), pairs(&[(1, "id"), (3, "x")]));
    // It had another name for a while; but nothing leads from what was known over one more column to what is.
    assert_eq!(numbers(&known, &known, &relation(&[("id", INT), ("y", INT)])), pairs(&[(1, "id"), (2, "y")]));
    assert_eq!(numbers(&known, &known, &relation(&[("id", INT), ("x", INT), ("y", INT)])), None);
}

#[test]
fn a_constraint_counts_if_it_was_there_and_still_is() {
    let mut known = table(&[(1, "id", INT), (2, "a", INT)], 2);
    let mut now = table(&[(1, "id", INT), (2, "a", INT), (3, "b", INT)], 3);
    known.columns[1].not_null = true;
    now.columns[2].not_null = true;
    now.columns[2].missing = Some("7".into());
    let then = at_relation(&known, Some(&now), &relation(&[("id", INT), ("a", INT), ("b", INT)])).unwrap();
    assert!(then.table.columns.iter().all(|c| !c.not_null), "{then:?}");
    assert_eq!(then.table.columns[2].missing.as_deref(), Some("7"));
    now.columns[1].not_null = true;
    let then = at_relation(&known, Some(&now), &relation(&[("id", INT), ("a", INT), ("b", INT)])).unwrap();
    assert!(then.table.columns[1].not_null);
}

#[test]
fn files_of_now_are_taken_only_when_rows_look_as_now() {
    let known = table(&[(1, "id", INT), (2, "a", INT)], 2);
    let mut now = table(&[(1, "id", INT), (2, "a", TEXT)], 2);
    now.files = [(1, 2)].into();
    let before = at_relation(&known, Some(&now), &relation(&[("id", INT), ("a", INT)])).unwrap();
    assert_eq!(before.table.files, known.files);
    let after = at_relation(&before.table, Some(&now), &relation(&[("id", INT), ("a", TEXT)])).unwrap();
    assert!(after.rewritten);
    assert_eq!(after.table.files, now.files);
}

#[test]
fn a_new_key_brings_its_index_and_an_old_one_may_get_another_name() {
    let index = |name: &str, definition: &str, primary: bool, identity: bool| SourceIndex {
        name: name.into(),
        primary,
        unique: true,
        constraint: None,
        definition: definition.into(),
        identity,
    };
    let mut known = table(&[(1, "id", INT), (2, "a", INT)], 2);
    known.indexes =
        vec![index("t_pkey", "USING btree (id)", true, true), index("t_a", "USING btree (a)", false, false)];
    let mut now = known.clone();
    now.indexes = vec![index("t_key", "USING btree (a)", false, true), index("t_id", "USING btree (id)", true, false)];
    now.identity = RowIdentity::Key(vec!["a".into()]);
    let mut sent = relation(&[("id", INT), ("a", INT)]);
    (sent.columns[0].key, sent.columns[1].key) = (false, true);
    let then = at_relation(&known, Some(&now), &sent).unwrap();
    assert_eq!(then.table.identity, RowIdentity::Key(vec!["a".into()]));
    let names: Vec<&str> = then.table.indexes.iter().map(|i| i.name.as_str()).collect();
    assert_eq!(names, ["t_id", "t_key"]);
}

#[test]
fn wide_tables_are_told_at_once() {
    let wide: Vec<(i16, String)> = (1..=1600).map(|n| (n, format!("c{n}"))).collect();
    let columns: Vec<(i16, &str, u32)> = wide.iter().map(|(n, name)| (*n, name.as_str(), INT)).collect();
    let known = table(&columns, 1600);
    let now = table(&columns[..1599], 1600);
    let sent: Vec<(&str, u32)> = columns[..1599].iter().map(|(_, name, oid)| (*name, *oid)).collect();
    assert_eq!(numbers(&known, &now, &relation(&sent)).map(|c| c.len()), Some(1599));
}
