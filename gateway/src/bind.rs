//! Bind for a statement about a peer: takes the values out for a look, and puts back what the server may see. Pure.
//!
//! Source: PostgreSQL docs, protocol-message-formats, "Bind".

use std::ops::Range;

use pg::frame::cstr;

use crate::encoding::Encoding;
use crate::fields::frame;
use crate::rewrite::PreparedPeer;
use crate::statement::{Inspected, Value};

/// A Bind message, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Bind {
    body: Vec<u8>,
    portal: Range<usize>,
    statement: Range<usize>,
    formats: Vec<u16>,
    /// Where each value is; `None` for NULL.
    values: Vec<Option<Range<usize>>>,
    /// The result formats, untouched.
    results: Range<usize>,
}

/// An option whose value cannot be taken from its parameter.
#[derive(Debug, PartialEq, Eq)]
pub struct BadValue {
    /// The part of the statement that the option is.
    pub part: String,
    /// What is wrong, as an error message.
    pub message: String,
}

impl Bind {
    /// Reads the body of a Bind; `None` if it is malformed, which is then for the server to say.
    pub fn decode(body: &[u8]) -> Option<Bind> {
        let (portal, rest) = cstr(body)?;
        let (statement, mut rest) = cstr(rest)?;
        let statement_start = portal.len() + 1;
        let mut formats = Vec::new();
        for _ in 0..take_u16(&mut rest)? {
            formats.push(take_u16(&mut rest)?);
        }
        let mut values = Vec::new();
        for _ in 0..take_u16(&mut rest)? {
            let length = take_i32(&mut rest)?;
            values.push(match usize::try_from(length) {
                Ok(length) => {
                    let start = body.len() - rest.len();
                    rest = rest.get(length..)?;
                    Some(start..start + length)
                }
                Err(_) => None,
            });
        }
        Some(Bind {
            portal: 0..portal.len(),
            statement: statement_start..statement_start + statement.len(),
            formats,
            values,
            results: body.len() - rest.len()..body.len(),
            body: body.to_vec(),
        })
    }

    /// Returns the portal's name.
    pub fn portal(&self) -> &[u8] {
        &self.body[self.portal.clone()]
    }

    /// Returns the statement's name.
    pub fn statement(&self) -> &[u8] {
        &self.body[self.statement.clone()]
    }

    /// Returns how many values there are.
    pub fn value_count(&self) -> usize {
        self.values.len()
    }

    /// Returns the formats that are asked for the columns of the result.
    pub fn result_formats(&self) -> Vec<u16> {
        let (codes, _) = self.body[self.results.clone()].as_chunks::<2>();
        codes.iter().skip(1).map(|code| u16::from_be_bytes(*code)).collect()
    }

    /// Returns the options of a statement about a peer with the values of their parameters. `types` are those that Parse gave.
    ///
    /// # Errors
    /// [`BadValue`] for one that is NULL, missing, or binary in a type that is not known here.
    pub fn options(
        &self,
        peer: &PreparedPeer,
        types: &[u32],
        encoding: Encoding,
    ) -> Result<Vec<(String, String)>, BadValue> {
        let value = |Inspected { part, option, .. }: &Inspected<'_>| match &option.value {
            Value::Text(text) => Ok(text.clone()),
            Value::Parameter(n) => self
                .text(usize::from(*n).saturating_sub(1), types, encoding)
                .map_err(|message| BadValue { part: part.clone(), message: message(&option.name) }),
        };
        peer.options().iter().map(|given| Ok((given.option.name.clone(), value(given)?))).collect()
    }

    fn text(&self, index: usize, types: &[u32], encoding: Encoding) -> Result<String, fn(&str) -> String> {
        let Some(value) = self.values.get(index) else { return Err(|o| format!("option \"{o}\" has no value")) };
        let Some(range) = value else { return Err(|o| format!("option \"{o}\" cannot be null")) };
        let bytes = &self.body[range.clone()];
        let format = match *self.formats {
            [] => 0,
            [one] => one,
            _ => self.formats.get(index).copied().unwrap_or(0),
        };
        let text = || encoding.decode(bytes).map(std::borrow::Cow::into_owned).filter(|t| !t.contains('\0'));
        let decoded = match (format, types.get(index).copied().unwrap_or(0), bytes) {
            // text, varchar, bpchar, name, unknown, json: the same in both formats.
            (0, ..) | (_, 0 | 25 | 1043 | 1042 | 19 | 705 | 114, _) => text(),
            (_, 16, [flag]) => Some((*flag != 0).to_string()),
            (_, 21, [a, b]) => Some(i16::from_be_bytes([*a, *b]).to_string()),
            (_, 23, [a, b, c, d]) => Some(i32::from_be_bytes([*a, *b, *c, *d]).to_string()),
            (_, 20, bytes) => bytes.try_into().ok().map(|b| i64::from_be_bytes(b).to_string()),
            _ => None,
        };
        decoded.ok_or(|o| format!("the parameter of option \"{o}\" has a type or encoding that cannot be read here"))
    }

    /// Writes the frame that the server gets: the hidden parameter behind the client's own, and NULL for those that are secret, so
    /// that they reach neither its memory nor its log.
    pub fn encode(&self, peer: &PreparedPeer, document: &str) -> Vec<u8> {
        let secret = |index: usize| {
            let parameter = Value::Parameter(u16::try_from(index + 1).unwrap_or(0));
            peer.options().iter().any(|given| given.may_be_secret && given.option.value == parameter)
        };
        let mut out = self.body[..self.statement.end + 1].to_vec();
        // One format or none speaks for all values, and text looks the same in both.
        let many = self.formats.len() > 1;
        out.extend_from_slice(&(self.formats.len() as u16 + u16::from(many)).to_be_bytes());
        for format in self.formats.iter().copied().chain(many.then_some(0)) {
            out.extend_from_slice(&format.to_be_bytes());
        }
        out.extend_from_slice(&(self.values.len() as u16).wrapping_add(1).to_be_bytes());
        for (index, value) in self.values.iter().enumerate() {
            match value {
                Some(range) if !secret(index) => {
                    out.extend_from_slice(&(range.len() as i32).to_be_bytes());
                    out.extend_from_slice(&self.body[range.clone()]);
                }
                _ => out.extend_from_slice(&(-1_i32).to_be_bytes()),
            }
        }
        out.extend_from_slice(&(document.len() as i32).to_be_bytes());
        out.extend_from_slice(document.as_bytes());
        out.extend_from_slice(&self.body[self.results.clone()]);
        frame(b'B', &out)
    }
}

