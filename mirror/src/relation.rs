//! How a source relation's rows become a target table's rows.

use catalog::mirror::Bookkeeping;
use pg::SqlState;
use pg::TableName;
use pg::name::quote_ident;
use pg::pgoutput::{Relation, Tuple, Value};

use crate::error::Problem;
use crate::schema::{Passage, TargetColumn, TargetTable};

/// One column of a row on its way to the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappedColumn {
    /// Where the value is in a tuple.
    pub position: usize,
    /// The column on the target.
    pub target: String,
    /// The column's type on the target, as SQL.
    pub target_type: String,
    /// The type in which the value is staged, as SQL: what its bytes are.
    pub staged_type: String,
    /// What the staged value needs to become the target's.
    pub passage: Passage,
    /// It is part of the key.
    pub key: bool,
    /// `GENERATED ALWAYS AS IDENTITY` on the target: an UPDATE may not set it.
    pub identity_always: bool,
    /// The target's type has an equality that an index may know.
    pub has_equality: bool,
}

impl MappedColumn {
    /// Returns the staged value as the target wants it; `column` is the staged column, as SQL.
    pub fn value(&self, column: &str) -> String {
        let target = &self.target_type;
        match self.passage {
            Passage::AsIs => column.to_owned(),
            // The cast from text does not know the name of none, `-`.
            Passage::FromText if target == "regclass" => format!("pg_catalog.regclassin(pg_catalog.textout({column}))"),
            Passage::FromText => format!("{column}::{target}"),
            // Not a cast to text, which is not what some types print.
            Passage::ThroughText => {
                format!("case when {column} is not null then pg_catalog.concat({column})::{target} end")
            }
        }
    }

    /// Returns a value of the target's column as it would be staged; `column` is that column, as SQL.
    pub fn staged(&self, column: &str) -> String {
        match self.passage {
            Passage::AsIs => column.to_owned(),
            Passage::FromText | Passage::ThroughText => {
                format!("case when {column} is not null then pg_catalog.concat({column})::{} end", self.staged_type)
            }
        }
    }

    /// Returns the target column, quoted.
    pub fn quoted(&self) -> String {
        quote_ident(&self.target)
    }
}

/// A relation as the source describes it now, mapped onto its target table.
#[derive(Clone, Debug)]
pub struct TableMap {
    /// The relation's oid on the source.
    pub oid: u32,
    /// The table on the source.
    pub source: TableName,
    /// The table on the target.
    pub target: TableName,
    /// The table on the target, as SQL that means it alone.
    pub alone: String,
    /// The columns that are written, in the order of the source's tuples.
    pub columns: Vec<MappedColumn>,
    /// The target's other columns, with their types, that an INSERT may set: rows keep what is there when they are replaced.
    pub extras: Vec<(String, String)>,
    /// Old rows come whole (replica identity FULL), so unchanged values can be taken from them.
    pub whole_old_rows: bool,
    /// All values are those of the target's columns, byte for byte: rows that come can be copied into the table itself.
    pub direct: bool,
    /// The target has unique or exclusion constraints besides the key: rows may collide on their way to where they do not.
    pub other_unique: bool,
    /// The target has an identity column that an UPDATE may not set and that is not in the key: such rows are replaced.
    pub replace: bool,
    /// Foreign keys of the target delete and change its rows with those that they refer to, if they are not switched off.
    pub cascades: bool,
    /// Columns that only the target has, and that are written with each row.
    pub bookkeeping: Bookkeeping,
}

impl TableMap {
    /// Maps what the source just described onto the target table.
    ///
    /// `passage` tells how values of a type of the source (by oid) get to a column of the target, and the type in which they are staged.
    /// `key` are the columns by which rows are found, `None` when there are none.
    ///
    /// # Errors
    /// [`Problem`] 42703 if the target lacks a column that the mirror takes, 42804 if there is no passage: the bytes that come would be
    /// taken for something else.
    pub fn new(
        relation: &Relation,
        target: &TargetTable,
        passage: impl Fn(u32, &TargetColumn) -> Option<(Passage, String)>,
        takes: impl Fn(&str) -> bool,
        key: Option<&[String]>,
    ) -> Result<TableMap, Problem> {
        let source = TableName::new(&relation.schema, &relation.name);
        let mut columns = Vec::new();
        for (position, column) in relation.columns.iter().enumerate() {
            if !takes(&column.name) {
                continue;
            }
            if target.bookkeeping.has(&column.name) {
                return Err(taken_name(&source, &column.name));
            }
            let Some(found) = target.columns.iter().find(|c| c.name == column.name) else {
                return Err(missing_column(&source, target, &column.name));
            };
            if found.generated {
                continue;
            }
            let Some((passage, staged_type)) = passage(column.type_oid, found) else {
                return Err(changed_type(&source, target, &column.name));
            };
            columns.push(MappedColumn {
                position,
                target: found.name.clone(),
                target_type: found.type_sql.clone(),
                staged_type,
                passage,
                key: key.is_some_and(|k| k.contains(&column.name)),
                identity_always: found.identity_always,
                has_equality: found.has_equality,
            });
        }
        let bookkeeping = target.bookkeeping.clone();
        let is_ours = |name: &str| bookkeeping.has(name) || columns.iter().any(|m: &MappedColumn| m.target == name);
        let is_extra = |c: &&TargetColumn| !c.generated && !is_ours(&c.name);
        let extras = target.columns.iter().filter(is_extra).map(|c| (c.name.clone(), c.type_sql.clone())).collect();
        Ok(TableMap {
            // What the mirror writes besides the source's columns is not in a stream's rows.
            direct: bookkeeping == Bookkeeping::default()
                && !columns.is_empty()
                && columns.iter().all(|c| c.passage == Passage::AsIs),
            oid: relation.oid,
            source,
            target: target.name.clone(),
            alone: target.alone(),
            replace: columns.iter().any(|c| c.identity_always && !c.key),
            columns,
            extras,
            whole_old_rows: relation.identity == pg::pgoutput::Identity::Full,
            other_unique: target.other_unique,
            cascades: target.cascades,
            bookkeeping,
        })
    }

