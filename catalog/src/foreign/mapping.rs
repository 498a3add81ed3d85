//! From what a peer has to what the catalog gets: foreign tables and the types that they need, as statements. Pure.
//!
//! Built-in types stay what they are. Enums and composite types are made in the peer's schema; a domain becomes what it is made of; a type of an
//! extension that the catalog has is that extension's. All else is its text, as a domain of its own: what is said about it is then
//! evaluated in the catalog, and never sent to a peer that would compare the values by other rules.

use std::collections::{BTreeMap, HashMap, HashSet};

use pg::name::{quote_ident, quote_literal};
use sha2::{Digest, Sha256};

use super::remote::{Remote, RemoteColumn, RemoteType};

/// What stands for a type that the catalog lacks.
const TEXT: &str = "peergate_public.remote_text";

/// Objects whose number is below are PostgreSQL's own.
const FIRST_NORMAL_OID: u32 = 16_384;

/// Built-in types whose values mean nothing in another database, or that take no input.
const LOCAL_ONLY: &[&str] = &[
    "regproc",
    "regprocedure",
    "regoper",
    "regoperator",
    "regclass",
    "regtype",
    "regrole",
    "regnamespace",
    "regconfig",
    "regdictionary",
    "regcollation",
    "regdatabase",
    "aclitem",
    "pg_node_tree",
    "pg_ndistinct",
    "pg_dependencies",
    "pg_mcv_list",
    "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
];

/// What the catalog's database has that matters here.
#[derive(Debug, Default)]
pub(super) struct Local {
    /// Names of its built-in types.
    pub(super) builtin: HashSet<String>,
    /// Types of extensions, by extension and name, as SQL names them.
    pub(super) extension_types: HashMap<(String, String), String>,
    /// Names of its built-in collations.
    pub(super) collations: HashSet<String>,
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kind {
    Type,
    Table,
}

impl Kind {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Kind::Type => "type",
            Kind::Table => "table",
        }
    }
}

/// An object that the catalog is to have. Its schemas are written as placeholders, so that a renamed peer changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) remote_schema: String,
    pub(super) name: String,
    pub(super) kind: Kind,
    /// The statement that makes it.
    pub(super) definition: String,
    /// An enum's labels.
    pub(super) labels: Vec<String>,
    /// A table's columns: names, and what the statement says of each.
    pub(super) columns: Vec<(String, String)>,
}

impl Object {
    /// Returns whether all columns that were there before, by the definition that it was made by, are still what they were.
    pub(super) fn keeps_columns_of(&self, before: &str) -> bool {
        let was_there = |name: &str| {
            before.contains(&format!("({} ", quote_ident(name)))
                || before.contains(&format!(", {} ", quote_ident(name)))
        };
        let is_same = |sql: &str| before.contains(&format!("{sql}, ")) || before.contains(&format!("{sql}) SERVER "));
        self.columns.iter().all(|(name, sql)| !was_there(name) || is_same(sql))
    }
}

/// Returns the schema of the catalog that holds what a peer has in `remote_schema`.
pub(super) fn local_schema(peer: &str, remote_schema: &str) -> String {
    if remote_schema == "public" {
        return peer.to_owned();
    }
    let name = format!("{peer}__{remote_schema}");
    if name.len() <= 63 {
        return name;
    }
    let hash: String = Sha256::digest(name.as_bytes()).iter().take(4).map(|b| format!("{b:02x}")).collect();
    format!("{}_{hash}", &name[..name.floor_char_boundary(54)])
}

/// Returns what stands for a schema in a definition.
fn placeholder(remote_schema: &str) -> String {
    format!("${}$", quote_ident(remote_schema))
}

/// Puts the schemas of the catalog in the places of their placeholders.
pub(super) fn in_schemas(definition: &str, schemas: &BTreeMap<String, String>) -> String {
    schemas
        .iter()
        .fold(definition.to_owned(), |text, (remote, local)| text.replace(&placeholder(remote), &quote_ident(local)))
}

