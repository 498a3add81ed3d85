//! What is found out about a peer before a statement goes on: its options are sorted, its secrets sealed, and the peer is connected
//! to, if that can matter. Of an alert, its channels' secrets are sealed.
//!
//! Nothing is decided here: the findings go to the statement's procedure, which raises what is to be raised in the client's own
//! transaction.

use catalog::Catalog;
use catalog::alert::channel::{self, GivenChannel};
use catalog::connect::check_peer;
use catalog::front::Prospects;
use catalog::peer::{GivenPeer, PeerOptions};
use catalog::preflight::Check;
use catalog::secret::SecretError;
use pg::SqlState;
use serde_json::{Value as Json, json};

use crate::explain::{self, Planner};
use crate::intercept::PeerQuestion;
use crate::parser::truncated;
use crate::rewrite::Findings;
use crate::statement::{AlertChange, AlertChannel, AlterAlert, AlterPeer, CreateAlert, PeerChange, Statement};

/// Finds out about one statement of a session whose login role is `role`.
pub(crate) async fn find_out(
    catalog: &Catalog,
    planner: Option<Planner>,
    role: &str,
    question: &PeerQuestion,
) -> Findings {
    let given = match &question.options {
        Ok(options) => match &question.statement {
            Statement::CreateAlert(CreateAlert { channels, .. })
            | Statement::AlterAlert(AlterAlert { change: AlertChange::Define { channels, .. }, .. }) => {
                return seal_channels(catalog, channels, options);
            }
            _ => GivenPeer::new(options.clone()),
        },
        Err(bad) => {
            let at = format!("{}.value", bad.part);
            let error =
                json!({"sqlstate": SqlState::INVALID_PARAMETER_VALUE.as_str(), "message": bad.message, "at": at});
            return unusable(error);
        }
    };
    let given = match given {
        Ok(given) => given,
        Err(error) => {
            let at = error.option.as_ref().map(|option| format!("option.{option}"));
            return unusable(
                json!({"sqlstate": error.sqlstate.as_str(), "message": error.message, "detail": error.detail,
                "hint": error.hint, "at": at}),
            );
        }
    };
    match &question.statement {
        Statement::CreatePeer(peer) => {
            let name = truncated(&peer.name);
            let prospects = prospects(catalog, role, "create_peer", name).await;
            let pointless = prospects.peer.is_some() && !peer.or_replace;
            let change = Change { name, given: &given, reset: None, prospects, pointless };
            change.find_out(catalog).await
        }
        Statement::AlterPeer(AlterPeer { name, change, .. }) => {
            let name = truncated(name);
            let prospects = prospects(catalog, role, "alter_peer", name).await;
            let reset = match change {
                PeerChange::Reset(names) => names.as_slice(),
                _ => &[],
            };
            let pointless = prospects.peer.is_none();
            let change = Change { name, given: &given, reset: Some(reset), prospects, pointless };
            change.find_out(catalog).await
        }
        Statement::ValidatePeer { name, verbose } => examine(catalog, role, truncated(name), *verbose).await,
        Statement::ExplainMirror { statement, .. } => explain::find_out(catalog, planner, role, statement).await,
        _ => Findings::default(),
    }
}

/// Looks at a peer for VALIDATE PEER, if the role may have that done.
async fn examine(catalog: &Catalog, role: &str, name: &str, verbose: bool) -> Findings {
    let prospects = prospects(catalog, role, "validate_peer", name).await;
    let (Some(document), true) = (&prospects.peer, prospects.allowed) else { return Findings::default() };
    let id = document["id"].as_i64().unwrap_or_default();
    let options = match PeerOptions::from_document(document, catalog.keyring()) {
        Ok(options) => options,
        Err(error) => {
            return Findings::default().with("report", json!([Check::unreadable_secret(name, &error).to_json()]));
        }
    };
    match catalog.examine_peer(name, &options, id, verbose).await {
        Ok(checks) => Findings::default().with("report", checks.iter().map(Check::to_json).collect()),
        Err(error) => unusable(json!({"sqlstate": SqlState::SYSTEM_ERROR.as_str(),
            "message": format!("cannot look at peer \"{name}\""), "detail": error.to_string()})),
    }
}

