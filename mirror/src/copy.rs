//! Copies the rows that are there: in parallel, by ranges of blocks, all at one snapshot.
//!
//! Bytes pass from one COPY to the other unread. Each range is a transaction of its own on the target, which holds the progress row, so
//! that a process that was replaced cannot write any more.

mod finish;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use catalog::task::TaskKind;
use futures_util::{SinkExt, StreamExt};
use pg::name::{quote_ident, quote_literal};
use pg::{Lsn, SqlState, TableName};
use tokio::task::JoinSet;
use tokio_postgres::CopyInSink;

use crate::error::{Error, Problem};
use crate::prepare::Filling;
use crate::schema::{Leaf, TablePlan, TargetTable, Types, is_binary};
use crate::session::PeerSession;
use crate::sink::postgres::open_writer;
use crate::sink::progress_row;
use crate::status::Tracker;
use crate::table_state::Fill;
use crate::worker::Context;

/// Blocks of a range: 32 MiB of 8 KiB blocks.
const RANGE_BLOCKS: i64 = 4096;

/// Bytes that are gathered before they are handed to the target: the source sends each row by itself.
const SEND_BYTES: usize = 128 << 10;

/// How often progress is reported.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);

/// From this version on, a range of ctids is read without reading the blocks before it.
const TID_RANGE_SCAN: u32 = 140_000;

/// Blocks of one relation.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Range {
    job: usize,
    leaf: usize,
    from: i64,
    /// `None`: to the end, wherever that is in the snapshot.
    to: Option<i64>,
}

/// One table to copy.
pub struct Job {
    /// The table.
    pub plan: TablePlan,
    /// The relations that hold its rows, with their sizes now.
    pub leaves: Vec<Leaf>,
    /// Keys and indexes are to be made after the copy.
    pub make_indexes: bool,
    /// Those that are copied, quoted.
    columns: String,
    /// In which they travel.
    format: &'static str,
    insert: String,
    /// What puts the staged rows in the place of those that are there.
    replace: Option<finish::Replace>,
    /// What went wrong with this table alone.
    failure: Mutex<Option<Error>>,
    ranges_left: AtomicUsize,
    blocks_done: AtomicI64,
    rows: AtomicI64,
    bytes: AtomicI64,
}

impl Job {
    /// Prepares the copy of one table. It travels in binary when all its types mean the same on both sides, else as text.
    pub fn new(
        plan: TablePlan,
        leaves: Vec<Leaf>,
        filling: &Filling,
        mirror: &str,
        types: &Types,
        target: Option<&TargetTable>,
    ) -> Job {
        let columns: Vec<String> = plan.replicated_columns().map(|c| quote_ident(&c.name)).collect();
        let columns = columns.join(", ");
        let Filling { fill, reshape } = filling;
        let replaces = *fill == Fill::Replace;
        // Columns that the target is to have are not there yet to compare with.
        let binary = is_binary(&plan, types, target) && !(replaces && reshape.is_some());
        let format = if binary { "binary" } else { "text" };
        // A table may have no columns at all.
        let into = if columns.is_empty() { String::new() } else { format!(" ({columns})") };
        let table = plan.target_name.quoted();
        let stage = replaces.then(|| progress_row::stage_table(mirror, plan.source.oid));
        let alone = target.map_or_else(|| table.clone(), TargetTable::alone);
        let replace = stage.as_ref().map(|stage| finish::Replace {
            delete: target
                .filter(|_| reshape.is_none())
                .and_then(|target| finish::bury_missing(&plan, target, stage))
                .unwrap_or_else(|| format!("delete from {alone}")),
            reshape: reshape.clone(),
            insert: format!(
                "insert into {table}{into} overriding system value select {columns} from {stage}; drop table {stage}"
            ),
        });
        Job {
            columns,
            format,
            insert: format!("copy {}{into} from stdin (format {format})", stage.unwrap_or(table)),
            replace,
            failure: Mutex::new(None),
            plan,
            leaves,
            make_indexes: fill.creates(),
            ranges_left: AtomicUsize::new(0),
            blocks_done: AtomicI64::new(0),
            rows: AtomicI64::new(0),
            bytes: AtomicI64::new(0),
        }
    }

