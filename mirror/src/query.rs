//! Mirrors of queries: rows are written to a table of the target in rounds.
//!
//! A round takes what is new by the watermark, or all. Its upper bound is chosen so that no row below it can be committed later ([`source::wait`]); it is
//! divided into partitions ([`watermark`]), each of which is carried in one transaction with the note that it is done ([`transfer`], [`progress`]).
//! Which process may write is decided by the lease and the epoch of the mirror's progress row, as for all mirrors.

pub mod preflight;
pub mod progress;
pub mod round;
pub mod source;
pub mod template;
pub mod transfer;
pub mod watermark;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use catalog::mirror::query::QueryMirror;
use catalog::task::TaskKind;
use tokio::time::Instant;

use crate::error::Error;
use crate::session::PeerSession;
use crate::sink::progress_row;
use crate::state::MirrorState;
use crate::worker::{Context, Outcome, pause_after};

/// Runs a mirror of a query until it is told to stop, it is done, or only a person can help.
pub async fn run(context: Context) -> Outcome {
    let mut attempt = 0;
    loop {
        let ran_well = AtomicBool::new(false);
        let error = match attempt_once(&context, &ran_well).await {
            Ok(()) => return Outcome::Completed,
            Err(Error::Stopped) => return Outcome::Stopped,
            Err(Error::Restart) => continue,
            Err(Error::Fenced) => {
                tracing::warn!("another process has taken the mirror over");
                return Outcome::Fenced;
            }
            Err(error) => error,
        };
        attempt = if ran_well.load(Ordering::Relaxed) { 1 } else { attempt + 1 };
        if let Some(problem) = error.problem()
            && let Err(error) = context.catalog.fail_round(context.mirror.id, problem.sqlstate, &problem.message).await
        {
            tracing::warn!(error = %error, "failure of the round not recorded");
        }
        if let Some(outcome) = pause_after(&context, &error, attempt).await {
            return outcome;
        }
    }
}

async fn attempt_once(context: &Context, ran_well: &AtomicBool) -> Result<(), Error> {
    // What was asked for may have changed since the last attempt.
    let fresh = context.catalog.mirror(context.mirror.id).await?.ok_or(Error::Stopped)?;
    let context = context.clone().with_mirror(fresh);
    tokio::select! {
        result = work(&context, ran_well) => result,
        // A transaction that is cut off is done anew, or was committed with its note.
        () = context.stop.wait() => Err(Error::Stopped),
    }
}

/// Opens a session that writes to the target. What is written is an ordinary client's: triggers fire, and foreign keys are checked.
pub(crate) async fn open_target(context: &Context, search_path: &str) -> Result<PeerSession, Error> {
    let target = PeerSession::open(&context.mirror.target_name, &context.mirror.target).await?;
    target
        .run(&format!("set lock_timeout = '30s'; set synchronous_commit = on; set search_path = {search_path}"))
        .await?;
    Ok(target)
}

/// One attempt, from connecting to whatever ends it. `Ok` means that there is nothing more to do.
async fn work(context: &Context, ran_well: &AtomicBool) -> Result<(), Error> {
    let mirror = &context.mirror;
    let Some(query) = &mirror.query else { return Err(Error::Restart) };
    let source = PeerSession::open(&mirror.source_name, &mirror.source).await?;
    source::become_reader(&source).await?;
    let target = open_target(context, "''").await?;
    // The older owner, if there is one, is locked out here, before what it has done is looked at.
    progress_row::end_earlier_sessions(&target, &mirror.object_name, context.epoch).await?;
    progress_row::claim(&target, &mirror.object_name, context.epoch).await?;
    // It may have left nothing in the way of locks, but the setting.
    target.run("set lock_timeout = '30s'").await?;
    progress::prepare(&target, &mirror.object_name, context.epoch, query.truncate_target).await?;
    fail_point!("query target claimed");
    if query.ends() && is_done(context, &target).await? {
        return complete(context).await;
    }
    let plan = preflight::run(context, query, &source, &target).await?;
    target.run(&format!("set search_path = {}", plan.search_path)).await?;
    context.set_state(MirrorState::Catchup).await?;
    if progress::read(&target, &mirror.object_name).await?.rounds == 0 {
        preflight::warn_of_watermark(context, query, &source).await?;
    }
    let (mut first, mut nudge) = (true, Nudge::default());
    loop {
        let began = Instant::now();
        let tasks = take_tasks(context, &target).await?;
        if !query.on_demand || tasks.is_some() || is_under_way(context, &target).await? {
            round::run(context, &plan, &source, &target).await?;
        }
        context.catalog.complete_tasks(&tasks.unwrap_or_default()).await?;
        fail_point!("query tasks completed");
        if first {
            context.catalog.advance_tasks(mirror.id, TaskKind::CreateMirror, 1.0).await?;
            context.catalog.advance_tasks(mirror.id, TaskKind::ResumeMirror, 1.0).await?;
            if query.ends() {
                return complete(context).await;
            }
            context.set_state(MirrorState::Running).await?;
            first = false;
        }
        ran_well.store(true, Ordering::Relaxed);
        wait_for_next(context, query, &mut nudge, began, &source).await?;
    }
}

