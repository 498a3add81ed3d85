//! The processes that share the catalog.

use crate::{Catalog, Error};

impl Catalog {
    /// Reports that a process is alive; the first report makes its row.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn report_node(&self, node_id: &str, host: &str, role: &str, starting: bool) -> Result<(), Error> {
        let statement = "insert into peergate.nodes (id, host, role, version) values ($1, $2, $3, $4)
            on conflict (id) do update set heartbeat_at = now(), host = excluded.host, role = excluded.role,
                version = excluded.version, started_at = case when $5 then now() else nodes.started_at end";
        let version = env!("CARGO_PKG_VERSION");
        self.client().await?.execute(statement, &[&node_id, &host, &role, &version, &starting]).await?;
        Ok(())
    }
}
