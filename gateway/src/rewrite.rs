//! Puts calls of catalog procedures in the place of our statements, inside the client's own text. Pure.
//!
//! What must fails fails in Postgres, so that the client's transaction ends up in the right state: a syntax error of ours is
//! forwarded as its first words only, which Postgres refuses itself (and does not log a password); any other refusal becomes a
//! call that raises it. `patch` puts the messages and positions right on the way back.

mod alert;
mod call;
mod execution;
mod inspect;
mod mirror;
mod relation;
mod sql;
mod verification;

use std::ops::Range;
use std::rc::Rc;

use pg::SqlState;
use serde_json::Value as Json;

pub(crate) use self::alert::{channels_from_json, conditions_from_json};
use self::call::{call, raise};
pub use self::execution::{Execution, Permit, failure, is_failure, success};
use self::inspect::{Found, hidden_parameter, inspected};
pub(crate) use self::mirror::{procedure_call, selection_from_json};
pub use self::relation::awaits_import;
use self::sql::{Sql, ascii};
pub use self::verification::{Verification, VerificationOrder, is_sign_of_life};
use crate::encoding::Encoding;
use crate::parser::{Ours, Parsed, Refusal, Spans, execute, parse, truncated};
use crate::peers::Peers;
use crate::split::{may_be_ours, split};
use crate::statement::{Inspected, Statement};

/// What was found out about a peer before a statement is forwarded: arguments of the statement's procedure by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings(serde_json::Map<String, Json>);

impl Findings {
    /// Adds an argument; one that is null is left out, for its default.
    pub fn with(mut self, argument: &str, value: Json) -> Findings {
        if !value.is_null() {
            self.0.insert(argument.to_owned(), value);
        }
        self
    }

    /// Returns an argument.
    pub fn get(&self, argument: &str) -> Option<&Json> {
        self.0.get(argument)
    }

    /// Returns all of them as one document, for a prepared statement: all ASCII, so that it is right in any client encoding.
    pub fn document(&self) -> String {
        ascii(&Json::Object(self.0.clone()))
    }
}

/// A statement of the client's text that will be replaced.
struct Piece {
    /// Which statement of the text it is, from 0.
    ordinal: usize,
    /// Where it is, in bytes.
    range: Range<usize>,
    /// What it begins with, for a stub: its words up to the noun.
    stub: Range<usize>,
    parsed: Parsed,
}

/// A text in which some statements are ours.
pub struct Plan {
    text: Vec<u8>,
    encoding: Encoding,
    pieces: Vec<Piece>,
    statement_count: usize,
}

/// Looks for our statements in a text; `None` when there are none.
///
/// `conforming` is the session's `standard_conforming_strings`.
pub fn plan(text: &[u8], encoding: Encoding, conforming: bool) -> Option<Plan> {
    plan_with(text, encoding, conforming, &Peers::default())
}

/// As [`plan`], and looks for what is said to the peers by their names, too.
pub fn plan_with(text: &[u8], encoding: Encoding, conforming: bool, peers: &Peers) -> Option<Plan> {
    let (may_be_ours, names_a_peer) = (may_be_ours(text), peers.may_be_in(text));
    if !(may_be_ours || names_a_peer) || !encoding.can_split(text) {
        return None;
    }
    let slices = split(text, conforming);
    let mut pieces = Vec::new();
    for (ordinal, slice) in slices.iter().enumerate() {
        let bytes = &text[slice.range.clone()];
        if names_a_peer && let Some(execute) = execute::read(slice, text, encoding, conforming, peers) {
            let (range, stub) = (slice.range.clone(), slice.range.start..slice.range.start);
            pieces.push(Piece { ordinal, range, stub, parsed: Parsed::Execute(execute) });
            continue;
        }
        let mut parsed = Parsed::Theirs;
        // For words only: characters that cannot be read cannot be in them.
        let lossy = encoding.decode(bytes).unwrap_or_else(|| String::from_utf8_lossy(bytes));
        let readable = encoding.decode(bytes).is_some();
        if may_be_ours {
            parsed = parse(slice, text, &lossy);
        }
        if parsed == Parsed::Theirs {
            if names_a_peer {
                for (range, schema) in relation::relations(bytes, encoding, conforming, peers) {
                    let range = slice.range.start + range.start..slice.range.start + range.end;
                    let stub = range.start..range.start;
                    // No error is ever about a name as if it were a statement.
                    pieces.push(Piece { ordinal: usize::MAX, range, stub, parsed: Parsed::Relation(schema) });
                }
            }
            continue;
        }
        if !readable {
            parsed = unreadable(
                "this statement can hold characters beyond ASCII only when client_encoding is UTF8 or LATIN1",
            );
        } else if !conforming && bytes.contains(&b'\\') {
            parsed = unreadable("backslashes are not supported here while standard_conforming_strings is off");
        }
        let noun = (0..5).filter_map(|n| slice.word(n)).find(|w| {
            ["PEER", "MIRROR", "ALERT"].iter().any(|noun| text[w.clone()].eq_ignore_ascii_case(noun.as_bytes()))
        });
        // SHOW and EXECUTE hold no secret, and their first words alone would be PostgreSQL's SHOW of a setting, or EXECUTE of a statement.
        let is_whole = ["SHOW", "EXECUTE"].iter().any(|verb| slice.begins_with(text, &[verb]));
        let end = noun.filter(|_| !is_whole).map_or(slice.range.end, |w| w.end);
        pieces.push(Piece { ordinal, range: slice.range.clone(), stub: slice.range.start..end, parsed });
    }
    (!pieces.is_empty()).then(|| Plan { text: text.to_vec(), encoding, pieces, statement_count: slices.len() })
}

