//! What the engine reports of a mirror: its state, how far it is, what went wrong.

use std::time::Duration;

use pg::{Lsn, SqlState};
use tokio_postgres::types::ToSql;

use crate::{Catalog, Error};

/// How much was applied by streaming since the mirror was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Row changes.
    pub rows: i64,
    /// Bytes of row changes.
    pub bytes: i64,
    /// Source transactions.
    pub transactions: i64,
}

/// What the engine reports of a mirror that streams.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Everything before this was read.
    pub received: Lsn,
    /// Everything before this is durable on the target.
    pub applied: Lsn,
    /// What was acknowledged to the slot.
    pub flushed: Lsn,
    /// The source's end of WAL, and when it was asked for (catalog clock, as text).
    pub source: Option<(Lsn, String)>,
    /// Commit time of the last transaction applied, in microseconds since 2000-01-01 UTC.
    pub commit_time: Option<i64>,
    /// How long the oldest change that is not applied has waited.
    pub lag: Duration,
    /// Totals.
    pub totals: Applied,
    /// How long the last heartbeat took; `None`: none since the worker began.
    pub latency: Option<Duration>,
}

/// An error as `mirror_status` shows it.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What kind.
    pub sqlstate: SqlState,
    /// What happened.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// What to do.
    pub hint: Option<String>,
    /// Where in the source's WAL, if it has a place there.
    pub lsn: Option<Lsn>,
    /// Failed attempts so far.
    pub attempt: i32,
    /// Seconds until the next attempt; `None`: a person must act.
    pub retry_in: Option<f64>,
}

