//! The statements that move a table's staged rows into the table. Pure text.
//!
//! A staging table has a column `g`, the group of a row, and one column `c0 … cn` for each column of the table that is written.
//! For rows that move to another key `k0 …` hold the old one, by the same numbers; `e0 …` hold what only the target has of a row that is
//! replaced. Groups: [`DELETE`] rows that go, [`INSERT`] rows that come, from [`FIRST_UPDATE`] up rows that change and from
//! [`FIRST_MOVE`] down rows that move, one group for each set of values that were not sent. Where deleted rows stay: [`BURY`] rows that
//! are marked, [`CLEAR`] keys whose marked rows go; and a column `d` says of rows that are written whether they are marked.

use pg::name::quote_ident;

use crate::relation::{MappedColumn, TableMap};

/// Group of rows that go.
pub const DELETE: i16 = 0;
/// Group of rows that come.
pub const INSERT: i16 = -1;
/// Group of keys under which only deleted rows that stayed can be, and which go.
pub const CLEAR: i16 = -2;
/// Group of rows that stay and are marked as deleted.
pub const BURY: i16 = -3;
/// First group of rows that move to another key; the others are below.
pub const FIRST_MOVE: i16 = -4;
/// First group of rows that change; the others are above.
pub const FIRST_UPDATE: i16 = 1;

/// Makes a staging table.
pub fn create(stage: &str, table: &TableMap) -> String {
    let columns: String = table.columns.iter().enumerate().map(|(n, c)| format!(", c{n} {}", c.staged_type)).collect();
    let old_keys: String = keys(table).map(|(n, c)| format!(", k{n} {}", c.staged_type)).collect();
    let extras: String = table.extras.iter().enumerate().map(|(n, (_, t))| format!(", e{n} {t}")).collect();
    let mark = if table.deletes_softly() { ", d bool" } else { "" };
    format!("create temporary table {stage} (g int2 not null{mark}{columns}{old_keys}{extras}) on commit delete rows")
}

/// Fills a staging table from the client.
pub fn copy_in(stage: &str, table: &TableMap) -> String {
    format!("copy {stage} (g{}) from stdin (format binary)", staged_names(table))
}

/// Fills a staging table with rows that move, each with its old key after its values.
pub fn copy_moves(stage: &str, table: &TableMap) -> String {
    let old_keys: String = keys(table).map(|(n, _)| format!(", k{n}")).collect();
    format!("copy {stage} (g{}{old_keys}) from stdin (format binary)", staged_names(table))
}

fn staged_names(table: &TableMap) -> String {
    let mark = table.deletes_softly().then(|| ", d".to_owned());
    mark.into_iter().chain((0..table.columns.len()).map(|n| format!(", c{n}"))).collect()
}

/// Fills the table itself from the client.
pub fn copy_direct(table: &TableMap) -> String {
    format!("copy {} ({}) from stdin (format binary)", table.target.quoted(), names(&table.columns))
}

/// Deletes the rows of one group. `$1` is the first group, `$2` the last.
pub fn delete(stage: &str, table: &TableMap) -> String {
    format!("delete from {} t using {stage} s where s.g between $1 and $2 and {}", table.alone, same_key(table, "c"))
}

/// Takes away deleted rows that stayed, where rows come or move to, and those of the group [`CLEAR`].
pub fn clear(stage: &str, table: &TableMap) -> Option<String> {
    // Without a key nothing is in the way.
    let deleted = table.is_deleted("t").filter(|_| table.has_key())?;
    let (matched, alone) = (same_key(table, "c"), &table.alone);
    Some(format!(
        "delete from {alone} t using {stage} s where (s.g in ({INSERT}, {CLEAR}) or s.g <= {FIRST_MOVE}) and {matched} and {deleted}"
    ))
}

/// Marks the rows of the group [`BURY`] as deleted.
pub fn bury(stage: &str, table: &TableMap) -> String {
    let (set, matched) = (table.bury(), same_key(table, "c"));
    format!("update {} t set {set} from {stage} s where s.g = {BURY} and {matched}", table.alone)
}

