//! The replication protocol: our own client, on the codecs and options of the SQL client.
//!
//! Frames are walked here and their bodies handed on as slices of what was read; nothing is copied per row. Sending statuses is a
//! task of its own, so that a busy reader or a slow target never makes the walsender think that we are gone.
//!
//! Source: PostgreSQL docs, protocol-replication.

use std::io;
use std::time::{Duration, SystemTime};

use bytes::{Buf, Bytes, BytesMut};
use catalog::connect::{Attempt, ConnectError};
use fallible_iterator::FallibleIterator;
use pg::name::{quote_ident, quote_literal};
use pg::stream::{StandbyStatus, StreamMessage};
use pg::{Lsn, SqlState};
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::{backend, frontend};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::config::{ChannelBinding, Host, SslMode};

use crate::error::{Error, Problem};
use crate::session::PINNED;

/// Room made for each read.
const READ_BYTES: usize = 256 << 10;

/// Socket buffer for the stream: a walsender sends each message by itself, and a large buffer lets many wait for one read.
const RECEIVE_BUFFER_BYTES: usize = 8 << 20;

/// A read of at least this much means that we are behind; one that fills the room, that more is there already.
const BEHIND_BYTES: usize = 32 << 10;

/// How long to let data gather while behind: fewer, larger reads leave the walsender more of the processor. Not on a Unix socket, whose
/// buffer is the sender's and small: there the walsender would only wait.
const GATHER: Duration = Duration::from_millis(2);

/// How often a status is sent when there is nothing new to say.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// Silence after which the walsender is taken for dead; it is asked to answer at every second status.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Largest message that can be: a row of 1 GiB, and what is around it.
const MESSAGE_BYTES_MAX: usize = (1 << 30) + (1 << 20);

/// Microseconds from the Unix epoch to that of PostgreSQL.
const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

/// What IDENTIFY_SYSTEM answers.
#[derive(Clone, Debug)]
pub struct SystemIdentity {
    /// Identifies the cluster.
    pub system_id: String,
    /// Its timeline.
    pub timeline: i32,
}

/// A slot that was just made, and the snapshot that goes with it.
#[derive(Clone, Debug)]
pub struct CreatedSlot {
    /// Where streaming begins; the snapshot shows everything before it.
    pub consistent_point: Lsn,
    /// Name of the exported snapshot, valid while the connection is open and idle.
    pub snapshot: Option<String>,
}

/// A connection that speaks the replication protocol.
pub struct ReplicationConnection {
    peer: String,
    io: Box<dyn Duplex>,
    buffer: BytesMut,
    /// What is sent gathers in a buffer of ours, as on TCP.
    gathers: bool,
}

/// Returns microseconds since 2000-01-01 00:00 UTC by this machine's clock.
pub fn postgres_clock() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX).saturating_sub(POSTGRES_EPOCH)
}

impl ReplicationConnection {
    /// Connects as `attempt` says, with `replication=database`.
    ///
    /// # Errors
    /// [`Error::Transient`] with what the server or the system said.
    pub async fn connect(peer: &str, attempt: &Attempt) -> Result<ReplicationConnection, Error> {
        let no_answer =
            || Error::connection(peer, &format!("{}: no answer within {:?}", attempt.address, attempt.timeout));
        let io_error = |e: io::Error| Error::connect(peer, ConnectError::io(&attempt.address, &e));
        tokio::time::timeout(attempt.timeout, async {
            let (io, binding) = open(attempt).await.map_err(io_error)?;
            let mut connection = ReplicationConnection {
                peer: peer.to_owned(),
                io,
                buffer: BytesMut::new(),
                gathers: !is_unix(attempt),
            };
            connection.log_in(attempt, binding).await?;
            // The walsender prints values with its session's settings.
            connection.query(PINNED).await?;
            Ok(connection)
        })
        .await
        .unwrap_or_else(|_| Err(no_answer()))
    }