/// Returns all that the catalog is to have for a peer, in an order in which it can be made.
pub(super) fn objects(remote: &Remote, local: &Local, server: &str) -> Vec<Object> {
    let mut mapping = Mapping { remote, local, made: HashMap::new(), types: Vec::new(), depth: 0 };
    let mut tables = Vec::new();
    for table in &remote.tables {
        let columns: Vec<_> =
            table.columns.iter().map(|column| (column.name.clone(), mapping.column(column))).collect();
        let all: Vec<&str> = columns.iter().map(|(_, sql)| sql.as_str()).collect();
        let definition = format!(
            "CREATE FOREIGN TABLE {}.{} ({}) SERVER {} OPTIONS (schema_name {}, table_name {})",
            placeholder(&table.schema),
            quote_ident(&table.name),
            all.join(", "),
            quote_ident(server),
            quote_literal(&table.schema).trim_start(),
            quote_literal(&table.name).trim_start(),
        );
        let (remote_schema, name) = (table.schema.clone(), table.name.clone());
        tables.push(Object { remote_schema, name, kind: Kind::Table, definition, labels: Vec::new(), columns });
    }
    mapping.types.into_iter().chain(tables).collect()
}

struct Mapping<'a> {
    remote: &'a Remote,
    local: &'a Local,
    /// What types of the peer have become.
    made: HashMap<u32, String>,
    types: Vec<Object>,
    depth: usize,
}

impl Mapping<'_> {
    fn column(&mut self, column: &RemoteColumn) -> String {
        let mut of = self.type_of(column.type_id, &column.formatted);
        let mut collation = String::new();
        if let Some((schema, name)) = &column.collation {
            if schema == "pg_catalog" && self.local.collations.contains(name) {
                collation = format!(" COLLATE pg_catalog.{}", quote_ident(name));
            } else {
                // Values that the catalog would sort in another way than the peer: it is to sort them itself.
                of = TEXT.to_owned();
            }
        }
        format!("{} {of}{collation}", quote_ident(&column.name))
    }

    /// Returns the type in the catalog for a type of the peer; `formatted` is that with its modifier.
    fn type_of(&mut self, id: u32, formatted: &str) -> String {
        let remote: &Remote = self.remote;
        let Some(of) = remote.types.get(&id) else { return TEXT.to_owned() };
        if of.schema == "pg_catalog" && id < FIRST_NORMAL_OID {
            let element = of.element.and_then(|element| remote.types.get(&element)).unwrap_or(of);
            let travels = matches!(element.kind, b'b' | b'r' | b'm') && !LOCAL_ONLY.contains(&element.name.as_str());
            return if travels && self.local.builtin.contains(&of.name) {
                formatted.to_owned()
            } else {
                TEXT.to_owned()
            };
        }
        if let Some(element) = of.element {
            let modifier = modifier(formatted);
            let element = self.type_of(element, modifier);
            return if element == TEXT && of.delimiter != "," { element } else { format!("{element}[]") };
        }
        if let Some((base, formatted)) = &of.base {
            return self.type_of(*base, formatted);
        }
        if let Some(extension) = &of.extension {
            let known = self.local.extension_types.get(&(extension.clone(), of.name.clone()));
            return known.map_or(TEXT.to_owned(), |known| format!("{known}{}", modifier(formatted)));
        }
        match of.kind {
            b'e' => self.make(id, of, |_| {
                let labels: Vec<_> = of.labels.iter().map(|l| quote_literal(l).trim_start().to_owned()).collect();
                format!("ENUM ({})", labels.join(", "))
            }),
            // A composite type that holds itself cannot be, but a broken catalog must not end us.
            b'c' if !of.attributes.is_empty() && self.depth < 32 => self.make(id, of, |mapping| {
                let attributes: Vec<_> = of.attributes.iter().map(|attribute| mapping.column(attribute)).collect();
                format!("({})", attributes.join(", "))
            }),
            _ => TEXT.to_owned(),
        }
    }

    /// Makes a type of the peer's in the catalog, once.
    fn make(&mut self, id: u32, of: &RemoteType, body: impl FnOnce(&mut Self) -> String) -> String {
        if let Some(made) = self.made.get(&id) {
            return made.clone();
        }
        self.depth += 1;
        let body = body(self);
        self.depth -= 1;
        let name = format!("{}.{}", placeholder(&of.schema), quote_ident(&of.name));
        self.types.push(Object {
            remote_schema: of.schema.clone(),
            name: of.name.clone(),
            kind: Kind::Type,
            definition: format!("CREATE TYPE {name} AS {body}"),
            labels: of.labels.clone(),
            columns: Vec::new(),
        });
        self.made.insert(id, name.clone());
        name
    }
}

