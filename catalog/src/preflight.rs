//! VALIDATE PEER: whether a peer can be the source or target of mirrors. All that there is to say is found in one go, each with what
//! mends it; what depends on privileges is tried, in transactions that are rolled back.

mod server;
mod tables;
mod trial;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::connect::{Attempt, Connector};
use crate::peer::PeerOptions;
use crate::secret::SecretError;
use crate::tls;
use crate::{Catalog, Error};

/// How long looking at a peer may take in all.
const TIMEOUT: Duration = Duration::from_secs(30);

/// What came of one check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// All is well.
    Ok,
    /// It works, but a person should know.
    Warning,
    /// It keeps mirrors from working.
    Failed,
}

/// One row of VALIDATE PEER.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// What came of it.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What mends it: a statement or setting.
    pub hint: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Check {
        Check { name, status: Status::Ok, detail: detail.into(), hint: None }
    }

    fn warning(name: &'static str, detail: impl Into<String>) -> Check {
        Check { status: Status::Warning, ..Check::ok(name, detail) }
    }

    fn failed(name: &'static str, detail: impl Into<String>) -> Check {
        Check { status: Status::Failed, ..Check::ok(name, detail) }
    }

    fn hint(self, hint: impl Into<String>) -> Check {
        Check { hint: Some(hint.into()), ..self }
    }

    /// Says that a secret of the peer cannot be opened: nothing else can be looked at.
    pub fn unreadable_secret(peer: &str, error: &SecretError) -> Check {
        let alter = format!("ALTER PEER {} SET (password = '…')", pg::name::quote_ident(peer));
        Check::failed("secrets", error.to_string()).hint(alter)
    }

    /// Returns the row as `peergate.validate_peer` reads it.
    pub fn to_json(&self) -> Value {
        let status = match self.status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Failed => "failed",
        };
        json!({"check": self.name, "status": status, "detail": self.detail, "hint": self.hint})
    }
}

/// What a peer is used for by mirrors that there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// Mirrors read from it.
    pub source: bool,
    /// Mirrors write to it.
    pub target: bool,
}

impl Uses {
    /// Whether what keeps it from being a source matters: not for one that is a target only.
    fn may_be_source(self) -> bool {
        self.source || !self.target
    }

    /// Whether what keeps it from being a target matters.
    fn may_be_target(self) -> bool {
        self.target || !self.source
    }
}

impl Catalog {
    /// Looks at a peer.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked; what the peer says is among the checks.
    pub async fn examine_peer(
        &self,
        name: &str,
        options: &PeerOptions,
        peer_id: i64,
        verbose: bool,
    ) -> Result<Vec<Check>, Error> {
        let catalog = self.client().await?;
        let query = "select exists (select from peergate.mirror_definitions where source_id = $1),
                            exists (select from peergate.mirror_definitions where target_id = $1)";
        let row = catalog.query_one(query, &[&peer_id]).await?;
        let uses = Uses { source: row.get(0), target: row.get(1) };
        let mut checks = Vec::new();
        let work = examine(name, options, uses, verbose, &catalog, &mut checks);
        match tokio::time::timeout(TIMEOUT, work).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => checks.push(Check::failed("session", crate::connect::chain(&error))),
            Err(_) => checks.push(Check::failed("session", format!("the peer did not answer all within {TIMEOUT:?}"))),
        }
        Ok(checks)
    }
}

async fn examine(
    name: &str,
    options: &PeerOptions,
    uses: Uses,
    verbose: bool,
    catalog: &Client,
    checks: &mut Vec<Check>,
) -> Result<(), tokio_postgres::Error> {
    let started = Instant::now();
    let connected =
        async { Connector::new(options)?.connect().await.map(|(client, attempt)| (client, attempt.clone())) };
    let (client, attempt): (Client, Attempt) = match connected.await {
        Ok(connected) => connected,
        Err(error) => {
            let check = Check::failed("connection", error.message);
            let name = pg::name::quote_ident(name);
            checks
                .push(check.hint(
                    error.hint.unwrap_or(format!("ALTER PEER {name} SET ( … ), or see why the server refuses.")),
                ));
            return Ok(());
        }
    };
    let elapsed_ms = started.elapsed().as_millis();
    // Nothing here may wait for long, whatever goes on there.
    let settings =
        "set statement_timeout = '10s'; set lock_timeout = '2s'; set client_min_messages = error; set search_path = ''";
    client.batch_execute(settings).await?;
    let server = server::look(&client).await?;
    let detail =
        format!("{} as role {}, database {}, in {elapsed_ms} ms", attempt.address, server.role, server.database);
    checks.push(Check::ok("connection", detail));
    checks.push(server.tls(name, &attempt, tls::strength(options)));
    checks.push(server::clock(&client, catalog).await?);
    server.check(uses, checks);
    trial::check(&client, &server, uses, checks).await?;
    tables::check(&client, &server, uses, checks).await?;
    if verbose {
        checks.push(Check::ok("grants script", server.grants_script()));
    }
    Ok(())
}
