//! Puts calls of catalog procedures in the place of our statements, inside the client's own text. Pure.
//!
//! What must fails fails in Postgres, so that the client's transaction ends up in the right state: a syntax error of ours is
//! forwarded as its first words only, which Postgres refuses itself (and does not log a password); any other refusal becomes a
//! call that raises it. `patch` puts the messages and positions right on the way back.

mod alert;
mod execution;
mod relation;
mod verification;

use std::ops::Range;
use std::rc::Rc;

use pg::SqlState;
use pg::name::quote_literal;
use serde_json::{Value as Json, json};

use crate::encoding::Encoding;
use crate::help::help;
use crate::parser::{NAME_BYTES_MAX, Ours, Parsed, Refusal, Spans, execute, parse, truncated};
use crate::peers::Peers;
use crate::split::{may_be_ours, split};
use crate::statement::{
    AlterPeer, CreateMirror, GivenOption, Inspected, MirrorChange, PeerChange, Role, SchemaMap, Selection, Statement,
    Table, TableMap, Until, Value,
};

pub(crate) use alert::{channels_from_json, conditions_from_json};
pub use execution::{Execution, Permit, failure, is_failure, success};
pub use relation::awaits_import;
pub use verification::{Verification, VerificationOrder, is_sign_of_life};

/// What was found out about a peer before a statement is forwarded: arguments of the statement's procedure by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings(serde_json::Map<String, Json>);

impl Findings {
    /// Adds an argument; one that is null is left out, for its default.
    pub fn with(mut self, argument: &str, value: Json) -> Findings {
        if !value.is_null() {
            self.0.insert(argument.to_owned(), value);
        }
        self
    }

    /// Returns an argument.
    pub fn get(&self, argument: &str) -> Option<&Json> {
        self.0.get(argument)
    }

    /// Returns all of them as one document, for a prepared statement: all ASCII, so that it is right in any client encoding.
    pub fn document(&self) -> String {
        ascii(&Json::Object(self.0.clone()))
    }
}

/// A statement of the client's text that will be replaced.
struct Piece {
    /// Which statement of the text it is, from 0.
    ordinal: usize,
    /// Where it is, in bytes.
    range: Range<usize>,
    /// What it begins with, for a stub: its words up to the noun.
    stub: Range<usize>,
    parsed: Parsed,
}

/// A text in which some statements are ours.
pub struct Plan {
    text: Vec<u8>,
    encoding: Encoding,
    pieces: Vec<Piece>,
    statement_count: usize,
}

/// Looks for our statements in a text; `None` when there are none.
///
/// `conforming` is the session's `standard_conforming_strings`.
pub fn plan(text: &[u8], encoding: Encoding, conforming: bool) -> Option<Plan> {
    plan_with(text, encoding, conforming, &Peers::default())
}

/// As [`plan`], and looks for what is said to the peers by their names, too.
pub fn plan_with(text: &[u8], encoding: Encoding, conforming: bool, peers: &Peers) -> Option<Plan> {
    let (may_be_ours, names_a_peer) = (may_be_ours(text), peers.may_be_in(text));
    if !(may_be_ours || names_a_peer) || !encoding.can_split(text) {
        return None;
    }
    let slices = split(text, conforming);
    let mut pieces = Vec::new();
    for (ordinal, slice) in slices.iter().enumerate() {
        let bytes = &text[slice.range.clone()];
        if names_a_peer && let Some(execute) = execute::read(slice, text, encoding, conforming, peers) {
            let (range, stub) = (slice.range.clone(), slice.range.start..slice.range.start);
            pieces.push(Piece { ordinal, range, stub, parsed: Parsed::Execute(execute) });
            continue;
        }
        let mut parsed = Parsed::Theirs;
        // For words only: characters that cannot be read cannot be in them.
        let lossy = encoding.decode(bytes).unwrap_or_else(|| String::from_utf8_lossy(bytes));
        let readable = encoding.decode(bytes).is_some();
        if may_be_ours {
            parsed = parse(slice, text, &lossy);
        }
        if parsed == Parsed::Theirs {
            if names_a_peer {
                for (range, schema) in relation::relations(bytes, encoding, conforming, peers) {
                    let range = slice.range.start + range.start..slice.range.start + range.end;
                    let stub = range.start..range.start;
                    // No error is ever about a name as if it were a statement.
                    pieces.push(Piece { ordinal: usize::MAX, range, stub, parsed: Parsed::Relation(schema) });
                }
            }
            continue;
        }
        if !readable {
            parsed = unreadable(
                "this statement can hold characters beyond ASCII only when client_encoding is UTF8 or LATIN1",
            );
        } else if !conforming && bytes.contains(&b'\\') {
            parsed = unreadable("backslashes are not supported here while standard_conforming_strings is off");
        }
        let noun = (0..5).filter_map(|n| slice.word(n)).find(|w| {
            ["PEER", "MIRROR", "ALERT"].iter().any(|noun| text[w.clone()].eq_ignore_ascii_case(noun.as_bytes()))
        });
        // SHOW holds no secret, and its first words alone would be PostgreSQL's SHOW of a setting.
        let end = noun.filter(|_| !slice.begins_with(text, &["SHOW"])).map_or(slice.range.end, |w| w.end);
        pieces.push(Piece { ordinal, range: slice.range.clone(), stub: slice.range.start..end, parsed });
    }
    (!pieces.is_empty()).then(|| Plan { text: text.to_vec(), encoding, pieces, statement_count: slices.len() })
}

