//! Rounds of mirrors of queries: what the engine reports of them, and which are asked for.

use pg::SqlState;

use crate::task::TaskKind;
use crate::{Catalog, Error};

/// Rounds of a mirror that are kept.
const ROUNDS_KEPT: i64 = 100;

/// Rounds of a mirror of which the partitions are kept.
const PARTITIONED_ROUNDS_KEPT: i64 = 10;

/// The mirror `$1`, which stays until the end of the transaction; no row if it was dropped, as whoever drops it is waited for. To be taken before
/// anything else of the mirror, as DROP MIRROR does.
const HELD: &str =
    "held as materialized (select d.id from peergate.mirror_definitions d where d.id = $1 for key share)";

/// A task that asks for a round and is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundTask {
    /// Its number.
    pub id: i64,
    /// EXECUTE or RESYNC MIRROR.
    pub kind: TaskKind,
    /// The engine has made it part of what it does.
    pub taken: bool,
}

/// A partition of a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionRow {
    /// Its number, from 1.
    pub number: i32,
    /// The least watermark in it; `None`: no limit.
    pub lower: Option<String>,
    /// The greatest watermark in it; `None`: no limit.
    pub upper: Option<String>,
    /// Rows written; `None`: it is not done.
    pub rows: Option<i64>,
}

/// What a round that is completed has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RoundEnd {
    /// Rows that it deleted.
    pub deleted: i64,
}

