//! Frames of the frontend/backend protocol: a tag byte, a length, a body.
//!
//! The walker goes from header to header over a stream that arrives in pieces of any size and never looks into a body. It decides
//! nothing: what becomes of a frame is the caller's. Start-up packets, which have no tag, are read by [`startup_length`].
//!
//! Source: PostgreSQL docs, protocol-overview, "Messaging Overview".

use std::ffi::CStr;

/// Bytes of a frame's header: the tag and the length.
pub const HEADER_BYTES: usize = 5;

/// Largest start-up packet that PostgreSQL takes, in bytes, its length included: the 10,000 that it allows are without it.
pub const STARTUP_BYTES_MAX: usize = 10_004;

/// A frame that cannot be one: the stream is not, or no longer, the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The length is smaller than itself, or negative.
    Length {
        /// The frame's tag.
        tag: u8,
        /// The length it claims.
        length: i32,
    },
    /// A start-up packet is shorter than its header or longer than [`STARTUP_BYTES_MAX`].
    Startup {
        /// The length it claims.
        length: i32,
    },
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FrameError::Length { .. } => f.write_str("invalid message length"),
            FrameError::Startup { .. } => f.write_str("invalid length of startup packet"),
        }
    }
}

impl std::error::Error for FrameError {}

/// A frame's tag and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The message type.
    pub tag: u8,
    /// Bytes of the whole frame, tag and length included; at least [`HEADER_BYTES`].
    pub size: usize,
}

impl Header {
    /// Reads a header from the beginning of `bytes`; `None` when it is not all there.
    ///
    /// # Errors
    /// [`FrameError::Length`] if the length is below 4. Never panics: `bytes` comes from the network.
    pub fn read(bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        let [tag, a, b, c, d, ..] = *bytes else { return Ok(None) };
        let length = i32::from_be_bytes([a, b, c, d]);
        if length < 4 {
            return Err(FrameError::Length { tag, length });
        }
        Ok(Some(Header { tag, size: length as usize + 1 }))
    }
}

/// Returns the length of the start-up packet at the beginning of `bytes`; `None` when its length is not all there.
///
/// # Errors
/// [`FrameError::Startup`] if it is below 8 or above [`STARTUP_BYTES_MAX`].
pub fn startup_length(bytes: &[u8]) -> Result<Option<usize>, FrameError> {
    let [a, b, c, d, ..] = *bytes else { return Ok(None) };
    let length = i32::from_be_bytes([a, b, c, d]);
    match usize::try_from(length) {
        Ok(size) if (8..=STARTUP_BYTES_MAX).contains(&size) => Ok(Some(size)),
        _ => Err(FrameError::Startup { length }),
    }
}

/// What the walker came upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The next `usize` bytes continue a frame that was let pass.
    Rest(usize),
    /// A frame begins here. The caller lets it pass by [`Walker::pass`], or takes it whole by itself.
    Frame(Header),
    /// More bytes are needed.
    More,
}

/// Goes from header to header over a stream.
///
/// The caller keeps the bytes and a position in them; the walker keeps only how much of the current frame has yet to come.
#[derive(Clone, Debug, Default)]
pub struct Walker {
    rest: usize,
}

impl Walker {
    /// Begins at the start of a frame.
    pub fn new() -> Walker {
        Walker::default()
    }

    /// Says what `bytes`, which begin where the walker stands, begin with.
    ///
    /// # Errors
    /// [`FrameError::Length`] if a header is malformed.
    #[inline]
    pub fn step(&mut self, bytes: &[u8]) -> Result<Step, FrameError> {
        if self.rest > 0 {
            let here = self.rest.min(bytes.len());
            self.rest -= here;
            return Ok(if here == 0 { Step::More } else { Step::Rest(here) });
        }
        Ok(Header::read(bytes)?.map_or(Step::More, Step::Frame))
    }

    /// Lets a frame pass of which `available` bytes are here, and returns how many of these belong to it.
    #[inline]
    pub fn pass(&mut self, header: Header, available: usize) -> usize {
        let here = header.size.min(available);
        self.rest = header.size - here;
        here
    }

    /// Returns whether the walker stands between two frames.
    pub fn at_boundary(&self) -> bool {
        self.rest == 0
    }
}