    async fn log_in(&mut self, attempt: &Attempt, binding: Option<Vec<u8>>) -> Result<(), Error> {
        let config = &attempt.config;
        let user = config.get_user().unwrap_or_default();
        let mut parameters = vec![
            ("user", user),
            ("database", config.get_dbname().unwrap_or(user)),
            ("replication", "database"),
            ("client_encoding", "UTF8"),
            ("application_name", config.get_application_name().unwrap_or("peergate")),
        ];
        if let Some(options) = config.get_options() {
            parameters.push(("options", options));
        }
        let mut out = BytesMut::new();
        frontend::startup_message(parameters, &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await?;
        loop {
            match self.message().await? {
                backend::Message::AuthenticationOk
                | backend::Message::BackendKeyData(_)
                | backend::Message::ParameterStatus(_)
                | backend::Message::NoticeResponse(_) => {}
                backend::Message::ReadyForQuery(_) => return Ok(()),
                backend::Message::AuthenticationCleartextPassword => {
                    let password = self.password(attempt)?.to_vec();
                    self.send_password(attempt, &password).await?;
                }
                backend::Message::AuthenticationMd5Password(body) => {
                    let hashed = md5_hash(user.as_bytes(), self.password(attempt)?, body.salt());
                    self.send_password(attempt, hashed.as_bytes()).await?;
                }
                backend::Message::AuthenticationSasl(body) => self.sasl(attempt, &body, binding.clone()).await?,
                backend::Message::ErrorResponse(body) => return Err(Error::Transient(self.problem(&body))),
                _ => return Err(Error::protocol(&self.peer, "unexpected message while logging in")),
            }
        }
    }

    fn password<'a>(&self, attempt: &'a Attempt) -> Result<&'a [u8], Error> {
        attempt.config.get_password().ok_or_else(|| {
            Error::Transient(Problem::new(
                SqlState::INVALID_PASSWORD,
                format!("peer \"{}\" asks for a password and none is stored", self.peer),
            ))
        })
    }

    async fn send_password(&mut self, attempt: &Attempt, password: &[u8]) -> Result<(), Error> {
        if attempt.config.get_channel_binding() == ChannelBinding::Require {
            return Err(self.no_binding());
        }
        let mut out = BytesMut::new();
        frontend::password_message(password, &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await
    }

    fn no_binding(&self) -> Error {
        Error::connection(&self.peer, "channel binding is required, but the server does not offer it")
    }

    async fn sasl(
        &mut self,
        attempt: &Attempt,
        body: &backend::AuthenticationSaslBody,
        binding: Option<Vec<u8>>,
    ) -> Result<(), Error> {
        use postgres_protocol::message::backend::Message;
        let mut offered = (false, false);
        let mut mechanisms = body.mechanisms();
        while let Some(mechanism) = mechanisms.next().map_err(|e| self.io_error(&e))? {
            offered.0 |= mechanism == sasl::SCRAM_SHA_256;
            offered.1 |= mechanism == sasl::SCRAM_SHA_256_PLUS;
        }
        let binding = binding.filter(|_| attempt.config.get_channel_binding() != ChannelBinding::Disable);
        let (mechanism, binding) = match (offered, binding) {
            ((_, true), Some(data)) => (sasl::SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(data)),
            ((true, _), Some(_)) => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested()),
            ((true, _), None) => (sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported()),
            _ => return Err(Error::connection(&self.peer, "the server offers no SASL mechanism that we know")),
        };
        if mechanism != sasl::SCRAM_SHA_256_PLUS && attempt.config.get_channel_binding() == ChannelBinding::Require {
            return Err(self.no_binding());
        }
        let mut scram = sasl::ScramSha256::new(self.password(attempt)?, binding);
        let mut out = BytesMut::new();
        frontend::sasl_initial_response(mechanism, scram.message(), &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await?;
        match self.message().await? {
            Message::AuthenticationSaslContinue(body) => scram.update(body.data()).map_err(|e| self.io_error(&e))?,
            Message::ErrorResponse(body) => return Err(Error::Transient(self.problem(&body))),
            _ => return Err(Error::protocol(&self.peer, "unexpected message in SASL")),
        }
        frontend::sasl_response(scram.message(), &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await?;
        match self.message().await? {
            Message::AuthenticationSaslFinal(body) => scram.finish(body.data()).map_err(|e| self.io_error(&e)),
            Message::ErrorResponse(body) => Err(Error::Transient(self.problem(&body))),
            _ => Err(Error::protocol(&self.peer, "unexpected message in SASL")),
        }
    }

    fn io_error(&self, error: &io::Error) -> Error {
        Error::connection(&self.peer, &error.to_string())
    }

    fn problem(&self, body: &backend::ErrorResponseBody) -> Problem {
        problem_of(&self.peer, body)
    }

    async fn send(&mut self, out: &mut BytesMut) -> Result<(), Error> {
        self.io.write_all_buf(out).await.map_err(|e| self.io_error(&e))?;
        self.io.flush().await.map_err(|e| self.io_error(&e))
    }

    /// Reads one message outside of CopyBoth.
    async fn message(&mut self) -> Result<backend::Message, Error> {
        loop {
            if let Some(length) = frame_length(&self.peer, &self.buffer)?
                && self.buffer.len() >= length
            {
                let mut frame = self.buffer.split_to(length);
                let message = backend::Message::parse(&mut frame).map_err(|e| self.io_error(&e))?;
                return message.ok_or_else(|| Error::protocol(&self.peer, "message without a body"));
            }
            if fill(&mut self.io, &mut self.buffer).await.map_err(|e| self.io_error(&e))? == 0 {
                return Err(Error::connection(&self.peer, "closed by the server"));
            }
        }
    }

    /// Runs a command and returns its rows as text. SQL is a command too.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn query(&mut self, command: &str) -> Result<Vec<Vec<Option<String>>>, Error> {
        let mut out = BytesMut::new();
        frontend::query(command, &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await?;
        let mut rows = Vec::new();
        let mut failed = None;
        loop {
            match self.message().await? {
                backend::Message::DataRow(body) => {
                    let mut row = Vec::new();
                    let mut ranges = body.ranges();
                    while let Some(range) = ranges.next().map_err(|e| self.io_error(&e))? {
                        row.push(range.map(|r| String::from_utf8_lossy(&body.buffer()[r]).into_owned()));
                    }
                    rows.push(row);
                }
                backend::Message::ErrorResponse(body) => failed = Some(self.problem(&body)),
                backend::Message::ReadyForQuery(_) => return failed.map_or(Ok(rows), |p| Err(Error::server(p))),
                _ => {}
            }
        }
    }

    /// Asks the server which cluster it is.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, Error> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let field = |n: usize| rows.first().and_then(|r| r.get(n)?.clone());
        match (field(0), field(1).and_then(|t| t.parse().ok())) {
            (Some(system_id), Some(timeline)) => Ok(SystemIdentity { system_id, timeline }),
            _ => Err(Error::protocol(&self.peer, "IDENTIFY_SYSTEM without an answer")),
        }
    }

    /// Asks the server for the history of a timeline: one line for each that it came from.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn timeline_history(&mut self, timeline: i32) -> Result<String, Error> {
        let rows = self.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        Ok(rows.first().and_then(|r| r.get(1)?.clone()).unwrap_or_default())
    }

    /// Makes a logical slot; with `export_snapshot`, also a snapshot of the database at exactly its consistent point.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn create_slot(
        &mut self,
        slot: &str,
        export_snapshot: bool,
        server_version: u32,
    ) -> Result<CreatedSlot, Error> {
        let slot = quote_ident(slot);
        let command = match (export_snapshot, server_version >= 150_000) {
            (true, true) => format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput (SNAPSHOT 'export')"),
            (false, true) => format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput (SNAPSHOT 'nothing')"),
            (true, false) => format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput EXPORT_SNAPSHOT"),
            (false, false) => format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput NOEXPORT_SNAPSHOT"),
        };
        let rows = self.query(&command).await?;
        let field = |n: usize| rows.first().and_then(|r| r.get(n)?.clone());
        match field(1).and_then(|t| t.parse().ok()) {
            Some(consistent_point) => Ok(CreatedSlot { consistent_point, snapshot: field(2) }),
            None => Err(Error::protocol(&self.peer, "CREATE_REPLICATION_SLOT without an answer")),
        }
    }

    /// Starts streaming from `from`: everything that commits after it will come.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says; 55006 when the slot is in use.
    pub async fn start(
        mut self,
        slot: &str,
        from: Lsn,
        publications: &[String],
        binary: bool,
    ) -> Result<ReplicationStream, Error> {
        let names: Vec<String> = publications.iter().map(|p| quote_ident(p)).collect();
        let binary = if binary { ", binary 'true'" } else { "" };
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL {from} (proto_version '1', publication_names {}{binary})",
            quote_ident(slot),
            quote_literal(&names.join(",")).trim(),
        );
        let mut out = BytesMut::new();
        frontend::query(&command, &mut out).map_err(|e| self.io_error(&e))?;
        self.send(&mut out).await?;
        loop {
            let frame = loop {
                if let Some(length) = frame_length(&self.peer, &self.buffer)?
                    && self.buffer.len() >= length
                {
                    break self.buffer.split_to(length);
                }
                if fill(&mut self.io, &mut self.buffer).await.map_err(|e| self.io_error(&e))? == 0 {
                    return Err(Error::connection(&self.peer, "closed by the server"));
                }
            };
            match frame[0] {
                // CopyBothResponse, which the codec does not know.
                b'W' => return Ok(ReplicationStream::new(self, from)),
                b'E' => match backend::Message::parse(&mut frame.clone()).map_err(|e| self.io_error(&e))? {
                    Some(backend::Message::ErrorResponse(body)) => return Err(Error::server(self.problem(&body))),
                    _ => return Err(Error::protocol(&self.peer, "malformed error")),
                },
                b'N' | b'S' => {}
                tag => return Err(Error::protocol(&self.peer, format!("unexpected message {:?}", char::from(tag)))),
            }
        }
    }
}

