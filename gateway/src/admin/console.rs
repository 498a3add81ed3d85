//! A session on the console: its statements in both protocols. Pure: from a client's message to what is answered; the socket around
//! it is in `admin`.
//!
//! Source: PostgreSQL docs, protocol-flow, "Simple Query" and "Extended Query".

use std::collections::HashMap;

use bytes::{BufMut, BytesMut};
use pg::SqlState;
use pg::frame::cstr;
use pgwire::messages::Message;
use pgwire::messages::data::{DataRow, FieldDescription, NoData, ParameterDescription, RowDescription};
use pgwire::messages::extendedquery::{BindComplete, CloseComplete, ParseComplete, PortalSuspended};
use pgwire::messages::response::{CommandComplete, EmptyQueryResponse, ReadyForQuery, TransactionStatus};

use super::command::{Command, ConsoleError, Show, parse};
use super::tables::{Cell, Kind, columns};
use crate::bind::Bind;
use crate::fields::Fields;

/// Statements and portals that a client may have at the same time.
const KEPT_MAX: usize = 100;

/// What a statement came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// A table's rows.
    Rows(Show, Vec<Vec<Cell>>),
    /// Something was done. With the tag, and what there is to say about it.
    Done(&'static str, Vec<Notice>),
}

/// Something to say beside the answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Notice {
    /// `NOTICE` or `WARNING`.
    pub(crate) severity: &'static str,
    pub(crate) message: String,
}

/// Runs statements.
pub(crate) trait Run {
    /// Runs one.
    async fn run(&mut self, command: &Command) -> Result<Outcome, ConsoleError>;
}

/// What a message came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// The session goes on.
    Goes,
    /// The client has said goodbye.
    Ends,
    /// The message is not the protocol.
    Violates,
}

/// What a client has prepared.
#[derive(Default)]
pub(crate) struct Console {
    /// `None` stands for an empty statement.
    statements: HashMap<Vec<u8>, Option<Command>>,
    portals: HashMap<Vec<u8>, Portal>,
    /// An error has been answered in the extended protocol; what comes before the next Sync is skipped.
    skips: bool,
}

/// A statement that is bound.
struct Portal {
    command: Option<Command>,
    formats: Vec<u16>,
    /// The rows that are left, once it has run; the last is the next.
    rows: Option<Vec<Vec<Cell>>>,
}