/// Returns the modifier of a formatted type, such as `(3)`, without the brackets of an array.
fn modifier(formatted: &str) -> &str {
    let end = formatted.trim_end_matches("[]").len();
    // A quoted name may hold parentheses; a modifier has digits, names and commas only, and stands at the end.
    match formatted[..end].rfind('(') {
        Some(at) if formatted[..end].ends_with(')') && !formatted[at..end].contains('"') => &formatted[at..end],
        _ => "",
    }
}

/// What has to be done so that the catalog has `wanted` when it has `present` (with the definitions that they were made by).
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// To be dropped: what is gone on the peer, and what is made anew. Tables before types.
    pub(super) drop: Vec<(String, Kind, String)>,
    /// To be made, in order.
    pub(super) make: Vec<Object>,
}

/// Compares. A table whose type is made anew is made anew, too.
pub(super) fn changes(wanted: &[Object], present: &BTreeMap<(String, Kind, String), String>) -> Changes {
    let key = |object: &Object| (object.remote_schema.clone(), object.kind, object.name.clone());
    let wanted_keys: HashSet<_> = wanted.iter().map(key).collect();
    let differs = |object: &Object| present.get(&key(object)) != Some(&object.definition);
    // Types that are there already and have to be made anew, as they stand in definitions.
    let mut stale: HashSet<String> = HashSet::new();
    let mut changes = Changes::default();
    for object in wanted {
        let uses_stale = stale.iter().any(|name| object.definition.contains(name.as_str()));
        if !differs(object) && !uses_stale {
            continue;
        }
        if present.contains_key(&key(object)) {
            changes.drop.push(key(object));
            if object.kind == Kind::Type {
                stale.insert(format!("{}.{}", placeholder(&object.remote_schema), quote_ident(&object.name)));
            }
        }
        changes.make.push(object.clone());
    }
    changes.drop.extend(present.keys().filter(|present| !wanted_keys.contains(*present)).cloned());
    // Types that use others were made after them.
    changes.drop.reverse();
    changes.drop.sort_by_key(|(_, kind, _)| std::cmp::Reverse(*kind));
    changes
}