impl Catalog {
    /// Notes that a round begins, and returns its number: at least `after` + 1. `None`: the lease has another epoch by now, or the mirror was dropped.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn begin_round(&self, mirror_id: i64, epoch: i64, after: i64) -> Result<Option<i64>, Error> {
        let statement = format!(
            "with {HELD}
            insert into peergate.query_rounds (mirror_id, round)
            select l.mirror_id, greatest($3, coalesce((select max(q.round) from peergate.query_rounds q where q.mirror_id = l.mirror_id), 0)) + 1
            from held join peergate.mirror_leases l on l.mirror_id = held.id
            where l.epoch = $2
            returning round"
        );
        let row = self.client().await?.query_opt(&statement, &[&mirror_id, &epoch, &after]).await?;
        Ok(row.map(|r| r.get(0)))
    }

    /// Notes that a round goes on that an earlier attempt began.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn continue_round(&self, mirror_id: i64, round: i64) -> Result<(), Error> {
        let statement = format!(
            "with {HELD}
            insert into peergate.query_rounds (mirror_id, round) select held.id, $2 from held
            on conflict (mirror_id, round) do update set state = 'running', waits_for = null, error_sqlstate = null, error_message = null"
        );
        self.execute(&statement, &[&mirror_id, &round]).await?;
        Ok(())
    }

    /// Notes what a round waits for; `None`: for nothing any more.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_round_waiting(&self, mirror_id: i64, round: i64, what: Option<&str>) -> Result<(), Error> {
        let statement = "
            update peergate.query_rounds set state = case when $3::text is null then 'running' else 'waiting' end, waits_for = $3
            where mirror_id = $1 and round = $2 and state in ('waiting', 'running')";
        self.execute(statement, &[&mirror_id, &round, &what]).await?;
        Ok(())
    }

    /// Notes which partitions a round has.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn set_round_plan(
        &self,
        mirror_id: i64,
        round: i64,
        replaces: bool,
        [lower, upper]: [Option<&str>; 2],
        partitions: &[PartitionRow],
    ) -> Result<(), Error> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let count = i32::try_from(partitions.len()).unwrap_or(i32::MAX);
        let held = format!("with {HELD} select from held");
        if transaction.query_opt(&held, &[&mirror_id]).await?.is_none() {
            return Ok(());
        }
        let statement = "
            update peergate.query_rounds set replaces = $3, lower_bound = $4, upper_bound = $5, partitions = $6
            where mirror_id = $1 and round = $2";
        transaction.execute(statement, &[&mirror_id, &round, &replaces, &lower, &upper, &count]).await?;
        let statement = "
            insert into peergate.query_partitions (mirror_id, round, partition, lower_bound, upper_bound, rows, state)
            select $1, $2, p.number, p.lower, p.upper, p.rows, case when p.rows is null then 'pending' else 'done' end
            from unnest($3::int4[], $4::text[], $5::text[], $6::int8[]) p (number, lower, upper, rows)
            on conflict (mirror_id, round, partition) do update
            set lower_bound = excluded.lower_bound, upper_bound = excluded.upper_bound, rows = excluded.rows, state = excluded.state";
        let numbers: Vec<i32> = partitions.iter().map(|p| p.number).collect();
        let lowers: Vec<Option<&str>> = partitions.iter().map(|p| p.lower.as_deref()).collect();
        let uppers: Vec<Option<&str>> = partitions.iter().map(|p| p.upper.as_deref()).collect();
        let rows: Vec<Option<i64>> = partitions.iter().map(|p| p.rows).collect();
        transaction.execute(statement, &[&mirror_id, &round, &numbers, &lowers, &uppers, &rows]).await?;
        let prune = "
            delete from peergate.query_partitions p where p.mirror_id = $1 and p.round < (
                select min(k.round) from (select distinct q.round from peergate.query_partitions q where q.mirror_id = $1
                                          order by q.round desc limit $2) k)";
        transaction.execute(prune, &[&mirror_id, &PARTITIONED_ROUNDS_KEPT]).await?;
        transaction.commit().await?;
        Ok(())
    }

    /// Notes that a partition is being copied.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn begin_partition(&self, mirror_id: i64, round: i64, partition: i32) -> Result<(), Error> {
        let statement = "
            update peergate.query_partitions set state = 'copying', began_at = clock_timestamp()
            where mirror_id = $1 and round = $2 and partition = $3";
        self.execute(statement, &[&mirror_id, &round, &partition]).await?;
        Ok(())
    }

    /// Notes that a partition is durable on the target.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn end_partition(
        &self,
        mirror_id: i64,
        round: i64,
        partition: i32,
        rows: i64,
        bytes: i64,
    ) -> Result<(), Error> {
        let statement = "
            with done as (
                update peergate.query_partitions set state = 'done', rows = $4, bytes = $5, ended_at = clock_timestamp()
                where mirror_id = $1 and round = $2 and partition = $3)
            update peergate.query_rounds set rows = rows + $4, bytes = bytes + $5 where mirror_id = $1 and round = $2";
        self.execute(statement, &[&mirror_id, &round, &partition, &rows, &bytes]).await?;
        Ok(())
    }

    /// Notes that a round is completed, and adds it to the mirror's totals; false, having written nothing, if the lease has another epoch by now or
    /// the mirror was dropped.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn end_round(&self, mirror_id: i64, epoch: i64, round: i64, end: RoundEnd) -> Result<bool, Error> {
        let statement = "
            with held as materialized (
                -- In the order in which DROP MIRROR takes them.
                select r.mirror_id from peergate.mirror_runtime r where r.mirror_id = $1 for update
            ), ended as (
                update peergate.query_rounds q
                set state = 'completed', waits_for = null, rows_deleted = $4, error_sqlstate = null, error_message = null, ended_at = clock_timestamp()
                from held h
                where q.mirror_id = h.mirror_id and q.round = $2 and exists (select from peergate.mirror_leases l where l.mirror_id = $1 and l.epoch = $3)
                returning q.rows, q.bytes
            ), pruned as (
                delete from peergate.query_rounds q where q.mirror_id = $1 and q.round <= $2 - $5
            )
            update peergate.mirror_runtime r
            set rows_applied = r.rows_applied + e.rows + $4, bytes_applied = r.bytes_applied + e.bytes, updated_at = clock_timestamp()
            from ended e where r.mirror_id = $1";
        Ok(self.execute(statement, &[&mirror_id, &round, &epoch, &end.deleted, &ROUNDS_KEPT]).await? > 0)
    }

    /// Notes that the round under way, if there is one, has failed: it goes on with the next attempt, or another one begins.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn fail_round(&self, mirror_id: i64, sqlstate: SqlState, message: &str) -> Result<(), Error> {
        let statement = "
            update peergate.query_rounds set state = 'failed', waits_for = null, error_sqlstate = $2, error_message = $3
            where mirror_id = $1 and state in ('waiting', 'running')";
        self.execute(statement, &[&mirror_id, &sqlstate.to_string(), &message]).await?;
        Ok(())
    }

    /// Returns the tasks that ask for a round and are not done, in their order.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn round_tasks(&self, mirror_id: i64) -> Result<Vec<RoundTask>, Error> {
        let query = "
            select id, kind = 'resync_mirror', taken_at is not null from peergate.tasks
            where mirror_id = $1 and kind in ('resync_mirror', 'execute_mirror') and state in ('pending', 'running') order by id";
        let rows = self.client().await?.query(query, &[&mirror_id]).await?;
        let task = |row: &tokio_postgres::Row| RoundTask {
            id: row.get(0),
            kind: if row.get(1) { TaskKind::ResyncMirror } else { TaskKind::ExecuteMirror },
            taken: row.get(2),
        };
        Ok(rows.iter().map(task).collect())
    }

    /// Completes tasks of those that are open.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn complete_tasks(&self, ids: &[i64]) -> Result<(), Error> {
        let statement = "
            update peergate.tasks set state = 'completed', progress = 1, error_sqlstate = null, error_message = null, finished_at = clock_timestamp()
            where id = any ($1) and state in ('pending', 'running')";
        self.execute(statement, &[&ids]).await?;
        Ok(())
    }
}
