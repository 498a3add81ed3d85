//! What becomes of each message of a session, in both directions. Pure: what takes time is asked for by [`Question`].

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use pg::SqlState;
use pg::frame::cstr;

use crate::bind::{BadValue, Bind, without_last_parameter};
use crate::encoding::Encoding;
use crate::fields::{Fields, frame};
use crate::parser::Refusal;
use crate::patch::{command_tag, translate};
use crate::peers::Peers;
use crate::rewrite::{
    Execution, Findings, Permit, Plan, VerificationOrder, awaits_import, failure, is_failure, is_sign_of_life,
    plan_with, success,
};
use crate::statement::{Inspected, Statement, Value};
use crate::tracker::{Attribution, Prepared, Tracker};
use crate::validate::unusable;

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
    /// The peers that can be named.
    peers: Arc<Peers>,
    /// The settings that a session on a peer takes over, as the server has reported them.
    settings: Vec<(&'static str, Vec<u8>)>,
    /// Portals of what a peer is to run, and the formats that their Bind asked for.
    formats: HashMap<Vec<u8>, Vec<u16>>,
    /// How the EXECUTE on a peer that was sent last is to be answered.
    answer: AnswerForm,
    /// The session has run something on a peer: what it discards is discarded there, too.
    has_run: bool,
    /// Nothing of the client's goes on: an EXECUTE on a peer has been sent, and what follows it would be taken for its copy data.
    holds_back: bool,
    stage: Stage,
    /// The last that was heard is that a transaction block is open.
    in_block: bool,
}

/// How far an EXECUTE on a peer has come.
#[derive(Default)]
enum Stage {
    #[default]
    None,
    /// The catalog has been told which peer it is.
    Asked(Rc<Execution>),
    /// The peer has the word.
    Running,
    /// The peer has done it: the client gets this when the catalog has, too.
    Done(Vec<u8>),
    /// The peer has failed: the client gets this in place of the catalog's error.
    Failed(Vec<u8>),
}

/// In which form a client wants its answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AnswerForm {
    /// All that comes, as to a Query.
    #[default]
    Simple,
    /// As to an Execute.
    Portal {
        /// The formats of the columns, as in Bind.
        formats: Vec<u16>,
        /// How many rows it wants at the most; 0: all.
        rows_max: u32,
    },
}

/// An EXECUTE on a peer that may go on.
pub struct Run {
    /// What is to be run.
    pub execution: Rc<Execution>,
    /// The catalog's permission.
    pub permit: Permit,
    /// How it is to be answered.
    pub form: AnswerForm,
    /// The session's settings, for a session on a peer.
    pub settings: Vec<(&'static str, Vec<u8>)>,
}

/// A Describe that a peer must answer.
pub struct PeerDescribe {
    /// What would be run.
    pub execution: Rc<Execution>,
    /// The formats of the columns, as in Bind.
    pub formats: Vec<u16>,
    /// The session's settings, for a session on a peer.
    pub settings: Vec<(&'static str, Vec<u8>)>,
}

/// The settings that are taken over: what decides how values look as text.
const SETTINGS: [&str; 5] = ["application_name", "client_encoding", "DateStyle", "IntervalStyle", "TimeZone"];

/// What becomes of a whole message.
pub enum Action {
    /// It goes on as it is.
    Pass,
    /// This goes on in its place; nothing, if empty.
    Replace(Vec<u8>),
    /// First something has to be found out; nothing, if the question names no peers.
    Ask(Box<Question>),
    /// A peer's last word goes on in its place.
    Finish(Vec<u8>),
    /// It goes no further, and the server gets this answer.
    Reply(Vec<u8>),
    /// It goes no further, and the task of a verification is made.
    Verify(Box<VerificationOrder>),
    /// It goes no further: a peer has the word now, and [`Interceptor::has_run`] says what the server gets then.
    Execute(Box<Run>),
}

/// What has to be found out before a message can go on.
pub struct Question {
    /// The peers that are to be looked at, with the values of their options, in order.
    pub peers: Vec<PeerQuestion>,
    /// What a peer has to describe.
    pub description: Option<PeerDescribe>,
    then: Then,
}

/// A statement about a peer that is about to run.
pub struct PeerQuestion {
    /// The statement.
    pub statement: Statement,
    /// Its options with their values; an error when they cannot be had.
    pub options: Result<Vec<(String, String)>, BadValue>,
}

enum Then {
    Query(Plan),
    Bind(Bind, Rc<Prepared>),
    /// The body.
    Describe(Vec<u8>),
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
            peers: Arc::default(),
            settings: Vec::new(),
            formats: HashMap::new(),
            answer: AnswerForm::Simple,
            has_run: false,
            holds_back: false,
            stage: Stage::None,
            in_block: false,
        }
    }

