//! What tables look like on both sides, as values: read by [`introspect`], turned into statements by [`ddl`], compared by [`change`].

pub mod change;
pub mod ddl;
pub mod introspect;
pub mod make;
pub mod policy;
pub mod storage;
pub mod then;
pub mod wire;

use std::collections::{BTreeMap, HashMap};

use catalog::mirror::{Bookkeeping, ColumnChoice};
use pg::{SqlState, TableName};
use serde::{Deserialize, Serialize};

use crate::error::Problem;
use storage::Storage;

/// A type as a column has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeInfo {
    /// Its oid on that server.
    pub oid: u32,
    /// Its name as SQL, with schema unless it is built in.
    pub sql: String,
    /// It is built in: the oid means the same on every server.
    pub builtin: bool,
    /// It has a binary form, in which a stream in binary brings it; else it comes as text there too.
    pub sends: bool,
    /// What its binary form is made of: equal on both sides if it means the same there. See [`wire::wire_form`].
    pub wire: Option<String>,
}

/// A column of a source table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceColumn {
    /// Its number: what stays the same when it is renamed, and is never used again when it is dropped.
    pub number: i16,
    /// Its name.
    pub name: String,
    /// Its type's oid.
    pub type_oid: u32,
    /// Its type's modifier; -1 when there is none.
    pub type_modifier: i32,
    /// Its type with modifiers, as SQL.
    pub type_sql: String,
    /// Its collation when it is not the type's own, as SQL.
    pub collation: Option<String>,
    /// It is NOT NULL.
    pub not_null: bool,
    /// Its default, as SQL.
    pub default: Option<String>,
    /// The generated column's expression, as SQL; such a column is not replicated but computed.
    pub generated: Option<String>,
    /// `GENERATED … AS IDENTITY`: `a` always, `d` by default.
    pub identity: Option<char>,
    /// The value of rows that are older than the column, as text: its default when it was added. `None`: NULL, or there are no such rows.
    pub missing: Option<String>,
}

/// How rows of a source table are found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RowIdentity {
    /// By these columns of a unique, immediate index.
    Key(Vec<String>),
    /// Not at all: only inserts can be replicated.
    InsertsOnly,
    /// By whole rows without a unique key.
    WholeRow,
}

/// An index or constraint to be made after the copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceIndex {
    /// Its name.
    pub name: String,
    /// It is the primary key.
    pub primary: bool,
    /// It is unique.
    pub unique: bool,
    /// It belongs to a constraint, whose definition (as SQL) this is.
    pub constraint: Option<String>,
    /// What follows the table's name in `CREATE INDEX`: `USING btree (…) …`.
    pub definition: String,
    /// The rows' identity depends on it.
    pub identity: bool,
}

/// A relation that holds rows: the table itself, or a partition.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// Its oid.
    pub oid: u32,
    /// Its name.
    pub name: TableName,
    /// Blocks it had when the copy was planned.
    pub blocks: i64,
    /// Bytes it had, TOAST included.
    pub bytes: i64,
}

/// A CHECK or foreign key constraint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceConstraint {
    /// Its name.
    pub name: String,
    /// What follows its name: `CHECK (…)`, `FOREIGN KEY (…) REFERENCES … (…)`.
    pub definition: String,
    /// The table that a foreign key references: oid, and its name as it is in the definition.
    pub references: Option<(u32, String)>,
}

/// A table on the source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceTable {
    /// Its oid.
    pub oid: u32,
    /// Its name.
    #[serde(with = "as_pair")]
    pub name: TableName,
    /// Its columns, generated ones included.
    pub columns: Vec<SourceColumn>,
    /// How rows are found.
    pub identity: RowIdentity,
    /// Its indexes.
    pub indexes: Vec<SourceIndex>,
    /// It is partitioned.
    pub partitioned: bool,
    /// The partitioned table that it is a part of, at the top.
    pub root: Option<u32>,
    /// The files that hold its rows, by the oid of the table or partition: another file means that all rows were written anew.
    pub files: BTreeMap<u32, u32>,
    /// Its partitions, if it is partitioned.
    #[serde(default)]
    pub storage: Storage,
    /// Its CHECK and foreign key constraints.
    pub constraints: Vec<SourceConstraint>,
    /// The highest number that a column of it ever had.
    pub last_number: i16,
}

impl SourceTable {
    /// Returns whether the rows are where they were: no statement since has written all of them anew. Partitions that came or went do
    /// not matter.
    pub fn same_files(&self, older: &SourceTable) -> bool {
        let same = |(oid, file)| older.files.get(oid).is_none_or(|f| [file, &storage::NOT_LOOKED_AT].contains(&f));
        self.files.iter().all(same)
    }

