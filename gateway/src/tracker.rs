//! Which request the server is answering, so that `patch` knows what belongs to a rewritten text; and which prepared statements
//! are ours.
//!
//! Requests are answered in order, so a queue tells. What the server says is never doubted: when an answer does not fit, the
//! queue is thrown away and messages pass as they are until the session is quiet again. Nothing but looks depends on it.
//!
//! Source: PostgreSQL docs, protocol-flow, "Extended Query" and "COPY Operations".

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use crate::rewrite::{Execution, PreparedPeer, Rewritten};

/// A prepared statement of ours.
#[derive(Debug)]
pub struct Prepared {
    /// Its text.
    pub rewritten: Rc<Rewritten>,
    /// Set for a CREATE PEER: what its Bind must be given.
    pub peer: Option<PreparedPeer>,
    /// The parameter types that Parse gave; 0 where it left one to the server.
    pub types: Vec<u32>,
}

/// Requests that are kept in mind. More can only be outstanding when the client asks without listening.
const OUTSTANDING_MAX: usize = 100_000;

/// A request of which an answer is outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Parse,
    Bind,
    Describe,
    Execute,
    Close,
    Sync,
    Query,
    Function,
    /// Not a request: the end of the client's copy data, up to which the server ignores Sync.
    CopyEnd,
}

#[derive(Debug)]
struct Entry {
    request: Request,
    ours: Option<Rc<Rewritten>>,
    /// What `statements` held before this Parse or Close, which an error takes back.
    undo: Option<(Vec<u8>, Option<Rc<Prepared>>)>,
    /// A Describe whose last parameter the client must not see.
    hides_parameter: bool,
    /// What the client gets in place of the answer.
    instead: Option<Rc<Vec<u8>>>,
}

/// What an answer belongs to: a rewritten text, and which statement of it.
#[derive(Debug)]
pub struct Attribution {
    /// The text.
    pub rewritten: Rc<Rewritten>,
    /// Which of its statements is running, from 0.
    pub ordinal: usize,
}

/// How well the queue matches what the server does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sight {
    /// It does.
    #[default]
    Clear,
    /// It does not.
    Lost,
    /// It did not, but the last that was heard is ReadyForQuery: the next request may be the only one.
    LostButQuiet,
}

/// The queue of outstanding requests, and the prepared statements and portals that are ours.
#[derive(Debug, Default)]
pub struct Tracker {
    queue: VecDeque<Entry>,
    sight: Sight,
    /// An error has been heard and the Sync that ends the skipping has not been sent: the server ignores all until then.
    skipping: bool,
    /// The server is taking copy data.
    copying_in: bool,
    /// Statements of the Query in front that have completed.
    completed: usize,
    statements: HashMap<Vec<u8>, Rc<Prepared>>,
    portals: HashMap<Vec<u8>, Rc<Rewritten>>,
}

impl Tracker {
    /// Returns whether there are prepared statements or portals of ours: else names need not be looked at.
    #[inline]
    pub fn has_ours(&self) -> bool {
        !self.statements.is_empty() || !self.portals.is_empty()
    }

    /// Returns a prepared statement of ours.
    pub fn statement(&self, name: &[u8]) -> Option<&Rc<Prepared>> {
        self.statements.get(name)
    }

    /// Returns whether all that was asked has been answered.
    pub fn is_idle(&self) -> bool {
        match self.sight {
            Sight::Clear => self.queue.iter().all(|e| e.request == Request::CopyEnd),
            Sight::Lost => false,
            Sight::LostButQuiet => true,
        }
    }

    /// Notes a frame from the client of which only the tag was looked at.
    #[inline]
    pub fn sent(&mut self, tag: u8) {
        let request = match tag {
            b'Q' => Request::Query,
            b'P' => Request::Parse,
            b'B' => Request::Bind,
            b'D' => Request::Describe,
            b'E' => Request::Execute,
            b'C' => Request::Close,
            b'S' => Request::Sync,
            b'F' => Request::Function,
            b'c' | b'f' => Request::CopyEnd,
            _ => return,
        };
        self.push(request, None);
    }

    /// Notes a Query whose text was rewritten.
    pub fn sent_query(&mut self, rewritten: Rc<Rewritten>) {
        self.push(Request::Query, Some(rewritten));
    }

    /// Notes a Parse; `prepared` when it is ours.
    pub fn sent_parse(&mut self, name: &[u8], prepared: Option<Rc<Prepared>>) {
        let ours = prepared.as_ref().map(|p| p.rewritten.clone());
        if self.push(Request::Parse, ours) {
            self.define(name, prepared);
        }
    }

