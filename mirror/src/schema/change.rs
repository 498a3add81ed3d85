//! What is to be done on the target when a source table has changed. Pure: two shapes of a table in, statements or a refusal out.

use pg::name::{quote_ident, quote_literal};
use pg::{SqlState, TableName};

use super::then::successor;
use super::{
    RowIdentity, SourceColumn, SourceConstraint, SourceTable, TablePlan, TargetColumn, TargetTable, Types, ddl,
};
use crate::error::Problem;

/// One statement for the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statement {
    /// The statement.
    pub sql: String,
    /// What it is for.
    pub kind: Kind,
}

/// What a statement is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The rows that follow cannot be written without it.
    Needed,
    /// They can: if the target refuses it, that is told and the mirror goes on.
    Optional,
    /// It changes rows that are there, as the source's were.
    Rows,
}

/// What becomes of a table on the target.
#[derive(Clone, Debug)]
pub struct Alteration {
    /// What to do, in this order. Nothing, if the change means nothing to the target.
    pub statements: Vec<Statement>,
    /// The table as the mirror knows it from then on.
    pub plan: TablePlan,
    /// The target's table from then on.
    pub target: TargetTable,
}

/// What is known besides the two shapes of the table.
pub struct Surroundings<'a> {
    /// The source's types.
    pub types: &'a Types,
    /// All rows of the table may have been written anew, with other values than were sent.
    pub rewritten: bool,
    /// The table was emptied since its rows were last known to be where they were, which is seen as their being written anew.
    pub emptied: bool,
    /// All rows on the target are about to be replaced: what is there need not become anything.
    pub replaced: bool,
    /// Conditions whose rows went with their partitions, in terms of the table as it was.
    pub rows_gone: &'a [String],
    /// Indexes are carried over, besides those that the rows' identity needs.
    pub indexes: bool,
    /// CHECK and foreign key constraints are carried over.
    pub constraints: bool,
    /// The target of a source table that the mirror takes, by its oid.
    pub target_of: &'a dyn Fn(u32) -> Option<TableName>,
}

/// Works out what makes the target of `plan` follow its source, which has become `new`.
///
/// # Errors
/// [`Problem`] when the table's rows have values on the source that were never sent.
pub fn alter(
    plan: &TablePlan,
    new: &SourceTable,
    target: &TargetTable,
    around: &Surroundings<'_>,
) -> Result<Alteration, Problem> {
    let mut writer = Writer {
        old: plan.source.clone(),
        plan: TablePlan { source: new.clone(), ..plan.clone() },
        target: target.clone(),
        around,
        statements: Vec::new(),
    };
    writer.remove_rows();
    writer.remove_constraints();
    writer.remove_columns();
    writer.rename_columns();
    writer.change_columns()?;
    writer.add_columns()?;
    writer.set_properties();
    writer.add_indexes();
    writer.add_constraints();
    writer.rename_table();
    let Writer { mut plan, mut target, statements, .. } = writer;
    target.set_key(plan.key());
    plan.target_name = target.name.clone();
    Ok(Alteration { statements, plan, target })
}

/// Works out how a target table that is called like its source goes on being called like it: the statements, and its name then.
pub fn rename(target: &TableName, old: &TableName, new: &TableName) -> (Vec<String>, TableName) {
    let (mut statements, mut name) = (Vec::new(), target.clone());
    if target.name == old.name && new.name != old.name {
        statements.push(format!("alter table {} rename to {}", name.quoted(), quote_ident(&new.name)));
        name.name.clone_from(&new.name);
    }
    if target.schema == old.schema && new.schema != old.schema {
        let schema = quote_ident(&new.schema);
        statements.push(format!("create schema if not exists {schema}"));
        statements.push(format!("alter table {} set schema {schema}", name.quoted()));
        name.schema.clone_from(&new.schema);
    }
    (statements, name)
}