fn unreadable(message: &str) -> Parsed {
    Parsed::Refused(Refusal {
        sqlstate: SqlState::FEATURE_NOT_SUPPORTED,
        message: message.to_owned(),
        detail: None,
        hint: None,
        at: 0,
    })
}

/// One replaced statement of a rewritten text, or the name of a peer's table in a statement that is not ours. All positions are characters from the start of the text, from 0.
#[derive(Debug)]
pub struct Placed {
    /// Which statement of the text it is, from 0.
    pub ordinal: usize,
    /// Where it is in the client's text.
    pub original: Range<usize>,
    /// Where its replacement is in the rewritten text.
    pub replacement: Range<usize>,
    /// Where its parts are, from its start.
    pub spans: Spans,
    /// What to say in place of Postgres' own complaint about a stub.
    pub refusal: Option<Refusal>,
    /// Places in the replacement that stand for places in the original, both from their starts, in order.
    anchors: Vec<(usize, usize)>,
}

/// A rewritten text, and what is needed to translate what comes back.
#[derive(Debug)]
pub struct Rewritten {
    /// The text to send.
    pub text: Vec<u8>,
    /// The replaced statements, in order.
    pub placed: Vec<Placed>,
    /// Mirrors that are waited for.
    pub waits_for: Vec<String>,
    /// What peers are to run, in order.
    pub executions: Vec<Rc<Execution>>,
    /// What is to be verified, in order.
    pub verifications: Vec<Verification>,
}

/// Where a position in a rewritten text is in the client's.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// In a statement that was not replaced.
    Outside(usize),
    /// In the replaced statement with that index, best shown at the given position.
    Inside(usize, usize),
}

impl Rewritten {
    /// Translates a position (characters, from 0) in the rewritten text into one in the client's.
    pub fn place(&self, position: usize) -> Place {
        let mut shift = 0isize;
        for (index, placed) in self.placed.iter().enumerate() {
            if position < placed.replacement.start {
                break;
            }
            // The end counts as inside: that is where a stub ends too early.
            if position <= placed.replacement.end {
                let within = position - placed.replacement.start;
                let anchor = placed.anchors.iter().rev().find(|(new, _)| *new <= within);
                return Place::Inside(index, placed.original.start + anchor.map_or(0, |(_, original)| *original));
            }
            shift = placed.original.end as isize - placed.replacement.end as isize;
        }
        Place::Outside(position.saturating_add_signed(shift))
    }

    /// Returns whether only a name was replaced there: what is said of it is PostgreSQL's own.
    pub(crate) fn is_name(&self, index: usize) -> bool {
        self.placed[index].ordinal == usize::MAX
    }

    /// Returns what a peer is to run as the `ordinal`th statement of the text.
    pub fn execution(&self, ordinal: usize) -> Option<&Rc<Execution>> {
        self.executions.iter().find(|e| e.ordinal == ordinal)
    }

    /// Returns what is to be verified by the `ordinal`th statement of the text.
    pub fn verification(&self, ordinal: usize) -> Option<&Verification> {
        self.verifications.iter().find(|v| v.ordinal == ordinal)
    }

    /// Returns the replaced statement that is the `ordinal`th of the text.
    pub fn at_ordinal(&self, ordinal: usize) -> Option<&Placed> {
        self.placed.iter().find(|p| p.ordinal == ordinal)
    }
}

