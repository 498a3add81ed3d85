//! The statements that write one row. Pure text, and the values that go with it.
//!
//! Rows are found by their key; without one, by all that the source says of them. Equality as indexes know it helps to find such a row;
//! whether it is the one decides its text, since equality may call different rows equal (`1.0` and `1.00`) and some types have none. Of
//! several rows that are the same, one is taken.

use pg::name::quote_ident;
use pg::pgoutput::{Tuple, Value};

use super::stage::set_to_itself;
use crate::batch::Change;
use crate::relation::{MappedColumn, TableMap};

/// A statement for one row, and its parameters.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RowStatement<'a> {
    /// The statement.
    pub sql: String,
    /// Its parameters, in the form that they came in.
    pub values: Vec<Option<&'a [u8]>>,
    /// It need not find a row.
    pub optional: bool,
}

/// Works out the statements that do a change, one after the other. Where deleted rows stay, one whose key comes again makes room first.
pub fn statements<'a>(table: &TableMap, change: &'a Change) -> impl Iterator<Item = RowStatement<'a>> {
    let comes = match change {
        Change::Insert(new) => Some(new),
        Change::Update { old: Some(old), new } if table.key_of(old) != table.key_of(new) => Some(new),
        _ => None,
    };
    let room = comes.filter(|_| table.has_key()).and_then(|new| clear(table, new));
    room.into_iter().chain(statement(table, change))
}

/// Works out the statement that takes a deleted row away that stayed under the key of `row`; `None` if they do not stay.
fn clear<'a>(table: &TableMap, row: &'a Tuple) -> Option<RowStatement<'a>> {
    let deleted = table.is_deleted("t")?;
    let mut statement = RowStatement { optional: true, ..RowStatement::default() };
    let (_, found) = statement.found(table, row);
    statement.sql = format!("delete from {} t where {found} and {deleted}", table.alone);
    Some(statement)
}

/// Works out the statement that does a change; `None` if it changes nothing.
pub fn statement<'a>(table: &TableMap, change: &'a Change) -> Option<RowStatement<'a>> {
    let mut statement = RowStatement::default();
    statement.sql = match change {
        Change::Insert(new) => statement.insert(table, new),
        Change::Update { old, new } => statement.update(table, old.as_ref(), new)?,
        Change::Delete(old) if table.deletes_softly() => {
            let (from, found) = statement.found(table, old);
            let from = if from.is_empty() { String::new() } else { format!(" from {from}") };
            format!("update {} t set {}{from} where {found}", table.alone, table.bury())
        }
        Change::Delete(old) | Change::Remove(old) => {
            statement.optional = matches!(change, Change::Remove(_));
            let (from, found) = statement.found(table, old);
            let using = if from.is_empty() { String::new() } else { format!(" using {from}") };
            format!("delete from {} t{using} where {found}", table.alone)
        }
    };
    Some(statement)
}

/// Works out the query that prints what a row is found by.
pub fn describe<'a>(table: &TableMap, row: &'a Tuple) -> RowStatement<'a> {
    let mut statement = RowStatement::default();
    let values = all_values(row);
    let all = !table.has_key();
    let (mut names, mut printed) = (Vec::new(), Vec::new());
    for column in table.columns.iter().filter(|c| all || c.key) {
        names.push(column.target.as_str());
        let value = sent(&values, column).map(|bytes| statement.value(column, bytes));
        let text = value.map_or("'null'".to_owned(), |v| format!("pg_catalog.left(pg_catalog.concat({v}), 100)"));
        printed.push(text);
    }
    // A function takes at most a hundred values, and nobody reads more.
    printed.truncate(90);
    let printed = if printed.is_empty() { "''".to_owned() } else { printed.join(", ") };
    let name = pg::name::quote_literal(&names.join(", "));
    statement.sql =
        format!("select pg_catalog.left('(' || {name} || ')=(' || pg_catalog.concat_ws(', ', {printed}), 300) || ')'");
    statement
}

/// The values of a tuple, by position.
fn all_values(tuple: &Tuple) -> Vec<Value<'_>> {
    tuple.values().collect()
}