    /// Returns whether rows that were deleted on the source stay, marked.
    pub fn deletes_softly(&self) -> bool {
        self.bookkeeping.soft_delete.is_some()
    }

    /// Returns whether a row `alias` was deleted on the source and stayed, as SQL; `None` if rows do not stay.
    pub fn is_deleted(&self, alias: &str) -> Option<String> {
        self.bookkeeping.soft_delete.as_ref().map(|name| format!("{alias}.{} is true", quote_ident(name)))
    }

    /// Returns the mirror's own columns, quoted, with the values that a row gets, as SQL. `deleted` says whether it was, as SQL.
    pub fn bookkept(&self, deleted: &str) -> impl Iterator<Item = (String, String)> {
        let Bookkeeping { soft_delete, synced_at } = &self.bookkeeping;
        let mark = soft_delete.as_ref().map(|name| (quote_ident(name), deleted.to_string()));
        let time = synced_at.as_ref().map(|name| (quote_ident(name), "pg_catalog.now()".to_owned()));
        mark.into_iter().chain(time)
    }

    /// Returns what an UPDATE sets in the mirror's own columns of a row that goes on being there: when that was.
    pub fn touch(&self) -> Option<String> {
        let name = self.bookkeeping.synced_at.as_ref()?;
        Some(format!("{} = pg_catalog.now()", quote_ident(name)))
    }

    /// Returns what an UPDATE sets in a row that was deleted on the source and stays.
    pub fn bury(&self) -> String {
        self.bookkept("true").map(|(name, value)| format!("{name} = {value}")).collect::<Vec<_>>().join(", ")
    }

    /// Returns whether rows are found by a key.
    pub fn has_key(&self) -> bool {
        self.columns.iter().any(|c| c.key)
    }

    /// Returns whether rows are found by all that the source says of them, for want of a key.
    pub fn by_whole_row(&self) -> bool {
        self.whole_old_rows && !self.has_key()
    }

    /// Returns whether the value at this position of a tuple is part of the key.
    pub fn is_key(&self, position: usize) -> bool {
        self.columns.iter().any(|c| c.key && c.position == position)
    }

    /// Returns the bytes of a row's key, each value with its length; `None` when the table has no key, or the row lacks a value of it.
    ///
    /// Equal bytes mean the same row: a row that is there has one representation at a time, and what changes it sends the old one.
    pub fn key_of(&self, tuple: &Tuple) -> Option<Box<[u8]>> {
        let mut key = Vec::with_capacity(24);
        let mut values = tuple.values();
        let mut next = 0;
        for column in self.columns.iter().filter(|c| c.key) {
            let value = values.nth(column.position - next)?;
            next = column.position + 1;
            match value {
                Value::Text(bytes) | Value::Binary(bytes) => {
                    key.extend_from_slice(&u32::try_from(bytes.len()).ok()?.to_be_bytes());
                    key.extend_from_slice(bytes);
                }
                Value::Null | Value::Unchanged => return None,
            }
        }
        if key.is_empty() { None } else { Some(key.into()) }
    }
}

/// The error of a source's column that would be one of the mirror's own.
pub fn taken_name(source: &TableName, column: &str) -> Problem {
    Problem::new(
        SqlState::from_text("42701").expect("five characters"),
        format!(
            "column \"{column}\" of source table \"{source}\" has the name of a column that the mirror writes itself"
        ),
    )
    .hint("Choose another soft_delete_column or synced_at_column, or leave the column out of the mirror.")
}

fn missing_column(source: &TableName, target: &TargetTable, column: &str) -> Problem {
    Problem::new(
        SqlState::UNDEFINED_COLUMN,
        format!("column \"{column}\" of source table \"{source}\" does not exist in target table \"{}\"", target.name),
    )
    .hint("Add the column on the target, then RESUME MIRROR; nothing is lost meanwhile.")
}

fn changed_type(source: &TableName, target: &TargetTable, column: &str) -> Problem {
    let message = format!(
        "column \"{column}\" has another type in source table \"{source}\" than in target table \"{}\"",
        target.name
    );
    Problem::new(SqlState::DATATYPE_MISMATCH, message)
}