/// Changes the rows of the group `$1`; columns of `unchanged` (by tuple position) keep their values.
pub fn update(stage: &str, table: &TableMap, unchanged: &[bool]) -> String {
    let matched = same_key(table, "c");
    match assignments(table, unchanged) {
        Some(set) => format!("update {} t set {set} from {stage} s where s.g = $1 and {matched}", table.alone),
        // There is nothing but what no UPDATE may set: the rows only have to be there.
        None => format!("select from {} t, {stage} s where s.g = $1 and {matched}", table.alone),
    }
}

/// Adds the rows of the group [`INSERT`].
pub fn insert(stage: &str, table: &TableMap) -> String {
    insert_where(stage, table, &[], &format!("s.g = {INSERT}"))
}

/// Adds the rows of the groups from `$1` to `$2`, which were on the target before: with what only the target has of them.
pub fn put_back(stage: &str, table: &TableMap) -> String {
    insert_where(stage, table, &table.extras, "s.g between $1 and $2")
}

fn insert_where(stage: &str, table: &TableMap, extras: &[(String, String)], condition: &str) -> String {
    let own = table.columns.iter().enumerate().map(|(n, c)| (c.quoted(), c.value(&format!("s.c{n}"))));
    let kept = extras.iter().enumerate().map(|(n, (name, _))| (quote_ident(name), format!("s.e{n}")));
    let (columns, values): (Vec<String>, Vec<String>) = own.chain(kept).chain(table.bookkept("s.d")).unzip();
    let (into, columns, values) = (table.target.quoted(), columns.join(", "), values.join(", "));
    if columns.is_empty() {
        return format!("insert into {into} select from {stage} s where {condition}");
    }
    format!("insert into {into} ({columns}) overriding system value select {values} from {stage} s where {condition}")
}

/// Completes the staged rows of the group `$1` with the values that were not sent, and those that only the target has, from the row
/// with their key; `None` if there are none.
pub fn complete(stage: &str, table: &TableMap, unchanged: &[bool]) -> Option<String> {
    complete_by(stage, table, unchanged, "c")
}

/// As [`complete`], from the row with their old key.
pub fn complete_moves(stage: &str, table: &TableMap, unchanged: &[bool]) -> Option<String> {
    complete_by(stage, table, unchanged, "k")
}

fn complete_by(stage: &str, table: &TableMap, unchanged: &[bool], key: &str) -> Option<String> {
    let columns = table.columns.iter().enumerate();
    let missing = columns.filter(|(_, c)| unchanged.get(c.position).copied().unwrap_or(false));
    let values = missing.map(|(n, c)| format!("c{n} = {}", c.staged(&format!("t.{}", c.quoted()))));
    let extras = table.extras.iter().enumerate().map(|(n, (name, _))| format!("e{n} = t.{}", quote_ident(name)));
    let set: Vec<String> = values.chain(extras).collect();
    let matched = same_key(table, key);
    (!set.is_empty())
        .then(|| format!("update {stage} s set {} from {} t where s.g = $1 and {matched}", set.join(", "), table.alone))
}

fn names(columns: &[MappedColumn]) -> String {
    columns.iter().map(MappedColumn::quoted).collect::<Vec<_>>().join(", ")
}

fn keys(table: &TableMap) -> impl Iterator<Item = (usize, &MappedColumn)> {
    table.columns.iter().enumerate().filter(|(_, c)| c.key)
}

/// Whether a row `t` has the key of a staged row `s`: the one in its columns `c…`, or the old one in `k…`.
fn same_key(table: &TableMap, staged: &str) -> String {
    keys(table)
        .map(|(n, c)| format!("t.{} = {}", c.quoted(), c.value(&format!("s.{staged}{n}"))))
        .collect::<Vec<_>>()
        .join(" and ")
}