/// Returns the string at the beginning of `bytes`, without its terminating zero, and what follows it.
pub fn cstr(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let text = CStr::from_bytes_until_nul(bytes).ok()?.to_bytes();
    Some((text, &bytes[text.len() + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend_from_slice(&(body.len() as i32 + 4).to_be_bytes());
        out.extend_from_slice(body);
        out
    }

    /// Feeds `stream` in pieces cut at `cuts` and returns the frames seen and the bytes passed on.
    fn walk(stream: &[u8], cuts: &[usize], whole: impl Fn(u8) -> bool) -> (Vec<Header>, Vec<u8>) {
        let (mut walker, mut buffer, mut frames, mut passed) = (Walker::new(), Vec::new(), Vec::new(), Vec::new());
        let mut from = 0;
        for cut in cuts.iter().copied().chain([stream.len()]) {
            buffer.extend_from_slice(&stream[from..cut]);
            from = cut;
            let mut at = 0;
            loop {
                match walker.step(&buffer[at..]).unwrap() {
                    Step::More => break,
                    Step::Rest(n) => at += n,
                    Step::Frame(header) => {
                        if whole(header.tag) && buffer.len() - at < header.size {
                            break;
                        }
                        frames.push(header);
                        at += walker.pass(header, buffer.len() - at);
                    }
                }
            }
            passed.extend_from_slice(&buffer[..at]);
            buffer.drain(..at);
        }
        passed.extend_from_slice(&buffer);
        (frames, passed)
    }

    #[test]
    fn any_cut_gives_the_same_frames_and_the_same_bytes() {
        let stream: Vec<u8> =
            [frame(b'Q', b"select 1\0"), frame(b'S', b""), frame(b'd', &[7; 300]), frame(b'X', b"")].concat();
        let (expected, _) = walk(&stream, &[], |_| false);
        assert_eq!(expected.iter().map(|h| h.tag).collect::<Vec<_>>(), b"QSdX");
        for cut in 0..=stream.len() {
            for second in [cut, (cut + 1).min(stream.len()), (cut + 5).min(stream.len())] {
                for whole in [|_| false, |tag| tag == b'Q', |_| true] as [fn(u8) -> bool; 3] {
                    let (frames, passed) = walk(&stream, &[cut, second], whole);
                    assert_eq!((frames, passed), (expected.clone(), stream.clone()), "cut at {cut} and {second}");
                }
            }
        }
    }

    #[test]
    fn a_frame_far_larger_than_the_buffer_streams() {
        let mut walker = Walker::new();
        let header = Header { tag: b'D', size: (1 << 30) + 5 };
        assert_eq!(walker.step(b"D\x40\x00\x00\x04"), Ok(Step::Frame(header)));
        let mut seen = walker.pass(header, 5);
        let piece = [0; 1 << 14];
        while !walker.at_boundary() {
            let Ok(Step::Rest(n)) = walker.step(&piece) else { panic!() };
            seen += n;
        }
        assert_eq!(seen, header.size);
    }

    #[test]
    fn hostile_lengths_are_errors() {
        for length in [i32::MIN, -1, 0, 3] {
            let mut bytes = vec![b'Q'];
            bytes.extend_from_slice(&length.to_be_bytes());
            assert_eq!(Header::read(&bytes), Err(FrameError::Length { tag: b'Q', length }));
        }
        for length in [i32::MIN, -1, 0, 7, 10_005, i32::MAX] {
            assert_eq!(startup_length(&length.to_be_bytes()), Err(FrameError::Startup { length }));
        }
        assert_eq!(startup_length(&[0, 0, 0]), Ok(None));
        assert_eq!(startup_length(&[0, 0, 0, 8]), Ok(Some(8)));
        assert_eq!(startup_length(&10_004_i32.to_be_bytes()), Ok(Some(10_004)));
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        for _ in 0..2000 {
            let bytes: Vec<u8> = (0..64)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state >> 24) as u8 & if state & 1 == 0 { 0x07 } else { 0xff }
                })
                .collect();
            let mut walker = Walker::new();
            let mut at = 0;
            while let Ok(step) = walker.step(&bytes[at..]) {
                match step {
                    Step::More => break,
                    Step::Rest(n) => at += n,
                    Step::Frame(header) => at += walker.pass(header, bytes.len() - at),
                }
            }
            let _ = cstr(&bytes);
        }
    }
}
