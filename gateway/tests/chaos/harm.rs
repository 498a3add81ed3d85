//! What goes wrong: processes, servers and networks, at random.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::AddAssign;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::engine::is_expected;
use crate::journal::Journal;
use crate::servers::{Down, World, ask};

/// What was done, and how often.
#[derive(Default)]
pub(crate) struct Totals {
    done: BTreeMap<&'static str, u32>,
    pub(crate) transactions: u64,
    pub(crate) looks: u64,
}

impl AddAssign for Totals {
    fn add_assign(&mut self, other: Totals) {
        for (what, n) in other.done {
            *self.done.entry(what).or_default() += n;
        }
        self.transactions += other.transactions;
        self.looks += other.looks;
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} transactions, {} looks at the target", self.transactions, self.looks)?;
        self.done.iter().try_for_each(|(what, n)| write!(f, ", {n} {what}"))
    }
}

/// Does harm, one thing after the other.
pub(crate) struct Harm {
    random: StdRng,
    journal: Journal,
    points: Vec<String>,
    pub(crate) totals: Totals,
}

impl Harm {
    pub(crate) fn new(seed: u64, journal: &Journal) -> Harm {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../mirror/src");
        let mut points = Vec::new();
        find_points(&source, &mut points);
        points.sort();
        Harm { random: StdRng::seed_from_u64(seed), journal: journal.clone(), points, totals: Totals::default() }
    }

    fn note(&mut self, what: &'static str, more: impl fmt::Display) {
        self.journal.note(format!("{what} {more}"));
        *self.totals.done.entry(what).or_default() += 1;
    }

    async fn pause(&mut self, milliseconds: std::ops::Range<u64>) {
        // Only to choose the moment.
        tokio::time::sleep(Duration::from_millis(self.random.random_range(milliseconds))).await;
    }

    /// Does one thing, and sees to it that an engine runs most of the time.
    ///
    /// # Errors
    /// If an engine ended without having been told to.
    pub(crate) async fn act(&mut self, world: &mut World) -> Result<(), String> {
        self.look_after_engines(world)?;
        self.pause(100..1500).await;
        let side = self.random.random_range(0..3);
        match self.random.random_range(0..100) {
            0..18 => {
                let n = self.random.random_range(0..2);
                if let Some(engine) = world.engines[n].take() {
                    self.note("engines killed", n);
                    tokio::task::spawn_blocking(move || engine.kill()).await.unwrap();
                }
            }
            18..22 => {
                let n = self.random.random_range(0..2);
                if let Some(engine) = &world.engines[n] {
                    self.note("engines told to end", n);
                    engine.signal(Signal::SIGTERM);
                }
            }
            22..30 => self.freeze(world).await,
            30..44 => {
                let down = [Down::Killed, Down::Killed, Down::Immediate, Down::Fast][self.random.random_range(0..4)];
                self.note("servers taken down", format!("{} {down:?}", world.servers()[side].name));
                world.servers()[side].bounce(down).await;
            }
            44..52 => {
                self.note("networks cut", world.servers()[side].name);
                world.servers()[side].proxy.cut();
            }
            52..66 => {
                let bytes = 1 << self.random.random_range(6..20);
                self.note("networks cut amid a message", format!("{} after {bytes} bytes", world.servers()[side].name));
                world.servers()[side].proxy.cut_after(bytes);
            }
            66..74 => {
                self.note("networks stalled", world.servers()[side].name);
                world.servers()[side].proxy.stall();
                self.pause(100..4000).await;
                world.servers()[side].proxy.pass();
            }
            74..80 => {
                self.note("networks refusing", world.servers()[side].name);
                world.servers()[side].proxy.refuse();
                self.pause(100..2000).await;
                world.servers()[side].proxy.pass();
            }
            80..86 => {
                // A clock that was set: the other process takes over while the first still writes.
                self.note("leases expired", "");
                self.on_catalog(world, "update peergate.mirror_leases set expires_at = now() - interval '1 s'").await;
            }
            86..92 => {
                let database = ["shop", "dwh", "control"][side];
                self.note("sessions ended", database);
                let end = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'peergate'";
                if let Ok(client) = world.servers()[side].connect(database).await {
                    let _ = client.batch_execute(end).await;
                }
            }
            92..95 => {
                self.note("pauses", "");
                self.on_catalog(world, "update peergate.mirrors set desired_state = 'paused'").await;
                self.pause(0..1500).await;
                self.on_catalog(world, "update peergate.mirrors set desired_state = 'running'").await;
            }
            95..98 => self.resync(world).await,
            _ => {
                self.note("calm moments", "");
                self.pause(500..3000).await;
            }
        }
        Ok(())
    }

    /// A process that stands still, and does not know that time has passed.
    async fn freeze(&mut self, world: &mut World) {
        let n = self.random.random_range(0..2);
        let Some(engine) = &world.engines[n] else { return };
        engine.signal(Signal::SIGSTOP);
        self.note("engines frozen", n);
        if self.random.random_bool(0.4) {
            self.on_catalog(world, "update peergate.mirror_leases set expires_at = now() - interval '1 s'").await;
        }
        self.pause(200..4000).await;
        if let Some(engine) = &world.engines[n] {
            engine.signal(Signal::SIGCONT);
        }
    }

    /// A table is copied again while the others stream.
    async fn resync(&mut self, world: &World) {
        let Ok(control) = world.catalog.connect("control").await else { return };
        let some = "select jsonb_build_array(jsonb_build_object('schema', source_schema, 'name', source_name))::text
            from peergate.mirror_tables where state = 'live' order by random() limit 1";
        let tables = ask(&control, some).await.unwrap_or_default();
        if tables.is_empty() {
            return;
        }
        self.note("tables copied again", &tables);
        let call = format!("call peergate.resync_mirror('m', '{}')", tables.replace('\'', "''"));
        if let Err(error) = control.batch_execute(&call).await {
            self.journal.note(format!("not copied again: {error:?}"));
        }
    }

    async fn on_catalog(&self, world: &World, statement: &str) {
        if let Ok(control) = world.catalog.connect("control").await {
            let _ = control.batch_execute(statement).await;
        }
    }

    /// Starts engines that have ended; some are to die at a failure point.
    fn look_after_engines(&mut self, world: &mut World) -> Result<(), String> {
        for n in 0..2 {
            if let Some(status) = world.engines[n].as_ref().and_then(|e| e.ended()) {
                if !is_expected(status) && !self.may_end_by_itself(status) {
                    return Err(format!("engine {n} ended by itself: {status}"));
                }
                self.journal.note(format!("engine {n} has ended: {status}"));
                world.engines[n] = None;
            }
            // The second is there half of the time.
            if world.engines[n].is_none() && (n == 0 || self.random.random_bool(0.3)) {
                let point = self.random.random_bool(0.4).then(|| {
                    let point = &self.points[self.random.random_range(0..self.points.len())];
                    format!("{point}=kill:{}", self.random.random_range(0..6))
                });
                self.journal.note(format!("engine {n} starts {}", point.as_deref().unwrap_or_default()));
                world.start_engine(n, point.as_deref());
            }
        }
        Ok(())
    }

    /// An engine that cannot reach its catalog when it starts says so and ends; whoever runs it starts it again.
    fn may_end_by_itself(&self, status: std::process::ExitStatus) -> bool {
        status.code() == Some(1)
    }
}

fn find_points(folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            find_points(&path, found);
        } else {
            let text = std::fs::read_to_string(&path).unwrap();
            found.extend(text.split("fail_point!(\"").skip(1).map(|rest| rest.split('"').next().unwrap().to_owned()));
        }
    }
}