fn unreadable(message: &str) -> Parsed {
    Parsed::Refused(Refusal {
        sqlstate: SqlState::FEATURE_NOT_SUPPORTED,
        message: message.to_owned(),
        detail: None,
        hint: None,
        at: 0,
    })
}

/// One replaced statement of a rewritten text, or the name of a peer's table in a statement that is not ours. All positions are characters from the start of the text, from 0.
#[derive(Debug)]
pub struct Placed {
    /// Which statement of the text it is, from 0.
    pub ordinal: usize,
    /// Where it is in the client's text.
    pub original: Range<usize>,
    /// Where its replacement is in the rewritten text.
    pub replacement: Range<usize>,
    /// Where its parts are, from its start.
    pub spans: Spans,
    /// What to say in place of Postgres' own complaint about a stub.
    pub refusal: Option<Refusal>,
    /// Places in the replacement that stand for places in the original, both from their starts, in order.
    anchors: Vec<(usize, usize)>,
}

/// A rewritten text, and what is needed to translate what comes back.
#[derive(Debug)]
pub struct Rewritten {
    /// The text to send.
    pub text: Vec<u8>,
    /// The replaced statements, in order.
    pub placed: Vec<Placed>,
    /// Mirrors that are waited for.
    pub waits_for: Vec<String>,
    /// What peers are to run, in order.
    pub executions: Vec<Rc<Execution>>,
    /// What is to be verified, in order.
    pub verifications: Vec<Verification>,
}

/// Where a position in a rewritten text is in the client's.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// In a statement that was not replaced.
    Outside(usize),
    /// In the replaced statement with that index, best shown at the given position.
    Inside(usize, usize),
}

impl Rewritten {
    /// Translates a position (characters, from 0) in the rewritten text into one in the client's.
    pub fn place(&self, position: usize) -> Place {
        let mut shift = 0isize;
        for (index, placed) in self.placed.iter().enumerate() {
            if position < placed.replacement.start {
                break;
            }
            // The end counts as inside: that is where a stub ends too early.
            if position <= placed.replacement.end {
                let within = position - placed.replacement.start;
                let anchor = placed.anchors.iter().rev().find(|(new, _)| *new <= within);
                return Place::Inside(index, placed.original.start + anchor.map_or(0, |(_, original)| *original));
            }
            shift = placed.original.end as isize - placed.replacement.end as isize;
        }
        Place::Outside(position.saturating_add_signed(shift))
    }

    /// Returns whether only a name was replaced there: what is said of it is PostgreSQL's own.
    pub(crate) fn is_name(&self, index: usize) -> bool {
        self.placed[index].ordinal == usize::MAX
    }

    /// Returns what a peer is to run as the `ordinal`th statement of the text.
    pub fn execution(&self, ordinal: usize) -> Option<&Rc<Execution>> {
        self.executions.iter().find(|e| e.ordinal == ordinal)
    }

    /// Returns what is to be verified by the `ordinal`th statement of the text.
    pub fn verification(&self, ordinal: usize) -> Option<&Verification> {
        self.verifications.iter().find(|v| v.ordinal == ordinal)
    }

    /// Returns the replaced statement that is the `ordinal`th of the text.
    pub fn at_ordinal(&self, ordinal: usize) -> Option<&Placed> {
        self.placed.iter().find(|p| p.ordinal == ordinal)
    }
}

/// A statement about a peer that was prepared: what its Bind must be given.
#[derive(Debug)]
pub struct PreparedPeer {
    /// The statement. Its options' values never leave the gateway as they are.
    pub statement: Statement,
    /// Number of the parameter that carries the findings; the client does not know of it.
    pub hidden: u16,
}

impl PreparedPeer {
    /// Returns the options of the statement that the gateway looks at.
    pub fn options(&self) -> Vec<Inspected<'_>> {
        self.statement.inspected_options().unwrap_or_default()
    }
}

impl Plan {
    /// Returns the statements whose findings [`Plan::render`] needs, in order.
    pub fn inspected(&self) -> impl Iterator<Item = &Statement> {
        self.pieces.iter().filter_map(|piece| match &piece.parsed {
            Parsed::Ours(ours) => ours.statement.inspected_options().map(|_| &ours.statement),
            _ => None,
        })
    }

    /// Returns whether the text is certain to fail before anything of it runs, so that nothing need be found out.
    pub fn fails_to_parse(&self) -> bool {
        self.pieces.iter().any(|piece| match &piece.parsed {
            Parsed::Refused(refusal) => refusal.sqlstate == SqlState::SYNTAX_ERROR,
            _ => false,
        })
    }