fn problem_of(peer: &str, body: &backend::ErrorResponseBody) -> Problem {
    let mut problem = Problem::new(SqlState::INTERNAL_ERROR, "");
    let mut fields = body.fields();
    while let Ok(Some(field)) = fields.next() {
        let text = String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => problem.sqlstate = SqlState::from_text(&text).unwrap_or(SqlState::INTERNAL_ERROR),
            b'M' => problem.message = format!("peer \"{peer}\": {text}"),
            b'D' => problem.detail = Some(text),
            b'H' => problem.hint = Some(text),
            _ => {}
        }
    }
    problem
}

async fn fill(io: &mut (impl AsyncRead + Unpin), buffer: &mut BytesMut) -> io::Result<usize> {
    buffer.reserve(READ_BYTES);
    io.read_buf(buffer).await
}

/// Returns the whole length of the frame at the start of `buffer`, once its header is there.
fn frame_length(peer: &str, buffer: &[u8]) -> Result<Option<usize>, Error> {
    let Some(header) = buffer.get(1..5) else { return Ok(None) };
    let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
    if (4..=MESSAGE_BYTES_MAX).contains(&length) {
        Ok(Some(length + 1))
    } else {
        Err(Error::protocol(peer, format!("message of {length} bytes")))
    }
}