    fn failure(&self) -> MutexGuard<'_, Option<Error>> {
        // Nothing panics while it holds the lock.
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blocks(&self) -> i64 {
        self.leaves.iter().map(|l| l.blocks).sum()
    }

    fn bytes_total(&self) -> i64 {
        self.leaves.iter().map(|l| l.bytes).sum()
    }

    fn fraction(&self) -> f64 {
        let done = self.blocks_done.load(Ordering::Relaxed) as f64;
        if self.ranges_left.load(Ordering::Relaxed) == 0 { 1.0 } else { (done / self.blocks().max(1) as f64).min(1.0) }
    }

    fn select(&self, range: &Range) -> String {
        let mut condition = self.plan.where_clause();
        let mut and = |part: String| {
            condition.push_str(if condition.is_empty() { " where " } else { " and " });
            condition.push_str(&part);
        };
        if range.from > 0 || range.to.is_some() {
            and(format!("ctid >= '({},0)'", range.from));
        }
        if let Some(to) = range.to {
            and(format!("ctid < '({to},0)'"));
        }
        let Job { columns, format, plan, leaves, .. } = self;
        // A condition may name the table, whose partitions have other names.
        let (leaf, table) = (leaves[range.leaf].name.quoted(), quote_ident(&plan.source.name.name));
        format!("copy (select {columns} from only {leaf} as {table}{condition}) to stdout (format {format})")
    }
}

/// Cuts the tables into ranges, the largest tables first. The last range of each is open, as the table may have grown.
fn plan_ranges(jobs: &[Job], by_range: bool) -> VecDeque<Range> {
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by_key(|n| std::cmp::Reverse(jobs[*n].blocks()));
    let mut ranges = VecDeque::new();
    for job in order {
        for (leaf, relation) in jobs[job].leaves.iter().enumerate() {
            let mut from = 0;
            while by_range && relation.blocks - from > RANGE_BLOCKS {
                ranges.push_back(Range { job, leaf, from, to: Some(from + RANGE_BLOCKS) });
                from += RANGE_BLOCKS;
            }
            ranges.push_back(Range { job, leaf, from, to: None });
        }
    }
    ranges
}

/// The snapshot at which all is read.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its name on the source.
    pub name: String,
    /// The source's version.
    pub source_version: u32,
    /// Tables that are complete get a mark at this position; `None`: they are handed over later.
    pub mark_at: Option<Lsn>,
}

/// What the workers share.
struct Shared {
    jobs: Vec<Job>,
    ranges: Mutex<VecDeque<Range>>,
    snapshot: Snapshot,
    context: Context,
    tracker: Tracker,
    tasks: &'static [TaskKind],
    /// What the target refuses ends the whole copy.
    stops: bool,
}

/// Copies all tables as the snapshot shows them, makes their keys and indexes, and reports progress meanwhile, in these kinds of tasks.
///
/// Returns the tables that failed by themselves, each with its error: [`Error::CopyAgain`] if it was rewritten since the snapshot, or the
/// snapshot is gone; [`Error::Blocked`] if the target refuses its rows, which with `stops` ends the whole copy.
///
/// # Errors
/// [`Error`] if all of it failed.
pub async fn run(
    context: &Context,
    jobs: Vec<Job>,
    snapshot: Snapshot,
    tasks: &'static [TaskKind],
    stops: bool,
) -> Result<Vec<(TableName, Error)>, Error> {
    let ranges = plan_ranges(&jobs, snapshot.source_version >= TID_RANGE_SCAN);
    for range in &ranges {
        jobs[range.job].ranges_left.fetch_add(1, Ordering::Relaxed);
    }
    let workers = context.mirror.options.copy_parallel_workers.min(ranges.len()).max(1);
    let shared = Arc::new(Shared {
        jobs,
        ranges: Mutex::new(ranges),
        snapshot,
        context: context.clone(),
        tracker: Tracker::default(),
        tasks,
        stops,
    });
    let mut running = JoinSet::new();
    for _ in 0..workers {
        running.spawn(work(shared.clone()));
    }
    let mut ticks = tokio::time::interval(REPORT_INTERVAL);
    // Dropping the set on an error or a stop ends the workers and closes their connections.
    let result = loop {
        tokio::select! {
            finished = running.join_next() => match finished {
                None => break Ok(()),
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(error))) => break Err(error),
                Some(Err(panic)) => break Err(Error::Blocked(Problem::new(SqlState::INTERNAL_ERROR, format!("copy worker failed: {panic}")))),
            },
            _ = ticks.tick() => report(&shared).await?,
            () = context.stop.wait() => break Err(Error::Stopped),
        }
    };
    report(&shared).await?;
    result?;
    let failed = |job: &Job| Some((job.plan.source.name.clone(), job.failure().take()?));
    Ok(shared.jobs.iter().filter_map(failed).collect())
}

