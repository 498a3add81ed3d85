//! What a peer says to a text, frame by frame: what goes to the client, and what is kept until the catalog has agreed.

use std::io;
use std::rc::Rc;

use bytes::Buf;
use pg::SqlState;
use pg::frame::{HEADER_BYTES, Step, cstr};

use crate::fields::{Fields, frame};
use crate::rewrite::Execution;

use super::link::Link;
use super::{error, readable};

/// How far an answer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// More is to come.
    More,
    /// The peer wants copy data.
    CopyIn,
    /// That was all.
    All,
}

/// An answer that is coming in.
pub(super) struct Answer {
    execution: Rc<Execution>,
    /// All is passed on, as to a Query: else a RowDescription is not.
    simple: bool,
    /// The last CommandComplete, EmptyQueryResponse or PortalSuspended, which ends the statement if nothing follows.
    last: Option<Vec<u8>>,
    error: Option<Fields>,
    copy_in: bool,
    /// The answer to a Describe.
    pub(super) description: Option<Vec<u8>>,
}

impl Answer {
    pub(super) fn new(execution: Rc<Execution>, simple: bool) -> Answer {
        Answer { execution, simple, last: None, error: None, copy_in: false, description: None }
    }

    /// Takes what the session has read; what the client is to get is appended to `out`.
    ///
    /// # Errors
    /// [`io::Error`] if it is not the protocol.
    pub(super) fn take(&mut self, link: &mut Link, out: &mut Vec<u8>) -> io::Result<Said> {
        loop {
            let invalid = |e: pg::frame::FrameError| io::Error::new(io::ErrorKind::InvalidData, e);
            let header = match link.walker.step(&link.buffer).map_err(invalid)? {
                Step::More => return Ok(Said::More),
                Step::Rest(n) => {
                    out.extend_from_slice(&link.buffer[..n]);
                    link.buffer.advance(n);
                    continue;
                }
                Step::Frame(header) => header,
            };
            // Rows may be of any size and are passed on as they come.
            if matches!(header.tag, b'D' | b'd') {
                self.let_last_go(out);
                let here = link.walker.pass(header, link.buffer.len());
                out.extend_from_slice(&link.buffer[..here]);
                link.buffer.advance(here);
                continue;
            }
            if link.buffer.len() < header.size {
                return Ok(Said::More);
            }
            let whole = link.buffer.split_to(header.size);
            let body = &whole[HEADER_BYTES..];
            match header.tag {
                b'T' if !self.simple => self.description = Some(whole.to_vec()),
                b'T' | b'H' | b'c' => {
                    self.let_last_go(out);
                    out.extend_from_slice(&whole);
                }
                b'C' | b'I' | b's' => {
                    self.let_last_go(out);
                    self.last = Some(whole.to_vec());
                }
                b'N' => {
                    let Some(mut fields) = Fields::decode(body) else { continue };
                    self.execution.translate(&mut fields);
                    self.let_last_go(out);
                    out.extend(fields.encode(b'N'));
                }
                b'E' => {
                    self.let_last_go(out);
                    self.error = Some(self.translated(body, &link.peer));
                }
                b'S' => {
                    link.changed_encoding |= cstr(body).is_some_and(|(name, _)| name == b"client_encoding");
                }
                b'G' => {
                    self.copy_in = true;
                    return Ok(Said::CopyIn);
                }
                b'Z' => {
                    link.status = body.first().copied().unwrap_or(b'I');
                    return Ok(Said::All);
                }
                _ => {}
            }
        }
    }

    /// More follows: what seemed to be the end was that of one of several statements.
    fn let_last_go(&mut self, out: &mut Vec<u8>) {
        if let Some(last) = self.last.take() {
            out.extend(last);
        }
    }

    /// Reads an error: with its position in the client's text, and never one that says that the client's own session ends.
    fn translated(&self, body: &[u8], peer: &str) -> Fields {
        let Some(mut fields) = Fields::decode(body) else { return Fields::default() };
        if matches!(fields.get(b'V').or(fields.get(b'S')), Some(b"FATAL" | b"PANIC")) {
            let detail = readable(&fields, b'M', self.execution.encoding());
            let message = format!("connection to peer \"{peer}\" was lost");
            return error(SqlState::PEER_UNREACHABLE, &message, Some(&detail), None);
        }
        if self.copy_in {
            let message = "COPY FROM STDIN is not possible in EXECUTE on a peer";
            let hint = format!("Connect to the peer: \\c {peer}");
            return error(SqlState::FEATURE_NOT_SUPPORTED, message, None, Some(&hint));
        }
        self.execution.translate(&mut fields);
        fields
    }

    /// Returns what the statement ends with; `timed_out`: it was cancelled because of the session's statement_timeout.
    pub(super) fn end(self, timed_out: bool) -> Result<Vec<u8>, Vec<u8>> {
        match self.error {
            Some(mut fields) => {
                if timed_out && fields.get(b'C') == Some(SqlState::QUERY_CANCELED.as_str().as_bytes()) {
                    fields.set(b'M', "canceling statement due to statement timeout");
                }
                Err(fields.encode(b'E'))
            }
            None => Ok(self.last.unwrap_or_else(|| frame(b'I', b""))),
        }
    }
}
