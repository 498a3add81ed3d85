//! Watermarks: kinds, parts of their values, and how a round's values are divided into partitions. Pure.

use tokio_postgres::types::Type;

use super::template::typed;

/// What a watermark is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `smallint`
    Int2,
    /// `int`
    Int4,
    /// `bigint`
    Int8,
    /// `date`
    Date,
    /// `timestamp`
    Timestamp,
    /// `timestamptz`
    Timestamptz,
    /// The system column: the lower 32 bits of the number of the transaction that wrote the row.
    Xmin,
}

impl Kind {
    /// Returns the kind of a column of this type; `None` if it is none that has an order and a smallest step.
    pub fn of(column: &Type) -> Option<Kind> {
        Some(match *column {
            Type::INT2 => Kind::Int2,
            Type::INT4 => Kind::Int4,
            Type::INT8 => Kind::Int8,
            Type::DATE => Kind::Date,
            Type::TIMESTAMP => Kind::Timestamp,
            Type::TIMESTAMPTZ => Kind::Timestamptz,
            _ => return None,
        })
    }

    /// Returns the type's name as SQL.
    pub fn sql(self) -> &'static str {
        match self {
            Kind::Int2 => "pg_catalog.int2",
            Kind::Int4 => "pg_catalog.int4",
            Kind::Int8 | Kind::Xmin => "pg_catalog.int8",
            Kind::Date => "pg_catalog.date",
            Kind::Timestamp => "pg_catalog.timestamp",
            Kind::Timestamptz => "pg_catalog.timestamptz",
        }
    }

    /// Returns the least value.
    pub fn least(self) -> &'static str {
        match self {
            Kind::Int2 => "-32768",
            Kind::Int4 => "-2147483648",
            Kind::Int8 => "-9223372036854775808",
            Kind::Date | Kind::Timestamp | Kind::Timestamptz => "-infinity",
            Kind::Xmin => "0",
        }
    }

    /// Returns the greatest value.
    pub fn greatest(self) -> &'static str {
        match self {
            Kind::Int2 => "32767",
            Kind::Int4 => "2147483647",
            Kind::Int8 => "9223372036854775807",
            Kind::Date | Kind::Timestamp | Kind::Timestamptz => "infinity",
            Kind::Xmin => "4294967295",
        }
    }

    /// Returns a value as SQL.
    pub fn literal(self, value: &str) -> String {
        typed(value, self.sql())
    }

    /// Returns whether values are points in time.
    pub fn is_time(self) -> bool {
        matches!(self, Kind::Date | Kind::Timestamp | Kind::Timestamptz)
    }

    /// Returns the expression for the value that follows another, as text: there is none in between. Of the greatest one it may be out of the type's range.
    pub fn next(self, value: &str) -> String {
        match self {
            Kind::Int2 | Kind::Int4 | Kind::Int8 | Kind::Xmin => {
                format!("(({value})::pg_catalog.numeric + 1)::pg_catalog.text")
            }
            Kind::Date => format!("(({value}) + 1)::pg_catalog.text"),
            Kind::Timestamp | Kind::Timestamptz => {
                format!("(({value}) + '1 microsecond'::pg_catalog.interval)::pg_catalog.text")
            }
        }
    }
}

/// A part of a watermark's values, both ends included; `None`: no end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// The least value.
    pub from: Option<String>,
    /// The greatest value.
    pub to: Option<String>,
}

/// A value at which a partition ends, and the next one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Border {
    /// The last value of a partition.
    pub last: String,
    /// The first value of the one that follows.
    pub next: String,
}

/// Divides the values from `from` to `to` at borders, which are in order: parts that have all values between them once.
pub fn divide(from: Option<String>, to: Option<String>, borders: Vec<Border>) -> Vec<Span> {
    let mut spans = Vec::new();
    let mut from = from;
    for Border { last, next } in borders {
        if to.as_ref() == Some(&last) {
            break;
        }
        spans.push(Span { from: from.replace(next), to: Some(last) });
    }
    spans.push(Span { from, to });
    spans
}

/// Transaction numbers that fit into 32 bits, as rows have them.
const EPOCH: u64 = 1 << 32;

/// The first number that a transaction can have: those before it stand for rows that are older than all.
const FIRST_NORMAL: u64 = 3;

/// Returns the parts of the 32-bit numbers in which rows of transactions from `reached` on and before `xmin` are found, all of which have ended. `xmax` is the
/// first number that no transaction has yet. `reached` is `None` if rows of all older transactions are wanted, too.
pub fn xmin_spans(reached: Option<u64>, xmin: u64, xmax: u64) -> Vec<Span> {
    // Numbers farther back have been used again since.
    let oldest = xmax.saturating_sub(EPOCH);
    let mut from = reached.map_or(oldest, |reached| reached.max(oldest));
    let mut spans = Vec::new();
    while from < xmin {
        let epoch = from / EPOCH;
        let to = ((epoch + 1) * EPOCH).min(xmin) - 1;
        let (mut low, high) = (from % EPOCH, to % EPOCH);
        if reached.is_some() {
            low = low.max(FIRST_NORMAL);
        }
        if low <= high {
            spans.push(Span { from: Some(low.to_string()), to: Some(high.to_string()) });
        }
        from = to + 1;
    }
    spans
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(from: Option<&str>, to: Option<&str>) -> Span {
        Span { from: from.map(str::to_owned), to: to.map(str::to_owned) }
    }

    #[test]
    fn parts_have_every_value_once() {
        let border = |last: i64| Border { last: last.to_string(), next: (last + 1).to_string() };
        for borders in [vec![], vec![10], vec![1, 2, 3], vec![5, 9], vec![10, 20], vec![20]] {
            let spans = divide(Some("1".into()), Some("20".into()), borders.iter().map(|b| border(*b)).collect());
            let bound = |text: &Option<String>| text.as_deref().unwrap().parse::<i64>().unwrap();
            for value in -3..25 {
                let holders = spans.iter().filter(|s| (bound(&s.from)..=bound(&s.to)).contains(&value)).count();
                assert_eq!(holders, usize::from((1..=20).contains(&value)), "{value} of {spans:?}");
            }
        }
        assert_eq!(divide(None, None, vec![border(7)]), [span(None, Some("7")), span(Some("8"), None)]);
    }

    #[test]
    fn transaction_numbers_are_cut_where_they_begin_again() {
        let two_to_32 = EPOCH;
        assert_eq!(xmin_spans(None, 700, 705), [span(Some("0"), Some("699"))]);
        assert_eq!(xmin_spans(Some(700), 700, 705), []);
        assert_eq!(xmin_spans(Some(700), 705, 705), [span(Some("700"), Some("704"))]);
        // All rows, of a source whose numbers have begun again once: what is not between xmin and xmax.
        assert_eq!(
            xmin_spans(None, two_to_32 + 700, two_to_32 + 705),
            [span(Some("705"), Some("4294967295")), span(Some("0"), Some("699"))]
        );
        assert_eq!(
            xmin_spans(Some(two_to_32 - 10), two_to_32 + 20, two_to_32 + 20),
            [span(Some("4294967286"), Some("4294967295")), span(Some("3"), Some("19"))]
        );
        assert_eq!(xmin_spans(Some(two_to_32 - 10), two_to_32 + 2, two_to_32 + 2).len(), 1);
        // The mirror has rested for so long that all numbers were used.
        assert_eq!(xmin_spans(Some(3), 2 * two_to_32, 2 * two_to_32), [span(Some("3"), Some("4294967295"))]);
    }
}
