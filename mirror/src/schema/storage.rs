//! Rows that change without a word of the stream: those of a partition that is attached, detached, dropped or emptied, and those that
//! an ALTER writes anew. Looks at the catalogs tell of it. Pure.
//!
//! Source: PostgreSQL docs, sql-createpublication, "publish_via_partition_root", and ddl-partitioning, "Partition Maintenance".

use std::collections::BTreeMap;

use pg::SqlState;
use serde::{Deserialize, Serialize};

use super::SourceTable;
use crate::error::Problem;

/// The file of a partition of which only the stream has told: no server has one of this number.
pub const NOT_LOOKED_AT: u32 = 0;

/// What is known of where a table's rows are, besides their files.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Storage {
    /// The condition, as SQL, that the rows of each partition meet, by its oid.
    pub bounds: BTreeMap<u32, String>,
    /// One of them takes what no other takes.
    pub has_default: bool,
    /// Transactions of the source before this number had ended when the table was known to be like that. 64 bits wide, so that it never
    /// turns over.
    pub seen: i64,
}

/// When it was looked at is not what a table is.
impl PartialEq for Storage {
    fn eq(&self, other: &Storage) -> bool {
        (&self.bounds, self.has_default) == (&other.bounds, other.has_default)
    }
}

impl Eq for Storage {}

/// A table or partition of which the catalogs do not tell whether it brought rows along, lost some, or has others now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// It is new, and has rows that may have been there before it was a partition.
    Came {
        /// Its name.
        name: String,
    },
    /// It is new, and has rows that one could have had that is gone.
    Like {
        /// Its name.
        name: String,
    },
    /// Its rows are in another file, and none of them is as old as the former one.
    Emptied {
        /// Its name.
        name: String,
        /// The transaction that wrote what the catalog says of it now.
        xid: u32,
    },
}

/// Returns whether partitions have come or gone, or files were written anew, since a table was `known`. Where its columns have changed
/// too, an ordinary table's file tells nothing more: what became of its rows is for [`super::change`] to say.
pub fn changed(known: &SourceTable, now: &SourceTable) -> bool {
    known.files != now.files && (known.partitioned || now.same_rows(known))
}

/// Works out which rows have gone with their partitions: returns the conditions that they meet. The table was emptied by the stream's
/// transaction `truncated_by`, if it was since it was `known`.
///
/// # Errors
/// [`Problem`] if it cannot be told which rows have come or gone.
pub fn rows_gone(
    known: &SourceTable,
    now: &SourceTable,
    doubts: &[Doubt],
    truncated_by: Option<u32>,
) -> Result<Vec<String>, Problem> {
    let table = &known.name;
    let unclear =
        |what: String| Err(Problem::new(SqlState::WRONG_STATE, what).detail("The stream does not tell of such rows."));
    for doubt in doubts {
        match doubt {
            Doubt::Came { name } => {
                return unclear(format!("partition \"{name}\" of table \"{table}\" was attached with rows"));
            }
            Doubt::Like { name } => {
                return unclear(format!(
                    "partition \"{name}\" of table \"{table}\" has rows like those of one that is gone"
                ));
            }
            Doubt::Emptied { xid, .. } if truncated_by == Some(*xid) => {}
            Doubt::Emptied { name, .. } if known.partitioned => {
                return unclear(format!("partition \"{name}\" of table \"{table}\" was emptied or written anew"));
            }
            Doubt::Emptied { .. } => return unclear(format!("table \"{table}\" was written anew, with new rows")),
        }
    }
    let mut conditions = Vec::new();
    for oid in known.files.keys().filter(|oid| !now.files.contains_key(oid)) {
        // What its rows would have been may belong to the default partition by now.
        match known.storage.bounds.get(oid).filter(|bound| is_portable(bound)) {
            Some(bound) if !now.storage.has_default => conditions.push(bound.clone()),
            _ => return Err(not_told(now)),
        }
    }
    Ok(conditions)
}

/// Returns the conditions that the rows of partitions met that are gone.
pub fn bounds_gone<'a>(known: &'a SourceTable, now: &SourceTable) -> Vec<&'a str> {
    let gone = known.storage.bounds.iter().filter(|(oid, _)| !now.files.contains_key(oid));
    gone.map(|(_, bound)| bound.as_str()).collect()
}

/// Returns whether another server makes the same of a partition's condition: that of a hash partition names its table by its oid.
fn is_portable(bound: &str) -> bool {
    !bound.contains("satisfies_hash_partition(")
}