/// Seals the secrets of an alert's channels, whose options have these values, in the order of the statement.
fn seal_channels(catalog: &Catalog, channels: &[AlertChannel], values: &[(String, String)]) -> Findings {
    let mut values = values.iter().cloned();
    let given: Vec<GivenChannel> = channels
        .iter()
        .map(|channel| GivenChannel {
            kind: channel.kind.clone(),
            options: values.by_ref().take(channel.options.len()).collect(),
        })
        .collect();
    if let Err(bad) = channel::check(&given) {
        let at = format!("channel.{}.option.{}.value", bad.channel, bad.option);
        return unusable(
            json!({"sqlstate": SqlState::INVALID_PARAMETER_VALUE.as_str(), "message": bad.message, "at": at}),
        );
    }
    match channel::seal(&given, catalog.keyring()) {
        Ok(secrets) => Findings::default().with("channels", channel::documents(&given)).with("secrets", secrets),
        Err(error) => {
            tracing::error!(error = %error, "cannot seal a secret");
            unusable(json!({"sqlstate": SqlState::SYSTEM_ERROR.as_str(), "message": "cannot seal the alert's secrets",
                "detail": error.to_string()}))
        }
    }
}

/// A peer as a statement is to make it.
struct Change<'a> {
    name: &'a str,
    given: &'a GivenPeer,
    /// Options that are to have their defaults again; `None` when all are that are not given.
    reset: Option<&'a [String]>,
    prospects: Prospects,
    /// Connecting to it can change nothing about the outcome.
    pointless: bool,
}

impl Change<'_> {
    async fn find_out(&self, catalog: &Catalog) -> Findings {
        let nothing = json!({});
        let document = self.prospects.peer.as_ref().unwrap_or(&nothing);
        // Secrets that cannot be opened are as good as none: here may be what replaces them.
        let before = PeerOptions::from_document(document, catalog.keyring())
            .unwrap_or_else(|_| PeerOptions::without_secrets(document, catalog.keyring()));
        let whole = match self.reset {
            Some(reset) => self.given.over(&before, reset),
            None => self.given.replacing(&before),
        };
        let secrets = match self.given.sealed_over(&whole, document, catalog.keyring()) {
            Ok(secrets) => secrets,
            Err(error) => return self.cannot_seal(&error),
        };
        let mut findings = Findings::default().with("options", self.given.options()).with("secrets", secrets);
        if self.given.has_secrets() && self.reset.is_some() {
            findings = findings.with("sealed_for", json!(whole.destination()));
        }
        // A secret goes nowhere that it was not given for, nor on behalf of somebody who may not have it read: not even for a try.
        let safe = (!self.given.leaves_secrets_of(&whole) || before.secrets_may_stay(&whole))
            && (self.prospects.reads_files || whole.references().next().is_none());
        if self.given.validate() && self.prospects.allowed && !self.pointless && safe {
            findings = findings.with("validation", self.connect(&whole).await);
        }
        findings
    }

    async fn connect(&self, options: &PeerOptions) -> Json {
        match check_peer(options).await {
            Ok(()) => json!({}),
            Err(error) => json!({"sqlstate": SqlState::PEER_UNREACHABLE.as_str(),
                "message": format!("could not connect to peer \"{}\"", self.name),
                "detail": error.message, "hint": error.hint}),
        }
    }

    fn cannot_seal(&self, error: &SecretError) -> Findings {
        tracing::error!(peer = self.name, error = %error, "cannot seal a secret");
        unusable(json!({"sqlstate": SqlState::SYSTEM_ERROR.as_str(), "message": "cannot seal the peer's secrets",
            "detail": error.to_string()}))
    }
}

/// Options that no peer or alert can be made of: nothing of them goes on, since secrets cannot be told from the rest.
pub(crate) fn unusable(mut error: Json) -> Findings {
    error["stage"] = json!("options");
    let nothing = Findings::default().with("options", json!({})).with("channels", json!([])).with("secrets", json!({}));
    nothing.with("validation", error)
}

/// What the statement could do. If nothing, nobody is to be connected to on behalf of a role that may not.
async fn prospects(catalog: &Catalog, role: &str, routine: &str, name: &str) -> Prospects {
    catalog.peer_prospects(role, routine, name).await.unwrap_or_else(|error| {
        tracing::warn!(peer = name, error = %error, "cannot ask the catalog about a peer");
        Prospects { allowed: false, reads_files: false, peer: None }
    })
}