/// A statement about a peer that was prepared: what its Bind must be given.
#[derive(Debug)]
pub struct PreparedPeer {
    /// The statement. Its options' values never leave the gateway as they are.
    pub statement: Statement,
    /// Number of the parameter that carries the findings; the client does not know of it.
    pub hidden: u16,
}

impl PreparedPeer {
    /// Returns the options of the statement that the gateway looks at.
    pub fn options(&self) -> Vec<Inspected<'_>> {
        self.statement.inspected_options().unwrap_or_default()
    }
}

impl Plan {
    /// Returns the statements whose findings [`Plan::render`] needs, in order.
    pub fn inspected(&self) -> impl Iterator<Item = &Statement> {
        self.pieces.iter().filter_map(|piece| match &piece.parsed {
            Parsed::Ours(ours) => ours.statement.inspected_options().map(|_| &ours.statement),
            _ => None,
        })
    }

    /// Returns whether the text is certain to fail before anything of it runs, so that nothing need be found out.
    pub fn fails_to_parse(&self) -> bool {
        self.pieces.iter().any(|piece| match &piece.parsed {
            Parsed::Refused(refusal) => refusal.sqlstate == SqlState::SYNTAX_ERROR,
            _ => false,
        })
    }

    /// Writes the text of a Query. There must be a finding for each of [`Plan::inspected`]; a refusal in its place is raised.
    pub fn render(self, nonce: &str, findings: Vec<Result<Findings, Refusal>>) -> Rewritten {
        let mut findings = findings.into_iter();
        self.write(|ours, sql| match ours.statement.inspected_options() {
            Some(options) => match findings.next() {
                Some(Ok(found)) => inspected(sql, &ours.statement, &options, &Found::Now(&found), nonce),
                Some(Err(refusal)) => raise(sql, &refusal),
                // The whole text fails to parse; only no value may be in it.
                None => sql.push("CALL peergate.finish()"),
            },
            None => call(sql, ours, nonce),
        })
    }

    /// Writes the text of a Parse whose parameter types are `types` long.
    pub fn render_prepared(self, nonce: &str, types: usize) -> (Rewritten, Option<PreparedPeer>) {
        // Postgres refuses several statements in one Parse before it looks at what they mean.
        let several = self.statement_count > 1;
        let mut prepared = None;
        let rewritten = self.write(|ours, sql| match ours.statement.inspected_options() {
            _ if several => sql.push("CALL peergate.finish()"),
            Some(options) => {
                let hidden = hidden_parameter(&ours.statement, &options, types);
                inspected(sql, &ours.statement, &options, &Found::AtBind(hidden), nonce);
                prepared = Some(PreparedPeer { statement: ours.statement.clone(), hidden });
            }
            None => call(sql, ours, nonce),
        });
        (rewritten, prepared)
    }

    fn write(self, mut replace: impl FnMut(&Ours, &mut Sql)) -> Rewritten {
        let Plan { text, encoding, pieces, statement_count } = self;
        let text = text.as_slice();
        let mut out = Rewritten {
            text: Vec::with_capacity(text.len() + 256),
            placed: Vec::new(),
            waits_for: Vec::new(),
            executions: Vec::new(),
            verifications: Vec::new(),
        };
        let (mut copied, mut original, mut new) = (0, 0, 0);
        for piece in pieces {
            let before = encoding.characters(&text[copied..piece.range.start]);
            out.text.extend_from_slice(&text[copied..piece.range.start]);
            (original, new, copied) = (original + before, new + before, piece.range.end);
            let mut sql = Sql::default();
            let stub = |sql: &mut Sql| sql.push(&String::from_utf8_lossy(&text[piece.stub.clone()]));
            let (spans, refusal, is_stub) = match piece.parsed {
                Parsed::Ours(ours) => {
                    replace(&ours, &mut sql);
                    if let Statement::WaitForMirror { name, .. } = &ours.statement {
                        out.waits_for.push(truncated(name).to_owned());
                    }
                    if let Statement::VerifyMirror { tables, repair, .. } = &ours.statement {
                        let alone = statement_count == 1;
                        out.verifications.push(Verification::new(piece.ordinal, tables, *repair, alone));
                    }
                    (ours.spans, None, false)
                }
                Parsed::Refused(refusal) if refusal.sqlstate == SqlState::SYNTAX_ERROR => {
                    stub(&mut sql);
                    (Spans::default(), Some(refusal), true)
                }
                Parsed::Refused(refusal) => {
                    raise(&mut sql, &refusal);
                    (Spans::refusal(refusal.at), None, false)
                }
                Parsed::Execute(execute) => {
                    sql.push(execution::STATEMENT);
                    let spans = Spans::name(execute.peer_at);
                    out.executions.push(Rc::new(Execution {
                        ordinal: piece.ordinal,
                        execute,
                        statement: text[piece.range.clone()].to_vec(),
                        start: original,
                        encoding,
                    }));
                    (spans, None, false)
                }
                Parsed::Relation(schema) => {
                    sql.push(&schema);
                    (Spans::default(), None, false)
                }
                Parsed::Theirs => {
                    stub(&mut sql);
                    (Spans::default(), None, true)
                }
            };
            let anchors = if is_stub {
                identity_anchors(&sql.text)
            } else {
                sql.anchors.iter().filter_map(|(at, key)| Some((*at, spans.find(key)?))).collect()
            };
            let replacement = encoding.encode(&sql.text);
            let length = encoding.characters(&text[piece.range.clone()]);
            let new_length = encoding.characters(&replacement);
            out.text.extend_from_slice(&replacement);
            out.placed.push(Placed {
                ordinal: piece.ordinal,
                original: original..original + length,
                replacement: new..new + new_length,
                spans,
                refusal,
                anchors,
            });
            (original, new) = (original + length, new + new_length);
        }
        out.text.extend_from_slice(&text[copied..]);
        out
    }
}

