//! What is found out about a CREATE PEER before it goes on: its options are sorted, its secrets sealed, and the peer is connected
//! to, if that can matter.
//!
//! Nothing is decided here: the findings go to `peergate.create_peer`, which raises what is to be raised in the client's own
//! transaction.

use catalog::Catalog;
use catalog::connect::check_peer;
use catalog::peer::GivenPeer;
use pg::SqlState;
use serde_json::{Value as Json, json};

use crate::intercept::PeerQuestion;
use crate::parser::truncated;
use crate::rewrite::Findings;

/// Finds out about one CREATE PEER of a session whose login role is `role`.
pub(crate) async fn find_out(catalog: &Catalog, role: &str, question: &PeerQuestion) -> Findings {
    let name = truncated(&question.peer.name);
    let given = match &question.options {
        Ok(options) => GivenPeer::new(options.clone()),
        Err(bad) => {
            let at = format!("option.{}.value", bad.option);
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
    let secrets = match given.sealed(catalog.keyring()) {
        Ok(secrets) => secrets,
        Err(error) => {
            tracing::error!(peer = name, error = %error, "cannot seal a secret");
            return unusable(
                json!({"sqlstate": SqlState::SYSTEM_ERROR.as_str(), "message": "cannot seal the peer's secrets",
                "detail": error.to_string()}),
            );
        }
    };
    let mut findings = Findings { options: given.options(), secrets, validation: Json::Null };
    if given.validate() && may_succeed(catalog, role, name).await {
        findings.validation = match check_peer(&given).await {
            Ok(()) => json!({}),
            Err(error) => json!({"sqlstate": SqlState::PEER_UNREACHABLE.as_str(),
                "message": format!("could not connect to peer \"{name}\""),
                "detail": error.message, "hint": error.hint}),
        };
    }
    findings
}

/// Options that no peer can be made of: nothing of them goes on, since secrets cannot be told from the rest.
fn unusable(mut error: Json) -> Findings {
    error["stage"] = json!("options");
    Findings { options: json!({}), secrets: json!({}), validation: error }
}

/// Whether the statement could create the peer. If not, nobody is to be connected to on behalf of a role that may not.
async fn may_succeed(catalog: &Catalog, role: &str, name: &str) -> bool {
    match catalog.create_peer_prospects(role, name).await {
        Ok(prospects) => prospects.allowed && !prospects.exists,
        Err(error) => {
            tracing::warn!(peer = name, error = %error, "cannot ask the catalog about a peer");
            false
        }
    }
}
