//! What is asked of the source: how far a round goes, who is waited for, and a snapshot to read at.

use std::time::Duration;

use catalog::event::Event;
use catalog::mirror::query::WaitFor;
use pg::name::{quote_ident, quote_literal};
use pg::{SqlState, TableName};

use super::preflight::Plan;
use super::template::Limit;
use super::watermark::{Border, Kind};
use crate::error::{Error, Problem};
use crate::session::PeerSession;
use crate::worker::Context;

/// By what sessions that read for mirrors of queries are known to each other: they write nothing, and are not waited for.
const READER: &str = "peergate reads";

/// Between the moment that `now()` tells and the one at which its transaction can be seen by others, nothing lies but a few instructions; the process may
/// have to wait for its turn in between.
const UNSEEN: Duration = Duration::from_millis(50);

/// How long it is waited between two looks at those that are waited for: at first, and at most.
const LOOKS: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(500)];

/// After which an event says who is waited for.
const WAIT_TOLD: Duration = Duration::from_secs(10);

/// Makes a session one that reads: with the search path of its role, as the query was written for it.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn become_reader(source: &PeerSession) -> Result<(), Error> {
    source.run(&format!("reset search_path; set application_name = {}", quote_literal(READER))).await
}

/// Sorts an error of what the query does.
pub fn of_reading(source: &PeerSession, error: &tokio_postgres::Error) -> Error {
    match source.error(error) {
        // Elsewhere it passes, as a standby may become the primary.
        Error::Transient(problem) if problem.sqlstate.as_str() == "25006" => {
            Error::Blocked(problem.hint("A mirror's query may only read."))
        }
        other => other,
    }
}

/// How far a round goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// The greatest watermark.
    pub upper: String,
    /// The least one that is new; `None`: no limit.
    pub from: Option<String>,
    /// No transaction had this number yet.
    xmax: u64,
}

/// The table or query that is asked for the watermark's values.
fn asked(plan: &Plan) -> String {
    match &plan.query.watermark_table {
        Some(table) => TableName::quoted(table),
        None => format!("({}\n) asked", plan.template.whole(&Limit::Nothing)),
    }
}

fn column(plan: &Plan) -> String {
    quote_ident(plan.query.watermark_column.as_deref().unwrap_or_default())
}

/// Chooses how far a round goes: to the greatest watermark that is there. `None`: nothing is new since `reached`.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn choose(
    plan: &Plan,
    kind: Kind,
    source: &PeerSession,
    reached: Option<&str>,
) -> Result<Option<Bound>, Error> {
    let (column, asked) = (column(plan), asked(plan));
    let mut conditions = Vec::new();
    if kind.is_time() {
        conditions.push(format!("{column} < 'infinity'"));
    }
    let mut next = "null::pg_catalog.text".to_owned();
    if let Some(reached) = reached {
        let reached = kind.literal(reached);
        conditions.push(format!("{column} > {reached}"));
        next = kind.next(&reached);
    }
    let condition = if conditions.is_empty() { String::new() } else { format!("where {}", conditions.join(" and ")) };
    let query = format!(
        "select pg_catalog.max({column})::{}::pg_catalog.text, {next},
                pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text
         from {asked} {condition}",
        kind.sql()
    );
    let row = source.watched(source.client.query_one(&query, &[])).await.map_err(|e| of_reading(source, &e))?;
    let Some(upper) = row.get(0) else { return Ok(None) };
    Ok(Some(Bound { upper, from: row.get(1), xmax: number(source, row.get(2))? }))
}

fn number(source: &PeerSession, text: &str) -> Result<u64, Error> {
    text.parse().map_err(|e| Error::protocol(&source.peer, e))
}

/// Returns the borders at which values from `from` to `to` are divided so that each part has the wanted number of rows, or more if they have the same value.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn borders(
    plan: &Plan,
    kind: Kind,
    source: &PeerSession,
    from: Option<&str>,
    to: Option<&str>,
) -> Result<Vec<Border>, Error> {
    let (column, asked, rows) = (column(plan), asked(plan), plan.query.partition_rows);
    let mut conditions = vec![format!("{column} < {}", kind.literal(kind.greatest()))];
    if let Some(from) = from {
        conditions.push(format!("{column} >= {}", kind.literal(from)));
    }
    if let Some(to) = to {
        conditions.push(format!("{column} <= {}", kind.literal(to)));
    }
    let query = format!(
        "select r.b::pg_catalog.text, {}
         from (select {column}::{} as b, pg_catalog.row_number() over (order by {column}) as n from {asked} where {}) r
         where n % {rows} = 0 group by r.b order by r.b",
        kind.next("r.b"),
        kind.sql(),
        conditions.join(" and ")
    );
    let rows = source.watched(source.client.query(&query, &[])).await.map_err(|e| of_reading(source, &e))?;
    Ok(rows.iter().map(|row| Border { last: row.get(0), next: row.get(1) }).collect())
}

