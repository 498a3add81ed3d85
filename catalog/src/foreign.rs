//! Each peer's tables as foreign tables in the catalog: read from the peer's catalogs, compared with what was made before, and made.
//!
//! Not by IMPORT FOREIGN SCHEMA, which gives up at the first type that is missing. What cannot be made is told in
//! `peer_imports`, and the rest is made.

mod apply;
mod mapping;
mod remote;

use std::time::Duration;

use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::connect::{ConnectError, Connector, chain};
use crate::peer::PeerOptions;
use crate::{Catalog, Error};

/// How often the catalog is looked at without having been notified.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// Peers that are looked at at the same time.
const PEERS_AT_ONCE: usize = 4;

/// How long one look may take.
const LOOK_TIMEOUT: Duration = Duration::from_secs(300);

/// The role that foreign servers log in as at the gateway. PostgreSQL reserves names that begin so: no role can have it.
pub const TOKEN_ROLE: &str = "pg_peergate";

/// Returns what the catalog keeps of a token: a statement's parameters may be logged.
fn token_hash(token: &str) -> Vec<u8> {
    Sha256::digest(token.as_bytes()).to_vec()
}

/// Where the catalog's server reaches a gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GatewayAddress {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

/// Why a peer's tables could not be brought in.
#[derive(Debug)]
struct Failure {
    sqlstate: String,
    message: String,
    hint: Option<String>,
}

impl Failure {
    fn new(sqlstate: &str, message: impl Into<String>, hint: Option<&str>) -> Failure {
        Failure { sqlstate: sqlstate.to_owned(), message: message.into(), hint: hint.map(str::to_owned) }
    }
}

