//! The pure parts of the engine in a world of its own, ten thousand times: a source and a target in memory, owners that die, are cut off,
//! are replaced and write on all the same. After each step the target must be exactly what the source was at the target's position. In every
//! other run rows that are deleted stay, marked, each as it was last.
//!
//! `SIMULATION_SEED=n` repeats one run, `SIMULATION_RUNS=n` says how many there are.

mod source;

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;
use catalog::mirror::{Bookkeeping, ColumnChoice, Ddl, Mode};
use futures_util::FutureExt;
use pg::{Lsn, TableName};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use self::source::{COLUMNS, Kind, Source, Walsender};
use crate::assemble::{self, Assembler, Tables};
use crate::batch::Batch;
use crate::error::Error;
use crate::progress::{Gap, SlotFacts, SourceFacts, check_continuity};
use crate::schema::{RowIdentity, SourceColumn, SourceTable, TablePlan, TargetColumn, TargetTable};
use crate::sink::Sink;
use crate::sink::memory::{MemorySink, SharedTarget, State, Target, look};
use crate::source::look::Look;
use crate::state::{Begin, Durable, begin};

/// What the catalog knows of the mirror.
#[derive(Default)]
struct Known {
    epoch: i64,
    snapshot: Option<Lsn>,
    copied: bool,
}

/// An owner of the mirror that streams.
struct Owner {
    walsender: Walsender,
    assembler: Assembler,
    sink: MemorySink,
    /// Positions that are durable, on their way to the source.
    acknowledging: Vec<Lsn>,
}

struct World {
    random: StdRng,
    source: Source,
    target: SharedTarget,
    known: Known,
    owner: Option<Owner>,
    /// Owners that were replaced, and do not know it yet.
    replaced: Vec<Owner>,
    /// The target as it was once, which a restore brings back.
    backup: Option<Target>,
    /// A new copy is needed, and it was said so.
    resync_required: bool,
    /// The target's version that was looked at last.
    seen: u64,
}

#[test]
fn ten_thousand_lives_lose_and_double_nothing() {
    if let Ok(seed) = std::env::var("SIMULATION_SEED") {
        return live(seed.parse().unwrap());
    }
    let runs: u64 = std::env::var("SIMULATION_RUNS").map_or(10_000, |n| n.parse().unwrap());
    let first: u64 = rand::random_range(0..u64::MAX / 2);
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get() as u64);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                for seed in (first + thread..first + runs).step_by(threads as usize) {
                    if std::panic::catch_unwind(|| live(seed)).is_err() {
                        panic!("repeat it with SIMULATION_SEED={seed}");
                    }
                }
            });
        }
    });
}

/// One mirror's life; panics when something is not as it must be.
fn live(seed: u64) {
    let mut world = World {
        random: StdRng::seed_from_u64(seed),
        source: Source::new(seed.is_multiple_of(2)),
        target: SharedTarget::default(),
        known: Known::default(),
        owner: None,
        replaced: Vec::new(),
        backup: None,
        resync_required: false,
        seen: 0,
    };
    for _ in 0..5 {
        world.source.act(&mut world.random);
    }
    for _ in 0..60 {
        world.step();
        world.check();
        if world.resync_required {
            return;
        }
    }
    // Then nothing fails any more.
    world.owner = None;
    while world.owner.is_none() && !world.resync_required {
        world.take_over(0.0);
    }
    while look(&world.target).applied < world.source.end() && !world.resync_required {
        world.read(3);
        world.hand_over(true);
        world.check();
    }
    while let Some(late) = world.replaced.pop() {
        world.write_late(late);
    }
    world.check();
}

impl World {
    fn step(&mut self) {
        match self.random.random_range(0..100) {
            0..20 => self.source.act(&mut self.random),
            20..55 => {
                let messages = self.random.random_range(1..8);
                self.read(messages);
            }
            55..78 => self.hand_over(false),
            78..86 => self.acknowledge(),
            // The process dies, or loses both connections; what was on its way to the source may be lost.
            86..90 => self.owner = None,
            // Another process takes over; the first does not know.
            90..93 => {
                self.replaced.extend(self.owner.take());
                self.take_over(0.2);
            }
            93..95 => {
                if let Some(late) = self.replaced.pop() {
                    self.write_late(late);
                }
            }
            95 if self.backup.is_none() => self.backup = Some(look(&self.target).clone()),
            96 if self.random.random_bool(0.2) => self.restore(),
            _ if self.owner.is_none() => self.take_over(0.2),
            _ => {}
        }
    }

