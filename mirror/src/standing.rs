//! Which of a mirror's tables stream when an attempt begins, and which do not: what the target's marks and the catalog say, together.

use std::collections::BTreeMap;

use pg::{Lsn, TableName};

use crate::error::Error;
use crate::prepare::{self, Known};
use crate::sink::marks;
use crate::sink::postgres::PostgresSink;
use crate::table_state::{Route, Standing, TableState, standing};
use crate::worker::Context;

/// The tables of a mirror, by what the main stream does about them.
#[derive(Debug, Default)]
pub struct Tables {
    /// They stream, from this position on.
    pub streams: BTreeMap<TableName, Lsn>,
    /// They get copies of their own.
    pub late: Vec<TableName>,
    /// What is known of all.
    pub known: Known,
}

impl Tables {
    /// Returns which changes the main stream takes.
    pub fn routes(&self) -> impl Iterator<Item = (TableName, Route)> {
        self.known
            .keys()
            .map(|name| (name.clone(), self.streams.get(name).map_or(Route::Ignore, |from| Route::From(*from))))
    }

    /// Returns the tables that stream: name on the source, name on the target.
    pub fn names(&self) -> Vec<(TableName, TableName)> {
        let streams = self.known.values().filter(|t| self.streams.contains_key(&t.source));
        streams.map(|t| (t.source.clone(), t.target.clone())).collect()
    }
}

/// Sorts the tables, and makes the catalog and the target agree on them: the catalog shows the target's marks, and a table that waits for
/// a person or is no part of the mirror has none.
///
/// # Errors
/// [`Error`] as the target's SQLSTATE says, or if the catalog cannot be reached.
pub async fn sort(context: &Context, sink: &PostgresSink) -> Result<Tables, Error> {
    let (catalog, mirror) = (&context.catalog, &context.mirror);
    let marks = marks::read(sink.session(), &mirror.object_name).await?;
    let mut tables = Tables { known: prepare::known_tables(context).await?, ..Tables::default() };
    let mut lost = Vec::new();
    for table in tables.known.values() {
        let name = table.source.clone();
        let state = TableState::from_name(&table.state).unwrap_or(TableState::Pending);
        match standing(state, marks.get(&name).copied()) {
            Standing::Streams(from) => drop(tables.streams.insert(name, from)),
            Standing::Late => {
                if state == TableState::Live {
                    lost.push(name.clone());
                }
                tables.late.push(name);
            }
            Standing::Waits | Standing::Gone => {}
        }
    }
    let stale: Vec<TableName> = marks.keys().filter(|name| !tables.streams.contains_key(name)).cloned().collect();
    if !stale.is_empty() {
        marks::clear(sink.session(), &mirror.object_name, context.lane, context.epoch, &stale).await?;
    }
    let without: Vec<TableName> =
        tables.known.keys().filter(|name| !tables.streams.contains_key(name)).cloned().collect();
    catalog.set_tables_from(mirror.id, &without, None).await?;
    catalog.set_table_states(mirror.id, &lost, TableState::Pending.as_str()).await?;
    let mut by_position: BTreeMap<Lsn, Vec<TableName>> = BTreeMap::new();
    for (name, from) in &tables.streams {
        by_position.entry(*from).or_default().push(name.clone());
    }
    for (from, names) in by_position {
        catalog.set_tables_from(mirror.id, &names, Some(from)).await?;
    }
    Ok(tables)
}
