//! The channels of an alert: as a statement gives them, and as they are read back for a delivery.
//!
//! Which options exist and what they take is the catalog's to say (`peergate.settings`). A secret is sealed for what it is used for: an
//! address as such, a header for its address, a password for its server and user; elsewhere it cannot be opened.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use serde_json::{Map, Value, json};
use tokio_postgres::Transaction;

use crate::Error;
use crate::secret::{Keyring, SecretError};

/// Options whose value is sealed.
pub const SECRET_OPTIONS: &[&str] = &["authorization", "password", "url"];

/// Variables that hold secrets of Peergate itself, and never an alert's.
const OWN_VARIABLES: &[&str] = &["PEERGATE_KEY", "PEERGATE_PASSWORD", "PEERGATE_CATALOG"];

/// Returns whether an option's value is a secret.
pub fn is_secret(option: &str) -> bool {
    SECRET_OPTIONS.contains(&option)
}

/// A channel as a statement gives it.
#[derive(Clone)]
pub struct GivenChannel {
    /// Its kind, as written.
    pub kind: String,
    /// Its options, secrets among them.
    pub options: Vec<(String, String)>,
}

/// An option that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadChannel {
    /// Which channel, from 1.
    pub channel: usize,
    /// Which option.
    pub option: &'static str,
    /// What is wrong, without the value.
    pub message: &'static str,
}

/// Returns channels as the catalog takes them: those without their secrets.
pub fn documents(given: &[GivenChannel]) -> Value {
    let document = |channel: &GivenChannel| {
        let plain = channel.options.iter().filter(|(name, _)| !is_secret(name));
        let options: Map<String, Value> = plain.map(|(name, value)| (name.clone(), json!(value))).collect();
        json!({"channel": channel.kind, "options": options})
    };
    given.iter().map(document).collect()
}

/// Returns the secrets, sealed: `{"1": {"url": …}}`.
///
/// # Errors
/// [`SecretError`] if the key cannot be read.
pub fn seal(given: &[GivenChannel], keyring: &Keyring) -> Result<Value, SecretError> {
    let mut sealed = Map::new();
    for (n, channel) in given.iter().enumerate() {
        let options: BTreeMap<String, String> = channel.options.iter().cloned().collect();
        let secrets = options.iter().filter(|(name, _)| is_secret(name));
        let secrets =
            secrets.map(|(name, value)| Ok((name.clone(), json!(keyring.seal(&purpose(name, &options), value)?))));
        let secrets = secrets.collect::<Result<Map<_, _>, SecretError>>()?;
        if !secrets.is_empty() {
            sealed.insert((n + 1).to_string(), Value::Object(secrets));
        }
    }
    Ok(Value::Object(sealed))
}

/// Seals all channels' secrets anew. Part of [`crate::Catalog::reseal`].
pub(crate) async fn reseal(transaction: &Transaction<'_>, keyring: &Keyring) -> Result<(), Error> {
    let query = "
        select a.id, s.channel, (a.channels -> (s.channel - 1)) || jsonb_build_object('secrets', jsonb_object_agg(s.option, s.sealed))
        from peergate.alert_definitions a join peergate.alert_secrets s on s.alert_id = a.id group by a.id, s.channel";
    for row in transaction.query(query, &[]).await? {
        let (id, channel, document): (i64, i32, Value) = (row.get(0), row.get(1), row.get(2));
        let sealed = sealed_anew(&document, keyring)?;
        let update = "update peergate.alert_secrets s set sealed = n.value
                      from jsonb_each_text($3) n where s.alert_id = $1 and s.channel = $2 and s.option = n.key";
        transaction.execute(update, &[&id, &channel, &sealed]).await?;
    }
    Ok(())
}

fn sealed_anew(document: &Value, keyring: &Keyring) -> Result<Value, SecretError> {
    let channel = Channel::from_document(document, keyring)?;
    let secrets = channel.options.iter().filter(|(name, _)| document["secrets"].get(name.as_str()).is_some());
    let secrets =
        secrets.map(|(name, value)| Ok((name.clone(), json!(keyring.seal(&purpose(name, &channel.options), value)?))));
    Ok(Value::Object(secrets.collect::<Result<_, SecretError>>()?))
}