    /// The target is what the source was at its position, whole transactions only, and the slot is not ahead of it.
    fn check(&mut self) {
        let target = look(&self.target);
        if target.applied > Lsn::ZERO {
            if std::mem::replace(&mut self.seen, target.version) == target.version {
                return;
            }
            let from = self.known.snapshot.expect("made before the first row");
            assert_eq!(target.state, self.source.mirrored(from, target.applied), "the target at {}", target.applied);
            let confirmed = self.source.confirmed.filter(|_| !self.resync_required);
            assert!(
                confirmed.is_none_or(|c| c <= target.applied || self.backup.is_some()),
                "the slot is ahead of the target"
            );
        }
    }

    /// A new owner begins where the durable facts say; with this probability it fails after each thing that it does.
    fn take_over(&mut self, failure: f64) {
        self.known.epoch += 1;
        let Ok(mut sink) = MemorySink::claim(&self.target, self.known.epoch) else { unreachable!("the newest owner") };
        let fails = |random: &mut StdRng| random.random_bool(failure);
        // Here all tables are marked at once, together with the position.
        let (copied, snapshot, applied) = (self.known.copied, self.known.snapshot, sink.applied());
        let durable = Durable { copied, snapshot, applied, marks: applied > Lsn::ZERO };
        if begin(Mode::CopyAndStream, &durable) == Begin::Anew {
            assert_eq!(sink.applied(), Lsn::ZERO, "a target with progress is never copied to again");
            let snapshot = self.source.make_slot();
            if fails(&mut self.random) {
                return;
            }
            self.known.snapshot = Some(snapshot);
            sink.run_fenced(State::clear).unwrap();
            let seen = self.source.state_at(snapshot).clone();
            for (name, rows) in seen {
                if fails(&mut self.random) {
                    return;
                }
                self.source.act(&mut self.random);
                sink.run_fenced(|state| drop(state.insert(name, rows))).unwrap();
            }
            let recorded = Batch::position(snapshot);
            sink.apply(&recorded).now_or_never().expect("nothing is waited for").unwrap();
            if fails(&mut self.random) {
                return;
            }
        }
        let slot = self.source.confirmed.map(|lsn| SlotFacts {
            confirmed_flush: Some(lsn),
            lost: None,
            foreign: None,
            active_pid: None,
        });
        let facts = SourceFacts { system: "1", wal_end: self.source.end(), left_ours_at: None };
        let applied = match check_continuity(Some("1"), facts, slot.as_ref(), Some(sink.applied())) {
            Ok(applied) => applied,
            Err(Gap::SlotAhead { .. } | Gap::ProgressMissing) if self.backup.is_some() => {
                self.resync_required = true;
                return;
            }
            Err(gap) => panic!("nothing was lost, and yet: {gap:?}"),
        };
        self.known.copied = true;
        let overeager = self.random.random_bool(0.3);
        let walsender = self.source.start(applied, overeager);
        let assembler = Assembler::new(tables(&self.source), applied);
        self.owner = Some(Owner { walsender, assembler, sink, acknowledging: Vec::new() });
    }

    fn read(&mut self, messages: usize) {
        let Some(owner) = &mut self.owner else { return };
        for _ in 0..messages {
            match owner.walsender.next(&self.source, &mut self.random) {
                Some((lsn, body)) => hear(&mut owner.assembler, lsn, body),
                None => break,
            }
        }
        if let Some(end) = owner.walsender.sent(&self.source) {
            owner.assembler.keepalive(end);
        }
    }

    /// Gives the sink what is open, whole transactions or a part of one; or, when there is nothing, the position.
    fn hand_over(&mut self, all_is_well: bool) {
        let Some(owner) = &mut self.owner else { return };
        let Some(batch) = next_batch(owner) else { return };
        // The target goes away before the commit, or the answer to it is lost.
        if !all_is_well && self.random.random_bool(0.03) {
            if self.random.random_bool(0.5) {
                let _ = owner.sink.apply(&batch).now_or_never().expect("nothing is waited for");
            }
            self.owner = None;
            return;
        }
        match owner.sink.apply(&batch).now_or_never().expect("nothing is waited for") {
            Ok(durable) => owner.acknowledging.extend(durable.map(|d| d.lsn())),
            // After a restore the progress row is not as this owner left it.
            Err(Error::Fenced) if self.backup.is_some() => self.owner = None,
            Err(error) => panic!("{error:?}"),
        }
    }

    fn acknowledge(&mut self) {
        let Some(owner) = &mut self.owner else { return };
        if let Some(lsn) = owner.acknowledging.pop() {
            owner.acknowledging.clear();
            self.source.confirmed = self.source.confirmed.max(Some(lsn));
        }
    }

