//! The pump from the client to the server: what goes on as it is, what is held until something is found out, and what waits.

use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use pg::frame::{HEADER_BYTES, Header, Step, Walker};
use tokio::io::AsyncRead;

use super::cut::{Cut, clear};
use super::{End, INSPECT_BYTES_MAX, Relay};
use crate::error::Fatal;
use crate::halves::{Connection, Half};
use crate::intake::{Intake, listen};
use crate::intercept::{Action, Answer, Question, canceled};
use crate::validate::find_out;

/// How long a text waits for the tables of a new peer, and how often it looks.
const IMPORT_PATIENCE: Duration = Duration::from_secs(15);
const IMPORT_POLL: Duration = Duration::from_millis(50);

impl Relay {
    /// Relays what the client says, until it is gone. A server that takes no more is no end: what it said last, and why, is still
    /// to come the other way.
    pub(crate) async fn client_to_server<C, S>(
        self: Rc<Relay>,
        mut client: Half<C>,
        server: Half<S>,
        mut buffer: BytesMut,
    ) -> End
    where
        C: Connection,
        S: Connection,
    {
        match self.talk(&mut client, server, &mut buffer).await {
            Ok(end) => end,
            Err(error) => {
                tracing::debug!(error = %error, "cannot write to the catalog");
                listen(&mut client, &mut buffer).await;
                End::Client
            }
        }
    }

    async fn talk<C, S>(&self, client: &mut Half<C>, mut server: Half<S>, buffer: &mut BytesMut) -> io::Result<End>
    where
        C: Connection,
        S: Connection,
    {
        let mut walker = Walker::new();
        let mut out = BytesMut::new();
        let mut intake = Intake::default();
        loop {
            let mut cut = Cut::default();
            loop {
                match self.walk_client(&mut walker, buffer, &mut cut, &mut out) {
                    Stop::More => break,
                    Stop::Invalid => return Ok(End::Fatal(Fatal::Protocol("invalid message length"))),
                    Stop::Early => {
                        server.send(&buffer[cut.run..cut.at]).await?;
                        buffer.advance(cut.at);
                        cut = Cut::default();
                        self.logged_in().await;
                    }
                    Stop::LookUp => {
                        server.send(cut.bytes(buffer, &mut out)).await?;
                        clear(&mut out);
                        buffer.advance(cut.at);
                        cut = Cut::default();
                        Box::pin(self.look_up_peers(buffer)).await;
                        self.looked_up.set(true);
                    }
                    Stop::Held => {
                        server.send(cut.bytes(buffer, &mut out)).await?;
                        clear(&mut out);
                        buffer.advance(cut.at);
                        cut = Cut::default();
                        if !Box::pin(self.may_go_on(client, buffer)).await {
                            return Ok(End::Client);
                        }
                    }
                    Stop::Ask(question, size) => {
                        // What came before must not wait for what is found out.
                        out.extend_from_slice(&buffer[cut.run..cut.at]);
                        if !question.peers.is_empty() || question.description.is_some() {
                            server.send(&out).await?;
                            out.clear();
                        }
                        buffer.advance(cut.at);
                        let Some(answer) = Box::pin(self.answer(*question, client, buffer)).await else {
                            return Ok(End::Client);
                        };
                        out.extend_from_slice(&answer.frame);
                        self.session.announce(answer.waits_for);
                        cut = Cut { run: size, at: size };
                        if self.interceptor.borrow().holds_back() {
                            server.send(&out).await?;
                            clear(&mut out);
                            buffer.advance(size);
                            cut = Cut::default();
                            if !Box::pin(self.may_go_on(client, buffer)).await {
                                return Ok(End::Client);
                            }
                        }
                    }
                }
            }
            server.send(cut.bytes(buffer, &mut out)).await?;
            clear(&mut out);
            buffer.advance(cut.at);
            self.client_drained.set(buffer.is_empty() && walker.at_boundary());
            let lacks = intake.lacks(buffer);
            // Boxed, as it is rare: else each session would keep room for it.
            if lacks > 0 && !Box::pin(intake.take(lacks, &self.session.shared.held)).await {
                return Ok(End::Fatal(Fatal::HeldTooMuch));
            }
            match intake.read(client, buffer).await {
                Ok(0) | Err(_) => return Ok(End::Client),
                Ok(n) => {
                    self.entry().counters.received.add(n);
                    self.client_drained.set(false);
                    self.became_busy();
                }
            }
        }
    }

