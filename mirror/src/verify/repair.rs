//! Mends rows that differ: the target gets what the source has.
//!
//! The rows were found at a moment that has passed, so they are looked at anew, at a moment at which the stream is held: the source as its snapshot shows
//! it, the target as the stream has left it. What then differs is written as any batch is, by a sink of its own whose transaction checks the
//! mirror's progress row where the stream stands and keeps it there until it commits. So no newer row is ever overwritten: all that is
//! newer comes by the stream, later. What cannot be written is told, and stops nobody.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use futures_util::TryStreamExt;
use pg::pgoutput::{Column, Identity, Relation, Tuple};
use pg::{SqlState, name::quote_ident};
use tokio_postgres::types::ToSql;

use super::merge::Found;
use super::moment::Moment;
use super::text::{Comparison, Side};
use crate::batch::{Batch, BatchEnd};
use crate::error::{Error, Problem};
use crate::late::Main;
use crate::relation::TableMap;
use crate::schema::{Passage, TablePlan, TargetColumn, TargetTable};
use crate::session::PeerSession;
use crate::sink::postgres::PostgresSink;
use crate::sink::{Sink, marks};
use crate::worker::Context;

/// Rows that are mended at one moment.
pub const ROWS_MAX: usize = 1000;

/// Bytes of values that are, or one row.
const BYTES_MAX: usize = 16 << 20;

/// How the sessions read while the stream is held: by the key's index, and not for long. A table without key is read as a whole.
const READ_SETTINGS: &str = "set local enable_hashjoin = off; set local enable_mergejoin = off; set local enable_seqscan = off; set local statement_timeout = '20s'";

/// Locks that the stream would wait for are not waited for while it is held.
const WRITE_SETTINGS: &str = "set lock_timeout = '5s'; set statement_timeout = '60s'";

/// A row's values as text, in the order of the columns that are replicated.
type Values = Vec<Option<String>>;

/// A table that is mended.
pub struct Patient<'a> {
    /// The table.
    pub plan: &'a TablePlan,
    /// What the target has of it.
    pub target: &'a TargetTable,
    /// How it is compared.
    pub comparison: &'a Comparison,
}

/// A row as one side has it.
struct Present {
    hash: i64,
    values: Values,
}

/// Mends rows; returns how many there were to mend still.
///
/// # Errors
/// [`Error::Blocked`] if they cannot be written, [`Error::Transient`] if that may pass.
pub async fn mend(context: &Context, main: &Main, patient: &Patient<'_>, found: &[Found]) -> Result<i64, Error> {
    let mut left: Vec<&Found> = found.iter().collect();
    let mut mended = 0;
    while !left.is_empty() {
        let moment = Moment::take(context, main, true).await?;
        check_streams(context, patient, &moment).await?;
        let [source, target] = &moment.sessions;
        for (session, oid) in [(source, patient.plan.source.oid), (target, patient.target.oid)] {
            session.run(READ_SETTINGS).await?;
            use_operators(session, oid).await?;
        }
        let mendings = if patient.comparison.has_key() {
            by_key(patient, &moment, &mut left).await
        } else {
            by_hash(patient, &moment, &mut left).await
        };
        mended += write(context, patient, &moment, mendings.map_err(too_long)?).await?;
    }
    Ok(mended)
}

/// A change that mends a row: what the target has, what it is to have.
struct Mending {
    before: Option<Values>,
    after: Option<Values>,
}

/// Checks that the table is the stream's at that moment; one that is to be copied anew is not.
async fn check_streams(context: &Context, patient: &Patient<'_>, moment: &Moment) -> Result<(), Error> {
    let marks = marks::read(&moment.sessions[1], &context.mirror.object_name).await?;
    let name = &patient.plan.source.name;
    if marks.get(name).is_some_and(|from| *from <= moment.lsn) {
        return Ok(());
    }
    let message = format!("table \"{name}\" stopped following the source before it was repaired");
    Err(Error::Blocked(Problem::new(SqlState::WRONG_STATE, message)))
}