impl Console {
    /// Answers a message, appending to `out`.
    pub(crate) async fn answer(&mut self, tag: u8, body: &[u8], runner: &mut impl Run, out: &mut BytesMut) -> Reply {
        match tag {
            b'X' => return Reply::Ends,
            b'S' => {
                self.skips = false;
                self.portals.clear();
                ready(out);
            }
            // What a failed COPY may have left over, as Postgres, and Flush: all is written at once anyway.
            b'd' | b'c' | b'f' | b'H' => {}
            _ if self.skips => {}
            b'Q' => {
                if let Err(error) = self.simple(body, runner, out).await {
                    encode_error(&error, out);
                }
                ready(out);
            }
            b'P' | b'B' | b'D' | b'E' | b'C' => match self.extended(tag, body, runner, out).await {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    encode_error(&error, out);
                    self.skips = true;
                }
                None => return Reply::Violates,
            },
            b'F' => {
                encode_error(&ConsoleError::new(SqlState::FEATURE_NOT_SUPPORTED, "the console has no functions"), out);
                ready(out);
            }
            _ => return Reply::Violates,
        }
        Reply::Goes
    }

    async fn simple(&mut self, body: &[u8], runner: &mut impl Run, out: &mut BytesMut) -> Result<(), ConsoleError> {
        let commands = parse(text(body.strip_suffix(b"\0").unwrap_or(body))?)?;
        if commands.is_empty() {
            encode(EmptyQueryResponse::new(), out);
        }
        for command in commands {
            match runner.run(&command).await? {
                Outcome::Rows(show, rows) => {
                    describe(show, &[], out);
                    rows.iter().for_each(|row| encode_row(row, show, &[], out));
                    encode(CommandComplete::new("SHOW".to_owned()), out);
                }
                Outcome::Done(tag, notices) => done(tag, &notices, out),
            }
        }
        Ok(())
    }

    /// `None`: the message is malformed.
    async fn extended(
        &mut self,
        tag: u8,
        body: &[u8],
        runner: &mut impl Run,
        out: &mut BytesMut,
    ) -> Option<Result<(), ConsoleError>> {
        Some(match tag {
            b'P' => {
                let (name, rest) = cstr(body)?;
                let (query, _) = cstr(rest)?;
                self.parse(name, query, out)
            }
            b'B' => self.bind(&Bind::decode(body)?, out),
            b'D' => {
                let (kind, name) = body.split_first()?;
                self.describe(*kind, cstr(name)?.0, out)
            }
            b'E' => {
                let (name, rest) = cstr(body)?;
                let limit = u32::from_be_bytes(*rest.first_chunk()?);
                self.execute(name, limit as usize, runner, out).await
            }
            _ => {
                let (kind, name) = body.split_first()?;
                let name = cstr(name)?.0;
                if *kind == b'S' {
                    self.statements.remove(name);
                } else {
                    self.portals.remove(name);
                }
                encode(CloseComplete::new(), out);
                Ok(())
            }
        })
    }

    fn parse(&mut self, name: &[u8], query: &[u8], out: &mut BytesMut) -> Result<(), ConsoleError> {
        let mut commands = parse(text(query)?)?;
        if commands.len() > 1 {
            let message = "cannot insert multiple commands into a prepared statement";
            return Err(ConsoleError::new(SqlState::SYNTAX_ERROR, message));
        }
        room(self.statements.len(), "prepared statements")?;
        self.statements.insert(name.to_vec(), commands.pop());
        encode(ParseComplete::new(), out);
        Ok(())
    }

    fn bind(&mut self, bind: &Bind, out: &mut BytesMut) -> Result<(), ConsoleError> {
        let command = self.statement(bind.statement())?.clone();
        if bind.value_count() > 0 {
            let message = "the console's statements have no parameters";
            return Err(ConsoleError::new(SqlState::PROTOCOL_VIOLATION, message));
        }
        room(self.portals.len(), "portals")?;
        let portal = Portal { command, formats: bind.result_formats(), rows: None };
        self.portals.insert(bind.portal().to_vec(), portal);
        encode(BindComplete::new(), out);
        Ok(())
    }

    fn describe(&self, kind: u8, name: &[u8], out: &mut BytesMut) -> Result<(), ConsoleError> {
        let (command, formats) = if kind == b'S' {
            encode(ParameterDescription::new(Vec::new()), out);
            (self.statement(name)?, &[][..])
        } else {
            let portal = self.portals.get(name).ok_or_else(|| no_portal(name))?;
            (&portal.command, portal.formats.as_slice())
        };
        match command {
            Some(Command::Show(show)) => describe(*show, formats, out),
            _ => encode(NoData::new(), out),
        }
        Ok(())
    }

    async fn execute(
        &mut self,
        name: &[u8],
        limit: usize,
        runner: &mut impl Run,
        out: &mut BytesMut,
    ) -> Result<(), ConsoleError> {
        let portal = self.portals.get_mut(name).ok_or_else(|| no_portal(name))?;
        let show = match &portal.command {
            None => {
                encode(EmptyQueryResponse::new(), out);
                return Ok(());
            }
            Some(Command::Show(show)) => *show,
            Some(command) => {
                if let Outcome::Done(tag, notices) = runner.run(command).await? {
                    done(tag, &notices, out);
                }
                return Ok(());
            }
        };
        if portal.rows.is_none() {
            let Outcome::Rows(_, mut rows) = runner.run(&Command::Show(show)).await? else { return Ok(()) };
            rows.reverse();
            portal.rows = Some(rows);
        }
        let rows = portal.rows.as_mut().into_iter().flat_map(|rows| {
            let keep = if limit == 0 { 0 } else { rows.len().saturating_sub(limit) };
            rows.split_off(keep).into_iter().rev()
        });
        for row in rows {
            encode_row(&row, show, &portal.formats, out);
        }
        if portal.rows.as_ref().is_some_and(|rows| !rows.is_empty()) {
            encode(PortalSuspended::new(), out);
        } else {
            encode(CommandComplete::new("SHOW".to_owned()), out);
        }
        Ok(())
    }

    fn statement(&self, name: &[u8]) -> Result<&Option<Command>, ConsoleError> {
        self.statements.get(name).ok_or_else(|| {
            let message = format!("prepared statement \"{}\" does not exist", String::from_utf8_lossy(name));
            ConsoleError::new(SqlState::UNDEFINED_STATEMENT, message)
        })
    }
}