async fn report(shared: &Shared) -> Result<(), Error> {
    let (mut done, mut all) = (0.0, 0.0);
    for job in &shared.jobs {
        let (fraction, size) = (job.fraction(), job.bytes_total().max(1) as f64);
        done += fraction * size;
        all += size;
        shared.tracker.update_table(&job.plan.source.name, |status| {
            status.bytes_total = Some(job.bytes_total());
            status.bytes_copied = Some(job.bytes.load(Ordering::Relaxed));
            status.rows_copied = Some(job.rows.load(Ordering::Relaxed));
            status.copy_fraction = Some(fraction);
        });
    }
    let Context { catalog, mirror, .. } = &shared.context;
    shared.tracker.report_tables(catalog, mirror.id).await?;
    // What follows the copy is the rest of the task.
    for kind in shared.tasks {
        catalog.advance_tasks(mirror.id, *kind, 0.95 * done / f64::max(all, 1.0)).await?;
    }
    Ok(())
}

async fn work(shared: Arc<Shared>) -> Result<(), Error> {
    let mut sessions = open_sessions(&shared).await?;
    loop {
        let range = shared.ranges.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let Some(range) = range else { return Ok(()) };
        let job = &shared.jobs[range.job];
        if job.failure().is_some() {
            continue;
        }
        match copy_part(&shared, job, &range, &sessions).await {
            Ok(()) => {}
            Err(error @ (Error::Blocked(_) | Error::CopyAgain(_)))
                if !shared.stops || matches!(error, Error::CopyAgain(_)) =>
            {
                // The others go on, with sessions that are not amid something.
                job.failure().get_or_insert(error);
                sessions = open_sessions(&shared).await?;
            }
            Err(error) => return Err(error),
        }
    }
}

/// The two ends of a worker.
struct Sessions {
    source: PeerSession,
    target: PeerSession,
    triggers_fire: bool,
}

async fn open_sessions(shared: &Shared) -> Result<Sessions, Error> {
    let mirror = &shared.context.mirror;
    let source = PeerSession::open(&mirror.source_name, &mirror.source).await?;
    let (target, triggers_fire) = open_writer(&mirror.target_name, &mirror.target).await?;
    Ok(Sessions { source, target, triggers_fire })
}

/// Copies a range, and finishes the table when it was the last.
async fn copy_part(shared: &Shared, job: &Job, range: &Range, sessions: &Sessions) -> Result<(), Error> {
    let Sessions { source, target, triggers_fire } = sessions;
    copy_range(shared, job, range, source, target).await?;
    let leaf = &job.leaves[range.leaf];
    let blocks = range.to.unwrap_or(leaf.blocks.max(range.from)) - range.from;
    job.blocks_done.fetch_add(blocks, Ordering::Relaxed);
    if job.ranges_left.fetch_sub(1, Ordering::Relaxed) == 1 {
        finish::finish_table(shared, job, target, *triggers_fire).await?;
    }
    Ok(())
}

