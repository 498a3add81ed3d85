//! Work orders of dropped mirrors: what is still to be removed from their peers.

use serde_json::Value;

use crate::{Catalog, Error};

/// A dropped mirror whose objects are still on the peers.
#[derive(Clone, Debug)]
pub struct Removal {
    /// The dropped mirror.
    pub mirror_id: i64,
    /// Its name.
    pub mirror: String,
    /// Name of its slot, publication and progress.
    pub object_name: String,
    /// The source peer as it was, with sealed secrets.
    pub source: Value,
    /// The target peer as it was, with sealed secrets.
    pub target: Value,
    /// The progress row on the target is to stay.
    pub keep_target_metadata: bool,
    /// Failed attempts so far.
    pub attempt: i32,
    /// This attempt is the last: a peer that cannot be cleaned up is given up.
    pub force: bool,
}

impl Catalog {
    /// Returns the work orders that are due.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn due_removals(&self) -> Result<Vec<Removal>, Error> {
        let query = "select mirror_id, mirror, object_name, source, target, keep_target_metadata, attempt, force
                     from peergate.mirror_drops where retry_at <= now() order by mirror_id";
        let rows = self.client().await?.query(query, &[]).await?;
        let removal = |row: tokio_postgres::Row| Removal {
            mirror_id: row.get(0),
            mirror: row.get(1),
            object_name: row.get(2),
            source: row.get(3),
            target: row.get(4),
            keep_target_metadata: row.get(5),
            attempt: row.get(6),
            force: row.get(7),
        };
        Ok(rows.into_iter().map(removal).collect())
    }

    /// Notes that nothing of the mirror is left.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn finish_removal(&self, mirror_id: i64) -> Result<(), Error> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        transaction.execute("delete from peergate.mirror_drops where mirror_id = $1", &[&mirror_id]).await?;
        transaction.execute("delete from peergate.mirror_leases where mirror_id = $1", &[&mirror_id]).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Notes in the open tasks of the mirror what is left on its peers, and ends them: nobody will remove it any more.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn give_up_removal(&self, mirror_id: i64, sqlstate: &str, left: &str) -> Result<(), Error> {
        let statement = "
            update peergate.tasks set state = 'completed', progress = 1, finished_at = clock_timestamp(), error_sqlstate = $2, error_message = $3
            where mirror_id = $1 and kind = 'drop_mirror' and state in ('pending', 'running')";
        self.client().await?.execute(statement, &[&mirror_id, &sqlstate, &left]).await?;
        self.finish_removal(mirror_id).await
    }

    /// Notes that an attempt failed and when the next one is due, in seconds.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn postpone_removal(&self, mirror_id: i64, seconds: f64) -> Result<(), Error> {
        let statement =
            "update peergate.mirror_drops set attempt = attempt + 1, retry_at = now() + make_interval(secs => $2)
                         where mirror_id = $1";
        self.client().await?.execute(statement, &[&mirror_id, &seconds]).await?;
        Ok(())
    }
}
