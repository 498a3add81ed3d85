//! Lengths of time as an operator writes them: with Postgres' units.
//!
//! Source: PostgreSQL docs, config-setting, "Parameter Names and Values".

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// The units, the largest first.
const UNITS: [(&str, u64); 6] =
    [("d", 86_400_000_000), ("h", 3_600_000_000), ("min", 60_000_000), ("s", 1_000_000), ("ms", 1_000), ("us", 1)];

/// A length of time, which reads and writes itself as `10s` or `1min`; a number without a unit is seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span(pub Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let micros = self.0.as_micros();
        let unit = UNITS.iter().find(|(_, size)| micros.is_multiple_of(u128::from(*size)));
        let (name, size) = unit.filter(|_| micros > 0).copied().unwrap_or(("s", 1_000_000));
        write!(f, "{}{name}", micros / u128::from(size))
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Span, String> {
        let invalid = || {
            format!("\"{text}\" is no length of time; it takes a number and one of the units us, ms, s, min, h and d")
        };
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let number: u64 = text[..digits].parse().map_err(|_| invalid())?;
        let unit = match text[digits..].trim_start() {
            "" => "s",
            unit => unit,
        };
        let (_, size) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(invalid)?;
        number.checked_mul(*size).map(|micros| Span(Duration::from_micros(micros))).ok_or_else(invalid)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Span, D::Error> {
        struct TextOrSeconds;

        impl Visitor<'_> for TextOrSeconds {
            type Value = Span;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a length of time such as \"10s\", or a number of seconds")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Span, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_i64<E: Error>(self, seconds: i64) -> Result<Span, E> {
                self.visit_str(&seconds.to_string())
            }
        }

        deserializer.deserialize_any(TextOrSeconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_round_trip() {
        for text in ["0s", "1us", "1500us", "250ms", "10s", "90s", "1min", "36h", "2d"] {
            assert_eq!(text.parse::<Span>().unwrap().to_string(), text);
        }
        assert_eq!("60".parse::<Span>().unwrap().to_string(), "1min");
        assert_eq!(" 2 h ".parse::<Span>().unwrap(), Span(Duration::from_secs(7200)));
    }

    #[test]
    fn nonsense_is_no_span() {
        for text in ["", "s", "-1s", "1 fortnight", "1.5s", "1S", "99999999999999999999s", "18446744073709551615d"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }
}