/// Lets the operators of a table's types be found until the transaction ends.
async fn use_operators(session: &PeerSession, oid: u32) -> Result<(), Error> {
    let query = "
        select distinct n.nspname::text
        from pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid
        join pg_catalog.pg_type b on b.oid in (t.oid, t.typbasetype) join pg_catalog.pg_namespace n on n.oid = b.typnamespace
        where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped and n.nspname <> 'pg_catalog'";
    let rows = session.done(session.client.query(query, &[&oid])).await?;
    let schemas: Vec<String> = rows.iter().map(|r| quote_ident(r.get(0))).collect();
    if schemas.is_empty() {
        Ok(())
    } else {
        session.run(&format!("set local search_path = {}", schemas.join(", "))).await
    }
}

/// The stream is not held for as long as it may take to read a large table without a key.
fn too_long(error: Error) -> Error {
    match error {
        Error::Transient(problem) if problem.sqlstate == SqlState::QUERY_CANCELED => Error::Blocked(
            Problem::new(problem.sqlstate, "it takes too long to find the rows while the stream stands still")
                .hint("RESYNC MIRROR … TABLE brings the table back to what the source has."),
        ),
        other => other,
    }
}

/// Works out what is to be done about rows with a key. What is too much for one moment stays in `left`.
async fn by_key(patient: &Patient<'_>, moment: &Moment, left: &mut Vec<&Found>) -> Result<Vec<Mending>, Error> {
    let Comparison { source, target, key, .. } = patient.comparison;
    let keys: Vec<&[String]> = left.iter().map(|found| found.key.as_slice()).collect();
    let (of_source, all) = look_up(&moment.sessions[0], source, key.len(), &keys, true).await?;
    let (of_target, _) = look_up(&moment.sessions[1], target, key.len(), &keys, false).await?;
    // The rest of the source's rows was not read, so nothing is known of keys that are not among these.
    let known: Vec<&[String]> = if all { keys } else { of_source.keys().map(Vec::as_slice).collect() };
    let done: BTreeSet<Vec<String>> = known.iter().map(|key| key.to_vec()).collect();
    let place = |column: &String| patient.plan.replicated_columns().position(|c| c.name == *column);
    let places: Vec<Option<usize>> = key.iter().map(place).collect();
    let count = patient.plan.replicated_columns().count();
    let mut mendings = Vec::new();
    for key in known {
        let (source, target) = (of_source.get(key), of_target.get(key));
        if source.map(|row| row.hash) == target.map(|row| row.hash) {
            continue;
        }
        // By its key is how the target's row is found.
        let before = target.map(|_| {
            let mut values = vec![None; count];
            for (place, value) in places.iter().zip(key) {
                if let Some(found) = place.and_then(|place| values.get_mut(place)) {
                    *found = Some(value.clone());
                }
            }
            values
        });
        mendings.push(Mending { before, after: source.map(|row| row.values.clone()) });
    }
    left.retain(|found| !done.contains(&found.key));
    Ok(mendings)
}

/// Returns the rows of those keys that are there, and whether these are all: no more is read than goes into one moment.
async fn look_up(
    session: &PeerSession,
    side: &Side,
    columns: usize,
    keys: &[&[String]],
    with_values: bool,
) -> Result<(BTreeMap<Vec<String>, Present>, bool), Error> {
    let by_column: Vec<Vec<&str>> =
        (0..columns).map(|n| keys.iter().filter_map(|key| key.get(n)).map(String::as_str).collect()).collect();
    let parameters: Vec<&(dyn ToSql + Sync)> = by_column.iter().map(|c| c as &(dyn ToSql + Sync)).collect();
    let statement = session.done(session.client.prepare(&side.by_key(with_values))).await?;
    let rows = session.done(session.client.query_raw(&statement, parameters)).await?;
    session.watched(gather(session, rows)).await
}

async fn gather(
    session: &PeerSession,
    rows: tokio_postgres::RowStream,
) -> Result<(BTreeMap<Vec<String>, Present>, bool), Error> {
    let (mut found, mut bytes) = (BTreeMap::new(), 0);
    let mut rows = pin!(rows);
    while let Some(row) = rows.try_next().await.map_err(|e| session.error(&e))? {
        let values: Values = row.get::<_, Option<Values>>(2).unwrap_or_default();
        bytes += values.iter().flatten().map(String::len).sum::<usize>();
        found.insert(row.get(0), Present { hash: row.get(1), values });
        if bytes >= BYTES_MAX {
            return Ok((found, false));
        }
    }
    Ok((found, true))
}

