//! Counts and sums of rows' hashes by bucket. Pure.

/// What a table's rows come to on one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tally {
    buckets: Vec<(i64, i128)>,
}

impl Tally {
    /// Begins with no rows.
    pub fn new(buckets: usize) -> Tally {
        Tally { buckets: vec![(0, 0); buckets] }
    }

    /// Adds rows to a bucket: how many, and the sum of their hashes. False if there is no such bucket.
    pub fn add(&mut self, bucket: usize, rows: i64, sum: i128) -> bool {
        let Some(found) = self.buckets.get_mut(bucket) else { return false };
        found.0 += rows;
        // Sums of more rows than any server holds do not come near the limit.
        found.1 = found.1.wrapping_add(sum);
        true
    }

    /// Returns how many rows there are.
    pub fn rows(&self) -> i64 {
        self.buckets.iter().map(|(rows, _)| rows).sum()
    }

    /// Returns the buckets that are not the same on the other side.
    pub fn differing(&self, other: &Tally) -> Vec<i64> {
        let pairs = self.buckets.iter().zip(&other.buckets).enumerate();
        pairs.filter(|(_, (a, b))| a != b).map(|(n, _)| n as i64).collect()
    }
}

/// Returns how many buckets a table of so many bytes is compared by: some thousand rows each, and no more than a server counts at ease.
pub fn buckets_for(bytes: i64) -> usize {
    let rows = usize::try_from(bytes / 100).unwrap_or(0);
    (rows / 2000).next_power_of_two().clamp(64, 16_384)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_found_and_order_does_not_matter() {
        let (mut a, mut b) = (Tally::new(4), Tally::new(4));
        for (bucket, sum) in [(0, 5), (1, -7), (1, 9), (3, 2)] {
            assert!(a.add(bucket, 1, sum));
        }
        for (bucket, sum) in [(3, 2), (1, 9), (0, 5), (1, -7)] {
            b.add(bucket, 1, sum);
        }
        assert_eq!((a.differing(&b), a.rows()), (Vec::new(), 4));
        b.add(2, 1, 0);
        b.add(1, 0, 1);
        assert_eq!(a.differing(&b), [1, 2]);
        assert!(!a.add(4, 1, 1));
    }

    #[test]
    fn buckets_are_a_power_of_two() {
        assert_eq!((buckets_for(0), buckets_for(1 << 30), buckets_for(1 << 50)), (64, 8192, 16_384));
    }
}
