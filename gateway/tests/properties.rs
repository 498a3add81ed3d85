//! What must hold whatever arrives: the frames of a session in any pieces, and any text. Shared by the fuzz targets, which feed it what
//! they find, and by `hostile.rs`, which feeds it seeded random bytes.

use std::sync::OnceLock;

use gateway::encoding::Encoding;
use gateway::intercept::{Action, Interceptor, canceled};
use gateway::parser::{Parsed, Refusal, parse};
use gateway::peers::{PeerEntry, PeerSchema, Peers};
use gateway::rewrite::{Findings, Place, Rewritten, plan, plan_with};
use gateway::split::{may_be_ours, split};
use pg::frame::{HEADER_BYTES, Header, Step, Walker};

/// The message types that both sides know, so that one byte of input picks a likely one.
const TAGS: &[u8] = b"QPBDECSHFcdfXpRKZ12TtnsAGIWNVv3\0";

/// Stands for the session's secret; the fuzzers' dictionary has it, so that they get to what only the catalog can say.
const NONCE: &str = "5ec3e7";

const ENCODINGS: [Encoding; 4] = [Encoding::Utf8, Encoding::Latin1, Encoding::AsciiSafe, Encoding::Unsafe];

/// Runs a session that `data` describes: bytes from both sides in pieces. Whether the interception is on is the first byte's to say.
///
/// # Panics
/// If anything depends on how the bytes are cut, if a message is malformed that came from well-formed ones, or if what is none of our
/// concern is changed.
pub(crate) fn frames(data: &[u8]) {
    let Some((&first, script)) = data.split_first() else { return };
    let enabled = first & 1 == 0;
    let pieces = pieces(script);
    let cut = run(enabled, &pieces);
    assert_eq!(run(enabled, &merged(&pieces)), cut, "it depends on the cuts");
    let bytes = |of: Side| pieces.iter().filter(|(side, _)| *side == of).flat_map(|(_, b)| b.iter().copied()).collect();
    let (client, server): (Vec<u8>, Vec<u8>) = (bytes(Side::Client), bytes(Side::Server));
    if !enabled || !mentions_ours(&client) {
        assert!(client.starts_with(&cut.to_server), "what is not ours was changed");
        if !server.windows(NONCE.len()).any(|w| w == NONCE.as_bytes()) {
            assert!(server.starts_with(&cut.to_client), "an answer to what is not ours was changed");
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

/// Reads a script: each step is a head (which side, and whether well-formed), a length, and that many bytes.
fn pieces(mut script: &[u8]) -> Vec<(Side, Vec<u8>)> {
    let mut pieces = Vec::new();
    while let [head, length, rest @ ..] = script {
        let (body, after) = rest.split_at(usize::from(*length).min(rest.len()));
        script = after;
        let side = if head & 0x80 == 0 { Side::Client } else { Side::Server };
        let bytes = if head & 0x40 == 0 {
            let tag = TAGS[usize::from(head & 0x1f)];
            [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
        } else {
            body.to_vec()
        };
        pieces.push((side, bytes));
    }
    pieces
}

/// Joins pieces of one side that follow each other.
fn merged(pieces: &[(Side, Vec<u8>)]) -> Vec<(Side, Vec<u8>)> {
    let mut out: Vec<(Side, Vec<u8>)> = Vec::new();
    for (side, bytes) in pieces {
        match out.last_mut() {
            Some((last, all)) if last == side => all.extend_from_slice(bytes),
            _ => out.push((*side, bytes.clone())),
        }
    }
    out
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Relayed {
    to_server: Vec<u8>,
    to_client: Vec<u8>,
}

/// One direction: what has come but is not yet complete, and where the walker is in it.
#[derive(Default)]
struct Pump {
    walker: Walker,
    buffer: Vec<u8>,
    broken: bool,
}

fn run(enabled: bool, pieces: &[(Side, Vec<u8>)]) -> Relayed {
    let mut interceptor = Interceptor::new(enabled, NONCE.to_owned());
    let (mut client, mut server) = (Pump::default(), Pump::default());
    let mut relayed = Relayed::default();
    for (side, bytes) in pieces {
        match side {
            Side::Client => client.take(bytes, &mut relayed.to_server, |tag, body| match body {
                None if interceptor.wants_from_client(tag) => None,
                None => {
                    interceptor.passed_from_client(tag);
                    Some(Action::Pass)
                }
                Some(body) => Some(answered(&mut interceptor, tag, body)),
            }),
            Side::Server => server.take(bytes, &mut relayed.to_client, |tag, body| match body {
                None if interceptor.wants_from_server(tag) => None,
                None => {
                    interceptor.passed_from_server(tag);
                    Some(Action::Pass)
                }
                Some(body) => Some(interceptor.from_server(tag, body)),
            }),
        }
    }
    relayed
}

/// Decides about a client's message, and finds something out if that is asked for.
fn answered(interceptor: &mut Interceptor, tag: u8, body: &[u8]) -> Action {
    match interceptor.from_client(tag, body) {
        Action::Ask(question) => {
            let findings = findings(question.peers.len());
            Action::Replace(interceptor.answer(*question, findings).frame)
        }
        action => action,
    }
}

/// What may come of looking at peers: now this, now that.
fn findings(count: usize) -> Vec<Result<Findings, Refusal>> {
    let found = |n| {
        let validation = if n % 3 == 0 { serde_json::Value::Null } else { serde_json::json!({"message": "it's 'é"}) };
        let options = serde_json::json!({"host": "é\\'"});
        let secrets = serde_json::json!({"password": "sealed"});
        Ok(Findings::default().with("options", options).with("secrets", secrets).with("validation", validation))
    };
    (0..count).map(|n| if n % 2 == 0 { found(n) } else { Err(canceled()) }).collect()
}

impl Pump {
    /// Takes bytes as the relay does; `decide` is asked without the body first, and with it if that gave `None`.
    fn take(&mut self, bytes: &[u8], out: &mut Vec<u8>, mut decide: impl FnMut(u8, Option<&[u8]>) -> Option<Action>) {
        if self.broken {
            return;
        }
        self.buffer.extend_from_slice(bytes);
        let mut at = 0;
        loop {
            let header = match self.walker.step(&self.buffer[at..]) {
                Err(_) => {
                    self.broken = true;
                    break;
                }
                Ok(Step::More) => break,
                Ok(Step::Rest(n)) => {
                    out.extend_from_slice(&self.buffer[at..at + n]);
                    at += n;
                    continue;
                }
                Ok(Step::Frame(header)) => header,
            };
            if decide(header.tag, None).is_some() {
                let here = self.walker.pass(header, self.buffer.len() - at);
                out.extend_from_slice(&self.buffer[at..at + here]);
                at += here;
                continue;
            }
            if self.buffer.len() - at < header.size {
                break;
            }
            let whole = &self.buffer[at..at + header.size];
            match decide(header.tag, Some(&whole[HEADER_BYTES..])) {
                Some(Action::Replace(frame)) => {
                    let well_formed = |h: Header| h.size == frame.len();
                    assert!(frame.is_empty() || Header::read(&frame).unwrap().is_some_and(well_formed));
                    out.extend_from_slice(&frame);
                }
                _ => out.extend_from_slice(whole),
            }
            at += header.size;
        }
        self.buffer.drain(..at);
    }
}

/// Whether one of our statements could be in there, seen without any grammar.
fn mentions_ours(bytes: &[u8]) -> bool {
    let lower = bytes.to_ascii_lowercase();
    let has = |word: &[u8]| lower.windows(word.len()).any(|w| w == word);
    [&b"peer"[..], b"mirror", b"task", b"help", b"alert"].into_iter().any(has)
}

/// Splits, plans and rewrites the text that `data` describes; its first byte picks the encoding and the other settings.
///
/// # Panics
/// If a position is outside of the text, if text that is not ours is changed, if the number of statements changes, or if a statement
/// that is printed is read as another.
pub(crate) fn text(data: &[u8]) {
    let Some((&first, text)) = data.split_first() else { return };
    let encoding = ENCODINGS[usize::from(first & 3)];
    let conforming = first & 4 == 0;
    // A text in a message ends with a zero.
    let text = text.split(|b| *b == 0).next().unwrap_or_default();
    let slices = split(text, conforming);
    let mut end = 0;
    for slice in &slices {
        assert!(slice.range.start >= end && slice.range.end <= text.len() && !slice.range.is_empty());
        (0..8)
            .filter_map(|n| slice.word(n))
            .for_each(|w| assert!(slice.range.start <= w.start && w.end <= slice.range.end));
        end = slice.range.end;
        if let Ok(statement) = std::str::from_utf8(&text[slice.range.clone()])
            && let Parsed::Ours(ours) = parse(slice, text, statement)
        {
            prints_what_it_is(&ours.statement.to_string(), &ours.statement);
        }
    }
    assert!(may_be_ours(text) || plan(text, encoding, conforming).is_none());
    if !mentions_ours(text) {
        assert!(plan(text, encoding, conforming).is_none());
    }
    if let Some(planned) = plan_with(text, encoding, conforming, peers()) {
        let findings = if planned.fails_to_parse() { Vec::new() } else { findings(planned.inspected().count()) };
        check(text, encoding, conforming, &planned.render(NONCE, findings));
    }
    let Some(planned) = plan(text, encoding, conforming) else { return };
    let findings = if planned.fails_to_parse() { Vec::new() } else { findings(planned.inspected().count()) };
    check(text, encoding, conforming, &planned.render(NONCE, findings));
    if let Some(planned) = plan(text, encoding, conforming) {
        check(text, encoding, conforming, &planned.render_prepared(NONCE, usize::from(first >> 3)).0);
    }
}

/// Peers whose names any text may hold by accident.
fn peers() -> &'static Peers {
    static PEERS: OnceLock<Peers> = OnceLock::new();
    PEERS.get_or_init(|| {
        let schema = |local: &str| PeerSchema { local: local.to_owned(), is_table: false };
        let schemas = [("p", "é\"x"), ("public", "shop")].map(|(remote, local)| (remote.to_owned(), schema(local)));
        let entry = PeerEntry { importing: false, schemas: schemas.into() };
        Peers::with(["p", "a", "peer"].map(|name| (name.to_owned(), entry.clone())))
    })
}

fn prints_what_it_is(printed: &str, statement: &gateway::statement::Statement) {
    let slices = split(printed.as_bytes(), true);
    assert_eq!(slices.len(), 1, "{printed}");
    match parse(&slices[0], printed.as_bytes(), &printed[slices[0].range.clone()]) {
        Parsed::Ours(again) => assert_eq!(again.statement, *statement, "{printed}"),
        other => panic!("{printed}: {other:?}"),
    }
}

fn check(text: &[u8], encoding: Encoding, conforming: bool, rewritten: &Rewritten) {
    assert!(!rewritten.text.contains(&0), "a zero would end the text");
    let (before, after) = (encoding.characters(text), encoding.characters(&rewritten.text));
    let (mut original, mut new) = (0, 0);
    // Characters as the encoding counts them: their starts in bytes.
    let starts = |bytes: &[u8]| -> Vec<usize> {
        let is_start = |b: u8| encoding != Encoding::Utf8 || b & 0xc0 != 0x80;
        bytes.iter().enumerate().filter(|(_, b)| is_start(**b)).map(|(at, _)| at).chain([bytes.len()]).collect()
    };
    let (old_starts, new_starts) = (starts(text), starts(&rewritten.text));
    for placed in &rewritten.placed {
        assert!(placed.original.start >= original && placed.original.end <= before);
        assert!(placed.replacement.start >= new && placed.replacement.end <= after);
        let kept = &text[old_starts[original]..old_starts[placed.original.start]];
        assert_eq!(kept, &rewritten.text[new_starts[new]..new_starts[placed.replacement.start]], "not ours");
        (original, new) = (placed.original.end, placed.replacement.end);
    }
    assert_eq!(text[old_starts[original]..], rewritten.text[new_starts[new]..], "not ours");
    for position in (0..=after).step_by(1 + after / 512) {
        match rewritten.place(position) {
            Place::Outside(at) => assert!(at <= before, "{position}: {at} of {before}"),
            Place::Inside(index, at) => {
                let original = &rewritten.placed[index].original;
                assert!(original.start <= at && at <= original.end, "{position}: {at} not in {original:?}");
            }
        }
    }
    let statements = |text: &[u8]| split(text, conforming).len();
    assert_eq!(statements(&rewritten.text), statements(text), "{}", String::from_utf8_lossy(&rewritten.text));
}
