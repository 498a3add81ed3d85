//! Compares two sorted streams of rows. No I/O of its own, and no more than one row of each side in memory.

use std::collections::{BTreeMap, VecDeque};

use catalog::verification::DifferenceKind;
use futures_util::{Stream, StreamExt};

/// A row as it is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// What rows are sorted by, ascending: equal bytes mean the same row.
    pub sort: Vec<u8>,
    /// What people tell it apart by.
    pub key: Vec<String>,
    /// The hash of all of it.
    pub hash: i64,
}

impl Row {
    /// Makes a row that is told apart by its hash alone.
    pub fn by_hash(key: Vec<String>, hash: i64) -> Row {
        // Bytes that sort as the number does.
        let sort = (hash.cast_unsigned() ^ (1 << 63)).to_be_bytes().to_vec();
        Row { sort, key, hash }
    }
}

/// A row that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// How.
    pub kind: DifferenceKind,
    /// What people tell it apart by.
    pub key: Vec<String>,
    /// Its hash, on the side that has it; the source's, if both have.
    pub hash: i64,
    /// How many rows it is about.
    pub copies: i64,
}

/// Two sides that are gone through together.
pub struct Merge<S, T> {
    source: S,
    target: T,
    /// The next row of each side.
    heads: Option<[Option<Row>; 2]>,
    /// What was found and not told yet.
    found: VecDeque<Found>,
}

impl<E, S, T> Merge<S, T>
where
    S: Stream<Item = Result<Row, E>> + Unpin,
    T: Stream<Item = Result<Row, E>> + Unpin,
{
    /// Begins.
    pub fn new(source: S, target: T) -> Merge<S, T> {
        Merge { source, target, heads: None, found: VecDeque::new() }
    }

    /// Returns the next row that differs; `None` when there are no more.
    ///
    /// # Errors
    /// The first of either side.
    pub async fn next(&mut self) -> Result<Option<Found>, E> {
        let [mut left, mut right] = match self.heads.take() {
            Some(heads) => heads,
            None => [self.source.next().await.transpose()?, self.target.next().await.transpose()?],
        };
        while self.found.is_empty() {
            let least = match (&left, &right) {
                (None, None) => break,
                (Some(row), None) | (None, Some(row)) => row,
                (Some(a), Some(b)) => {
                    if a.sort <= b.sort {
                        a
                    } else {
                        b
                    }
                }
            };
            let (sort, key) = (least.sort.clone(), least.key.clone());
            // How many more of each hash the source has.
            let mut surplus: BTreeMap<i64, i64> = BTreeMap::new();
            while let Some(row) = left.take_if(|row| row.sort == sort) {
                *surplus.entry(row.hash).or_default() += 1;
                left = self.source.next().await.transpose()?;
            }
            while let Some(row) = right.take_if(|row| row.sort == sort) {
                *surplus.entry(row.hash).or_default() -= 1;
                right = self.target.next().await.transpose()?;
            }
            self.found.extend(differences(&key, &surplus));
        }
        self.heads = Some([left, right]);
        Ok(self.found.pop_front())
    }
}

/// Says how rows that are told apart by the same differ. As many as both sides have, with other values, are different.
fn differences(key: &[String], surplus: &BTreeMap<i64, i64>) -> Vec<Found> {
    let missing: i64 = surplus.values().filter(|n| **n > 0).sum();
    let extra: i64 = -surplus.values().filter(|n| **n < 0).sum::<i64>();
    let different = missing.min(extra);
    let hash_of = |kind| {
        let has = |n: i64| if kind == DifferenceKind::Extra { n < 0 } else { n > 0 };
        surplus.iter().find(|(_, n)| has(**n)).map_or(0, |(hash, _)| *hash)
    };
    let counts = [
        (DifferenceKind::Different, different),
        (DifferenceKind::Missing, missing - different),
        (DifferenceKind::Extra, extra - different),
    ];
    let found = |(kind, copies)| Found { kind, key: key.to_vec(), hash: hash_of(kind), copies };
    counts.into_iter().filter(|(_, copies)| *copies > 0).map(found).collect()
}

#[cfg(test)]
mod tests {
    use futures_util::stream;

    use super::*;

    fn row(key: u8, hash: i64) -> Result<Row, ()> {
        Ok(Row { sort: vec![key], key: vec![key.to_string()], hash })
    }

    async fn compared(source: Vec<Result<Row, ()>>, target: Vec<Result<Row, ()>>) -> Vec<(DifferenceKind, i64, i64)> {
        let mut merge = Merge::new(stream::iter(source), stream::iter(target));
        let mut all = Vec::new();
        while let Some(found) = merge.next().await.unwrap() {
            all.push((found.kind, found.hash, found.copies));
        }
        all
    }

    #[tokio::test]
    async fn each_row_that_differs_is_told_once() {
        use DifferenceKind::{Different, Extra, Missing};
        let source = vec![row(1, 10), row(2, 20), row(4, 40), row(5, 50)];
        let target = vec![row(1, 10), row(2, 21), row(3, 30), row(5, 50), row(6, 60)];
        assert_eq!(
            compared(source, target).await,
            [(Different, 20, 1), (Extra, 30, 1), (Missing, 40, 1), (Extra, 60, 1)]
        );
        assert_eq!(compared(vec![row(1, 1)], Vec::new()).await, [(Missing, 1, 1)]);
    }

    #[tokio::test]
    async fn rows_without_a_key_are_counted() {
        use DifferenceKind::{Extra, Missing};
        let by_hash = |hash| Ok(Row::by_hash(Vec::new(), hash));
        let source = vec![by_hash(-5), by_hash(-5), by_hash(-5), by_hash(7)];
        let target = vec![by_hash(-5), by_hash(7), by_hash(7)];
        assert_eq!(compared(source, target).await, [(Missing, -5, 2), (Extra, 7, 1)]);
        assert!(Row::by_hash(Vec::new(), -1).sort < Row::by_hash(Vec::new(), 0).sort);
    }

    #[tokio::test]
    async fn an_error_of_a_side_ends_it() {
        let result = Merge::new(stream::iter([Err(())]), stream::iter([row(1, 1)])).next().await;
        assert_eq!(result, Err(()));
    }
}