    /// Goes on from `cut` through what the client has said, as far as nothing has to be waited for.
    fn walk_client(&self, walker: &mut Walker, buffer: &[u8], cut: &mut Cut, out: &mut BytesMut) -> Stop {
        let mut interceptor = self.interceptor.borrow_mut();
        loop {
            let header = match walker.step(&buffer[cut.at..]) {
                Ok(Step::More) => return Stop::More,
                Ok(Step::Rest(n)) => {
                    cut.at += n;
                    continue;
                }
                Ok(Step::Frame(header)) => header,
                Err(_) => return Stop::Invalid,
            };
            // Before the login is through only its own answers may go on: a query that came early would not be looked at.
            if !self.ready.get() && !matches!(header.tag, b'p' | b'X') {
                return Stop::Early;
            }
            if header.tag == b'X' {
                self.parting.set(true);
            }
            if !interceptor.wants_from_client(header.tag) || header.size > INSPECT_BYTES_MAX {
                interceptor.passed_from_client(header.tag);
                cut.at += walker.pass(header, buffer.len() - cut.at);
                continue;
            }
            let Some(frame) = buffer.get(cut.at..cut.at + header.size) else { return Stop::More };
            let body = &frame[HEADER_BYTES..];
            if matches!(header.tag, b'Q' | b'P')
                && !self.looked_up.replace(false)
                && (self.peers_version.get() != self.session.shared.peers.version()
                    || interceptor.awaits_import(header.tag, body))
            {
                return Stop::LookUp;
            }
            match interceptor.from_client(header.tag, body) {
                Action::Replace(frame) => cut.replace(header, buffer, &frame, out),
                Action::Ask(question) => return Stop::Ask(question, header.size),
                // The others are answers to the server.
                _ => cut.at += header.size,
            }
            if interceptor.holds_back() {
                return Stop::Held;
            }
        }
    }

    /// Finds out what a message needs, unless the client cancels or goes away meanwhile: then `None`.
    async fn answer<R: AsyncRead + Unpin>(
        &self,
        question: Question,
        client: &mut R,
        buffer: &mut BytesMut,
    ) -> Option<Answer> {
        if let Some(description) = &question.description {
            let (shared, user) = (&self.session.shared, &self.session.user);
            let described = tokio::select! {
                described = self.peer_sessions.describe(shared, self.entry(), user, description) => described,
                () = listen(client, buffer) => return None,
            };
            return Some(self.interceptor.borrow_mut().described(question, described));
        }
        let mut findings = Vec::with_capacity(question.peers.len());
        if !question.peers.is_empty() {
            let mut work = self.entry().begin_work();
            let found = async {
                let mut findings = Vec::new();
                for peer in &question.peers {
                    let (shared, user) = (&self.session.shared, &self.session.user);
                    findings.push(Ok(find_out(&shared.catalog, shared.planner, user, peer).await));
                }
                findings
            };
            let gone = listen(client, buffer);
            tokio::select! {
                result = found => findings = result,
                () = work.canceled() => findings.extend(question.peers.iter().map(|_| Err(canceled()))),
                () = gone => return None,
            }
        }
        Some(self.interceptor.borrow_mut().answer(question, findings))
    }

    /// Gives the interceptor the peers as they are now, and waits for the tables of one that was made a moment ago if the message that
    /// `buffer` begins with names them. Not for ever: then PostgreSQL says that they are not there.
    async fn look_up_peers(&self, buffer: &[u8]) {
        self.refresh_peers().await;
        let Ok(Some(header)) = Header::read(buffer) else { return };
        let Some(frame) = buffer.get(..header.size) else { return };
        let awaits = || self.interceptor.borrow().awaits_import(header.tag, &frame[HEADER_BYTES..]);
        let mut work = self.entry().begin_work();
        let come = async {
            while awaits() {
                tokio::time::sleep(IMPORT_POLL).await;
                self.peers_version.set(0);
                self.refresh_peers().await;
            }
        };
        tokio::select! {
            _ = tokio::time::timeout(IMPORT_PATIENCE, come) => {}
            () = work.canceled() => {}
        }
    }

    pub(super) async fn refresh_peers(&self) {
        let directory = &self.session.shared.peers;
        if (self.peers_version.get() == 0 || directory.version() == 0)
            && self.session.intercepts
            && let Err(error) = directory.refresh().await
        {
            tracing::debug!(error = %error, "cannot ask the catalog for its peers");
        }
        let (version, peers) = (directory.version(), directory.current());
        self.interceptor.borrow_mut().set_peers(peers);
        // What this session has changed others see when it has committed.
        let committed = matches!(self.entry().status(), 0 | b'I') || !self.session.intercepts;
        self.peers_version.set(if committed { version } else { 0 });
    }

    /// Waits until the client's next message may go on; `false`: the client is gone.
    async fn may_go_on<R: AsyncRead + Unpin>(&self, client: &mut R, buffer: &mut BytesMut) -> bool {
        self.awaits_let_go.set(true);
        let mut gone = pin!(listen(client, buffer));
        while self.interceptor.borrow().holds_back() {
            tokio::select! {
                () = self.let_go.notified() => {}
                () = &mut gone => return false,
            }
        }
        self.awaits_let_go.set(false);
        true
    }

    /// The client has said something since the last ReadyForQuery.
    fn became_busy(&self) {
        if self.ready.get() {
            self.entry().set_status(0);
        }
    }
}

/// What a walk over what the client has said came upon.
enum Stop {
    /// The end of what is there.
    More,
    /// A message that must wait for the end of the login.
    Early,
    /// A text, and the peers that it may name have to be looked up first.
    LookUp,
    /// Nothing goes on behind what there is until the server has answered.
    Held,
    /// A message of that many bytes for which something has to be found out.
    Ask(Box<Question>, usize),
    /// What cannot be a message.
    Invalid,
}
