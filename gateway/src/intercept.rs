//! What becomes of each message of a session, in both directions. Pure: what takes time is asked for by [`Question`].

use std::rc::Rc;

use pg::SqlState;
use pg::frame::cstr;

use crate::bind::{BadValue, Bind, without_last_parameter};
use crate::encoding::Encoding;
use crate::fields::{Fields, frame};
use crate::parser::Refusal;
use crate::patch::{command_tag, translate};
use crate::rewrite::{Findings, Plan, plan};
use crate::statement::{CreatePeer, GivenOption, Value};
use crate::tracker::{Attribution, Prepared, Tracker};

/// The session's side of the interception: its settings, and what is outstanding.
pub struct Interceptor {
    /// Our statements are looked for: not in replication sessions, nor in databases other than the catalog.
    enabled: bool,
    nonce: String,
    encoding: Encoding,
    conforming: bool,
    tracker: Tracker,
    /// The tag that the next CommandComplete gets.
    tag: Option<Vec<u8>>,
}

/// What becomes of a whole message.
pub enum Action {
    /// It goes on as it is.
    Pass,
    /// This goes on in its place; nothing, if empty.
    Replace(Vec<u8>),
    /// First something has to be found out; nothing, if the question names no peers.
    Ask(Box<Question>),
}

/// What has to be found out before a message can go on.
pub struct Question {
    /// The peers that are to be looked at, with the values of their options, in order.
    pub peers: Vec<PeerQuestion>,
    then: Then,
}

/// A CREATE PEER that is about to run.
pub struct PeerQuestion {
    /// The statement.
    pub peer: CreatePeer,
    /// Its options with their values; an error when they cannot be had.
    pub options: Result<Vec<(String, String)>, BadValue>,
}

enum Then {
    Query(Plan),
    Bind(Bind, Rc<Prepared>),
}

/// A message to send, and the mirrors that its statements wait for.
pub struct Answer {
    /// The frame.
    pub frame: Vec<u8>,
    /// Mirrors that are waited for.
    pub waits_for: Vec<String>,
}

impl Interceptor {
    /// Begins a session. `nonce` is its secret.
    pub fn new(enabled: bool, nonce: String) -> Interceptor {
        Interceptor {
            enabled,
            nonce,
            encoding: Encoding::Utf8,
            conforming: true,
            tracker: Tracker::default(),
            tag: None,
        }
    }

    /// Returns whether nothing that the client asked for is outstanding.
    pub fn is_idle(&self) -> bool {
        self.tracker.is_idle()
    }

    /// Returns whether a message from the client with that tag has to be seen whole.
    #[inline]
    pub fn wants_from_client(&self, tag: u8) -> bool {
        match tag {
            b'Q' | b'P' => self.enabled,
            b'B' | b'D' | b'E' | b'C' => self.tracker.has_ours(),
            _ => false,
        }
    }

    /// Notes a message from the client that goes on without having been seen.
    #[inline]
    pub fn passed_from_client(&mut self, tag: u8) {
        self.tracker.sent(tag);
    }

    /// Decides about a whole message from the client. What is malformed goes on, for the server to refuse.
    pub fn from_client(&mut self, tag: u8, body: &[u8]) -> Action {
        let action = match tag {
            b'Q' => self.query(body),
            b'P' => self.parse(body),
            b'B' => self.bind(body),
            b'D' | b'C' => self.describe_or_close(tag, body),
            b'E' => cstr(body).map(|(portal, _)| {
                self.tracker.sent_execute(portal);
                Action::Pass
            }),
            _ => None,
        };
        action.unwrap_or_else(|| {
            self.tracker.sent(tag);
            Action::Pass
        })
    }

    fn query(&mut self, body: &[u8]) -> Option<Action> {
        let (text, _) = cstr(body)?;
        let plan = plan(text, self.encoding, self.conforming)?;
        let peers: Vec<PeerQuestion> = if plan.fails_to_parse() {
            Vec::new()
        } else {
            plan.peers().map(|peer| PeerQuestion { options: literals(peer), peer: peer.clone() }).collect()
        };
        Some(Action::Ask(Box::new(Question { peers, then: Then::Query(plan) })))
    }

    fn parse(&mut self, body: &[u8]) -> Option<Action> {
        let (name, rest) = cstr(body)?;
        let (text, rest) = cstr(rest)?;
        let Some(plan) = plan(text, self.encoding, self.conforming) else {
            self.tracker.sent_parse(name, None);
            return Some(Action::Pass);
        };
        let types: Vec<u32> =
            rest.get(2..)?.chunks_exact(4).map(|t| u32::from_be_bytes([t[0], t[1], t[2], t[3]])).collect();
        let (rewritten, peer) = plan.render_prepared(&self.nonce, types.len());
        let body = [name, b"\0", &rewritten.text, b"\0", rest].concat();
        let prepared = Prepared { rewritten: Rc::new(rewritten), peer, types };
        self.tracker.sent_parse(name, Some(Rc::new(prepared)));
        Some(Action::Replace(frame(b'P', &body)))
    }

    fn bind(&mut self, body: &[u8]) -> Option<Action> {
        let bind = Bind::decode(body)?;
        let prepared = self.tracker.statement(bind.statement()).cloned();
        let Some((prepared, peer)) = prepared.and_then(|p| Some((p.clone(), p.peer.as_ref()?.statement.clone())))
        else {
            self.tracker.sent_bind(bind.portal(), bind.statement());
            return Some(Action::Pass);
        };
        let options = bind.options(prepared.peer.as_ref()?, &prepared.types, self.encoding);
        let peers = vec![PeerQuestion { peer, options }];
        Some(Action::Ask(Box::new(Question { peers, then: Then::Bind(bind, prepared) })))
    }

