//! The replication protocol: our own client, on the codecs and options of the SQL client.
//!
//! Frames are walked here and their bodies handed on as slices of what was read; nothing is copied per row. Sending statuses is a
//! task of its own, so that a busy reader or a slow target never makes the walsender think that we are gone.
//!
//! Source: PostgreSQL docs, protocol-replication.

mod stream;
mod transport;

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use catalog::connect::Attempt;
use catalog::wire::{self, Socket};
use fallible_iterator::FallibleIterator;
use pg::name::{quote_ident, quote_literal};
use pg::{Lsn, SqlState};
use postgres_protocol::message::{backend, frontend};
use tokio::io::AsyncWriteExt;

pub use self::stream::{Incoming, ReplicationStream, postgres_clock};
use self::transport::{fill, frame_length, widen};
use crate::error::{Error, Problem};
use crate::session::PINNED;

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
    io: Socket,
    buffer: BytesMut,
    /// What is sent gathers in a buffer of ours, as on TCP.
    gathers: bool,
    failover: bool,
}

impl ReplicationConnection {
    /// Connects as `attempt` says, with `replication=database`.
    ///
    /// # Errors
    /// [`Error::Transient`] with what the server or the system said.
    pub async fn connect(peer: &str, attempt: &Attempt) -> Result<ReplicationConnection, Error> {
        let config = &attempt.config;
        let mut parameters = vec![
            ("database", config.get_dbname().or(config.get_user()).unwrap_or_default()),
            ("replication", "database"),
            ("client_encoding", "UTF8"),
            ("application_name", config.get_application_name().unwrap_or("peergate")),
        ];
        parameters.extend(config.get_options().map(|options| ("options", options)));
        let session = wire::log_in(attempt, &parameters).await.map_err(|e| Error::connect(peer, e))?;
        widen(&session.socket);
        let mut connection = ReplicationConnection {
            peer: peer.to_owned(),
            gathers: !matches!(session.socket, Socket::Unix(_)),
            io: session.socket,
            buffer: BytesMut::new(),
            failover: false,
        };
        // The walsender prints values with its session's settings.
        match tokio::time::timeout(attempt.timeout, connection.query(PINNED)).await {
            Ok(pinned) => pinned.map(|_| connection),
            Err(_) => {
                Err(Error::connection(peer, &format!("{}: no answer within {:?}", attempt.address, attempt.timeout)))
            }
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

    /// Makes slots from now on that standbys can synchronize, on servers that can (17 and later).
    pub fn make_failover_slots(&mut self, failover: bool) {
        self.failover = failover;
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
        let failover = if self.failover && server_version >= 170_000 { ", FAILOVER true" } else { "" };
        let command = match (export_snapshot, server_version >= 150_000) {
            (true, true) => format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput (SNAPSHOT 'export'{failover})"),
            (false, true) => format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput (SNAPSHOT 'nothing'{failover})"),
            (true, false) => format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput EXPORT_SNAPSHOT"),
            (false, false) => format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput NOEXPORT_SNAPSHOT"),
        };
        self.made(&command).await
    }

    /// Makes a slot that is gone with this connection, and a snapshot of the database at exactly its consistent point.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn create_temporary_slot(&mut self, slot: &str, server_version: u32) -> Result<CreatedSlot, Error> {
        let snapshot = if server_version >= 150_000 { "(SNAPSHOT 'export')" } else { "EXPORT_SNAPSHOT" };
        let command = format!("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput {snapshot}", quote_ident(slot));
        self.made(&command).await
    }

    async fn made(&mut self, command: &str) -> Result<CreatedSlot, Error> {
        let rows = self.query(command).await?;
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
        let patience = "select setting from pg_catalog.pg_settings where name = 'wal_sender_timeout'";
        let patience = self.query(patience).await?.pop().and_then(|mut row| row.pop()?);
        let patience = Duration::from_millis(patience.and_then(|p| p.parse().ok()).unwrap_or_default());
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
                b'W' => return Ok(ReplicationStream::new(self, from, patience)),
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
