//! Sealing and opening of peers' secrets.
//!
//! A secret is sealed for one destination (the host and port it may be sent to): options that were changed behind our back to
//! point elsewhere make it unreadable, so that it never travels to a place its owner did not name.

use std::fmt;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use sha2::{Digest, Sha256};

const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;

/// A key or a sealed secret could not be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The key's text is not 32 bytes in base64 or hexadecimal.
    #[error("a key must be 32 bytes in base64 or hexadecimal")]
    BadKey,
    /// There is a key file, but no key in it.
    #[error("key file {0} holds no key")]
    NoKey(PathBuf),
    /// The key file cannot be read or written.
    #[error("key file {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The text is not a sealed secret.
    #[error("malformed sealed secret")]
    Malformed,
    /// It was sealed with a key that we do not have.
    #[error("secret is sealed with key {0}, which is not in the keyring")]
    UnknownKey(String),
    /// The ciphertext was altered, or the secret was sealed for another destination.
    #[error("secret was not sealed for this host and port")]
    WrongDestination,
    /// The key comes from the environment, which this process cannot change.
    #[error("the key is given by PEERGATE_KEY: put the new key before the old one, separated by a comma")]
    NotAFile,
}

/// One key, and the short name by which sealed secrets refer to it.
#[derive(Clone)]
struct Key {
    id: String,
    bytes: [u8; KEY_BYTES],
}

impl Key {
    fn new(bytes: [u8; KEY_BYTES]) -> Key {
        let digest = Sha256::digest(bytes);
        Key { id: digest[..4].iter().map(|b| format!("{b:02x}")).collect(), bytes }
    }

    fn parse(text: &str) -> Result<Key, SecretError> {
        let bytes = if text.len() == 2 * KEY_BYTES && text.bytes().all(|b| b.is_ascii_hexdigit()) {
            (0..KEY_BYTES).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16)).collect::<Result<Vec<u8>, _>>().ok()
        } else {
            BASE64_STANDARD.decode(text).ok()
        };
        bytes.and_then(|b| b.try_into().ok()).map(Key::new).ok_or(SecretError::BadKey)
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new(&self.bytes.into())
    }
}

/// The keys of this installation: the first seals, all of them open.
///
/// Kept in a file, it is read again for each use, so that a rotated key is taken up by running processes at once.
#[derive(Clone)]
pub struct Keyring {
    keys: Keys,
}

#[derive(Clone)]
enum Keys {
    Given(Vec<Key>),
    File(PathBuf),
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keyring")
    }
}

impl Keyring {
    /// Takes the keys from `text`: one, or several separated by commas, the newest first.
    ///
    /// # Errors
    /// [`SecretError::BadKey`] if one of them is not a key.
    pub fn parse(text: &str) -> Result<Keyring, SecretError> {
        let keys = text.split([',', '\n']).map(str::trim).filter(|k| !k.is_empty()).map(Key::parse);
        let keys = keys.collect::<Result<Vec<Key>, _>>()?;
        if keys.is_empty() { Err(SecretError::BadKey) } else { Ok(Keyring { keys: Keys::Given(keys) }) }
    }

    /// Takes the keys from a file, one a line, the newest first; makes the file (mode 0600) with a new key if it is missing.
    ///
    /// # Errors
    /// [`SecretError::File`] if the file cannot be read or made, [`SecretError::BadKey`] if it does not hold keys.
    pub fn open_file(path: &Path) -> Result<Keyring, SecretError> {
        if !path.exists() {
            write_keys(path, &[new_key()])?;
        }
        let keyring = Keyring { keys: Keys::File(path.to_owned()) };
        keyring.load()?;
        Ok(keyring)
    }

    /// Puts a new key in front of the file's keys, so that it seals from now on; the others still open.
    /// Keys that are not in `in_use` (ids) are forgotten.
    ///
    /// # Errors
    /// [`SecretError::NotAFile`] if the key was given in the environment; [`SecretError::File`] if the file cannot be written.
    pub fn rotate(&self, in_use: &[String]) -> Result<(), SecretError> {
        let Keys::File(path) = &self.keys else { return Err(SecretError::NotAFile) };
        let mut keys = self.load()?;
        keys.retain(|k| in_use.contains(&k.id));
        keys.insert(0, new_key());
        write_keys(path, &keys)
    }

    /// Returns the id of the key that seals.
    ///
    /// # Errors
    /// As [`Keyring::open_file`].
    pub fn current_id(&self) -> Result<String, SecretError> {
        Ok(self.load()?[0].id.clone())
    }

    /// Seals `secret` so that it opens only for `destination`. The result is text without quotes or backslashes.
    ///
    /// # Errors
    /// As [`Keyring::open_file`].
    pub fn seal(&self, destination: &str, secret: &str) -> Result<String, SecretError> {
        let key = &self.load()?[0];
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let payload = Payload { msg: secret.as_bytes(), aad: destination.as_bytes() };
        let sealed = key.cipher().encrypt(&XNonce::from(nonce), payload).expect("the plaintext is far below the limit");
        let mut bytes = nonce.to_vec();
        bytes.extend_from_slice(&sealed);
        Ok(format!("v1.{}.{}", key.id, BASE64_STANDARD.encode(bytes)))
    }

