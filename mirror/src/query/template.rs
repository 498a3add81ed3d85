//! The text of a query, and what it becomes for a part of the watermark's values. Pure.

use pg::name::{quote_ident, quote_literal};

use super::watermark::{Kind, Span};

/// What the query ends with in a mirror by `xmin` whose query has no placeholders.
const XMIN_CONDITION: &str = "where xmin::pg_catalog.text::pg_catalog.int8 between";

/// A piece of the text.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Start,
    End,
}

/// How the query is limited to a part of the watermark's values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Not at all: there is no watermark.
    Nothing,
    /// By its own placeholders.
    Placeholders(Kind),
    /// By a condition on this column of its result.
    Column(String, Kind),
    /// By a condition on `xmin` that its text is continued with.
    Xmin,
}

/// A query that can be limited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    pieces: Vec<Piece>,
}

impl Template {
    /// Takes the text apart. What ends a statement is left out, as the query becomes part of others.
    pub fn parse(text: &str) -> Template {
        let text = text.trim_end_matches(|c: char| c.is_whitespace() || c == ';');
        let (mut pieces, mut plain, mut rest) = (Vec::new(), String::new(), text);
        while let Some(at) = rest.find("{{") {
            let (before, found) = rest.split_at(at);
            plain.push_str(before);
            let Some((piece, length)) = placeholder(found) else {
                plain.push_str("{{");
                rest = &found[2..];
                continue;
            };
            rest = &found[length..];
            // Who put it in quotes meant the value, which brings its own.
            if plain.ends_with('\'') && rest.starts_with('\'') {
                plain.pop();
                rest = &rest[1..];
            }
            pieces.push(Piece::Text(std::mem::take(&mut plain)));
            pieces.push(piece);
        }
        plain.push_str(rest);
        pieces.push(Piece::Text(plain));
        Template { pieces }
    }

    /// Returns whether there is a placeholder.
    pub fn has_placeholders(&self) -> bool {
        self.pieces.iter().any(|piece| matches!(piece, Piece::Start | Piece::End))
    }

    /// Returns the text with these literals in the placeholders' places.
    fn with(&self, start: &str, end: &str) -> String {
        let text = |piece: &Piece| match piece {
            Piece::Text(text) => text.clone(),
            Piece::Start => start.to_owned(),
            Piece::End => end.to_owned(),
        };
        self.pieces.iter().map(text).collect()
    }

    /// Returns whether the text could join results of several queries: a condition at its end would then be the last one's only.
    pub fn may_combine(&self) -> bool {
        let text = self.with(" ", " ").to_ascii_lowercase();
        let mut words = text.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == '$'));
        words.any(|word| matches!(word, "union" | "intersect" | "except"))
    }

    /// Returns the query for all values, those that are NULL included if that is in its own hands.
    pub fn whole(&self, limit: &Limit) -> String {
        match limit {
            Limit::Placeholders(kind) => self.with(&kind.literal(kind.least()), &kind.literal(kind.greatest())),
            Limit::Nothing | Limit::Column(..) | Limit::Xmin => self.with("", ""),
        }
    }

    /// Returns the query for a part of the values, both ends included. With `nulls`, a part without lower end has the rows whose watermark is NULL, if
    /// the condition is ours.
    pub fn limited(&self, limit: &Limit, span: &Span, nulls: bool) -> String {
        let (from, to) = (span.from.as_deref(), span.to.as_deref());
        let kind = match limit {
            Limit::Placeholders(kind) | Limit::Column(_, kind) => *kind,
            Limit::Nothing | Limit::Xmin => Kind::Xmin,
        };
        let start = kind.literal(from.unwrap_or(kind.least()));
        let end = kind.literal(to.unwrap_or(kind.greatest()));
        match limit {
            Limit::Nothing => self.with("", ""),
            Limit::Placeholders(_) => self.with(&start, &end),
            Limit::Xmin => format!("{}\n{XMIN_CONDITION} {start} and {end}", self.with("", "")),
            Limit::Column(column, _) => {
                let column = format!("q.{}", quote_ident(column));
                let lower = from.map(|_| format!("{column} >= {start}"));
                let upper = to.map(|_| format!("{column} <= {end}"));
                let inside: Vec<String> = lower.into_iter().chain(upper).collect();
                let condition = match (inside.join(" and "), from) {
                    (all, None) if all.is_empty() && nulls => return self.with("", ""),
                    (all, _) if all.is_empty() => format!("{column} is not null"),
                    (inside, None) if nulls => format!("({inside} or {column} is null)"),
                    (inside, _) => inside,
                };
                format!("select q.* from ({}\n) q where {condition}", self.with("", ""))
            }
        }
    }
}

