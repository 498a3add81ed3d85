//! `peergate dump`: the statements that rebuild the catalog's peers, mirrors and alerts. Pure.
//!
//! They are printed from the same values that the parser makes, so that what is written can be read. Secrets are not in it: what is sealed
//! becomes a reference to an environment variable, or a path.

use std::collections::HashSet;

use catalog::contents::{Alert, Contents, Mirror, Peer};

use crate::rewrite::{channels_from_json, conditions_from_json, selection_from_json};
use crate::statement::{
    AlertChange, AlertOn, AlterAlert, AlterPeer, CreateAlert, CreateMirror, CreatePeer, GivenOption, Noun, PeerChange,
    Role, Statement, Value,
};

/// A mirror or alert that cannot be written as a statement.
#[derive(Debug, thiserror::Error)]
#[error("{noun} \"{name}\" has a definition that this version cannot write as a statement")]
pub struct DumpError {
    noun: &'static str,
    name: String,
}

/// Returns the script.
///
/// # Errors
/// [`DumpError`] if the catalog holds a mirror or alert of a form that is not known here; nothing is left out in silence.
pub fn script(contents: &Contents) -> Result<String, DumpError> {
    let mut out = String::from(
        "-- Peers, mirrors and alerts of a Peergate catalog, for psql through the gateway of an empty one.\n\
         -- All of it or nothing is done. Mirrors begin to copy when it commits.\n\nBEGIN;\n",
    );
    let mut variables = HashSet::new();
    for peer in &contents.peers {
        out.push('\n');
        write_peer(&mut out, peer, &mut variables);
    }
    for mirror in &contents.mirrors {
        out.push('\n');
        write_mirror(&mut out, mirror)?;
    }
    for alert in &contents.alerts {
        out.push('\n');
        write_alert(&mut out, alert, &mut variables)?;
    }
    out.push_str("\nCOMMIT;\n");
    Ok(out)
}

fn write_statement(out: &mut String, statement: &Statement) {
    out.push_str(&format!("{statement};\n"));
}

fn write_peer(out: &mut String, peer: &Peer, variables: &mut HashSet<String>) {
    let name = &peer.name;
    let option = |name: &str, text: &str| GivenOption { name: name.to_owned(), value: Value::Text(text.to_owned()) };
    let mut options: Vec<GivenOption> = peer.options.iter().map(|(name, text)| option(name, text)).collect();
    for secret in &peer.secrets {
        let (reference, value) = placeholder(name, secret, variables);
        out.push_str(&format!("-- The {secret} of this peer is not in this file: {reference} stands for it.\n"));
        options.push(option(reference, &value));
    }
    // Whether the peers can be reached now has nothing to do with what the catalog holds.
    options.push(option("validate", "false"));
    write_statement(
        out,
        &Statement::CreatePeer(CreatePeer {
            name: name.clone(),
            or_replace: false,
            if_not_exists: false,
            kind: peer.kind.clone(),
            options,
        }),
    );
    if let Some(comment) = &peer.comment {
        let comment = Some(Value::Text(comment.clone()));
        write_statement(out, &Statement::CommentOn { noun: Noun::Peer, name: name.clone(), comment });
    }
    if !peer.grantees.is_empty() {
        let roles = peer.grantees.iter().cloned().map(Role::Named).collect();
        write_statement(out, &Statement::GrantPeer { peers: vec![name.clone()], roles });
    }
    // Last: who restores may be nobody who could still change the peer afterwards.
    let change = PeerChange::Owner(Role::Named(peer.owner.clone()));
    write_statement(out, &Statement::AlterPeer(AlterPeer { name: name.clone(), if_exists: false, change }));
}

/// What stands for a secret: the option, and its value.
fn placeholder(peer: &str, secret: &str, taken: &mut HashSet<String>) -> (&'static str, String) {
    match secret {
        "sslkey" => ("sslkey", format!("/etc/peergate/{}.key", plain(peer).to_lowercase())),
        _ => ("password_env", variable(&format!("PEERGATE_PEER_{}_PASSWORD", plain(peer).to_uppercase()), taken)),
    }
}

fn plain(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

/// A variable's name. Names that differ in what a variable cannot have must not share one.
fn variable(name: &str, taken: &mut HashSet<String>) -> String {
    let numbered = (2..).map(|n| format!("{name}_{n}"));
    let free = std::iter::once(name.to_owned()).chain(numbered).find(|name| taken.insert(name.clone()));
    free.unwrap_or_else(|| name.to_owned())
}

fn write_mirror(out: &mut String, mirror: &Mirror) -> Result<(), DumpError> {
    let selection = selection_from_json(&mirror.selection);
    let selection = selection.ok_or_else(|| DumpError { noun: "mirror", name: mirror.name.clone() })?;
    let option =
        |(name, text): (&String, &String)| GivenOption { name: name.clone(), value: Value::Text(text.clone()) };
    let name = &mirror.name;
    write_statement(
        out,
        &Statement::CreateMirror(CreateMirror {
            name: name.clone(),
            if_not_exists: false,
            source: mirror.source.clone(),
            target: mirror.target.clone(),
            selection,
            options: mirror.options.iter().map(option).collect(),
        }),
    );
    if let Some(comment) = &mirror.comment {
        let comment = Some(Value::Text(comment.clone()));
        write_statement(out, &Statement::CommentOn { noun: Noun::Mirror, name: name.clone(), comment });
    }
    if mirror.paused {
        write_statement(out, &Statement::PauseMirror { name: name.clone(), if_exists: false });
    }
    Ok(())
}

fn write_alert(out: &mut String, alert: &Alert, variables: &mut HashSet<String>) -> Result<(), DumpError> {
    let unknown = || DumpError { noun: "alert", name: alert.name.clone() };
    let mut channels = channels_from_json(&alert.channels).ok_or_else(unknown)?;
    let option = |name: String, text: String| GivenOption { name, value: Value::Text(text) };
    for (channel, secret) in &alert.secrets {
        let name = format!("PEERGATE_ALERT_{}_{}", plain(&alert.name).to_uppercase(), secret.to_uppercase());
        let reference = format!("{secret}_env");
        out.push_str(&format!(
            "-- The {secret} of channel {channel} is not in this file: {reference} stands for it.\n"
        ));
        let channel = channel.checked_sub(1).and_then(|n| channels.get_mut(n)).ok_or_else(unknown)?;
        channel.options.push(option(reference, variable(&name, variables)));
        channel.options.sort_by(|a, b| a.name.cmp(&b.name));
    }
    let name = &alert.name;
    write_statement(
        out,
        &Statement::CreateAlert(CreateAlert {
            name: name.clone(),
            or_replace: false,
            if_not_exists: false,
            on: AlertOn { is_peer: alert.on_peers, name: alert.on.clone() },
            conditions: conditions_from_json(&alert.conditions).ok_or_else(unknown)?,
            channels,
            options: alert.options.iter().map(|(name, text)| option(name.clone(), text.clone())).collect(),
        }),
    );
    if let Some(comment) = &alert.comment {
        let comment = Some(Value::Text(comment.clone()));
        write_statement(out, &Statement::CommentOn { noun: Noun::Alert, name: name.clone(), comment });
    }
    if alert.disabled {
        let change = AlertChange::Enable(false);
        write_statement(out, &Statement::AlterAlert(AlterAlert { name: name.clone(), if_exists: false, change }));
    }
    Ok(())
}