impl From<ConnectError> for Failure {
    fn from(error: ConnectError) -> Failure {
        Failure { sqlstate: "HV00N".to_owned(), message: error.message, hint: error.hint }
    }
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Failure {
        match error.as_db_error() {
            Some(db) => Failure {
                sqlstate: db.code().code().to_owned(),
                message: db.message().to_owned(),
                hint: db.hint().map(str::to_owned),
            },
            None => Failure::new("HV00N", chain(&error), None),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure::new("58000", chain(&error), None)
    }
}

/// A peer that is due.
struct Due {
    peer_id: i64,
    name: String,
    document: Value,
    only: Option<Vec<String>>,
    asked_at: std::time::SystemTime,
}

/// What came of a look.
struct Outcome {
    off: bool,
    tables: i32,
    warnings: Vec<String>,
}

impl Catalog {
    /// Keeps the foreign tables of all peers in step with the peers, until `shutdown` says otherwise. `gateway` is where the catalog's
    /// server reaches a gateway; without one no tables can be made, and `peer_imports` says so.
    ///
    /// A catalog that cannot be reached is waited for.
    pub async fn keep_foreign_tables(&self, gateway: Option<GatewayAddress>, mut shutdown: watch::Receiver<bool>) {
        let mut notifications = None;
        let mut looks = JoinSet::new();
        loop {
            if notifications.is_none() {
                notifications = self.listen().await.ok();
            }
            while looks.len() < PEERS_AT_ONCE {
                match self.claim_due_import().await {
                    Ok(Some(due)) => {
                        let (catalog, gateway) = (self.clone(), gateway.clone());
                        looks.spawn(async move { catalog.bring_in(due, gateway.as_ref()).await });
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::debug!(error = chain(&error), "cannot ask the catalog for peers to look at");
                        break;
                    }
                }
            }
            let notified = async {
                match &mut notifications {
                    Some(receiver) => {
                        let receiver: &mut tokio::sync::mpsc::Receiver<String> = receiver;
                        receiver.recv().await
                    }
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Nothing is left half made: what is not committed is gone.
                _ = shutdown.wait_for(|stop| *stop) => return,
                payload = notified => if payload.is_none() { notifications = None },
                Some(_) = looks.join_next() => {}
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    }

    /// Takes a peer that is due, for the time that a look may take.
    async fn claim_due_import(&self) -> Result<Option<Due>, Error> {
        let sql = "
            update peergate.peer_import_runs r
            set state = case when r.state = 'pending' then 'running' else r.state end, began_at = clock_timestamp(),
                due_at = clock_timestamp() + interval '10 minutes'
            from peergate.peers p
            where p.id = r.peer_id
              and r.peer_id = (select d.peer_id from peergate.peer_import_runs d where d.due_at <= clock_timestamp()
                               order by d.due_at limit 1 for update skip locked)
            returning r.peer_id, p.name, peergate.peer_document(p.id), r.only_schemas, r.asked_at";
        let row = self.client().await?.query_opt(sql, &[]).await?;
        Ok(row.map(|row| Due {
            peer_id: row.get(0),
            name: row.get(1),
            document: row.get(2),
            only: row.get(3),
            asked_at: row.get(4),
        }))
    }

    /// Looks at one peer, and notes what came of it.
    async fn bring_in(&self, due: Due, gateway: Option<&GatewayAddress>) {
        let look = tokio::time::timeout(LOOK_TIMEOUT, self.look(&due, gateway)).await;
        let outcome =
            look.unwrap_or_else(|_| Err(Failure::new("57014", format!("no end within {LOOK_TIMEOUT:?}"), None)));
        let (state, again_s, tables, warnings, failure) = match outcome {
            Ok(outcome) => {
                let state = if outcome.off { "off" } else { "ready" };
                (state, 60.0, Some(outcome.tables), outcome.warnings, None)
            }
            Err(failure) => {
                tracing::info!(peer = due.name, reason = failure.message, "cannot bring a peer's tables in");
                ("failed", 30.0, None, Vec::new(), Some(failure))
            }
        };
        // Who asked meanwhile is served by another look.
        let sql = "
            update peergate.peer_import_runs
            set state = case when asked_at = $2 then $3 else 'pending' end,
                due_at = clock_timestamp() + case when asked_at = $2 then make_interval(secs => $4) else interval '0' end,
                only_schemas = case when asked_at = $2 then null else only_schemas end,
                ended_at = clock_timestamp(), tables = coalesce($5, tables), warnings = $6,
                error_sqlstate = $7, error_message = $8, error_hint = $9
            where peer_id = $1";
        let noted = async {
            let client = self.client().await?;
            let (sqlstate, message, hint) = match &failure {
                Some(f) => (Some(&f.sqlstate), Some(&f.message), f.hint.as_ref()),
                None => (None, None, None),
            };
            client
                .execute(
                    sql,
                    &[&due.peer_id, &due.asked_at, &state, &again_s, &tables, &warnings, &sqlstate, &message, &hint],
                )
                .await?;
            Ok::<_, Error>(())
        };
        if let Err(error) = noted.await {
            tracing::info!(peer = due.name, error = chain(&error), "cannot note what came of a look at a peer");
        }
    }

    async fn look(&self, due: &Due, gateway: Option<&GatewayAddress>) -> Result<Outcome, Failure> {
        let options = PeerOptions::from_document(&due.document, self.keyring()).map_err(Error::from)?;
        let import = options.get("import").unwrap_or("all");
        let chosen: Option<Vec<String>> =
            (import != "all").then(|| import.split(',').map(|schema| schema.trim().to_owned()).collect());
        if import == "none" {
            // What there was goes away.
            let remote = remote::Remote::default();
            let target = apply::Target { peer_id: due.peer_id, updatable: false, gateway: None, only: None };
            let outcome = apply::apply(self.connector(), &target, &remote).await?;
            return Ok(Outcome { off: true, ..outcome });
        }
        let Some(gateway) = gateway else {
            return Err(Failure::new(
                "55000",
                "it is not known where the catalog's server reaches a gateway",
                Some("Set gateway_address to host:port of one, in the process that runs the engine."),
            ));
        };
        let (mut client, _) = Connector::new(&options)?.connect().await?;
        // A REFRESH of some schemas looks at these, as far as they are chosen at all.
        let only = due.only.as_ref().map(|only| {
            let is_chosen = |schema: &&String| chosen.as_ref().is_none_or(|chosen| chosen.contains(schema));
            only.iter().filter(is_chosen).cloned().collect::<Vec<_>>()
        });
        let remote = remote::read(&mut client, only.as_deref().or(chosen.as_deref())).await?;
        drop(client);
        let updatable = options.flag("updatable");
        let target = apply::Target { peer_id: due.peer_id, updatable, gateway: Some(gateway), only };
        apply::apply(self.connector(), &target, &remote).await
    }

    /// Tells whether a token opens sessions on the peer of that name, for its foreign server; `None`: it does not. The peer's owner
    /// is whom the token stands for: without USAGE of its own it would open nothing.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked.
    pub async fn token_access(&self, peer: &str, token: &str) -> Result<Option<crate::front::PeerAccess>, Error> {
        let sql = "
            select p.owner, peergate.may_use_peer(p.owner, p.id), peergate.peer_document(p.id)
            from peergate.peers p join peergate.peer_import_runs r on r.peer_id = p.id
            where p.name = $1
              and (r.token_hash = $2
                   or r.token_hash_before = $2 and r.token_made_at > now() - interval '5 minutes')";
        let row = self.client().await?.query_opt(sql, &[&peer, &token_hash(token)]).await?;
        Ok(row.map(|row| crate::front::PeerAccess {
            name: peer.to_owned(),
            owner: row.get(0),
            allowed: row.get(1),
            options: PeerOptions::from_document(&row.get::<_, Value>(2), self.keyring()),
        }))
    }
}