fn no_portal(name: &[u8]) -> ConsoleError {
    let message = format!("portal \"{}\" does not exist", String::from_utf8_lossy(name));
    ConsoleError::new(SqlState::UNDEFINED_CURSOR, message)
}

fn room(kept: usize, of_what: &str) -> Result<(), ConsoleError> {
    if kept < KEPT_MAX {
        return Ok(());
    }
    Err(ConsoleError::new(
        SqlState::PROGRAM_LIMIT_EXCEEDED,
        format!("the console keeps {KEPT_MAX} {of_what} at the most"),
    ))
}

fn text(bytes: &[u8]) -> Result<&str, ConsoleError> {
    std::str::from_utf8(bytes)
        .map_err(|_| ConsoleError::new(SqlState::CHARACTER_NOT_IN_REPERTOIRE, "the console's statements are in UTF-8"))
}

fn encode(message: impl Message, out: &mut BytesMut) {
    message.encode(out).expect("encoders of what we made do not fail");
}

fn ready(out: &mut BytesMut) {
    encode(ReadyForQuery::new(TransactionStatus::Idle), out);
}

fn done(tag: &str, notices: &[Notice], out: &mut BytesMut) {
    for notice in notices {
        let code = if notice.severity == "WARNING" { "01000" } else { "00000" };
        let mut fields = Fields::default();
        for (key, text) in [(b'S', notice.severity), (b'V', notice.severity), (b'C', code), (b'M', &notice.message)] {
            fields.set(key, text);
        }
        out.extend_from_slice(&fields.encode(b'N'));
    }
    encode(CommandComplete::new(tag.to_owned()), out);
}

fn encode_error(error: &ConsoleError, out: &mut BytesMut) {
    let mut fields = Fields::default();
    fields.set(b'S', "ERROR");
    fields.set(b'V', "ERROR");
    fields.set(b'C', error.sqlstate.to_string());
    fields.set(b'M', error.message.as_str());
    let more =
        [(b'D', error.detail.clone()), (b'H', error.hint.clone()), (b'P', error.position.map(|p| p.to_string()))];
    for (key, text) in more {
        if let Some(text) = text {
            fields.set(key, text);
        }
    }
    fields.set(b'R', "console");
    out.extend_from_slice(&fields.encode(b'E'));
}

/// Returns the format of a column's values: one for all, or each its own; text if nothing is said.
fn format(formats: &[u16], column: usize) -> u16 {
    match formats {
        [one] => *one,
        _ => formats.get(column).copied().unwrap_or(0),
    }
}