fn sent<'a>(values: &[Value<'a>], column: &MappedColumn) -> Option<&'a [u8]> {
    match values.get(column.position) {
        Some(Value::Text(bytes) | Value::Binary(bytes)) => Some(bytes),
        _ => None,
    }
}

impl<'a> RowStatement<'a> {
    /// Adds a parameter, and returns it as the target's column wants it.
    fn value(&mut self, column: &MappedColumn, value: &'a [u8]) -> String {
        self.values.push(Some(value));
        column.value(&format!("${}::{}", self.values.len(), column.staged_type))
    }

    fn value_or_null(&mut self, column: &MappedColumn, values: &[Value<'a>]) -> String {
        self.values.push(sent(values, column));
        column.value(&format!("${}::{}", self.values.len(), column.staged_type))
    }

    fn insert(&mut self, table: &TableMap, new: &'a Tuple) -> String {
        let values = all_values(new);
        let (names, given): (Vec<_>, Vec<_>) = table
            .columns
            .iter()
            .map(|c| (c.quoted(), self.value_or_null(c, &values)))
            .chain(table.bookkept("false"))
            .unzip();
        if names.is_empty() {
            return format!("insert into {} default values", table.target.quoted());
        }
        let (into, names, given) = (table.target.quoted(), names.join(", "), given.join(", "));
        format!("insert into {into} ({names}) overriding system value values ({given})")
    }

    /// What a row `t` is found by: what to join it with, if anything, and the condition.
    fn found(&mut self, table: &TableMap, row: &'a Tuple) -> (String, String) {
        let values = all_values(row);
        let keys: Vec<String> = (table.columns.iter().filter(|c| c.key))
            .map(|c| format!("t.{} = {}", c.quoted(), self.value_or_null(c, &values)))
            .collect();
        if !keys.is_empty() {
            return (String::new(), keys.join(" and "));
        }
        // One that was deleted is not to be found again.
        let mut same = vec![table.is_deleted("r").map_or("true".to_owned(), |deleted| format!("not ({deleted})"))];
        for column in &table.columns {
            let name = column.quoted();
            match sent(&values, column) {
                None => same.push(format!("r.{name} is null")),
                Some(bytes) => {
                    let value = self.value(column, bytes);
                    if column.has_equality {
                        same.push(format!("r.{name} = {value}"));
                    }
                    // Not a cast to text: some types cut something off there.
                    same.push(format!("pg_catalog.concat(r.{name}) = pg_catalog.concat({value})"));
                }
            }
        }
        let same = same.join(" and ");
        let one = format!("(select r.tableoid as part, r.ctid as place from {} r where {same} limit 1) f", table.alone);
        (one, "t.tableoid = f.part and t.ctid = f.place".to_owned())
    }

    fn update(&mut self, table: &TableMap, old: Option<&'a Tuple>, new: &'a Tuple) -> Option<String> {
        let values = all_values(new);
        let before = old.filter(|_| table.whole_old_rows).map(all_values).unwrap_or_default();
        let old_keys = old.map(all_values).unwrap_or_default();
        let stays = |column: &MappedColumn| {
            let value = values.get(column.position);
            let known = if column.key { &old_keys } else { &before };
            value == Some(&Value::Unchanged) || known.get(column.position).map_or(column.key, |v| Some(v) == value)
        };
        let (changed, kept): (Vec<&MappedColumn>, Vec<&MappedColumn>) = table.columns.iter().partition(|c| !stays(c));
        let replaces = changed.iter().any(|c| c.identity_always);
        // No UPDATE may set such a column: the row is taken out and put back.
        if replaces {
            let (from, found) = self.found(table, old.unwrap_or(new));
            let using = if from.is_empty() { String::new() } else { format!(" using {from}") };
            let taken = format!("delete from {} t{using} where {found} returning t.*", table.alone);
            let set = changed.iter().map(|c| (c.quoted(), self.value_or_null(c, &values))).collect::<Vec<_>>();
            let kept = kept.iter().map(|c| c.quoted()).chain(table.extras.iter().map(|(name, _)| quote_ident(name)));
            let kept = kept.map(|name| (name.clone(), format!("taken.{name}")));
            let (names, given): (Vec<_>, Vec<_>) = set.into_iter().chain(kept).chain(table.bookkept("false")).unzip();
            let (into, names, given) = (table.target.quoted(), names.join(", "), given.join(", "));
            return Some(format!(
                "with taken as ({taken}) insert into {into} ({names}) overriding system value select {given} from taken"
            ));
        }
        let set = changed.iter().map(|c| format!("{} = {}", c.quoted(), self.value_or_null(c, &values)));
        let set: Vec<String> = set.chain(table.touch()).collect();
        let set = if set.is_empty() { set_to_itself(table)? } else { set.join(", ") };
        let (from, found) = self.found(table, old.unwrap_or(new));
        let from = if from.is_empty() { String::new() } else { format!(" from {from}") };
        Some(format!("update {} t set {set}{from} where {found}", table.alone))
    }
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, BytesMut};
    use pg::TableName;