/// Waits until no transaction is open any more that was when the bound had been chosen. A row below the bound that is committed later than it was looked for would be
/// one of theirs: watermarks are made in the transaction that commits them, later ones are greater.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says, [`Error::Transient`] if the catalog cannot be reached.
pub async fn wait(
    context: &Context,
    plan: &Plan,
    kind: Kind,
    source: &PeerSession,
    round: i64,
    bound: &Bound,
) -> Result<(), Error> {
    let all = match plan.query.wait_for {
        WaitFor::Nothing => return Ok(()),
        WaitFor::Writers => false,
        WaitFor::All => true,
    };
    let open = if all {
        if kind.is_time() {
            tokio::time::sleep(UNSEEN).await;
        }
        open_transactions(source).await?
    } else {
        Vec::new()
    };
    let begun = tokio::time::Instant::now();
    let (mut pause, mut told, mut event_told) = (LOOKS[0], None, false);
    loop {
        let query = "
            select pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::pg_catalog.text,
                   array(select distinct l.pid from pg_catalog.pg_locks l
                         where l.locktype = 'virtualxid' and l.granted and l.virtualxid = any ($1) and l.pid is not null order by l.pid)";
        let row = source.done(source.client.query_one(query, &[&open])).await?;
        let (writes, pids) = (number(source, row.get(0))? < bound.xmax, row.get::<_, Vec<i32>>(1));
        let what = match &pids[..] {
            [] if !writes => break,
            [] => "a transaction that writes, perhaps of another database or a prepared one".to_owned(),
            [pid] => format!("the open transaction of process {pid}"),
            [pid, others @ ..] => format!("the open transactions of process {pid} and {} others", others.len()),
        };
        if begun.elapsed() > LOOKS[1] && told.as_ref() != Some(&what) {
            context
                .catalog
                .set_round_waiting(context.mirror.id, round, Some(&format!("{what} on peer \"{}\"", source.peer)))
                .await?;
            told = Some(what.clone());
        }
        if begun.elapsed() > WAIT_TOLD && !event_told {
            let event = Event::warning("round", format!("round {round} waits for {what} on peer \"{}\"", source.peer));
            let event = event
                .detail("It was open when the round's upper bound was chosen, and could still commit a row below it.")
                .hint("End it, or see option wait_for_transactions.");
            context.event(&event).await?;
            event_told = true;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LOOKS[1]);
    }
    if told.is_some() {
        context.catalog.set_round_waiting(context.mirror.id, round, None).await?;
    }
    Ok(())
}

/// Returns the virtual numbers of the database's open transactions, but for those that only vacuum or read for mirrors of queries.
async fn open_transactions(source: &PeerSession) -> Result<Vec<String>, Error> {
    let query = "
        select l.virtualxid
        from pg_catalog.pg_locks l join pg_catalog.pg_stat_activity a on a.pid = l.pid
        where l.locktype = 'virtualxid' and l.granted and l.mode = 'ExclusiveLock' and l.pid <> pg_catalog.pg_backend_pid()
          and a.datid = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
          -- Autovacuum has no user.
          and a.usesysid is not null and coalesce(a.application_name, '') <> $1";
    let rows = source.done(source.client.query(query, &[&READER])).await?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

/// Begins the transaction in which a round is read.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn open_snapshot(source: &PeerSession) -> Result<(), Error> {
    source.run("begin transaction isolation level repeatable read, read only").await?;
    // The first statement takes the snapshot.
    source.run("select").await
}

/// Exports the snapshot of the session's transaction.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn export(source: &PeerSession) -> Result<String, Error> {
    let row = source.done(source.client.query_one("select pg_catalog.pg_export_snapshot()", &[])).await?;
    Ok(row.get(0))
}

/// Begins a transaction that reads at an exported snapshot.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says; [`Error::Transient`] if the snapshot is gone.
pub async fn import(source: &PeerSession, snapshot: &str) -> Result<(), Error> {
    source.run("begin transaction isolation level repeatable read, read only").await?;
    match source.run(&format!("set transaction snapshot {}", quote_literal(snapshot))).await {
        Err(Error::Blocked(problem)) => Err(Error::Transient(problem)),
        result => result,
    }
}

/// Returns the numbers that limit the snapshot of the session's transaction: all transactions before the first have ended, and none has the second yet.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn transaction_numbers(source: &PeerSession) -> Result<(u64, u64), Error> {
    let query = "
        select pg_catalog.pg_snapshot_xmin(s)::pg_catalog.text, pg_catalog.pg_snapshot_xmax(s)::pg_catalog.text from pg_catalog.pg_current_snapshot() s";
    let row = source.done(source.client.query_one(query, &[])).await?;
    Ok((number(source, row.get(0))?, number(source, row.get(1))?))
}

/// Checks that what the session's transaction has read was there for its snapshot to see: who rewrites a table, truncates it or puts another in its place after
/// the snapshot leaves an empty table to it, without any error.
///
/// # Errors
/// [`Error::CopyAgain`] if that was so.
pub async fn check_not_rewritten(source: &PeerSession) -> Result<(), Error> {
    let query = "
        select l.relation::pg_catalog.int8, c.relname::pg_catalog.text
        from pg_catalog.pg_locks l left join pg_catalog.pg_class c on c.oid = l.relation
        where l.locktype = 'relation' and l.pid = pg_catalog.pg_backend_pid()
          and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
          and (c.oid is null or c.relkind in ('r', 'm') and c.relfilenode <> 0
               and c.relfilenode is distinct from pg_catalog.pg_relation_filenode(c.oid::pg_catalog.regclass))
        limit 1";
    let Some(row) = source.done(source.client.query_opt(query, &[])).await? else { return Ok(()) };
    let table = match row.get::<_, Option<&str>>(1) {
        Some(name) => format!("table \"{name}\""),
        None => format!("a table (oid {})", row.get::<_, i64>(0)),
    };
    Err(Error::CopyAgain(
        Problem::new(
            SqlState::WRONG_STATE,
            format!("{table} was rewritten, truncated or replaced while the query read it"),
        )
        .detail("The round's snapshot no longer shows its rows; the round goes on with a new one."),
    ))
}
