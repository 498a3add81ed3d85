//! The two pumps of a session, in one task. Each reads, walks from header to header, writes, and only then reads again: whoever
//! is slow slows the other down, and no more than a buffer is held for each direction.
//!
//! Runs of frames go on untouched and frames of any size are streamed. Only those that may be ours are held whole. What becomes
//! of them is for `intercept` to say.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use pg::SqlState;
use pg::frame::{HEADER_BYTES, Header, Step, Walker};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::error::Fatal;
use crate::fields::Fields;
use crate::intercept::{Action, Answer, Interceptor, Question, canceled};
use crate::login::without_channel_binding;
use crate::registry::{Behind, Entry};
use crate::session::Session;
use crate::validate::find_out;

/// Size of each direction's buffer, in bytes.
const BUFFER_BYTES: usize = 64 * 1024;

/// A read of at least this much means that more is coming: a server sends rows by 8 kB.
const MUCH_BYTES: usize = 8 * 1024;

/// What all sessions together may hold of frames that have to be seen whole, in buffers of [`BUFFER_BYTES`]: 64 MiB. What is made of
/// them takes up to five times that, for a moment.
pub(crate) const HELD_BUFFERS_MAX: usize = 1024;

/// How long a session waits for others to be done with what they hold.
const HELD_TIMEOUT: Duration = Duration::from_secs(10);

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
    /// The login is through: the first ReadyForQuery was forwarded.
    ready: Cell<bool>,
    became_ready: Notify,
    became_quiet: Notify,
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
            session,
            ready: Cell::new(ready),
            became_ready: Notify::new(),
            became_quiet: Notify::new(),
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
    pub(crate) async fn client_to_server<R, W>(&self, mut client: R, server: W, mut buffer: BytesMut) -> End
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
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

    async fn talk<R, W>(&self, client: &mut R, mut server: W, buffer: &mut BytesMut) -> io::Result<End>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut walker = Walker::new();
        let mut out = BytesMut::new();
        let mut intake = Intake::default();
        loop {
            // Up to `run` is in `out` already; from there to `at` goes on untouched.
            let (mut run, mut at) = (0, 0);
            loop {
                let header = match walker.step(&buffer[at..]) {
                    Ok(Step::More) => break,
                    Ok(Step::Rest(n)) => {
                        at += n;
                        continue;
                    }
                    Ok(Step::Frame(header)) => header,
                    Err(_) => return Ok(End::Fatal(Fatal::Protocol("invalid message length"))),
                };
                // Before the login is through only its own answers may go on: a query that came early would not be looked at.
                if !self.ready.get() && !matches!(header.tag, b'p' | b'X') {
                    server.write_all(&buffer[run..at]).await?;
                    server.flush().await?;
                    buffer.advance(at);
                    (run, at) = (0, 0);
                    self.logged_in().await;
                }
                if header.tag == b'X' {
                    self.parting.set(true);
                }
                if !self.interceptor.borrow().wants_from_client(header.tag) || header.size > INSPECT_BYTES_MAX {
                    self.interceptor.borrow_mut().passed_from_client(header.tag);
                    at += walker.pass(header, buffer.len() - at);
                    continue;
                }
                if buffer.len() - at < header.size {
                    break;
                }
                let body = &buffer[at + HEADER_BYTES..at + header.size];
                let action = self.interceptor.borrow_mut().from_client(header.tag, body);
                match action {
                    Action::Pass => {}
                    Action::Replace(frame) => {
                        out.extend_from_slice(&buffer[run..at]);
                        out.extend_from_slice(&frame);
                        run = at + header.size;
                    }
                    Action::Ask(question) => {
                        // What came before must not wait for what is found out.
                        out.extend_from_slice(&buffer[run..at]);
                        if !question.peers.is_empty() {
                            server.write_all(&out).await?;
                            server.flush().await?;
                            out.clear();
                        }
                        buffer.advance(at);
                        let Some(answer) = Box::pin(self.answer(*question, client, buffer)).await else {
                            return Ok(End::Client);
                        };
                        out.extend_from_slice(&answer.frame);
                        self.session.announce(answer.waits_for);
                        (run, at) = (header.size, 0);
                    }
                }
                at += header.size;
            }
            if out.is_empty() {
                server.write_all(&buffer[run..at]).await?;
            } else {
                out.extend_from_slice(&buffer[run..at]);
                server.write_all(&out).await?;
                out.clear();
            }
            server.flush().await?;
            buffer.advance(at);
            self.client_drained.set(buffer.is_empty() && walker.at_boundary());
            shrink(&mut out);
            if !intake.share(buffer, &self.session.shared.held).await {
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

    /// Finds out what a message needs, unless the client cancels or goes away meanwhile: then `None`.
    async fn answer<R: AsyncRead + Unpin>(
        &self,
        question: Question,
        client: &mut R,
        buffer: &mut BytesMut,
    ) -> Option<Answer> {
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

    /// Relays what the server says, until it closes.
    ///
    /// # Errors
    /// [`io::Error`] of the client's socket.
    pub(crate) async fn server_to_client<R, W>(&self, mut server: R, mut client: W) -> io::Result<End>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut walker = Walker::new();
        let mut buffer = BytesMut::new();
        let mut out = BytesMut::new();
        let mut intake = Intake::default();
        loop {
            let (mut run, mut at) = (0, 0);
            let mut became_ready = false;
            loop {
                let header = match walker.step(&buffer[at..]) {
                    Ok(Step::More) => break,
                    Ok(Step::Rest(n)) => {
                        at += n;
                        continue;
                    }
                    Ok(Step::Frame(header)) => header,
                    Err(_) => return Ok(End::Fatal(Fatal::BackendGone)),
                };
                let login = !self.ready.get() && !became_ready;
                let wanted = self.interceptor.borrow().wants_from_server(header.tag)
                    || matches!(header.tag, b'Z' | b'E')
                    || login && matches!(header.tag, b'R' | b'K');
                if !wanted || header.size > INSPECT_BYTES_MAX {
                    self.interceptor.borrow_mut().passed_from_server(header.tag);
                    at += walker.pass(header, buffer.len() - at);
                    continue;
                }
                if buffer.len() - at < header.size {
                    break;
                }
                let body = &buffer[at + HEADER_BYTES..at + header.size];
                became_ready |= header.tag == b'Z';
                let action = if login { self.during_login(header, body) } else { None };
                let action = action.unwrap_or_else(|| self.interceptor.borrow_mut().from_server(header.tag, body));
                self.watch_for_the_end(header.tag, body);
                if let Action::Replace(frame) = action {
                    if header.tag == b'C' {
                        self.session.shared.events.statement(&frame[HEADER_BYTES..]);
                    }
                    out.extend_from_slice(&buffer[run..at]);
                    out.extend_from_slice(&frame);
                    run = at + header.size;
                }
                at += header.size;
            }
            self.at_boundary.set(false);
            if out.is_empty() {
                client.write_all(&buffer[run..at]).await?;
                self.entry().counters.sent.add(at - run);
            } else {
                out.extend_from_slice(&buffer[run..at]);
                client.write_all(&out).await?;
                self.entry().counters.sent.add(out.len());
                out.clear();
            }
            client.flush().await?;
            self.at_boundary.set(walker.at_boundary());
            buffer.advance(at);
            if became_ready && !self.ready.replace(true) {
                self.session.shared.events.login(true);
                self.became_ready.notify_waiters();
            }
            if self.entry().status() != 0 {
                self.became_quiet.notify_waiters();
            }
            shrink(&mut out);
            if !intake.share(&buffer, &self.session.shared.held).await {
                return Ok(End::Fatal(Fatal::HeldTooMuch));
            }
            match intake.read(&mut server, &mut buffer).await {
                Ok(0) | Err(_) if self.parting.get() => return Ok(End::Server),
                Ok(0) | Err(_) => return Ok(End::Fatal(Fatal::BackendGone)),
                // What comes without having been asked for, such as a notification, makes nobody busy.
                Ok(_) => {}
            }
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

    /// The server has answered a request; `status` is the transaction's.
    fn became_free(&self, status: u8) {
        let entry = self.entry();
        // With more requests behind it, the server goes on at once.
        entry.set_status(if self.interceptor.borrow().is_idle() { status } else { 0 });
        entry.counters.requests.add(1);
        if status == b'I' {
            entry.counters.transactions.add(1);
        }
    }

    fn watch_for_the_end(&self, tag: u8, body: &[u8]) {
        match tag {
            b'Z' => self.became_free(body.first().copied().unwrap_or(0)),
            b'E' => {
                let severity = Fields::decode(body).and_then(|f| f.get(b'V').map(<[u8]>::to_vec));
                if matches!(severity.as_deref(), Some(b"FATAL" | b"PANIC")) {
                    self.parting.set(true);
                    if !self.is_ready() {
                        self.session.shared.events.login(false);
                    }
                }
            }
            _ => {}
        }
    }
}

/// Reads on while something else is being done, so that the client's end is noticed. Returns when it is gone; what it says is kept,
/// up to a buffer more.
async fn listen<R: AsyncRead + Unpin>(client: &mut R, buffer: &mut BytesMut) {
    let limit = buffer.len() + BUFFER_BYTES;
    while buffer.len() < limit {
        match client.read_buf(buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
    std::future::pending::<()>().await;
}

thread_local! {
    /// Where what comes for sessions that have no buffer is read to: one buffer for all the idle ones of a thread.
    static LANDING: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_BYTES].into_boxed_slice());
}

/// Reads for a pump, and sees to its buffer: none while nothing comes, more where much comes.
#[derive(Default)]
struct Intake {
    /// What the last read brought, in bytes.
    last: usize,
    /// The largest that the buffer has been, in bytes.
    largest: usize,
    /// Its share of what all sessions may hold, for what it holds beyond a buffer's size.
    share: Option<OwnedSemaphorePermit>,
}

impl Intake {
    /// Reads more behind what the buffer holds; 0 at the end.
    ///
    /// # Errors
    /// [`io::Error`] of the socket.
    async fn read<R: AsyncRead + Unpin>(&mut self, reader: &mut R, buffer: &mut BytesMut) -> io::Result<usize> {
        if buffer.is_empty() && self.largest > 4 * BUFFER_BYTES {
            // Not by its capacity: what was taken off its front is not in it.
            *self = Intake::default();
            *buffer = BytesMut::new();
        }
        // Much is coming, and is read to where it stays.
        if !buffer.is_empty() || self.last >= MUCH_BYTES {
            if buffer.capacity() - buffer.len() < BUFFER_BYTES / 2 {
                buffer.reserve(BUFFER_BYTES);
            }
            self.largest = self.largest.max(buffer.capacity());
        }
        let read = poll_fn(|cx| {
            let room = buffer.capacity() - buffer.len();
            if room >= BUFFER_BYTES / 2 {
                let read = pin!(reader.read_buf(buffer)).poll(cx);
                if read.is_pending() && buffer.is_empty() {
                    *buffer = BytesMut::new();
                }
                return read;
            }
            LANDING.with_borrow_mut(|landing| {
                let mut landing = ReadBuf::new(landing);
                ready!(Pin::new(&mut *reader).poll_read(cx, &mut landing))?;
                buffer.extend_from_slice(landing.filled());
                Poll::Ready(Ok(landing.filled().len()))
            })
        })
        .await?;
        self.last = read;
        Ok(read)
    }

    /// Takes the buffer's share of what all sessions may hold; `false`: there is none to be had. A frame that is held whole makes the
    /// buffer grow only as its bytes come.
    async fn share(&mut self, buffer: &BytesMut, held: &Arc<Semaphore>) -> bool {
        // What is shared out is counted in buffers.
        let beyond = buffer.len() / BUFFER_BYTES;
        if beyond == 0 {
            self.share = None;
            return true;
        }
        let has = self.share.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let more = u32::try_from(beyond.saturating_sub(has)).unwrap_or(u32::MAX);
        if more == 0 {
            return true;
        }
        let acquired = tokio::time::timeout(HELD_TIMEOUT, held.clone().acquire_many_owned(more)).await;
        let Ok(Ok(permit)) = acquired else { return false };
        match &mut self.share {
            Some(share) => share.merge(permit),
            None => self.share = Some(permit),
        }
        true
    }
}

fn shrink(out: &mut BytesMut) {
    if out.capacity() > BUFFER_BYTES {
        *out = BytesMut::new();
    }
}
