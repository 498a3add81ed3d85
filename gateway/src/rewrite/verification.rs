//! A VERIFY MIRROR in a text, and how its task is asked for.
//!
//! The statement becomes a query that waits for the result. Nobody would see a task that it made before it is over, so the gateway makes
//! it on a session of its own, when the query has said that it may be.

use pg::{SqlState, TableName};

use crate::fields::Fields;
use crate::statement::Table;

/// What a statement of the client's text wants to have verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verification {
    /// Which statement of the text it is, from 0.
    pub ordinal: usize,
    /// The tables, by name on the source; `None`: all of the mirror.
    tables: Option<Vec<TableName>>,
    /// Rows that differ are mended.
    repair: bool,
    /// It is the only statement of its text: else it is in a transaction with the others.
    alone: bool,
}

/// A task that is to be made, for a query that waits for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerificationOrder {
    /// The mirror.
    pub mirror_id: i64,
    /// The tables; `None`: all.
    pub tables: Option<Vec<TableName>>,
    /// Rows that differ are mended.
    pub repair: bool,
    /// The advisory lock that the query holds for as long as it waits.
    pub waiter: i64,
    /// Who has asked.
    pub asked_by: String,
    /// It cannot be: what is mended would stay so if its transaction were rolled back.
    pub in_transaction_block: bool,
}

impl Verification {
    /// Notes one.
    pub(super) fn new(ordinal: usize, tables: &[Table], repair: bool, alone: bool) -> Verification {
        let tables: Vec<TableName> = tables.iter().map(|t| TableName::new(&*t.schema, &*t.name)).collect();
        Verification { ordinal, tables: (!tables.is_empty()).then_some(tables), repair, alone }
    }

    /// Reads the notice by which the catalog asks for the task; `None` if it is another one. It carries the session's nonce, and what is
    /// verified is not what it says but what the client's statement said. `in_block`: the session is in a transaction block.
    pub fn order(&self, fields: &Fields, nonce: &str, in_block: bool) -> Option<VerificationOrder> {
        let rest = own_notice(fields, nonce)?;
        let mut words = std::str::from_utf8(rest).ok()?.split(' ');
        let (mirror_id, waiter) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(VerificationOrder {
            mirror_id,
            tables: self.tables.clone(),
            repair: self.repair,
            waiter,
            asked_by: from_hexadecimal(words.next()?)?,
            in_transaction_block: self.repair && (in_block || !self.alone),
        })
    }
}

/// Returns whether it is a notice by which the query that waits finds out whether its client is there. The client does not get it.
pub fn is_sign_of_life(fields: &Fields, nonce: &str) -> bool {
    own_notice(fields, nonce) == Some(b"waits")
}

fn own_notice<'a>(fields: &'a Fields, nonce: &str) -> Option<&'a [u8]> {
    if fields.get(b'C') != Some(SqlState::VERIFICATION_PERMIT.as_str().as_bytes()) {
        return None;
    }
    fields.get(b'M')?.strip_prefix(nonce.as_bytes())?.strip_prefix(b":")
}

/// Names in hexadecimal are the same in any encoding.
fn from_hexadecimal(text: &str) -> Option<String> {
    let digits = text.as_bytes().chunks(2);
    let bytes = digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    String::from_utf8(bytes.collect::<Option<_>>()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(code: &str, message: &str) -> Fields {
        let mut fields = Fields::default();
        fields.set(b'C', code);
        fields.set(b'M', message);
        fields
    }

    #[test]
    fn only_the_sessions_own_notice_is_an_order() {
        let tables = [Table { schema: "public".into(), name: "t".into() }];
        let verification = Verification::new(0, &tables, true, true);
        let order = verification.order(&notice("PGT03", "n0nce:7 -12 616e6e"), "n0nce", false).unwrap();
        let expected = VerificationOrder {
            mirror_id: 7,
            tables: Some(vec![TableName::new("public", "t")]),
            repair: true,
            waiter: -12,
            asked_by: "ann".into(),
            in_transaction_block: false,
        };
        assert_eq!(order, expected);
        assert!(is_sign_of_life(&notice("PGT03", "n0nce:waits"), "n0nce"));
        assert!(!is_sign_of_life(&notice("PGT03", "other:waits"), "n0nce"));
        for (code, message) in
            [("PGT03", "other:7 -12 616e6e"), ("PGT02", "n0nce:7 -12 616e6e"), ("PGT03", "n0nce:7 x 61")]
        {
            assert_eq!(verification.order(&notice(code, message), "n0nce", false), None, "{code} {message}");
        }
    }

    #[test]
    fn what_is_mended_cannot_be_undone() {
        let order = |repair, alone, in_block| {
            let verification = Verification::new(0, &[], repair, alone);
            verification.order(&notice("PGT03", "n:1 2 61"), "n", in_block).unwrap().in_transaction_block
        };
        assert!(order(true, true, true) && order(true, false, false));
        assert!(!order(true, true, false) && !order(false, false, true));
    }
}
