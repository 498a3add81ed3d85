//! The mirror's row on the target: how far it is, and who may write.
//!
//! The row lives with the data and is written in the same transaction, so the two can never disagree, whatever dies.

use std::time::Duration;

use pg::name::quote_literal;
use pg::{Lsn, SqlState};

use super::{marks, shapes};
use crate::error::Error;
use crate::session::PeerSession;

/// Held while the schema is made or removed, so that mirrors on one target do not trip over each other. `peergate` in ASCII.
pub(crate) const LOCK: &str = "select pg_catalog.pg_advisory_xact_lock(8098991003110929509)";

/// The main stream's lane; a table that comes later has one of its own until it has caught up.
pub const MAIN_LANE: i32 = 0;

/// The lane of tables that come later.
pub const LATE_LANE: i32 = 1;

/// What is made on the target, with [`marks::SCHEMA`] and [`shapes::SCHEMA`].
const SCHEMA: &str = "
    create schema if not exists peergate;
    create table if not exists peergate.progress (
        mirror      text not null,
        lane        integer not null,
        epoch       bigint not null,
        applied_lsn pg_lsn not null,
        commit_time timestamptz,
        updated_at  timestamptz not null default now(),
        primary key (mirror, lane)
    ) with (fillfactor = 10);
    comment on table  peergate.progress             is 'How far each Peergate mirror is on this target. Written in the same transaction as the rows.';
    comment on column peergate.progress.mirror      is 'The mirror''s object name, which its slot on the source has too.';
    comment on column peergate.progress.lane        is 'Which of the mirror''s streams.';
    comment on column peergate.progress.epoch       is 'The owner that may write; an older one is refused.';
    comment on column peergate.progress.applied_lsn is 'All source WAL before this is applied; 0/0: the copy is not complete.';
    comment on column peergate.progress.commit_time is 'When the last applied transaction was committed on the source.';
    comment on column peergate.progress.updated_at  is 'When this row was last written.';
";

/// Longest wait for the row, which the transaction of an older owner may hold.
const CLAIM_TIMEOUT: &str = "set lock_timeout = '30s'";

/// How long ended sessions may take to go.
const END_PAUSE: Duration = Duration::from_millis(50);

/// How often they are looked for.
const END_ATTEMPTS: u32 = 100;

/// Sessions and transactions that write for a mirror hold an advisory lock, shared, of two numbers: one for the mirror, and the epoch. So
/// those of earlier owners can be found, by whoever may end them.
const MARK: &str = "pg_catalog.hashtext('peergate/' || $1), ($2::int8 % 2147483647)::int4";

/// An epoch that no owner has: all are earlier.
pub const AFTER_ALL: i64 = 2_147_483_646;

/// Ends the sessions on the target that write for the mirror with this epoch or an older one: to be done at the beginning of an attempt,
/// when none of them is to be there. Newer owners are left alone. Where the role may not do that, they are waited for in
/// [`claim`].
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn end_earlier_sessions(target: &PeerSession, mirror: &str, epoch: i64) -> Result<(), Error> {
    let end = "
        select pg_catalog.pg_terminate_backend(l.pid)
        from (select distinct l.pid from pg_catalog.pg_locks l
              where l.locktype = 'advisory' and l.objsubid = 2 and l.granted and l.pid <> pg_catalog.pg_backend_pid()
                and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())
                and l.classid = (pg_catalog.hashtext('peergate/' || $1)::int8 & 4294967295)::oid
                and l.objid::int8 <= $2::int8 % 2147483647) l";
    for attempt in 0..END_ATTEMPTS {
        match target.client.execute(end, &[&mirror, &epoch]).await {
            Ok(0) => break,
            Ok(_) if attempt == 0 => tracing::info!("sessions of an earlier attempt on the target are ended"),
            Ok(_) => {}
            Err(error) if error.code().is_some_and(|c| c.code() == SqlState::INSUFFICIENT_PRIVILEGE.as_str()) => break,
            Err(error) => return Err(target.error(&error)),
        }
        tokio::time::sleep(END_PAUSE).await;
    }
    Ok(())
}