/// What an UPDATE sets. It must set something: a row that keeps everything has a column set to itself, if there is one that may be.
fn assignments(table: &TableMap, unchanged: &[bool]) -> Option<String> {
    let columns = table.columns.iter().enumerate().filter(|(_, c)| !c.key && !c.identity_always);
    let set: Vec<String> = columns
        .filter(|(_, c)| !unchanged.get(c.position).copied().unwrap_or(false))
        .map(|(n, c)| format!("{} = {}", c.quoted(), c.value(&format!("s.c{n}"))))
        .chain(table.bookkept("s.d").map(|(name, value)| format!("{name} = {value}")))
        .collect();
    if set.is_empty() { set_to_itself(table) } else { Some(set.join(", ")) }
}

/// An assignment that changes nothing; `None` if no column may be set.
pub fn set_to_itself(table: &TableMap) -> Option<String> {
    let column = table.columns.iter().find(|c| !c.identity_always)?.quoted();
    Some(format!("{column} = t.{column}"))
}

#[cfg(test)]
mod tests {
    use pg::TableName;

    use super::*;
    use crate::schema::Passage;
    use catalog::mirror::Bookkeeping;

    fn column(position: usize, name: &str, key: bool) -> MappedColumn {
        MappedColumn {
            position,
            target: name.into(),
            target_type: "integer".into(),
            staged_type: "pg_catalog.text".into(),
            passage: Passage::FromText,
            key,
            identity_always: false,
            has_equality: true,
        }
    }

    fn table() -> TableMap {
        TableMap {
            oid: 1,
            source: TableName::new("public", "t"),
            target: TableName::new("Odd", "t"),
            alone: "only \"Odd\".\"t\"".into(),
            columns: vec![column(0, "id", true), column(2, "a\"b", false)],
            extras: Vec::new(),
            whole_old_rows: false,
            direct: false,
            other_unique: false,
            replace: false,
            cascades: false,
            bookkeeping: Bookkeeping::default(),
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
        assert!(complete.contains("pg_catalog.concat(t.\"a\"\"b\")::pg_catalog.text end from"), "{complete}");
        assert_eq!(super::complete("s1", &table(), &[false; 3]), None);
    }

    #[test]
    fn what_only_the_target_has_goes_with_the_row() {
        let with_extra = TableMap { extras: vec![("Note".into(), "text".into())], ..table() };
        assert!(create("s1", &with_extra).contains("c1 pg_catalog.text, k0 pg_catalog.text, e0 text)"));
        let moves = complete_moves("s1", &with_extra, &[]).unwrap();
        assert!(moves.contains("set e0 = t.\"Note\" from") && moves.contains("t.\"id\" = s.k0::integer"), "{moves}");
        assert!(put_back("s1", &with_extra).contains("(\"id\", \"a\"\"b\", \"Note\") overriding"));
        assert!(!insert("s1", &with_extra).contains("Note"));
    }

    #[test]
    fn deleted_rows_stay_and_make_room() {
        let bookkeeping = Bookkeeping { soft_delete: Some("Gone".into()), synced_at: Some("at".into()) };
        let table = TableMap { bookkeeping, ..table() };
        assert!(create("s1", &table).contains("(g int2 not null, d bool, c0 pg_catalog.text"));
        assert!(copy_in("s1", &table).starts_with("copy s1 (g, d, c0, c1)"));
        assert!(insert("s1", &table).contains("\"a\"\"b\", \"Gone\", \"at\") overriding"));
        assert!(
            update("s1", &table, &[])
                .contains("\"a\"\"b\" = s.c1::integer, \"Gone\" = s.d, \"at\" = pg_catalog.now() from")
        );
        assert!(
            bury("s1", &table).contains("set \"Gone\" = true, \"at\" = pg_catalog.now() from s1 s where s.g = -3 and")
        );
        let cleared = clear("s1", &table).unwrap();
        assert!(cleared.ends_with("t.\"id\" = s.c0::integer and t.\"Gone\" is true"), "{cleared}");
        assert_eq!(clear("s1", &TableMap { bookkeeping: Bookkeeping::default(), ..table }), None);
    }

    #[test]
    fn a_row_of_nothing_but_an_identity_only_has_to_be_there() {
        let mut alone = table();
        alone.columns.truncate(1);
        alone.columns[0].identity_always = true;
        assert!(update("s1", &alone, &[]).starts_with("select from only"));
    }
}