    fn describe_or_close(&mut self, tag: u8, body: &[u8]) -> Option<Action> {
        let (&kind, rest) = body.split_first()?;
        let (name, _) = cstr(rest)?;
        if tag == b'D' {
            self.tracker.sent_describe(kind, name)
        } else {
            self.tracker.sent_close(kind, name)
        }
        Some(Action::Pass)
    }

    /// Writes the message for which something had to be found out.
    pub fn answer(&mut self, question: Question, findings: Vec<Result<Findings, Refusal>>) -> Answer {
        match question.then {
            Then::Query(plan) => {
                let mut rewritten = plan.render(&self.nonce, findings);
                let waits_for = std::mem::take(&mut rewritten.waits_for);
                let frame = frame(b'Q', &[&rewritten.text[..], b"\0"].concat());
                self.tracker.sent_query(Rc::new(rewritten));
                Answer { frame, waits_for }
            }
            Then::Bind(bind, prepared) => {
                self.tracker.sent_bind(bind.portal(), bind.statement());
                let document = findings.into_iter().next().map_or_else(|| "{}".to_owned(), document);
                let frame = match &prepared.peer {
                    Some(peer) => bind.encode(peer, &document),
                    None => Vec::new(),
                };
                Answer { frame, waits_for: Vec::new() }
            }
        }
    }

    /// Returns whether a message from the server with that tag has to be seen whole.
    #[inline]
    pub fn wants_from_server(&self, tag: u8) -> bool {
        match tag {
            b'S' => true,
            b'N' | b'E' => self.enabled,
            b'C' => self.tag.is_some(),
            b't' => self.tracker.hides_parameter(),
            _ => false,
        }
    }

    /// Notes a message from the server that goes on without having been seen.
    #[inline]
    pub fn passed_from_server(&mut self, tag: u8) {
        self.tracker.received(tag);
    }

    /// Decides about a whole message from the server.
    pub fn from_server(&mut self, tag: u8, body: &[u8]) -> Action {
        let hides_parameter = tag == b't' && self.tracker.hides_parameter();
        let attribution = self.tracker.received(tag);
        match tag {
            b'S' => self.learn(body),
            b'N' => return self.notice(body),
            b'E' => {
                self.tag = None;
                return attribution.map_or(Action::Pass, |a| self.translated(b'E', body, &a));
            }
            b'C' => {
                if let Some(mut tag) = self.tag.take() {
                    tag.push(0);
                    return Action::Replace(frame(b'C', &tag));
                }
            }
            b't' if hides_parameter => return without_last_parameter(body).map_or(Action::Pass, Action::Replace),
            _ => {}
        }
        Action::Pass
    }

    /// Takes a ParameterStatus in.
    fn learn(&mut self, body: &[u8]) {
        let Some((name, rest)) = cstr(body) else { return };
        let Some((value, _)) = cstr(rest) else { return };
        match name {
            b"client_encoding" => self.encoding = Encoding::from_name(value),
            b"standard_conforming_strings" => self.conforming = value == b"on",
            _ => {}
        }
    }

    fn notice(&mut self, body: &[u8]) -> Action {
        let Some(fields) = Fields::decode(body) else { return Action::Pass };
        if let Some(tag) = command_tag(&fields, &self.nonce) {
            self.tag = Some(tag);
            return Action::Replace(Vec::new());
        }
        self.tracker.current().map_or(Action::Pass, |a| self.translated(b'N', body, &a))
    }

    fn translated(&self, tag: u8, body: &[u8], attribution: &Attribution) -> Action {
        let Some(mut fields) = Fields::decode(body) else { return Action::Pass };
        translate(&mut fields, &attribution.rewritten, attribution.ordinal, self.encoding);
        Action::Replace(fields.encode(tag))
    }
}

/// The values of a statement that has no parameters.
fn literals(peer: &CreatePeer) -> Result<Vec<(String, String)>, BadValue> {
    let literal = |option: &GivenOption| match &option.value {
        Value::Text(text) => Ok((option.name.clone(), text.clone())),
        // Postgres says so before this is looked at.
        Value::Parameter(n) => {
            Err(BadValue { option: option.name.clone(), message: format!("there is no parameter ${n}") })
        }
    };
    peer.options.iter().map(literal).collect()
}

/// The document that a prepared CREATE PEER gets: all ASCII, so that it is right in any client encoding.
fn document(findings: Result<Findings, Refusal>) -> String {
    let json = match findings {
        Ok(found) => {
            serde_json::json!({"options": found.options, "secrets": found.secrets, "validation": found.validation})
        }
        Err(refusal) => serde_json::json!({"options": {}, "secrets": {}, "validation": {
            "stage": "options", "sqlstate": refusal.sqlstate.as_str(), "message": refusal.message,
            "detail": refusal.detail, "hint": refusal.hint}}),
    };
    crate::rewrite::ascii(&json)
}

/// The refusal of a statement that was cancelled while something was being found out for it.
pub fn canceled() -> Refusal {
    Refusal {
        sqlstate: SqlState::QUERY_CANCELED,
        message: "canceling statement due to user request".to_owned(),
        detail: None,
        hint: None,
        at: 0,
    }
}
