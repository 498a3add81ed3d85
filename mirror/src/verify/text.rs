//! The queries by which both sides of a table are compared. Pure text.
//!
//! A row is its values' text, as the types' output functions write it in sessions with the same settings, and is compared by a hash of
//! that. Where a column has another type on the target than on the source, the source's value is read as the target's type first, as it
//! was when it came there.

use pg::TableName;
use pg::name::quote_ident;

use crate::schema::{FIRST_USER_OID, TablePlan};

/// The type `"char"`, whose text is another from 16 on.
const CHAR_OID: u32 = 18;

/// A column's type on the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetType {
    /// The column.
    pub name: String,
    /// Its type with modifiers, as SQL.
    pub sql: String,
    /// Its type's oid there.
    pub oid: u32,
}

/// How rows are hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hash {
    /// By the servers' own fast function, which gives the same on both.
    Fast,
    /// By MD5 of the text in UTF-8: whatever their encodings and machines are.
    Portable,
}

/// Asks a server for its encoding, and for what its fast function makes of a text.
pub const PROBE: &str = "
    select pg_catalog.current_setting('server_encoding'),
           pg_catalog.hashtextextended('peergate: the same text on both sides' collate pg_catalog.\"C\", 0)";

/// One side of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// The table, as SQL that means it alone.
    from: String,
    /// Which of its rows are compared, as a clause; empty: all.
    filter: String,
    /// The hash of a row `t`, as SQL of type int8.
    hash: String,
    /// What a row `t` is told apart by, as SQL of type text[]: its key, or without one the beginning of its text.
    key: String,
    /// The values of a row `t`, as SQL of type text[].
    values: String,
    /// The key's columns of a row `t`, and their types.
    keys: Vec<(String, String)>,
}

/// Both sides of a table, as they are compared.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The source's.
    pub source: Side,
    /// The target's.
    pub target: Side,
    /// The columns by which rows are told apart; empty: the rows have no key.
    pub key: Vec<String>,
    /// Number of buckets, a power of two.
    pub buckets: usize,
}

/// What is kept of a row's text where it has no key, in characters.
const ROW_TEXT_MAX: u32 = 300;

impl Comparison {
    /// Works out how a table is compared. `soft_delete` is the target's column that says of a row that it was deleted on the source.
    pub fn new(
        plan: &TablePlan,
        target_alone: &str,
        soft_delete: Option<&str>,
        types: &[TargetType],
        hash: Hash,
        buckets: usize,
    ) -> Comparison {
        let mut values = Vec::new();
        for column in plan.replicated_columns() {
            let name = format!("t.{}", quote_ident(&column.name));
            let of_target = types.iter().find(|t| t.name == column.name);
            values.push((
                column.name.clone(),
                match of_target {
                    Some(t) if t.oid == CHAR_OID && column.type_oid == CHAR_OID => {
                        [format!("{name}::pg_catalog.int4"), format!("{name}::pg_catalog.int4")]
                    }
                    Some(t) if t.sql != column.type_sql && t.oid < FIRST_USER_OID => {
                        // Not a cast to text, which cuts something off some types.
                        let read =
                            format!("case when {name} is not null then pg_catalog.concat({name})::{} end", t.sql);
                        [read, name]
                    }
                    _ => [name.clone(), name],
                },
            ));
        }
        let key = plan.key().unwrap_or_default().to_vec();
        let side = |n: usize, from: String| {
            let row: Vec<&str> = values.iter().map(|(_, v)| v[n].as_str()).collect();
            let row =
                if row.is_empty() { "''".to_owned() } else { format!("row({})::pg_catalog.text", row.join(", ")) };
            let of_key = |name: &String| values.iter().find(|(v, _)| v == name).map(|(_, v)| v[n].as_str());
            let keys: Vec<String> = key.iter().filter_map(of_key).map(|v| format!("pg_catalog.concat({v})")).collect();
            let keys =
                if keys.is_empty() { format!("pg_catalog.left({row}, {ROW_TEXT_MAX})") } else { keys.join(", ") };
            let hash = match hash {
                Hash::Fast => format!("pg_catalog.hashtextextended({row} collate pg_catalog.\"C\", 0)"),
                Hash::Portable => format!(
                    "('x' || pg_catalog.substr(pg_catalog.md5(pg_catalog.convert_to({row}, 'UTF8')), 1, 16))::pg_catalog.bit(64)::pg_catalog.int8"
                ),
            };
            let printed = plan.replicated_columns().map(|c| {
                let name = format!("t.{}", quote_ident(&c.name));
                format!("case when {name} is not null then pg_catalog.concat({name}) end")
            });
            let values = format!("array[{}]::pg_catalog.text[]", printed.collect::<Vec<_>>().join(", "));
            let type_of = |name: &String| {
                let of_target = types.iter().find(|t| t.name == *name).map(|t| t.sql.clone());
                let of_source = plan.source.columns.iter().find(|c| c.name == *name).map(|c| c.type_sql.clone());
                Some((format!("t.{}", quote_ident(name)), if n == 0 { of_source? } else { of_target? }))
            };
            let key_types = key.iter().filter_map(type_of).collect();
            // What was deleted on the source and stays is not compared.
            let stays = || soft_delete.map(|c| format!(" where {} is not true", quote_ident(c)));
            let filter = if n == 0 { plan.where_clause() } else { stays().unwrap_or_default() };
            Side { from, filter, hash, key: format!("array[{keys}]"), values, keys: key_types }
        };
        let alone = |name: &TableName, partitioned: bool| {
            if partitioned { name.quoted() } else { format!("only {}", name.quoted()) }
        };
        let source = side(0, alone(&plan.source.name, plan.source.partitioned));
        Comparison { source, target: side(1, target_alone.to_owned()), key, buckets }
    }

