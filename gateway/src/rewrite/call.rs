//! The call that each statement becomes.

use super::alert;
use super::mirror::{alter_mirror, create_mirror, table};
use super::sql::{Sql, array, array_of, cast, text_rows};
use crate::help::help;
use crate::parser::{Ours, Refusal};
use crate::statement::{AlterPeer, PeerChange, Role, Statement, Until, Value};

/// Writes any of our statements but those for which something is found out.
pub(super) fn call(sql: &mut Sql, ours: &Ours, nonce: &str) {
    match &ours.statement {
        Statement::CreatePeer(_)
        | Statement::ValidatePeer { .. }
        | Statement::ExplainMirror { .. }
        | Statement::CreateAlert(_) => unreachable!("something is found out for it"),
        Statement::AlterAlert(alert) => {
            alert::alter(sql, alert, None);
            sql.finish(nonce);
        }
        Statement::DropAlert { names, if_exists } => {
            sql.push("CALL peergate.drop_alert(");
            array(sql, names);
            sql.flag("if_exists", *if_exists);
            sql.finish(nonce);
        }
        Statement::TestAlert { name } => {
            sql.push("CALL peergate.test_alert(");
            sql.name(name);
            sql.finish(nonce);
        }
        Statement::WaitForAlert { name, timeout } => {
            sql.push("CALL peergate.wait_for_alert(");
            sql.name(name);
            if let Some(timeout) = timeout {
                cast(sql, "timeout", "timeout", timeout, "interval");
            }
            sql.finish(nonce);
        }
        Statement::ShowAlerts => sql.push("SELECT * FROM peergate.show_alerts"),
        Statement::ShowAlert { name } => {
            sql.push("SELECT * FROM peergate.show_alert(");
            sql.name(name);
            sql.push(")");
        }
        Statement::AlterPeer(AlterPeer { name, if_exists, change }) => alter_peer(sql, name, *if_exists, change, nonce),
        Statement::CommentOn { noun, name, comment } => {
            sql.push(&format!("CALL peergate.comment_on_{}(", noun.as_str()));
            sql.name(name);
            sql.push(", ");
            sql.anchor("comment");
            match comment {
                Some(text) => sql.value(text),
                None => sql.push("NULL"),
            }
            sql.finish(nonce);
        }
        Statement::ShowPeer { name } => {
            sql.push("SELECT * FROM peergate.show_peer(");
            sql.name(name);
            sql.push(")");
        }
        Statement::DropPeer { names, if_exists, cascade } => {
            sql.push("CALL peergate.drop_peer(");
            array(sql, names);
            sql.flag("if_exists", *if_exists);
            sql.flag("cascade", *cascade);
            sql.finish(nonce);
        }
        Statement::GrantPeer { peers, roles } => change_privileges(sql, "grant_peer", peers, roles, nonce),
        Statement::RevokePeer { peers, roles } => change_privileges(sql, "revoke_peer", peers, roles, nonce),
        Statement::CreateMirror(mirror) => create_mirror(sql, mirror, nonce),
        Statement::DropMirror { names, if_exists, keep_target_metadata, force } => {
            sql.push("CALL peergate.drop_mirror(");
            array(sql, names);
            sql.flag("if_exists", *if_exists);
            sql.flag("keep_target_metadata", *keep_target_metadata);
            sql.flag("force", *force);
            sql.finish(nonce);
        }
        Statement::AlterMirror { name, change } => alter_mirror(sql, name, change, nonce),
        Statement::ResyncMirror { name, if_exists, tables } => {
            sql.push("CALL peergate.resync_mirror(");
            sql.name(name);
            if !tables.is_empty() {
                sql.push(", tables => ");
                sql.json(&tables.iter().map(table).collect());
            }
            sql.flag("if_exists", *if_exists);
            sql.finish(nonce);
        }
        Statement::VerifyMirror { name, tables, repair } => {
            sql.push("SELECT * FROM peergate.verify_mirror(");
            sql.name(name);
            if !tables.is_empty() {
                sql.push(", tables => ");
                sql.json(&tables.iter().map(table).collect());
            }
            sql.flag("repair", *repair);
            sql.finish(nonce);
        }
        Statement::PauseMirror { name, if_exists } | Statement::ResumeMirror { name, if_exists } => {
            let pause = matches!(ours.statement, Statement::PauseMirror { .. });
            sql.push(if pause { "CALL peergate.pause_mirror(" } else { "CALL peergate.resume_mirror(" });
            sql.name(name);
            sql.flag("if_exists", *if_exists);
            sql.finish(nonce);
        }
        Statement::ExecuteMirror { name, if_exists } => {
            sql.push("CALL peergate.execute_mirror(");
            sql.name(name);
            sql.flag("if_exists", *if_exists);
            sql.finish(nonce);
        }
        Statement::WaitForMirror { name, until, timeout } => {
            sql.push("CALL peergate.wait_for_mirror(");
            sql.name(name);
            match until {
                Until::CaughtUp => {}
                Until::Lsn(lsn) => cast(sql, "up_to", "lsn", lsn, "pg_lsn"),
                Until::State(state) => cast(sql, "up_to_state", "state", state, "text"),
            }
            if let Some(timeout) = timeout {
                cast(sql, "timeout", "timeout", timeout, "interval");
            }
            sql.finish(nonce);
        }
        Statement::ShowPeers => sql.push("SELECT * FROM peergate.show_peers"),
        Statement::ShowMirrors => sql.push("SELECT * FROM peergate.show_mirrors"),
        Statement::ShowTasks => sql.push("SELECT * FROM peergate.show_tasks"),
        Statement::ShowTask { id } => {
            sql.push("SELECT * FROM peergate.show_task(");
            task_id(sql, id);
            sql.push(")");
        }
        Statement::CancelTask { id } => {
            sql.push("CALL peergate.cancel_task(");
            task_id(sql, id);
            sql.finish(nonce);
        }
        Statement::Help { words } => {
            // That there is something was found when it was parsed.
            if let Ok(found) = help(words, 0) {
                text_rows(sql, found.columns, &found.rows);
            }
        }
        Statement::ShowMirror { name } => {
            sql.push("SELECT * FROM peergate.show_mirror(");
            sql.name(name);
            sql.push(")");
        }
    }
}