    /// Opens what [`Keyring::seal`] sealed for the same destination.
    ///
    /// # Errors
    /// [`SecretError::UnknownKey`], [`SecretError::WrongDestination`] or [`SecretError::Malformed`].
    pub fn open(&self, destination: &str, sealed: &str) -> Result<String, SecretError> {
        let mut parts = sealed.splitn(3, '.');
        let (Some("v1"), Some(id), Some(text)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(SecretError::Malformed);
        };
        let bytes = BASE64_STANDARD.decode(text).map_err(|_| SecretError::Malformed)?;
        let (nonce, ciphertext) = bytes.split_at_checked(NONCE_BYTES).ok_or(SecretError::Malformed)?;
        let nonce: [u8; NONCE_BYTES] = nonce.try_into().expect("split at that length");
        let keys = self.load()?;
        let key = keys.iter().find(|k| k.id == id).ok_or_else(|| SecretError::UnknownKey(id.to_owned()))?;
        let payload = Payload { msg: ciphertext, aad: destination.as_bytes() };
        let opened = key.cipher().decrypt(&XNonce::from(nonce), payload).map_err(|_| SecretError::WrongDestination)?;
        String::from_utf8(opened).map_err(|_| SecretError::Malformed)
    }

    fn load(&self) -> Result<Vec<Key>, SecretError> {
        match &self.keys {
            Keys::Given(keys) => Ok(keys.clone()),
            Keys::File(path) => {
                let text = std::fs::read_to_string(path).map_err(|source| file_error(path, source))?;
                let keys = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(Key::parse);
                let keys = keys.collect::<Result<Vec<Key>, _>>()?;
                if keys.is_empty() { Err(SecretError::NoKey(path.clone())) } else { Ok(keys) }
            }
        }
    }
}

fn new_key() -> Key {
    Key::new(rand::random())
}

fn file_error(path: &Path, source: io::Error) -> SecretError {
    SecretError::File { path: path.to_owned(), source }
}

/// Replaces the file as a whole, so that a crash leaves the old keys or the new ones.
fn write_keys(path: &Path, keys: &[Key]) -> Result<(), SecretError> {
    use std::io::Write;
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let _ = std::fs::remove_file(&temporary);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        for key in keys {
            writeln!(file, "{}", BASE64_STANDARD.encode(key.bytes))?;
        }
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|source| file_error(path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(byte: u8) -> Keyring {
        Keyring::parse(&BASE64_STANDARD.encode([byte; 32])).unwrap()
    }

    #[test]
    fn a_secret_opens_for_its_destination_only() {
        let sealed = ring(1).seal("db1:5432", "it's \\ secret").unwrap();
        assert_eq!(ring(1).open("db1:5432", &sealed).unwrap(), "it's \\ secret");
        assert!(matches!(ring(1).open("evil:5432", &sealed), Err(SecretError::WrongDestination)));
        assert!(matches!(ring(2).open("db1:5432", &sealed), Err(SecretError::UnknownKey(_))));
        assert!(!sealed.contains("secret"));
    }

    #[test]
    fn the_same_secret_never_seals_to_the_same_text() {
        assert_ne!(ring(1).seal("d", "s").unwrap(), ring(1).seal("d", "s").unwrap());
    }

    #[test]
    fn altered_or_foreign_text_is_an_error() {
        let sealed = ring(1).seal("d", "s").unwrap();
        for text in ["", "v1", "v2.x.y", "v1..", "v1.00000000.AAAA", &sealed[..sealed.len() - 4], "v1.é.é"] {
            assert!(ring(1).open("d", text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_rotated_file_seals_with_the_new_key_and_opens_with_both() {
        let path = std::env::temp_dir().join(format!("peergate-key-{}-{}", std::process::id(), rand::random::<u32>()));
        let keyring = Keyring::open_file(&path).unwrap();
        let old = keyring.current_id().unwrap();
        let sealed = keyring.seal("d", "s").unwrap();
        keyring.rotate(std::slice::from_ref(&old)).unwrap();
        assert_ne!(keyring.current_id().unwrap(), old);
        assert_eq!(keyring.open("d", &sealed).unwrap(), "s");
        keyring.rotate(&[]).unwrap();
        assert!(matches!(keyring.open("d", &sealed), Err(SecretError::UnknownKey(_))));
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn keys_are_base64_or_hexadecimal() {
        assert!(Keyring::parse(&"ab".repeat(32)).is_ok());
        for text in ["", "short", &"zz".repeat(32)] {
            assert!(Keyring::parse(text).is_err());
        }
    }
}