    /// Returns whether rows are told apart by a key.
    pub fn has_key(&self) -> bool {
        !self.key.is_empty()
    }

    fn mask(&self) -> usize {
        self.buckets - 1
    }
}

impl Side {
    /// Returns the rows of a relation that are compared, as SQL that calls them `t`. The condition is one on the table's own columns.
    fn rows_of(&self, relation: &str) -> String {
        if self.filter.is_empty() {
            return format!("{relation} t");
        }
        format!("(select ctid, * from {relation}{}) t", self.filter)
    }

    /// Counts the rows of a relation in a range of blocks, and adds their hashes up, for each bucket. Whatever the order of the rows, equal
    /// rows give equal sums.
    ///
    /// The server computes each hash once: the inner query is not merged with the outer one.
    pub fn tally(&self, comparison: &Comparison, leaf: &TableName, from: i64, to: Option<i64>) -> String {
        let condition = match (from, to) {
            (0, None) => String::new(),
            (from, None) => format!(" where t.ctid >= '({from},0)'"),
            (from, Some(to)) => format!(" where t.ctid >= '({from},0)' and t.ctid < '({to},0)'"),
        };
        format!(
            "select (h & {})::pg_catalog.int4, pg_catalog.count(*), pg_catalog.sum(h)::pg_catalog.text
             from (select {} as h from {}{condition} offset 0) x group by 1",
            comparison.mask(),
            self.hash,
            self.rows_of(&format!("only {}", leaf.quoted()))
        )
    }

