//! How far a mirror is, and the only place that may say that something is durable.

use pg::Lsn;

/// A position up to which everything is durable on the target *and* recorded there.
///
/// Only [`DurableLsn::recorded`] makes one, and only a sink that has committed a progress row may call it; acknowledging to the
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
    /// The server has removed WAL that it needs.
    pub lost: bool,
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
    /// The source has removed WAL that the target lacks.
    SlotLost,
    /// The slot was acknowledged further than the target is: the target was set back, or the slot was made anew.
    SlotAhead {
        /// Where the slot is.
        confirmed_flush: Lsn,
        /// Where the target is.
        applied: Lsn,
    },
    /// The target has no progress row of this mirror.
    ProgressMissing,
}

/// Checks that everything the target lacks will come from the slot. Asked at every connect.
///
/// # Errors
/// [`Gap`] if it will not: going on would lose rows silently.
pub fn check_continuity(
    known_system: Option<&str>,
    system: &str,
    slot: Option<&SlotFacts>,
    applied: Option<Lsn>,
) -> Result<Lsn, Gap> {
    if known_system.is_some_and(|known| known != system) {
        return Err(Gap::OtherSystem);
    }
    let applied = applied.filter(|lsn| *lsn > Lsn::ZERO).ok_or(Gap::ProgressMissing)?;
    let slot = slot.ok_or(Gap::SlotMissing)?;
    if slot.lost {
        return Err(Gap::SlotLost);
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
        SlotFacts { confirmed_flush: Some(Lsn(confirmed)), lost: false, active_pid: None }
    }

    #[test]
    fn streaming_goes_on_where_the_target_is() {
        assert_eq!(check_continuity(Some("1"), "1", Some(&slot(5)), Some(Lsn(9))), Ok(Lsn(9)));
        assert_eq!(check_continuity(None, "1", Some(&slot(9)), Some(Lsn(9))), Ok(Lsn(9)));
    }

    #[test]
    fn every_gap_is_found() {
        let lost = SlotFacts { lost: true, ..slot(1) };
        assert_eq!(check_continuity(Some("1"), "2", Some(&slot(5)), Some(Lsn(9))), Err(Gap::OtherSystem));
        assert_eq!(check_continuity(Some("1"), "1", None, Some(Lsn(9))), Err(Gap::SlotMissing));
        assert_eq!(check_continuity(Some("1"), "1", Some(&lost), Some(Lsn(9))), Err(Gap::SlotLost));
        assert_eq!(check_continuity(Some("1"), "1", Some(&slot(5)), None), Err(Gap::ProgressMissing));
        assert_eq!(check_continuity(Some("1"), "1", Some(&slot(5)), Some(Lsn::ZERO)), Err(Gap::ProgressMissing));
        let ahead = Gap::SlotAhead { confirmed_flush: Lsn(10), applied: Lsn(9) };
        assert_eq!(check_continuity(Some("1"), "1", Some(&slot(10)), Some(Lsn(9))), Err(ahead));
    }
}
