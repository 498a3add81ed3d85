//! The pump from the server to the client: answers that are passed on, those that are replaced, and what the gateway does between two.

use std::io;
use std::rc::Rc;

use bytes::{Buf, BytesMut};
use pg::SqlState;
use pg::frame::{FrameError, HEADER_BYTES, Header, Step, Walker};

use super::cut::{Cut, clear};
use super::{End, INSPECT_BYTES_MAX, Relay};
use crate::error::Fatal;
use crate::fields::Fields;
use crate::halves::{Connection, Half};
use crate::intake::Intake;
use crate::intercept::{Action, Run};
use crate::login::without_channel_binding;
use crate::registry::Behind;

impl Relay {
    /// Relays what the server says, until it closes. `upstream` is where it gets what the gateway itself has to say to it.
    pub(crate) async fn server_to_client<S, C>(
        self: Rc<Relay>,
        server: Half<S>,
        client: Half<C>,
        upstream: Half<S>,
    ) -> End
    where
        S: Connection,
        C: Connection,
    {
        self.reply(server, client, upstream).await.unwrap_or(End::Client)
    }

    /// Does what a message of the server's asks the gateway for; returns what the server gets.
    ///
    /// # Errors
    /// [`io::Error`] of the client's socket.
    async fn take_turn<C: Connection>(&self, turn: Turn, client: &mut Half<C>) -> io::Result<Vec<u8>> {
        let execute = match turn {
            Turn::Reply(said) => return Ok(said),
            Turn::Execute(execute) => execute,
        };
        self.at_boundary.set(false);
        let (shared, user) = (&self.session.shared, &self.session.user);
        let result = self.peer_sessions.run(shared, self.entry(), user, *execute, client).await?;
        self.at_boundary.set(true);
        Ok(self.interceptor.borrow_mut().has_run(result))
    }

    /// # Errors
    /// [`io::Error`] of the client's socket.
    async fn reply<S, C>(&self, mut server: Half<S>, mut client: Half<C>, mut upstream: Half<S>) -> io::Result<End>
    where
        S: Connection,
        C: Connection,
    {
        let mut walker = Walker::new();
        let mut buffer = BytesMut::new();
        let mut out = BytesMut::new();
        let mut intake = Intake::default();
        loop {
            match intake.read(&mut server, &mut buffer).await {
                Ok(0) | Err(_) if self.parting.get() => return Ok(End::Server),
                Ok(0) | Err(_) => return Ok(End::Fatal(Fatal::BackendGone)),
                // What comes without having been asked for, such as a notification, makes nobody busy.
                Ok(_) => {}
            }
            let mut became_ready = false;
            loop {
                let mut cut = Cut::default();
                let Ok(walked) = self.walk_server(&mut walker, &buffer, &mut cut, &mut out) else {
                    return Ok(End::Fatal(Fatal::BackendGone));
                };
                became_ready |= walked.became_ready;
                // Who hears that a peer was made or changed may use it from another session at once.
                if walked.became_ready && self.peers_version.get() == 0 && self.entry().status() == b'I' {
                    Box::pin(self.refresh_peers()).await;
                }
                let bytes = cut.bytes(&buffer, &mut out);
                self.at_boundary.set(false);
                client.send(bytes).await?;
                self.at_boundary.set(walker.at_boundary());
                self.entry().counters.sent.add(bytes.len());
                clear(&mut out);
                buffer.advance(cut.at);
                if self.awaits_let_go.get() && !self.interceptor.borrow().holds_back() {
                    self.let_go.notify_waiters();
                }
                let Some(turn) = walked.turn else { break };
                let said = Box::pin(self.take_turn(turn, &mut client)).await?;
                if upstream.send(&said).await.is_err() {
                    return Ok(End::Fatal(Fatal::BackendGone));
                }
            }
            if became_ready && !self.ready.replace(true) {
                self.session.shared.events.login(true);
                self.became_ready.notify_waiters();
            }
            if self.awaits_quiet.get() {
                self.became_quiet.notify_waiters();
            }
            let lacks = intake.lacks(&buffer);
            // Boxed, as it is rare: else each session would keep room for it.
            if lacks > 0 && !Box::pin(intake.take(lacks, &self.session.shared.held)).await {
                return Ok(End::Fatal(Fatal::HeldTooMuch));
            }
        }
    }

