//! Where a table of a mirror is, and what is done about it. Pure.
//!
//! What decides is on the target: a *mark*, committed there after the table's rows, that says that the copy is complete and from where
//! in the WAL the table's changes come by the stream. The catalog shows it, and says what is wanted.
//!
//! `pending → copying → indexing → copied → catchup → live`, and from anywhere `blocked` or `removed`.

use pg::Lsn;

/// Where a table is. Stored in `mirror_table_runtime.state`; each change is an event, which the catalog records with the change itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableState {
    /// It waits for its copy. Entered by: CREATE MIRROR, ADD TABLE, a new table on the source, RESYNC. On restart: stays so.
    Pending,
    /// Its rows are being copied at a snapshot. On restart: the snapshot is gone, and this table is copied anew.
    Copying,
    /// Its rows are on the target; its keys and indexes are being made. On restart: as copying, since there is no mark yet.
    Indexing,
    /// Its copy is complete at the snapshot's position. With a mark (first copy), a restart streams from there; a late table has none
    /// before its hand-over, and is copied anew.
    Copied,
    /// The changes since its copy are being applied. On restart: with a mark, streams from there.
    Catchup,
    /// It follows the source in the main stream. On restart: stays so.
    Live,
    /// Something of it cannot be written. The others go on; RESYNC MIRROR … TABLE brings it back. On restart: stays so.
    Blocked,
    /// It is no longer part of the mirror, or gone from the source. Its target table stays as it is.
    Removed,
}

impl TableState {
    /// All of them.
    pub const ALL: [TableState; 8] = [
        TableState::Pending,
        TableState::Copying,
        TableState::Indexing,
        TableState::Copied,
        TableState::Catchup,
        TableState::Live,
        TableState::Blocked,
        TableState::Removed,
    ];

    /// Returns the state's name in the catalog.
    pub fn as_str(self) -> &'static str {
        match self {
            TableState::Pending => "pending",
            TableState::Copying => "copying",
            TableState::Indexing => "indexing",
            TableState::Copied => "copied",
            TableState::Catchup => "catchup",
            TableState::Live => "live",
            TableState::Blocked => "blocked",
            TableState::Removed => "removed",
        }
    }

    /// Returns the state of that name in the catalog.
    pub fn from_name(name: &str) -> Option<TableState> {
        TableState::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

/// What the main stream does about a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is applied, from this position on.
    Streams(Lsn),
    /// It has no complete copy: it gets one by its own slot, and its changes are left out meanwhile.
    Late,
    /// It waits for a person; its changes are left out, and a new copy brings them.
    Waits,
    /// It is no part of the mirror.
    Gone,
}

/// Decides what the main stream does about a table, from its state in the catalog and its mark on the target.
pub fn standing(state: TableState, mark: Option<Lsn>) -> Standing {
    match (state, mark) {
        (TableState::Removed, _) => Standing::Gone,
        (TableState::Blocked, _) => Standing::Waits,
        // It is wanted anew: the mark is of the copy before.
        (TableState::Pending, _) => Standing::Late,
        (_, Some(from)) => Standing::Streams(from),
        (_, None) => Standing::Late,
    }
}

/// Which changes of a relation a stream takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Those of transactions that commit at or after this position: the copy holds those before.
    From(Lsn),
    /// None: they come another way, or never.
    Ignore,
}

impl Route {
    /// Returns whether a change of a transaction that commits there is taken.
    pub fn takes(self, commit_lsn: Lsn) -> bool {
        match self {
            Route::From(from) => commit_lsn >= from,
            Route::Ignore => false,
        }
    }
}

/// What is there where a table is to be copied to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    /// Oid of the target table; `None`: there is none.
    pub oid: Option<u32>,
    /// It holds rows.
    pub has_rows: bool,
    /// Oid of the table that the mirror created.
    pub created: Option<u32>,
    /// The mirror has begun to copy into it.
    pub begun: bool,
    /// It holds an earlier, complete copy.
    pub replaces: bool,
}

/// How a target table is made ready for its copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// It is created, and gets its keys and indexes after the copy.
    Create,
    /// The mirror's own unfinished one is dropped and created anew: keys and indexes would be in the way.
    Recreate,
    /// It is empty, and takes the rows as it is.
    Append,
    /// Its rows go before the copy.
    Truncate,
    /// Its rows stay until the new ones are all there, and are replaced in one transaction.
    Replace,
}

