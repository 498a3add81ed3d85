//! Which peers are to be connected to, to see whether they can be, and what came of it.

use std::time::Duration;

use serde_json::Value;

use crate::{Catalog, Error};

/// A peer that is to be connected to.
#[derive(Clone, Debug)]
pub struct PeerCheck {
    /// Its number.
    pub peer_id: i64,
    /// Its name.
    pub name: String,
    /// Its options, with sealed secrets.
    pub document: Value,
}

impl Catalog {
    /// Takes the peers whose reachability an alert watches and that nobody has connected to for `interval`, at most `limit`: of several
    /// processes one gets each.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn due_peer_checks(&self, interval: Duration, limit: i64) -> Result<Vec<PeerCheck>, Error> {
        // Peers that somebody is about to drop are left alone, so that nobody waits for him.
        let statement = "
            with watched as (
                select p.id from peergate.peers p
                where exists (
                    select from peergate.alert_definitions a
                    left join peergate.mirror_definitions m on a.on_kind = 'mirror' and (a.mirror_id is null or a.mirror_id = m.id)
                    where a.enabled and a.conditions @> '[{\"metric\": \"unreachable_seconds\"}]'
                      and case a.on_kind when 'mirror' then p.id in (m.source_id, m.target_id) else a.peer_id is null or a.peer_id = p.id end)
                for key share skip locked
            ), new as (
                insert into peergate.peer_reachability (peer_id, checked_at) select id, clock_timestamp() from watched
                on conflict do nothing returning peer_id
            ), due as (
                select h.peer_id from peergate.peer_reachability h join watched on watched.id = h.peer_id
                where h.checked_at is null or h.checked_at not between clock_timestamp() - make_interval(secs => $1) and clock_timestamp()
                order by h.checked_at nulls first limit $2 for update of h skip locked
            ), taken as (
                update peergate.peer_reachability h set checked_at = clock_timestamp() from due where h.peer_id = due.peer_id returning h.peer_id
            )
            select p.id, p.name, peergate.peer_document(p.id)
            from (select peer_id from new union all select peer_id from taken) t join peergate.peers p on p.id = t.peer_id";
        let rows = self.client().await?.query(statement, &[&interval.as_secs_f64(), &limit]).await?;
        let check =
            |row: tokio_postgres::Row| PeerCheck { peer_id: row.get(0), name: row.get(1), document: row.get(2) };
        Ok(rows.into_iter().map(check).collect())
    }

    /// Stores whether a peer could be connected to; `error` says why not.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_reachability(&self, peer_id: i64, error: Option<&str>) -> Result<(), Error> {
        let statement = "
            update peergate.peer_reachability
            set reached_at = case when $2::text is null then clock_timestamp() else reached_at end,
                unreachable_since = case when $2 is not null then coalesce(unreachable_since, checked_at) end, error = $2
            where peer_id = $1";
        self.client().await?.execute(statement, &[&peer_id, &error]).await?;
        Ok(())
    }
}