    /// Goes through what the server has said, as far as it asks nothing of the gateway itself.
    fn walk_server(
        &self,
        walker: &mut Walker,
        buffer: &[u8],
        cut: &mut Cut,
        out: &mut BytesMut,
    ) -> Result<Walked, FrameError> {
        let mut interceptor = self.interceptor.borrow_mut();
        let mut became_ready = false;
        loop {
            let header = match walker.step(&buffer[cut.at..])? {
                Step::More => return Ok(Walked { became_ready, turn: None }),
                Step::Rest(n) => {
                    cut.at += n;
                    continue;
                }
                Step::Frame(header) => header,
            };
            let login = !self.ready.get() && !became_ready;
            let wanted = interceptor.wants_from_server(header.tag)
                || matches!(header.tag, b'Z' | b'E')
                || login && matches!(header.tag, b'R' | b'K');
            if !wanted || header.size > INSPECT_BYTES_MAX {
                interceptor.passed_from_server(header.tag);
                cut.at += walker.pass(header, buffer.len() - cut.at);
                continue;
            }
            let Some(frame) = buffer.get(cut.at..cut.at + header.size) else {
                return Ok(Walked { became_ready, turn: None });
            };
            let body = &frame[HEADER_BYTES..];
            became_ready |= header.tag == b'Z';
            let action = if login { self.during_login(header, body) } else { None };
            let action = action.unwrap_or_else(|| interceptor.from_server(header.tag, body));
            match header.tag {
                b'Z' => self.became_free(body.first().copied().unwrap_or(0), interceptor.is_idle()),
                b'E' => self.watch_for_the_end(body),
                b'C' if body == b"DISCARD ALL\0" => self.peer_sessions.discard(),
                _ => {}
            }
            let turn = match action {
                Action::Pass | Action::Ask(_) => {
                    cut.at += header.size;
                    continue;
                }
                Action::Replace(frame) => {
                    if header.tag == b'C' {
                        self.note_statement(&frame[HEADER_BYTES..]);
                    }
                    cut.replace(header, buffer, &frame, out);
                    continue;
                }
                Action::Finish(frame) => {
                    self.note_statement(b"EXECUTE\0");
                    cut.replace(header, buffer, &frame, out);
                    continue;
                }
                Action::Verify(order) => {
                    self.session.begin_verification(*order);
                    cut.replace(header, buffer, &[], out);
                    continue;
                }
                Action::Reply(said) => Turn::Reply(said),
                Action::Execute(execute) => Turn::Execute(execute),
            };
            cut.replace(header, buffer, &[], out);
            return Ok(Walked { became_ready, turn: Some(turn) });
        }
    }

    /// Counts a statement of ours that has been done.
    fn note_statement(&self, tag: &[u8]) {
        self.session.shared.events.statement(tag);
        if tag.ends_with(b" PEER\0") {
            self.peers_version.set(0);
        }
    }

    /// Handles what only a login has: the list of mechanisms, and the key for cancel requests.
    fn during_login(&self, header: Header, body: &[u8]) -> Option<Action> {
        match header.tag {
            b'R' if !self.session.keeps_channel_binding => without_channel_binding(body).map(Action::Replace),
            b'K' => {
                self.session.place.relayed_to(body, self.session.attempt.clone());
                let entry = self.entry();
                let pid = entry.behind().and_then(Behind::pid);
                tracing::debug!(pid, user = self.session.user, client = %entry.client, "session begins");
                None
            }
            b'E' => {
                let hint = self.session.database_hint.as_ref()?;
                let mut fields = Fields::decode(body)?;
                if fields.get(b'C') != Some(SqlState::UNDEFINED_DATABASE.as_str().as_bytes()) {
                    return None;
                }
                fields.set(b'H', hint.as_bytes());
                Some(Action::Replace(fields.encode(b'E')))
            }
            _ => None,
        }
    }

    /// The server has answered a request; `status` is the transaction's. If that was not the last request, it goes on at once.
    fn became_free(&self, status: u8, was_last: bool) {
        let entry = self.entry();
        entry.set_status(if was_last { status } else { 0 });
        entry.counters.requests.add(1);
        if status == b'I' {
            entry.counters.transactions.add(1);
        }
    }

    /// Notes an error that ends the session.
    fn watch_for_the_end(&self, error: &[u8]) {
        let severity = Fields::decode(error).and_then(|f| f.get(b'V').map(<[u8]>::to_vec));
        if matches!(severity.as_deref(), Some(b"FATAL" | b"PANIC")) {
            self.parting.set(true);
            if !self.is_ready() {
                self.session.shared.events.login(false);
            }
        }
    }
}

/// How far a walk over what the server has said has come.
struct Walked {
    /// A ReadyForQuery was there.
    became_ready: bool,
    /// It stopped, because the gateway has to do something first.
    turn: Option<Turn>,
}

/// What a message of the server's asks the gateway itself for.
enum Turn {
    /// This answer.
    Reply(Vec<u8>),
    /// To let a peer run something.
    Execute(Box<Run>),
}