    use super::*;
    use crate::schema::Passage;
    use catalog::mirror::Bookkeeping;

    fn column(position: usize, name: &str, key: bool) -> MappedColumn {
        MappedColumn {
            position,
            target: name.into(),
            target_type: "json".into(),
            staged_type: "text".into(),
            passage: Passage::FromText,
            key,
            identity_always: false,
            has_equality: false,
        }
    }

    fn table(key: bool) -> TableMap {
        TableMap {
            oid: 1,
            source: TableName::new("public", "t"),
            target: TableName::new("public", "t"),
            alone: "only t".into(),
            columns: vec![column(0, "id", key), column(1, "v", false)],
            extras: vec![("note".into(), "text".into())],
            whole_old_rows: !key,
            direct: false,
            other_unique: false,
            replace: false,
            cascades: false,
            bookkeeping: Bookkeeping::default(),
        }
    }

    fn tuple(values: &[&[u8]]) -> Tuple {
        let mut bytes = BytesMut::new();
        bytes.put_u16(values.len() as u16);
        values.iter().for_each(|v| bytes.put_slice(v));
        Tuple::split_from(&mut bytes.freeze()).unwrap()
    }

    const ONE: &[u8] = b"t\0\0\0\x011";
    const TWO: &[u8] = b"t\0\0\0\x012";

    #[test]
    fn without_a_key_one_row_that_is_the_same_is_taken() {
        let change = Change::Delete(tuple(&[ONE, b"n"]));
        let statement = statement(&table(false), &change).unwrap();
        assert_eq!(
            statement.sql,
            "delete from only t t using (select r.tableoid as part, r.ctid as place from only t r where true \
             and pg_catalog.concat(r.\"id\") = pg_catalog.concat($1::text::json) and r.\"v\" is null limit 1) f \
             where t.tableoid = f.part and t.ctid = f.place"
        );
        assert_eq!(statement.values, [Some(&b"1"[..])]);
    }

    #[test]
    fn an_update_sets_what_came_and_finds_the_row_by_its_old_key() {
        let change = Change::Update { old: None, new: tuple(&[ONE, TWO]) };
        let sql = statement(&table(true), &change).unwrap().sql;
        assert_eq!(sql, "update only t t set \"v\" = $1::text::json where t.\"id\" = $2::text::json");
        let change = Change::Update { old: Some(tuple(&[ONE, b"n"])), new: tuple(&[TWO, b"u"]) };
        let statement = statement(&table(true), &change).unwrap();
        assert_eq!(statement.sql, "update only t t set \"id\" = $1::text::json where t.\"id\" = $2::text::json");
        assert_eq!(statement.values, [Some(&b"2"[..]), Some(&b"1"[..])]);
    }

    #[test]
    fn an_identity_that_no_update_may_set_is_replaced_with_all_that_the_row_has() {
        let mut table = table(true);
        table.columns[0].identity_always = true;
        let change = Change::Update { old: Some(tuple(&[ONE, b"n"])), new: tuple(&[TWO, b"u"]) };
        let sql = statement(&table, &change).unwrap().sql;
        assert!(sql.starts_with("with taken as (delete from only t t where t.\"id\" = $1::text::json returning t.*)"));
        assert!(sql.ends_with("overriding system value select $2::text::json, taken.\"v\", taken.\"note\" from taken"));
        let change = Change::Update { old: None, new: tuple(&[ONE, TWO]) };
        assert!(statement(&table, &change).unwrap().sql.starts_with("update only t t set \"v\""));
    }
}
