//! An incoming webhook of Slack, or of what takes the same.
//!
//! Source: Slack docs, "Sending messages using incoming webhooks", "Formatting text".

use catalog::alert::channel::Channel;
use serde_json::{Value, json};

use super::{Error, headline, http, required, text};

pub(super) async fn send(channel: &Channel, event: &Value) -> Result<(), Error> {
    let url = required(channel, "url")?;
    http::post(channel, &url, None, json!({"text": message(event)}).to_string()).await
}

fn message(event: &Value) -> String {
    let sign = match text(event, "event") {
        "recovered" => ":white_check_mark:",
        "test" => ":information_source:",
        _ => ":rotating_light:",
    };
    format!("{sign} *{}*\n{}", escaped(&headline(event)), escaped(text(event, "message")))
}

/// Slack takes three characters for its own.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_slack_takes_for_its_own_is_escaped() {
        let event = json!({"event": "fired", "alert": "a<b", "message": "lag > 5 & rising"});
        assert_eq!(message(&event), ":rotating_light: *FIRED a&lt;b*\nlag &gt; 5 &amp; rising");
    }
}