fn is_unix(attempt: &Attempt) -> bool {
    matches!(attempt.config.get_hosts().first(), Some(Host::Unix(_)))
}

/// Opens the socket and, as `ssl_mode` says, TLS on it; also returns the data for SCRAM's channel binding.
async fn open(attempt: &Attempt) -> io::Result<(Box<dyn Duplex>, Option<Vec<u8>>)> {
    let config = &attempt.config;
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let (tcp, name) = match (config.get_hosts().first(), config.get_hostaddrs().first()) {
        #[cfg(unix)]
        (Some(Host::Unix(directory)), _) => {
            let socket = UnixStream::connect(directory.join(format!(".s.PGSQL.{port}"))).await?;
            return Ok((Box::new(socket), None));
        }
        (host, Some(address)) => {
            let name = if let Some(Host::Tcp(name)) = host { name.clone() } else { address.to_string() };
            (TcpStream::connect((*address, port)).await?, name)
        }
        (Some(Host::Tcp(name)), None) => (TcpStream::connect((name.as_str(), port)).await?, name.clone()),
        (None, None) => return Err(io::Error::other("no host")),
    };
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(&tcp);
    // Both are wishes: the system may give less, and the stream works all the same.
    let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES);
    if let Some(timeout) = config.get_tcp_user_timeout() {
        let _ = socket.set_tcp_user_timeout(Some(*timeout));
    }
    if config.get_keepalives() {
        let _ = socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(config.get_keepalives_idle()));
    }
    let mut tcp = tcp;
    if config.get_ssl_mode() == SslMode::Disable {
        return Ok((Box::new(tcp), None));
    }
    let mut out = BytesMut::new();
    frontend::ssl_request(&mut out);
    tcp.write_all_buf(&mut out).await?;
    // One byte and no more is read here: what follows it must not be taken for part of the TLS session.
    match tcp.read_u8().await? {
        b'S' => {
            let (stream, binding) = attempt.tls.handshake(&name, tcp).await?;
            Ok((Box::new(stream), binding))
        }
        _ if config.get_ssl_mode() == SslMode::Prefer => Ok((Box::new(tcp), None)),
        _ => Err(io::Error::other("the server does not support TLS, which sslmode requires")),
    }
}

