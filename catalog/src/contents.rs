//! What the catalog was told: its peers and mirrors, for `peergate dump`. Never a secret.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{Catalog, Error};

/// All that statements have put into the catalog.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// The peers, by name.
    pub peers: Vec<Peer>,
    /// The mirrors, in the order of their creation.
    pub mirrors: Vec<Mirror>,
}

/// A peer.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// Its options.
    pub options: BTreeMap<String, String>,
    /// Names of the options that are sealed.
    pub secrets: Vec<String>,
    /// The role that owns it.
    pub owner: String,
    /// Its comment.
    pub comment: Option<String>,
    /// The roles that have USAGE; `public` is all of them.
    pub grantees: Vec<String>,
}

/// A mirror.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// Its name.
    pub name: String,
    /// The peer it reads from.
    pub source: String,
    /// The peer it writes to.
    pub target: String,
    /// Which tables, as `mirror_definitions.selection` has it.
    pub selection: Value,
    /// Its options.
    pub options: BTreeMap<String, String>,
    /// It is to rest.
    pub paused: bool,
    /// Its comment.
    pub comment: Option<String>,
}

impl Catalog {
    /// Returns all peers and mirrors, as one transaction sees them.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn contents(&self) -> Result<Contents, Error> {
        let mut client = self.client().await?;
        let transaction =
            client.build_transaction().isolation_level(tokio_postgres::IsolationLevel::RepeatableRead).read_only(true);
        let transaction = transaction.start().await?;
        let query = "
            select p.name, p.type, p.options, p.owner, p.comment,
                   array(select s.option from peergate.peer_secrets s where s.peer_id = p.id order by 1),
                   array(select case v.grantee when 0 then 'public' else g.rolname::text end
                         from peergate.peer_privileges v left join pg_roles g on g.oid = v.grantee
                         where v.peer_id = p.id and (v.grantee = 0 or g.oid is not null) order by 1)
            from peergate.peers p order by p.name collate \"C\"";
        let peers = transaction.query(query, &[]).await?.into_iter().map(|row| Peer {
            name: row.get(0),
            kind: row.get(1),
            options: strings(&row.get(2)),
            owner: row.get(3),
            comment: row.get(4),
            secrets: row.get(5),
            grantees: row.get(6),
        });
        let peers = peers.collect();
        let query = "select name, source, target, selection, options, desired_state = 'paused', comment from peergate.mirrors order by id";
        let mirrors = transaction.query(query, &[]).await?.into_iter().map(|row| Mirror {
            name: row.get(0),
            source: row.get(1),
            target: row.get(2),
            selection: row.get(3),
            options: strings(&row.get(4)),
            paused: row.get(5),
            comment: row.get(6),
        });
        let mirrors = mirrors.collect();
        transaction.commit().await?;
        Ok(Contents { peers, mirrors })
    }
}

fn strings(options: &Value) -> BTreeMap<String, String> {
    let pairs = options.as_object().into_iter().flatten();
    pairs.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}
