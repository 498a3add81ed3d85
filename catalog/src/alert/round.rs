//! One look at the alerts: what is due is locked, decided on, and written, in one transaction. So of several processes one looks at an
//! alert at a time, and the next goes by what it wrote: what has fired does not fire again.

use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio_postgres::{Row, Transaction};

use super::{Alert, Condition, Event, EventKind, Firing, Sample, Standing};
use crate::{Catalog, Error};

/// An alert with all that is known of what it watches.
#[derive(Clone, Debug)]
pub struct Look {
    /// The alert.
    pub alert: Alert,
    /// What it knew.
    pub standings: Vec<Standing>,
    /// The mirrors or peers that it watches.
    pub samples: Vec<Sample>,
    /// When.
    pub now: f64,
}

/// What follows for one mirror or peer.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// The mirror's or peer's number.
    pub subject_id: i64,
    /// Its name.
    pub subject: String,
    /// What is known of it from now on; `None`: nothing.
    pub standing: Option<Standing>,
    /// What there is to tell.
    pub event: Option<Event>,
}

/// How mirrors stand. The lag of one that does not stream is what it was, and the time since.
const MIRRORS: &str = "
    select d.id, d.name, r.state,
           case when r.applied_lsn is not null then greatest(r.source_lsn - r.applied_lsn, 0)::float8 end,
           case when r.applied_lsn is null then null
                when r.state in ('catchup', 'running', 'completed') then r.lag_seconds
                else coalesce(r.lag_seconds, 0) + greatest(extract(epoch from clock_timestamp() - r.source_lsn_at), 0)::float8 end,
           r.slot_wal_bytes::float8,
           (case when r.error_sqlstate is null then 0 else greatest(r.attempt, 1) end + b.blocked)::float8,
           (coalesce(r.error_sqlstate like '23%', false)::integer + b.conflicts)::float8,
           q.unreachable,
           coalesce(r.error_message, b.message, q.error)
    from peergate.mirror_definitions d
    join peergate.mirror_runtime r on r.mirror_id = d.id
    cross join lateral (
        select count(*) as blocked, count(*) filter (where t.error_sqlstate like '23%') as conflicts, min(t.error_message) as message
        from peergate.mirror_table_runtime t where t.mirror_id = d.id and t.state = 'blocked') b
    cross join lateral (
        select max(extract(epoch from clock_timestamp() - coalesce(h.unreachable_since, clock_timestamp())))::float8 as unreachable,
               min(h.error) filter (where h.unreachable_since is not null) as error
        from peergate.peer_reachability h
        where h.peer_id in (d.source_id, d.target_id) and (h.reached_at is not null or h.unreachable_since is not null)
          and h.checked_at > clock_timestamp() - interval '2 minutes') q
    where d.id = any ($1) or $2
    order by d.id";

const PEERS: &str = "
    select p.id, p.name, null::text, null::float8, null::float8,
           (select max(r.slot_wal_bytes)::float8 from peergate.mirror_definitions d join peergate.mirror_runtime r on r.mirror_id = d.id where d.source_id = p.id),
           null::float8, null::float8,
           case when h.reached_at is not null or h.unreachable_since is not null
                then extract(epoch from clock_timestamp() - coalesce(h.unreachable_since, clock_timestamp()))::float8 end,
           h.error
    from peergate.peers p
    left join peergate.peer_reachability h on h.peer_id = p.id and h.checked_at > clock_timestamp() - interval '2 minutes'
    where p.id = any ($1) or $2
    order by p.id";

impl Catalog {
    /// Looks at all alerts that nobody has looked at for `interval`, and writes what `decide` says; returns how many there were.
    ///
    /// Nothing of what is decided is written unless all of it is.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached, or holds a condition of a newer version.
    pub async fn look_at_alerts(
        &self,
        node_id: &str,
        interval: Duration,
        decide: impl Fn(&Look) -> Vec<Decision> + Send,
    ) -> Result<usize, Error> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let due = due(&transaction, interval).await?;
        if due.is_empty() {
            return Ok(0);
        }
        // A statement of its own: what another process has just written of these alerts is seen by it.
        let looks = looks(&transaction, &due).await?;
        for look in &looks {
            for decision in decide(look) {
                write(&transaction, look.alert.id, node_id, &decision).await?;
            }
        }
        let statement = "update peergate.alert_runtime set evaluated_at = clock_timestamp(), node_id = $2 where alert_id = any ($1)";
        transaction.execute(statement, &[&due, &node_id]).await?;
        transaction.commit().await?;
        Ok(looks.len())
    }
}

/// Locks what is due. An alert that somebody is about to drop is left alone, so that nobody waits for him.
async fn due(transaction: &Transaction<'_>, interval: Duration) -> Result<Vec<i64>, Error> {
    let query = "
        select r.alert_id from peergate.alert_runtime r join peergate.alert_definitions d on d.id = r.alert_id
        where d.enabled and (r.evaluated_at is null or r.evaluated_at not between clock_timestamp() - make_interval(secs => $1) and clock_timestamp())
        order by r.alert_id for update of r skip locked for key share of d skip locked";
    let rows = transaction.query(query, &[&interval.as_secs_f64()]).await?;
    Ok(rows.into_iter().map(|row| row.get(0)).collect())
}

