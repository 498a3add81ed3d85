//! Typed access to the catalog: the only crate that writes its SQL.
//!
//! Reading order: [`Catalog`] (sessions and migrations), [`peer`] and [`secret`] (what a peer is), [`connect`] and [`wire`] (sessions on peers),
//! [`mirror`] (what is wanted and what is so), [`lease`] (who may act on it), [`task`] and [`event`] (what is told to people).
//! Beside them [`cluster`]: a private Postgres on this machine.

pub mod alert;
pub mod cluster;
pub mod connect;
pub mod contents;
pub mod docs;
pub mod event;
pub mod foreign;
pub mod front;
pub mod lease;
mod migrate;
pub mod mirror;
pub mod node;
pub mod notify;
pub mod peer;
pub mod preflight;
pub mod rehearsal;
pub mod removal;
mod roles;
pub mod secret;
pub mod slot;
pub mod task;
pub mod tls;
pub mod verification;
pub mod watch;
pub mod wire;

use std::sync::Arc;

use deadpool_postgres::{Manager, ManagerConfig, Pool, PoolError, RecyclingMethod};
use futures_util::future::{BoxFuture, FutureExt};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config};

use crate::connect::{ConnectError, Connector, chain};
use crate::secret::{Keyring, SecretError};

/// The NOTIFY channel on which statements wake the engines.
pub const CHANNEL: &str = "peergate";

/// Sessions that the pool opens at the most.
const POOL_SIZE: usize = 8;

/// What the catalog could not do, by what a caller does about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No session could be opened; trying again later may help.
    #[error("cannot connect to the catalog: {0}")]
    Connect(#[from] ConnectError),
    /// The pool gave no session; trying again later may help.
    #[error("no catalog session")]
    Pool(#[from] PoolError),
    /// A statement failed.
    #[error("catalog statement failed")]
    Sql(#[from] tokio_postgres::Error),
    /// A secret could not be sealed or opened.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// A row is not what this version of the binary writes.
    #[error("unexpected value in the catalog: {0}")]
    Unexpected(String),
    /// A released migration's text is not what was applied.
    #[error("migration {0} was applied with another text: a released migration must not change")]
    MigrationChanged(String),
    /// A newer binary has migrated the catalog.
    #[error("catalog has migration {0}, which this version does not know: use a newer version")]
    CatalogNewer(String),
    /// A migration failed; nothing of it was kept.
    #[error("migration {name} failed")]
    Migration {
        /// The file.
        name: String,
        /// What the server said.
        source: tokio_postgres::Error,
    },
}

/// The catalog: a pool of sessions on it, and the keys for its secrets.
#[derive(Clone)]
pub struct Catalog {
    pool: Pool,
    connector: Connector,
    keyring: Arc<Keyring>,
}

impl Catalog {
    /// Prepares access to the catalog; sessions are opened when they are needed.
    ///
    /// # Errors
    /// [`Error::Connect`] if the options cannot be used.
    pub fn new(connector: Connector, keyring: Arc<Keyring>) -> Result<Catalog, Error> {
        let config = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let manager = Manager::from_connect(Config::new(), PoolConnect(connector.clone()), config);
        let pool = Pool::builder(manager).max_size(POOL_SIZE).build();
        let pool = pool.map_err(|e| Error::Unexpected(e.to_string()))?;
        Ok(Catalog { pool, connector, keyring })
    }

    /// Brings the schema up to date. Any number of processes may do this at once.
    ///
    /// # Errors
    /// [`Error::MigrationChanged`], [`Error::CatalogNewer`], [`Error::Migration`], or that the catalog cannot be reached.
    pub async fn migrate(&self) -> Result<(), Error> {
        let (mut client, _) = self.connector.connect().await?;
        migrate::migrate(&mut client).await
    }

    /// Returns the keys for the secrets.
    pub fn keyring(&self) -> &Arc<Keyring> {
        &self.keyring
    }

    /// Returns how the catalog is reached, for sessions outside the pool.
    pub fn connector(&self) -> &Connector {
        &self.connector
    }

    async fn client(&self) -> Result<deadpool_postgres::Object, Error> {
        Ok(self.pool.get().await?)
    }

    /// Seals every secret anew with the newest key, in one transaction, and returns the ids of the keys that are still in use.
    ///
    /// # Errors
    /// [`Error::Secret`] if one cannot be opened; then none is changed.
    pub async fn reseal(&self) -> Result<Vec<String>, Error> {
        peer::reseal(&mut *self.client().await?, &self.keyring).await
    }
}

/// Opens the pool's sessions as [`Connector`] does.
struct PoolConnect(Connector);

impl deadpool_postgres::Connect for PoolConnect {
    fn connect(&self, _: &Config) -> BoxFuture<'_, Result<(Client, JoinHandle<()>), tokio_postgres::Error>> {
        async {
            let mut last = None;
            for attempt in self.0.attempts() {
                match attempt.config.connect(attempt.tls.clone()).await {
                    Ok((client, connection)) => {
                        let driver = tokio::spawn(async move {
                            if let Err(error) = connection.await {
                                tracing::debug!(error = chain(&error), "catalog session ended");
                            }
                        });
                        return Ok((client, driver));
                    }
                    Err(error) => last = Some(error),
                }
            }
            Err(last.expect("there is at least one attempt"))
        }
        .boxed()
    }
}