    /// Returns whether rows look as they did: the same columns, names and types, and the same key.
    pub fn same_rows(&self, older: &SourceTable) -> bool {
        fn sent(table: &SourceTable) -> impl Iterator<Item = (i16, &str, u32, i32)> {
            let ordinary = table.columns.iter().filter(|c| c.generated.is_none());
            ordinary.map(|c| (c.number, c.name.as_str(), c.type_oid, c.type_modifier))
        }
        sent(self).eq(sent(older)) && self.identity == older.identity
    }

    /// Returns the column of this number.
    pub fn column(&self, number: i16) -> Option<&SourceColumn> {
        self.columns.iter().find(|c| c.number == number)
    }
}

/// A table's name as a pair of schema and name.
mod as_pair {
    use pg::TableName;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(name: &TableName, serializer: S) -> Result<S::Ok, S::Error> {
        (&name.schema, &name.name).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<TableName, D::Error> {
        <(String, String)>::deserialize(deserializer).map(|(schema, name)| TableName { schema, name })
    }
}

/// A column of a target table.
#[derive(Clone, Debug)]
pub struct TargetColumn {
    /// Its name.
    pub name: String,
    /// Its type's oid there.
    pub type_oid: u32,
    /// Its type without modifiers, as SQL.
    pub type_sql: String,
    /// It is computed by the target.
    pub generated: bool,
    /// `GENERATED ALWAYS AS IDENTITY`.
    pub identity_always: bool,
    /// It must be given a value: NOT NULL and without default.
    pub required: bool,
    /// Its type has an equality that an index may know.
    pub has_equality: bool,
    /// What its type's binary form is made of, see [`wire::wire_form`].
    pub wire: Option<String>,
}

/// A table on the target.
#[derive(Clone, Debug)]
pub struct TargetTable {
    /// Its oid.
    pub oid: u32,
    /// Its name.
    pub name: TableName,
    /// It is partitioned; else what is done to it is done to it alone, and not to tables that inherit from it.
    pub partitioned: bool,
    /// Schemas of its columns' types, besides `pg_catalog`: where their operators are.
    pub type_schemas: Vec<String>,
    /// Its columns.
    pub columns: Vec<TargetColumn>,
    /// Column sets of its unique, immediate, whole indexes.
    pub unique_keys: Vec<Vec<String>>,
    /// It has unique or exclusion constraints besides one on the mirror's key. Set when the key is known.
    pub other_unique: bool,
    /// It has exclusion constraints, or unique indexes that are partial, on expressions or deferrable.
    pub odd_unique: bool,
    /// It holds at least one row.
    pub has_rows: bool,
    /// It has foreign keys.
    pub has_foreign_keys: bool,
    /// A foreign key of it deletes or changes its rows with those that they refer to.
    pub cascades: bool,
    /// Which of its columns are the mirror's own. Set when the mirror is known.
    pub bookkeeping: Bookkeeping,
}

impl TargetTable {
    /// Notes which of the unique keys is the mirror's: the others can make rows collide.
    pub fn set_key(&mut self, key: Option<&[String]>) {
        let same = |unique: &Vec<String>| key.is_some_and(|k| same_set(unique, k));
        self.other_unique = self.odd_unique || self.unique_keys.iter().any(|u| !same(u));
    }

    /// Returns whether rows can be found by these columns through an index.
    pub fn has_key(&self, key: &[String]) -> bool {
        self.unique_keys.iter().any(|unique| same_set(unique, key))
    }
}

fn same_set(a: &[String], b: &[String]) -> bool {
    a.len() == b.len() && a.iter().all(|c| b.contains(c))
}

/// One table of a mirror, with what both sides say of it.
#[derive(Clone, Debug)]
pub struct TablePlan {
    /// On the source.
    pub source: SourceTable,
    /// Its name on the target.
    pub target_name: TableName,
    /// Which of its columns the mirror takes.
    pub columns: ColumnChoice,
    /// Which of its rows, in SQL for the source; `None`: all.
    pub condition: Option<String>,
}

impl TablePlan {
    /// Returns the columns that are copied and streamed: those that the mirror takes and the source does not compute.
    pub fn replicated_columns(&self) -> impl Iterator<Item = &SourceColumn> {
        self.source.columns.iter().filter(|c| c.generated.is_none() && self.columns.takes(&c.name))
    }

    /// Returns the columns by which rows are found; `None` when only inserts can be replicated.
    pub fn key(&self) -> Option<&[String]> {
        match &self.source.identity {
            RowIdentity::Key(columns) => Some(columns),
            RowIdentity::InsertsOnly | RowIdentity::WholeRow => None,
        }
    }

