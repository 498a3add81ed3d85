//! The mirror's slot, as SQL sees it. Making it and streaming from it is [`super::replication`]'s.

use catalog::slot::SlotHealth;
use pg::{Lsn, SqlState};

use crate::error::{Error, Problem};
use crate::progress::SlotFacts;
use crate::session::PeerSession;

/// Returns what the source says of the slot; `None` when it is not there.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn facts(source: &PeerSession, slot: &str) -> Result<Option<SlotFacts>, Error> {
    // Columns that came with later versions are read from the row as a whole, and are NULL before.
    let query = "
        select s.confirmed_flush_lsn::text, s.active_pid,
               case when j ->> 'invalidation_reason' is not null then 'invalidation_reason is ' || (j ->> 'invalidation_reason')
                    -- PostgreSQL 16 says so of every slot that it has invalidated; only a standby's can conflict.
                    when j ->> 'conflicting' = 'true' and pg_catalog.pg_is_in_recovery() then 'it conflicts with recovery'
                    when s.wal_status = 'lost' then 'wal_status is lost, its WAL was removed (max_slot_wal_keep_size)' end,
               case when s.slot_type <> 'logical' then 'It is ' || s.slot_type
                    when s.plugin <> 'pgoutput' then 'Its plugin is ' || s.plugin
                    when s.database <> pg_catalog.current_database() then 'It is one of database ' || s.database end
        from pg_catalog.pg_replication_slots s, pg_catalog.to_jsonb(s) j where s.slot_name = $1";
    let row = source.client.query_opt(query, &[&slot]).await.map_err(|e| source.error(&e))?;
    Ok(row.map(|row| SlotFacts {
        confirmed_flush: row.get::<_, Option<&str>>(0).and_then(|t| t.parse().ok()),
        active_pid: row.get(1),
        lost: row.get(2),
        foreign: row.get(3),
    }))
}

/// Returns what the slot holds back on the source.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn health(source: &PeerSession, slot: &str) -> Result<SlotHealth, Error> {
    let query = "
        select case when s.restart_lsn is not null then pg_catalog.pg_wal_lsn_diff(w.wal_end, s.restart_lsn)::int8 end,
               coalesce(s.wal_status, 'lost'), s.safe_wal_size, (pg_catalog.to_jsonb(s) ->> 'failover')::boolean, s.confirmed_flush_lsn::text
        from pg_catalog.pg_replication_slots s,
             (select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn()
                          else pg_catalog.pg_current_wal_lsn() end as wal_end) w
        where s.slot_name = $1";
    let row = source.client.query_opt(query, &[&slot]).await.map_err(|e| source.error(&e))?;
    Ok(row.map_or_else(SlotHealth::missing, |row| SlotHealth {
        wal_bytes: row.get(0),
        wal_status: row.get(1),
        safe_wal_size: row.get(2),
        failover: row.get(3),
        confirmed_flush: row.get::<_, Option<&str>>(4).and_then(|t| t.parse().ok()),
    }))
}

/// Removes the slot if it is there; a walsender that still uses it is ended, since whoever holds the mirror's lease owns the slot.
///
/// # Errors
/// [`Error::Transient`] 55006 while somebody else uses it.
pub async fn drop(source: &PeerSession, slot: &str) -> Result<(), Error> {
    free(source, slot).await?;
    let statement = "select pg_catalog.pg_drop_replication_slot(slot_name) from pg_catalog.pg_replication_slots where slot_name = $1";
    source.client.execute(statement, &[&slot]).await.map_err(|e| source.error(&e))?;
    Ok(())
}

/// Ends a walsender that an earlier owner left behind, and waits until the slot is free.
///
/// # Errors
/// [`Error::Transient`] 55006 if the slot is still in use after two seconds, or may not be freed.
pub async fn free(source: &PeerSession, slot: &str) -> Result<(), Error> {
    let terminate = "select pg_catalog.pg_terminate_backend(active_pid) from pg_catalog.pg_replication_slots
                     where slot_name = $1 and active_pid is not null";
    for _ in 0..20 {
        match facts(source, slot).await? {
            Some(SlotFacts { active_pid: Some(_), .. }) => {}
            _ => return Ok(()),
        }
        // Without the privilege the walsender ends by itself, once it notices that nobody answers.
        let _ = source.client.execute(terminate, &[&slot]).await;
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    Err(Error::Transient(Problem::new(
        SqlState::OBJECT_IN_USE,
        format!("replication slot \"{slot}\" is in use by another session"),
    )))
}

/// Returns the end of the source's WAL. It is written first: with `synchronous_commit = off`, a commit that users have seen may not be
/// on disk, and a walsender sends only what is.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn push_wal(source: &PeerSession) -> Result<Lsn, Error> {
    let query = "select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn()
                             else pg_catalog.pg_logical_emit_message(true, 'peergate', '') end::text";
    read_lsn(source, query).await
}

/// Returns the end of the source's WAL, without writing anything.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn wal_end(source: &PeerSession) -> Result<Lsn, Error> {
    let query = "select case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn()
                             else pg_catalog.pg_current_wal_lsn() end::text";
    read_lsn(source, query).await
}

async fn read_lsn(source: &PeerSession, query: &str) -> Result<Lsn, Error> {
    let row = source.client.query_one(query, &[]).await.map_err(|e| source.error(&e))?;
    row.get::<_, &str>(0).parse().map_err(|e| Error::protocol(&source.peer, e))
}
