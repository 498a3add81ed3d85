//! The ways in which people are told. NOTIFY is not among them: it is the catalog's own.

mod email;
mod http;
mod slack;
mod webhook;

use std::time::Duration;

use catalog::alert::channel::Channel;
use serde_json::Value;

/// A delivery that failed. Its text is for people, and without secrets: an address is one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The channel's options cannot be used as they are.
    #[error("{0}")]
    Options(String),
    /// No connection, or it broke.
    #[error("cannot reach {host}: {reason}")]
    Unreachable {
        /// Host and port; what follows them in an address may be secret.
        host: String,
        /// What happened.
        reason: String,
    },
    /// The server took its time.
    #[error("{host} did not answer within {} s", .timeout.as_secs())]
    Timeout {
        /// Host and port.
        host: String,
        /// How long it had.
        timeout: Duration,
    },
    /// The server said no.
    #[error("{host} refused: {answer}")]
    Refused {
        /// Host and port.
        host: String,
        /// What it said, the beginning of it.
        answer: String,
    },
}

/// Tells one event on one channel, and returns when the other side has taken it.
pub(crate) async fn send(channel: &Channel, event: &Value) -> Result<(), Error> {
    match channel.kind.as_str() {
        "webhook" => webhook::send(channel, event).await,
        "slack" => slack::send(channel, event).await,
        "email" => email::send(channel, event).await,
        other => Err(Error::Options(format!("channel {other} is not known to this version"))),
    }
}

/// How long an attempt may take.
fn timeout(channel: &Channel) -> Duration {
    let seconds = channel.get("timeout_seconds").and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(10))
}

/// A secret option that must be there.
fn required(channel: &Channel, name: &str) -> Result<String, Error> {
    let value = channel.secret(name).map_err(Error::Options)?;
    value.ok_or_else(|| Error::Options(format!("channel {} has no {name}", channel.kind)))
}

/// A part of the event, as text.
fn text<'a>(event: &'a Value, key: &str) -> &'a str {
    event[key].as_str().unwrap_or_default()
}

/// The event in a few words: `FIRED lag on mirror "orders"`.
fn headline(event: &Value) -> String {
    let subject = ["mirror", "peer"].into_iter().find_map(|kind| Some((kind, event[kind].as_str()?)));
    let on = subject.map_or(String::new(), |(kind, name)| format!(" on {kind} \"{name}\""));
    format!("{} {}{on}", text(event, "event").to_uppercase(), text(event, "alert"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_headline_says_what_and_where() {
        let event = json!({"event": "fired", "alert": "lag", "mirror": "orders"});
        assert_eq!(headline(&event), "FIRED lag on mirror \"orders\"");
        assert_eq!(headline(&json!({"event": "test", "alert": "lag"})), "TEST lag");
    }
}
