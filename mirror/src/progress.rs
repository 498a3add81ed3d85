//! How far a mirror is, and the only place that may say that something is durable.

use pg::{Lsn, SqlState};

use crate::error::Problem;

/// A position up to which everything is durable on the target *and* recorded there.
///
/// Only its constructor here makes one, and only a sink that has committed a progress row may call it; acknowledging to the
/// source takes nothing weaker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DurableLsn(Lsn);

impl DurableLsn {
    /// Says that the target has committed its progress row at `lsn`.
    pub(crate) fn recorded(lsn: Lsn) -> DurableLsn {
        DurableLsn(lsn)
    }

    /// Returns the position.
    pub fn lsn(self) -> Lsn {
        self.0
    }
}

/// What the slot says of itself, as far as the start of streaming needs it.
#[derive(Clone, Debug)]
pub struct SlotFacts {
    /// What was acknowledged to it.
    pub confirmed_flush: Option<Lsn>,
    /// Why the server has invalidated it; `None`: it has not.
    pub lost: Option<String>,
    /// It is not what the mirror made: another kind, plugin or database.
    pub foreign: Option<String>,
    /// The process that uses it.
    pub active_pid: Option<i32>,
}

/// Why streaming cannot go on where the target is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Gap {
    /// The source is another cluster than the one that was copied.
    OtherSystem,
    /// There is no slot any more.
    SlotMissing,
    /// A slot of that name is there, and is not ours.
    SlotForeign(String),
    /// The source has invalidated it: it no longer keeps what the target lacks.
    SlotLost(String),
    /// The slot was acknowledged further than the target is: the target was set back, or the slot was made anew.
    SlotAhead {
        /// Where the slot is.
        confirmed_flush: Lsn,
        /// Where the target is.
        applied: Lsn,
    },
    /// The target has no progress row of this mirror.
    ProgressMissing,
    /// The source's WAL ends before the target's position, or it went another way there: it was set back in time, or failed over to a
    /// standby that had less.
    SourceBehind {
        /// Where the source's WAL ends, or where its timeline left ours.
        source: Lsn,
        /// Where the target is.
        applied: Lsn,
    },
}

impl Gap {
    /// Says it of a mirror, in the words that people see.
    pub fn problem(&self, subject: &Subject<'_>, source: SourceFacts<'_>) -> Problem {
        let Subject { mirror, peer, slot, known_system } = subject;
        let (message, mut detail) = match self {
            Gap::OtherSystem => (
                format!("peer \"{peer}\" is another server than the one that was copied"),
                format!("Its system identifier is {}, it was {}.", source.system, known_system.unwrap_or_default()),
            ),
            Gap::SlotMissing => (
                format!("replication slot \"{slot}\" does not exist on the source"),
                "What happened since the target's position may be gone.".to_owned(),
            ),
            Gap::SlotForeign(what) => (
                format!("replication slot \"{slot}\" on the source is not the mirror's"),
                format!("{what}: somebody else has made it."),
            ),
            Gap::SlotLost(why) => (
                format!("replication slot \"{slot}\" was invalidated by the source"),
                format!("The source no longer keeps what the target lacks: {why}."),
            ),
            Gap::SlotAhead { confirmed_flush, applied } => (
                format!("replication slot \"{slot}\" is ahead of the target"),
                format!(
                    "The slot is at {confirmed_flush}, the target at {applied}: the target was set back, or the slot was made anew."
                ),
            ),
            Gap::SourceBehind { source, applied } => (
                format!("peer \"{peer}\" is behind the target"),
                format!(
                    "It reaches {source}, the target is at {applied}: the source was set back in time, or failed over to a standby that had less."
                ),
            ),
            Gap::ProgressMissing => (
                format!("the target has lost the progress of mirror \"{mirror}\""),
                "It was set back, restored, or cleaned up by hand.".to_owned(),
            ),
        };
        if source.left_ours_at.is_some() && matches!(self, Gap::SlotMissing | Gap::SlotForeign(_) | Gap::SlotLost(_)) {
            detail.push_str(" The source has failed over, and a standby has the slot only if it synchronizes failover slots (PostgreSQL 17 and later, sync_replication_slots).");
        }
        Problem { lsn: self.applied(), ..Problem::new(SqlState::WRONG_STATE, message) }
            .detail(detail)
            .hint("RESYNC MIRROR copies everything anew; nothing less helps.")
    }

    fn applied(&self) -> Option<Lsn> {
        match self {
            Gap::SlotAhead { applied, .. } | Gap::SourceBehind { applied, .. } => Some(*applied),
            _ => None,
        }
    }
}

/// Whose gap it is, for messages.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The mirror.
    pub mirror: &'a str,
    /// The source peer.
    pub peer: &'a str,
    /// The slot.
    pub slot: &'a str,
    /// The system identifier that the source had.
    pub known_system: Option<&'a str>,
}

/// What the source says of itself, as far as the start of streaming needs it.
#[derive(Clone, Copy, Debug)]
pub struct SourceFacts<'a> {
    /// Its system identifier.
    pub system: &'a str,
    /// End of its WAL.
    pub wal_end: Lsn,
    /// Where its timeline left the one that we knew; `None` when it is still the same.
    pub left_ours_at: Option<Lsn>,
}

/// Finds in a timeline's history where it left `timeline`; `None` if it never was on it.
///
/// Source: PostgreSQL docs, continuous-archiving, "Timelines"; protocol-replication, "TIMELINE_HISTORY".
pub fn switch_point(history: &str, timeline: i32) -> Option<Lsn> {
    history.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let found = fields.next()?.parse::<i32>().ok()? == timeline;
        found.then(|| fields.next()?.parse().ok())?
    })
}

