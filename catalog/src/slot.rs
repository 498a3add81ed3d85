//! Slots of mirrors: what they hold back on their sources, looked at whatever the mirror's state is.

use std::time::Duration;

use pg::Lsn;
use serde_json::Value;

use crate::{Catalog, Error};

/// A mirror whose slot is to be looked at.
#[derive(Clone, Debug)]
pub struct SlotCheck {
    /// The mirror.
    pub mirror_id: i64,
    /// Its name.
    pub mirror: String,
    /// The slot.
    pub slot: String,
    /// The source peer, with sealed secrets.
    pub source: Value,
    /// WAL that the slot may keep, in bytes; 0: no limit.
    pub budget: i64,
    /// The slot is to be dropped when it keeps more.
    pub drop_over_budget: bool,
    /// It kept more when it was last looked at.
    pub was_over_budget: bool,
    /// Its `wal_status` when it was last looked at.
    pub was_status: Option<String>,
}

/// How a slot stands, as the source says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotHealth {
    /// WAL that is kept for it, in bytes; `None`: it is lost.
    pub wal_bytes: Option<i64>,
    /// `reserved`, `extended`, `unreserved`, `lost`, or `missing`.
    pub wal_status: String,
    /// WAL that may still be written before it is in danger; `None`: no limit.
    pub safe_wal_size: Option<i64>,
    /// It is synchronized to standbys; `None` before PostgreSQL 17.
    pub failover: Option<bool>,
    /// What was acknowledged to it.
    pub confirmed_flush: Option<Lsn>,
}

impl SlotHealth {
    /// How a slot stands that is not there.
    pub fn missing() -> SlotHealth {
        SlotHealth { wal_status: "missing".to_owned(), ..SlotHealth::default() }
    }
}

impl Catalog {
    /// Takes the mirrors whose slots nobody has looked at for `interval`, at most `limit`: of several processes one gets each.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn due_slot_checks(&self, interval: Duration, limit: i64) -> Result<Vec<SlotCheck>, Error> {
        let statement = "
            with due as (
                select r.mirror_id from peergate.mirror_runtime r
                where r.snapshot_lsn is not null and r.state <> 'completed' and (r.copied_at is not null or r.state = 'copying')
                  and (r.slot_checked_at is null
                       or r.slot_checked_at not between clock_timestamp() - make_interval(secs => $1) and clock_timestamp())
                order by r.slot_checked_at nulls first limit $2 for update skip locked
            ), taken as (
                update peergate.mirror_runtime r set slot_checked_at = clock_timestamp() from due where r.mirror_id = due.mirror_id
                returning r.mirror_id, r.slot_over_budget, r.slot_wal_status
            )
            select d.id, d.name, d.object_name, peergate.peer_document(d.source_id),
                   pg_size_bytes(peergate.mirror_option(d.options, 'slot_wal_budget')),
                   peergate.mirror_option(d.options, 'slot_wal_over_budget') = 'drop_slot', t.slot_over_budget, t.slot_wal_status
            from taken t join peergate.mirror_definitions d on d.id = t.mirror_id";
        let rows = self.client().await?.query(statement, &[&interval.as_secs_f64(), &limit]).await?;
        let check = |row: tokio_postgres::Row| SlotCheck {
            mirror_id: row.get(0),
            mirror: row.get(1),
            slot: row.get(2),
            source: row.get(3),
            budget: row.get(4),
            drop_over_budget: row.get(5),
            was_over_budget: row.get(6),
            was_status: row.get(7),
        };
        Ok(rows.into_iter().map(check).collect())
    }

    /// Stores how a mirror's slot stands.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_slot_health(&self, mirror_id: i64, health: &SlotHealth, over_budget: bool) -> Result<(), Error> {
        let statement = "
            update peergate.mirror_runtime
            set slot_wal_bytes = $2, slot_wal_status = $3, slot_safe_wal_size = $4, slot_failover = $5, slot_over_budget = $6
            where mirror_id = $1";
        let SlotHealth { wal_bytes, wal_status, safe_wal_size, failover, .. } = health;
        let client = self.client().await?;
        client.execute(statement, &[&mirror_id, wal_bytes, wal_status, safe_wal_size, failover, &over_budget]).await?;
        Ok(())
    }
}
