//! The peers by name, as the gateway knows them: whether a text could mean one is asked of every text of every session, and must
//! cost next to nothing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use aho_corasick::AhoCorasick;
pub use catalog::front::{PeerEntry, PeerSchema};
use catalog::{Catalog, Error};

/// How often the catalog is asked without having said that something changed.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// The peers at one time.
#[derive(Debug, Default)]
pub struct Peers {
    peers: HashMap<String, PeerEntry>,
    /// Finds what could be a name; `None` when there is no peer.
    finder: Option<AhoCorasick>,
    /// A name that cannot be looked for: every text could mean it.
    anywhere: bool,
}

impl Peers {
    /// Takes the names.
    pub fn new(names: impl IntoIterator<Item = String>) -> Peers {
        Peers::with(names.into_iter().map(|name| (name, PeerEntry::default())))
    }

    /// Takes the names, and what is known of each.
    pub fn with(peers: impl IntoIterator<Item = (String, PeerEntry)>) -> Peers {
        let peers: HashMap<String, PeerEntry> = peers.into_iter().collect();
        // In another encoding than UTF-8 only the ASCII part of a name looks the same, and a quote in it is doubled.
        let part = |name: &String| -> String {
            let parts = name.split(|c: char| !c.is_ascii() || c == '"');
            parts.max_by_key(|part| part.len()).unwrap_or_default().to_owned()
        };
        let parts: Vec<String> = peers.keys().map(part).collect();
        let anywhere = parts.iter().any(String::is_empty);
        let finder = (!parts.is_empty() && !anywhere)
            .then(|| AhoCorasick::builder().ascii_case_insensitive(true).build(&parts).ok())
            .flatten();
        // A finder that cannot be built (of gigabytes of names) finds everything.
        Peers { anywhere: !peers.is_empty() && finder.is_none(), peers, finder }
    }

    /// Returns whether a text could name a peer: a cheap look that has false alarms but misses none.
    #[inline]
    pub fn may_be_in(&self, text: &[u8]) -> bool {
        self.anywhere || self.finder.as_ref().is_some_and(|finder| finder.is_match(text))
    }

    /// Returns whether the tables of some peer are being brought in.
    pub fn is_importing(&self) -> bool {
        self.peers.values().any(|peer| peer.importing)
    }

    /// Returns the peer of that name.
    pub fn get(&self, name: &str) -> Option<&PeerEntry> {
        self.peers.get(name)
    }
}

/// The peers as they are now, as far as the gateway has heard.
pub(crate) struct Directory {
    catalog: Catalog,
    current: RwLock<Arc<Peers>>,
    version: AtomicU64,
}

impl Directory {
    /// Knows nothing yet; its version is 0 until it does.
    pub(crate) fn new(catalog: Catalog) -> Directory {
        Directory { catalog, current: RwLock::default(), version: AtomicU64::new(0) }
    }

    /// Counts the changes, so that a session can tell without a lock whether what it has is still so.
    pub(crate) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Returns the peers.
    pub(crate) fn current(&self) -> Arc<Peers> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks the catalog.
    ///
    /// # Errors
    /// [`Error`] if it cannot be asked; then what was known stays.
    pub(crate) async fn refresh(&self) -> Result<(), Error> {
        let peers = Peers::with(self.catalog.peer_directory().await?);
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if self.version() == 0 || current.peers != peers.peers {
            *current = Arc::new(peers);
            self.version.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Keeps it up to date, for ever.
    pub(crate) async fn follow(&self) {
        let mut notifications = None;
        loop {
            if notifications.is_none() {
                notifications = self.catalog.listen().await.ok();
            }
            if let Err(error) = self.refresh().await {
                tracing::debug!(error = %error, "cannot ask the catalog for its peers");
            }
            let notified = async {
                loop {
                    match &mut notifications {
                        None => std::future::pending::<()>().await,
                        Some(receiver) => match receiver.recv().await {
                            Some(payload) if payload == catalog::front::PEERS_CHANGED => return,
                            Some(_) => {}
                            None => {
                                notifications = None;
                                return;
                            }
                        },
                    }
                }
            };
            let _ = tokio::time::timeout(POLL_INTERVAL, notified).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_without_a_name_is_not_looked_at() {
        assert!(!Peers::default().may_be_in(b"select * from shop.public.t"));
        let peers = Peers::new(["shop".to_owned(), "odd\"name".to_owned()]);
        assert!(peers.may_be_in(b"select * from SHOP.public.t") && peers.may_be_in(b"table \"odd\"\"name\".a.b"));
        assert!(!peers.may_be_in(b"select * from accounts"));
        assert!(peers.get("shop").is_some() && peers.get("SHOP").is_none());
        // Latin-1 writes it otherwise.
        assert!(Peers::new(["größe".to_owned()]).may_be_in(b"table gr\xf6\xdfe.a.b"));
        assert!(Peers::new(["é".to_owned()]).may_be_in(b"anything"));
    }
}