    /// Writes the text of a Query. There must be a finding for each of [`Plan::inspected`]; a refusal in its place is raised.
    pub fn render(self, nonce: &str, findings: Vec<Result<Findings, Refusal>>) -> Rewritten {
        let mut findings = findings.into_iter();
        self.write(|ours, sql| match ours.statement.inspected_options() {
            Some(options) => match findings.next() {
                Some(Ok(found)) => inspected(sql, &ours.statement, &options, &Found::Now(&found), nonce),
                Some(Err(refusal)) => raise(sql, &refusal),
                // The whole text fails to parse; only no value may be in it.
                None => sql.push("CALL peergate.finish()"),
            },
            None => call(sql, ours, nonce),
        })
    }

    /// Writes the text of a Parse whose parameter types are `types` long.
    pub fn render_prepared(self, nonce: &str, types: usize) -> (Rewritten, Option<PreparedPeer>) {
        // Postgres refuses several statements in one Parse before it looks at what they mean.
        let several = self.statement_count > 1;
        let mut prepared = None;
        let rewritten = self.write(|ours, sql| match ours.statement.inspected_options() {
            _ if several => sql.push("CALL peergate.finish()"),
            Some(options) => {
                let hidden = hidden_parameter(&ours.statement, &options, types);
                inspected(sql, &ours.statement, &options, &Found::AtBind(hidden), nonce);
                prepared = Some(PreparedPeer { statement: ours.statement.clone(), hidden });
            }
            None => call(sql, ours, nonce),
        });
        (rewritten, prepared)
    }

    fn write(self, mut replace: impl FnMut(&Ours, &mut Sql)) -> Rewritten {
        let Plan { text, encoding, pieces, statement_count } = self;
        let text = text.as_slice();
        let mut out = Rewritten {
            text: Vec::with_capacity(text.len() + 256),
            placed: Vec::new(),
            waits_for: Vec::new(),
            executions: Vec::new(),
            verifications: Vec::new(),
        };
        let (mut copied, mut original, mut new) = (0, 0, 0);
        for piece in pieces {
            let before = encoding.characters(&text[copied..piece.range.start]);
            out.text.extend_from_slice(&text[copied..piece.range.start]);
            (original, new, copied) = (original + before, new + before, piece.range.end);
            let mut sql = Sql::default();
            let stub = |sql: &mut Sql| sql.push(&String::from_utf8_lossy(&text[piece.stub.clone()]));
            let (spans, refusal, is_stub) = match piece.parsed {
                Parsed::Ours(ours) => {
                    replace(&ours, &mut sql);
                    if let Statement::WaitForMirror { name, .. } = &ours.statement {
                        out.waits_for.push(truncated(name).to_owned());
                    }
                    if let Statement::VerifyMirror { tables, repair, .. } = &ours.statement {
                        let alone = statement_count == 1;
                        out.verifications.push(Verification::new(piece.ordinal, tables, *repair, alone));
                    }
                    (ours.spans, None, false)
                }
                Parsed::Refused(refusal) if refusal.sqlstate == SqlState::SYNTAX_ERROR => {
                    stub(&mut sql);
                    (Spans::default(), Some(refusal), true)
                }
                Parsed::Refused(refusal) => {
                    raise(&mut sql, &refusal);
                    (Spans::refusal(refusal.at), None, false)
                }
                Parsed::Execute(execute) => {
                    sql.push(execution::STATEMENT);
                    let spans = Spans::name(execute.peer_at);
                    out.executions.push(Rc::new(Execution {
                        ordinal: piece.ordinal,
                        execute,
                        statement: text[piece.range.clone()].to_vec(),
                        start: original,
                        encoding,
                    }));
                    (spans, None, false)
                }
                Parsed::Relation(schema) => {
                    sql.push(&schema);
                    (Spans::default(), None, false)
                }
                Parsed::Theirs => {
                    stub(&mut sql);
                    (Spans::default(), None, true)
                }
            };
            let anchors = if is_stub {
                identity_anchors(&sql.text)
            } else {
                sql.anchors.iter().filter_map(|(at, key)| Some((*at, spans.find(key)?))).collect()
            };
            let replacement = encoding.encode(&sql.text);
            let length = encoding.characters(&text[piece.range.clone()]);
            let new_length = encoding.characters(&replacement);
            out.text.extend_from_slice(&replacement);
            out.placed.push(Placed {
                ordinal: piece.ordinal,
                original: original..original + length,
                replacement: new..new + new_length,
                spans,
                refusal,
                anchors,
            });
            (original, new) = (original + length, new + new_length);
        }
        out.text.extend_from_slice(&text[copied..]);
        out
    }
}

/// A stub keeps its words where they were, comments between them too.
fn identity_anchors(text: &str) -> Vec<(usize, usize)> {
    (0..text.chars().count()).map(|n| (n, n)).collect()
}

#[cfg(test)]
mod tests;
