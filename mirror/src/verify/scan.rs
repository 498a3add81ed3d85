//! Reads both sides of a table at one moment. Each range of blocks is a transaction of its own, so that nobody waits for our locks for
//! long; its snapshot is the moment's.

use std::sync::atomic::{AtomicU64, Ordering};

use futures_util::{Stream, StreamExt, TryStreamExt};
use pg::{SqlState, TableName};
use tokio_postgres::Row as SqlRow;

use super::merge::{Merge, Row};
use super::moment::join;
use super::tally::Tally;
use super::text::{Comparison, Hash, PROBE, Side, TargetType};
use crate::error::{Error, Problem};
use crate::schema::Leaf;
use crate::schema::introspect::leaves;
use crate::session::PeerSession;

/// Blocks of a range at the least: 32 MiB of 8 KiB blocks.
const RANGE_BLOCKS_MIN: i64 = 4096;

/// Ranges of a relation at the most, or nearly so.
const RANGES_MAX: i64 = 1024;

/// From this version on, a range of ctids is read without reading the blocks before it.
const TID_RANGE_SCAN: u32 = 140_000;

/// One side of a table while it is read.
pub struct Reader<'a> {
    session: &'a PeerSession,
    snapshot: &'a str,
    leaves: Vec<Leaf>,
}

/// Says how rows can be hashed so that both servers give the same.
///
/// # Errors
/// [`Error`] as the servers' SQLSTATE says.
pub async fn choose_hash(source: &PeerSession, target: &PeerSession) -> Result<Hash, Error> {
    let probe = async |session: &PeerSession| {
        let row = session.done(session.client.query_one(PROBE, &[])).await?;
        Ok::<(String, i64), Error>((row.get(0), row.get(1)))
    };
    Ok(if probe(source).await? == probe(target).await? { Hash::Fast } else { Hash::Portable })
}

/// Returns the types of a target table's columns.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn target_types(target: &PeerSession, oid: u32) -> Result<Vec<TargetType>, Error> {
    let query = "
        select a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), a.atttypid
        from pg_catalog.pg_attribute a where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped";
    let rows = target.done(target.client.query(query, &[&oid])).await?;
    Ok(rows.iter().map(|r| TargetType { name: r.get(0), sql: r.get(1), oid: r.get(2) }).collect())
}

