//! Statements for which something is found out before they are forwarded, and how that gets into them.

use super::mirror::procedure_call;
use super::sql::{Sql, array};
use super::{Findings, alert};
use crate::statement::{AlterPeer, Inspected, PeerChange, Statement, Value};

/// Where the arguments of a call come from that the gateway finds out.
pub(super) enum Found<'a> {
    /// They are known.
    Now(&'a Findings),
    /// They will be in the parameter of that number, as one document.
    AtBind(u16),
}

impl Found<'_> {
    /// Writes an argument of type jsonb, or with `as_text` of type text; nothing for one that was not found.
    pub(super) fn argument(&self, sql: &mut Sql, name: &str, as_text: bool) {
        match self {
            Found::Now(findings) => {
                let Some(value) = findings.get(name) else { return };
                sql.push(&format!(", {name} => "));
                match value.as_str().filter(|_| as_text) {
                    Some(text) => sql.literal(text),
                    None => sql.json(value),
                }
            }
            Found::AtBind(number) => {
                let operator = if as_text { "->>" } else { "->" };
                sql.push(&format!(
                    ", {name} => (${number}::pg_catalog.text::pg_catalog.jsonb OPERATOR(pg_catalog.{operator}) '{name}')"
                ));
            }
        }
    }
}

/// Writes a statement for which something is found out about a peer, or whose secrets are sealed.
pub(super) fn inspected(
    sql: &mut Sql,
    statement: &Statement,
    options: &[Inspected<'_>],
    found: &Found<'_>,
    nonce: &str,
) {
    match statement {
        Statement::CreatePeer(peer) => {
            sql.push("CALL peergate.create_peer(");
            sql.name(&peer.name);
            sql.push(", ");
            sql.literal(&peer.kind);
            found.argument(sql, "options", false);
            found.argument(sql, "secrets", false);
            sql.flag("if_not_exists", peer.if_not_exists);
            sql.flag("or_replace", peer.or_replace);
        }
        Statement::AlterPeer(AlterPeer { name, if_exists, change }) => {
            sql.push("CALL peergate.alter_peer(");
            sql.name(name);
            found.argument(sql, "options", false);
            found.argument(sql, "secrets", false);
            found.argument(sql, "sealed_for", true);
            if let PeerChange::Reset(names) = change {
                sql.push(", reset => ");
                array(sql, names);
            }
            sql.flag("if_exists", *if_exists);
        }
        Statement::ValidatePeer { name, .. } => {
            sql.push("SELECT * FROM peergate.validate_peer(");
            sql.name(name);
            found.argument(sql, "report", false);
            found.argument(sql, "validation", false);
            return sql.push(")");
        }
        Statement::ExplainMirror { statement, json } => {
            sql.push(if *json {
                "SELECT peergate.explain_mirror_json("
            } else {
                "SELECT * FROM peergate.explain_mirror("
            });
            sql.literal(&procedure_call(statement).1);
            found.argument(sql, "report", false);
            found.argument(sql, "validation", false);
            return sql.push(if *json { ") AS \"QUERY PLAN\"" } else { ")" });
        }
        Statement::CreateAlert(alert) => alert::create(sql, alert, found),
        Statement::AlterAlert(alert) => alert::alter(sql, alert, Some(found)),
        _ => unreachable!("nothing is found out for other statements"),
    }
    found.argument(sql, "validation", false);
    // A simple query has no parameters: where the statement names one, Postgres says so there.
    reference(sql, options, nonce);
}

/// Ends a call with its nonce, in an expression that names every parameter of the options, so that Postgres can type them.
pub(super) fn reference(sql: &mut Sql, options: &[Inspected<'_>], nonce: &str) {
    let given = options.iter().filter(|inspected| matches!(inspected.option.value, Value::Parameter(_)));
    let mut first = true;
    for Inspected { part, option, .. } in given {
        sql.push(if first { ", nonce => CASE WHEN true THEN " } else { ", " });
        if first {
            sql.literal(nonce);
            sql.push(" ELSE pg_catalog.concat(");
        }
        first = false;
        sql.anchor(format!("{part}.value"));
        sql.value(&option.value);
    }
    if first {
        return sql.finish(nonce);
    }
    sql.push(") END)");
}

/// The number of the parameter that a prepared statement gets beside the client's own.
pub(super) fn hidden_parameter(statement: &Statement, options: &[Inspected<'_>], types: usize) -> u16 {
    let named = options.iter().filter_map(|inspected| match inspected.option.value {
        Value::Parameter(n) => Some(n),
        Value::Text(_) => None,
    });
    named
        .chain(alert::parameters(statement))
        .max()
        .unwrap_or(0)
        .max(u16::try_from(types).unwrap_or(u16::MAX))
        .saturating_add(1)
}
