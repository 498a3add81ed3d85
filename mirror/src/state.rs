//! Where a mirror and its tables are, and what the engine does about a mirror. Pure.

use std::time::Duration;

use catalog::lease::Assignment;
use catalog::mirror::Mode;
use pg::Lsn;

use crate::error::{Error, retry_delay};

/// Where a mirror is. Stored in `mirror_runtime.state`; each change is an event, which the catalog records with the change itself.
///
/// A mirror that is being dropped has no state any more: its work order (`mirror_drops`) and its task say how that stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MirrorState {
    /// Defined; no engine has taken it up. On restart: taken up.
    Created,
    /// Both sides are being checked; nothing was made. Entered by: the start sequence. On restart: checked again.
    Preflight,
    /// Types and tables are being made on the target. Entered after preflight. On restart: what is there is kept, the rest made.
    Schema,
    /// Publication and slot are being made. Entered after schema. On restart: both are made anew.
    Slot,
    /// Rows that are there are being copied. Entered when the slot's snapshot exists. On restart: copied anew, since the snapshot is gone.
    Copying,
    /// The copy is complete and nothing is missing; changes since are being applied. On restart: streams from the target's progress.
    Catchup,
    /// The target follows the source. Entered when it has reached the source's position. On restart: as catchup.
    Running,
    /// Nothing is written, because the user said so. On restart: stays so.
    Paused,
    /// Something failed that will pass; tried again at `retry_at`. On restart: tried at once.
    Retrying,
    /// Something failed that stays so until a person acts. On restart, or RESUME: tried once.
    Blocked,
    /// The source no longer has what the target lacks. On restart, or RESUME: looked at once more; left by a new copy, or when all that
    /// was missing is there after all (the peer pointed to another server).
    ResyncRequired,
    /// A copy that was all that was asked for is done. Final.
    Completed,
}

impl MirrorState {
    /// All of them.
    pub const ALL: [MirrorState; 12] = [
        MirrorState::Created,
        MirrorState::Preflight,
        MirrorState::Schema,
        MirrorState::Slot,
        MirrorState::Copying,
        MirrorState::Catchup,
        MirrorState::Running,
        MirrorState::Paused,
        MirrorState::Retrying,
        MirrorState::Blocked,
        MirrorState::ResyncRequired,
        MirrorState::Completed,
    ];

    /// Returns the state's name in the catalog.
    pub fn as_str(self) -> &'static str {
        match self {
            MirrorState::Created => "created",
            MirrorState::Preflight => "preflight",
            MirrorState::Schema => "schema",
            MirrorState::Slot => "slot",
            MirrorState::Copying => "copying",
            MirrorState::Catchup => "catchup",
            MirrorState::Running => "running",
            MirrorState::Paused => "paused",
            MirrorState::Retrying => "retrying",
            MirrorState::Blocked => "blocked",
            MirrorState::ResyncRequired => "resync_required",
            MirrorState::Completed => "completed",
        }
    }

    /// Returns the state of that name in the catalog.
    pub fn from_name(name: &str) -> Option<MirrorState> {
        MirrorState::ALL.into_iter().find(|state| state.as_str() == name)
    }

    /// Returns whether a mirror in this state may be put into `next`.
    ///
    /// An attempt begins with preflight, or with catchup when the copy is complete, from wherever the one before it was left: what is
    /// durable decides, not the state. Within an attempt states follow each other. Anything may fail or be paused; what is completed
    /// stays so, and what has started is never as if nothing had.
    pub fn may_become(self, next: MirrorState) -> bool {
        use MirrorState::{
            Blocked, Catchup, Completed, Copying, Created, Paused, Preflight, ResyncRequired, Retrying, Running,
            Schema, Slot,
        };
        match (self, next) {
            (Completed, _) => next == Completed,
            (_, Created) => false,
            (_, Preflight | Catchup | Paused | Retrying | Blocked | ResyncRequired) => true,
            (_, Schema) => self == Preflight,
            (_, Slot) => self == Schema,
            (_, Copying) => self == Slot,
            (_, Running) => self == Catchup,
            // Whoever completed the copy may have died before it could say so.
            (_, Completed) => true,
        }
    }

    /// Returns where an error puts a mirror that it ended attempt `attempt` of, and the pause before the next one; `None` when the
    /// error is none of the mirror's.
    ///
    /// What passes is tried again for ever, each time a little later; all else stops exactly there, until a person acts.
    pub fn after(error: &Error, attempt: u32) -> Option<(MirrorState, Option<Duration>)> {
        match error {
            Error::Transient(_) | Error::CopyAgain(_) => Some((MirrorState::Retrying, Some(retry_delay(attempt)))),
            Error::ResyncRequired(_) => Some((MirrorState::ResyncRequired, None)),
            // Written one by one already, and still no transaction could be blamed.
            Error::Blocked(_) | Error::OneByOne { .. } => Some((MirrorState::Blocked, None)),
            Error::TextNeeded | Error::Restart | Error::Fenced | Error::Stopped => None,
        }
    }
}

