//! A peer's options: as a statement gave them, and as the engine reads them back from the catalog.
//!
//! Which options exist and what they take is the catalog's to say (`peergate.settings`); here they get their meaning.

use std::collections::BTreeMap;

use percent_encoding::percent_decode_str;
use pg::SqlState;
use serde_json::{Map, Value};
use tokio_postgres::Client;

use crate::Error;
use crate::secret::{Keyring, SecretError};

/// Options whose value is sealed. `uri` holds one too, and is taken apart before anything is stored.
pub const SECRET_OPTIONS: &[&str] = &["password"];

/// An option that cannot be used, said as an error of PostgreSQL would say it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct OptionError {
    /// The option at fault; `None` when it is all of them together.
    pub option: Option<String>,
    /// What kind of error.
    pub sqlstate: SqlState,
    /// The message, without secrets.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// What to do.
    pub hint: Option<String>,
}

impl OptionError {
    fn invalid(option: &str, message: impl Into<String>) -> OptionError {
        OptionError {
            option: Some(option.to_owned()),
            sqlstate: SqlState::INVALID_PARAMETER_VALUE,
            message: message.into(),
            detail: None,
            hint: None,
        }
    }
}

/// The options of a CREATE PEER, with the secrets told apart.
#[derive(Clone)]
pub struct GivenPeer {
    options: BTreeMap<String, String>,
    secrets: BTreeMap<String, String>,
}

impl GivenPeer {
    /// Sorts the options of a statement, in the order given. `uri` is taken apart into options that the others override.
    ///
    /// Options that nobody knows stay among the options, for the catalog to refuse.
    ///
    /// # Errors
    /// [`OptionError`] if an option is given twice or `uri` cannot be read.
    pub fn new(given: Vec<(String, String)>) -> Result<GivenPeer, OptionError> {
        let mut peer = GivenPeer { options: BTreeMap::new(), secrets: BTreeMap::new() };
        let mut uri = None;
        for (name, value) in given {
            let name = if name == "dbname" { "database".to_owned() } else { name };
            if peer.options.contains_key(&name) || peer.secrets.contains_key(&name) || (name == "uri" && uri.is_some())
            {
                return Err(OptionError {
                    sqlstate: SqlState::SYNTAX_ERROR,
                    ..OptionError::invalid(&name, format!("option \"{name}\" provided more than once"))
                });
            }
            if name == "uri" {
                uri = Some(value);
            } else {
                peer.set(name, value);
            }
        }
        for (name, value) in uri.as_deref().map(parse_uri).transpose()?.unwrap_or_default() {
            if !peer.options.contains_key(&name) && !peer.secrets.contains_key(&name) {
                peer.set(name, value);
            }
        }
        Ok(peer)
    }

    fn set(&mut self, name: String, value: String) {
        if SECRET_OPTIONS.contains(&name.as_str()) {
            self.secrets.insert(name, value);
        } else {
            self.options.insert(name, value);
        }
    }

    /// Returns what is stored in `peers.options`: everything but the secrets.
    pub fn options(&self) -> Value {
        Value::Object(self.options.iter().map(|(k, v)| (k.clone(), Value::String(v.clone()))).collect())
    }

    /// Returns the secrets, sealed for this peer's host and port: option name → sealed text.
    ///
    /// # Errors
    /// [`SecretError`] if the key cannot be read.
    pub fn sealed(&self, keyring: &Keyring) -> Result<Value, SecretError> {
        let destination = destination(&self.options);
        let seal =
            |(name, secret): (&String, &String)| Ok((name.clone(), Value::String(keyring.seal(&destination, secret)?)));
        Ok(Value::Object(self.secrets.iter().map(seal).collect::<Result<Map<_, _>, SecretError>>()?))
    }

    /// Returns whether the peer is to be connected to before it is stored.
    pub fn validate(&self) -> bool {
        !self.options.get("validate").is_some_and(|v| is_false(v))
    }

    /// Returns the options with which to connect.
    pub fn peer_options(&self) -> PeerOptions {
        PeerOptions { options: self.options.clone(), secrets: self.secrets.clone() }
    }
}

/// A peer with its secrets opened: what is needed to connect to it.
#[derive(Clone)]
pub struct PeerOptions {
    options: BTreeMap<String, String>,
    secrets: BTreeMap<String, String>,
}

/// Shows the options and none of the secrets.
impl std::fmt::Debug for PeerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(&self.options).finish()
    }
}