impl Fill {
    /// Returns whether the mirror makes the table, and so its keys and indexes.
    pub fn creates(self) -> bool {
        matches!(self, Fill::Create | Fill::Recreate)
    }
}

/// Decides how a target table is made ready; `None` when it holds rows of somebody else, which stay.
pub fn how_to_fill(found: &Found, truncate_target: bool) -> Option<Fill> {
    match *found {
        Found { oid: None, .. } => Some(Fill::Create),
        Found { replaces: true, has_rows: true, .. } => Some(Fill::Replace),
        Found { replaces: true, .. } => Some(Fill::Append),
        // One of the same name that somebody else has made since is theirs.
        Found { oid, created, .. } if oid == created => Some(Fill::Recreate),
        Found { has_rows: false, .. } => Some(Fill::Append),
        // It was empty when the copy began: what it holds is ours.
        Found { begun: true, created: None, .. } => Some(Fill::Truncate),
        _ if truncate_target => Some(Fill::Truncate),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_is_found_by_its_name() {
        for state in TableState::ALL {
            assert_eq!(TableState::from_name(state.as_str()), Some(state));
        }
        assert_eq!(TableState::from_name("paused"), None);
    }

    #[test]
    fn only_a_mark_lets_a_table_stream() {
        let mark = Some(Lsn(7));
        for state in TableState::ALL {
            let (with, without) = (standing(state, mark), standing(state, None));
            match state {
                TableState::Removed => assert_eq!((with, without), (Standing::Gone, Standing::Gone)),
                TableState::Blocked => assert_eq!((with, without), (Standing::Waits, Standing::Waits)),
                TableState::Pending => assert_eq!((with, without), (Standing::Late, Standing::Late)),
                // A target that was set back has lost its marks, whatever the catalog says.
                _ => assert_eq!((with, without), (Standing::Streams(Lsn(7)), Standing::Late), "{}", state.as_str()),
            }
        }
    }

    #[test]
    fn a_transaction_is_in_the_copy_or_in_the_stream_and_never_in_both() {
        assert!(!Route::From(Lsn(7)).takes(Lsn(6)));
        assert!(Route::From(Lsn(7)).takes(Lsn(7)));
        assert!(!Route::Ignore.takes(Lsn(7)));
    }

    #[test]
    fn rows_of_others_are_kept_unless_told_otherwise() {
        let theirs = Found { oid: Some(1), has_rows: true, ..Found::default() };
        assert_eq!(how_to_fill(&theirs, false), None);
        assert_eq!(how_to_fill(&theirs, true), Some(Fill::Truncate));
        // A table of theirs where one of ours was.
        assert_eq!(how_to_fill(&Found { created: Some(2), begun: true, ..theirs }, false), None);
        let empty = Found { has_rows: false, ..theirs };
        assert_eq!(how_to_fill(&empty, false), Some(Fill::Append));
    }

    #[test]
    fn what_an_unfinished_copy_left_is_taken_away() {
        assert_eq!(how_to_fill(&Found::default(), false), Some(Fill::Create));
        let begun = Found { oid: Some(1), has_rows: true, begun: true, ..Found::default() };
        assert_eq!(how_to_fill(&begun, false), Some(Fill::Truncate));
        let ours = Found { created: Some(1), ..begun };
        assert_eq!(how_to_fill(&ours, false), Some(Fill::Recreate));
        assert_eq!(how_to_fill(&Found { has_rows: false, begun: false, ..ours }, false), Some(Fill::Recreate));
    }

    #[test]
    fn a_complete_copy_stays_until_the_next_one_is_there() {
        let live = Found { oid: Some(1), has_rows: true, created: Some(1), begun: true, replaces: true };
        assert_eq!(how_to_fill(&live, false), Some(Fill::Replace));
        assert_eq!(how_to_fill(&live, true), Some(Fill::Replace));
        assert_eq!(how_to_fill(&Found { has_rows: false, ..live }, false), Some(Fill::Append));
        assert_eq!(how_to_fill(&Found { oid: None, ..live }, false), Some(Fill::Create));
    }
}