    /// Takes the peers that can be named from now on.
    pub fn set_peers(&mut self, peers: Arc<Peers>) {
        self.peers = peers;
    }

    /// Returns whether a Query or Parse names a table that is still being brought in.
    pub fn awaits_import(&self, tag: u8, body: &[u8]) -> bool {
        let text = if tag == b'P' { cstr(body).map(|(_, rest)| rest) } else { Some(body) };
        let text = text.and_then(cstr).map(|(text, _)| text);
        self.enabled && text.is_some_and(|text| awaits_import(text, self.encoding, self.conforming, &self.peers))
    }

    /// Returns whether nothing of the client's may go on until more has come from the server.
    #[inline]
    pub fn holds_back(&self) -> bool {
        self.holds_back
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
            b'E' => self.execute(body),
            _ => None,
        };
        action.unwrap_or_else(|| {
            self.tracker.sent(tag);
            Action::Pass
        })
    }

    fn query(&mut self, body: &[u8]) -> Option<Action> {
        let (text, _) = cstr(body)?;
        let plan = self.plan(text)?;
        let peers: Vec<PeerQuestion> = if plan.fails_to_parse() {
            Vec::new()
        } else {
            let question =
                |s: &Statement| PeerQuestion { options: literals(s.inspected_options()), statement: s.clone() };
            plan.inspected().map(question).collect()
        };
        Some(Action::Ask(Box::new(Question { peers, description: None, then: Then::Query(plan) })))
    }

    fn plan(&self, text: &[u8]) -> Option<Plan> {
        // What a peer is to run needs answers that are told apart.
        if self.tracker.is_clear() {
            plan_with(text, self.encoding, self.conforming, &self.peers)
        } else {
            plan_with(text, self.encoding, self.conforming, &Peers::default())
        }
    }

    fn parse(&mut self, body: &[u8]) -> Option<Action> {
        let (name, rest) = cstr(body)?;
        let (text, rest) = cstr(rest)?;
        let Some(plan) = self.plan(text) else {
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
        let Some((prepared, statement)) = prepared.and_then(|p| Some((p.clone(), p.peer.as_ref()?.statement.clone())))
        else {
            self.tracker.sent_bind(bind.portal(), bind.statement());
            self.formats.remove(bind.portal());
            if self.tracker.prepared_execution(b'P', bind.portal()).is_some() {
                self.formats.insert(bind.portal().to_vec(), bind.result_formats());
            }
            return Some(Action::Pass);
        };
        let options = bind.options(prepared.peer.as_ref()?, &prepared.types, self.encoding);
        let peers = vec![PeerQuestion { statement, options }];
        Some(Action::Ask(Box::new(Question { peers, description: None, then: Then::Bind(bind, prepared) })))
    }

    fn execute(&mut self, body: &[u8]) -> Option<Action> {
        let (portal, rest) = cstr(body)?;
        if self.tracker.prepared_execution(b'P', portal).is_some() {
            let rows_max = u32::from_be_bytes(*rest.first_chunk()?);
            let formats = self.formats.get(portal).cloned().unwrap_or_default();
            // A negative number means all, as to PostgreSQL.
            let rows_max = if i32::try_from(rows_max).is_ok() { rows_max } else { 0 };
            self.answer = AnswerForm::Portal { formats, rows_max };
        }
        self.tracker.sent_execute(portal);
        self.holds_back = self.tracker.awaits_execution();
        Some(Action::Pass)
    }

    fn describe_or_close(&mut self, tag: u8, body: &[u8]) -> Option<Action> {
        let (&kind, rest) = body.split_first()?;
        let (name, _) = cstr(rest)?;
        if tag == b'D'
            && let Some(execution) = self.tracker.prepared_execution(kind, name)
        {
            let formats = self.formats.get(name).filter(|_| kind == b'P').cloned().unwrap_or_default();
            let description = Some(PeerDescribe { execution, formats, settings: self.settings.clone() });
            return Some(Action::Ask(Box::new(Question {
                peers: Vec::new(),
                description,
                then: Then::Describe(body.to_vec()),
            })));
        }
        if tag == b'D' {
            self.tracker.sent_describe(kind, name)
        } else {
            self.tracker.sent_close(kind, name)
        }
        Some(Action::Pass)
    }

    /// Writes the message for a Describe that a peer has answered: with the frame that the client gets in place of the server's
    /// answer, or with an error in place of the error that the server is made to raise.
    pub fn described(&mut self, question: Question, description: Result<Vec<u8>, Vec<u8>>) -> Answer {
        let Then::Describe(body) = question.then else { return Answer { frame: Vec::new(), waits_for: Vec::new() } };
        let frame = match description {
            Ok(description) => {
                self.tracker.sent_described(description);
                frame(b'D', &body)
            }
            Err(error) => {
                self.tracker.sent_described(error);
                frame(b'D', format!("S{}.none\0", self.nonce).as_bytes())
            }
        };
        Answer { frame, waits_for: Vec::new() }
    }

    /// Takes in what came of a [`Run`]: the frame that ends the statement, or the error. Returns what the server gets.
    pub fn has_run(&mut self, result: Result<Vec<u8>, Vec<u8>>) -> Vec<u8> {
        self.has_run = true;
        match result {
            Ok(end) => {
                self.stage = Stage::Done(end);
                success()
            }
            Err(error) => {
                self.stage = Stage::Failed(error);
                failure()
            }
        }
    }

    /// Writes the message for which something had to be found out.
    pub fn answer(&mut self, question: Question, findings: Vec<Result<Findings, Refusal>>) -> Answer {
        match question.then {
            Then::Query(plan) => {
                let mut rewritten = plan.render(&self.nonce, findings);
                let waits_for = std::mem::take(&mut rewritten.waits_for);
                let frame = frame(b'Q', &[&rewritten.text[..], b"\0"].concat());
                let on_peer = !rewritten.executions.is_empty();
                self.tracker.sent_query(Rc::new(rewritten));
                if on_peer {
                    self.answer = AnswerForm::Simple;
                    self.holds_back = self.tracker.awaits_execution();
                }
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
            Then::Describe(body) => Answer { frame: frame(b'D', &body), waits_for: Vec::new() },
        }
    }

    /// Returns whether a message from the server with that tag has to be seen whole.
    #[inline]
    pub fn wants_from_server(&self, tag: u8) -> bool {
        match tag {
            b'S' => true,
            b'N' | b'E' => self.enabled,
            b'C' => self.tag.is_some() || self.holds_back || self.has_run,
            b'G' => self.holds_back,
            b'n' => self.tracker.instead().is_some(),
            b't' => self.tracker.hides_parameter(),
            _ => false,
        }
    }

    /// Notes a message from the server that goes on without having been seen.
    #[inline]
    pub fn passed_from_server(&mut self, tag: u8) {
        self.tracker.received(tag);
        self.let_go();
    }

    /// Decides about a whole message from the server.
    pub fn from_server(&mut self, tag: u8, body: &[u8]) -> Action {
        let action = self.decide(tag, body);
        self.let_go();
        action
    }

    /// Lets the client's messages go on when what they waited for is over.
    fn let_go(&mut self) {
        if self.holds_back && !self.tracker.awaits_execution() {
            self.holds_back = false;
            self.stage = Stage::None;
        }
    }

    fn decide(&mut self, tag: u8, body: &[u8]) -> Action {
        if let (b'G', Some(execution)) = (tag, self.tracker.execution().filter(|_| self.holds_back)) {
            let row = execution.row(&self.nonce);
            self.stage = Stage::Asked(execution);
            return Action::Reply(row);
        }
        let instead = self.tracker.instead().filter(|_| matches!(tag, b'n' | b'E'));
        let hides_parameter = tag == b't' && self.tracker.hides_parameter();
        let attribution = self.tracker.received(tag);
        match tag {
            // An error that the server had of its own comes instead of a description.
            b'n' | b'E' if instead.as_ref().is_some_and(|i| tag == b'n' || i.first() == Some(&b'E')) => {
                return instead.map_or(Action::Pass, |frame| Action::Replace(frame.to_vec()));
            }
            b'S' => self.learn(body),
            b'Z' => self.in_block = body.first().is_some_and(|status| *status != b'I'),
            b'N' => return self.notice(body),
            b'E' => {
                self.tag = None;
                if let Stage::Failed(error) = std::mem::take(&mut self.stage)
                    && is_failure(body)
                {
                    return Action::Replace(error);
                }
                return attribution.map_or(Action::Pass, |a| self.translated(b'E', body, &a));
            }
            b'C' => {
                if let Stage::Done(end) = std::mem::take(&mut self.stage) {
                    return Action::Finish(end);
                }
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
        if let Some(setting) = SETTINGS.into_iter().find(|setting| setting.as_bytes() == name) {
            self.settings.retain(|(known, _)| *known != setting);
            self.settings.push((setting, value.to_vec()));
        }
    }

    fn notice(&mut self, body: &[u8]) -> Action {
        let Some(fields) = Fields::decode(body) else { return Action::Pass };
        if let Some(tag) = command_tag(&fields, &self.nonce) {
            self.tag = Some(tag);
            return Action::Replace(Vec::new());
        }
        if let Stage::Asked(execution) = &self.stage
            && let Some(permit) = Permit::from_notice(&fields, &self.nonce)
        {
            let run = Run {
                execution: execution.clone(),
                permit,
                form: self.answer.clone(),
                settings: self.settings.clone(),
            };
            self.stage = Stage::Running;
            return Action::Execute(Box::new(run));
        }
        if is_sign_of_life(&fields, &self.nonce) {
            return Action::Replace(Vec::new());
        }
        let Some(attribution) = self.tracker.current() else { return Action::Pass };
        let verification = attribution.rewritten.verification(attribution.ordinal);
        if let Some(order) = verification.and_then(|v| v.order(&fields, &self.nonce, self.in_block)) {
            return Action::Verify(Box::new(order));
        }
        self.translated(b'N', body, &attribution)
    }

    fn translated(&self, tag: u8, body: &[u8], attribution: &Attribution) -> Action {
        let Some(mut fields) = Fields::decode(body) else { return Action::Pass };
        translate(&mut fields, &attribution.rewritten, attribution.ordinal, self.encoding);
        Action::Replace(fields.encode(tag))
    }
}

/// The values of a statement that has no parameters.
fn literals(options: Option<Vec<Inspected<'_>>>) -> Result<Vec<(String, String)>, BadValue> {
    let literal = |Inspected { part, option, .. }: Inspected<'_>| match &option.value {
        Value::Text(text) => Ok((option.name.clone(), text.clone())),
        // Postgres says so before this is looked at.
        Value::Parameter(n) => Err(BadValue { part, message: format!("there is no parameter ${n}") }),
    };
    options.unwrap_or_default().into_iter().map(literal).collect()
}

/// The document that a prepared statement about a peer gets.
fn document(findings: Result<Findings, Refusal>) -> String {
    let found = findings.unwrap_or_else(|refusal| {
        let error = serde_json::json!({"stage": "options", "sqlstate": refusal.sqlstate.as_str(),
            "message": refusal.message, "detail": refusal.detail, "hint": refusal.hint});
        unusable(error)
    });
    found.document()
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