/// Works out what is to be done about rows without a key: as many of each come or go as one side has more.
async fn by_hash(patient: &Patient<'_>, moment: &Moment, left: &mut Vec<&Found>) -> Result<Vec<Mending>, Error> {
    let hashes: Vec<i64> = left.drain(..).map(|found| found.hash).collect();
    // How many more the source has, and what such a row is.
    let mut surplus: BTreeMap<i64, (i64, Values)> = BTreeMap::new();
    for (session, side, one) in
        [(&moment.sessions[0], &patient.comparison.source, 1), (&moment.sessions[1], &patient.comparison.target, -1)]
    {
        session.run("set local enable_seqscan = on").await?;
        let rows = session.done(session.client.query(&side.by_hash(), &[&hashes])).await?;
        for row in rows {
            let counted = surplus.entry(row.get(1)).or_insert_with(|| (0, row.get(2)));
            counted.0 += one;
        }
    }
    let mut mendings = Vec::new();
    for (more, values) in surplus.into_values() {
        for _ in 0..more.unsigned_abs() {
            let values = Some(values.clone());
            let (before, after) = if more > 0 { (None, values) } else { (values, None) };
            mendings.push(Mending { before, after });
        }
    }
    Ok(mendings)
}

/// Writes what mends the rows, in one transaction, while the stream is held; returns how many rows that were.
async fn write(
    context: &Context,
    patient: &Patient<'_>,
    moment: &Moment,
    mendings: Vec<Mending>,
) -> Result<i64, Error> {
    if mendings.is_empty() {
        return Ok(0);
    }
    let (mirror, count) = (&context.mirror, mendings.len());
    let mut sink = PostgresSink::open_beside(
        &mirror.target_name,
        &mirror.target,
        &mirror.object_name,
        context.epoch,
        moment.applied,
    )
    .await?;
    sink.session().run(WRITE_SETTINGS).await?;
    sink.use_operators_of(&patient.target.type_schemas.iter().cloned().collect()).await?;
    let table = Arc::new(map(patient)?);
    let mut batch = Batch::new(sink.triggers_fire());
    for Mending { before, after } in mendings {
        let added = match (before, after) {
            (Some(old), None) => batch.delete(&table, tuple(&old)?),
            (Some(_), Some(new)) => batch.update(&table, None, tuple(&new)?),
            (None, Some(new)) => {
                batch.insert(&table, tuple(&new)?);
                true
            }
            (None, None) => true,
        };
        if !added {
            let message = format!("a row of table \"{}\" cannot be found on the target", table.source);
            return Err(Error::Blocked(Problem::new(SqlState::INTERNAL_ERROR, message)));
        }
    }
    batch.end = Some(BatchEnd { end_lsn: moment.applied, commit_time: None });
    fail_point!("rows are about to be repaired");
    sink.apply(&batch).await?;
    Ok(i64::try_from(count).unwrap_or(i64::MAX))
}

/// Maps the table as the stream would if it sent all values as text. Rows without a key are found by all that they are.
fn map(patient: &Patient<'_>) -> Result<TableMap, Error> {
    let Patient { plan, target, .. } = patient;
    let columns = plan.replicated_columns().map(|c| Column {
        key: false,
        name: c.name.clone(),
        type_oid: c.type_oid,
        type_modifier: -1,
    });
    let relation = Relation {
        oid: plan.source.oid,
        schema: plan.source.name.schema.clone(),
        name: plan.source.name.name.clone(),
        identity: if plan.key().is_some() { Identity::Default } else { Identity::Full },
        columns: columns.collect(),
    };
    let as_text = |_: u32, _: &TargetColumn| Some((Passage::FromText, "pg_catalog.text".to_owned()));
    TableMap::new(&relation, target, as_text, |_| true, plan.key()).map_err(Error::Blocked)
}

/// Writes values as a tuple of the stream.
fn tuple(values: &[Option<String>]) -> Result<Tuple, Error> {
    let mut bytes = BytesMut::new();
    bytes.put_u16(values.len() as u16);
    for value in values {
        match value {
            None => bytes.put_u8(b'n'),
            Some(text) => {
                bytes.put_u8(b't');
                bytes.put_u32(text.len() as u32);
                bytes.put_slice(text.as_bytes());
            }
        }
    }
    Ok(Tuple::split_from(&mut bytes.freeze())?)
}