impl<'a> Reader<'a> {
    /// Looks where a table's rows are, in the moment's snapshot.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn open(session: &'a PeerSession, snapshot: &'a str, oid: u32) -> Result<Reader<'a>, Error> {
        let leaves = session.done(leaves(&session.client, oid)).await?;
        Ok(Reader { session, snapshot, leaves })
    }

    /// Returns how many bytes the table has, TOAST included.
    pub fn bytes(&self) -> i64 {
        self.leaves.iter().map(|leaf| leaf.bytes).sum()
    }

    /// Cuts the table into ranges of blocks: relation, first block, end. The last of each relation is open, as it may have grown.
    fn ranges(&self) -> Vec<(usize, i64, Option<i64>)> {
        let mut ranges = Vec::new();
        for (n, leaf) in self.leaves.iter().enumerate() {
            let step = RANGE_BLOCKS_MIN.max(leaf.blocks / RANGES_MAX);
            let mut from = 0;
            while self.session.version >= TID_RANGE_SCAN && leaf.blocks - from > step {
                ranges.push((n, from, Some(from + step)));
                from += step;
            }
            ranges.push((n, from, None));
        }
        ranges
    }

    /// Counts the rows and adds their hashes up. `done` is told after each range which part of the side that was, from 0 to 1.
    ///
    /// # Errors
    /// [`Error::CopyAgain`] if the table was rewritten since the moment; else as the server's SQLSTATE says.
    pub async fn tally(&self, comparison: &Comparison, side: &Side, done: &Fraction) -> Result<Tally, Error> {
        let mut tally = Tally::new(comparison.buckets);
        let ranges = self.ranges();
        for (n, (leaf, from, to)) in ranges.iter().enumerate() {
            let leaf = &self.leaves[*leaf];
            self.begin(std::slice::from_ref(leaf)).await?;
            let query = side.tally(comparison, &leaf.name, *from, *to);
            for row in self.session.done(self.session.client.query(&query, &[])).await? {
                let (bucket, rows, sum): (i32, i64, &str) = (row.get(0), row.get(1), row.get(2));
                let added = (usize::try_from(bucket).ok().zip(sum.parse().ok()))
                    .is_some_and(|(bucket, sum)| tally.add(bucket, rows, sum));
                if !added {
                    return Err(Error::protocol(&self.session.peer, "a sum of hashes that is none"));
                }
            }
            self.session.run("commit").await?;
            done.set((n + 1) as f64 / ranges.len() as f64);
        }
        Ok(tally)
    }

    /// Begins a transaction at the moment, in which relations stay what they are.
    async fn begin(&self, leaves: &[Leaf]) -> Result<(), Error> {
        join(self.session, self.snapshot).await?;
        for leaf in leaves {
            let lock = format!("lock table only {} in access share mode", leaf.name.quoted());
            match self.session.run(&lock).await {
                Err(Error::Blocked(problem)) if problem.sqlstate == SqlState::UNDEFINED_TABLE => {
                    return Err(rewritten(&leaf.name, &self.session.peer));
                }
                other => other?,
            }
        }
        // What was rewritten or emptied since has another file than the snapshot shows, which sees no rows in it.
        let query = "
            select pg_catalog.count(*) from pg_catalog.pg_class c
            where c.oid = any ($1) and c.relfilenode = pg_catalog.pg_relation_filenode(c.oid::pg_catalog.regclass)";
        let oids: Vec<u32> = leaves.iter().map(|leaf| leaf.oid).collect();
        let same: i64 = self.session.done(self.session.client.query_one(query, &[&oids])).await?.get(0);
        match leaves.first() {
            Some(leaf) if same < leaves.len() as i64 => Err(rewritten(&leaf.name, &self.session.peer)),
            _ => Ok(()),
        }
    }

    /// Gives the rows of some buckets in their order, in a transaction that stays open.
    async fn rows(
        &self,
        comparison: &Comparison,
        side: &Side,
        buckets: Option<&[i64]>,
    ) -> Result<impl Stream<Item = Result<Row, Error>>, Error> {
        self.begin(&self.leaves).await?;
        let statement = self.session.done(self.session.client.prepare(&side.rows(comparison))).await?;
        let rows = self.session.done(self.session.client.query_raw(&statement, [buckets])).await?;
        let keyed = comparison.has_key();
        let peer = self.session;
        Ok(rows.map_err(|e| peer.error(&e)).map(move |row: Result<SqlRow, Error>| {
            let row = row?;
            let (key, hash): (Vec<String>, i64) = (row.get(0), row.get(2));
            Ok(if keyed { Row { sort: row.get(1), key, hash } } else { Row::by_hash(key, hash) })
        }))
    }
}

fn rewritten(table: &TableName, peer: &str) -> Error {
    Error::CopyAgain(Problem::new(
        SqlState::WRONG_STATE,
        format!("table \"{table}\" on peer \"{peer}\" was rewritten, truncated or dropped while it was compared"),
    ))
}

/// Goes through the rows of those buckets on both sides.
///
/// # Errors
/// [`Error::CopyAgain`] if the table was rewritten since the moment; else as the servers' SQLSTATE says.
pub async fn rows_that_differ(
    [source, target]: [&Reader<'_>; 2],
    comparison: &Comparison,
    buckets: &[i64],
) -> Result<Merge<impl Stream<Item = Result<Row, Error>> + Unpin, impl Stream<Item = Result<Row, Error>> + Unpin>, Error>
{
    // So many that looking each up costs more than it saves.
    let buckets = (buckets.len() < comparison.buckets / 4).then_some(buckets);
    let of_source = source.rows(comparison, &comparison.source, buckets).await?;
    let of_target = target.rows(comparison, &comparison.target, buckets).await?;
    Ok(Merge::new(Box::pin(of_source), Box::pin(of_target)))
}

/// A part that is done, from 0 to 1, which one writes and another reads.
#[derive(Debug, Default)]
pub struct Fraction(AtomicU64);

impl Fraction {
    fn set(&self, fraction: f64) {
        self.0.store(fraction.to_bits(), Ordering::Relaxed);
    }

    /// Returns it.
    pub fn get(&self) -> f64 {
        f64::from_bits(self.0.load(Ordering::Relaxed))
    }
}