async fn copy_range(
    shared: &Shared,
    job: &Job,
    range: &Range,
    source: &PeerSession,
    target: &PeerSession,
) -> Result<(), Error> {
    let leaf = &job.leaves[range.leaf];
    let table = leaf.name.quoted();
    source.run("begin transaction isolation level repeatable read, read only").await?;
    if let Err(error) = source.run(&format!("set transaction snapshot {}", quote_literal(&shared.snapshot.name))).await
    {
        return Err(again("the snapshot of the copy is gone", &["22023", "42704"], error));
    }
    if let Err(error) = source.run(&format!("lock table {table} in access share mode")).await {
        let what = format!("table \"{}\" was dropped or renamed during the copy", leaf.name);
        return Err(again(&what, &["42P01"], error));
    }
    check_not_rewritten(source, leaf).await?;
    check_columns(source, &job.plan).await?;
    target.run("begin").await?;
    progress_row::hold(target, &shared.context.mirror.object_name, shared.context.lane, shared.context.epoch).await?;
    // What was altered after the snapshot is not there any more to read.
    let altered =
        |e| again(&format!("table \"{}\" was altered during the copy", leaf.name), &["42703"], source.error(&e));
    let rows = source.client.copy_out(&job.select(range)).await.map_err(altered)?;
    let sink: CopyInSink<Bytes> =
        target.client.copy_in(&job.insert).await.map_err(|e| in_table(&job.plan.target_name, target.error(&e)))?;
    let mut rows = std::pin::pin!(rows);
    let mut sink = std::pin::pin!(sink);
    let mut gathered = BytesMut::with_capacity(SEND_BYTES);
    while let Some(row) = rows.next().await {
        gathered.extend_from_slice(&row.map_err(|e| source.error(&e))?);
        if gathered.len() >= SEND_BYTES {
            job.bytes.fetch_add(gathered.len() as i64, Ordering::Relaxed);
            sink.send(gathered.split().freeze())
                .await
                .map_err(|e| in_table(&job.plan.target_name, target.error(&e)))?;
            gathered.reserve(SEND_BYTES);
        }
    }
    job.bytes.fetch_add(gathered.len() as i64, Ordering::Relaxed);
    sink.send(gathered.freeze()).await.map_err(|e| in_table(&job.plan.target_name, target.error(&e)))?;
    let copied = sink.finish().await.map_err(|e| in_table(&job.plan.target_name, target.error(&e)))?;
    fail_point!("range copied");
    target.run("commit").await?;
    fail_point!("range committed");
    source.run("commit").await?;
    job.rows.fetch_add(copied.cast_signed(), Ordering::Relaxed);
    Ok(())
}

/// A rewriting ALTER, TRUNCATE or VACUUM FULL that committed after the snapshot leaves the snapshot an empty table to read, without any
/// error. The catalog as the snapshot shows it then names another file than the table has now.
async fn check_not_rewritten(source: &PeerSession, leaf: &Leaf) -> Result<(), Error> {
    let query = "select c.relfilenode = pg_catalog.pg_relation_filenode(c.oid::pg_catalog.regclass) from pg_catalog.pg_class c where c.oid = $1";
    let row = source.client.query_opt(query, &[&leaf.oid]).await.map_err(|e| source.error(&e))?;
    match row.and_then(|r| r.get::<_, Option<bool>>(0)) {
        Some(true) => Ok(()),
        _ => Err(Error::CopyAgain(
            Problem::new(
                SqlState::WRONG_STATE,
                format!("table \"{}\" was rewritten or truncated during the copy", leaf.name),
            )
            .detail("The copy's snapshot no longer shows its rows."),
        )),
    }
}

