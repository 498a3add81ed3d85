//! Which mirrors run in this process: compares what the catalog wants with what is, and acts.
//!
//! Any number of processes may do this on one catalog. Leases keep them from doing the same work; the epoch on the target, not the
//! lease, keeps a late one from writing.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::lease::Assignment;
use catalog::task::TaskKind;
use pg::SqlState;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{Id, JoinError, JoinSet};
use tracing::Instrument;

use crate::error::{Error, Problem};
use crate::guard;
use crate::removal;
use crate::state::{Action, Local, MirrorState, reconcile};
use crate::worker::{self, Context, Outcome, Stop};

/// How long a lease holds without being renewed.
const LEASE_TTL: Duration = Duration::from_secs(15);

/// How often leases are renewed.
const RENEW_INTERVAL: Duration = Duration::from_secs(5);

/// How often the catalog is looked at without having been notified.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

/// How long the catalog may take to answer; it is asked little.
const CATALOG_PATIENCE: Duration = Duration::from_secs(5);

/// How long a shutdown waits for workers to finish their batches.
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(8);

/// Who this process is.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Its identity, kept across restarts and used by one process at a time.
    pub node_id: String,
    /// The machine's name.
    pub host: String,
    /// What it runs: all or engine.
    pub role: &'static str,
}

/// A worker of this process.
struct Worker {
    mirror: String,
    epoch: i64,
    local: Local,
    stop: watch::Sender<bool>,
    waited_for: Arc<Notify>,
    has_task: Arc<Notify>,
    to_verify: Arc<Notify>,
}

/// The engine's state.
struct Engine {
    catalog: Catalog,
    node_id: Arc<str>,
    options: EngineOptions,
    workers: HashMap<i64, Worker>,
    running: JoinSet<Outcome>,
    tasks: HashMap<Id, i64>,
    removals: JoinSet<i64>,
    removing: HashSet<i64>,
    renewed: Instant,
}

/// Runs mirrors until `shutdown` says otherwise; then stops them, resumable, and gives their leases back.
///
/// A catalog that cannot be reached is waited for.
///
/// # Errors
/// None today; a caller takes an end by itself for a failure.
pub async fn run(catalog: Catalog, options: EngineOptions, mut shutdown: watch::Receiver<bool>) -> Result<(), Error> {
    let mut engine = Engine {
        catalog,
        node_id: options.node_id.as_str().into(),
        options,
        workers: HashMap::new(),
        running: JoinSet::new(),
        tasks: HashMap::new(),
        removals: JoinSet::new(),
        removing: HashSet::new(),
        renewed: Instant::now(),
    };
    let mut guard = JoinSet::new();
    guard.spawn(guard::watch(engine.catalog.clone(), engine.node_id.clone()));
    let mut notifications: Option<mpsc::Receiver<String>> = None;
    let mut poll = tokio::time::interval(POLL_INTERVAL);
    let mut renew = tokio::time::interval(RENEW_INTERVAL);
    let mut starting = true;
    loop {
        if notifications.is_none() {
            notifications = engine.catalog.listen().await.ok();
        }
        let woken = tokio::select! {
            () = async { let _ = shutdown.wait_for(|stop| *stop).await; } => break,
            _ = poll.tick() => true,
            _ = renew.tick() => {
                engine.renew(starting).await;
                starting = false;
                false
            }
            payload = receive(&mut notifications) => engine.notified(payload),
            Some(finished) = engine.running.join_next_with_id() => {
                match finished {
                    Ok((task, outcome)) => engine.worker_ended(task, outcome).await,
                    Err(panic) => engine.worker_panicked(&panic).await,
                }
                true
            }
            Some(finished) = engine.removals.join_next() => {
                if let Ok(mirror_id) = finished {
                    engine.removing.remove(&mirror_id);
                }
                false
            }
        };
        if woken && let Err(error) = engine.reconcile().await {
            tracing::warn!(error = %error, "catalog cannot be read");
        }
    }
    guard.shutdown().await;
    engine.shut_down().await;
    Ok(())
}

/// Waits for a notification; forever when nobody listens. A broken session ends the listening, and the caller begins anew.
async fn receive(notifications: &mut Option<mpsc::Receiver<String>>) -> Option<String> {
    match notifications {
        None => std::future::pending().await,
        Some(receiver) => {
            let payload = receiver.recv().await;
            if payload.is_none() {
                *notifications = None;
            }
            payload
        }
    }
}

/// Waits for the catalog, but not for ever: a connection into nothing must not keep the engine from noticing that its leases run out.
async fn answered<T>(asked: impl Future<Output = Result<T, catalog::Error>>) -> Result<T, Error> {
    match tokio::time::timeout(CATALOG_PATIENCE, asked).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(Error::Transient(Problem::new(
            SqlState::CONNECTION_EXCEPTION,
            format!("catalog: no answer within {CATALOG_PATIENCE:?}"),
        ))),
    }
}

