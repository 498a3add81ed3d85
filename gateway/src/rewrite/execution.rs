//! A text for a peer, and what stands in its place in the text that the catalog gets.
//!
//! The catalog is asked for copy data in its place. So it does for the statement what only it can do: it refuses it in a failed or a
//! read-only transaction, waits in the middle of a text or a pipeline until the peer has answered, and fails when the peer failed.

use pg::frame::HEADER_BYTES;

use crate::encoding::Encoding;
use crate::fields::{Fields, frame};
use crate::parser::ExecutePeer;

/// What the catalog gets: the row that [`Execution::row`] makes is all that comes for it.
pub(super) const STATEMENT: &str = "COPY peergate_public.execution (peer, nonce) FROM STDIN";

/// A statement of the client's text that a peer is to run.
#[derive(Debug)]
pub struct Execution {
    /// Which statement of the text it is, from 0.
    pub ordinal: usize,
    /// What is to be run, and where.
    pub execute: ExecutePeer,
    /// The statement as the client wrote it.
    pub(super) statement: Vec<u8>,
    /// Where it begins in the client's text, in characters.
    pub(super) start: usize,
    /// The text's encoding.
    pub(super) encoding: Encoding,
}

impl Execution {
    /// Returns the copy data that asks the catalog whether the session may: names in hexadecimal are the same in any encoding.
    pub fn row(&self, nonce: &str) -> Vec<u8> {
        let mut row = String::new();
        for byte in self.execute.peer.bytes() {
            row.push_str(&format!("{byte:02x}"));
        }
        frame(b'd', format!("{row}\t{nonce}\n").as_bytes())
    }

    /// Returns the text's encoding.
    pub(crate) fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Returns where the peer is named in the client's text, in characters.
    pub(crate) fn peer_position(&self) -> usize {
        self.start + self.execute.peer_at
    }

    /// Moves the position of an error or notice in the peer's text to where that is in the client's.
    pub fn translate(&self, fields: &mut Fields) {
        let Some(position) = fields.number(b'P').and_then(|p| p.checked_sub(1)) else { return };
        let is_start = |b: u8| self.encoding != Encoding::Utf8 || b & 0xc0 != 0x80;
        let text = &self.execute.text;
        let mut starts = (0..text.len()).filter(|at| is_start(text[*at]));
        let byte = starts.nth(position).unwrap_or(text.len());
        let at = self.execute.offsets.get(byte).map_or(0, |at| *at as usize);
        let at = self.start + self.encoding.characters(&self.statement[..at]);
        fields.set(b'P', (at + 1).to_string());
    }
}

/// What the catalog says when it has let an [`Execution`] go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permit {
    /// Which peer it is, and as it is now: another value when its options have changed.
    pub version: String,
    /// The session's `statement_timeout` in milliseconds; 0: none.
    pub timeout_ms: u64,
}

impl Permit {
    /// Reads it from a notice that carries the session's nonce.
    pub fn from_notice(fields: &Fields, nonce: &str) -> Option<Permit> {
        if fields.get(b'C') != Some(pg::SqlState::EXECUTION_PERMIT.as_str().as_bytes()) {
            return None;
        }
        let rest = fields.get(b'M')?.strip_prefix(nonce.as_bytes())?.strip_prefix(b":")?;
        let (timeout, version) = std::str::from_utf8(rest).ok()?.split_once(' ')?;
        Some(Permit { version: version.to_owned(), timeout_ms: timeout.parse().ok()? })
    }
}

/// How the copy ends when the peer failed. The catalog's complaint ends with these words, and the peer's takes its place.
pub fn failure() -> Vec<u8> {
    frame(b'f', &[FAILED, b"\0"].concat())
}

/// Returns whether an error is the catalog's echo of [`failure`].
pub fn is_failure(body: &[u8]) -> bool {
    Fields::decode(body).and_then(|fields| fields.get(b'M').map(|m| m.ends_with(FAILED))).unwrap_or(false)
}

const FAILED: &[u8] = b"EXECUTE failed on the peer";

/// How the copy ends when the peer has done it. In a pipeline, what the catalog says to it must not wait for a Sync.
pub fn success() -> Vec<u8> {
    debug_assert_eq!(frame(b'c', b"").len(), HEADER_BYTES);
    [frame(b'c', b""), frame(b'H', b"")].concat()
}