async fn is_done(context: &Context, target: &PeerSession) -> Result<bool, Error> {
    let progress = progress::read(target, &context.mirror.object_name).await?;
    let asked = context.catalog.round_tasks(context.mirror.id).await?;
    Ok(progress.rounds > 0 && progress.open.is_none() && !progress.replaces && asked.is_empty())
}

async fn is_under_way(context: &Context, target: &PeerSession) -> Result<bool, Error> {
    Ok(progress::read(target, &context.mirror.object_name).await?.open.is_some())
}

async fn complete(context: &Context) -> Result<(), Error> {
    context.catalog.advance_tasks(context.mirror.id, TaskKind::CreateMirror, 1.0).await?;
    context.catalog.advance_tasks(context.mirror.id, TaskKind::ResumeMirror, 1.0).await?;
    context.set_state(MirrorState::Completed).await
}

/// Takes the tasks that ask for a round; `None` if there are none.
async fn take_tasks(context: &Context, target: &PeerSession) -> Result<Option<Vec<i64>>, Error> {
    let tasks = context.catalog.round_tasks(context.mirror.id).await?;
    // Once taken, what it wants is noted on the target.
    if tasks.iter().any(|task| task.kind == TaskKind::ResyncMirror && !task.taken) {
        progress::begin_anew(target, &context.mirror.object_name, context.epoch).await?;
        fail_point!("query begun anew");
    }
    let new: Vec<i64> = tasks.iter().filter(|task| !task.taken).map(|task| task.id).collect();
    if !new.is_empty() {
        context.catalog.take_tasks(&new).await?;
    }
    Ok((!tasks.is_empty()).then(|| tasks.iter().map(|task| task.id).collect()))
}

/// When rounds begin after a WAIT FOR MIRROR was announced: it is content with one that begins after it, and may have been announced before it took its time.
const NUDGED: [Duration; 3] = [Duration::from_millis(20), Duration::from_millis(250), Duration::from_secs(2)];

/// A WAIT FOR MIRROR that was announced, and for which rounds are still to begin.
#[derive(Default)]
struct Nudge {
    at: Option<Instant>,
}

impl Nudge {
    /// Returns when the next round is to begin for it, which is after `last` began.
    fn due(&self, last: Instant) -> Option<Instant> {
        let at = self.at?;
        NUDGED.iter().map(|after| at + *after).find(|due| *due > last)
    }
}

/// Waits until the next round is due, or somebody wants one; `began` is when the last one did.
async fn wait_for_next(
    context: &Context,
    query: &QueryMirror,
    nudge: &mut Nudge,
    began: Instant,
    source: &PeerSession,
) -> Result<(), Error> {
    let regular = Instant::now() + query.refresh_interval;
    loop {
        let due = nudge.due(began).map_or(regular, |nudged| nudged.min(regular));
        tokio::select! {
            () = tokio::time::sleep_until(due), if !query.on_demand => return Ok(()),
            () = context.waited_for.notified(), if !query.on_demand => nudge.at = Some(Instant::now()),
            () = context.has_task.notified() => {
                if !context.catalog.round_tasks(context.mirror.id).await?.is_empty() {
                    return Ok(());
                }
            }
        }
        // A session that is gone is better noticed now than in the round.
        source.run("").await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statement_that_waits_gets_rounds_that_begin_after_it() {
        let at = Instant::now();
        let nudge = Nudge { at: Some(at) };
        let after = |millis| at + Duration::from_millis(millis);
        assert_eq!(nudge.due(at), Some(after(20)));
        assert_eq!(nudge.due(after(20)), Some(after(250)));
        assert_eq!(nudge.due(after(1999)), Some(after(2000)));
        assert_eq!(nudge.due(after(2001)), None);
        assert_eq!(Nudge::default().due(at), None);
    }
}