impl Catalog {
    /// Writes a mirror's state and returns the one that it had; a state in which
    /// all is well clears the last error, which one that is tried again and again would else show for a moment only. `None`: the mirror was
    /// dropped, or `epoch` is not that of its lease any more, and nothing was written.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_state(&self, mirror_id: i64, epoch: i64, state: &str) -> Result<Option<String>, Error> {
        let statement = "
            update peergate.mirror_runtime r
            set state = $3, updated_at = clock_timestamp(), retry_at = null,
                attempt = case when not w.well then r.attempt else 0 end,
                error_sqlstate = case when not w.well then r.error_sqlstate end, error_message = case when not w.well then r.error_message end,
                error_detail = case when not w.well then r.error_detail end, error_hint = case when not w.well then r.error_hint end,
                error_lsn = case when not w.well then r.error_lsn end, error_at = case when not w.well then r.error_at end
            from (select $3 in ('running', 'completed', 'paused') as well) w,
                 (select o.state from peergate.mirror_runtime o join peergate.mirror_leases l using (mirror_id)
                  where o.mirror_id = $1 and l.epoch = $2 for update of o) old
            where r.mirror_id = $1
            returning old.state";
        let row = self.client().await?.query_opt(statement, &[&mirror_id, &epoch, &state]).await?;
        Ok(row.map(|r| r.get(0)))
    }

    /// Writes a mirror's state together with the error that put it there; returns false, having written nothing, as
    /// [`Catalog::set_mirror_state`] returns `None`.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_failure(
        &self,
        mirror_id: i64,
        epoch: i64,
        state: &str,
        failure: &Failure,
    ) -> Result<bool, Error> {
        let statement = "
            update peergate.mirror_runtime
            set state = $2, error_sqlstate = $3, error_message = $4, error_detail = $5, error_hint = $6, attempt = $7,
                retry_at = clock_timestamp() + make_interval(secs => $8), error_lsn = $9::text::pg_lsn,
                error_at = clock_timestamp(), updated_at = clock_timestamp()
            where mirror_id = $1 and exists (select from peergate.mirror_leases l where l.mirror_id = $1 and l.epoch = $10)";
        let sqlstate = failure.sqlstate.to_string();
        let lsn = failure.lsn.map(|l| l.to_string());
        let parameters: [&(dyn ToSql + Sync); 10] = [
            &mirror_id,
            &state,
            &sqlstate,
            &failure.message,
            &failure.detail,
            &failure.hint,
            &failure.attempt,
            &failure.retry_in,
            &lsn,
            &epoch,
        ];
        Ok(self.execute(statement, &parameters).await? > 0)
    }

    /// Stores which source the slot is on and where the copy's snapshot is.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_slot(
        &self,
        mirror_id: i64,
        system_id: &str,
        timeline: i32,
        snapshot: Lsn,
    ) -> Result<(), Error> {
        let statement = "
            update peergate.mirror_runtime
            set system_id = $2, timeline = $3, snapshot_lsn = $4::text::pg_lsn, copied_at = null, updated_at = clock_timestamp()
            where mirror_id = $1";
        self.execute(statement, &[&mirror_id, &system_id, &timeline, &snapshot.to_string()]).await?;
        Ok(())
    }

    /// Stores the mirror's publications.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_publications(&self, mirror_id: i64, oids: &[u32]) -> Result<(), Error> {
        let statement =
            "update peergate.mirror_runtime set publications = $2, updated_at = clock_timestamp() where mirror_id = $1";
        self.execute(statement, &[&mirror_id, &oids]).await?;
        Ok(())
    }

    /// Stores the source's timeline, after a failover that streaming may pass.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_timeline(&self, mirror_id: i64, timeline: i32) -> Result<(), Error> {
        let statement =
            "update peergate.mirror_runtime set timeline = $2, updated_at = clock_timestamp() where mirror_id = $1";
        self.execute(statement, &[&mirror_id, &timeline]).await?;
        Ok(())
    }

    /// Stores that the copy is complete on the target: a restart streams and does not copy.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_copied(&self, mirror_id: i64) -> Result<(), Error> {
        let statement = "update peergate.mirror_runtime set copied_at = clock_timestamp(), updated_at = clock_timestamp() where mirror_id = $1";
        self.execute(statement, &[&mirror_id]).await?;
        Ok(())
    }

    /// Writes how far a streaming mirror is; returns false, having written nothing, as [`Catalog::set_mirror_state`] returns `None`.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_mirror_status(&self, mirror_id: i64, epoch: i64, status: &Status) -> Result<bool, Error> {
        let statement = "
            update peergate.mirror_runtime
            set received_lsn = $2::text::pg_lsn, applied_lsn = $3::text::pg_lsn, flushed_lsn = $4::text::pg_lsn,
                source_lsn = greatest(coalesce($5::text::pg_lsn, source_lsn), $3::text::pg_lsn),
                source_lsn_at = coalesce($6::text::timestamptz, source_lsn_at),
                commit_time = coalesce('2000-01-01 00:00:00+00'::timestamptz + $7 * interval '1 microsecond', commit_time),
                lag_seconds = $8, rows_applied = $9, bytes_applied = $10, transactions_applied = $11, latency_seconds = coalesce($13, latency_seconds),
                updated_at = clock_timestamp()
            where mirror_id = $1 and exists (select from peergate.mirror_leases l where l.mirror_id = $1 and l.epoch = $12)";
        let (source, at) = status.source.clone().map(|(lsn, at)| (lsn.to_string(), at)).unzip();
        // As a double: microseconds since 2000 are exact in it until the year 2285.
        let commit_time = status.commit_time.map(|t| t as f64);
        let parameters: [&(dyn ToSql + Sync); 13] = [
            &mirror_id,
            &status.received.to_string(),
            &status.applied.to_string(),
            &status.flushed.to_string(),
            &source,
            &at,
            &commit_time,
            &status.lag.as_secs_f64(),
            &status.totals.rows,
            &status.totals.bytes,
            &status.totals.transactions,
            &epoch,
            &status.latency.map(|l| l.as_secs_f64()),
        ];
        Ok(self.execute(statement, &parameters).await? > 0)
    }

    /// Returns the catalog's clock, as text.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn now(&self) -> Result<String, Error> {
        Ok(self.client().await?.query_one("select clock_timestamp()::text", &[]).await?.get(0))
    }
}