/// Takes the last type off a ParameterDescription's body; `None` if there is none.
pub fn without_last_parameter(body: &[u8]) -> Option<Vec<u8>> {
    let mut rest = body;
    let count = take_u16(&mut rest)?.checked_sub(1)?;
    let kept = rest.get(..usize::from(count) * 4)?;
    Some(frame(b't', &[&count.to_be_bytes(), kept].concat()))
}

fn take_u16(bytes: &mut &[u8]) -> Option<u16> {
    let (head, rest) = bytes.split_first_chunk::<2>()?;
    *bytes = rest;
    Some(u16::from_be_bytes(*head))
}

fn take_i32(bytes: &mut &[u8]) -> Option<i32> {
    let (head, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    Some(i32::from_be_bytes(*head))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewrite::plan;

    fn body(formats: &[u16], values: &[Option<&[u8]>]) -> Vec<u8> {
        let mut out = b"p\0s\0".to_vec();
        out.extend((formats.len() as u16).to_be_bytes());
        formats.iter().for_each(|f| out.extend(f.to_be_bytes()));
        out.extend((values.len() as u16).to_be_bytes());
        for value in values {
            out.extend(value.map_or(-1, |v| v.len() as i32).to_be_bytes());
            out.extend(value.unwrap_or_default());
        }
        out.extend([0, 1, 0, 1]);
        out
    }

    fn peer(options: &str) -> PreparedPeer {
        let text = format!("create peer a from postgres with ({options})");
        plan(text.as_bytes(), Encoding::Utf8, true).unwrap().render_prepared("n", 0).1.unwrap()
    }

    #[test]
    fn secrets_are_taken_out_and_the_document_is_added() {
        let peer = peer("host = $1, password = $2, port = $3");
        let bind =
            Bind::decode(&body(&[0, 0, 1], &[Some(b"h"), Some(b"geheim"), Some(&5432_i32.to_be_bytes())])).unwrap();
        assert_eq!((bind.portal(), bind.statement()), (&b"p"[..], &b"s"[..]));
        let options = bind.options(&peer, &[0, 25, 23], Encoding::Utf8).unwrap();
        assert_eq!(options.iter().map(|(_, v)| v.as_str()).collect::<Vec<_>>(), ["h", "geheim", "5432"]);
        let frame = bind.encode(&peer, "{}");
        assert!(!frame.windows(6).any(|w| w == b"geheim"));
        let again = Bind::decode(&frame[5..]).unwrap();
        assert_eq!(again.formats, [0, 0, 1, 0]);
        assert_eq!(again.values.iter().map(Option::is_some).collect::<Vec<_>>(), [true, false, true, true]);
        assert_eq!(&again.body[again.values[3].clone().unwrap()], b"{}");
        assert_eq!(&again.body[again.results.clone()], [0, 1, 0, 1]);
    }

    #[test]
    fn one_format_speaks_for_all() {
        let peer = peer("host = $1");
        let bind = Bind::decode(&body(&[1], &[Some(b"h")])).unwrap();
        assert_eq!(bind.options(&peer, &[], Encoding::Utf8).unwrap(), [("host".to_owned(), "h".to_owned())]);
        assert_eq!(Bind::decode(&bind.encode(&peer, "{}")[5..]).unwrap().formats, [1]);
    }

    #[test]
    fn values_that_cannot_be_read_are_errors_of_their_option() {
        let peer = peer("port = $1");
        for (bind, types) in [
            (body(&[], &[None]), vec![]),
            (body(&[], &[]), vec![]),
            (body(&[1], &[Some(b"xyz")]), vec![23]),
            (body(&[1], &[Some(b"xyz")]), vec![1700]),
            (body(&[], &[Some(b"\xff")]), vec![]),
        ] {
            let error = Bind::decode(&bind).unwrap().options(&peer, &types, Encoding::Utf8).unwrap_err();
            assert_eq!(error.part, "option.port");
        }
    }

    #[test]
    fn truncated_binds_are_none() {
        let whole = body(&[0, 1], &[Some(b"ab"), None]);
        let results = 4;
        for end in 0..whole.len() - results {
            assert_eq!(Bind::decode(&whole[..end]), None, "{end}");
        }
        assert_eq!(Bind::decode(b"\0\0\0\0\0\x01\x7f\xff\xff\xff"), None);
    }

    #[test]
    fn the_hidden_parameter_is_not_described() {
        assert_eq!(without_last_parameter(&[0, 2, 0, 0, 0, 25, 0, 0, 0, 26]), Some(frame(b't', &[0, 1, 0, 0, 0, 25])));
        assert_eq!(without_last_parameter(&[0, 0]), None);
        assert_eq!(without_last_parameter(&[0, 9, 1]), None);
    }
}