    /// Notes a Bind.
    pub fn sent_bind(&mut self, portal: &[u8], statement: &[u8]) {
        let ours = self.statements.get(statement).map(|p| p.rewritten.clone());
        if self.push(Request::Bind, ours.clone()) {
            match ours {
                Some(rewritten) => drop(self.portals.insert(portal.to_vec(), rewritten)),
                None => drop(self.portals.remove(portal)),
            }
        }
    }

    /// Notes a Describe of a statement (`S`) or portal (`P`).
    pub fn sent_describe(&mut self, kind: u8, name: &[u8]) {
        let prepared = (kind == b'S').then(|| self.statements.get(name)).flatten();
        let hides = prepared.is_some_and(|p| p.peer.is_some());
        if self.push(Request::Describe, None)
            && let Some(entry) = self.queue.back_mut()
        {
            entry.hides_parameter = hides;
        }
    }

    /// Notes a Describe that a peer has answered already: the client gets the frame `instead` of what the server says.
    pub fn sent_described(&mut self, instead: Vec<u8>) {
        if self.push(Request::Describe, None)
            && let Some(entry) = self.queue.back_mut()
        {
            entry.instead = Some(Rc::new(instead));
        }
    }

    /// Returns the frame that takes the place of the answer to the request in front, if it is a Describe that a peer has answered.
    pub fn instead(&self) -> Option<Rc<Vec<u8>>> {
        self.queue.front().filter(|_| self.sight == Sight::Clear)?.instead.clone()
    }

    /// Returns what a statement (`S`) or portal (`P`) runs on a peer.
    pub fn prepared_execution(&self, kind: u8, name: &[u8]) -> Option<Rc<Execution>> {
        let rewritten = match kind {
            b'S' => self.statements.get(name).map(|p| &p.rewritten),
            _ => self.portals.get(name),
        };
        rewritten.and_then(|r| r.executions.first()).cloned()
    }

    /// Returns what a peer is to run in place of the statement that the server has come to.
    pub fn execution(&self) -> Option<Rc<Execution>> {
        let attribution = self.current().filter(|_| self.sight == Sight::Clear)?;
        attribution.rewritten.execution(attribution.ordinal).cloned()
    }

    /// Returns whether an answer is outstanding to what a peer is to run.
    pub fn awaits_execution(&self) -> bool {
        let on_peer = |e: &Entry| {
            matches!(e.request, Request::Query | Request::Execute)
                && e.ours.as_ref().is_some_and(|ours| !ours.executions.is_empty())
        };
        self.queue.iter().any(on_peer)
    }

    /// Returns whether the next request's answers will be told apart.
    pub fn is_clear(&self) -> bool {
        self.sight != Sight::Lost
    }

    /// Notes an Execute.
    pub fn sent_execute(&mut self, portal: &[u8]) {
        let ours = self.portals.get(portal).cloned();
        self.push(Request::Execute, ours);
    }

    /// Notes a Close of a statement (`S`) or portal (`P`).
    pub fn sent_close(&mut self, kind: u8, name: &[u8]) {
        if !self.push(Request::Close, None) {
            return;
        }
        match kind {
            b'S' => self.define(name, None),
            _ => drop(self.portals.remove(name)),
        }
    }

    /// Returns whether the request will be answered.
    fn push(&mut self, request: Request, ours: Option<Rc<Rewritten>>) -> bool {
        match self.sight {
            Sight::Clear => {}
            // Our prepared statements must be known even so: their Bind lacks a parameter.
            Sight::Lost => return true,
            Sight::LostButQuiet => self.sight = Sight::Clear,
        }
        if self.skipping {
            if request != Request::Sync {
                return false;
            }
            self.skipping = false;
        }
        // The end of a copy that nobody began, or that has ended, is ignored.
        if request == Request::CopyEnd && self.queue.back().is_none_or(|last| last.request == Request::CopyEnd) {
            return false;
        }
        if self.queue.len() >= OUTSTANDING_MAX {
            self.lose();
            return true;
        }
        if request == Request::Sync && self.copying_in && !self.queue.iter().any(|e| e.request == Request::CopyEnd) {
            return false;
        }
        self.queue.push_back(Entry { request, ours, undo: None, hides_parameter: false, instead: None });
        true
    }

    fn define(&mut self, name: &[u8], prepared: Option<Rc<Prepared>>) {
        if prepared.is_none() && self.statements.is_empty() {
            return;
        }
        let previous = match prepared {
            Some(prepared) => self.statements.insert(name.to_vec(), prepared),
            None => self.statements.remove(name),
        };
        if self.sight == Sight::Clear
            && let Some(entry) = self.queue.back_mut()
        {
            entry.undo = Some((name.to_vec(), previous));
        }
    }

    /// Returns what a notice that comes now belongs to.
    pub fn current(&self) -> Option<Attribution> {
        let entry = self.queue.iter().find(|e| e.request != Request::CopyEnd)?;
        Some(Attribution { rewritten: entry.ours.clone()?, ordinal: self.completed })
    }

