//! What the gateway itself asks of the catalog, beside the sessions that it relays.

use crate::{CHANNEL, Catalog, Error};

/// What would become of a CREATE PEER, as far as it can be told without running it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prospects {
    /// The role may run it.
    pub allowed: bool,
    /// There is a peer of that name already.
    pub exists: bool,
}

impl Catalog {
    /// Tells whether `role` may create peers, and whether there is one named `peer`.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked, or the role is not there.
    pub async fn create_peer_prospects(&self, role: &str, peer: &str) -> Result<Prospects, Error> {
        let sql = "select has_schema_privilege($1, 'peergate', 'usage') and has_function_privilege($1, p.oid, 'execute'), \
                   exists (select from peergate.peers where name = $2) \
                   from pg_proc p where p.pronamespace = 'peergate'::regnamespace and p.proname = 'create_peer'";
        let row = self.client().await?.query_one(sql, &[&role, &peer]).await?;
        Ok(Prospects { allowed: row.get(0), exists: row.get(1) })
    }

    /// Tells the engines that somebody waits for a mirror, so that they ask the source for its position at once. Nothing depends
    /// on it but the time.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked.
    pub async fn announce_wait(&self, mirror: &str) -> Result<(), Error> {
        self.client().await?.execute("select pg_notify($1, $2)", &[&CHANNEL, &format!("wait:{mirror}")]).await?;
        Ok(())
    }
}
