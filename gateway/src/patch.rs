//! What comes back for a rewritten text, in terms of the text that the client sent: positions, and errors and notices of our
//! statements without the traces of how they are done. Pure.

use crate::encoding::Encoding;
use crate::fields::Fields;
use crate::rewrite::{Place, Placed, Rewritten};

/// Error fields that tell of PL/pgSQL, and the one that names the part at fault.
const TRACES: &[u8] = b"WFLRpq";

/// Translates an ErrorResponse or NoticeResponse that belongs to a rewritten text.
///
/// `ordinal` is which statement of the text was running. It may be wrong when the server's replies were not understood: then
/// only the looks suffer.
pub fn translate(fields: &mut Fields, rewritten: &Rewritten, ordinal: usize, encoding: Encoding) {
    let show = |fields: &mut Fields, position: usize| fields.set(b'P', (position + 1).to_string());
    let placed = match fields.number(b'P').and_then(|p| p.checked_sub(1)) {
        Some(position) => match rewritten.place(position) {
            Place::Outside(position) => return show(fields, position),
            Place::Inside(index, position) => {
                show(fields, position);
                if rewritten.is_name(index) {
                    return;
                }
                &rewritten.placed[index]
            }
        },
        None => match rewritten.at_ordinal(ordinal) {
            Some(placed) => placed,
            None => return,
        },
    };
    if let Some(refusal) = &placed.refusal {
        if fields.get(b'C') == Some(b"42601") {
            show(fields, placed.original.start + refusal.at);
            fields.set(b'M', encoding.encode(&refusal.message));
            for (key, text) in [(b'D', &refusal.detail), (b'H', &refusal.hint)] {
                if let Some(text) = text {
                    fields.set(key, encoding.encode(text));
                }
            }
        }
        return;
    }
    if fields.get(b'C') == Some(pg::SqlState::READ_ONLY.as_str().as_bytes())
        && rewritten.execution(placed.ordinal).is_some()
    {
        fields.set(b'M', "cannot execute EXECUTE on a peer in a read-only transaction");
    }
    if let Some(position) = part_at_fault(fields, placed) {
        show(fields, position);
    }
    // With a table name, the column is a real one.
    fields.remove(if fields.get(b't').is_some() { TRACES } else { b"cWFLRpq" });
}

fn part_at_fault(fields: &Fields, placed: &Placed) -> Option<usize> {
    if fields.get(b't').is_some() {
        return None;
    }
    let key = std::str::from_utf8(fields.get(b'c')?).ok()?;
    Some(placed.original.start + placed.spans.find(key)?)
}

/// Returns the command tag that a notice of ours carries, given the session's nonce.
pub fn command_tag(fields: &Fields, nonce: &str) -> Option<Vec<u8>> {
    if fields.get(b'C') != Some(pg::SqlState::COMMAND_TAG.as_str().as_bytes()) {
        return None;
    }
    let rest = fields.get(b'M')?.strip_prefix(nonce.as_bytes())?;
    rest.strip_prefix(b":").map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewrite::plan;

    fn error(fields: &[(u8, &str)]) -> Fields {
        let mut body = Vec::new();
        for (key, text) in fields {
            body.push(*key);
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
        body.push(0);
        Fields::decode(&body).unwrap()
    }

    fn rewritten(text: &str) -> Rewritten {
        plan(text.as_bytes(), Encoding::Utf8, true).unwrap().render("n", vec![])
    }

    fn text(fields: &Fields, key: u8) -> Option<&str> {
        fields.get(key).map(|t| std::str::from_utf8(t).unwrap())
    }

    #[test]
    fn the_part_at_fault_becomes_a_position() {
        let r = rewritten("select 'é'; drop peer a, b; select 1");
        let mut fields = error(&[
            (b'C', "42704"),
            (b'M', "peer \"b\" does not exist"),
            (b'c', "name.2"),
            (b'W', "PL/pgSQL function peergate.fail"),
            (b'F', "pl_exec.c"),
            (b'L', "1"),
            (b'R', "exec_stmt_raise"),
        ]);
        translate(&mut fields, &r, 1, Encoding::Utf8);
        assert_eq!(fields, error(&[(b'C', "42704"), (b'M', "peer \"b\" does not exist"), (b'P', "26")]));
    }

    #[test]
    fn errors_of_others_only_move() {
        let r = rewritten("show peers; select nonsense");
        let moved = String::from_utf8(r.text.clone()).unwrap().find("nonsense").unwrap() + 1;
        let mut fields = error(&[(b'C', "42703"), (b'P', &moved.to_string()), (b'R', "errorMissingColumn")]);
        translate(&mut fields, &r, 0, Encoding::Utf8);
        assert_eq!(fields, error(&[(b'C', "42703"), (b'P', "20"), (b'R', "errorMissingColumn")]));
        let mut fields = error(&[(b'C', "22012"), (b'R', "int4div"), (b'c', "mine")]);
        translate(&mut fields, &r, 1, Encoding::Utf8);
        assert_eq!(fields, error(&[(b'C', "22012"), (b'R', "int4div"), (b'c', "mine")]));
    }

    #[test]
    fn a_complaint_about_a_stub_becomes_ours() {
        let r = rewritten("select 1; create peer shop frm postgres");
        let mut fields = error(&[
            (b'C', "42601"),
            (b'M', "syntax error at or near \"peer\""),
            (b'P', "18"),
            (b'R', "scanner_yyerror"),
        ]);
        translate(&mut fields, &r, 0, Encoding::Utf8);
        assert_eq!((text(&fields, b'M'), text(&fields, b'P')), (Some("syntax error at or near \"frm\""), Some("28")));
        assert_eq!(text(&fields, b'R'), Some("scanner_yyerror"));
    }

    #[test]
    fn a_real_column_is_left() {
        let r = rewritten("drop peer a");
        let mut fields = error(&[(b'C', "23502"), (b't', "peers"), (b'c', "name"), (b'R', "x")]);
        translate(&mut fields, &r, 0, Encoding::Utf8);
        assert_eq!(fields, error(&[(b'C', "23502"), (b't', "peers"), (b'c', "name")]));
    }

    #[test]
    fn only_the_session_s_own_nonce_makes_a_tag() {
        let notice = |message| error(&[(b'S', "INFO"), (b'C', "PGT01"), (b'M', message)]);
        assert_eq!(command_tag(&notice("n1:DROP PEER"), "n1").as_deref(), Some(&b"DROP PEER"[..]));
        assert_eq!(command_tag(&notice("n2:DROP PEER"), "n1"), None);
        assert_eq!(command_tag(&notice("n1"), "n1"), None);
        assert_eq!(command_tag(&error(&[(b'C', "00000"), (b'M', "n1:X")]), "n1"), None);
    }
}