/// Checks that everything the target lacks will come from the slot. Asked at every connect.
///
/// # Errors
/// [`Gap`] if it will not: going on would lose rows silently.
pub fn check_continuity(
    known_system: Option<&str>,
    source: SourceFacts<'_>,
    slot: Option<&SlotFacts>,
    applied: Option<Lsn>,
) -> Result<Lsn, Gap> {
    if known_system.is_some_and(|known| known != source.system) {
        return Err(Gap::OtherSystem);
    }
    let applied = applied.filter(|lsn| *lsn > Lsn::ZERO).ok_or(Gap::ProgressMissing)?;
    let reaches = source.left_ours_at.unwrap_or(source.wal_end).min(source.wal_end);
    if reaches < applied {
        return Err(Gap::SourceBehind { source: reaches, applied });
    }
    let slot = slot.ok_or(Gap::SlotMissing)?;
    if let Some(what) = &slot.foreign {
        return Err(Gap::SlotForeign(what.clone()));
    }
    if let Some(why) = &slot.lost {
        return Err(Gap::SlotLost(why.clone()));
    }
    match slot.confirmed_flush {
        Some(confirmed_flush) if confirmed_flush > applied => Err(Gap::SlotAhead { confirmed_flush, applied }),
        _ => Ok(applied),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(confirmed: u64) -> SlotFacts {
        SlotFacts { confirmed_flush: Some(Lsn(confirmed)), lost: None, foreign: None, active_pid: None }
    }

    const SOURCE: SourceFacts<'_> = SourceFacts { system: "1", wal_end: Lsn(20), left_ours_at: None };

    #[test]
    fn streaming_goes_on_where_the_target_is() {
        assert_eq!(check_continuity(Some("1"), SOURCE, Some(&slot(5)), Some(Lsn(9))), Ok(Lsn(9)));
        assert_eq!(check_continuity(None, SOURCE, Some(&slot(9)), Some(Lsn(9))), Ok(Lsn(9)));
        let failed_over = SourceFacts { left_ours_at: Some(Lsn(9)), ..SOURCE };
        assert_eq!(check_continuity(Some("1"), failed_over, Some(&slot(5)), Some(Lsn(9))), Ok(Lsn(9)));
    }

    #[test]
    fn every_gap_is_found() {
        let lost = SlotFacts { lost: Some("wal_removed".into()), ..slot(1) };
        let foreign = SlotFacts { foreign: Some("It is physical".into()), ..slot(1) };
        fn check(known: &str, source: SourceFacts<'_>, slot: Option<&SlotFacts>, applied: Option<Lsn>) -> Gap {
            check_continuity(Some(known), source, slot, applied).unwrap_err()
        }
        assert_eq!(check("2", SOURCE, Some(&slot(5)), Some(Lsn(9))), Gap::OtherSystem);
        assert_eq!(check("1", SOURCE, None, Some(Lsn(9))), Gap::SlotMissing);
        assert_eq!(check("1", SOURCE, Some(&lost), Some(Lsn(9))), Gap::SlotLost("wal_removed".into()));
        let found = check("1", SOURCE, Some(&foreign), Some(Lsn(9)));
        assert_eq!(found, Gap::SlotForeign("It is physical".into()));
        assert_eq!(check("1", SOURCE, Some(&slot(5)), None), Gap::ProgressMissing);
        assert_eq!(check("1", SOURCE, Some(&slot(5)), Some(Lsn::ZERO)), Gap::ProgressMissing);
        let ahead = Gap::SlotAhead { confirmed_flush: Lsn(10), applied: Lsn(9) };
        assert_eq!(check("1", SOURCE, Some(&slot(10)), Some(Lsn(9))), ahead);
        let behind = Gap::SourceBehind { source: Lsn(20), applied: Lsn(21) };
        assert_eq!(check("1", SOURCE, Some(&slot(10)), Some(Lsn(21))), behind);
        let failed_over = SourceFacts { left_ours_at: Some(Lsn(8)), ..SOURCE };
        let behind = Gap::SourceBehind { source: Lsn(8), applied: Lsn(9) };
        assert_eq!(check("1", failed_over, Some(&slot(5)), Some(Lsn(9))), behind);
    }

    #[test]
    fn a_slot_that_a_failover_left_behind_is_told_from_one_that_was_dropped() {
        let subject = Subject { mirror: "m", peer: "p", slot: "s", known_system: Some("1") };
        let dropped = Gap::SlotMissing.problem(&subject, SOURCE).detail.unwrap();
        let failed_over = SourceFacts { left_ours_at: Some(Lsn(9)), ..SOURCE };
        let left = Gap::SlotMissing.problem(&subject, failed_over).detail.unwrap();
        assert!(!dropped.contains("failed over") && left.contains("failed over"), "{dropped}\n{left}");
    }

    #[test]
    fn a_history_tells_where_a_timeline_was_left() {
        let history = "1\t0/3000158\tno recovery target specified\n\n2\t16/B374D848\tbefore x\n";
        assert_eq!(switch_point(history, 1), Some(Lsn(0x3000158)));
        assert_eq!(switch_point(history, 2), Some(Lsn(0x16_B374_D848)));
        assert_eq!(switch_point(history, 3), None);
        assert_eq!(switch_point("garbage", 1), None);
    }
}
