//! Statements about alerts.

use std::fmt;

use catalog::alert::channel::is_secret;

use super::print::{Ident, With, given, idents, list, when};
use super::{GivenOption, Inspected, Value};

/// `CREATE ALERT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateAlert {
    /// The new alert's name.
    pub name: String,
    /// An existing one becomes this.
    pub or_replace: bool,
    /// An existing one is a NOTICE.
    pub if_not_exists: bool,
    /// What it watches.
    pub on: AlertOn,
    /// When it fires: any of them, at least one.
    pub conditions: Vec<AlertCondition>,
    /// Who is told: all of them, at least one.
    pub channels: Vec<AlertChannel>,
    /// Options in the order given.
    pub options: Vec<GivenOption>,
}

/// `ALTER ALERT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlterAlert {
    /// The alert.
    pub name: String,
    /// A missing one is a NOTICE.
    pub if_exists: bool,
    /// What is changed.
    pub change: AlertChange,
}

/// What ALTER ALERT changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AlertChange {
    /// `ON … WHEN … NOTIFY …`, at least one of them; what is empty stays.
    Define {
        /// What it watches.
        on: Option<AlertOn>,
        /// When it fires.
        conditions: Vec<AlertCondition>,
        /// Who is told.
        channels: Vec<AlertChannel>,
    },
    /// `SET ( … )`.
    Set(Vec<GivenOption>),
    /// `RESET ( … )`.
    Reset(Vec<String>),
    /// `ENABLE` or `DISABLE`.
    Enable(bool),
    /// `RENAME TO`.
    RenameTo(String),
}

/// What an alert watches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlertOn {
    /// Peers, not mirrors.
    pub is_peer: bool,
    /// The one of that name; `None`: all.
    pub name: Option<String>,
}

/// A condition of an alert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlertCondition {
    /// What is looked at, as written.
    pub metric: String,
    /// How it is compared: `>`, `>=`, `<`, `<=`, `=` or `<>`.
    pub operator: &'static str,
    /// With what.
    pub value: Value,
    /// How long it must hold, as an interval.
    pub hold: Option<Value>,
}

/// A channel of an alert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AlertChannel {
    /// Its kind, as written.
    pub kind: String,
    /// Options in the order given, secrets among them.
    pub options: Vec<GivenOption>,
}

/// The options of channels, which hold secrets, with the names of their parts.
pub(super) fn inspected(channels: &[AlertChannel]) -> Vec<Inspected<'_>> {
    let mut all = Vec::new();
    for (n, channel) in channels.iter().enumerate() {
        let part = |option: &GivenOption| format!("channel.{}.option.{}", n + 1, option.name);
        all.extend(channel.options.iter().map(|option| Inspected {
            part: part(option),
            option,
            may_be_secret: is_secret(&option.name),
        }));
    }
    all
}

impl fmt::Display for CreateAlert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let CreateAlert { name, or_replace, if_not_exists, on, conditions, channels, options } = self;
        let (replace, exists) = (when(*or_replace, "OR REPLACE "), when(*if_not_exists, "IF NOT EXISTS "));
        write!(f, "CREATE {replace}ALERT {exists}{} ON {on} WHEN {}", Ident(name), any(conditions))?;
        write!(f, " NOTIFY {}{}", list(channels), With(options))
    }
}

impl fmt::Display for AlterAlert {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ALTER ALERT {}{}", when(self.if_exists, "IF EXISTS "), Ident(&self.name))?;
        match &self.change {
            AlertChange::Define { on, conditions, channels } => {
                if let Some(on) = on {
                    write!(f, " ON {on}")?;
                }
                if !conditions.is_empty() {
                    write!(f, " WHEN {}", any(conditions))?;
                }
                if channels.is_empty() { Ok(()) } else { write!(f, " NOTIFY {}", list(channels)) }
            }
            AlertChange::Set(options) => write!(f, " SET ({})", given(options)),
            AlertChange::Reset(names) => write!(f, " RESET ({})", idents(names)),
            AlertChange::Enable(enable) => f.write_str(if *enable { " ENABLE" } else { " DISABLE" }),
            AlertChange::RenameTo(name) => write!(f, " RENAME TO {}", Ident(name)),
        }
    }
}

fn any(conditions: &[AlertCondition]) -> String {
    conditions.iter().map(ToString::to_string).collect::<Vec<_>>().join(" OR ")
}

impl fmt::Display for AlertOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noun = if self.is_peer { "PEER" } else { "MIRROR" };
        match &self.name {
            Some(name) => write!(f, "{noun} {}", Ident(name)),
            None => write!(f, "ALL {noun}S"),
        }
    }
}

impl fmt::Display for AlertCondition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", Ident(&self.metric), self.operator, self.value)?;
        self.hold.as_ref().map_or(Ok(()), |hold| write!(f, " FOR {hold}"))
    }
}

impl fmt::Display for AlertChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Ident(&self.kind))?;
        if self.options.is_empty() { Ok(()) } else { write!(f, " ({})", given(&self.options)) }
    }
}