/// What the stream brings.
#[derive(Debug)]
pub enum Incoming {
    /// A message of the output plugin, and where it begins in the WAL.
    Data(Lsn, Bytes),
    /// Everything before this position has been decoded by the walsender.
    Keepalive(Lsn),
}

/// A running stream. Reading it and telling the walsender how far we are go on independently.
pub struct ReplicationStream {
    peer: String,
    reader: ReadHalf<Box<dyn Duplex>>,
    buffer: BytesMut,
    gathers: bool,
    behind: bool,
    /// When something was last read, or waited for.
    heard: Instant,
    status: watch::Sender<StandbyStatus>,
    reply: std::sync::Arc<Notify>,
    writer: JoinHandle<()>,
}

/// Dropping the stream closes the connection; the walsender then frees the slot.
impl Drop for ReplicationStream {
    fn drop(&mut self) {
        self.writer.abort();
    }
}

impl ReplicationStream {
    fn new(connection: ReplicationConnection, from: Lsn) -> ReplicationStream {
        let (reader, writer) = tokio::io::split(connection.io);
        let first = StandbyStatus { received: from, flushed: from, reply_requested: false };
        let (status, changes) = watch::channel(first);
        let reply = std::sync::Arc::new(Notify::new());
        let writer = tokio::spawn(send_statuses(writer, changes, reply.clone()));
        ReplicationStream {
            peer: connection.peer,
            reader,
            buffer: connection.buffer,
            gathers: connection.gathers,
            behind: false,
            heard: Instant::now(),
            status,
            reply,
            writer,
        }
    }

    /// Returns how far the walsender is told that we are.
    pub fn flushed(&self) -> Lsn {
        self.status.borrow().flushed
    }

    /// Tells the walsender that everything before `durable` is applied and recorded on the target.
    ///
    /// It never goes back: a lower position than one that was told already is ignored.
    pub fn acknowledge(&self, durable: crate::progress::DurableLsn) {
        self.status.send_if_modified(|status| {
            let ahead = durable.lsn() > status.flushed;
            if ahead {
                status.flushed = durable.lsn();
                status.received = status.received.max(durable.lsn());
            }
            ahead
        });
    }

