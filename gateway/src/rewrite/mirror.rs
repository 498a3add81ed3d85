//! Calls about mirrors, and which tables a mirror takes as the catalog stores it.

use serde_json::{Value as Json, json};

use super::sql::{NO_NONCE, Sql, array, cast, options};
use crate::statement::{CreateMirror, MirrorChange, SchemaMap, Selection, Statement, Table, TableMap, Value};

pub(super) fn create_mirror(sql: &mut Sql, mirror: &CreateMirror, nonce: &str) {
    let of_query = matches!(mirror.selection, Selection::Query(_));
    sql.push(if of_query { "CALL peergate.create_query_mirror(" } else { "CALL peergate.create_mirror(" });
    sql.name(&mirror.name);
    sql.push(", ");
    sql.literal(&mirror.source);
    sql.push(", ");
    sql.literal(&mirror.target);
    match &mirror.selection {
        Selection::Query(query) => cast(sql, "query", "query", query, "text"),
        tables => {
            sql.push(", ");
            sql.json(&selection(tables));
        }
    }
    options(sql, &mirror.options);
    sql.flag("if_not_exists", mirror.if_not_exists);
    sql.finish(nonce);
}

pub(super) fn alter_mirror(sql: &mut Sql, name: &str, change: &MirrorChange, nonce: &str) {
    let procedure = match change {
        MirrorChange::AddTables(_) => "add_mirror_tables",
        MirrorChange::AlterTable(_) => "alter_mirror_table",
        MirrorChange::DropTables(_) => "drop_mirror_tables",
        MirrorChange::RefreshTables => "refresh_mirror_tables",
        MirrorChange::SkipTo(_) => "skip_mirror_transaction",
        MirrorChange::Set(_) | MirrorChange::Reset(_) => "set_mirror_options",
        MirrorChange::RenameTo(_) => "rename_mirror",
    };
    sql.push(&format!("CALL peergate.{procedure}("));
    sql.name(name);
    match change {
        MirrorChange::AddTables(maps) => {
            sql.push(", ");
            sql.json(&maps.iter().map(table_map).collect());
        }
        MirrorChange::AlterTable(map) => {
            sql.push(", ");
            sql.json(&table_map(map));
        }
        MirrorChange::DropTables(tables) => {
            sql.push(", ");
            sql.json(&tables.iter().map(table).collect());
        }
        MirrorChange::RefreshTables => {}
        MirrorChange::SkipTo(lsn) => cast(sql, "lsn", "lsn", lsn, "pg_lsn"),
        MirrorChange::Set(given) => options(sql, given),
        MirrorChange::Reset(names) => {
            sql.push(", reset => ");
            array(sql, names);
        }
        MirrorChange::RenameTo(new_name) => {
            sql.push(", ");
            sql.name(new_name);
        }
    }
    sql.finish(nonce);
}

/// Returns the procedure that a statement about a mirror calls, and the call as it is made for a try: without a session's secret, so that it
/// says nothing to a client.
pub(crate) fn procedure_call(statement: &Statement) -> (String, String) {
    let mut sql = Sql::default();
    match statement {
        Statement::CreateMirror(mirror) => create_mirror(&mut sql, mirror, NO_NONCE),
        Statement::AlterMirror { name, change } => alter_mirror(&mut sql, name, change, NO_NONCE),
        _ => {}
    }
    let name = sql.text.trim_start_matches("CALL peergate.").split('(').next().unwrap_or_default().to_owned();
    (name, sql.text)
}

pub(super) fn table(table: &Table) -> Json {
    json!({"schema": table.schema, "name": table.name})
}

pub(super) fn table_map(map: &TableMap) -> Json {
    let mut item = json!({"from": table(&map.from), "to": table(&map.to)});
    if !map.columns.is_empty() {
        item["columns"] = json!(map.columns);
    }
    if !map.exclude.is_empty() {
        item["exclude"] = json!(map.exclude);
    }
    if let Some(condition) = &map.condition {
        item["where"] = json!(condition);
    }
    item
}

pub(super) fn selection(selection: &Selection) -> Json {
    let mut document = match selection {
        Selection::All { .. } => json!({"all": true}),
        Selection::Schemas { schemas, .. } => {
            json!({"schemas": schemas.iter().map(|s| json!({"from": s.from, "to": s.to})).collect::<Vec<_>>()})
        }
        Selection::Tables(maps) => {
            json!({"tables": maps.iter().map(table_map).collect::<Vec<_>>()})
        }
        Selection::Query(Value::Text(query)) => json!({"query": query}),
        // Its text is known when it is bound, and never read from here.
        Selection::Query(Value::Parameter(_)) => Json::Null,
    };
    if let Selection::All { except } | Selection::Schemas { except, .. } = selection
        && !except.is_empty()
    {
        document["except"] = except.iter().map(table).collect();
    }
    document
}

/// Reads what [`selection`] writes; `None` for a form that it does not write, so that nothing of it is lost unseen.
pub(crate) fn selection_from_json(document: &Json) -> Option<Selection> {
    let text = |value: &Json| value.as_str().map(str::to_owned);
    let table = |value: &Json| Some(Table { schema: text(value.get("schema")?)?, name: text(value.get("name")?)? });
    let texts = |value: Option<&Json>| -> Option<Vec<String>> {
        value.map_or(Some(Vec::new()), |value| value.as_array()?.iter().map(text).collect())
    };
    let except = || -> Option<Vec<Table>> {
        document.get("except").map_or(Some(Vec::new()), |value| value.as_array()?.iter().map(table).collect())
    };
    let read = if let Some(query) = document.get("query") {
        Selection::Query(Value::Text(text(query)?))
    } else if document.get("all").is_some() {
        Selection::All { except: except()? }
    } else if let Some(schemas) = document.get("schemas") {
        let schema = |map: &Json| Some(SchemaMap { from: text(map.get("from")?)?, to: text(map.get("to")?)? });
        Selection::Schemas {
            schemas: schemas.as_array()?.iter().map(schema).collect::<Option<_>>()?,
            except: except()?,
        }
    } else {
        let map = |map: &Json| {
            Some(TableMap {
                from: table(map.get("from")?)?,
                to: table(map.get("to")?)?,
                columns: texts(map.get("columns"))?,
                exclude: texts(map.get("exclude"))?,
                condition: match map.get("where") {
                    Some(condition) => Some(text(condition)?),
                    None => None,
                },
            })
        };
        Selection::Tables(document.get("tables")?.as_array()?.iter().map(map).collect::<Option<_>>()?)
    };
    // ALTER MIRROR leaves an empty list behind where it takes the last exception out.
    let mut known = document.clone();
    if document.get("except") == Some(&json!([])) {
        known.as_object_mut()?.remove("except");
    }
    (selection(&read) == known).then_some(read)
}