    /// Returns the condition as a clause, or nothing: ` where (…)`. A comment at its end takes nothing of ours along.
    pub fn where_clause(&self) -> String {
        self.condition.as_ref().map_or_else(String::new, |condition| format!(" where ({condition}\n)"))
    }

    /// Returns what a person should know of this table.
    pub fn warning(&self) -> Option<String> {
        if matches!(self.source.identity, RowIdentity::InsertsOnly) {
            Some("no key: only INSERT and TRUNCATE are replicated".to_owned())
        } else if matches!(self.source.identity, RowIdentity::WholeRow) {
            Some("no key: for each UPDATE and DELETE the target is searched for one row that is the same".to_owned())
        } else {
            None
        }
    }

    /// Checks that what the target has can take the rows.
    ///
    /// # Errors
    /// [`Problem`] naming what is missing.
    pub fn check_target(&self, target: &TargetTable) -> Result<(), Problem> {
        for column in self.replicated_columns() {
            if !target.columns.iter().any(|c| c.name == column.name) {
                return Err(Problem::new(
                    SqlState::UNDEFINED_COLUMN,
                    format!("target table \"{}\" lacks column \"{}\"", target.name, column.name),
                )
                .hint("Add the column, or exclude it from the mirror."));
            }
        }
        let taken = |name: &str| self.replicated_columns().any(|c| c.name == name);
        if let Some(column) = target.columns.iter().find(|c| c.required && !taken(&c.name)) {
            return Err(Problem::new(
                SqlState::from_text("23502").expect("five characters"),
                format!(
                    "column \"{}\" of target table \"{}\" must have a value and the source has none",
                    column.name, target.name
                ),
            )
            .hint("Give the column a default, or allow NULL."));
        }
        match self.key() {
            Some(key) if !target.has_key(key) => Err(Problem::new(
                SqlState::WRONG_STATE,
                format!("target table \"{}\" has no unique index on ({})", target.name, key.join(", ")),
            )
            .detail("Rows are found by these columns, the source's primary key or replica identity.")
            .hint("Create a unique index on these columns on the target.")),
            _ => Ok(()),
        }
    }
}

impl TargetTable {
    /// Returns the table as SQL that means it alone.
    pub fn alone(&self) -> String {
        if self.partitioned { self.name.quoted() } else { format!("only {}", self.name.quoted()) }
    }
}

/// Types by their oid on the source.
pub type Types = HashMap<u32, TypeInfo>;

/// How a value gets from a stream to a column of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// Its bytes are a value of the column's type.
    AsIs,
    /// They are text, which the column's type reads or refuses.
    FromText,
    /// They are a value of the source's type, whose text the column's type reads or refuses: an assignment from one type to another
    /// would round in silence.
    ThroughText,
}

/// Returns how values of a column get from a stream in binary to the target; `None` if their bytes could be taken for something else, so
/// that they must come as text. `known` tells whether the target has a built-in type.
pub fn passage(source: Option<&TypeInfo>, target: &TargetColumn, known: impl Fn(u32) -> bool) -> Option<Passage> {
    let source = source?;
    match &source.wire {
        _ if !source.sends => Some(Passage::FromText),
        None => None,
        Some(wire) if target.wire.as_ref() == Some(wire) => Some(Passage::AsIs),
        Some(_) => (source.builtin && known(source.oid)).then_some(Passage::ThroughText),
    }
}

/// Returns whether a stream in binary brings values of these tables so that the target can take them all.
pub fn all_binary(
    plans: &[TablePlan],
    types: &Types,
    targets: &HashMap<TableName, TargetTable>,
    known: impl Fn(u32) -> bool,
) -> bool {
    plans.iter().all(|plan| {
        let target = targets.get(&plan.target_name);
        plan.replicated_columns().all(|column| {
            let of_target = target.and_then(|t| t.columns.iter().find(|c| c.name == column.name));
            of_target.is_some_and(|t| passage(types.get(&column.type_oid), t, &known).is_some())
        })
    })
}

/// Returns whether a table's values can be copied in binary. Where types differ they are copied as text.
pub fn is_binary(plan: &TablePlan, types: &Types, target: Option<&TargetTable>) -> bool {
    plan.replicated_columns().all(|column| {
        let of_target = target.and_then(|t| t.columns.iter().find(|c| c.name == column.name));
        let of_source = types.get(&column.type_oid).filter(|t| t.sends).and_then(|t| t.wire.as_ref());
        of_source.is_some() && of_target.is_some_and(|t| t.wire.as_ref() == of_source)
    })
}

/// The first oid that is not built in.
///
/// Source: PostgreSQL docs, system-catalog-initial-data, "OID Assignment".
pub const FIRST_USER_OID: u32 = 12_000;