pub(super) fn task_id(sql: &mut Sql, id: &Value) {
    sql.anchor("task");
    sql.value(id);
    sql.push("::pg_catalog.int8");
}

pub(super) fn change_privileges(sql: &mut Sql, procedure: &str, peers: &[String], roles: &[Role], nonce: &str) {
    sql.push(&format!("CALL peergate.{procedure}("));
    array(sql, peers);
    sql.push(", ");
    array_of(sql, roles, role);
    sql.finish(nonce);
}

/// Whom these words mean is the caller's to say: inside the procedure they mean its owner.
pub(super) fn role(sql: &mut Sql, role: &Role) {
    match role {
        Role::Named(name) => sql.name(name),
        Role::Current => sql.push("CURRENT_USER::pg_catalog.text"),
        Role::Session => sql.push("SESSION_USER::pg_catalog.text"),
    }
}

pub(super) fn alter_peer(sql: &mut Sql, name: &str, if_exists: bool, change: &PeerChange, nonce: &str) {
    sql.push(match change {
        PeerChange::Rename(_) => "CALL peergate.rename_peer(",
        PeerChange::Owner(_) => "CALL peergate.change_peer_owner(",
        PeerChange::Refresh(_) => "CALL peergate.refresh_peer(",
        PeerChange::Set(_) | PeerChange::Reset(_) => unreachable!("something is found out for it"),
    });
    sql.name(name);
    match change {
        PeerChange::Rename(name) => {
            sql.push(", ");
            sql.name(name);
        }
        PeerChange::Owner(owner) => {
            sql.push(", ");
            role(sql, owner);
        }
        PeerChange::Refresh(schemas) if !schemas.is_empty() => {
            sql.push(", ");
            array(sql, schemas);
        }
        PeerChange::Refresh(_) | PeerChange::Set(_) | PeerChange::Reset(_) => {}
    }
    sql.flag("if_exists", if_exists);
    sql.finish(nonce);
}

/// Writes a call that raises the refusal, at the part that [`Spans::refusal`](crate::parser::Spans::refusal) names.
pub(super) fn raise(sql: &mut Sql, refusal: &Refusal) {
    sql.push("CALL peergate.raise_error(");
    sql.literal(refusal.sqlstate.as_str());
    sql.push(", ");
    sql.literal(&refusal.message);
    for (name, text) in [("detail", &refusal.detail), ("hint", &refusal.hint)] {
        if let Some(text) = text {
            sql.push(&format!(", {name} => "));
            sql.literal(text);
        }
    }
    sql.push(", at => 'refusal')");
}