async fn looks(transaction: &Transaction<'_>, due: &[i64]) -> Result<Vec<Look>, Error> {
    let query = "
        select d.id, d.on_kind, coalesce(d.mirror_id, d.peer_id),
               (select jsonb_agg(c || jsonb_build_object('text', peergate.condition_text(c), 'hold', coalesce(extract(epoch from (c ->> 'for')::interval), 0)) order by n)
                from jsonb_array_elements(d.conditions) with ordinality e (c, n)),
               extract(epoch from peergate.option('alert', d.options, 'repeat_interval')::interval)::float8,
               coalesce((select jsonb_agg(jsonb_build_object('id', s.subject_id, 'subject', s.subject, 'since', s.since,
                             'firing_since', extract(epoch from s.firing_since), 'told_at', extract(epoch from s.told_at), 'condition', s.condition))
                         from peergate.alert_states s where s.alert_id = d.id), '[]'),
               extract(epoch from clock_timestamp())::float8
        from peergate.alert_definitions d where d.id = any ($1) order by d.id";
    let rows = transaction.query(query, &[&due]).await?;
    let watched = |kind: &str| -> (Vec<i64>, bool) {
        let subjects = rows.iter().filter(|row| row.get::<_, &str>(1) == kind).map(|row| row.get::<_, Option<i64>>(2));
        (subjects.clone().flatten().collect(), subjects.clone().any(|subject| subject.is_none()))
    };
    let mirrors = samples(transaction, MIRRORS, watched("mirror")).await?;
    let peers = samples(transaction, PEERS, watched("peer")).await?;
    rows.iter().map(|row| look(row, &mirrors, &peers)).collect()
}

async fn samples(
    transaction: &Transaction<'_>,
    query: &str,
    (ids, all): (Vec<i64>, bool),
) -> Result<Vec<Sample>, Error> {
    if ids.is_empty() && !all {
        return Ok(Vec::new());
    }
    let rows = transaction.query(query, &[&ids, &all]).await?;
    let sample = |row: Row| Sample {
        subject_id: row.get(0),
        subject: row.get(1),
        state: row.get(2),
        lag_bytes: row.get(3),
        lag_seconds: row.get(4),
        slot_wal_bytes: row.get(5),
        errors: row.get(6),
        conflicts: row.get(7),
        unreachable_seconds: row.get(8),
        error: row.get(9),
    };
    Ok(rows.into_iter().map(sample).collect())
}

fn look(row: &Row, mirrors: &[Sample], peers: &[Sample]) -> Result<Look, Error> {
    let (kind, subject): (String, Option<i64>) = (row.get(1), row.get(2));
    let conditions: Value = row.get(3);
    let repeat: f64 = row.get(4);
    let standings: Value = row.get(5);
    let watched = if kind == "mirror" { mirrors } else { peers };
    let samples = watched.iter().filter(|sample| subject.is_none_or(|id| id == sample.subject_id)).cloned().collect();
    let conditions = conditions.as_array().into_iter().flatten().map(Condition::from_json);
    let repeat = Duration::try_from_secs_f64(repeat).ok().filter(|repeat| !repeat.is_zero());
    let alert = Alert { id: row.get(0), conditions: conditions.collect::<Result<_, _>>()?, kind, repeat };
    let standings = standings.as_array().into_iter().flatten().map(standing).collect();
    Ok(Look { alert, standings, samples, now: row.get(6) })
}

fn standing(json: &Value) -> Standing {
    let since = json["since"].as_object().into_iter().flatten();
    let text = |key: &str| json[key].as_str().unwrap_or_default().to_owned();
    Standing {
        subject_id: json["id"].as_i64().unwrap_or_default(),
        subject: text("subject"),
        since: since.filter_map(|(condition, at)| Some((condition.clone(), at.as_f64()?))).collect(),
        firing: json["firing_since"].as_f64().map(|since| Firing {
            since,
            told_at: json["told_at"].as_f64().unwrap_or(since),
            condition: text("condition"),
        }),
    }
}

async fn write(transaction: &Transaction<'_>, alert_id: i64, node_id: &str, decision: &Decision) -> Result<(), Error> {
    let Decision { subject_id, subject, standing, event } = decision;
    let mut fired = None;
    if let Some(Event { kind, condition, value, message }) = event {
        let statement = "select peergate.tell_alert($1, $2, $3, $4, $5, $6, $7,
            (select s.incident_id from peergate.alert_states s where s.alert_id = $1 and s.subject_id = $3 and $2 <> 'fired'), $8)";
        let row = transaction
            .query_one(
                statement,
                &[&alert_id, &kind.as_str(), subject_id, subject, condition, value, message, &node_id],
            )
            .await?;
        fired = (*kind == EventKind::Fired).then(|| row.get::<_, i64>(0));
    }
    let Some(standing) = standing else {
        let statement = "delete from peergate.alert_states where alert_id = $1 and subject_id = $2";
        transaction.execute(statement, &[&alert_id, subject_id]).await?;
        return Ok(());
    };
    let since: Map<String, Value> = standing.since.iter().map(|(text, at)| (text.clone(), json!(at))).collect();
    let firing = standing.firing.as_ref();
    let statement = "
        insert into peergate.alert_states as s (alert_id, subject_id, subject, since, firing_since, told_at, condition, incident_id)
        values ($1, $2, $3, $4, to_timestamp($5), to_timestamp($6), $7, $8)
        on conflict (alert_id, subject_id) do update set subject = excluded.subject, since = excluded.since, firing_since = excluded.firing_since,
            told_at = excluded.told_at, condition = excluded.condition,
            incident_id = case when excluded.firing_since is not null then coalesce(excluded.incident_id, s.incident_id) end";
    transaction
        .execute(
            statement,
            &[
                &alert_id,
                subject_id,
                &standing.subject,
                &Value::Object(since),
                &firing.map(|f| f.since),
                &firing.map(|f| f.told_at),
                &firing.map(|f| f.condition.as_str()),
                &fired,
            ],
        )
        .await?;
    Ok(())
}