/// Where an attempt begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// With the start sequence, as nothing that a copy needs has survived.
    Anew,
    /// With streaming.
    Stream,
    /// Nowhere: the copy was all.
    Nothing,
}

/// What is durable when an attempt begins.
#[derive(Clone, Copy, Debug)]
pub struct Durable {
    /// The catalog says that the first copy is over.
    pub copied: bool,
    /// Where the slot was made, as the catalog knows.
    pub snapshot: Option<Lsn>,
    /// The target's progress row.
    pub applied: Lsn,
    /// The target has marks of complete tables.
    pub marks: bool,
}

impl Durable {
    /// Returns whether the target's progress is that of a copy that the catalog knows to be under way.
    pub fn is_in_copy(&self) -> bool {
        !self.copied && self.applied > Lsn::ZERO && self.snapshot == Some(self.applied)
    }
}

/// Decides where an attempt begins. A copy that was interrupted is not begun anew when tables of it are complete: the slot is still where
/// they are, and the others get copies of their own. Unless it is all that is wanted: then its tables are to be of one moment.
pub fn begin(mode: Mode, durable: &Durable) -> Begin {
    match (durable.copied || (durable.is_in_copy() && durable.marks), mode) {
        (true, Mode::CopyOnly) if durable.copied => Begin::Nothing,
        (true, Mode::CopyAndStream | Mode::StreamOnly) => Begin::Stream,
        _ => Begin::Anew,
    }
}

/// What a process knows of a mirror's worker of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Local {
    /// There is none.
    None,
    /// It runs, for this generation of the definition.
    Running(String),
    /// It was told to stop and has not yet.
    Stopping,
    /// It gave up at this generation; only a new one, or a person's RESUME, gives it another attempt.
    GaveUp(String),
}

/// What the engine does about one mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing.
    Nothing,
    /// Take the lease and start a worker.
    Start,
    /// Stop the worker.
    Stop,
    /// Take the lease and note that the mirror is paused.
    NotePaused,
}

