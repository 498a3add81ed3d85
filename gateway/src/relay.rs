//! The two pumps of a session, each in a task of its own: it wakes for what concerns it and nothing else. Each reads, walks from header to
//! header, writes, and only then reads again: whoever is slow slows the other down, and no more than a buffer is held for each
//! direction.
//!
//! Runs of frames go on untouched and frames of any size are streamed. Only those that may be ours are held whole. What becomes
//! of them is for `intercept` to say.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use pg::SqlState;
use pg::frame::{FrameError, HEADER_BYTES, Header, Step, Walker};
use tokio::io::AsyncRead;
use tokio::sync::Notify;

use crate::error::Fatal;
use crate::execute::PeerSessions;
use crate::fields::Fields;
use crate::halves::{Connection, Half};
use crate::intake::{BUFFER_BYTES, Intake, listen};
use crate::intercept::{Action, Answer, Interceptor, Question, Run, canceled};
use crate::login::without_channel_binding;
use crate::registry::{Behind, Entry};
use crate::session::Session;
use crate::validate::find_out;

/// The version of a directory that has never been looked at.
const NEVER: u64 = u64::MAX;

/// How long a text waits for the tables of a new peer, and how often it looks.
const IMPORT_PATIENCE: Duration = Duration::from_secs(15);
const IMPORT_POLL: Duration = Duration::from_millis(50);

/// A frame that should be seen whole but is larger goes on unseen.
const INSPECT_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Why a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The client is gone, or said goodbye.
    Client,
    /// The server closed, after it said why or because the client had said goodbye.
    Server,
    /// The gateway ends it.
    Fatal(Fatal),
}

/// What both pumps know.
pub(crate) struct Relay {
    session: Session,
    interceptor: RefCell<Interceptor>,
    /// The sessions on peers that EXECUTE has opened.
    peer_sessions: PeerSessions,
    /// Which state of the directory of peers the interceptor has; 0: it has to be asked for anew.
    peers_version: Cell<u64>,
    /// They have been looked up for the message that comes now.
    looked_up: Cell<bool>,
    /// What holds the client's messages back may be over.
    let_go: Notify,
    /// Somebody waits for that.
    awaits_let_go: Cell<bool>,
    /// The login is through: the first ReadyForQuery was forwarded.
    ready: Cell<bool>,
    became_ready: Notify,
    became_quiet: Notify,
    /// Somebody waits for that.
    awaits_quiet: Cell<bool>,
    /// The client has got whole frames only.
    at_boundary: Cell<bool>,
    /// Nothing of the client's waits here.
    client_drained: Cell<bool>,
    /// The client said goodbye, or the server a FATAL error: the end that follows needs no words.
    parting: Cell<bool>,
}

impl Relay {
    /// Begins with the login, or behind it if it is `ready`.
    pub(crate) fn new(session: Session, ready: bool) -> Relay {
        let nonce = format!("{:032x}", rand::random::<u128>());
        if ready {
            session.place.entry.set_status(b'I');
        }
        Relay {
            interceptor: RefCell::new(Interceptor::new(session.intercepts, nonce)),
            peer_sessions: PeerSessions::default(),
            peers_version: Cell::new(NEVER),
            looked_up: Cell::new(false),
            let_go: Notify::new(),
            awaits_let_go: Cell::new(false),
            session,
            ready: Cell::new(ready),
            became_ready: Notify::new(),
            became_quiet: Notify::new(),
            awaits_quiet: Cell::new(false),
            at_boundary: Cell::new(true),
            client_drained: Cell::new(true),
            parting: Cell::new(false),
        }
    }

    /// Returns what is relayed.
    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    fn entry(&self) -> &Entry {
        &self.session.place.entry
    }

    /// Waits for the end of the login.
    pub(crate) async fn logged_in(&self) {
        while !self.ready.get() {
            self.became_ready.notified().await;
        }
    }

    /// Returns whether the login is through.
    fn is_ready(&self) -> bool {
        self.ready.get()
    }

    /// Waits until nothing is going on and no transaction is open. A login that is not through is nothing.
    pub(crate) async fn idle(&self) {
        self.awaits_quiet.set(true);
        while self.ready.get()
            && !(self.entry().status() == b'I' && self.client_drained.get() && self.interceptor.borrow().is_idle())
        {
            self.became_quiet.notified().await;
        }
    }

    /// Returns whether the server may be at work for a client that has not said goodbye.
    pub(crate) fn is_abandoned(&self) -> bool {
        let waits = matches!(self.entry().status(), b'I' | b'T' | b'E') && self.interceptor.borrow().is_idle();
        !self.parting.get() && !waits
    }

    /// Returns whether an error can be put into the client's stream now.
    pub(crate) fn can_speak(&self) -> bool {
        self.at_boundary.get()
    }

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
                    findings.push(Ok(find_out(&self.session.shared.catalog, &self.session.user, peer).await));
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

    async fn refresh_peers(&self) {
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

    /// The client has said something since the last ReadyForQuery.
    fn became_busy(&self) {
        if self.ready.get() {
            self.entry().set_status(0);
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

/// How far a walk over a buffer has come. Up to `run`, all has gone on or is in the output; from there to `at`, it goes on untouched.
#[derive(Clone, Copy, Default)]
struct Cut {
    run: usize,
    at: usize,
}

impl Cut {
    /// Puts `replacement` in the place of the frame that begins here.
    fn replace(&mut self, header: Header, buffer: &[u8], replacement: &[u8], out: &mut BytesMut) {
        out.extend_from_slice(&buffer[self.run..self.at]);
        out.extend_from_slice(replacement);
        self.at += header.size;
        self.run = self.at;
    }

    /// Returns all that goes on. Where nothing was replaced, it is not copied.
    fn bytes<'a>(&self, buffer: &'a [u8], out: &'a mut BytesMut) -> &'a [u8] {
        let untouched = &buffer[self.run..self.at];
        if out.is_empty() {
            return untouched;
        }
        out.extend_from_slice(untouched);
        out
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

/// Empties the output, which is mostly empty, and keeps its memory if it is little.
fn clear(out: &mut BytesMut) {
    out.clear();
    if out.capacity() > BUFFER_BYTES {
        *out = BytesMut::new();
    }
}
