//! What the catalog was told: its peers, mirrors and alerts, for `peergate dump`. Never a secret.

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
    /// The alerts, by name.
    pub alerts: Vec<Alert>,
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

/// An alert.
#[derive(Clone, Debug)]
pub struct Alert {
    /// Its name.
    pub name: String,
    /// It watches peers, not mirrors.
    pub on_peers: bool,
    /// The one that it watches; `None`: all.
    pub on: Option<String>,
    /// When it fires, as `alert_definitions.conditions` has it.
    pub conditions: Value,
    /// Who is told, as `alert_definitions.channels` has it.
    pub channels: Value,
    /// Names of the channels' options that are sealed, with the channels' numbers, from 1.
    pub secrets: Vec<(usize, String)>,
    /// Its options.
    pub options: BTreeMap<String, String>,
    /// It rests.
    pub disabled: bool,
    /// Its comment.
    pub comment: Option<String>,
}

impl Catalog {
    /// Returns all peers, mirrors and alerts, as one transaction sees them.
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
        let query = "
            select a.name, a.on_kind = 'peer', a.on_name, a.conditions, a.channels, a.options, not a.enabled, a.comment,
                   array(select s.channel from peergate.alert_secrets s where s.alert_id = a.id order by s.channel, s.option),
                   array(select s.option from peergate.alert_secrets s where s.alert_id = a.id order by s.channel, s.option)
            from peergate.alerts a order by a.name collate \"C\"";
        let alerts = transaction.query(query, &[]).await?.into_iter().map(|row| {
            let (channels, options): (Vec<i32>, Vec<String>) = (row.get(8), row.get(9));
            let channels = channels.into_iter().map(|n| usize::try_from(n).unwrap_or_default());
            Alert {
                name: row.get(0),
                on_peers: row.get(1),
                on: row.get(2),
                conditions: row.get(3),
                channels: row.get(4),
                options: strings(&row.get(5)),
                disabled: row.get(6),
                comment: row.get(7),
                secrets: channels.zip(options).collect(),
            }
        });
        let alerts = alerts.collect();
        transaction.commit().await?;
        Ok(Contents { peers, mirrors, alerts })
    }
}

fn strings(options: &Value) -> BTreeMap<String, String> {
    let pairs = options.as_object().into_iter().flatten();
    pairs.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}
