//! A peer's options as a statement gives them.

use std::collections::BTreeMap;

use pg::SqlState;
use serde_json::Value;

use super::uri::parse_uri;
use super::{OptionError, PASSWORD_OPTIONS, PeerOptions, is_false, is_pem, is_secret, seal};
use crate::secret::{Keyring, SecretError};

/// The options of a CREATE PEER or ALTER PEER, with the secrets told apart.
#[derive(Clone)]
pub struct GivenPeer {
    options: BTreeMap<String, String>,
    secrets: BTreeMap<String, String>,
}

impl GivenPeer {
    /// Sorts the options of a statement, in the order given. `uri` and `client_tls` are taken apart into options that the others
    /// override.
    ///
    /// Options that nobody knows stay among the options, for the catalog to refuse.
    ///
    /// # Errors
    /// [`OptionError`] if an option is given twice, two of them contradict each other, or one that is taken apart cannot be read.
    pub fn new(given: Vec<(String, String)>) -> Result<GivenPeer, OptionError> {
        let mut peer = GivenPeer { options: BTreeMap::new(), secrets: BTreeMap::new() };
        let (mut uri, mut client_tls) = (None, None);
        for (name, value) in given {
            let name = if name == "dbname" { "database".to_owned() } else { name };
            let taken_apart = match name.as_str() {
                "uri" => Some(&mut uri),
                "client_tls" => Some(&mut client_tls),
                _ => None,
            };
            if peer.has(&name) || taken_apart.as_ref().is_some_and(|option| option.is_some()) {
                return Err(OptionError::contradiction(&name, format!("option \"{name}\" provided more than once")));
            }
            match taken_apart {
                Some(option) => *option = Some(value),
                None => peer.set(name, value),
            }
        }
        let mut password = PASSWORD_OPTIONS.iter().filter(|name| peer.has(name));
        if let (Some(first), Some(second)) = (password.next(), password.next()) {
            let message = format!("options \"{first}\" and \"{second}\" exclude each other");
            return Err(OptionError::contradiction(second, message));
        }
        if let Some(text) = client_tls {
            let (certificate, key) = parse_client_tls(&text)?;
            for (name, value) in [("sslcert", certificate), ("sslkey", key)] {
                if peer.has(name) {
                    let message = format!("options \"client_tls\" and \"{name}\" exclude each other");
                    return Err(OptionError::contradiction(name, message));
                }
                peer.set(name.to_owned(), value);
            }
        }
        let names_password = PASSWORD_OPTIONS.iter().any(|name| peer.has(name));
        for (name, value) in uri.as_deref().map(parse_uri).transpose()?.unwrap_or_default() {
            if !(peer.has(&name) || name == "password" && names_password) {
                peer.set(name, value);
            }
        }
        Ok(peer)
    }

    fn has(&self, name: &str) -> bool {
        self.options.contains_key(name) || self.secrets.contains_key(name)
    }

    fn set(&mut self, name: String, value: String) {
        if is_secret(&name, &value) {
            self.secrets.insert(name, value);
        } else {
            self.options.insert(name, value);
        }
    }

    /// Returns what was given beside the secrets.
    pub fn options(&self) -> Value {
        Value::Object(self.options.iter().map(|(k, v)| (k.clone(), Value::String(v.clone()))).collect())
    }

    /// Returns the secrets, sealed for this peer's host and port: option name → sealed text.
    ///
    /// # Errors
    /// [`SecretError`] if the key cannot be read.
    pub fn sealed(&self, keyring: &Keyring) -> Result<Value, SecretError> {
        seal(&self.options, &self.secrets, keyring)
    }

    /// Returns the secrets, sealed for where `whole` says that they are sent. One that the peer has already, for the same place, keeps
    /// its sealed text, as `document` has it: so the catalog sees that nothing was changed.
    ///
    /// # Errors
    /// [`SecretError`] if the key cannot be read.
    pub fn sealed_over(&self, whole: &PeerOptions, document: &Value, keyring: &Keyring) -> Result<Value, SecretError> {
        let mut sealed = seal(&whole.options, &self.secrets, keyring)?;
        let destination = whole.destination();
        for (name, secret) in &self.secrets {
            let before = document["secrets"][name].as_str();
            let opened = before.and_then(|text| keyring.open(&destination, text).ok());
            if let (Some(text), true) = (before, opened.as_ref() == Some(secret)) {
                sealed[name] = Value::String(text.to_owned());
            }
        }
        Ok(sealed)
    }

    /// Returns whether the peer is to be connected to before it is stored.
    pub fn validate(&self) -> bool {
        !self.options.get("validate").is_some_and(|v| is_false(v))
    }

    /// Returns whether a secret is among what was given.
    pub fn has_secrets(&self) -> bool {
        !self.secrets.is_empty()
    }

    /// Returns the options with which to connect.
    pub fn peer_options(&self) -> PeerOptions {
        PeerOptions { options: self.options.clone(), secrets: self.secrets.clone() }
    }

    /// Returns the options with which to connect when these are added to what a peer has and `reset` are taken away; what says the
    /// same in another way goes.
    pub fn over(&self, peer: &PeerOptions, reset: &[String]) -> PeerOptions {
        let mut whole = peer.clone();
        let reset = reset.iter().map(|name| if name == "dbname" { "database" } else { name });
        for name in reset.chain(self.names()) {
            let same = if PASSWORD_OPTIONS.contains(&name) { PASSWORD_OPTIONS } else { &[name][..] };
            for name in same {
                whole.options.remove(*name);
                whole.secrets.remove(*name);
            }
        }
        whole.options.extend(self.options.clone());
        whole.secrets.extend(self.secrets.clone());
        whole
    }

    /// Returns the options with which to connect when these take the place of what a peer has. Secrets that are left out stay.
    pub fn replacing(&self, peer: &PeerOptions) -> PeerOptions {
        let secrets = PeerOptions { options: BTreeMap::new(), secrets: peer.secrets.clone() };
        self.over(&secrets, &[])
    }

    /// Returns whether `whole` has a secret, or a reference to one, that was not given here.
    pub fn leaves_secrets_of(&self, whole: &PeerOptions) -> bool {
        let is_left = |name: &str| !self.has(name);
        whole.secrets.keys().any(|name| is_left(name)) || whole.references().any(is_left)
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.options.keys().chain(self.secrets.keys()).map(String::as_str)
    }
}

/// Takes PeerDB's `{"certificate": …, "private_key": …}` apart.
fn parse_client_tls(text: &str) -> Result<(String, String), OptionError> {
    // Never quoted in a message: it holds a key.
    let bad =
        |what: &str| OptionError::invalid("client_tls", format!("invalid value for option \"client_tls\": {what}"));
    let value: Value = serde_json::from_str(text).map_err(|_| bad("it must be JSON"))?;
    let part = |name: &str| {
        let text = value.get(name).and_then(Value::as_str).filter(|text| is_pem(text));
        text.map(str::to_owned).ok_or_else(|| bad(&format!("\"{name}\" must be PEM text")))
    };
    Ok((part("certificate")?, part("private_key")?))
}

impl OptionError {
    fn contradiction(option: &str, message: String) -> OptionError {
        OptionError { sqlstate: SqlState::SYNTAX_ERROR, ..OptionError::invalid(option, message) }
    }
}
