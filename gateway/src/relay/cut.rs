//! What of a buffer goes on, and what is put in its place.

use bytes::BytesMut;
use pg::frame::Header;

use crate::intake::BUFFER_BYTES;

/// How far a walk over a buffer has come. Up to `run`, all has gone on or is in the output; from there to `at`, it goes on untouched.
#[derive(Clone, Copy, Default)]
pub(super) struct Cut {
    pub(super) run: usize,
    pub(super) at: usize,
}

impl Cut {
    /// Puts `replacement` in the place of the frame that begins here.
    pub(super) fn replace(&mut self, header: Header, buffer: &[u8], replacement: &[u8], out: &mut BytesMut) {
        out.extend_from_slice(&buffer[self.run..self.at]);
        out.extend_from_slice(replacement);
        self.at += header.size;
        self.run = self.at;
    }

    /// Returns all that goes on. Where nothing was replaced, it is not copied.
    pub(super) fn bytes<'a>(&self, buffer: &'a [u8], out: &'a mut BytesMut) -> &'a [u8] {
        let untouched = &buffer[self.run..self.at];
        if out.is_empty() {
            return untouched;
        }
        out.extend_from_slice(untouched);
        out
    }
}

/// Empties the output, which is mostly empty, and keeps its memory if it is little.
pub(super) fn clear(out: &mut BytesMut) {
    out.clear();
    if out.capacity() > BUFFER_BYTES {
        *out = BytesMut::new();
    }
}
