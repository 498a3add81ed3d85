//! EXPLAIN of a statement about a mirror: what the statement would make of it is the catalog's to say, and what the mirror would then do the
//! engine's, which the gateway does not know: it is given a function when it starts.

use std::future::Future;
use std::pin::Pin;

use catalog::Catalog;
use catalog::rehearsal::Rehearsal;
use pg::SqlState;
use serde_json::{Value as Json, json};

use crate::rewrite::{Findings, procedure_call};
use crate::statement::{CreateMirror, Statement};
use crate::validate::unusable;

/// Works out what a mirror would do; returns `{"rows": […], "plan": {…}}`, as `peergate.explain_mirror` takes it.
pub type Planner = fn(Rehearsal) -> Pin<Box<dyn Future<Output = Json> + Send>>;

/// Finds out what a statement about a mirror would do, for a session whose login role is `role`.
pub(crate) async fn find_out(
    catalog: &Catalog,
    planner: Option<Planner>,
    role: &str,
    statement: &Statement,
) -> Findings {
    let (Statement::CreateMirror(CreateMirror { name, .. }) | Statement::AlterMirror { name, .. }) = statement else {
        return Findings::default();
    };
    let Some(planner) = planner else {
        return unusable(json!({"sqlstate": SqlState::FEATURE_NOT_SUPPORTED.as_str(),
            "message": "this gateway does not know what mirrors do"}));
    };
    let (procedure, call) = procedure_call(statement);
    match catalog.rehearse(role, &procedure, &call, name).await {
        Ok(Some(rehearsal)) => Findings::default().with("report", planner(rehearsal).await),
        Ok(None) => Findings::default(),
        Err(error) => {
            tracing::warn!(mirror = name, error = %error, "cannot rehearse a statement");
            unusable(json!({"sqlstate": SqlState::SYSTEM_ERROR.as_str(),
                "message": format!("cannot look at mirror \"{name}\""), "detail": error.to_string()}))
        }
    }
}
