//! The lane of late tables: it applies what has happened since their copy, and hands them over.

use std::time::{Duration, Instant};

use catalog::event::Event;
use pg::{Lsn, TableName};
use tokio::sync::{mpsc, oneshot, watch};

use super::{Group, HOLD_MAX};
use crate::apply::{Apply, Limits, Looking, Order};
use crate::assemble::{Assembler, Tables};
use crate::error::Error;
use crate::known::{self, Taken};
use crate::schema::TablePlan;
use crate::session::PeerSession;
use crate::sink::postgres::{PostgresSink, open_writer};
use crate::sink::progress_row::{self, LATE_LANE};
use crate::sink::{marks, shapes};
use crate::source::look::Looker;
use crate::source::replication::ReplicationConnection;
use crate::source::{publication, slot};
use crate::status::Tracker;
use crate::table_state::{Route, TableState};

/// How far behind the lane may be when the main stream is asked to stand still.
const NEAR: Duration = Duration::from_secs(1);

/// Releases the main stream, with the tables that it takes over or without any. Dropped, it ends the main stream's attempt: whatever kept us
/// from saying something may have kept us from knowing that the target has the tables' marks.
type Release = oneshot::Sender<Option<Tables>>;

impl Group<'_> {
    /// Applies what has happened to the tables since their copy, and hands them over.
    pub(super) async fn catch_up(
        &self,
        source: &PeerSession,
        target: &PeerSession,
        copied: Lsn,
        plans: Vec<TablePlan>,
    ) -> Result<(), Error> {
        let (context, mirror) = (self.context, &self.context.mirror);
        target.run("begin").await?;
        progress_row::hold(target, &mirror.object_name, LATE_LANE, context.epoch).await?;
        for plan in &plans {
            shapes::record_copied(target, &mirror.object_name, plan).await?;
        }
        target.run("commit").await?;
        fail_point!("late tables' shapes recorded");
        let names: Vec<TableName> = plans.iter().map(|p| p.source.name.clone()).collect();
        context.catalog.set_table_states(mirror.id, &names, TableState::Catchup.as_str()).await?;
        let (mut at, began) = (Some(copied), Instant::now());
        loop {
            let (mut lane, _wanted, tracker) = self.open_lane(source, at, copied, &plans).await?;
            loop {
                let (goal, begun) = (slot::push_wal(source).await?, Instant::now());
                lane.run_to(&context.stop, Some(goal)).await?;
                tracker.report_tables(&context.catalog, mirror.id).await?;
                if begun.elapsed() < near(began.elapsed()) {
                    break;
                }
            }
            fail_point!("lane is near");
            let (boundary, release) = self.hold_main().await?;
            fail_point!("main stream held");
            let until = lane.stop_at(boundary);
            let arrive = async {
                slot::push_wal(source).await?;
                lane.run_to(&context.stop, Some(until)).await
            };
            match tokio::time::timeout(HOLD_MAX, arrive).await {
                Ok(arrived) => arrived?,
                // What lies beyond was left out; the lane reads it again, from where the target is.
                Err(_) => {
                    release.send(None).map_err(|_| Error::Stopped)?;
                    at = None;
                    continue;
                }
            }
            tracker.report_tables(&context.catalog, mirror.id).await?;
            return self.hand_over(source, lane.applied(), plans, release).await;
        }
    }

    /// Opens the tables' lane: at their copy, or where an earlier one has left off.
    async fn open_lane(
        &self,
        source: &PeerSession,
        at: Option<Lsn>,
        copied: Lsn,
        plans: &[TablePlan],
    ) -> Result<(Apply, watch::Sender<Lsn>, Tracker), Error> {
        let mirror = &self.context.mirror;
        let (peer, name) = (&mirror.target_name, &mirror.object_name);
        let mut sink = PostgresSink::open_late_lane(peer, &mirror.target, name, self.context.epoch, at).await?;
        sink.tell(self.main.tell.clone());
        let applied = sink.applied();
        let tables = self.tables(source, sink.session(), sink.triggers_fire(), plans, copied).await?;
        sink.use_operators_of(&tables.type_schemas()).await?;
        slot::free(source, &self.name).await?;
        let replication = ReplicationConnection::connect(&mirror.source_name, &source.attempt).await?;
        let stream = replication.start(&self.name, applied, &publication::names(&self.name), tables.binary).await?;
        let (wanted, wanted_changes) = watch::channel(Lsn::ZERO);
        // Nobody gives orders to a lane.
        let (_, orders) = mpsc::channel(1);
        let limits = Limits::of(&mirror.options);
        let (assembler, tracker) = (Assembler::new(tables, applied), Tracker::default());
        let looking = Looking::at_described(Looker::new(&mirror.source_name, &mirror.source));
        let lane =
            Apply::new(stream, assembler, looking, sink, limits, applied, tracker.clone(), wanted_changes, orders);
        Ok((lane, wanted, tracker))
    }

    /// Describes the tables on both sides; changes are taken from `from` on.
    async fn tables(
        &self,
        source: &PeerSession,
        target: &PeerSession,
        triggers_fire: bool,
        plans: &[TablePlan],
        from: Lsn,
    ) -> Result<Tables, Error> {
        let taken = Taken {
            names: plans.iter().map(|p| (p.source.name.clone(), p.target_name.clone())).collect(),
            routes: plans.iter().map(|p| (p.source.name.clone(), Route::From(from))).collect(),
            others_come: true,
        };
        known::look_up(self.context, source, target, triggers_fire, taken).await
    }

    /// Lets the main stream stand still at the end of a transaction; returns where that is, and what releases it.
    async fn hold_main(&self) -> Result<(Lsn, Release), Error> {
        let ((at, boundary), (release, released)) = (oneshot::channel(), oneshot::channel());
        self.main.tell(Order::Hold { at, released }).await?;
        // The main stream's end is told by others.
        let boundary = boundary.await.map_err(|_| Error::Stopped)?;
        Ok((boundary, release))
    }

    /// The target has what commits before `from` of the tables, and nothing after it; the main stream has not gone beyond that.
    async fn hand_over(
        &self,
        source: &PeerSession,
        from: Lsn,
        plans: Vec<TablePlan>,
        release: Release,
    ) -> Result<(), Error> {
        let (context, mirror) = (self.context, &self.context.mirror);
        let names: Vec<TableName> = plans.iter().map(|p| p.source.name.clone()).collect();
        let (target, triggers_fire) = open_writer(&mirror.target_name, &mirror.target).await?;
        // As they are there now: the lane has followed their changes.
        let tables = self.tables(source, &target, triggers_fire, &plans, from).await?;
        target.run("begin").await?;
        progress_row::hold(&target, &mirror.object_name, LATE_LANE, context.epoch).await?;
        marks::set(&target, &mirror.object_name, &names, from).await?;
        progress_row::close_lane(&target, &mirror.object_name, LATE_LANE).await?;
        fail_point!("late tables marked");
        target.run("commit").await?;
        fail_point!("hand-over recorded on the target");
        context.catalog.set_tables_from(mirror.id, &names, Some(from)).await?;
        let message = format!("{} late tables are handed over to the main stream", names.len());
        context.event(&Event::info("copy", message).at(from)).await?;
        fail_point!("hand-over recorded in the catalog");
        self.main.expected.lock().await.plans.extend(tables.plans());
        if (self.main.binary && !tables.binary) || !tables.type_schemas().is_subset(&self.main.type_schemas) {
            return Err(Error::Restart);
        }
        release.send(Some(tables)).map_err(|_| Error::Stopped)?;
        while self.main.tracker.applied() < from {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        context.catalog.set_table_states(mirror.id, &names, TableState::Live.as_str()).await?;
        Ok(())
    }
}

/// Returns how far behind a lane may be when the main stream is asked to stand still: a second, and more when it has been trying for long.
/// Where more comes all the time than two streams can take, it would never be near.
fn near(trying: Duration) -> Duration {
    (NEAR + trying / 20).min(HOLD_MAX / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_that_is_never_near_is_waited_for_longer() {
        assert_eq!(near(Duration::ZERO), NEAR);
        assert_eq!(near(Duration::from_secs(60)), Duration::from_secs(4));
        assert_eq!(near(Duration::from_secs(3600)), HOLD_MAX / 2);
    }
}