/// Compares what is wanted with what this process does.
pub fn reconcile(assignment: &Assignment, local: &Local) -> Action {
    match (assignment.wants_running, local) {
        (_, Local::Stopping) => Action::Nothing,
        (true, Local::Running(generation)) if *generation == assignment.generation => Action::Nothing,
        (_, Local::Running(_)) => Action::Stop,
        (true, _) if assignment.state == "completed" => Action::Nothing,
        // Only what the catalog shows as waiting for a person waits; if that could not be written, or another process had it since, it is
        // tried again.
        (true, Local::GaveUp(generation))
            if *generation == assignment.generation
                && matches!(assignment.state.as_str(), "blocked" | "resync_required") =>
        {
            Action::Nothing
        }
        (true, _) if assignment.free => Action::Start,
        (false, _) if assignment.free && (assignment.state != "paused" || assignment.has_task) => Action::NotePaused,
        _ => Action::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use pg::SqlState;

    use super::*;
    use crate::error::Problem;

    fn assignment(wants_running: bool, free: bool, state: &str) -> Assignment {
        Assignment {
            mirror_id: 1,
            name: "m".into(),
            wants_running,
            generation: "2".into(),
            held: false,
            free,
            has_task: false,
            state: state.into(),
        }
    }

    fn running(generation: &str) -> Local {
        Local::Running(generation.into())
    }

    /// Each state with those that may follow it, other than by an end or a new beginning of an attempt.
    #[test]
    fn every_transition_is_one_that_is_documented() {
        use MirrorState::*;
        let always = [Preflight, Catchup, Paused, Retrying, Blocked, ResyncRequired, Completed];
        let within = [(Preflight, Schema), (Schema, Slot), (Slot, Copying), (Catchup, Running)];
        for from in MirrorState::ALL {
            for to in MirrorState::ALL {
                let expected = match from {
                    Completed => to == Completed,
                    _ => always.contains(&to) || within.contains(&(from, to)),
                };
                assert_eq!(from.may_become(to), expected, "{} → {}", from.as_str(), to.as_str());
            }
        }
    }

    #[test]
    fn every_state_is_found_by_its_name() {
        for state in MirrorState::ALL {
            assert_eq!(MirrorState::from_name(state.as_str()), Some(state));
        }
        assert_eq!(MirrorState::from_name("dropping"), None);
    }

    #[test]
    fn every_error_puts_the_mirror_somewhere_or_is_none_of_its_own() {
        let problem = || Problem::new(SqlState::WRONG_STATE, "x");
        for error in [Error::Transient(problem()), Error::CopyAgain(problem())] {
            let pauses: Vec<_> = [1, 2, 3, 1000].map(|n| MirrorState::after(&error, n).unwrap().1.unwrap()).into();
            assert!(pauses.is_sorted() && pauses[0] < Duration::from_secs(1), "{pauses:?}");
            assert_eq!(pauses[3], Duration::from_secs(60), "it never gives up");
            assert_eq!(MirrorState::after(&error, 7).unwrap().0, MirrorState::Retrying);
        }
        let stops = |error: &Error| MirrorState::after(error, 1);
        assert_eq!(stops(&Error::Blocked(problem())), Some((MirrorState::Blocked, None)));
        assert_eq!(stops(&Error::ResyncRequired(problem())), Some((MirrorState::ResyncRequired, None)));
        for error in [Error::Stopped, Error::Fenced, Error::TextNeeded, Error::Restart] {
            assert_eq!(stops(&error), None);
        }
    }

    #[test]
    fn a_wanted_mirror_that_nobody_holds_is_started() {
        assert_eq!(reconcile(&assignment(true, true, "created"), &Local::None), Action::Start);
        assert_eq!(reconcile(&assignment(true, false, "running"), &Local::None), Action::Nothing);
        assert_eq!(reconcile(&assignment(true, true, "completed"), &Local::None), Action::Nothing);
    }

    #[test]
    fn a_changed_definition_restarts_and_an_unwanted_mirror_stops() {
        assert_eq!(reconcile(&assignment(true, true, "running"), &running("2")), Action::Nothing);
        assert_eq!(reconcile(&assignment(true, true, "running"), &running("1")), Action::Stop);
        assert_eq!(reconcile(&assignment(false, true, "running"), &running("2")), Action::Stop);
        assert_eq!(reconcile(&assignment(false, true, "running"), &Local::Stopping), Action::Nothing);
        assert_eq!(reconcile(&assignment(false, true, "running"), &Local::None), Action::NotePaused);
        assert_eq!(reconcile(&assignment(false, true, "paused"), &Local::None), Action::Nothing);
    }

    #[test]
    fn what_gave_up_waits_for_a_person() {
        assert_eq!(reconcile(&assignment(true, true, "blocked"), &Local::GaveUp("2".into())), Action::Nothing);
        assert_eq!(reconcile(&assignment(true, true, "blocked"), &Local::GaveUp("1".into())), Action::Start);
        assert_eq!(reconcile(&assignment(true, true, "running"), &Local::GaveUp("2".into())), Action::Start);
    }

    #[test]
    fn a_copy_is_repeated_unless_something_of_it_is_complete() {
        let (mode, c) = (Mode::CopyAndStream, Some(Lsn(5)));
        let durable = |copied, snapshot, applied, marks| Durable { copied, snapshot, applied: Lsn(applied), marks };
        assert_eq!(begin(mode, &durable(false, None, 0, false)), Begin::Anew);
        assert_eq!(begin(mode, &durable(false, c, 0, false)), Begin::Anew);
        assert_eq!(begin(mode, &durable(false, c, 5, false)), Begin::Anew);
        assert_eq!(begin(mode, &durable(false, c, 5, true)), Begin::Stream);
        assert_eq!(begin(mode, &durable(true, c, 9, true)), Begin::Stream);
        // Its tables may all be under way again.
        assert_eq!(begin(mode, &durable(true, c, 9, false)), Begin::Stream);
        assert_eq!(begin(Mode::CopyOnly, &durable(true, c, 5, true)), Begin::Nothing);
        assert_eq!(begin(Mode::CopyOnly, &durable(false, c, 5, true)), Begin::Anew);
        // A progress row that is not of this snapshot belongs to an earlier life of the target.
        assert_eq!(begin(mode, &durable(false, c, 4, true)), Begin::Anew);
        assert!(durable(false, c, 5, true).is_in_copy() && !durable(false, c, 4, true).is_in_copy());
    }
}