/// Finds an address that cannot be one. Values are not quoted: they are secrets.
///
/// # Errors
/// [`BadChannel`] for the first.
pub fn check(given: &[GivenChannel]) -> Result<(), BadChannel> {
    for (n, channel) in given.iter().enumerate() {
        let bad = |option, message| Err(BadChannel { channel: n + 1, option, message });
        for (name, value) in &channel.options {
            match name.as_str() {
                "url" if origin(value).is_none() => {
                    return bad(
                        "url",
                        "invalid value for option \"url\": it takes an address that begins with http:// or https://",
                    );
                }
                "authorization" if value.is_empty() || !value.bytes().all(|b| (b' '..0x7f).contains(&b)) => {
                    return bad(
                        "authorization",
                        "invalid value for option \"authorization\": it takes one line of ASCII text",
                    );
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// What a secret is sealed for.
fn purpose(option: &str, options: &BTreeMap<String, String>) -> String {
    let part = |name: &str| options.get(name).map_or("", String::as_str);
    match option {
        "authorization" => {
            let address = origin(part("url")).unwrap_or_else(|| format!("{}{}", part("url_env"), part("url_file")));
            format!("alert authorization {address}")
        }
        "password" => {
            let host = options.get("host").map_or("localhost", String::as_str);
            // The catalog stores numbers as they are counted, not as they were written.
            let port = part("port").trim().parse::<u16>().map_or_else(|_| String::new(), |port| port.to_string());
            format!("alert password host={host} port={port} user={}", part("user"))
        }
        other => format!("alert {other}"),
    }
}

/// Returns scheme, host and port of an address, or `None` if it is none of http.
fn origin(url: &str) -> Option<String> {
    let lower = url.to_ascii_lowercase();
    let rest = lower.strip_prefix("http://").or_else(|| lower.strip_prefix("https://"))?;
    let authority = rest.split(['/', '?', '#']).next()?;
    let host = authority.rsplit('@').next()?;
    let is_clean = url.bytes().all(|b| b.is_ascii_graphic());
    (is_clean && !host.is_empty()).then(|| format!("{}{host}", &lower[..lower.len() - rest.len()]))
}

/// A channel with its secrets opened.
#[derive(Clone)]
pub struct Channel {
    /// webhook, slack, email or notify.
    pub kind: String,
    options: BTreeMap<String, String>,
}

/// Shows no option: an address is a secret too.
impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Channel({})", self.kind)
    }
}

impl Channel {
    /// Reads a channel with its options and sealed secrets.
    ///
    /// # Errors
    /// [`SecretError`] if a secret cannot be opened.
    pub fn from_document(document: &Value, keyring: &Keyring) -> Result<Channel, SecretError> {
        let strings = |key: &str| -> BTreeMap<String, String> {
            let pairs = document[key].as_object().into_iter().flatten();
            pairs.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
        };
        let mut options = strings("options");
        let sealed = strings("secrets");
        // What the others are sealed for depends on the address.
        for name in sealed.keys().filter(|name| *name == "url").chain(sealed.keys().filter(|name| *name != "url")) {
            let opened = keyring.open(&purpose(name, &options), &sealed[name])?;
            options.insert(name.clone(), opened);
        }
        Ok(Channel { kind: document["channel"].as_str().unwrap_or_default().to_owned(), options })
    }

    /// Returns an option, with its default where it has one.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }

    /// Returns a secret: the one given, or what `…_env` or `…_file` names, read now.
    ///
    /// # Errors
    /// A message without the secret, if what is named cannot be read.
    pub fn secret(&self, name: &str) -> Result<Option<String>, String> {
        if let Some(given) = self.get(name) {
            return Ok(Some(given.to_owned()));
        }
        if let Some(variable) = self.get(&format!("{name}_env")) {
            let value = std::env::var(variable).ok().filter(|_| !OWN_VARIABLES.contains(&variable));
            return value.map(Some).ok_or_else(|| format!("environment variable \"{variable}\" is not set"));
        }
        let Some(path) = self.get(&format!("{name}_file")) else { return Ok(None) };
        let text = fs::read_to_string(path).map_err(|error| format!("cannot read file \"{path}\": {error}"))?;
        Ok(Some(text.lines().next().unwrap_or_default().trim_end().to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(kind: &str, options: &[(&str, &str)]) -> GivenChannel {
        let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        GivenChannel { kind: kind.to_owned(), options }
    }

    fn stored(given: &GivenChannel, keyring: &Keyring) -> Value {
        let mut document = documents(std::slice::from_ref(given))[0].clone();
        document["secrets"] = seal(std::slice::from_ref(given), keyring).unwrap()["1"].clone();
        document
    }

    #[test]
    fn secrets_open_for_what_they_were_sealed_for_and_nothing_else() {
        let keyring = Keyring::parse(&"ab".repeat(32)).unwrap();
        let hook = given(
            "webhook",
            &[("url", "https://h/geheim"), ("authorization", "Bearer geheim"), ("timeout_seconds", "5")],
        );
        let mut document = stored(&hook, &keyring);
        assert!(!document.to_string().contains("geheim"));
        let channel = Channel::from_document(&document, &keyring).unwrap();
        assert_eq!((channel.get("url"), channel.get("timeout_seconds")), (Some("https://h/geheim"), Some("5")));
        assert_eq!(channel.secret("authorization").unwrap().as_deref(), Some("Bearer geheim"));
        assert!(!format!("{channel:?}").contains("geheim"));
        let elsewhere = stored(&given("webhook", &[("url", "https://evil/")]), &keyring);
        document["secrets"]["url"] = elsewhere["secrets"]["url"].clone();
        assert!(matches!(Channel::from_document(&document, &keyring), Err(SecretError::WrongDestination)));

        let mail = given("email", &[("host", "smtp"), ("user", "u"), ("port", "025"), ("password", "geheim")]);
        let mut document = stored(&mail, &keyring);
        document["options"]["port"] = json!("25");
        assert!(Channel::from_document(&document, &keyring).is_ok());
        document["options"]["host"] = json!("evil");
        assert!(matches!(Channel::from_document(&document, &keyring), Err(SecretError::WrongDestination)));
    }

    #[test]
    fn secrets_are_sealed_anew_for_the_same() {
        let keyring = Keyring::parse(&"ab".repeat(32)).unwrap();
        let mut document = stored(&given("webhook", &[("url", "https://h/a"), ("authorization", "x")]), &keyring);
        document["secrets"] = sealed_anew(&document, &keyring).unwrap();
        assert_eq!(Channel::from_document(&document, &keyring).unwrap().get("authorization"), Some("x"));
    }

    #[test]
    fn an_address_is_one_of_http() {
        for (url, expected) in [
            ("http://h", Some("http://h")),
            ("HTTPS://User:Pw@Host:8443/x?y#z", Some("https://host:8443")),
            ("https://", None),
            ("https:///x", None),
            ("ftp://h/", None),
            ("https://h/a b", None),
            ("", None),
        ] {
            assert_eq!(origin(url).as_deref(), expected, "{url}");
        }
        let bad = check(&[given("slack", &[("url", "geheim")])]).unwrap_err();
        assert!((bad.channel, bad.option) == (1, "url") && !bad.message.contains("geheim"));
        assert!(check(&[given("webhook", &[("authorization", "a\r\nb: c")])]).is_err());
    }

    #[test]
    fn a_secret_may_live_in_a_file() {
        let path = std::env::temp_dir().join(format!("peergate-alert-{}", std::process::id()));
        fs::write(&path, "https://h/x \nsecond").unwrap();
        let keyring = Keyring::parse(&"ab".repeat(32)).unwrap();
        let document = json!({"channel": "slack", "options": {"url_file": path, "password_env": "PEERGATE_KEY", "a_file": "/nowhere/x"}});
        let channel = Channel::from_document(&document, &keyring).unwrap();
        assert_eq!(channel.secret("url").unwrap().as_deref(), Some("https://h/x"));
        assert!(channel.secret("password").is_err() && channel.secret("a").is_err());
        assert_eq!(channel.secret("b").unwrap(), None);
        fs::remove_file(path).unwrap();
    }
}
