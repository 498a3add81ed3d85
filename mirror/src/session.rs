//! SQL sessions on peers, with the settings pinned that decide how values look.

use std::sync::atomic::{AtomicUsize, Ordering};

use catalog::connect::{Attempt, Connector, server_version};
use catalog::peer::PeerOptions;
use tokio::sync::OnceCell;
use tokio_postgres::{Client, Statement};

use crate::error::Error;

/// Settings of every session, those that stream WAL too: both ends must read and write values alike, whatever their roles' and databases' own settings are. Nothing of ours is cut short
/// by a timeout that was meant for applications; but a server notices soon when our machine is gone, and lets go of its locks.
pub const PINNED: &str = "
    select pg_catalog.set_config('client_encoding', case pg_catalog.current_setting('server_encoding') when 'SQL_ASCII' then 'SQL_ASCII' else 'UTF8' end, false);
    set datestyle = 'ISO, YMD';
    set intervalstyle = 'postgres';
    set timezone = 'UTC';
    set extra_float_digits = 3;
    set bytea_output = 'hex';
    set search_path = '';
    set statement_timeout = 0;
    set lock_timeout = 0;
    set idle_in_transaction_session_timeout = 0;
    set tcp_keepalives_idle = 60;
    set tcp_keepalives_interval = 10;
    set tcp_keepalives_count = 6;
    set row_security = off;
    set jit = off;
    set client_min_messages = warning;
    set lc_monetary = 'C';
    select pg_catalog.set_config(name, '0', false) from pg_catalog.pg_settings where name in ('idle_session_timeout', 'transaction_timeout');
";

/// A session on a peer.
pub struct PeerSession {
    /// The peer's name, for messages.
    pub peer: String,
    /// The session.
    pub client: Client,
    /// How it was reached: a further connection goes to the same server.
    pub attempt: Attempt,
    /// The server's version, such as 150018.
    pub version: u32,
    /// The statement that describes a table, once it was needed.
    pub describe: OnceCell<Statement>,
    /// What is under way, of [`PeerSession::watched`].
    running: AtomicUsize,
}

/// A session that is dropped amid a statement cancels it: the server would carry it out all the same, long after a stop or a drop.
impl Drop for PeerSession {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if self.running.load(Ordering::Relaxed) > 0 {
            let (token, tls) = (self.client.cancel_token(), self.attempt.tls.clone());
            runtime.spawn(async move {
                if let Err(error) = token.cancel_query(tls).await {
                    tracing::debug!(error = %error, "statement not canceled");
                }
            });
        }
    }
}

impl PeerSession {
    /// Opens a session on `peer`.
    ///
    /// # Errors
    /// [`Error::Transient`] with what the server or the system said.
    pub async fn open(peer: &str, options: &PeerOptions) -> Result<PeerSession, Error> {
        let connector = Connector::new(options).map_err(|e| Error::connect(peer, e))?;
        let (client, attempt) = connector.connect().await.map_err(|e| Error::connect(peer, e))?;
        let mut session = PeerSession {
            peer: peer.to_owned(),
            version: 0,
            attempt: attempt.clone(),
            client,
            describe: OnceCell::new(),
            running: AtomicUsize::new(0),
        };
        session.run(PINNED).await?;
        session.version = server_version(&session.client).await.map_err(|e| session.error(&e))?;
        Ok(session)
    }

    /// Runs statements that give no rows.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn run(&self, statements: &str) -> Result<(), Error> {
        self.done(self.client.batch_execute(statements)).await
    }

    /// Waits for a statement.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn done<T>(&self, statement: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, Error> {
        self.watched(statement).await.map_err(|e| self.error(&e))
    }

    /// Waits for what is done in this session. Given up before its end, it is canceled on the server when the session is dropped.
    pub async fn watched<T>(&self, work: impl Future<Output = T>) -> T {
        self.running.fetch_add(1, Ordering::Relaxed);
        let result = work.await;
        self.running.fetch_sub(1, Ordering::Relaxed);
        result
    }

    /// Sorts an error of this session.
    pub fn error(&self, error: &tokio_postgres::Error) -> Error {
        Error::sql(&self.peer, error)
    }
}