/// Locks keep a table as it was looked at until the snapshot is taken, but they are given up when that takes long: a column that came in
/// between would be neither in the copy nor in the stream.
async fn check_columns(source: &PeerSession, plan: &TablePlan) -> Result<(), Error> {
    let query = "
        select a.attnum, a.attname::text from pg_catalog.pg_attribute a
        where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped order by a.attnum";
    let rows = source.client.query(query, &[&plan.source.oid]).await.map_err(|e| source.error(&e))?;
    let there = rows.iter().map(|row| (row.get::<_, i16>(0), row.get::<_, &str>(1)));
    if there.eq(plan.source.columns.iter().map(|c| (c.number, c.name.as_str()))) {
        return Ok(());
    }
    let message = format!("table \"{}\" was altered before the copy began", plan.source.name);
    Err(Error::CopyAgain(Problem::new(SqlState::WRONG_STATE, message)))
}

/// What only a new copy can pass.
fn again(what: &str, sqlstates: &[&str], error: Error) -> Error {
    match error {
        Error::Blocked(problem) if sqlstates.contains(&problem.sqlstate.as_str()) => {
            Error::CopyAgain(Problem::new(problem.sqlstate, what).detail(format!("{}.", problem.message)))
        }
        other => other,
    }
}

fn in_table(table: &TableName, error: Error) -> Error {
    match error {
        Error::Blocked(problem) => {
            let detail = problem.detail.clone().map(|d| format!("{d} ")).unwrap_or_default();
            Error::Blocked(problem.detail(format!("{detail}It happened while copying to table \"{table}\".")))
        }
        other => other,
    }
}

/// Target tables by name, as [`crate::schema::introspect::target_tables`] describes them.
pub type Targets = HashMap<TableName, TargetTable>;

#[cfg(test)]
mod tests {
    use catalog::mirror::ColumnChoice;

    use super::*;
    use crate::schema::{RowIdentity, SourceTable};

    fn job(name: &str, blocks: &[i64]) -> Job {
        let table = TableName::new("public", name);
        let leaf = |(n, blocks): (usize, &i64)| Leaf {
            oid: 1,
            name: TableName::new("public", format!("{name}{n}")),
            blocks: *blocks,
            bytes: blocks * 8192,
        };
        let source = SourceTable {
            oid: 1,
            name: table.clone(),
            columns: Vec::new(),
            identity: RowIdentity::InsertsOnly,
            indexes: Vec::new(),
            partitioned: false,
            root: None,
            files: std::collections::BTreeMap::new(),
            storage: Default::default(),
            constraints: Vec::new(),
            last_number: 0,
        };
        let plan = TablePlan { source, target_name: table, columns: ColumnChoice::default(), condition: None };
        Job::new(
            plan,
            blocks.iter().enumerate().map(leaf).collect(),
            &Filling { fill: Fill::Append, reshape: None },
            "m",
            &Types::new(),
            None,
        )
    }

    #[test]
    fn ranges_cover_every_block_once_and_end_open() {
        let jobs = [job("small", &[3]), job("large", &[2 * RANGE_BLOCKS + 1]), job("empty", &[0])];
        let ranges: Vec<Range> = plan_ranges(&jobs, true).into();
        let of = |job: usize| ranges.iter().filter(move |r| r.job == job).map(|r| (r.from, r.to)).collect::<Vec<_>>();
        assert_eq!(of(1), [(0, Some(RANGE_BLOCKS)), (RANGE_BLOCKS, Some(2 * RANGE_BLOCKS)), (2 * RANGE_BLOCKS, None)]);
        assert_eq!((of(0), of(2)), (vec![(0, None)], vec![(0, None)]));
        assert_eq!(ranges[0].job, 1, "the largest table comes first");
    }

    #[test]
    fn without_range_scans_a_relation_is_one_range() {
        assert_eq!(plan_ranges(&[job("large", &[100_000])], false).len(), 1);
    }

    #[test]
    fn each_partition_is_read_by_itself() {
        let jobs = [job("parts", &[1, 1])];
        let statements: Vec<String> = plan_ranges(&jobs, true).iter().map(|r| jobs[0].select(r)).collect();
        assert!(
            statements[0].contains("only \"public\".\"parts0\" as \"parts\")") && statements[1].contains("\"parts1\""),
            "{statements:?}"
        );
    }
}