/// Makes the row if it is missing and takes it over: from now on an older owner writes nothing.
///
/// A transaction that the older owner has open is waited for; what it committed is in the returned position.
///
/// # Errors
/// [`Error::Fenced`] if a newer owner has the row; [`Error::Transient`] 55P03 if an older one holds it too long.
pub async fn claim(target: &PeerSession, mirror: &str, epoch: i64) -> Result<Lsn, Error> {
    // In one transaction: another mirror's removal takes the table away when it finds no row in it. What is there already need not be
    // made, and may be somebody else's who lets us use it.
    target.run(&format!("{CLAIM_TIMEOUT}; begin; {LOCK}")).await?;
    if !exists(target).await? {
        target.run(SCHEMA).await?;
        target.run(marks::SCHEMA).await?;
        target.run(shapes::SCHEMA).await?;
    }
    // A lane of an older owner is at its end: what it has under way finds no row and is undone.
    let other_lanes = format!("delete from peergate.progress where mirror = {} and lane <> 0", quote_literal(mirror));
    let statement = "
        insert into peergate.progress as p (mirror, lane, epoch, applied_lsn) values ($1, 0, $2, '0/0')
        on conflict (mirror, lane) do update set epoch = excluded.epoch, updated_at = pg_catalog.now() where p.epoch <= excluded.epoch
        returning applied_lsn::text";
    let row = target.client.query_opt(statement, &[&mirror, &epoch]).await.map_err(|e| target.error(&e))?;
    let other_lanes = if row.is_some() { other_lanes } else { String::new() };
    target.run(&format!("{other_lanes}; commit; set lock_timeout = 0")).await?;
    let row = row.ok_or(Error::Fenced)?;
    let mark = format!("select pg_catalog.pg_advisory_lock_shared({MARK})");
    target.client.execute(&mark, &[&mirror, &epoch]).await.map_err(|e| target.error(&e))?;
    row.get::<_, &str>(0).parse().map_err(|e| Error::protocol(&target.peer, e))
}

async fn exists(target: &PeerSession) -> Result<bool, Error> {
    let query = "select bool_and(pg_catalog.to_regclass(n) is not null)
                 from unnest(array['peergate.progress', 'peergate.progress_tables', 'peergate.relations']) n";
    Ok(target.client.query_one(query, &[]).await.map_err(|e| target.error(&e))?.get(0))
}

/// Checks, within the transaction of the session, that a lane's epoch is still ours, and keeps it so until the transaction ends. The lane
/// does not move meanwhile, so each holds its own.
///
/// # Errors
/// [`Error::Fenced`] if another process has taken over.
pub async fn hold(target: &PeerSession, mirror: &str, lane: i32, epoch: i64) -> Result<(), Error> {
    let query = format!(
        "with marked as materialized (select pg_catalog.pg_advisory_xact_lock_shared({MARK}))
         select from peergate.progress, marked where mirror = $1 and lane = $3 and epoch = $2 for share of progress"
    );
    let row = target.client.query_opt(&query, &[&mirror, &epoch, &lane]).await.map_err(|e| target.error(&e))?;
    row.map(|_| ()).ok_or(Error::Fenced)
}

/// Opens the lane of tables that come later: at the position of their copy, or where it was left (`None`). Returns where it is.
///
/// # Errors
/// [`Error::Fenced`] if another process has taken over.
pub async fn open_late_lane(target: &PeerSession, mirror: &str, epoch: i64, at: Option<Lsn>) -> Result<Lsn, Error> {
    // One statement for both: what an earlier session of ours has under way on the row is waited for.
    let statement = format!(
        "insert into peergate.progress as p (mirror, lane, epoch, applied_lsn) values ($1, {LATE_LANE}, $2, coalesce($3::text::pg_lsn, '0/0'))
         on conflict (mirror, lane) do update
         set epoch = excluded.epoch, applied_lsn = coalesce($3::text::pg_lsn, p.applied_lsn), commit_time = null
         returning applied_lsn::text"
    );
    target.run("begin").await?;
    hold(target, mirror, MAIN_LANE, epoch).await?;
    let at = at.map(|lsn| lsn.to_string());
    let row = target.client.query_one(&statement, &[&mirror, &epoch, &at]).await.map_err(|e| target.error(&e))?;
    target.run("commit").await?;
    row.get::<_, &str>(0).parse().map_err(|e| Error::protocol(&target.peer, e))
}