    /// Waits for what comes next. Can be dropped and called again without losing anything.
    ///
    /// # Errors
    /// [`Error::Transient`] if the connection broke or went silent, [`Error::Blocked`] if what came is not the protocol.
    pub async fn next(&mut self) -> Result<Incoming, Error> {
        loop {
            if let Some(incoming) = self.next_buffered()? {
                return Ok(incoming);
            }
            if self.behind {
                tokio::time::sleep(GATHER).await;
            }
            // Whoever waits here stops and begins again now and then; the silence goes on meanwhile.
            let silent = self.heard + SILENCE_MAX;
            let read = tokio::time::timeout_at(silent, fill(&mut self.reader, &mut self.buffer)).await;
            let read = read.map_err(|_| Error::connection(&self.peer, &format!("silent for {SILENCE_MAX:?}")))?;
            let read = read.map_err(|e| Error::connection(&self.peer, &e.to_string()))?;
            if read == 0 {
                return Err(Error::connection(&self.peer, "closed by the server"));
            }
            self.heard = Instant::now();
            self.behind = self.gathers && (BEHIND_BYTES..READ_BYTES).contains(&read);
        }
    }

    /// Returns what comes next if it has been read already.
    ///
    /// # Errors
    /// As [`ReplicationStream::next`].
    pub fn next_buffered(&mut self) -> Result<Option<Incoming>, Error> {
        while let Some(length) = frame_length(&self.peer, &self.buffer)? {
            if self.buffer.len() < length {
                // A large row: make room for all of it at once.
                self.buffer.reserve(length - self.buffer.len());
                return Ok(None);
            }
            let mut frame = self.buffer.split_to(length).freeze();
            let tag = frame[0];
            frame.advance(5);
            match tag {
                b'd' => match StreamMessage::decode(frame)? {
                    StreamMessage::XLogData { start, body, .. } => {
                        self.note_received(start);
                        return Ok(Some(Incoming::Data(start, body)));
                    }
                    StreamMessage::Keepalive { end, reply_requested } => {
                        self.note_received(end);
                        if reply_requested {
                            self.reply.notify_one();
                        }
                        return Ok(Some(Incoming::Keepalive(end)));
                    }
                },
                b'N' | b'S' => {}
                b'E' => {
                    let mut whole = BytesMut::with_capacity(length);
                    whole.extend_from_slice(b"E");
                    whole.extend_from_slice(&u32::try_from(length - 1).unwrap_or(u32::MAX).to_be_bytes());
                    whole.extend_from_slice(&frame);
                    return match backend::Message::parse(&mut whole) {
                        Ok(Some(backend::Message::ErrorResponse(body))) => {
                            Err(Error::server(problem_of(&self.peer, &body)))
                        }
                        _ => Err(Error::protocol(&self.peer, "malformed error")),
                    };
                }
                b'c' => return Err(Error::connection(&self.peer, "the server ended the stream")),
                tag => return Err(Error::protocol(&self.peer, format!("unexpected message {:?}", char::from(tag)))),
            }
        }
        Ok(None)
    }

    /// Says that nothing was read for a while because there was no room: that was not the walsender's silence.
    pub fn listen_anew(&mut self) {
        self.heard = Instant::now();
    }

    /// Silent: the next status that is due carries it.
    fn note_received(&self, received: Lsn) {
        self.status.send_if_modified(|status| {
            status.received = status.received.max(received);
            false
        });
    }
}

/// Tells the walsender how far we are: at once when something became durable or it asks, else at a steady pace.
///
/// Every second status of that pace asks for an answer, so that a dead walsender is noticed by the reader's silence.
async fn send_statuses(
    mut writer: WriteHalf<Box<dyn Duplex>>,
    mut changes: watch::Receiver<StandbyStatus>,
    reply: std::sync::Arc<Notify>,
) {
    let mut ask = false;
    loop {
        let mut status = *changes.borrow_and_update();
        status.reply_requested = ask;
        let mut out = BytesMut::with_capacity(64);
        out.extend_from_slice(b"d\0\0\0\x26");
        status.encode(postgres_clock(), &mut out);
        if writer.write_all_buf(&mut out).await.is_err() || writer.flush().await.is_err() {
            // The reader will see that the connection is gone.
            return;
        }
        ask = tokio::select! {
            changed = changes.changed() => match changed {
                Ok(()) => false,
                Err(_) => return,
            },
            () = reply.notified() => false,
            () = tokio::time::sleep(STATUS_INTERVAL) => !ask,
        };
    }
}
