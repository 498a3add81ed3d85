//! Leases: which process may run a mirror, and as which epoch.
//!
//! A lease keeps two processes from doing the same work; it does not keep a late writer out. That is the epoch's job: the target
//! refuses writes of an older one. So nothing here depends on clocks being right. Leases are measured by the catalog's clock alone; one that
//! holds for longer than a minute from now was given before that clock was set back, and counts for nothing.

use std::time::Duration;

use crate::{Catalog, Error};

/// A mirror as the engine's reconciliation sees it.
#[derive(Clone, Debug)]
pub struct Assignment {
    /// The mirror.
    pub mirror_id: i64,
    /// Its name.
    pub name: String,
    /// What the user wants: running or paused.
    pub wants_running: bool,
    /// Changes when a person said something that asks for a new attempt: the definition or a peer was changed.
    pub generation: String,
    /// This process holds the lease.
    pub held: bool,
    /// Nobody holds the lease.
    pub free: bool,
    /// A statement waits for its task to be done.
    pub has_task: bool,
    /// What the mirror's row says it is.
    pub state: String,
}

impl Catalog {
    /// Returns all mirrors and who holds them, from the point of view of `node_id`.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn assignments(&self, node_id: &str) -> Result<Vec<Assignment>, Error> {
        let query = "
            select d.id, d.name, d.desired_state = 'running', concat_ws(' ', d.updated_at, s.id, s.generation, t.id, t.generation),
                   l.node_id = $1 and l.expires_at > now(),
                   l.expires_at <= now() or l.node_id = $1 or l.expires_at > now() + interval '1 minute',
                   exists (select from peergate.tasks k where k.mirror_id = d.id and k.state in ('pending', 'running')), r.state
            from peergate.mirror_definitions d
            join peergate.peers s on s.id = d.source_id
            join peergate.peers t on t.id = d.target_id
            join peergate.mirror_runtime r on r.mirror_id = d.id
            join peergate.mirror_leases l on l.mirror_id = d.id
            order by d.id";
        let rows = self.client().await?.query(query, &[&node_id]).await?;
        let assignment = |row: tokio_postgres::Row| Assignment {
            mirror_id: row.get(0),
            name: row.get(1),
            wants_running: row.get(2),
            generation: row.get(3),
            held: row.get::<_, Option<bool>>(4).unwrap_or(false),
            free: row.get::<_, Option<bool>>(5).unwrap_or(true),
            has_task: row.get(6),
            state: row.get(7),
        };
        Ok(rows.into_iter().map(assignment).collect())
    }

    /// Takes the lease on a mirror for `ttl` if nobody else holds it, and returns the new epoch.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn acquire_lease(&self, mirror_id: i64, node_id: &str, ttl: Duration) -> Result<Option<i64>, Error> {
        let statement = "
            update peergate.mirror_leases
            set node_id = $2, epoch = epoch + 1, expires_at = clock_timestamp() + make_interval(secs => $3)
            where mirror_id = $1
              and (expires_at <= clock_timestamp() or node_id = $2 or expires_at > clock_timestamp() + interval '1 minute')
            returning epoch";
        let row = self.client().await?.query_opt(statement, &[&mirror_id, &node_id, &ttl.as_secs_f64()]).await?;
        Ok(row.map(|r| r.get(0)))
    }

    /// Prolongs the leases that this process holds on `mirror_ids` and returns those that it still holds.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn renew_leases(&self, mirror_ids: &[i64], node_id: &str, ttl: Duration) -> Result<Vec<i64>, Error> {
        let statement = "
            update peergate.mirror_leases set expires_at = clock_timestamp() + make_interval(secs => $3)
            where mirror_id = any ($1) and node_id = $2 and expires_at > clock_timestamp()
            returning mirror_id";
        let rows = self.client().await?.query(statement, &[&mirror_ids, &node_id, &ttl.as_secs_f64()]).await?;
        Ok(rows.into_iter().map(|r| r.get(0)).collect())
    }

    /// Gives the leases on `mirror_ids` back, so that another process can take them at once.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn release_leases(&self, mirror_ids: &[i64], node_id: &str) -> Result<(), Error> {
        let statement =
            "update peergate.mirror_leases set expires_at = '-infinity' where mirror_id = any ($1) and node_id = $2";
        self.client().await?.execute(statement, &[&mirror_ids, &node_id]).await?;
        Ok(())
    }
}
