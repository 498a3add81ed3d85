//! The text that is put in a statement's place, written bit by bit.

use pg::name::quote_literal;
use serde_json::Value as Json;

use crate::parser::NAME_BYTES_MAX;
use crate::statement::{GivenOption, Value};

/// In place of a session's secret: a call that says nothing to the gateway when it is done.
pub(super) const NO_NONCE: &str = "";

/// The replacement of one statement, with the places that stand for parts of the original.
#[derive(Default)]
pub(super) struct Sql {
    pub(super) text: String,
    pub(super) anchors: Vec<(usize, String)>,
}

impl Sql {
    pub(super) fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// From here on, the text stands for the part of the statement with that key.
    pub(super) fn anchor(&mut self, key: impl Into<String>) {
        self.anchors.push((self.text.chars().count(), key.into()));
    }

    pub(super) fn literal(&mut self, text: &str) {
        self.push(quote_literal(text).trim_start());
    }

    /// A name; one that is too long is cut by the server, which says so as it does of any identifier.
    pub(super) fn name(&mut self, name: &str) {
        if name.len() <= NAME_BYTES_MAX {
            return self.literal(name);
        }
        self.push("peergate.truncate_identifier(");
        self.literal(name);
        self.push(")");
    }

    pub(super) fn json(&mut self, value: &Json) {
        self.literal(&ascii(value));
        self.push("::pg_catalog.jsonb");
    }

    pub(super) fn flag(&mut self, name: &str, value: bool) {
        if value {
            self.push(&format!(", {name} => true"));
        }
    }

    /// A value as an expression of type text.
    pub(super) fn value(&mut self, value: &Value) {
        match value {
            Value::Text(text) => self.literal(text),
            Value::Parameter(n) => self.push(&format!("${n}::pg_catalog.text")),
        }
    }

    /// Ends a call, with the session's secret unless it is [`NO_NONCE`].
    pub(super) fn finish(&mut self, nonce: &str) {
        if nonce != NO_NONCE {
            self.push(", nonce => ");
            self.literal(nonce);
        }
        self.push(")");
    }
}

/// Writes JSON in ASCII only, which is right in any client encoding.
pub(crate) fn ascii(value: &Json) -> String {
    let mut out = String::new();
    for c in value.to_string().chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

/// Writes a query that gives these rows, all of type text.
pub(super) fn text_rows(sql: &mut Sql, columns: &[&str], rows: &[Vec<String>]) {
    sql.push("SELECT * FROM (VALUES ");
    for (n, row) in rows.iter().enumerate() {
        sql.push(if n > 0 { ", (" } else { "(" });
        for (n, text) in row.iter().enumerate() {
            sql.push(if n > 0 { ", " } else { "" });
            sql.literal(text);
        }
        sql.push(")");
    }
    sql.push(&format!(") AS help ({})", columns.join(", ")));
}

pub(super) fn array(sql: &mut Sql, names: &[String]) {
    array_of(sql, names, |sql, name| sql.name(name));
}

pub(super) fn array_of<T>(sql: &mut Sql, items: &[T], write: impl Fn(&mut Sql, &T)) {
    sql.push("ARRAY[");
    for (n, item) in items.iter().enumerate() {
        sql.push(if n > 0 { ", " } else { "" });
        write(sql, item);
    }
    sql.push("]::pg_catalog.text[]");
}

/// Writes `, argument => (value)::type`; the literal and the cast stand for the part with that key.
pub(super) fn cast(sql: &mut Sql, argument: &str, key: &str, value: &Value, type_name: &str) {
    sql.push(&format!(", {argument} => "));
    sql.anchor(key);
    sql.value(value);
    sql.push(&format!("::pg_catalog.{type_name}"));
}

/// Writes `, options => …`, as a constant when no parameter is among them.
pub(super) fn options(sql: &mut Sql, options: &[GivenOption]) {
    if options.is_empty() {
        return;
    }
    sql.push(", options => ");
    let constant: Option<serde_json::Map<String, Json>> = options
        .iter()
        .map(|option| match &option.value {
            Value::Text(text) => Some((option.name.clone(), Json::String(text.clone()))),
            Value::Parameter(_) => None,
        })
        .collect();
    if let Some(constant) = constant {
        return sql.json(&Json::Object(constant));
    }
    sql.push("pg_catalog.jsonb_build_object(");
    for (n, option) in options.iter().enumerate() {
        sql.push(if n > 0 { ", " } else { "" });
        sql.literal(&option.name);
        sql.push(", ");
        sql.anchor(format!("option.{}.value", option.name));
        sql.value(&option.value);
        if matches!(option.value, Value::Text(_)) {
            sql.push("::pg_catalog.text");
        }
    }
    sql.push(")");
}
