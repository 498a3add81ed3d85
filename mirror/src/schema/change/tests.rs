use catalog::mirror::ColumnChoice;

use super::super::{SourceIndex, TypeInfo};
use super::*;

const INT: u32 = 23;
const BIGINT: u32 = 20;

fn column(number: i16, name: &str) -> SourceColumn {
    SourceColumn {
        number,
        name: name.into(),
        type_oid: INT,
        type_modifier: -1,
        type_sql: "integer".into(),
        collation: None,
        not_null: false,
        default: None,
        generated: None,
        identity: None,
        missing: None,
    }
}

fn source(columns: Vec<SourceColumn>) -> SourceTable {
    SourceTable {
        oid: 1,
        name: TableName::new("public", "t"),
        identity: RowIdentity::Key(vec![columns[0].name.clone()]),
        columns,
        indexes: Vec::new(),
        partitioned: false,
        root: None,
        files: [(1, 1)].into(),
        storage: Default::default(),
        constraints: Vec::new(),
        last_number: 9,
    }
}

fn plan() -> TablePlan {
    TablePlan {
        source: source(vec![column(1, "id"), column(2, "a"), column(3, "b")]),
        target_name: TableName::new("public", "t"),
        columns: ColumnChoice::default(),
        condition: None,
    }
}

fn target(columns: &[&str]) -> TargetTable {
    let column = |name: &&str| TargetColumn {
        name: (*name).into(),
        type_oid: INT,
        type_sql: "integer".into(),
        generated: false,
        identity_always: false,
        required: false,
        has_equality: true,
        wire: Some(INT.to_string()),
    };
    TargetTable {
        bookkeeping: catalog::mirror::Bookkeeping::default(),
        oid: 7,
        name: TableName::new("public", "t"),
        partitioned: false,
        type_schemas: Vec::new(),
        columns: columns.iter().map(column).collect(),
        unique_keys: vec![vec!["id".into()]],
        other_unique: false,
        odd_unique: false,
        has_rows: true,
        has_foreign_keys: false,
        cascades: false,
    }
}

fn alter_with(
    plan: &TablePlan,
    new: &SourceTable,
    target: &TargetTable,
    rewritten: bool,
) -> Result<Alteration, Problem> {
    let types: Types = [(INT, "integer"), (BIGINT, "bigint")]
        .map(|(oid, sql)| {
            (oid, TypeInfo { oid, sql: sql.into(), builtin: true, sends: true, wire: Some(oid.to_string()) })
        })
        .into();
    let target_of = |oid: u32| (oid == 5).then(|| TableName::new("dwh", "parent"));
    let around = Surroundings {
        types: &types,
        rewritten,
        rows_gone: &[],
        emptied: false,
        replaced: false,
        indexes: true,
        constraints: true,
        target_of: &target_of,
    };
    alter(plan, new, target, &around)
}

fn statements(new: &SourceTable) -> Vec<String> {
    let altered = alter_with(&plan(), new, &target(&["id", "a", "b"]), false).unwrap();
    altered.statements.into_iter().map(|s| s.sql.replace("alter table \"public\".\"t\" ", "")).collect()
}

#[test]
fn columns_go_are_renamed_and_come_in_this_order() {
    let mut new = source(vec![column(1, "id"), column(3, "a"), column(4, "c")]);
    new.columns[2].missing = Some("it's".into());
    new.columns[2].default = Some("7".into());
    assert_eq!(
        statements(&new),
        [
            "drop column if exists \"a\"",
            "rename column \"b\" to \"a\"",
            "add column \"c\" integer default 'it''s'::integer",
            "alter column \"c\" drop default",
            "alter column \"c\" set default 7",
        ]
    );
}

#[test]
fn names_pass_from_column_to_column() {
    let new = source(vec![column(1, "id"), column(2, "b"), column(3, "a")]);
    assert_eq!(
        statements(&new),
        [
            "rename column \"a\" to \"peergate_renamed_0\"",
            "rename column \"b\" to \"a\"",
            "rename column \"peergate_renamed_0\" to \"b\"",
        ]
    );
    let altered = alter_with(&plan(), &new, &target(&["id", "a", "b"]), false).unwrap();
    let names: Vec<&str> = altered.target.columns.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["id", "b", "a"]);
}

#[test]
fn rows_that_were_written_anew_are_copied_again() {
    let mut typed = plan().source;
    (typed.columns[1].type_oid, typed.columns[1].type_sql) = (BIGINT, "bigint".into());
    let table = target(&["id", "a", "b"]);
    let altered = alter_with(&plan(), &typed, &table, false).unwrap();
    assert_eq!(altered.statements[0].sql, "alter table \"public\".\"t\" alter column \"a\" type bigint");
    assert_eq!(altered.target.columns[1].type_oid, BIGINT);
    assert!(alter_with(&plan(), &typed, &table, true).is_err());
    let mut added = plan().source;
    added.columns.push(column(4, "c"));
    assert!(alter_with(&plan(), &added, &table, true).is_err());
    // A value for older rows is only kept for those that were not written anew since.
    added.columns[3].missing = Some("1".into());
    assert!(alter_with(&plan(), &added, &table, true).is_ok());
}

