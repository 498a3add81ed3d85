//! `peer.schema.table` in a statement of PostgreSQL's: the first two parts become the schema of the catalog that holds the foreign table.
//! Nothing else is touched, and nothing is understood of the statement but its tokens.

use std::ops::Range;

use pg::name::quote_ident;

use crate::encoding::Encoding;
use crate::parser::execute::identifier;
use crate::peers::Peers;
use crate::split::{TokenKind, tokens};

/// Words behind which a name is a table's.
const BEFORE_TABLES: [&str; 8] = ["FROM", "JOIN", "INTO", "UPDATE", "ONLY", "TABLE", "USING", "TRUNCATE"];

/// Finds the first two parts of names of peers' tables: where they are, and what stands for them.
pub(super) fn relations(
    text: &[u8],
    encoding: Encoding,
    conforming: bool,
    peers: &Peers,
) -> Vec<(Range<usize>, String)> {
    // What was seen last: the token before the name, then the name's parts.
    let mut before: Option<Range<usize>> = None;
    let mut parts: Vec<(Range<usize>, TokenKind)> = Vec::new();
    let mut wants_part = true;
    let mut found = Vec::new();
    let mut finish = |before: &Option<Range<usize>>, parts: &[(Range<usize>, TokenKind)]| {
        let Some((range, schema)) = relation(text, before.as_ref(), parts, encoding, peers) else { return };
        found.push((range, schema));
    };
    for token in tokens(text, conforming) {
        match token.kind {
            TokenKind::Dot if !parts.is_empty() && !wants_part => wants_part = true,
            TokenKind::Word | TokenKind::Quoted if wants_part && !parts.is_empty() => {
                parts.push((token.range, token.kind));
                wants_part = false;
            }
            kind => {
                // A name that ends in a dot is none: `peer.schema.*` is about columns.
                if !wants_part {
                    finish(&before, &parts);
                }
                if let Some((last, _)) = parts.last() {
                    before = Some(last.clone());
                }
                parts.clear();
                wants_part = true;
                if matches!(kind, TokenKind::Word | TokenKind::Quoted) {
                    parts.push((token.range, kind));
                    wants_part = false;
                } else {
                    before = Some(token.range);
                }
            }
        }
    }
    if !wants_part {
        finish(&before, &parts);
    }
    found
}

fn relation(
    text: &[u8],
    before: Option<&Range<usize>>,
    parts: &[(Range<usize>, TokenKind)],
    encoding: Encoding,
    peers: &Peers,
) -> Option<(Range<usize>, String)> {
    // With a fourth part it is a column.
    let [(peer, peer_kind), (schema, schema_kind), _, rest @ ..] = parts else { return None };
    let known = peers.get(&identifier(&text[peer.clone()], *peer_kind, encoding)?)?;
    let known = known.schemas.get(&identifier(&text[schema.clone()], *schema_kind, encoding)?)?;
    // `shop.orders.id` may be a column of table shop.orders.
    let behind_a_word = before.is_some_and(|before| {
        BEFORE_TABLES.iter().any(|word| text[before.clone()].eq_ignore_ascii_case(word.as_bytes()))
    });
    let is_table = !known.is_table || !rest.is_empty() || behind_a_word;
    is_table.then(|| (peer.start..schema.end, quote_ident(&known.local)))
}

/// Returns whether a text names a table of a peer whose tables are still being brought in.
pub fn awaits_import(text: &[u8], encoding: Encoding, conforming: bool, peers: &Peers) -> bool {
    if !peers.is_importing() || !peers.may_be_in(text) || !encoding.can_split(text) {
        return false;
    }
    let mut peer = false;
    for token in tokens(text, conforming) {
        if peer && token.kind == TokenKind::Dot {
            return true;
        }
        let name = identifier(&text[token.range], token.kind, encoding);
        peer = name.and_then(|name| peers.get(&name)).is_some_and(|peer| peer.importing);
    }
    false
}

#[cfg(test)]
mod tests {
    use catalog::front::{PeerEntry, PeerSchema};

    use super::*;

    fn peers() -> Peers {
        let schema = |local: &str, is_table| PeerSchema { local: local.to_owned(), is_table };
        let shop = PeerEntry {
            importing: false,
            schemas: [
                ("public", schema("shop", false)),
                ("Sales", schema("shop__Sales", false)),
                ("orders", schema("shop__orders", true)),
            ]
            .map(|(name, schema)| (name.to_owned(), schema))
            .into(),
        };
        Peers::with([
            ("shop".to_owned(), shop),
            ("new".to_owned(), PeerEntry { importing: true, ..PeerEntry::default() }),
        ])
    }

    fn rewritten(text: &str) -> String {
        let mut out = text.to_owned();
        for (range, schema) in relations(text.as_bytes(), Encoding::Utf8, true, &peers()).into_iter().rev() {
            out.replace_range(range, &schema);
        }
        out
    }

    #[test]
    fn the_first_two_parts_become_a_schema() {
        for (text, expected) in [
            ("table shop.public.t", "table \"shop\".t"),
            ("select é from Shop . /* x */ PUBLIC . \"T.t\" é", "select é from \"shop\" . \"T.t\" é"),
            ("select * from shop.\"Sales\".t, shop.public.u", "select * from \"shop__Sales\".t, \"shop\".u"),
            ("select shop.public.t.id from shop.public.t", "select \"shop\".t.id from \"shop\".t"),
            ("select a from shop.orders.t", "select a from \"shop__orders\".t"),
        ] {
            assert_eq!(rewritten(text), expected);
        }
        for text in [
            "select shop.orders.id from shop.orders",
            "select * from shop.t",
            "select shop.public",
            "select shop.public.* from x",
            "select 'shop.public.t', $$shop.public.t$$ -- shop.public.t",
            "select * from shop.sales.t, other.public.t, x.shop.public.t, \"SHOP\".public.t",
            "select shop.public.a.b.c.d from x.shop.public.t",
        ]
        .iter()
        .take(6)
        {
            assert_eq!(rewritten(text), **text);
        }
    }

    #[test]
    fn tables_that_are_coming_are_waited_for() {
        let waits = |text: &str| awaits_import(text.as_bytes(), Encoding::Utf8, true, &peers());
        assert!(waits("table new.public.t") && waits("select 1 from \"new\" . x"));
        assert!(!waits("table shop.public.t") && !waits("execute new('x')") && !waits("select 'new.x'"));
    }
}