    /// Returns whether the ParameterDescription that comes now has a parameter that the client must not see.
    pub fn hides_parameter(&self) -> bool {
        self.queue.front().is_some_and(|e| e.request == Request::Describe && e.hides_parameter)
    }

    /// Notes a frame from the server. For an ErrorResponse, returns what it belongs to.
    #[inline]
    pub fn received(&mut self, tag: u8) -> Option<Attribution> {
        match tag {
            b'1' | b'2' | b'3' | b'C' | b'E' | b'G' | b'I' | b'T' | b'W' | b'Z' | b'n' | b's' | b't' => {
                self.answered(tag)
            }
            _ => None,
        }
    }

    fn answered(&mut self, tag: u8) -> Option<Attribution> {
        if self.sight != Sight::Clear {
            self.sight = if tag == b'Z' { Sight::LostButQuiet } else { Sight::Lost };
            return None;
        }
        while self.queue.front().is_some_and(|e| e.request == Request::CopyEnd) {
            self.queue.pop_front();
        }
        let front = self.queue.front().map(|e| e.request);
        match (tag, front) {
            (b'1', Some(Request::Parse))
            | (b'2', Some(Request::Bind))
            | (b'3', Some(Request::Close))
            | (b'T' | b'n', Some(Request::Describe))
            | (b's', Some(Request::Execute)) => self.pop(),
            (b'C' | b'I', Some(Request::Execute)) => {
                self.end_copy();
                self.pop();
            }
            (b'C' | b'I', Some(Request::Query)) => {
                self.end_copy();
                self.completed += 1;
            }
            (b't', Some(Request::Describe)) | (b'T', Some(Request::Query)) => {}
            (b'G' | b'W', Some(Request::Execute | Request::Query)) => self.begin_copy(),
            (b'Z', Some(Request::Sync | Request::Query | Request::Function)) => {
                self.completed = 0;
                self.copying_in = false;
                self.pop();
            }
            // The first one, after the login.
            (b'Z', None) => {}
            (b'E', Some(Request::Query)) => {
                self.copying_in = false;
                return self.current();
            }
            (b'E', Some(Request::Sync | Request::Function)) => {}
            // Not an answer: the server is ending the session.
            (b'E', None) => {}
            (b'E', Some(_)) => {
                let attribution = self.current();
                self.skip_to_sync();
                return attribution;
            }
            _ => self.lose(),
        }
        None
    }

    fn pop(&mut self) {
        self.queue.pop_front();
    }

    /// From here to the end of its copy data, the server ignores what would else be a Sync.
    fn begin_copy(&mut self) {
        self.copying_in = true;
        let end = self.queue.iter().position(|e| e.request == Request::CopyEnd).unwrap_or(self.queue.len());
        let mut index = 0;
        self.queue.retain(|entry| {
            index += 1;
            index > end || entry.request != Request::Sync
        });
    }

    fn end_copy(&mut self) {
        if std::mem::take(&mut self.copying_in)
            && let Some(end) = self.queue.iter().position(|e| e.request == Request::CopyEnd)
        {
            self.queue.remove(end);
        }
    }

    /// After an error in the extended protocol, the server ignores everything up to the next Sync, queries too.
    fn skip_to_sync(&mut self) {
        self.copying_in = false;
        let end = self.queue.iter().position(|e| e.request == Request::Sync);
        self.skipping = end.is_none();
        let skipped: Vec<Entry> = self.queue.drain(..end.unwrap_or(self.queue.len())).collect();
        for (name, previous) in skipped.into_iter().rev().filter_map(|e| e.undo) {
            // A later request that replaced it in turn would now restore what never was.
            let later = self.queue.iter_mut().filter_map(|e| e.undo.as_mut()).find(|(n, _)| *n == name);
            match (later, previous) {
                (Some(later), previous) => later.1 = previous,
                (None, Some(previous)) => drop(self.statements.insert(name, previous)),
                (None, None) => drop(self.statements.remove(&name)),
            }
        }
    }

