//! A peer's options: as a statement gave them, and as the engine reads them back from the catalog.
//!
//! Which options exist and what they take is the catalog's to say (`peergate.settings`); here they get their meaning.

mod given;
mod password;
mod uri;

use std::collections::BTreeMap;

use pg::SqlState;
use serde_json::{Map, Value};
use tokio_postgres::Client;

use crate::alert::channel;
use crate::secret::{Keyring, SecretError};
use crate::{Error, tls};

pub use given::GivenPeer;

/// Options whose value is sealed. Some of them cannot be used; they are kept from the catalog all the same, which refuses them.
pub const SECRET_OPTIONS: &[&str] =
    &["oauth_client_secret", "password", "scram_client_key", "scram_server_key", "ssh_config", "sslpassword"];

/// Options that hold secrets and are taken apart before anything is stored.
pub const COMPOSITE_OPTIONS: &[&str] = &["client_tls", "uri"];

/// Options that say what the password is; the one that is given last counts.
const PASSWORD_OPTIONS: &[&str] = &["password", "password_env", "password_file"];

/// Returns whether an option's value may be a secret, by its name alone: `sslkey` is a path or the key itself.
pub fn may_be_secret(option: &str) -> bool {
    option == "sslkey" || COMPOSITE_OPTIONS.contains(&option) || SECRET_OPTIONS.contains(&option)
}

/// Returns whether the value of an option is a secret.
fn is_secret(option: &str, value: &str) -> bool {
    SECRET_OPTIONS.contains(&option) || (option == "sslkey" && is_pem(value))
}

/// Returns whether an option that may be a path is the thing itself.
pub(crate) fn is_pem(value: &str) -> bool {
    value.contains("-----BEGIN")
}

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

    /// Reads a peer as [`PeerOptions::from_document`] does, without its secrets.
    pub fn without_secrets(document: &Value, keyring: &Keyring) -> PeerOptions {
        let open = serde_json::json!({"options": document["options"]});
        PeerOptions::from_document(&open, keyring).expect("there is no secret to open")
    }

    /// Seals the secrets anew, for a rotated key: option name → sealed text.
    ///
    /// # Errors
    /// [`SecretError`] if the key cannot be read.
    pub fn sealed(&self, keyring: &Keyring) -> Result<Value, SecretError> {
        seal(&self.options, &self.secrets, keyring)
    }

    /// Returns an option or secret by its name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.options.get(name).or_else(|| self.secrets.get(name)).map(String::as_str)
    }

    /// Returns where the secrets are sent: what they are sealed for.
    pub fn destination(&self) -> String {
        destination(&self.options)
    }

    /// Returns whether secrets that were given for these options may be used with `after`: the same place, protected at least as well,
    /// and trusting the same authorities. As `peergate.secrets_hindrance` in the catalog, which has the last word.
    pub fn secrets_may_stay(&self, after: &PeerOptions) -> bool {
        let before = tls::strength(self);
        self.destination() == after.destination()
            && tls::strength(after) >= before
            && (before < 4
                || ["sslrootcert", "root_ca", "tls_host"].iter().all(|name| self.get(name) == after.get(name)))
    }

    /// Returns whether a boolean option is given as true.
    pub fn flag(&self, name: &str) -> bool {
        self.get(name).is_some_and(is_true)
    }
}

fn is_true(text: &str) -> bool {
    ["true", "on", "yes", "1", "t", "y"].contains(&text.to_lowercase().as_str())
}

/// Seals secrets for where the options say that they are sent: option name → sealed text.
fn seal(
    options: &BTreeMap<String, String>,
    secrets: &BTreeMap<String, String>,
    keyring: &Keyring,
) -> Result<Value, SecretError> {
    let destination = destination(options);
    let seal =
        |(name, secret): (&String, &String)| Ok((name.clone(), Value::String(keyring.seal(&destination, secret)?)));
    Ok(Value::Object(secrets.iter().map(seal).collect::<Result<Map<_, _>, SecretError>>()?))
}

fn is_false(text: &str) -> bool {
    ["false", "off", "no", "0", "f", "n"].contains(&text.to_lowercase().as_str())
}