/// Reads a placeholder at the beginning of the text; returns it and how long it is.
fn placeholder(text: &str) -> Option<(Piece, usize)> {
    let close = text.find("}}")?;
    let piece = match text.get(2..close)?.trim() {
        ".start" => Piece::Start,
        ".end" => Piece::End,
        _ => return None,
    };
    Some((piece, close + 2))
}

/// Returns a value as SQL of a type.
pub(super) fn typed(value: &str, sql_type: &str) -> String {
    format!("{}::{sql_type}", quote_literal(value).trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(from: Option<&str>, to: Option<&str>) -> Span {
        Span { from: from.map(str::to_owned), to: to.map(str::to_owned) }
    }

    #[test]
    fn placeholders_become_literals_of_the_watermarks_type() {
        let limit = Limit::Placeholders(Kind::Int4);
        for text in [
            "select * from t where n between {{.start}} and {{.end}}",
            "select * from t where n between {{ .start }} and '{{.end}}' ;\n",
        ] {
            let template = Template::parse(text);
            assert!(template.has_placeholders());
            assert_eq!(
                template.limited(&limit, &span(Some("5"), Some("9")), false),
                "select * from t where n between '5'::pg_catalog.int4 and '9'::pg_catalog.int4"
            );
            assert_eq!(
                template.whole(&limit),
                "select * from t where n between '-2147483648'::pg_catalog.int4 and '2147483647'::pg_catalog.int4"
            );
        }
        let odd = Template::parse("select {{.end}} {{.start}} {{.end}}");
        assert_eq!(
            odd.limited(&Limit::Placeholders(Kind::Timestamptz), &span(None, Some("2020-01-01 00:00:00+00")), false),
            "select '2020-01-01 00:00:00+00'::pg_catalog.timestamptz '-infinity'::pg_catalog.timestamptz '2020-01-01 00:00:00+00'::pg_catalog.timestamptz"
        );
    }

    #[test]
    fn what_only_looks_like_a_placeholder_stays() {
        for text in
            ["select '{{1,2},{3,4}}'::int[]", "select '{{start}}'", "select '{{.begin}}'", "select '{{'", "{{}}é"]
        {
            let template = Template::parse(text);
            assert!(!template.has_placeholders(), "{text}");
            assert_eq!(template.whole(&Limit::Nothing), text);
        }
        assert!(Template::parse("select '{{ {{.start}}'").has_placeholders());
    }

    #[test]
    fn a_query_without_placeholders_is_limited_from_outside() {
        let template = Template::parse("select * from t -- all");
        let limit = Limit::Column("n\"x".into(), Kind::Int8);
        let limited = |from, to, nulls| template.limited(&limit, &span(from, to), nulls);
        let outside = "select q.* from (select * from t -- all\n) q where";
        assert_eq!(
            limited(Some("1"), Some("2"), true),
            format!("{outside} q.\"n\"\"x\" >= '1'::pg_catalog.int8 and q.\"n\"\"x\" <= '2'::pg_catalog.int8")
        );
        assert_eq!(limited(None, Some("2"), false), format!("{outside} q.\"n\"\"x\" <= '2'::pg_catalog.int8"));
        assert_eq!(
            limited(None, Some("2"), true),
            format!("{outside} (q.\"n\"\"x\" <= '2'::pg_catalog.int8 or q.\"n\"\"x\" is null)")
        );
        assert_eq!(limited(Some("1"), None, true), format!("{outside} q.\"n\"\"x\" >= '1'::pg_catalog.int8"));
        assert_eq!(limited(None, None, true), "select * from t -- all");
        assert_eq!(limited(None, None, false), format!("{outside} q.\"n\"\"x\" is not null"));
    }

    #[test]
    fn a_query_by_xmin_is_continued_unless_it_could_combine_several() {
        let template = Template::parse("select a from t -- x");
        assert_eq!(
            template.limited(&Limit::Xmin, &span(Some("3"), Some("7")), false),
            "select a from t -- x\nwhere xmin::pg_catalog.text::pg_catalog.int8 between '3'::pg_catalog.int8 and '7'::pg_catalog.int8"
        );
        assert_eq!(template.whole(&Limit::Xmin), "select a from t -- x");
        assert!(!template.may_combine() && !Template::parse("select union_ from t").may_combine());
        assert!(Template::parse("select 1 UNION\nselect 2").may_combine());
    }
}