/// A stub keeps its words where they were, comments between them too.
fn identity_anchors(text: &str) -> Vec<(usize, usize)> {
    (0..text.chars().count()).map(|n| (n, n)).collect()
}

/// The replacement of one statement, with the places that stand for parts of the original.
#[derive(Default)]
struct Sql {
    text: String,
    anchors: Vec<(usize, String)>,
}

impl Sql {
    fn push(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// From here on, the text stands for the part of the statement with that key.
    fn anchor(&mut self, key: impl Into<String>) {
        self.anchors.push((self.text.chars().count(), key.into()));
    }

    fn literal(&mut self, text: &str) {
        self.push(quote_literal(text).trim_start());
    }

    /// A name; one that is too long is cut by the server, which says so as it does of any identifier.
    fn name(&mut self, name: &str) {
        if name.len() <= NAME_BYTES_MAX {
            return self.literal(name);
        }
        self.push("peergate.truncate_identifier(");
        self.literal(name);
        self.push(")");
    }

    fn json(&mut self, value: &Json) {
        self.literal(&ascii(value));
        self.push("::pg_catalog.jsonb");
    }

    fn flag(&mut self, name: &str, value: bool) {
        if value {
            self.push(&format!(", {name} => true"));
        }
    }

    /// A value as an expression of type text.
    fn value(&mut self, value: &Value) {
        match value {
            Value::Text(text) => self.literal(text),
            Value::Parameter(n) => self.push(&format!("${n}::pg_catalog.text")),
        }
    }

    fn finish(&mut self, nonce: &str) {
        self.push(", nonce => ");
        self.literal(nonce);
        self.push(")");
    }
}

/// Writes JSON in ASCII only, which is right in any client encoding.
pub(crate) fn ascii(value: &Json) -> String {
    let mut out = String::new();
    for c in value.to_string().chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    out
}

/// Where the arguments of a call come from that the gateway finds out.
enum Found<'a> {
    /// They are known.
    Now(&'a Findings),
    /// They will be in the parameter of that number, as one document.
    AtBind(u16),
}

impl Found<'_> {
    /// Writes an argument of type jsonb, or with `as_text` of type text; nothing for one that was not found.
    fn argument(&self, sql: &mut Sql, name: &str, as_text: bool) {
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
fn inspected(sql: &mut Sql, statement: &Statement, options: &[Inspected<'_>], found: &Found<'_>, nonce: &str) {
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
        Statement::CreateAlert(alert) => alert::create(sql, alert, found),
        Statement::AlterAlert(alert) => alert::alter(sql, alert, Some(found)),
        _ => unreachable!("nothing is found out for other statements"),
    }
    found.argument(sql, "validation", false);
    // A simple query has no parameters: where the statement names one, Postgres says so there.
    reference(sql, options, nonce);
}

/// Ends a call with its nonce, in an expression that names every parameter of the options, so that Postgres can type them.
fn reference(sql: &mut Sql, options: &[Inspected<'_>], nonce: &str) {
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
fn hidden_parameter(statement: &Statement, options: &[Inspected<'_>], types: usize) -> u16 {
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

/// Writes any of our statements but those for which something is found out.
fn call(sql: &mut Sql, ours: &Ours, nonce: &str) {
    match &ours.statement {
        Statement::CreatePeer(_) | Statement::ValidatePeer { .. } | Statement::CreateAlert(_) => {
            unreachable!("something is found out for it")
        }
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

fn task_id(sql: &mut Sql, id: &Value) {
    sql.anchor("task");
    sql.value(id);
    sql.push("::pg_catalog.int8");
}

/// Writes a query that gives these rows, all of type text.
fn text_rows(sql: &mut Sql, columns: &[&str], rows: &[Vec<String>]) {
    sql.push("SELECT * FROM (VALUES ");
    for (n, row) in rows.iter().enumerate() {
        sql.push(if n > 0 { ", (" } else { "(" });
        for (n, text) in row.iter().enumerate() {
            sql.push(if n > 0 { ", " } else { "" });
            sql.literal(text);
        }
        sql.push(")");
    }
    sql.push(&format!(") AS help ({})", columns.join(", ")));
}

fn array(sql: &mut Sql, names: &[String]) {
    array_of(sql, names, |sql, name| sql.name(name));
}

fn array_of<T>(sql: &mut Sql, items: &[T], write: impl Fn(&mut Sql, &T)) {
    sql.push("ARRAY[");
    for (n, item) in items.iter().enumerate() {
        sql.push(if n > 0 { ", " } else { "" });
        write(sql, item);
    }
    sql.push("]::pg_catalog.text[]");
}

fn change_privileges(sql: &mut Sql, procedure: &str, peers: &[String], roles: &[Role], nonce: &str) {
    sql.push(&format!("CALL peergate.{procedure}("));
    array(sql, peers);
    sql.push(", ");
    array_of(sql, roles, role);
    sql.finish(nonce);
}

/// Whom these words mean is the caller's to say: inside the procedure they mean its owner.
fn role(sql: &mut Sql, role: &Role) {
    match role {
        Role::Named(name) => sql.name(name),
        Role::Current => sql.push("CURRENT_USER::pg_catalog.text"),
        Role::Session => sql.push("SESSION_USER::pg_catalog.text"),
    }
}

fn alter_peer(sql: &mut Sql, name: &str, if_exists: bool, change: &PeerChange, nonce: &str) {
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

/// Writes `, argument => (value)::type`; the literal and the cast stand for the part with that key.
fn cast(sql: &mut Sql, argument: &str, key: &str, value: &Value, type_name: &str) {
    sql.push(&format!(", {argument} => "));
    sql.anchor(key);
    sql.value(value);
    sql.push(&format!("::pg_catalog.{type_name}"));
}

fn create_mirror(sql: &mut Sql, mirror: &CreateMirror, nonce: &str) {
    sql.push("CALL peergate.create_mirror(");
    sql.name(&mirror.name);
    sql.push(", ");
    sql.literal(&mirror.source);
    sql.push(", ");
    sql.literal(&mirror.target);
    sql.push(", ");
    sql.json(&selection(&mirror.selection));
    options(sql, &mirror.options);
    sql.flag("if_not_exists", mirror.if_not_exists);
    sql.finish(nonce);
}

fn alter_mirror(sql: &mut Sql, name: &str, change: &MirrorChange, nonce: &str) {
    let procedure = match change {
        MirrorChange::AddTables(_) => "add_mirror_tables",
        MirrorChange::AlterTable(_) => "alter_mirror_table",
        MirrorChange::DropTables(_) => "drop_mirror_tables",
        MirrorChange::RefreshTables => "refresh_mirror_tables",
        MirrorChange::SkipTo(_) => "skip_mirror_transaction",
        MirrorChange::Set(_) | MirrorChange::Reset(_) => "set_mirror_options",
        MirrorChange::RenameTo(_) => "rename_mirror",
    };
    sql.push(&format!("CALL peergate.{procedure}("));
    sql.name(name);
    match change {
        MirrorChange::AddTables(maps) => {
            sql.push(", ");
            sql.json(&maps.iter().map(table_map).collect());
        }
        MirrorChange::AlterTable(map) => {
            sql.push(", ");
            sql.json(&table_map(map));
        }
        MirrorChange::DropTables(tables) => {
            sql.push(", ");
            sql.json(&tables.iter().map(table).collect());
        }
        MirrorChange::RefreshTables => {}
        MirrorChange::SkipTo(lsn) => cast(sql, "lsn", "lsn", lsn, "pg_lsn"),
        MirrorChange::Set(given) => options(sql, given),
        MirrorChange::Reset(names) => {
            sql.push(", reset => ");
            array(sql, names);
        }
        MirrorChange::RenameTo(new_name) => {
            sql.push(", ");
            sql.name(new_name);
        }
    }
    sql.finish(nonce);
}

/// Writes `, options => …`, as a constant when no parameter is among them.
fn options(sql: &mut Sql, options: &[GivenOption]) {
    if options.is_empty() {
        return;
    }
    sql.push(", options => ");
    let constant: Option<serde_json::Map<String, Json>> = options
        .iter()
        .map(|option| match &option.value {
            Value::Text(text) => Some((option.name.clone(), Json::String(text.clone()))),
            Value::Parameter(_) => None,
        })
        .collect();
    if let Some(constant) = constant {
        return sql.json(&Json::Object(constant));
    }
    sql.push("pg_catalog.jsonb_build_object(");
    for (n, option) in options.iter().enumerate() {
        sql.push(if n > 0 { ", " } else { "" });
        sql.literal(&option.name);
        sql.push(", ");
        sql.anchor(format!("option.{}.value", option.name));
        sql.value(&option.value);
        if matches!(option.value, Value::Text(_)) {
            sql.push("::pg_catalog.text");
        }
    }
    sql.push(")");
}

fn table(table: &Table) -> Json {
    json!({"schema": table.schema, "name": table.name})
}

fn table_map(map: &TableMap) -> Json {
    let mut item = json!({"from": table(&map.from), "to": table(&map.to)});
    if !map.columns.is_empty() {
        item["columns"] = json!(map.columns);
    }
    if !map.exclude.is_empty() {
        item["exclude"] = json!(map.exclude);
    }
    if let Some(condition) = &map.condition {
        item["where"] = json!(condition);
    }
    item
}

fn selection(selection: &Selection) -> Json {
    let mut document = match selection {
        Selection::All { .. } => json!({"all": true}),
        Selection::Schemas { schemas, .. } => {
            json!({"schemas": schemas.iter().map(|s| json!({"from": s.from, "to": s.to})).collect::<Vec<_>>()})
        }
        Selection::Tables(maps) => {
            json!({"tables": maps.iter().map(table_map).collect::<Vec<_>>()})
        }
    };
    if let Selection::All { except } | Selection::Schemas { except, .. } = selection
        && !except.is_empty()
    {
        document["except"] = except.iter().map(table).collect();
    }
    document
}

/// Reads what [`selection`] writes; `None` for a form that it does not write, so that nothing of it is lost unseen.
pub(crate) fn selection_from_json(document: &Json) -> Option<Selection> {
    let text = |value: &Json| value.as_str().map(str::to_owned);
    let table = |value: &Json| Some(Table { schema: text(value.get("schema")?)?, name: text(value.get("name")?)? });
    let texts = |value: Option<&Json>| -> Option<Vec<String>> {
        value.map_or(Some(Vec::new()), |value| value.as_array()?.iter().map(text).collect())
    };
    let except = || -> Option<Vec<Table>> {
        document.get("except").map_or(Some(Vec::new()), |value| value.as_array()?.iter().map(table).collect())
    };
    let read = if document.get("all").is_some() {
        Selection::All { except: except()? }
    } else if let Some(schemas) = document.get("schemas") {
        let schema = |map: &Json| Some(SchemaMap { from: text(map.get("from")?)?, to: text(map.get("to")?)? });
        Selection::Schemas {
            schemas: schemas.as_array()?.iter().map(schema).collect::<Option<_>>()?,
            except: except()?,
        }
    } else {
        let map = |map: &Json| {
            Some(TableMap {
                from: table(map.get("from")?)?,
                to: table(map.get("to")?)?,
                columns: texts(map.get("columns"))?,
                exclude: texts(map.get("exclude"))?,
                condition: match map.get("where") {
                    Some(condition) => Some(text(condition)?),
                    None => None,
                },
            })
        };
        Selection::Tables(document.get("tables")?.as_array()?.iter().map(map).collect::<Option<_>>()?)
    };
    // ALTER MIRROR leaves an empty list behind where it takes the last exception out.
    let mut known = document.clone();
    if document.get("except") == Some(&json!([])) {
        known.as_object_mut()?.remove("except");
    }
    (selection(&read) == known).then_some(read)
}

/// Writes a call that raises the refusal, at the part that [`Spans::refusal`] names.
fn raise(sql: &mut Sql, refusal: &Refusal) {
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

#[cfg(test)]
mod tests;