    /// An owner that was replaced wakes up and writes what it has: it must be refused, and what it acknowledges must be true.
    fn write_late(&mut self, mut late: Owner) {
        let before = look(&self.target).clone();
        for _ in 0..10 {
            if let Some((lsn, body)) = late.walsender.next(&self.source, &mut self.random) {
                hear(&mut late.assembler, lsn, body);
            }
        }
        let Some(batch) = next_batch(&mut late) else { return };
        match late.sink.apply(&batch).now_or_never().expect("nothing is waited for") {
            // What it finds there may not be what it left: it is told so by one or the other.
            Ok(None) | Err(Error::Fenced | Error::Blocked(_)) => {}
            other => panic!("a late owner wrote: {other:?}"),
        }
        let after = look(&self.target);
        assert_eq!((&after.state, after.applied), (&before.state, before.applied), "a late owner changed the target");
    }

    /// The target's server comes back from a backup, whoever owns the mirror.
    fn restore(&mut self) {
        let Some(backup) = &self.backup else { return };
        let epoch = look(&self.target).epoch;
        *look(&self.target) = Target { epoch, version: self.seen + 1, ..backup.clone() };
        self.owner = None;
    }
}

/// Takes a message; a table that is described looks as it always did.
fn hear(assembler: &mut Assembler, lsn: Lsn, body: Bytes) {
    assembler.message(lsn, body).unwrap();
    while let Some(relation) = assembler.undescribed() {
        let table = assembler.known(relation.oid).map(|k| k.plan.source.clone());
        assembler.describe(&relation, Look::new(table)).unwrap();
    }
}

fn next_batch(owner: &mut Owner) -> Option<Batch> {
    if !owner.assembler.open().is_empty() {
        return Some(owner.assembler.take());
    }
    let position = owner.assembler.idle_position().filter(|p| *p > owner.sink.applied())?;
    Some(Batch::position(position))
}

/// What the engine would have looked up on both sides.
fn tables(source: &Source) -> Tables {
    let (mut known, mut targets) = (HashMap::new(), HashMap::new());
    for table in &source.tables {
        let name = table.name();
        let key: Vec<String> = table.key().iter().map(|c| (*c).to_owned()).collect();
        let identity =
            if table.kind == Kind::Keyless { RowIdentity::InsertsOnly } else { RowIdentity::Key(key.clone()) };
        let plan = plan(table.oid, &name, identity);
        known.insert(table.oid, assemble::Known { listed: name.clone(), plan, indexes: false, constraints: false });
        targets.insert(name.clone(), target(table.oid, &name, key, source.bookkeeping()));
    }
    Tables {
        known,
        targets,
        types: HashMap::new(),
        binary: false,
        builtin: HashSet::new(),
        in_order: false,
        ddl: Ddl::Apply,
        routes: HashMap::new(),
        others_come: false,
    }
}

fn plan(oid: u32, name: &TableName, identity: RowIdentity) -> TablePlan {
    let column = |(n, name): (usize, &&str)| SourceColumn {
        number: n as i16 + 1,
        name: (*name).to_owned(),
        type_oid: 25,
        type_modifier: -1,
        type_sql: "text".to_owned(),
        collation: None,
        not_null: false,
        default: None,
        generated: None,
        identity: None,
        missing: None,
    };
    let source = SourceTable {
        oid,
        name: name.clone(),
        columns: COLUMNS.iter().enumerate().map(column).collect(),
        identity,
        indexes: Vec::new(),
        partitioned: false,
        root: None,
        files: BTreeMap::new(),
        storage: Default::default(),
        constraints: Vec::new(),
        last_number: COLUMNS.len() as i16,
    };
    TablePlan { source, target_name: name.clone(), columns: ColumnChoice::default(), condition: None }
}

fn target(oid: u32, name: &TableName, key: Vec<String>, bookkeeping: Bookkeeping) -> TargetTable {
    let column = |name: &str| TargetColumn {
        name: name.to_owned(),
        type_oid: 25,
        type_sql: "text".to_owned(),
        generated: false,
        identity_always: false,
        required: false,
        has_equality: true,
        wire: None,
    };
    TargetTable {
        oid,
        name: name.clone(),
        partitioned: false,
        type_schemas: Vec::new(),
        columns: COLUMNS.map(column).to_vec(),
        unique_keys: vec![key],
        other_unique: false,
        odd_unique: false,
        has_rows: false,
        has_foreign_keys: false,
        cascades: false,
        bookkeeping,
    }
}