#[test]
fn a_column_that_somebody_has_added_is_filled_as_on_the_source() {
    let mut new = plan().source;
    new.columns.push(SourceColumn { missing: Some("5".into()), ..column(4, "c") });
    let altered = alter_with(&plan(), &new, &target(&["id", "a", "b", "c"]), false).unwrap();
    assert_eq!(altered.statements[0].sql, "update only \"public\".\"t\" set \"c\" = '5'::integer");
    assert_eq!(altered.statements[0].kind, Kind::Rows);
    let new = source(vec![column(1, "id"), column(2, "x"), column(3, "b")]);
    assert!(alter_with(&plan(), &new, &target(&["id", "x", "b"]), false).unwrap().statements.is_empty());
}

#[test]
fn what_refuses_rows_goes_first_and_comes_last() {
    let check =
        |name: &str| SourceConstraint { name: name.into(), definition: "CHECK ((a > 0))".into(), references: None };
    let mut old = plan();
    old.source.columns[1].not_null = true;
    old.source.constraints = vec![check("old")];
    let mut new = plan().source;
    new.columns[2].not_null = true;
    let referenced = "FOREIGN KEY (a) REFERENCES public.parent(id)";
    let key = |name: &str, oid| SourceConstraint {
        name: name.into(),
        definition: referenced.into(),
        references: Some((oid, "public.parent".into())),
    };
    new.constraints = vec![check("new"), key("fk", 5), key("elsewhere", 6)];
    let altered = alter_with(&old, &new, &target(&["id", "a", "b"]), false).unwrap();
    let told: Vec<(String, Kind)> =
        altered.statements.into_iter().map(|s| (s.sql.replace("alter table \"public\".\"t\" ", ""), s.kind)).collect();
    let expected = [
        ("drop constraint if exists \"old\"", Kind::Needed),
        ("alter column \"a\" drop not null", Kind::Needed),
        ("alter column \"b\" set not null", Kind::Optional),
        ("add constraint \"new\" CHECK ((a > 0)) not valid", Kind::Optional),
        ("add constraint \"fk\" FOREIGN KEY (a) REFERENCES \"dwh\".\"parent\"(id) not valid", Kind::Optional),
    ];
    assert_eq!(told, expected.map(|(sql, kind)| (sql.to_owned(), kind)));
}

#[test]
fn a_new_key_is_needed_and_other_indexes_are_not() {
    let index = |name: &str, primary: bool, constraint: Option<&str>| SourceIndex {
        name: name.into(),
        primary,
        unique: primary,
        constraint: constraint.map(str::to_owned),
        definition: format!("USING btree ({name})"),
        identity: primary,
    };
    let mut old = plan();
    old.source.indexes = vec![index("t_pkey", true, Some("PRIMARY KEY (id)"))];
    let mut new = plan().source;
    new.identity = RowIdentity::Key(vec!["a".into()]);
    new.indexes = vec![index("t_pkey", true, Some("PRIMARY KEY (a)")), index("b", false, None)];
    let altered = alter_with(&old, &new, &target(&["id", "a", "b"]), false).unwrap();
    let told: Vec<(&str, Kind)> = altered.statements.iter().map(|s| (s.sql.as_str(), s.kind)).collect();
    assert_eq!(
        told,
        [
            ("alter table \"public\".\"t\" drop constraint if exists \"t_pkey\"", Kind::Needed),
            ("alter table \"public\".\"t\" add constraint \"t_pkey\" PRIMARY KEY (a)", Kind::Needed),
            ("create index \"b\" on \"public\".\"t\" USING btree (b)", Kind::Optional),
        ]
    );
    assert!(altered.target.has_key(&["a".to_owned()]) && !altered.target.has_key(&["id".to_owned()]));
}

#[test]
fn a_table_that_is_called_like_its_source_goes_on_being() {
    let mut new = plan().source;
    new.name = TableName::new("archive", "old");
    assert_eq!(
        statements(&new),
        [
            "rename to \"old\"",
            "create schema if not exists \"archive\"",
            "alter table \"public\".\"old\" set schema \"archive\""
        ]
    );
    let elsewhere = TablePlan { target_name: TableName::new("dwh", "facts"), ..plan() };
    let mut table = target(&["id", "a", "b"]);
    table.name = elsewhere.target_name.clone();
    assert!(alter_with(&elsewhere, &new, &table, false).unwrap().statements.is_empty());
}
