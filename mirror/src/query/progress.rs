//! How far a mirror of a query is, on the target: written in the same transactions as the rows, so that the two never disagree.
//!
//! The progress row that all mirrors have ([`progress_row`]) says who may write; here is what was written. A round's partitions are noted before the first
//! of them is written, with their bounds, and each is marked in the transaction that writes its rows. So an attempt that follows writes exactly those that
//! are not marked.

use pg::name::quote_literal;

use super::watermark::Span;
use crate::error::Error;
use crate::session::PeerSession;
use crate::sink::progress_row::{self, LOCK, MAIN_LANE};

const SCHEMA: &str = "
    create table if not exists peergate.query_progress (
        mirror      text primary key,
        rounds      bigint not null default 0,
        reached     text,
        round       bigint,
        upper_bound text,
        replaces    boolean not null,
        updated_at  timestamptz not null default now()
    );
    comment on table  peergate.query_progress             is 'How far each Peergate mirror of a query is on this target. Written with the rows, by the mirror.';
    comment on column peergate.query_progress.mirror      is 'The mirror''s object name, as in peergate.progress.';
    comment on column peergate.query_progress.rounds      is 'Rounds that are completed and wrote something.';
    comment on column peergate.query_progress.reached     is 'Watermark up to which all rows are here; NULL: no round is completed, or there is no watermark.';
    comment on column peergate.query_progress.round       is 'Number of the round under way; NULL: none is.';
    comment on column peergate.query_progress.upper_bound is 'Watermark that the round under way reaches; NULL: there is no watermark.';
    comment on column peergate.query_progress.replaces    is 'The round under way, or the next, gathers its rows in a stage and replaces what the table holds.';
    comment on column peergate.query_progress.updated_at  is 'When this row was last written.';
    create table if not exists peergate.query_progress_partitions (
        mirror      text not null,
        partition   integer not null,
        lower_bound text,
        upper_bound text,
        rows        bigint,
        primary key (mirror, partition)
    );
    comment on table  peergate.query_progress_partitions             is 'Partitions of the rounds under way, of Peergate mirrors of queries. Written with the rows, by the mirror.';
    comment on column peergate.query_progress_partitions.mirror      is 'The mirror''s object name, as in peergate.progress.';
    comment on column peergate.query_progress_partitions.partition   is 'The partition''s number, counted from 1.';
    comment on column peergate.query_progress_partitions.lower_bound is 'Least watermark that is part of it; NULL: no limit.';
    comment on column peergate.query_progress_partitions.upper_bound is 'Greatest watermark that is part of it; NULL: no limit.';
    comment on column peergate.query_progress_partitions.rows        is 'Rows that were written; NULL: it is not done.';
";

/// A part of a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1.
    pub number: i32,
    /// Its watermarks.
    pub span: Span,
    /// Rows that were written; `None`: it is not done.
    pub rows: Option<i64>,
}

/// A round that was begun and is not completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// Its number.
    pub round: i64,
    /// The watermark that it reaches.
    pub upper: Option<String>,
    /// Its partitions, in order.
    pub partitions: Vec<Partition>,
}

/// What the target says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Rounds that are completed and wrote something.
    pub rounds: i64,
    /// The watermark up to which all rows are there.
    pub reached: Option<String>,
    /// The round under way, or the next, replaces what the table holds.
    pub replaces: bool,
    /// The round under way.
    pub open: Option<Open>,
}

/// Makes the relations and the mirror's row unless they are there. `replaces` is what its first round does.
///
/// # Errors
/// [`Error::Fenced`] if another process has taken over.
pub async fn prepare(target: &PeerSession, mirror: &str, epoch: i64, replaces: bool) -> Result<(), Error> {
    target.run(&format!("begin; {LOCK}")).await?;
    progress_row::hold(target, mirror, MAIN_LANE, epoch).await?;
    let exists = "select pg_catalog.to_regclass('peergate.query_progress') is not null and pg_catalog.to_regclass('peergate.query_progress_partitions') is not null";
    if !target.done(target.client.query_one(exists, &[])).await?.get::<_, bool>(0) {
        target.run(SCHEMA).await?;
    }
    let row = "insert into peergate.query_progress (mirror, replaces) values ($1, $2) on conflict (mirror) do nothing";
    target.done(target.client.execute(row, &[&mirror, &replaces])).await?;
    target.run("commit").await
}

