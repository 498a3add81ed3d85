//! E-mail by SMTP.

use catalog::alert::channel::Channel;
use lettre::message::header::ContentType;
use lettre::message::{Mailbox, Mailboxes};
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, CertificateStore, Tls, TlsParameters};
use lettre::{AsyncSmtpTransport, AsyncTransport, Message, Tokio1Executor};
use serde_json::Value;

use super::{Error, headline, text, timeout};

pub(super) async fn send(channel: &Channel, event: &Value) -> Result<(), Error> {
    let message = message(channel, event)?;
    let host = channel.get("host").unwrap_or("localhost");
    let tls = tls(channel, host)?;
    let default_port = match tls {
        Tls::Wrapper(_) => 465,
        Tls::None => 25,
        _ => 587,
    };
    let port = channel.get("port").and_then(|port| port.parse().ok()).unwrap_or(default_port);
    let timeout = timeout(channel);
    let mut transport =
        AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(host).port(port).tls(tls).timeout(Some(timeout));
    if let Some(user) = channel.get("user") {
        let password = channel.secret("password").map_err(Error::Options)?.unwrap_or_default();
        transport = transport.credentials(Credentials::new(user.to_owned(), password));
    }
    let host = format!("{host}:{port}");
    match tokio::time::timeout(timeout, transport.build().send(message)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) if error.status().is_some() => {
            Err(Error::Refused { host, answer: catalog::connect::chain(&error) })
        }
        Ok(Err(error)) if error.is_timeout() => Err(Error::Timeout { host, timeout }),
        Ok(Err(error)) => Err(Error::Unreachable { host, reason: catalog::connect::chain(&error) }),
        Err(_) => Err(Error::Timeout { host, timeout }),
    }
}

fn tls(channel: &Channel, host: &str) -> Result<Tls, Error> {
    let mode = channel.get("tls").unwrap_or("starttls");
    if mode == "never" {
        return Ok(Tls::None);
    }
    let unusable =
        |error: &dyn std::fmt::Display| Error::Options(format!("option \"sslrootcert\" cannot be used: {error}"));
    let mut parameters = TlsParameters::builder(host.to_owned());
    if let Some(path) = channel.get("sslrootcert") {
        let pem = std::fs::read(path).map_err(|error| unusable(&error))?;
        let certificate = Certificate::from_pem(&pem).map_err(|error| unusable(&error))?;
        parameters = parameters.certificate_store(CertificateStore::None).add_root_certificate(certificate);
    }
    let parameters = parameters.build_rustls().map_err(|error| Error::Options(catalog::connect::chain(&error)))?;
    Ok(if mode == "always" { Tls::Wrapper(parameters) } else { Tls::Required(parameters) })
}

/// The mail. One that is sent twice has the same number both times, so that a reader's program shows it once.
fn message(channel: &Channel, event: &Value) -> Result<Message, Error> {
    let option = |name: &str| channel.get(name).unwrap_or_default();
    let unusable = |name: &str| Error::Options(format!("option \"{name}\" holds no address"));
    let from: Mailbox = option("from").parse().map_err(|_| unusable("from"))?;
    let to: Mailboxes = option("to").parse().map_err(|_| unusable("to"))?;
    let id = format!("<{}.{}@peergate>", text(event, "at").replace(':', ""), event["event_id"]);
    let message = to.into_iter().fold(Message::builder().from(from), |message, address| message.to(address));
    message
        .message_id(Some(id))
        .subject(format!("[Peergate] {}", headline(event)))
        .header(ContentType::TEXT_PLAIN)
        .body(body(event))
        .map_err(|error| Error::Options(catalog::connect::chain(&error)))
}

fn body(event: &Value) -> String {
    let mut body = format!("{}\n\n", text(event, "message"));
    for (key, label) in [("condition", "Condition"), ("value", "Value"), ("at", "Time")] {
        if let Some(value) = event[key].as_str() {
            body.push_str(&format!("{label}: {value}\n"));
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use catalog::secret::Keyring;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_mail_says_what_happened_to_all_who_are_named() {
        let keyring = Keyring::parse(&"ab".repeat(32)).unwrap();
        let options = json!({"from": "Peer Gate <pg@example.com>", "to": "a@example.com, Bé <b@example.com>"});
        let channel = Channel::from_document(&json!({"channel": "email", "options": options}), &keyring).unwrap();
        let event = json!({"event": "fired", "alert": "lag", "mirror": "orders\r\nBcc: evil@example.com", "message": "lag is 5",
            "event_id": 7, "at": "2026-01-02T03:04:05.6Z", "value": "5"});
        let mail = message(&channel, &event).unwrap();
        let recipients: Vec<String> = mail.envelope().to().iter().map(ToString::to_string).collect();
        assert_eq!(recipients, ["a@example.com", "b@example.com"], "a name adds no recipient");
        let text = String::from_utf8(mail.formatted()).unwrap();
        assert!(text.contains("Message-ID: <2026-01-02T030405.6Z.7@peergate>\r\n"), "{text}");
        assert!(text.contains("lag is 5") && !text.contains("\r\nBcc:"), "{text}");
    }
}