fn describe(show: Show, formats: &[u16], out: &mut BytesMut) {
    let field = |(n, (name, kind)): (usize, &(&'static str, Kind))| {
        let (oid, size) = match kind {
            Kind::Text => (25, -1),
            Kind::Int => (23, 4),
            Kind::BigInt => (20, 8),
        };
        FieldDescription::new((*name).to_owned(), 0, 0, oid, size, -1, i16::from(format(formats, n) == 1))
    };
    encode(RowDescription::new(columns(show).iter().enumerate().map(field).collect()), out);
}

fn encode_row(row: &[Cell], show: Show, formats: &[u16], out: &mut BytesMut) {
    let mut data = BytesMut::new();
    for (n, (cell, (_, kind))) in row.iter().zip(columns(show)).enumerate() {
        let mut put = |bytes: &[u8]| {
            data.put_i32(bytes.len() as i32);
            data.put_slice(bytes);
        };
        match (cell, kind, format(formats, n)) {
            (Cell::Null, ..) => data.put_i32(-1),
            (Cell::Text(text), ..) => put(text.as_bytes()),
            (Cell::Number(number), Kind::BigInt, 1) => put(&number.to_be_bytes()),
            (Cell::Number(number), Kind::Int, 1) => put(&i32::try_from(*number).unwrap_or(i32::MAX).to_be_bytes()),
            (Cell::Number(number), Kind::Int, _) => {
                put(i32::try_from(*number).unwrap_or(i32::MAX).to_string().as_bytes())
            }
            (Cell::Number(number), ..) => put(number.to_string().as_bytes()),
        }
    }
    encode(DataRow::new(data, row.len() as i16), out);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows three versions, and fails at KILL.
    struct Runner;

    impl Run for Runner {
        async fn run(&mut self, command: &Command) -> Result<Outcome, ConsoleError> {
            match command {
                Command::Show(show) => {
                    let rows = ["a", "b", "c"].map(|name| vec![Cell::from(name), Cell::from(7_u64)]);
                    assert_eq!(*show, Show::Lists);
                    Ok(Outcome::Rows(*show, rows.to_vec()))
                }
                Command::Kill(_) => Err(ConsoleError::new(SqlState::UNDEFINED_OBJECT, "no").hint("yes")),
                _ => Ok(Outcome::Done("RELOAD", vec![Notice { severity: "NOTICE", message: "so".to_owned() }])),
            }
        }
    }

    /// Says messages one after another; returns the tags of the answers, and the answers.
    async fn say(console: &mut Console, messages: &[(u8, &[u8])]) -> (String, Vec<u8>) {
        let mut out = BytesMut::new();
        for (tag, body) in messages {
            assert_eq!(console.answer(*tag, body, &mut Runner, &mut out).await, Reply::Goes);
        }
        let (mut tags, mut at) = (String::new(), 0);
        while at < out.len() {
            tags.push(char::from(out[at]));
            at += 1 + u32::from_be_bytes(out[at + 1..at + 5].try_into().unwrap()) as usize;
        }
        assert_eq!(at, out.len());
        (tags, out.to_vec())
    }

    const BIND: &[u8] = b"\0\0\0\0\0\0\0\0";
    const BIND_BINARY: &[u8] = b"\0\0\0\0\0\0\0\x01\0\x01";

    #[tokio::test]
    async fn simple_queries_are_answered_up_to_the_first_error() {
        let mut console = Console::default();
        assert_eq!(say(&mut console, &[(b'Q', b"show lists; reload\0")]).await.0, "TDDDCNCZ");
        let (tags, answer) = say(&mut console, &[(b'Q', b"reload; kill 1; reload\0")]).await;
        assert_eq!(tags, "NCEZ");
        assert!(answer.windows(7).any(|w| w == b"C42704\0") && answer.windows(5).any(|w| w == b"Hyes\0"));
        // Nothing runs unless all of it can be read.
        assert_eq!(say(&mut console, &[(b'Q', b"reload; foo\0")]).await.0, "EZ");
        assert_eq!(say(&mut console, &[(b'Q', b" -- nothing\0")]).await.0, "IZ");
        assert_eq!(say(&mut console, &[(b'Q', b"\xff\0")]).await.0, "EZ");
    }

    #[tokio::test]
    async fn extended_queries_are_answered_and_suspended() {
        let mut console = Console::default();
        let parse: (u8, &[u8]) = (b'P', b"s\0show lists\0\0\0");
        let bind: &[u8] = b"\0s\0\0\0\0\0\0\0";
        let all = [parse, (b'D', b"Ss\0"), (b'B', bind), (b'D', b"P\0"), (b'E', b"\0\0\0\0\0"), (b'S', b"")];
        assert_eq!(say(&mut console, &all).await.0, "1tT2TDDDCZ");
        let parts = [(b'B', bind), (b'E', b"\0\0\0\0\x02"), (b'E', b"\0\0\0\0\x02"), (b'S', &b""[..])];
        let (tags, answer) = say(&mut console, &parts).await;
        assert_eq!(tags, "2DDsDCZ");
        assert!(answer.windows(7).any(|w| w == b"C\0\0\0\x09SH"));
        // A portal ends with its transaction, a statement does not.
        assert_eq!(say(&mut console, &[(b'E', b"\0\0\0\0\0"), parse, (b'S', b"")]).await.0, "EZ");
        assert_eq!(say(&mut console, &[(b'C', b"Ss\0"), (b'B', bind), (b'S', b"")]).await.0, "3EZ");
    }

    #[tokio::test]
    async fn values_are_binary_when_asked_for() {
        let mut console = Console::default();
        let messages: [(u8, &[u8]); 3] = [(b'P', b"\0show lists\0\0\0"), (b'B', BIND_BINARY), (b'E', b"\0\0\0\0\x01")];
        let (_, answer) = say(&mut console, &messages).await;
        assert!(answer.windows(13).any(|w| w == b"\0\0\0\x01a\0\0\0\x04\0\0\0\x07"), "{answer:?}");
    }

    #[tokio::test]
    async fn an_error_skips_to_sync_and_actions_run_when_executed() {
        let mut console = Console::default();
        let reload: (u8, &[u8]) = (b'P', b"\0reload\0\0\0");
        let execute: (u8, &[u8]) = (b'E', b"\0\0\0\0\0");
        let messages = [(b'P', &b"\0nonsense\0\0\0"[..]), reload, (b'Q', b"reload\0"), (b'S', b"")];
        assert_eq!(say(&mut console, &messages).await.0, "EZ");
        let messages = [reload, (b'B', BIND), (b'D', b"P\0"), execute, (b'S', b"")];
        assert_eq!(say(&mut console, &messages).await.0, "12nNCZ");
        let with_value: &[u8] = b"\0\0\0\0\0\x01\0\0\0\x01x\0\0";
        assert_eq!(say(&mut console, &[reload, (b'B', with_value), (b'S', b"")]).await.0, "1EZ");
    }

    #[tokio::test]
    async fn malformed_messages_end_the_session() {
        for (tag, body) in [(b'B', &b"\0"[..]), (b'P', b"x"), (b'E', b"\0\0"), (b'D', b""), (b'C', b"S"), (b'y', b"")] {
            let mut out = BytesMut::new();
            assert_eq!(Console::default().answer(tag, body, &mut Runner, &mut out).await, Reply::Violates, "{tag}");
        }
        assert_eq!(Console::default().answer(b'X', b"", &mut Runner, &mut BytesMut::new()).await, Reply::Ends);
    }

    #[tokio::test]
    async fn what_is_kept_is_bounded() {
        let mut console = Console::default();
        for n in 0..KEPT_MAX {
            let body = format!("{n}\0reload\0\0\0");
            assert_eq!(say(&mut console, &[(b'P', body.as_bytes())]).await.0, "1");
        }
        assert_eq!(say(&mut console, &[(b'P', b"more\0reload\0\0\0")]).await.0, "E");
    }
}