/// What to say when a partition took rows away that cannot be named.
pub fn not_told(table: &SourceTable) -> Problem {
    let message = format!("a partition of table \"{}\" was detached or dropped", table.name);
    Problem::new(SqlState::WRONG_STATE, message).detail("The stream does not tell of its rows.")
}

/// Returns the partitions that are new, and those whose rows are in another file than before.
pub fn to_inspect(known: &SourceTable, now: &SourceTable) -> (Vec<u32>, Vec<u32>) {
    let former = |oid: &u32| known.files.get(oid).copied().unwrap_or(NOT_LOOKED_AT);
    let changed = now.files.iter().filter(|(oid, file)| former(oid) != **file).map(|(oid, _)| *oid);
    changed.partition(|oid| former(oid) == NOT_LOOKED_AT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schema::RowIdentity;

    fn partitioned(files: &[(u32, u32)]) -> SourceTable {
        let bounds = files.iter().map(|(oid, _)| (*oid, format!("(day = {oid})"))).collect();
        let storage = Storage { bounds, has_default: false, seen: 7 };
        SourceTable {
            oid: 1,
            name: pg::TableName::new("public", "t"),
            columns: Vec::new(),
            identity: RowIdentity::InsertsOnly,
            indexes: Vec::new(),
            partitioned: true,
            root: None,
            files: files.iter().copied().collect(),
            storage,
            constraints: Vec::new(),
            last_number: 0,
        }
    }

    #[test]
    fn rows_go_with_their_partitions() {
        let (known, now) = (partitioned(&[(1, 10), (2, 20)]), partitioned(&[(2, 20), (3, 30)]));
        assert!(changed(&known, &now));
        assert_eq!(rows_gone(&known, &now, &[], None).unwrap(), ["(day = 1)"]);
        assert!(rows_gone(&known, &known, &[], None).unwrap().is_empty());
    }

    #[test]
    fn what_a_default_partition_may_have_taken_is_not_told_by_conditions() {
        let (known, mut now) = (partitioned(&[(1, 10), (2, 20)]), partitioned(&[(2, 20)]));
        now.storage.has_default = true;
        assert!(rows_gone(&known, &now, &[], None).is_err());
    }

    #[test]
    fn conditions_of_hash_partitions_mean_nothing_elsewhere() {
        let (mut known, now) = (partitioned(&[(1, 10), (2, 20)]), partitioned(&[(2, 20)]));
        known.storage.bounds.insert(1, "satisfies_hash_partition('1'::oid, 2, 0, id)".to_owned());
        assert!(rows_gone(&known, &now, &[], None).is_err());
        known.storage.bounds.remove(&1);
        assert!(rows_gone(&known, &now, &[], None).is_err(), "recorded before bounds were");
    }

    #[test]
    fn a_partition_that_the_stream_emptied_is_no_doubt() {
        let (known, now) = (partitioned(&[(1, 10)]), partitioned(&[(1, 11)]));
        assert_eq!(to_inspect(&known, &now), (vec![], vec![1]));
        let doubts = [Doubt::Emptied { name: "p".to_owned(), xid: 99 }];
        assert!(rows_gone(&known, &now, &doubts, Some(99)).unwrap().is_empty());
        assert!(rows_gone(&known, &now, &doubts, Some(98)).is_err());
        assert!(rows_gone(&known, &now, &doubts, None).is_err());
    }

    #[test]
    fn a_partition_that_came_and_went_between_two_looks_is_missed() {
        let (known, now) = (partitioned(&[(1, 10)]), partitioned(&[(1, 10)]));
        let mut known = known;
        known.files.insert(2, NOT_LOOKED_AT);
        assert!(rows_gone(&known, &now, &[], None).is_err());
        let now = partitioned(&[(1, 10), (2, 20)]);
        assert_eq!(to_inspect(&known, &now), (vec![2], vec![]), "it is still there");
    }

    #[test]
    fn rows_that_came_along_are_said_to() {
        let (known, now) = (partitioned(&[(1, 10)]), partitioned(&[(1, 10), (2, 20)]));
        assert_eq!(to_inspect(&known, &now), (vec![2], vec![]));
        let problem = rows_gone(&known, &now, &[Doubt::Came { name: "new".to_owned() }], None).unwrap_err();
        assert!(problem.message.contains("attached with rows"), "{}", problem.message);
    }
}