/// Where the secrets may be sent: what they are sealed for.
fn destination(options: &BTreeMap<String, String>) -> String {
    let part = |name: &str, default: &str| options.get(name).map_or(default, String::as_str).trim().to_owned();
    format!("host={} hostaddr={} port={}", part("host", "localhost"), part("hostaddr", ""), part("port", "5432"))
}

/// Behind [`crate::Catalog::reseal`], for alerts too. Dropped mirrors keep copies of their peers' secrets until they are cleaned up.
pub(crate) async fn reseal(client: &mut Client, keyring: &Keyring) -> Result<Vec<String>, Error> {
    let transaction = client.transaction().await?;
    transaction
        .batch_execute(
            "lock table peergate.peer_secrets, peergate.mirror_drops, peergate.alert_secrets in exclusive mode",
        )
        .await?;
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
    channel::reseal(&transaction, keyring).await?;
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
    fn what_is_taken_apart_excludes_what_it_is_taken_apart_into() {
        let pem = "-----BEGIN CERTIFICATE-----";
        let client_tls = format!(r#"{{"certificate": "{pem}", "private_key": "-----BEGIN KEY----- geheim"}}"#);
        let peer = given(&[("client_tls", &client_tls), ("user", "u")]).unwrap();
        assert_eq!(peer.options(), serde_json::json!({"sslcert": pem, "user": "u"}));
        assert_eq!(peer.peer_options().get("sslkey"), Some("-----BEGIN KEY----- geheim"));
        assert_eq!(given(&[("sslkey", "/a/path")]).unwrap().options(), serde_json::json!({"sslkey": "/a/path"}));
        for pairs in [
            [("client_tls", client_tls.as_str()), ("sslkey", "/a/path")],
            [("password", "a"), ("password_env", "A")],
            [("password_file", "a"), ("password_env", "A")],
        ] {
            assert_eq!(given(&pairs).err().unwrap().sqlstate, SqlState::SYNTAX_ERROR);
        }
        let broken = given(&[("client_tls", "geheim")]).err().unwrap();
        assert!(!broken.message.contains("geheim"));
        // What is given beside the uri counts, whichever way it says it.
        let both = given(&[("uri", "postgres://u:p@h/d"), ("password_file", "/f")]).unwrap();
        assert_eq!(both.peer_options().get("password"), None);
    }

    #[test]
    fn a_change_keeps_what_it_leaves_out() {
        let keyring = Keyring::parse(&"ab".repeat(32)).unwrap();
        let before = given(&[("host", "a"), ("password", "p"), ("sslmode", "require"), ("options", "-c x=1")]).unwrap();
        let document = serde_json::json!({"options": before.options(), "secrets": before.sealed(&keyring).unwrap()});
        let peer = PeerOptions::from_document(&document, &keyring).unwrap();
        let change = given(&[("password", "p"), ("port", "1")]).unwrap();
        let moved = change.over(&peer, &["options".to_owned()]);
        assert_eq!((moved.get("host"), moved.get("port"), moved.get("options")), (Some("a"), Some("1"), None));
        assert!(!peer.secrets_may_stay(&moved));
        assert_ne!(change.sealed_over(&moved, &document, &keyring).unwrap(), document["secrets"]);
        let same = given(&[("password", "p"), ("sslmode", "verify-full")]).unwrap();
        let stronger = same.over(&peer, &[]);
        assert!(peer.secrets_may_stay(&stronger) && !stronger.secrets_may_stay(&peer));
        assert_eq!(same.sealed_over(&stronger, &document, &keyring).unwrap(), document["secrets"]);
        let outside = given(&[("password_env", "P")]).unwrap().over(&peer, &[]);
        assert_eq!((outside.get("password"), outside.get("password_env")), (None, Some("P")));
    }

    #[test]
    fn debug_shows_no_secret() {
        let options = PeerOptions::plain([("user", "u".to_owned()), ("password", "geheim".to_owned())]);
        assert!(!format!("{options:?}").contains("geheim"));
    }
}