/// Returns an earlier shape of a table as one of `new`, whose columns it is compared with by their numbers: if it was dropped and made
/// again, columns of the same name are the same. The target's table keeps its name.
pub fn as_earlier(old: &SourceTable, new: &SourceTable) -> SourceTable {
    let mut earlier = SourceTable { name: new.name.clone(), ..old.clone() };
    if old.oid != new.oid {
        for (gone, column) in (1..).zip(&mut earlier.columns) {
            let same = new.columns.iter().find(|n| n.name == column.name);
            column.number = same.map_or(-gone, |n| n.number);
        }
    }
    earlier
}

struct Writer<'a> {
    /// The source's table as it was, with the names that its columns have by now.
    old: SourceTable,
    plan: TablePlan,
    target: TargetTable,
    around: &'a Surroundings<'a>,
    statements: Vec<Statement>,
}

impl Writer<'_> {
    fn write(&mut self, sql: String) {
        self.statements.push(Statement { sql, kind: Kind::Needed });
    }

    fn write_optional(&mut self, sql: String) {
        self.statements.push(Statement { sql, kind: Kind::Optional });
    }

    fn alter(&self, what: &str) -> String {
        format!("alter table {} {what}", self.target.name.quoted())
    }

    fn alter_column(&self, column: &str, what: &str) -> String {
        self.alter(&format!("alter column {} {what}", quote_ident(column)))
    }

    fn takes(&self, column: &str) -> bool {
        self.plan.columns.takes(column)
    }

    fn of_target(&mut self, column: &str) -> Option<&mut TargetColumn> {
        self.target.columns.iter_mut().find(|c| c.name == column)
    }

    /// Columns of the old shape that are in the new one too, as pairs.
    fn kept(&self) -> Vec<(SourceColumn, SourceColumn)> {
        let new = |old: &SourceColumn| self.plan.source.column(old.number).cloned();
        let pairs = self.old.columns.iter().filter(|c| self.takes(&c.name));
        pairs.filter_map(|old| Some((old.clone(), new(old)?))).collect()
    }

    fn columns_renamed(&self) -> bool {
        self.old.columns.iter().any(|o| self.plan.source.column(o.number).is_some_and(|n| n.name != o.name))
    }

    fn remove_rows(&mut self) {
        for condition in self.around.rows_gone {
            let (table, own) = (self.target.alone(), &self.target.bookkeeping);
            let sql = match &own.soft_delete {
                None => format!("delete from {table} where {condition}"),
                Some(mark) => {
                    let mark = quote_ident(mark);
                    let time = own.synced_at.as_ref().map(|name| format!(", {} = pg_catalog.now()", quote_ident(name)));
                    let time = time.unwrap_or_default();
                    format!("update {table} set {mark} = true{time} where ({condition}) and {mark} is not true")
                }
            };
            self.statements.push(Statement { sql, kind: Kind::Rows });
        }
    }

    /// What refuses rows that the source takes has to go first.
    fn remove_constraints(&mut self) {
        let renamed = self.columns_renamed();
        let table = self.target.name.clone();
        for old in self.old.constraints.clone() {
            let same = |n: &SourceConstraint| n.name == old.name && (renamed || n.definition == old.definition);
            if self.around.constraints && !self.plan.source.constraints.iter().any(same) {
                self.write(self.alter(&format!("drop constraint if exists {}", quote_ident(&old.name))));
            }
        }
        for old in self.old.indexes.clone() {
            let index = TableName::new(&table.schema, &old.name).quoted();
            let new = successor(&old, &self.old.indexes, &self.plan.source.indexes, renamed).cloned();
            let key_is_gone = old.identity && new.is_none();
            match new {
                Some(new) if new.name != old.name => {
                    self.write_optional(format!("alter index if exists {index} rename to {}", quote_ident(&new.name)));
                }
                Some(_) => {}
                None if old.constraint.is_some() => {
                    self.write(self.alter(&format!("drop constraint if exists {}", quote_ident(&old.name))));
                }
                None => self.write(format!("drop index if exists {index}")),
            }
            if let (true, RowIdentity::Key(key)) = (key_is_gone, self.old.identity.clone()) {
                self.target.unique_keys.retain(|unique| !super::same_set(unique, &key));
            }
        }
    }

    fn remove_columns(&mut self) {
        let gone = |c: &&SourceColumn| self.plan.source.column(c.number).is_none() && self.takes(&c.name);
        let mut gone: Vec<SourceColumn> = self.old.columns.iter().filter(gone).cloned().collect();
        // What is computed from others goes before them.
        gone.sort_by_key(|c| c.generated.is_none());
        for column in gone {
            self.target.columns.retain(|c| c.name != column.name);
            self.target.unique_keys.retain(|unique| !unique.contains(&column.name));
            self.write(self.alter(&format!("drop column if exists {}", quote_ident(&column.name))));
        }
    }

    fn rename_columns(&mut self) {
        let renamed: Vec<(String, String)> = self
            .kept()
            .into_iter()
            .filter(|(old, new)| old.name != new.name)
            .map(|(old, new)| (old.name, new.name))
            .collect();
        let mut later = Vec::new();
        for (n, (from, to)) in renamed.iter().enumerate() {
            // Somebody was faster, and the column is there under its new name.
            if self.of_target(from).is_none() && self.of_target(to).is_some() {
                continue;
            }
            // Names may pass from column to column.
            let occupied = renamed.iter().skip(n + 1).any(|(other, _)| other == to);
            let first = if occupied { format!("peergate_renamed_{n}") } else { to.clone() };
            self.write(self.alter(&format!("rename column {} to {}", quote_ident(from), quote_ident(&first))));
            if occupied {
                later.push((first, to.clone()));
            }
        }
        for (from, to) in later {
            self.write(self.alter(&format!("rename column {} to {}", quote_ident(&from), quote_ident(&to))));
        }
        let new_name = |name: &mut String| {
            if let Some((_, to)) = renamed.iter().find(|(from, _)| from == name) {
                *name = to.clone();
            }
        };
        self.target.columns.iter_mut().for_each(|c| new_name(&mut c.name));
        self.target.unique_keys.iter_mut().flatten().for_each(new_name);
        self.plan.columns.only.iter_mut().flatten().for_each(new_name);
        self.plan.columns.except.iter_mut().for_each(new_name);
        self.old.columns.iter_mut().for_each(|c| new_name(&mut c.name));
        if let RowIdentity::Key(key) = &mut self.old.identity {
            key.iter_mut().for_each(new_name);
        }
    }

    /// Types, and what is computed.
    fn change_columns(&mut self) -> Result<(), Problem> {
        for (old, new) in self.kept() {
            let name = &new.name;
            if old.generated.is_some() && new.generated.is_none() {
                self.write(self.alter_column(name, "drop expression if exists"));
                if let Some(column) = self.of_target(name) {
                    column.generated = false;
                }
            }
            let same_type =
                (old.type_oid, old.type_modifier, &old.collation) == (new.type_oid, new.type_modifier, &new.collation);
            if new.generated.is_some() {
                if !same_type || old.generated != new.generated {
                    self.write(self.alter(&format!("drop column if exists {}", quote_ident(name))));
                    self.target.columns.retain(|c| c.name != *name);
                    self.add_column(&new);
                }
                continue;
            }
            if same_type {
                continue;
            }
            let described = self.described(&new);
            // Somebody has altered the target alike, and seen to its rows.
            let was = self.described(&old).1;
            if was != described.1 && self.of_target(name).is_some_and(|c| c.type_sql == described.1) {
                continue;
            }
            if self.around.rewritten {
                return Err(self.not_sent(format!("column \"{name}\" has become {}", new.type_sql)));
            }
            // The source kept its rows as they were, so their values mean the same in both types, whatever the statement was.
            if old.default.is_some() {
                self.write(self.alter_column(name, "drop default"));
            }
            let collation = new.collation.as_ref().map(|c| format!(" collate {c}")).unwrap_or_default();
            let using = if self.around.replaced { format!(" using null::{}", new.type_sql) } else { String::new() };
            self.write(self.alter_column(name, &format!("type {}{collation}{using}", new.type_sql)));
            if let (true, Some(default)) = (old.default.is_some(), &new.default) {
                self.write_optional(self.alter_column(name, &format!("set default {default}")));
            }
            if let Some(column) = self.of_target(name) {
                (column.type_oid, column.type_sql, column.wire) = described;
            }
        }
        Ok(())
    }

    fn add_columns(&mut self) -> Result<(), Problem> {
        let is_new = |c: &&SourceColumn| self.old.column(c.number).is_none() && self.takes(&c.name);
        let mut new: Vec<SourceColumn> = self.plan.source.columns.iter().filter(is_new).cloned().collect();
        new.sort_by_key(|c| c.generated.is_some());
        for column in new {
            let computed = column.default.is_some() || column.identity.is_some() || !self.around.emptied;
            let is_there = self.of_target(&column.name).is_some();
            let unknown = computed && column.missing.is_none() && column.generated.is_none();
            if self.around.rewritten && unknown && !is_there {
                return Err(self.not_sent(format!("column \"{}\" was added", column.name)));
            }
            self.add_column(&column);
        }
        Ok(())
    }

    fn add_column(&mut self, column: &SourceColumn) {
        let name = quote_ident(&column.name);
        let value =
            column.missing.as_ref().map(|value| format!("{}::{}", quote_literal(value).trim(), column.type_sql));
        if self.of_target(&column.name).is_some() {
            // Somebody has added it already. The rows there are older than the column on the source, and have its first value there.
            if let Some(value) = value {
                let sql = format!("update {} set {name} = {value}", self.target.alone());
                self.statements.push(Statement { sql, kind: Kind::Rows });
            }
            return;
        }
        let collation = column.collation.as_ref().map(|c| format!(" collate {c}")).unwrap_or_default();
        let filled = match (&column.generated, &value) {
            (Some(expression), _) => format!(" generated always as ({expression}) stored"),
            (None, Some(value)) => format!(" default {value}"),
            (None, None) => String::new(),
        };
        self.write(self.alter(&format!("add column {name} {}{collation}{filled}", column.type_sql)));
        if value.is_some() && column.generated.is_none() {
            self.write(self.alter_column(&column.name, "drop default"));
        }
        let (type_oid, type_sql, wire) = self.described(column);
        self.target.columns.push(TargetColumn {
            name: column.name.clone(),
            type_oid,
            type_sql,
            generated: column.generated.is_some(),
            identity_always: false,
            required: false,
            // Not known here; then texts are compared.
            has_equality: false,
            wire,
        });
    }

    /// The type of a column of the target that is made like the source's: oid, name and binary form. Oids of other types than built-in
    /// ones are the target's own, and so is what composites and the like are made of there: it is not looked at here.
    fn described(&self, column: &SourceColumn) -> (u32, String, Option<String>) {
        let Some(info) = self.around.types.get(&column.type_oid) else { return (0, column.type_sql.clone(), None) };
        let oid = if info.builtin { info.oid } else { 0 };
        let is_sure = |wire: &String| info.builtin || matches!(wire.as_str(), "enum" | "array(enum)");
        (oid, info.sql.clone(), info.wire.clone().filter(is_sure))
    }

    /// NOT NULL, identity and defaults.
    fn set_properties(&mut self) {
        for new in self.plan.source.columns.clone() {
            if !self.takes(&new.name) || new.generated.is_some() {
                continue;
            }
            let old = self.old.column(new.number).cloned();
            let (name, old_identity) = (&new.name, old.as_ref().and_then(|o| o.identity));
            let was_not_null = old.as_ref().is_some_and(|o| o.not_null);
            if old_identity.is_some() && new.identity.is_none() {
                self.write(self.alter_column(name, "drop identity if exists"));
            }
            if was_not_null && !new.not_null {
                self.write(self.alter_column(name, "drop not null"));
            } else if !was_not_null && new.not_null {
                self.write_optional(self.alter_column(name, "set not null"));
            }
            let old_default = old.as_ref().and_then(|o| o.default.as_ref());
            match (&new.default, new.identity) {
                (Some(default), _) if old_default != Some(default) => {
                    self.write_optional(self.alter_column(name, &format!("set default {default}")));
                }
                (None, None) if old_default.is_some() => self.write(self.alter_column(name, "drop default")),
                _ => {}
            }
            let always = new.identity == Some('a');
            let kind = if always { "always" } else { "by default" };
            match (old_identity, new.identity) {
                (Some(old), Some(new)) if old != new => {
                    self.write(self.alter_column(name, &format!("set generated {kind}")))
                }
                (None, Some(_)) => {
                    if old_default.is_some() {
                        self.write(self.alter_column(name, "drop default"));
                    }
                    self.write(self.alter_column(name, &format!("add generated {kind} as identity")));
                }
                _ => {}
            }
            if old_identity != new.identity
                && let Some(column) = self.of_target(&new.name)
            {
                column.identity_always = always;
            }
        }
    }

    fn add_indexes(&mut self) {
        let renamed = self.columns_renamed();
        let mut new = self.plan.source.indexes.clone();
        let (olds, news) = (&self.old.indexes, &self.plan.source.indexes);
        let kept = olds.iter().filter_map(|old| successor(old, olds, news, renamed));
        let kept: Vec<&str> = kept.map(|index| index.name.as_str()).collect();
        new.retain(|index| !kept.contains(&index.name.as_str()));
        for index in &new {
            let key = self.plan.key().filter(|_| index.identity).map(<[String]>::to_vec);
            match key {
                Some(key) if !self.target.has_key(&key) => {
                    self.write(ddl::create_index(
                        &self.target.name,
                        index,
                        self.target.bookkeeping.soft_delete.is_some(),
                    ));
                    self.target.unique_keys.push(key);
                }
                Some(_) => {}
                None if self.around.indexes => {
                    self.write_optional(ddl::create_index(
                        &self.target.name,
                        index,
                        self.target.bookkeeping.soft_delete.is_some(),
                    ));
                    // Which columns it is on is not looked at: rows may collide on their way to where they do not.
                    self.target.odd_unique |= index.unique || index.constraint.is_some();
                }
                None => {}
            }
        }
    }

    fn add_constraints(&mut self) {
        if !self.around.constraints {
            return;
        }
        for constraint in self.plan.source.constraints.clone() {
            if !self.old.constraints.iter().any(|o| o.name == constraint.name)
                && let Some(sql) = ddl::add_constraint(&self.target.name, &constraint, self.around.target_of)
            {
                self.write_optional(sql);
            }
        }
    }

    fn rename_table(&mut self) {
        let (statements, name) = rename(&self.target.name, &self.old.name, &self.plan.source.name);
        statements.into_iter().for_each(|sql| self.write(sql));
        self.target.name = name;
    }

    fn not_sent(&self, why: String) -> Problem {
        let name = &self.plan.source.name;
        let message = format!("{why} in table \"{name}\", and all its rows were written anew");
        Problem::new(SqlState::WRONG_STATE, message)
            .detail("Such a change computes values on the source that it does not send.")
            .hint("Alter the target alike, so that its rows have these values, then RESUME MIRROR; or RESYNC MIRROR … TABLE.")
    }
}

#[cfg(test)]
mod tests;
