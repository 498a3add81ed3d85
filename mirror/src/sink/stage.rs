//! The statements that move a table's staged rows into the table. Pure text.
//!
//! A staging table has a column `g`, the group of a row, and one column `c0 … cn` for each column of the table that is written.
//! Groups: [`DELETE`] rows that go, [`INSERT`] rows that come, [`OLD_KEY`] the key that a row had, from 1 on rows that change, one
//! group for each set of values that were not sent.

use crate::relation::{MappedColumn, TableMap};

/// Group of rows that go.
pub const DELETE: i16 = 0;
/// Group of rows that come.
pub const INSERT: i16 = -1;
/// Group of the old key of a row that changes its key.
pub const OLD_KEY: i16 = -2;
/// First group of rows that change.
pub const FIRST_UPDATE: i16 = 1;

/// Makes a staging table.
pub fn create(stage: &str, table: &TableMap) -> String {
    let columns: String = table.columns.iter().enumerate().map(|(n, c)| format!(", c{n} {}", c.staged_type)).collect();
    format!("create temporary table {stage} (g int2 not null{columns}) on commit delete rows")
}

/// Fills a staging table from the client.
pub fn copy_in(stage: &str) -> String {
    format!("copy {stage} from stdin (format binary)")
}

/// Fills the table itself from the client.
pub fn copy_direct(table: &TableMap) -> String {
    format!("copy {} ({}) from stdin (format binary)", table.target.quoted(), names(&table.columns))
}

/// Deletes the rows of one group. `$1` is the first group, `$2` the last.
pub fn delete(stage: &str, table: &TableMap) -> String {
    format!("delete from {} t using {stage} s where s.g between $1 and $2 and {}", table.alone, same_key(table, "s"))
}

/// Changes the rows of the group `$1`; columns of `unchanged` (by tuple position) keep their values.
pub fn update(stage: &str, table: &TableMap, unchanged: &[bool]) -> String {
    let set = assignments(table, unchanged);
    format!("update {} t set {set} from {stage} s where s.g = $1 and {}", table.alone, same_key(table, "s"))
}

/// Completes the one staged row of the group [`FIRST_UPDATE`] with the values that were not sent, from the row that has the key of the
/// group [`OLD_KEY`].
pub fn complete_by_old_key(stage: &str, table: &TableMap, unchanged: &[bool]) -> String {
    format!(
        "update {stage} s set {} from {} t, {stage} o where s.g = {FIRST_UPDATE} and o.g = {OLD_KEY} and {}",
        completions(table, unchanged).join(", "),
        table.alone,
        same_key(table, "o"),
    )
}

/// Adds the rows of the groups other than [`DELETE`] whose group is at most `$1`.
pub fn insert(stage: &str, table: &TableMap) -> String {
    insert_where(stage, table, &format!("s.g <> {DELETE} and s.g <= $1"))
}

/// Adds the rows of the group `$1`.
pub fn insert_group(stage: &str, table: &TableMap) -> String {
    insert_where(stage, table, "s.g = $1")
}

fn insert_where(stage: &str, table: &TableMap, condition: &str) -> String {
    let values: Vec<String> = table.columns.iter().enumerate().map(|(n, c)| c.value(&format!("s.c{n}"))).collect();
    format!(
        "insert into {} ({}) overriding system value select {} from {stage} s where {condition}",
        table.target.quoted(),
        names(&table.columns),
        values.join(", "),
    )
}

/// Completes the staged rows of the group `$1` with the values that were not sent, from the table; `None` if all were sent.
pub fn complete(stage: &str, table: &TableMap, unchanged: &[bool]) -> Option<String> {
    let set = completions(table, unchanged);
    let matched = same_key(table, "s");
    (!set.is_empty())
        .then(|| format!("update {stage} s set {} from {} t where s.g = $1 and {matched}", set.join(", "), table.alone))
}

fn completions(table: &TableMap, unchanged: &[bool]) -> Vec<String> {
    table
        .columns
        .iter()
        .enumerate()
        .filter(|(_, c)| unchanged.get(c.position).copied().unwrap_or(false))
        .map(|(n, c)| format!("c{n} = t.{}::{}", c.quoted(), c.staged_type))
        .collect()
}

fn names(columns: &[MappedColumn]) -> String {
    columns.iter().map(MappedColumn::quoted).collect::<Vec<_>>().join(", ")
}

fn same_key(table: &TableMap, staged: &str) -> String {
    let keys = table.columns.iter().enumerate().filter(|(_, c)| c.key);
    keys.map(|(n, c)| format!("t.{} = {}", c.quoted(), c.value(&format!("{staged}.c{n}"))))
        .collect::<Vec<_>>()
        .join(" and ")
}

/// What an UPDATE sets. It must set something: a row that has nothing but its key is set to itself.
fn assignments(table: &TableMap, unchanged: &[bool]) -> String {
    let set: Vec<String> = table
        .columns
        .iter()
        .enumerate()
        .filter(|(_, c)| !c.key && !c.identity_always && !unchanged.get(c.position).copied().unwrap_or(false))
        .map(|(n, c)| format!("{} = {}", c.quoted(), c.value(&format!("s.c{n}"))))
        .collect();
    if set.is_empty() {
        let key = table.columns.iter().find(|c| c.key).map(MappedColumn::quoted).unwrap_or_default();
        return format!("{key} = t.{key}");
    }
    set.join(", ")
}

#[cfg(test)]
mod tests {
    use pg::TableName;

    use super::*;

    fn column(position: usize, name: &str, key: bool) -> MappedColumn {
        MappedColumn {
            position,
            target: name.into(),
            target_type: "integer".into(),
            staged_type: "pg_catalog.text".into(),
            cast: true,
            key,
            identity_always: false,
        }
    }

    fn table() -> TableMap {
        TableMap {
            oid: 1,
            source: TableName::new("public", "t"),
            target: TableName::new("Odd", "t"),
            alone: "only \"Odd\".\"t\"".into(),
            columns: vec![column(0, "id", true), column(2, "a\"b", false)],
            whole_old_rows: false,
            direct: false,
            other_unique: false,
            replace: false,
        }
    }

    #[test]
    fn statements_join_on_the_key_and_cast_staged_text() {
        assert_eq!(
            update("s1", &table(), &[false; 3]),
            "update only \"Odd\".\"t\" t set \"a\"\"b\" = s.c1::integer from s1 s where s.g = $1 and t.\"id\" = s.c0::integer"
        );
        assert_eq!(
            delete("s1", &table()),
            "delete from only \"Odd\".\"t\" t using s1 s where s.g between $1 and $2 and t.\"id\" = s.c0::integer"
        );
    }

    #[test]
    fn unchanged_values_are_left_alone_or_completed() {
        let unchanged = [false, false, true];
        assert!(update("s1", &table(), &unchanged).contains("set \"id\" = t.\"id\" from"));
        let complete = complete("s1", &table(), &unchanged).unwrap();
        assert!(complete.starts_with("update s1 s set c1 = t.\"a\"\"b\"::pg_catalog.text from"), "{complete}");
        assert_eq!(super::complete("s1", &table(), &[false; 3]), None);
    }
}