    /// Gives the rows of the buckets `$1` (all, if it is NULL): what they are sorted and told apart by, the hash, the order.
    pub fn rows(&self, comparison: &Comparison) -> String {
        let (Side { hash, key, .. }, from) = (self, self.rows_of(&self.from));
        let order = if comparison.has_key() { "2" } else { "3" };
        format!(
            "select {key}, pg_catalog.convert_to({key}::pg_catalog.text, 'UTF8'), t.\"peergate row hash\"
             from (select t.*, {hash} as \"peergate row hash\" from {from} offset 0) t
             where $1::pg_catalog.int8[] is null or (t.\"peergate row hash\" & {}) = any ($1)
             order by {order}",
            comparison.mask()
        )
    }

    /// Gives the rows of those keys: what they are told apart by, the hash, the values if `with_values`. Each parameter is an array with
    /// the values of a column of the key.
    pub fn by_key(&self, with_values: bool) -> String {
        let names: Vec<String> = (0..self.keys.len()).map(|n| format!("k{n}")).collect();
        let given: Vec<String> =
            (1..=names.len()).map(|n| format!("pg_catalog.unnest(${n}::pg_catalog.text[])")).collect();
        let same = self.keys.iter().zip(&names).map(|((column, sql), name)| format!("{column} = u.{name}::{sql}"));
        let (Side { hash, key, values, .. }, from) = (self, self.rows_of(&self.from));
        format!(
            "select {key}, {hash}, {} from rows from ({}) u ({}) join {from} on {}",
            if with_values { values } else { "null::pg_catalog.text[]" },
            given.join(", "),
            names.join(", "),
            same.collect::<Vec<_>>().join(" and ")
        )
    }

    /// Gives the rows whose hash is among `$1`: what they are told apart by, the hash, the values.
    pub fn by_hash(&self) -> String {
        let (Side { hash, key, values, .. }, from) = (self, self.rows_of(&self.from));
        format!(
            "select {key}, t.\"peergate row hash\", {values}
             from (select t.*, {hash} as \"peergate row hash\" from {from} offset 0) t
             where t.\"peergate row hash\" = any ($1::pg_catalog.int8[])"
        )
    }
}

/// Prints what a row is told apart by, for people.
pub fn print_key(columns: &[String], values: &[String]) -> String {
    if columns.is_empty() {
        return values.concat();
    }
    format!("({})=({})", columns.join(", "), values.join(", "))
}

#[cfg(test)]
mod tests {
    use catalog::mirror::ColumnChoice;

    use super::*;
    use crate::schema::{RowIdentity, SourceColumn, SourceTable};

    fn plan(identity: RowIdentity) -> TablePlan {
        let column = |name: &str, type_oid, type_sql: &str| SourceColumn {
            number: 1,
            name: name.into(),
            type_oid,
            type_modifier: -1,
            type_sql: type_sql.into(),
            collation: None,
            not_null: false,
            default: None,
            generated: None,
            identity: None,
            missing: None,
        };
        let source = SourceTable {
            oid: 1,
            name: TableName::new("public", "t"),
            columns: vec![column("id", 23, "integer"), column("v", 25, "text"), column("c", 18, "\"char\"")],
            identity,
            indexes: Vec::new(),
            partitioned: false,
            root: None,
            files: std::collections::BTreeMap::new(),
            storage: Default::default(),
            constraints: Vec::new(),
            last_number: 0,
        };
        TablePlan { source, target_name: TableName::new("dwh", "u"), columns: ColumnChoice::default(), condition: None }
    }

    fn types() -> Vec<TargetType> {
        let of = |name: &str, sql: &str, oid| TargetType { name: name.into(), sql: sql.into(), oid };
        vec![of("c", "\"char\"", 18), of("id", "numeric(10,2)", 1700), of("v", "text", 25), of("note", "text", 25)]
    }

    #[test]
    fn a_value_is_read_as_the_targets_type_before_it_is_compared() {
        let compared =
            Comparison::new(&plan(RowIdentity::Key(vec!["id".into()])), "only u", None, &types(), Hash::Fast, 16);
        let tally = compared.source.tally(&compared, &TableName::new("public", "t"), 0, Some(10));
        let read = "case when t.\"id\" is not null then pg_catalog.concat(t.\"id\")::numeric(10,2) end";
        assert!(tally.contains(&format!("row({read}, t.\"v\", t.\"c\"::pg_catalog.int4)")), "{tally}");
        assert!(tally.contains("h & 15") && tally.ends_with("t.ctid < '(10,0)' offset 0) x group by 1"), "{tally}");
        let tally = compared.target.tally(&compared, &TableName::new("dwh", "u"), 0, None);
        assert!(tally.contains("row(t.\"id\", t.\"v\", t.\"c\"::pg_catalog.int4)"), "{tally}");
        assert!(compared.source.rows(&compared).ends_with("order by 2"));
    }

    #[test]
    fn only_the_rows_that_the_mirror_takes_are_read_on_the_source() {
        let plan = TablePlan { condition: Some("v <> 'x' -- not these".into()), ..plan(RowIdentity::InsertsOnly) };
        let compared = Comparison::new(&plan, "only u", None, &types(), Hash::Fast, 16);
        let tally = compared.source.tally(&compared, &TableName::new("public", "t"), 0, None);
        assert!(
            tally.contains("(select ctid, * from only \"public\".\"t\" where (v <> 'x' -- not these\n)) t"),
            "{tally}"
        );
        assert!(!compared.target.rows(&compared).contains("<>"));
    }

    #[test]
    fn rows_without_a_key_are_told_apart_by_their_text() {
        let compared = Comparison::new(&plan(RowIdentity::InsertsOnly), "only u", None, &types(), Hash::Portable, 16);
        assert!(!compared.has_key() && compared.target.rows(&compared).ends_with("order by 3"));
        assert_eq!(print_key(&compared.key, &["(1,a,b)".into()]), "(1,a,b)");
        assert_eq!(print_key(&["a".into(), "b".into()], &["1".into(), "x".into()]), "(a, b)=(1, x)");
    }
}