/// Reads how far the mirror is.
///
/// # Errors
/// [`Error::Fenced`] if its row is gone; else as the server's SQLSTATE says.
pub async fn read(target: &PeerSession, mirror: &str) -> Result<Progress, Error> {
    let query = "select rounds, reached, round, upper_bound, replaces from peergate.query_progress where mirror = $1";
    let row = target.done(target.client.query_opt(query, &[&mirror])).await?.ok_or(Error::Fenced)?;
    let query = "
        select partition, lower_bound, upper_bound, rows from peergate.query_progress_partitions where mirror = $1 order by partition";
    let partitions = target.done(target.client.query(query, &[&mirror])).await?;
    let partition = |row: &tokio_postgres::Row| Partition {
        number: row.get(0),
        span: Span { from: row.get(1), to: row.get(2) },
        rows: row.get(3),
    };
    let open = row.get::<_, Option<i64>>(2).map(|round| Open {
        round,
        upper: row.get(3),
        partitions: partitions.iter().map(partition).collect(),
    });
    Ok(Progress { rounds: row.get(0), reached: row.get(1), replaces: row.get(4), open })
}

/// Notes what a round that begins is made of; what an earlier one left behind counts no more. `then` is run in the same transaction.
///
/// # Errors
/// [`Error::Fenced`] if another process has taken over.
pub async fn plan(
    target: &PeerSession,
    mirror: &str,
    epoch: i64,
    open: &Open,
    replaces: bool,
    then: &str,
) -> Result<(), Error> {
    target.run("begin").await?;
    progress_row::hold(target, mirror, MAIN_LANE, epoch).await?;
    target
        .run(&format!("delete from peergate.query_progress_partitions where mirror = {}", quote_literal(mirror)))
        .await?;
    let statement = "
        update peergate.query_progress set round = $2, upper_bound = $3, replaces = $4, updated_at = pg_catalog.now() where mirror = $1";
    target.done(target.client.execute(statement, &[&mirror, &open.round, &open.upper, &replaces])).await?;
    let statement = "
        insert into peergate.query_progress_partitions (mirror, partition, lower_bound, upper_bound)
        select $1, p.partition, p.lower, p.upper from unnest($2::int4[], $3::text[], $4::text[]) p (partition, lower, upper)";
    let numbers: Vec<i32> = open.partitions.iter().map(|p| p.number).collect();
    let lowers: Vec<Option<&str>> = open.partitions.iter().map(|p| p.span.from.as_deref()).collect();
    let uppers: Vec<Option<&str>> = open.partitions.iter().map(|p| p.span.to.as_deref()).collect();
    target.done(target.client.execute(statement, &[&mirror, &numbers, &lowers, &uppers])).await?;
    if !then.is_empty() {
        target.run(then).await?;
    }
    fail_point!("query round noted");
    target.run("commit").await
}

/// Notes, within the transaction of the session, that a partition is done.
///
/// # Errors
/// [`Error::Fenced`] if it was done by somebody else.
pub async fn note_partition(target: &PeerSession, mirror: &str, number: i32, rows: i64) -> Result<(), Error> {
    let statement =
        "update peergate.query_progress_partitions set rows = $3 where mirror = $1 and partition = $2 and rows is null";
    match target.done(target.client.execute(statement, &[&mirror, &number, &rows])).await? {
        1 => Ok(()),
        _ => Err(Error::Fenced),
    }
}

/// Notes, within the transaction of the session, that the round under way is completed.
///
/// # Errors
/// [`Error::Fenced`] if it is another one, or a partition of it is not done.
pub async fn complete(target: &PeerSession, mirror: &str, round: i64) -> Result<(), Error> {
    let statement = "
        update peergate.query_progress p
        set rounds = rounds + 1, reached = coalesce(upper_bound, reached), round = null, upper_bound = null, replaces = false, updated_at = pg_catalog.now()
        where mirror = $1 and round = $2
          and not exists (select from peergate.query_progress_partitions q where q.mirror = p.mirror and q.rows is null)";
    if target.done(target.client.execute(statement, &[&mirror, &round])).await? != 1 {
        return Err(Error::Fenced);
    }
    target
        .run(&format!("delete from peergate.query_progress_partitions where mirror = {}", quote_literal(mirror)))
        .await
}

/// Begins anew: the next round takes all rows, which replace what the table holds.
///
/// # Errors
/// [`Error::Fenced`] if another process has taken over.
pub async fn begin_anew(target: &PeerSession, mirror: &str, epoch: i64) -> Result<(), Error> {
    target.run("begin").await?;
    progress_row::hold(target, mirror, MAIN_LANE, epoch).await?;
    let name = quote_literal(mirror);
    target
        .run(&format!(
            "delete from peergate.query_progress_partitions where mirror = {name};
             update peergate.query_progress
             set reached = null, round = null, upper_bound = null, replaces = true, updated_at = pg_catalog.now() where mirror = {name};
             commit"
        ))
        .await
}
