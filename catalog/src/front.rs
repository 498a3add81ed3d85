//! What the gateway itself asks of the catalog, beside the sessions that it relays.

use std::collections::HashMap;

use serde_json::Value;

use crate::peer::PeerOptions;
use crate::secret::SecretError;
use crate::{CHANNEL, Catalog, Error};

/// What a database's name means beside the databases that there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerNames {
    /// There is a peer of that name.
    pub is_peer: bool,
    /// The peers that the role may have sessions on, quoted where SQL needs it; the first 20.
    pub usable: Vec<String>,
}

/// A peer, and whether a role may have sessions on it.
#[derive(Debug)]
pub struct PeerAccess {
    /// Its name.
    pub name: String,
    /// The role that owns it.
    pub owner: String,
    /// The role has USAGE on it.
    pub allowed: bool,
    /// How to connect to it; an error if its secrets cannot be opened.
    pub options: Result<PeerOptions, SecretError>,
}

/// The payload of the notification that peers were made, changed or dropped.
pub const PEERS_CHANGED: &str = "peers";

/// A peer for a session that is kept.
#[derive(Debug)]
pub struct PeerLink {
    /// The peer.
    pub peer: PeerAccess,
    /// Another value when its options have changed, as `peergate.peer_version` has it.
    pub version: String,
}

/// What a gateway knows of a peer, to find its tables in texts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerEntry {
    /// Its tables are being brought in for the first time.
    pub importing: bool,
    /// Its schemas that have foreign tables.
    pub schemas: HashMap<String, PeerSchema>,
}

/// A schema of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSchema {
    /// The schema of the catalog that holds its tables.
    pub local: String,
    /// There is a table of that name in the peer's schema `public`, too.
    pub is_table: bool,
}

/// What would become of a statement about a peer, as far as it can be told without running it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prospects {
    /// The role may run it.
    pub allowed: bool,
    /// The role may have files and environment variables of the server read.
    pub reads_files: bool,
    /// The peer of that name, as `peergate.peer_document` has it; `None` if there is none.
    pub peer: Option<Value>,
}

impl Catalog {
    /// Tells whether `role` may call `routine` about the peer of that name, and what there is of that name. An owner may change a peer, and
    /// whoever may use one may have it looked at.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked, or the role is not there.
    pub async fn peer_prospects(&self, role: &str, routine: &str, peer: &str) -> Result<Prospects, Error> {
        let sql = "select has_schema_privilege($1, 'peergate', 'usage') and has_function_privilege($1, f.oid, 'execute')
                          and (p.id is null or peergate.owns_peer($1, p.id) or $2 = 'validate_peer' and peergate.may_validate_peer($1, p.id)),
                          peergate.peer_document(p.id), peergate.may_read_server_files($1)
                   from pg_proc f left join peergate.peers p on p.name = $3
                   where f.pronamespace = 'peergate'::regnamespace and f.proname = $2";
        let row = self.client().await?.query_one(sql, &[&role, &routine, &peer]).await?;
        Ok(Prospects { allowed: row.get(0), peer: row.get(1), reads_files: row.get(2) })
    }

    /// Tells whether there is a peer named `database`, and which ones `role` may have sessions on. A role that does not exist may none.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked.
    pub async fn peer_names(&self, role: &str, database: &str) -> Result<PeerNames, Error> {
        let sql = "select exists (select from peergate.peers where name = $2), array(select quote_ident(p.name) \
                   from peergate.peers p where peergate.may_use_peer($1, p.id) order by p.name limit 20)";
        let row = self.client().await?.query_one(sql, &[&role, &database]).await?;
        Ok(PeerNames { is_peer: row.get(0), usable: row.get(1) })
    }

    /// Returns a peer with what is needed to connect to it, for a session of `role`; `None` if there is no such peer.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked.
    pub async fn peer_access(&self, role: &str, peer: &str) -> Result<Option<PeerAccess>, Error> {
        let sql = "select owner, peergate.may_use_peer($1, id), peergate.peer_document(id) from peergate.peers where name = $2";
        let row = self.client().await?.query_opt(sql, &[&role, &peer]).await?;
        Ok(row.map(|row| PeerAccess {
            name: peer.to_owned(),
            owner: row.get(0),
            allowed: row.get(1),
            options: PeerOptions::from_document(&row.get::<_, Value>(2), self.keyring()),
        }))
    }

    /// As [`Catalog::peer_access`], with the peer's version.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked.
    pub async fn peer_link(&self, role: &str, peer: &str) -> Result<Option<PeerLink>, Error> {
        let sql = "select owner, peergate.may_use_peer($1, id), peergate.peer_document(id), peergate.peer_version(id) \
                   from peergate.peers where name = $2";
        let row = self.client().await?.query_opt(sql, &[&role, &peer]).await?;
        Ok(row.map(|row| PeerLink {
            peer: PeerAccess {
                name: peer.to_owned(),
                owner: row.get(0),
                allowed: row.get(1),
                options: PeerOptions::from_document(&row.get::<_, Value>(2), self.keyring()),
            },
            version: row.get(3),
        }))
    }

    /// Returns all peers by name, and what stands for their schemas in the catalog.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked.
    pub async fn peer_directory(&self) -> Result<Vec<(String, PeerEntry)>, Error> {
        let sql = "select p.name, r.state in ('pending', 'running') and r.ended_at is null, s.remote_schema, s.local_schema, \
                          exists (select from peergate.peer_objects o where o.peer_id = p.id and o.remote_schema = 'public' \
                                  and o.kind = 'table' and o.name = s.remote_schema) \
                   from peergate.peers p left join peergate.peer_import_runs r on r.peer_id = p.id \
                   left join peergate.peer_schemas s on s.peer_id = p.id order by p.name";
        let mut peers: Vec<(String, PeerEntry)> = Vec::new();
        for row in self.client().await?.query(sql, &[]).await? {
            let name: String = row.get(0);
            if peers.last().is_none_or(|(last, _)| *last != name) {
                let importing = row.get::<_, Option<bool>>(1).unwrap_or(false);
                peers.push((name, PeerEntry { importing, ..PeerEntry::default() }));
            }
            if let (Some((_, peer)), Some(remote)) = (peers.last_mut(), row.get::<_, Option<String>>(2)) {
                peer.schemas.insert(remote, PeerSchema { local: row.get(3), is_table: row.get(4) });
            }
        }
        Ok(peers)
    }

    /// Tells the engines that somebody waits for a mirror, so that they ask the source for its position at once. Nothing depends
    /// on it but the time.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked.
    pub async fn announce_wait(&self, mirror: &str) -> Result<(), Error> {
        self.client().await?.execute("select pg_notify($1, $2)", &[&CHANNEL, &format!("wait:{mirror}")]).await?;
        Ok(())
    }
}