/// Whether leases that were last renewed so long ago may be another's soon: two thirds of their time are over. Time is measured here by
/// this machine's monotonic clock, and of leases only by the catalog's: neither depends on what a clock shows.
fn is_overdue(since_renewal: Duration) -> bool {
    since_renewal > LEASE_TTL * 2 / 3
}

impl Engine {
    /// A statement said something; returns whether everything is to be looked at. `wait:name` only asks the mirror to hurry, and
    /// `verify:name` to look for verifications.
    fn notified(&self, payload: Option<String>) -> bool {
        let payload = payload.unwrap_or_default();
        let Some((what @ ("wait" | "verify"), name)) = payload.split_once(':') else { return true };
        for worker in self.workers.values().filter(|w| w.mirror == name) {
            if what == "wait" { &worker.waited_for } else { &worker.to_verify }.notify_one();
        }
        false
    }

    async fn reconcile(&mut self) -> Result<(), Error> {
        let assignments = self.catalog.assignments(&self.node_id).await?;
        let known: HashSet<i64> = assignments.iter().map(|a| a.mirror_id).collect();
        for assignment in &assignments {
            if let Some(worker) = self.workers.get(&assignment.mirror_id).filter(|_| assignment.has_task) {
                worker.has_task.notify_one();
            }
            let local = self.workers.get(&assignment.mirror_id).map_or(Local::None, |w| w.local.clone());
            match reconcile(assignment, &local) {
                Action::Nothing => {}
                Action::Stop => self.stop(assignment.mirror_id),
                Action::Start => self.start(assignment).await?,
                Action::NotePaused => self.note_paused(assignment).await?,
            }
        }
        let dropped: Vec<i64> = self.workers.keys().filter(|id| !known.contains(id)).copied().collect();
        for mirror_id in dropped {
            match self.workers[&mirror_id].local {
                Local::Running(_) => self.stop(mirror_id),
                Local::Stopping => {}
                Local::None | Local::GaveUp(_) => drop(self.workers.remove(&mirror_id)),
            }
        }
        self.remove_dropped().await
    }

    fn stop(&mut self, mirror_id: i64) {
        if let Some(worker) = self.workers.get_mut(&mirror_id) {
            worker.stop.send_replace(true);
            worker.local = Local::Stopping;
        }
    }

    async fn start(&mut self, assignment: &Assignment) -> Result<(), Error> {
        let id = assignment.mirror_id;
        let Some(epoch) = self.catalog.acquire_lease(id, &self.node_id, LEASE_TTL).await? else { return Ok(()) };
        let (stop, wish) = Stop::new();
        let [waited_for, has_task, to_verify] = [(); 3].map(|()| Arc::new(Notify::new()));
        let local = Local::Running(assignment.generation.clone());
        let notified = [waited_for.clone(), has_task.clone(), to_verify.clone()];
        let worker = Worker { mirror: assignment.name.clone(), epoch, local, stop, waited_for, has_task, to_verify };
        self.workers.insert(id, worker);
        let mirror = match self.catalog.mirror(id).await {
            Ok(Some(mirror)) => mirror,
            Ok(None) => {
                self.workers.remove(&id);
                return Ok(());
            }
            Err(error) => {
                let error = Error::from(error);
                return self.cannot_start(assignment, error).await;
            }
        };
        let span = tracing::info_span!(
            "mirror",
            mirror = mirror.name,
            source = mirror.source_name,
            target = mirror.target_name,
            slot = mirror.object_name
        );
        let context = Context::new(self.catalog.clone(), self.node_id.clone(), mirror, epoch, wish, notified);
        let handle = self.running.spawn(worker::run(context).instrument(span));
        self.tasks.insert(handle.id(), id);
        Ok(())
    }

    /// A panic is a bug of ours. Its mirror waits for a person; the others go on.
    async fn worker_panicked(&mut self, panic: &JoinError) {
        let problem = Problem::new(SqlState::INTERNAL_ERROR, format!("the mirror's worker failed: {panic}"))
            .hint("This is a bug in Peergate: report it with the log. RESUME MIRROR tries again.");
        tracing::error!(error = problem.message, "mirror stopped");
        if let Some(id) = self.tasks.get(&panic.id()).copied() {
            let told = self.tell_blocked(id, &problem).await;
            if let Err(error) = told {
                tracing::warn!(error = %error, "failure not recorded");
            }
        }
        self.worker_ended(panic.id(), Outcome::GaveUp).await;
    }

    /// Says so in the catalog, unless another process has the mirror by now.
    async fn tell_blocked(&self, mirror_id: i64, problem: &Problem) -> Result<(), Error> {
        let Some(worker) = self.workers.get(&mirror_id) else { return Ok(()) };
        self.catalog.hold_up_tasks(mirror_id, &problem.sqlstate.to_string(), &problem.message, true).await?;
        let blocked = MirrorState::Blocked.as_str();
        self.catalog.set_mirror_failure(mirror_id, worker.epoch, blocked, &problem.failure(1, None)).await?;
        Ok(())
    }

