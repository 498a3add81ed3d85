//! Alerts: what is watched, how it stands, and who is to be told. What follows from that is for the `alerts` crate to decide.
//!
//! Times are seconds since 1970 by the catalog's clock, the only one that counts here.

pub mod channel;
mod delivery;
mod reachability;
mod round;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use crate::Error;

pub use delivery::{Delivery, Outcome};
pub use reachability::PeerCheck;
pub use round::{Decision, Look};

/// A figure that an alert can be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Source WAL that is not yet applied.
    LagBytes,
    /// How long the oldest change that is not yet applied has waited; while nothing streams, how far back the target may be.
    LagSeconds,
    /// WAL that the source keeps for the slot.
    SlotWalBytes,
    /// The mirror's state.
    State,
    /// Failed attempts since the mirror last ran well, and tables that are blocked.
    Errors,
    /// What is stopped by rows that contradict the target's constraints.
    Conflicts,
    /// For how long a peer cannot be connected to.
    UnreachableSeconds,
}

/// How a figure is compared with a condition's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
    /// `=`
    Equal,
    /// `<>`
    NotEqual,
}

/// One condition of an alert.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    /// What is looked at.
    pub metric: Metric,
    /// How it is compared.
    pub comparison: Comparison,
    /// With what: a number, or a state.
    pub value: String,
    /// How long it must hold before the alert fires.
    pub hold: Duration,
    /// The condition as the statement has it: what it is known by from one look to the next.
    pub text: String,
}

/// An alert as it is looked at.
#[derive(Clone, Debug)]
pub struct Alert {
    /// Its number.
    pub id: i64,
    /// What it watches: `mirror` or `peer`.
    pub kind: String,
    /// It fires when any of these holds.
    pub conditions: Vec<Condition>,
    /// How often it is told again while it lasts; `None`: never.
    pub repeat: Option<Duration>,
}

/// A mirror or peer, as it is now. A figure that is `None` is not known.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    /// The mirror's or peer's number.
    pub subject_id: i64,
    /// Its name.
    pub subject: String,
    /// See [`Metric::State`].
    pub state: Option<String>,
    /// See [`Metric::LagBytes`].
    pub lag_bytes: Option<f64>,
    /// See [`Metric::LagSeconds`].
    pub lag_seconds: Option<f64>,
    /// See [`Metric::SlotWalBytes`].
    pub slot_wal_bytes: Option<f64>,
    /// See [`Metric::Errors`].
    pub errors: Option<f64>,
    /// See [`Metric::Conflicts`].
    pub conflicts: Option<f64>,
    /// See [`Metric::UnreachableSeconds`].
    pub unreachable_seconds: Option<f64>,
    /// The message of what is wrong, if something is.
    pub error: Option<String>,
}

/// What an alert knows of a mirror or peer from one look to the next.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Standing {
    /// The mirror's or peer's number.
    pub subject_id: i64,
    /// Its name.
    pub subject: String,
    /// Since when each condition holds that does, by its text.
    pub since: BTreeMap<String, f64>,
    /// It fires.
    pub firing: Option<Firing>,
}

/// An alert that fires.
#[derive(Clone, Debug, PartialEq)]
pub struct Firing {
    /// Since when.
    pub since: f64,
    /// When it was last told.
    pub told_at: f64,
    /// The text of the condition that fired.
    pub condition: String,
}

/// What there is to tell.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// The text of the condition that it is about.
    pub condition: String,
    /// What the figure is; `None` when it is not known, or nothing holds any more.
    pub value: Option<String>,
    /// The event as a sentence.
    pub message: String,
}

/// What kind of event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// The alert began to fire.
    Fired,
    /// It still does.
    Repeated,
    /// It does no more.
    Recovered,
}

impl EventKind {
    /// Returns the word for it in `alert_events.kind`.
    pub fn as_str(self) -> &'static str {
        match self {
            EventKind::Fired => "fired",
            EventKind::Repeated => "repeated",
            EventKind::Recovered => "recovered",
        }
    }
}

impl Metric {
    /// Returns its name in SQL.
    pub fn as_str(self) -> &'static str {
        match self {
            Metric::LagBytes => "lag_bytes",
            Metric::LagSeconds => "lag_seconds",
            Metric::SlotWalBytes => "slot_wal_bytes",
            Metric::State => "state",
            Metric::Errors => "errors",
            Metric::Conflicts => "conflicts",
            Metric::UnreachableSeconds => "unreachable_seconds",
        }
    }

    fn parse(name: &str) -> Option<Metric> {
        const ALL: [Metric; 7] = [
            Metric::LagBytes,
            Metric::LagSeconds,
            Metric::SlotWalBytes,
            Metric::State,
            Metric::Errors,
            Metric::Conflicts,
            Metric::UnreachableSeconds,
        ];
        ALL.into_iter().find(|metric| metric.as_str() == name)
    }
}

impl Condition {
    /// Reads a condition as the catalog stores it, with its text and its `hold` in seconds.
    fn from_json(json: &Value) -> Result<Condition, Error> {
        let text = |key: &str| json[key].as_str().unwrap_or_default();
        let comparison = match text("op") {
            ">" => Some(Comparison::Greater),
            ">=" => Some(Comparison::GreaterOrEqual),
            "<" => Some(Comparison::Less),
            "<=" => Some(Comparison::LessOrEqual),
            "=" => Some(Comparison::Equal),
            "<>" => Some(Comparison::NotEqual),
            _ => None,
        };
        let hold = json["hold"].as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        match (Metric::parse(text("metric")), comparison, hold) {
            (Some(metric), Some(comparison), Some(hold)) => Ok(Condition {
                metric,
                comparison,
                hold,
                value: text("value").to_owned(),
                text: text("text").to_owned(),
            }),
            _ => Err(Error::Unexpected(format!("condition {json}"))),
        }
    }
}