    fn lose(&mut self) {
        self.queue.clear();
        self.skipping = false;
        self.copying_in = false;
        self.completed = 0;
        self.sight = Sight::Lost;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::Encoding;
    use crate::rewrite::plan;

    fn rewritten() -> Rc<Rewritten> {
        Rc::new(plan(b"show peers", Encoding::Utf8, true).unwrap().render("n", vec![]))
    }

    fn prepared() -> Option<Rc<Prepared>> {
        Some(Rc::new(Prepared { rewritten: rewritten(), peer: None, types: vec![] }))
    }

    fn send(tracker: &mut Tracker, tags: &[u8]) {
        tags.iter().for_each(|tag| tracker.sent(*tag));
    }

    fn receive(tracker: &mut Tracker, tags: &[u8]) {
        tags.iter().for_each(|tag| drop(tracker.received(*tag)));
    }

    #[test]
    fn a_notice_belongs_to_the_statement_that_is_running() {
        let mut tracker = Tracker::default();
        send(&mut tracker, b"Q");
        tracker.sent_query(rewritten());
        assert!(tracker.current().is_none());
        receive(&mut tracker, b"TDCZTDC");
        assert_eq!(tracker.current().map(|a| a.ordinal), Some(1));
        receive(&mut tracker, b"CZ");
        assert!(tracker.is_idle() && tracker.current().is_none());
    }

    #[test]
    fn an_error_in_a_pipeline_skips_to_sync() {
        let mut tracker = Tracker::default();
        tracker.sent_parse(b"a", prepared());
        tracker.sent_bind(b"", b"a");
        tracker.sent_execute(b"");
        send(&mut tracker, b"QSQ");
        receive(&mut tracker, b"12");
        assert!(tracker.received(b'E').is_some());
        receive(&mut tracker, b"Z");
        assert!(!tracker.is_idle());
        receive(&mut tracker, b"CZ");
        assert!(tracker.is_idle());
        assert!(tracker.statement(b"a").is_some());
    }

    #[test]
    fn a_sync_that_is_sent_after_the_error_ends_the_skipping() {
        let mut tracker = Tracker::default();
        send(&mut tracker, b"PB");
        receive(&mut tracker, b"1E");
        send(&mut tracker, b"PBDES");
        receive(&mut tracker, b"Z");
        assert!(tracker.is_idle());
    }

    #[test]
    fn a_parse_that_failed_defines_nothing() {
        let mut tracker = Tracker::default();
        tracker.sent_parse(b"a", prepared());
        send(&mut tracker, b"S");
        // Sent before the error was heard, and successful.
        tracker.sent_parse(b"a", None);
        send(&mut tracker, b"S");
        receive(&mut tracker, b"EZ1Z");
        assert!(tracker.is_idle() && tracker.statement(b"a").is_none());

        tracker.sent_parse(b"a", prepared());
        send(&mut tracker, b"S");
        receive(&mut tracker, b"1Z");
        tracker.sent_close(b'S', b"a");
        tracker.sent_parse(b"a", None);
        send(&mut tracker, b"S");
        receive(&mut tracker, b"EZ");
        assert!(tracker.statement(b"a").is_some(), "neither Close nor Parse was done");

        tracker.sent_parse(b"b", prepared());
        send(&mut tracker, b"S");
        tracker.sent_parse(b"b", None);
        send(&mut tracker, b"S");
        receive(&mut tracker, b"1ZEZ");
        assert!(tracker.statement(b"b").is_some(), "the name was taken");
    }

    #[test]
    fn a_sync_before_the_copy_data_is_swallowed() {
        let mut tracker = Tracker::default();
        send(&mut tracker, b"BES");
        receive(&mut tracker, b"2G");
        send(&mut tracker, b"ddSdcS");
        receive(&mut tracker, b"CZ");
        assert!(tracker.is_idle());
        send(&mut tracker, b"Qddc");
        receive(&mut tracker, b"GCZ");
        assert!(tracker.is_idle());
        // The server gives up before the client knows.
        send(&mut tracker, b"Q");
        receive(&mut tracker, b"GEZ");
        send(&mut tracker, b"dcQ");
        receive(&mut tracker, b"CZ");
        assert!(tracker.is_idle());
    }

    #[test]
    fn what_does_not_fit_is_forgotten_until_the_session_is_quiet() {
        let mut tracker = Tracker::default();
        send(&mut tracker, b"Q");
        receive(&mut tracker, b"1");
        assert!(!tracker.is_idle());
        tracker.sent_query(rewritten());
        assert!(tracker.received(b'E').is_none());
        receive(&mut tracker, b"Z");
        tracker.sent_query(rewritten());
        assert!(tracker.received(b'E').is_some());
        receive(&mut tracker, b"Z");
        assert!(tracker.is_idle());
    }

    #[test]
    fn any_order_of_messages_is_survived() {
        let mut state = 7_u64;
        let mut tracker = Tracker::default();
        for _ in 0..100_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let pick = |from: &[u8]| from[(state >> 40) as usize % from.len()];
            let name = [pick(b"ab")];
            match state >> 61 {
                0 => tracker.sent_parse(&name, prepared()),
                1 => tracker.sent_close(b'S', &name),
                2 => tracker.sent_bind(&name, &name),
                3 => tracker.sent(pick(b"QPBDECSFcfX\0")),
                _ => drop(tracker.received(pick(b"123CEGITWZnstNSA\0"))),
            }
        }
    }
}