/// Closes a lane, within the transaction of the session.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn close_lane(target: &PeerSession, mirror: &str, lane: i32) -> Result<(), Error> {
    let statement = "delete from peergate.progress where mirror = $1 and lane = $2";
    target.client.execute(statement, &[&mirror, &lane]).await.map_err(|e| target.error(&e))?;
    Ok(())
}

/// Begins anew: no table has a copy that counts, and the main lane is nowhere.
///
/// # Errors
/// [`Error::Fenced`] if another process has taken over.
pub async fn reset(target: &PeerSession, mirror: &str, epoch: i64) -> Result<(), Error> {
    target.run("begin").await?;
    hold(target, mirror, MAIN_LANE, epoch).await?;
    let name = quote_literal(mirror);
    target
        .run(&format!(
            "delete from peergate.progress_tables where mirror = {name};
             delete from peergate.progress where mirror = {name} and lane <> {MAIN_LANE};
             update peergate.progress set applied_lsn = '0/0', commit_time = null where mirror = {name} and lane = {MAIN_LANE};
             commit"
        ))
        .await
}

/// Moves the position of a lane, within the transaction of the session.
///
/// # Errors
/// [`Error::Fenced`] if the row is not as we left it: another process has taken over.
pub async fn advance(
    target: &PeerSession,
    mirror: &str,
    lane: i32,
    epoch: i64,
    from: Lsn,
    to: Lsn,
    commit_time: Option<i64>,
) -> Result<(), Error> {
    let statement = "
        update peergate.progress
        set applied_lsn = $4::text::pg_lsn, updated_at = pg_catalog.now(),
            commit_time = coalesce('2000-01-01 00:00:00+00'::timestamptz + $5 * interval '1 microsecond', commit_time)
        where mirror = $1 and lane = $6 and epoch = $2 and applied_lsn = $3::text::pg_lsn";
    let commit_time = commit_time.map(|t| t as f64);
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 6] =
        [&mirror, &epoch, &from.to_string(), &to.to_string(), &commit_time, &lane];
    match target.client.execute(statement, &parameters).await.map_err(|e| target.error(&e))? {
        1 => Ok(()),
        _ => Err(Error::Fenced),
    }
}

/// Removes the mirror's row, and what we made on the target when it was the last one.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn remove(target: &PeerSession, mirror: &str) -> Result<(), Error> {
    if !exists(target).await? {
        return Ok(());
    }
    // The catalog may live in the same database, and then has the schema for itself: it is removed only when it is empty.
    let statement = format!(
        "begin; {LOCK};
        delete from peergate.progress where mirror = {name};
        delete from peergate.progress_tables where mirror = {name};
        delete from peergate.relations where mirror = {name};
        do $$
        declare
            stage text;
            extra text;
        begin
            foreach extra in array array['query_progress', 'query_progress_partitions'] loop
                if pg_catalog.to_regclass('peergate.' || extra) is not null then
                    execute pg_catalog.format('delete from peergate.%I where mirror = %L', extra, {name});
                end if;
            end loop;
            for stage in select relname from pg_catalog.pg_class
                         where relnamespace = 'peergate'::regnamespace and relkind = 'r' and pg_catalog.starts_with(relname, {stages}) loop
                execute pg_catalog.format('drop table peergate.%I', stage);
            end loop;
            if not exists (select from peergate.progress) then
                drop table peergate.progress, peergate.progress_tables, peergate.relations;
                drop table if exists peergate.query_progress, peergate.query_progress_partitions;
                if not exists (select from pg_catalog.pg_class where relnamespace = 'peergate'::regnamespace)
                   and not exists (select from pg_catalog.pg_proc where pronamespace = 'peergate'::regnamespace) then
                    drop schema peergate;
                end if;
            end if;
        end $$;
        commit",
        name = quote_literal(mirror),
        stages = quote_literal(&stage_prefix(mirror)),
    );
    target.run(&statement).await
}

fn stage_prefix(mirror: &str) -> String {
    format!("{mirror}_stage_")
}

/// Returns the name, as SQL, of the table in which a new copy gathers before it replaces the old one.
pub fn stage_table(mirror: &str, source_oid: u32) -> String {
    pg::TableName::new("peergate", format!("{}{source_oid}", stage_prefix(mirror))).quoted()
}
