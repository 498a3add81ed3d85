//! Events on their way to channels.
//!
//! A delivery is taken for a time, made outside of any transaction, and its outcome noted. A process that dies between making and noting
//! leaves it to another, which makes it again: every receiver gets the number of the event, and can tell.

use std::time::Duration;

use serde_json::Value;

use super::channel::Channel;
use crate::secret::SecretError;
use crate::{Catalog, Error};

/// An event that is to be told on one channel.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Its number.
    pub id: i64,
    /// Which attempt this is, from 1.
    pub attempt: i32,
    /// How long ago the event was.
    pub age: Duration,
    /// It is a test: tried once.
    pub is_test: bool,
    /// The event, as receivers get it.
    pub event: Value,
    /// The channel; `None` when the alert has none of that number any more.
    pub channel: Option<Value>,
}

impl Delivery {
    /// Reads the channel and opens its secrets.
    ///
    /// # Errors
    /// [`SecretError`] if one cannot be opened.
    pub fn open_channel(&self, catalog: &Catalog) -> Result<Option<Channel>, SecretError> {
        self.channel.as_ref().map(|document| Channel::from_document(document, catalog.keyring())).transpose()
    }
}

/// What came of an attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was made.
    Sent,
    /// It failed and is tried again.
    RetryIn(Duration, String),
    /// It failed and is given up.
    Failed(String),
    /// There is nobody to tell any more.
    Canceled,
}

impl Catalog {
    /// Takes deliveries that are due for `lease`, at most `limit`: of several processes one gets each. Of one channel of an alert only the
    /// first that is not done, so that a recovery is not told before what it ends.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn take_deliveries(&self, lease: Duration, limit: i64) -> Result<Vec<Delivery>, Error> {
        let statement = "
            with due as (
                select d.id from peergate.alert_deliveries d
                where d.state = 'pending' and d.retry_at not between clock_timestamp() and clock_timestamp() + interval '1 hour'
                  and not exists (select from peergate.alert_deliveries e
                                  where e.state = 'pending' and e.alert_id = d.alert_id and e.channel = d.channel and e.id < d.id)
                order by d.retry_at limit $2 for update skip locked
            ), taken as (
                update peergate.alert_deliveries d set attempt = d.attempt + 1, retry_at = clock_timestamp() + make_interval(secs => $1)
                from due where d.id = due.id returning d.*
            )
            select d.id, d.attempt, greatest(extract(epoch from clock_timestamp() - e.at), 0)::float8, e.kind = 'test',
                   jsonb_strip_nulls(jsonb_build_object('version', 1, 'event_id', e.id, 'event', e.kind, 'alert', e.alert, coalesce(e.subject_kind, 'subject'), e.subject, 'condition', e.condition,
                       'value', e.value, 'message', e.message, 'incident_id', e.incident_id,
                       'at', to_char(e.at at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"'))),
                   c.channel || jsonb_build_object(
                       'options', (select coalesce(jsonb_object_agg(s.name, s.default_value), '{}') from peergate.settings s
                                   where s.scope = c.channel ->> 'channel' and s.default_value is not null) || (c.channel -> 'options'),
                       'secrets', (select coalesce(jsonb_object_agg(s.option, s.sealed), '{}') from peergate.alert_secrets s
                                   where s.alert_id = a.id and s.channel = d.channel))
            from taken d
            join peergate.alert_events e on e.id = d.event_id
            left join peergate.alert_definitions a on a.id = d.alert_id
            cross join lateral (select a.channels -> (d.channel - 1) as channel) c
            order by d.id";
        let rows = self.client().await?.query(statement, &[&lease.as_secs_f64(), &limit]).await?;
        let delivery = |row: tokio_postgres::Row| Delivery {
            id: row.get(0),
            attempt: row.get(1),
            age: Duration::from_secs_f64(row.get(2)),
            is_test: row.get(3),
            event: row.get(4),
            channel: row.get(5),
        };
        Ok(rows.into_iter().map(delivery).collect())
    }

    /// Notes what came of an attempt, unless another process has taken the delivery since, or it was canceled.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn end_delivery(&self, delivery: &Delivery, outcome: &Outcome) -> Result<(), Error> {
        let (state, error, retry_in) = match outcome {
            Outcome::Sent => ("sent", None, None),
            Outcome::RetryIn(pause, error) => ("pending", Some(error), Some(pause.as_secs_f64())),
            Outcome::Failed(error) => ("failed", Some(error), None),
            Outcome::Canceled => ("canceled", None, None),
        };
        let statement = "
            update peergate.alert_deliveries
            set state = $3, error = $4, retry_at = coalesce(clock_timestamp() + make_interval(secs => $5), retry_at),
                finished_at = case when $3 <> 'pending' then clock_timestamp() end
            where id = $1 and attempt = $2 and state = 'pending'";
        let client = self.client().await?;
        client.execute(statement, &[&delivery.id, &delivery.attempt, &state, &error, &retry_in]).await?;
        Ok(())
    }

    /// Makes a delivery by NOTIFY and notes it, in one transaction.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached, or refuses.
    pub async fn deliver_by_notify(&self, delivery: &Delivery, channel: &str) -> Result<(), Error> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let payload = delivery.event.to_string();
        transaction.execute("select pg_catalog.pg_notify($1, $2)", &[&channel, &payload]).await?;
        let statement = "
            update peergate.alert_deliveries set state = 'sent', error = null, finished_at = clock_timestamp()
            where id = $1 and attempt = $2 and state = 'pending'";
        if transaction.execute(statement, &[&delivery.id, &delivery.attempt]).await? > 0 {
            transaction.commit().await?;
        }
        Ok(())
    }
}