impl PeerOptions {
    /// Takes options that hold no sealed secrets, such as those of a connection of our own.
    pub fn plain(options: impl IntoIterator<Item = (&'static str, String)>) -> PeerOptions {
        let (secrets, options) = options
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .partition(|(name, _)| SECRET_OPTIONS.contains(&name.as_str()));
        PeerOptions { options, secrets }
    }

    /// Takes a `postgres://` connection string.
    ///
    /// # Errors
    /// [`OptionError`] if it cannot be read.
    pub fn from_uri(uri: &str) -> Result<PeerOptions, OptionError> {
        Ok(GivenPeer::new(vec![("uri".to_owned(), uri.to_owned())])?.peer_options())
    }

    /// Reads a peer as `peergate.peer_document` gives it, and opens its secrets.
    ///
    /// # Errors
    /// [`SecretError`] if a secret cannot be opened, above all when it was sealed for another host or port.
    pub fn from_document(document: &Value, keyring: &Keyring) -> Result<PeerOptions, SecretError> {
        let strings = |key: &str| -> BTreeMap<String, String> {
            let object = document.get(key).and_then(Value::as_object);
            let pairs = object.into_iter().flatten();
            pairs.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
        };
        let options = strings("options");
        let destination = destination(&options);
        let open = |(name, sealed): (String, String)| Ok((name, keyring.open(&destination, &sealed)?));
        let secrets = strings("secrets").into_iter().map(open).collect::<Result<_, SecretError>>()?;
        Ok(PeerOptions { options, secrets })
    }

    /// Seals the secrets anew, for a rotated key: option name → sealed text.
    ///
    /// # Errors
    /// [`SecretError`] if the key cannot be read.
    pub fn sealed(&self, keyring: &Keyring) -> Result<Value, SecretError> {
        GivenPeer { options: self.options.clone(), secrets: self.secrets.clone() }.sealed(keyring)
    }

    /// Returns an option or secret by its name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.options.get(name).or_else(|| self.secrets.get(name)).map(String::as_str)
    }

    /// Returns whether a boolean option is given as true.
    pub fn flag(&self, name: &str) -> bool {
        self.get(name).is_some_and(is_true)
    }
}

fn is_true(text: &str) -> bool {
    ["true", "on", "yes", "1", "t", "y"].contains(&text.to_lowercase().as_str())
}

fn is_false(text: &str) -> bool {
    ["false", "off", "no", "0", "f", "n"].contains(&text.to_lowercase().as_str())
}

/// Where the secrets may be sent: what they are sealed for.
fn destination(options: &BTreeMap<String, String>) -> String {
    let part = |name: &str, default: &str| options.get(name).map_or(default, String::as_str).trim().to_owned();
    format!("host={} hostaddr={} port={}", part("host", "localhost"), part("hostaddr", ""), part("port", "5432"))
}

/// Takes `postgres://user:password@host:port,host:port/database?option=value` apart.
///
/// Source: PostgreSQL docs, libpq-connect, "Connection URIs".
fn parse_uri(uri: &str) -> Result<Vec<(String, String)>, OptionError> {
    // The uri itself is never quoted in a message: it may hold a password.
    let bad = |message: &str| OptionError::invalid("uri", format!("invalid connection URI: {message}"));
    let decode = |text: &str| {
        let decoded = percent_decode_str(text).decode_utf8();
        decoded.map(|t| t.into_owned()).map_err(|_| bad("percent-encoded text is not UTF-8"))
    };
    let rest = ["postgres://", "postgresql://"].iter().find_map(|scheme| uri.strip_prefix(scheme));
    let rest = rest.ok_or_else(|| bad("it must begin with postgres://"))?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
    let mut options = Vec::new();
    let mut add = |name: &str, value: String| {
        if !value.is_empty() {
            options.push((name.to_owned(), value));
        }
    };
    let hosts = match authority.rsplit_once('@') {
        Some((credentials, hosts)) => {
            let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
            add("user", decode(user)?);
            add("password", decode(password)?);
            hosts
        }
        None => authority,
    };
    let mut names = Vec::new();
    let mut ports = Vec::new();
    for host in hosts.split(',').filter(|h| !h.is_empty()) {
        let (name, port) = match host.strip_prefix('[') {
            Some(v6) => {
                let (name, after) = v6.split_once(']').ok_or_else(|| bad("missing \"]\" after an IPv6 address"))?;
                (name, after.strip_prefix(':').unwrap_or(""))
            }
            None => host.split_once(':').unwrap_or((host, "")),
        };
        names.push(decode(name)?);
        ports.push(if port.is_empty() { "5432".to_owned() } else { port.to_owned() });
    }
    add("host", names.join(","));
    if hosts.contains(':') {
        add("port", ports.join(","));
    }
    add("database", decode(database)?);
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or_else(|| bad("missing \"=\" after a parameter's name"))?;
        let name = decode(name)?;
        add(if name == "dbname" { "database" } else { &name }, decode(value)?);
    }
    Ok(options)
}