    /// A mirror whose definition cannot be read, above all because a secret cannot be opened, waits for a person.
    async fn cannot_start(&mut self, assignment: &Assignment, error: Error) -> Result<(), Error> {
        let id = assignment.mirror_id;
        let (Error::Blocked(problem), Some(worker)) = (&error, self.workers.get_mut(&id)) else {
            self.workers.remove(&id);
            return Err(error);
        };
        worker.local = Local::GaveUp(assignment.generation.clone());
        self.tell_blocked(id, problem).await
    }

    async fn note_paused(&mut self, assignment: &Assignment) -> Result<(), Error> {
        let id = assignment.mirror_id;
        let Some(epoch) = self.catalog.acquire_lease(id, &self.node_id, LEASE_TTL).await? else { return Ok(()) };
        let paused = MirrorState::Paused.as_str();
        if assignment.state != paused {
            self.catalog.set_mirror_state(id, epoch, paused).await?;
        }
        self.catalog.advance_tasks(id, TaskKind::PauseMirror, 1.0).await?;
        self.catalog.release_leases(&[id], &self.node_id).await?;
        Ok(())
    }

    async fn worker_ended(&mut self, task: Id, outcome: Outcome) {
        let Some(id) = self.tasks.remove(&task) else { return };
        let Some(worker) = self.workers.get_mut(&id) else { return };
        match (outcome, &worker.local) {
            (Outcome::GaveUp, Local::Running(generation)) => worker.local = Local::GaveUp(generation.clone()),
            _ => drop(self.workers.remove(&id)),
        }
        // Nothing of it runs here any more, so anybody may take it.
        if outcome != Outcome::Fenced {
            let _ = self.catalog.release_leases(&[id], &self.node_id).await;
        }
    }

    /// Prolongs the leases. Workers whose lease is gone, or could not be renewed for two thirds of its time, stop by themselves.
    async fn renew(&mut self, starting: bool) {
        let report = self.catalog.report_node(&self.node_id, &self.options.host, self.options.role, starting);
        if let Err(error) = answered(report).await {
            tracing::warn!(error = %error, "node not reported");
        }
        let running = |w: &Worker| matches!(w.local, Local::Running(_) | Local::Stopping);
        let held: Vec<i64> = self.workers.iter().filter(|(_, w)| running(w)).map(|(id, _)| *id).collect();
        let renewal = answered(self.catalog.renew_leases(&held, &self.node_id, LEASE_TTL)).await;
        let lost: Vec<i64> = match renewal {
            Ok(kept) => {
                self.renewed = Instant::now();
                // A dropped mirror's lease is still there, so what is missing was taken.
                held.into_iter().filter(|id| !kept.contains(id)).collect()
            }
            Err(_) if is_overdue(self.renewed.elapsed()) => held,
            Err(_) => Vec::new(),
        };
        for mirror_id in lost {
            tracing::warn!(mirror_id, "lease lost");
            self.stop(mirror_id);
        }
    }

    async fn remove_dropped(&mut self) -> Result<(), Error> {
        for order in self.catalog.due_removals().await? {
            let id = order.mirror_id;
            if self.workers.contains_key(&id) || self.removing.contains(&id) {
                continue;
            }
            if self.catalog.acquire_lease(id, &self.node_id, LEASE_TTL).await?.is_none() {
                continue;
            }
            self.removing.insert(id);
            let (catalog, node_id) = (self.catalog.clone(), self.node_id.clone());
            self.removals.spawn(async move {
                removal::run(&catalog, &node_id, &order).await;
                id
            });
        }
        Ok(())
    }

    async fn shut_down(&mut self) {
        let ids: Vec<i64> = self.workers.keys().copied().collect();
        for id in &ids {
            self.stop(*id);
        }
        let all = async { while self.running.join_next().await.is_some() {} };
        if tokio::time::timeout(SHUTDOWN_PATIENCE, all).await.is_err() {
            tracing::warn!("mirrors did not stop in time; they resume where the target is");
            self.running.shutdown().await;
        }
        if let Err(error) = self.catalog.release_leases(&ids, &self.node_id).await {
            tracing::warn!(error = %error, "leases not given back; they expire");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_stops_before_its_lease_can_be_anothers() {
        assert!(!is_overdue(RENEW_INTERVAL), "one renewal may fail");
        assert!(is_overdue(RENEW_INTERVAL * 2 + Duration::from_millis(1)));
        // The last look before the lease ends sees it, with all that the catalog may take to answer.
        assert!(LEASE_TTL * 2 / 3 + CATALOG_PATIENCE <= LEASE_TTL);
    }
}