/// Returns the labels that an enum gains, each with the one that it comes before, when that is all that changes.
pub(super) fn added_labels<'a>(before: &'a [String], after: &'a [String]) -> Option<Vec<(&'a str, Option<&'a str>)>> {
    let mut kept = before.iter().peekable();
    let mut added = Vec::new();
    for label in after {
        if kept.peek() == Some(&label) {
            kept.next();
        } else {
            added.push((label.as_str(), kept.peek().map(|next| next.as_str())));
        }
    }
    kept.next().is_none().then_some(added)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::foreign::remote::RemoteTable;

    fn column(name: &str, type_id: u32, formatted: &str) -> RemoteColumn {
        RemoteColumn { name: name.to_owned(), type_id, formatted: formatted.to_owned(), collation: None }
    }

    fn of(schema: &str, name: &str, kind: u8) -> RemoteType {
        RemoteType {
            schema: schema.to_owned(),
            name: name.to_owned(),
            kind,
            delimiter: ",".to_owned(),
            ..RemoteType::default()
        }
    }

    fn shop() -> (Remote, Local) {
        let types = HashMap::from([
            (23, of("pg_catalog", "int4", b'b')),
            (1700, of("pg_catalog", "numeric", b'b')),
            (2205, of("pg_catalog", "regclass", b'b')),
            (4451, of("pg_catalog", "int4multirange", b'm')),
            (20_000, RemoteType { labels: vec!["it's".to_owned(), "ok".to_owned()], ..of("public", "mood", b'e') }),
            (20_001, RemoteType { element: Some(20_000), ..of("public", "_mood", b'b') }),
            (20_002, RemoteType { base: Some((1700, "numeric(10,2)".to_owned())), ..of("public", "price", b'd') }),
            (
                20_003,
                RemoteType {
                    attributes: vec![column("m", 20_000, "public.mood"), column("n", 23, "integer")],
                    ..of("Odd", "pair", b'c')
                },
            ),
            (20_004, RemoteType { extension: Some("vector".to_owned()), ..of("public", "vector", b'b') }),
            (20_005, RemoteType { extension: Some("citext".to_owned()), ..of("public", "citext", b'b') }),
            (20_006, of("public", "span", b'r')),
            (20_007, RemoteType { element: Some(20_006), ..of("public", "_span", b'b') }),
        ]);
        let columns = vec![
            column("a", 23, "integer"),
            column("b", 20_001, "public.mood[]"),
            column("c", 20_002, "public.price"),
            column("d \"x", 20_003, "\"Odd\".pair"),
            column("e", 20_004, "public.vector(3)"),
            column("f", 20_005, "public.citext"),
            column("g", 20_006, "public.span"),
            column("h", 20_007, "public.span[]"),
            column("i", 2205, "regclass"),
            column("j", 4451, "int4multirange"),
        ];
        let tables = vec![RemoteTable { schema: "public".to_owned(), name: "O'ne".to_owned(), columns }];
        let mut local = Local::default();
        local.builtin.extend(["int4", "numeric", "regclass"].map(str::to_owned));
        local.extension_types.insert(("vector".to_owned(), "vector".to_owned()), "ext.vector".to_owned());
        (Remote { tables, types, collation: String::new() }, local)
    }

    #[test]
    fn each_kind_of_type_finds_its_place() {
        let (remote, local) = shop();
        let objects = objects(&remote, &local, "peergate_1");
        let schemas =
            BTreeMap::from([("public", "shop"), ("Odd", "shop__Odd")].map(|(a, b)| (a.to_owned(), b.to_owned())));
        let texts: Vec<String> = objects.iter().map(|o| in_schemas(&o.definition, &schemas)).collect();
        assert_eq!(
            texts,
            [
                r#"CREATE TYPE "shop"."mood" AS ENUM ('it''s', 'ok')"#,
                r#"CREATE TYPE "shop__Odd"."pair" AS ("m" "shop"."mood", "n" integer)"#,
                concat!(
                    r#"CREATE FOREIGN TABLE "shop"."O'ne" ("a" integer, "b" "shop"."mood"[], "c" numeric(10,2), "#,
                    r#""d ""x" "shop__Odd"."pair", "e" ext.vector(3), "f" peergate_public.remote_text, "#,
                    r#""g" peergate_public.remote_text, "h" peergate_public.remote_text[], "i" peergate_public.remote_text, "#,
                    r#""j" peergate_public.remote_text) SERVER "peergate_1" OPTIONS (schema_name 'public', table_name 'O''ne')"#
                ),
            ]
        );
    }

    #[test]
    fn only_what_differs_is_made_anew_with_what_needs_it() {
        let (mut remote, local) = shop();
        let before = objects(&remote, &local, "s");
        let present: BTreeMap<_, _> =
            before.iter().map(|o| ((o.remote_schema.clone(), o.kind, o.name.clone()), o.definition.clone())).collect();
        assert_eq!(changes(&before, &present), Changes::default());
        remote.tables.push(RemoteTable {
            schema: "public".to_owned(),
            name: "plain".to_owned(),
            columns: vec![column("a", 23, "integer")],
        });
        let found = changes(&objects(&remote, &local, "s"), &present);
        assert_eq!((found.drop.len(), found.make.len()), (0, 1));
        remote.types.get_mut(&20_000).unwrap().labels.remove(0);
        let found = changes(&objects(&remote, &local, "s"), &present);
        let names: Vec<_> = found.drop.iter().map(|(_, _, name)| name.as_str()).collect();
        assert_eq!(names, ["O'ne", "pair", "mood"]);
        assert_eq!(found.make.len(), 4);
        let found = changes(&[], &present);
        assert_eq!((found.drop[0].1, found.drop.len()), (Kind::Table, 3));
    }

    #[test]
    fn schemas_are_named_after_the_peer() {
        assert_eq!(local_schema("shop", "public"), "shop");
        assert_eq!(local_schema("shop", "Sales"), "shop__Sales");
        let (one, two) = (local_schema(&"p".repeat(60), "sales"), local_schema(&"p".repeat(60), "stock"));
        assert!(one.len() <= 63 && two.len() <= 63 && one != two);
    }

    #[test]
    fn labels_that_are_added_are_told_from_those_that_change() {
        let labels = |text: &str| -> Vec<String> { text.chars().map(String::from).collect() };
        assert_eq!(added_labels(&labels("ac"), &labels("abcd")), Some(vec![("b", Some("c")), ("d", None)]));
        assert_eq!(added_labels(&labels("ab"), &labels("ba")), None);
        assert_eq!(added_labels(&labels("ab"), &labels("a")), None);
    }

    #[test]
    fn modifiers_are_taken_off() {
        for (formatted, expected) in
            [("vector(3)", "(3)"), ("geometry(Point,4326)[]", "(Point,4326)"), ("citext", ""), ("\"a(b)\"", "")]
        {
            assert_eq!(modifier(formatted), expected, "{formatted}");
        }
    }
}