/// Behind [`crate::Catalog::reseal`]. Dropped mirrors keep copies of their peers' secrets until they are cleaned up.
pub(crate) async fn reseal(client: &mut Client, keyring: &Keyring) -> Result<Vec<String>, Error> {
    let transaction = client.transaction().await?;
    transaction.batch_execute("lock table peergate.peer_secrets, peergate.mirror_drops in exclusive mode").await?;
    let rows = transaction.query("select id, peergate.peer_document(id) from peergate.peers", &[]).await?;
    for row in rows {
        let (id, document): (i64, Value) = (row.get(0), row.get(1));
        let sealed = PeerOptions::from_document(&document, keyring)?.sealed(keyring)?;
        let update = "update peergate.peer_secrets s set sealed = n.value
                      from jsonb_each_text($2) n where s.peer_id = $1 and s.option = n.key";
        transaction.execute(update, &[&id, &sealed]).await?;
    }
    let rows = transaction.query("select mirror_id, source, target from peergate.mirror_drops", &[]).await?;
    for row in rows {
        let (id, mut source, mut target): (i64, Value, Value) = (row.get(0), row.get(1), row.get(2));
        for document in [&mut source, &mut target] {
            document["secrets"] = PeerOptions::from_document(document, keyring)?.sealed(keyring)?;
        }
        let update = "update peergate.mirror_drops set source = $2, target = $3 where mirror_id = $1";
        transaction.execute(update, &[&id, &source, &target]).await?;
    }
    transaction.commit().await?;
    Ok(vec![keyring.current_id()?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(pairs: &[(&str, &str)]) -> Result<GivenPeer, OptionError> {
        GivenPeer::new(pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
    }

    #[test]
    fn secrets_are_kept_apart_and_come_back_for_the_same_destination() {
        let keyring = Keyring::parse(&"ab".repeat(32)).unwrap();
        let peer = given(&[("host", "db1"), ("user", "u"), ("password", "geheim")]).unwrap();
        assert_eq!(peer.options(), serde_json::json!({"host": "db1", "user": "u"}));
        let sealed = peer.sealed(&keyring).unwrap();
        let document = serde_json::json!({"options": peer.options(), "secrets": sealed});
        assert_eq!(PeerOptions::from_document(&document, &keyring).unwrap().get("password"), Some("geheim"));
        let moved = serde_json::json!({"options": {"host": "evil", "user": "u"}, "secrets": sealed});
        assert!(matches!(PeerOptions::from_document(&moved, &keyring), Err(SecretError::WrongDestination)));
    }

    #[test]
    fn a_uri_is_taken_apart_and_overridden() {
        let uri = "postgresql://us%40er:p%3Aw@db1:5433,[::1]/shop?sslmode=require&application_name=x%20y";
        let peer = given(&[("uri", uri), ("sslmode", "disable")]).unwrap();
        assert_eq!(
            peer.options(),
            serde_json::json!({"user": "us@er", "host": "db1,::1", "port": "5433,5432", "database": "shop",
                "sslmode": "disable", "application_name": "x y"})
        );
        assert_eq!(peer.peer_options().get("password"), Some("p:w"));
    }

    #[test]
    fn a_bad_uri_is_refused_without_being_quoted() {
        for uri in ["mysql://u:geheim@h/d", "postgres://u:geheim@[::1/d", "postgres://u:geheim@h/d?x", "u:geheim"] {
            let error = given(&[("uri", uri)]).err().unwrap();
            assert_eq!(error.option.as_deref(), Some("uri"));
            assert!(!error.message.contains("geheim"));
        }
    }

    #[test]
    fn an_option_given_twice_is_an_error() {
        for pairs in [
            [("host", "a"), ("host", "b")],
            [("database", "a"), ("dbname", "b")],
            [("password", "a"), ("password", "b")],
        ] {
            assert_eq!(given(&pairs).err().unwrap().sqlstate, SqlState::SYNTAX_ERROR);
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let options = PeerOptions::plain([("user", "u".to_owned()), ("password", "geheim".to_owned())]);
        assert!(!format!("{options:?}").contains("geheim"));
    }
}
