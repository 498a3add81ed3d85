//! What monitoring asks of the catalog.

use crate::{Catalog, Error};

/// How a mirror stands, in numbers: part of a row of `peergate.mirror_status`.
#[derive(Clone, Debug, PartialEq)]
pub struct MirrorFigures {
    /// The mirror's name.
    pub mirror: String,
    /// Its state.
    pub state: String,
    /// How much of the source's WAL is not applied; `None` before streaming.
    pub lag_bytes: Option<i64>,
    /// How long the oldest change that is not applied has waited.
    pub lag_seconds: Option<f64>,
    /// Rows copied, and row changes applied by streaming.
    pub rows: i64,
    /// Bytes of those.
    pub bytes: i64,
    /// Source transactions applied by streaming.
    pub transactions: i64,
}

/// What a role may do on the console of a gateway.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleRights {
    /// All: it is a superuser, or a member of the role that owns the catalog's schema.
    pub manage: bool,
    /// Look: that, or it is a member of `pg_monitor`.
    pub look: bool,
}

impl Catalog {
    /// Asks the catalog for nothing, to see whether it answers.
    ///
    /// # Errors
    /// [`Error`] if it does not.
    pub async fn ping(&self) -> Result<(), Error> {
        self.client().await?.batch_execute("").await?;
        Ok(())
    }

    /// Returns how all mirrors stand, by name.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked.
    pub async fn mirror_figures(&self) -> Result<Vec<MirrorFigures>, Error> {
        let sql = "select mirror, state, lag_bytes, lag_seconds::float8, rows_applied + coalesce(rows_copied, 0), \
                   bytes_applied + coalesce(bytes_copied, 0), transactions_applied from peergate.mirror_status order by mirror";
        let rows = self.client().await?.query(sql, &[]).await?;
        let figures = |row: &tokio_postgres::Row| MirrorFigures {
            mirror: row.get(0),
            state: row.get(1),
            lag_bytes: row.get(2),
            lag_seconds: row.get(3),
            rows: row.get(4),
            bytes: row.get(5),
            transactions: row.get(6),
        };
        Ok(rows.iter().map(figures).collect())
    }

    /// Tells what a role may do on the console. One that does not exist may do nothing.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked.
    pub async fn console_rights(&self, role: &str) -> Result<ConsoleRights, Error> {
        let sql = "select r.rolsuper or pg_has_role(r.oid, n.nspowner, 'usage'), pg_has_role(r.oid, 'pg_monitor', 'usage') \
                   from pg_roles r, pg_namespace n where r.rolname = $1 and n.nspname = 'peergate'";
        let row = self.client().await?.query_opt(sql, &[&role]).await?;
        Ok(row.map_or(ConsoleRights::default(), |row| {
            let manage = row.get(0);
            ConsoleRights { manage, look: manage || row.get(1) }
        }))
    }
}
