//! A round: what is new is divided into partitions, which are carried one by one or several at a time, and then noted as a whole.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use catalog::mirror::query::QueryMode;
use catalog::mirror::{PartitionRow, RoundEnd};
use pg::SqlState;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::open_target;
use super::preflight::Plan;
use super::progress::{self, Open, Partition, Progress};
use super::source::{self as asked, become_reader};
use super::template::Limit;
use super::transfer::{self, Destination};
use super::watermark::{Kind, Span, divide, xmin_spans};
use crate::error::{Error, Problem};
use crate::session::PeerSession;
use crate::sink::progress_row::{self, MAIN_LANE, stage_table};
use crate::worker::Context;

/// What a round that begins takes.
struct Share {
    /// The watermark that it reaches.
    upper: Option<String>,
    /// Parts of the watermark's values; none if nothing is new.
    spans: Vec<Span>,
}

/// Runs a round, or the rest of one that was interrupted. The source's session is in no transaction.
///
/// # Errors
/// [`Error`] with what ends the attempt; the next one goes on with what is not done.
pub async fn run(context: &Context, plan: &Plan, source: &PeerSession, target: &PeerSession) -> Result<(), Error> {
    let (catalog, id, mirror) = (&context.catalog, context.mirror.id, &context.mirror.object_name);
    let progress = progress::read(target, mirror).await?;
    // Rows that replace all others are to be of one moment; those of a moment that is over are forgotten.
    let open = progress.open.clone().filter(|_| plan.query.mode != QueryMode::Overwrite);
    let replaces = progress.replaces || plan.query.mode == QueryMode::Overwrite;
    let stage = replaces.then(|| stage_table(mirror, 0));
    let (open, in_snapshot) = match open {
        Some(open) => {
            catalog.continue_round(id, open.round).await?;
            (Some(open), false)
        }
        None => {
            let begun = catalog.begin_round(id, context.epoch, progress.rounds).await?;
            let Some(round) = begun else { return Err(context.not_ours().await) };
            begin(context, plan, &progress, round, replaces, stage.as_deref(), source, target).await?
        }
    };
    let Some(open) = open else { return Ok(()) };
    let reads = plan.query.detect_deletes || open.partitions.iter().any(|p| p.rows.is_none());
    if reads && !in_snapshot {
        asked::open_snapshot(source).await?;
    }
    let rows: Vec<PartitionRow> = open.partitions.iter().map(partition_row).collect();
    let bounds = [progress.reached.as_deref(), open.upper.as_deref()];
    catalog.set_round_plan(id, open.round, replaces, bounds, &rows).await?;
    carry_all(context, plan, &open, stage.as_deref(), source, target).await?;
    let deleted = finish(context, plan, open.round, stage.as_deref(), source, target).await?;
    if reads {
        source.run("commit").await?;
    }
    end(context, open.round, deleted).await
}

fn partition_row(partition: &Partition) -> PartitionRow {
    PartitionRow {
        number: partition.number,
        lower: partition.span.from.clone(),
        upper: partition.span.to.clone(),
        rows: partition.rows,
    }
}

async fn end(context: &Context, round: i64, deleted: i64) -> Result<(), Error> {
    fail_point!("query round completed");
    if context.catalog.end_round(context.mirror.id, context.epoch, round, RoundEnd { deleted }).await? {
        Ok(())
    } else {
        Err(context.not_ours().await)
    }
}

/// Begins a round, and notes on the target what it is made of. Returns that, and whether the source's session is in the transaction in which it is to be read;
/// `None` if there was nothing to do, and the round is completed.
#[allow(clippy::too_many_arguments, reason = "one call, of what the round has")]
async fn begin(
    context: &Context,
    plan: &Plan,
    progress: &Progress,
    round: i64,
    replaces: bool,
    stage: Option<&str>,
    source: &PeerSession,
    target: &PeerSession,
) -> Result<(Option<Open>, bool), Error> {
    let Share { upper, spans } = share(context, plan, progress, round, source).await?;
    let in_snapshot = !spans.is_empty();
    // What has nothing to write writes nothing; but for the first round, which may be all that is wanted.
    if spans.is_empty() && progress.rounds > 0 && !replaces && !plan.query.detect_deletes {
        end(context, round, 0).await?;
        return Ok((None, false));
    }
    let partition = |(number, span)| Partition { number, span, rows: None };
    let open = Open { round, upper, partitions: (1..).zip(spans).map(partition).collect() };
    let (columns, table) = (plan.column_list(), plan.query.target.quoted());
    let then = stage.map_or_else(String::new, |stage| {
        format!("drop table if exists {stage}; create table {stage} as select {columns} from {table} with no data")
    });
    progress::plan(target, &context.mirror.object_name, context.epoch, &open, replaces, &then).await?;
    fail_point!("query round begun");
    Ok((Some(open), in_snapshot))
}

/// Works out what a round takes. If it is something, the source's session is left in the transaction in which it is to be read.
async fn share(
    context: &Context,
    plan: &Plan,
    progress: &Progress,
    round: i64,
    source: &PeerSession,
) -> Result<Share, Error> {
    let reached = progress.reached.as_deref();
    let kind = match &plan.limit {
        Limit::Nothing => {
            asked::open_snapshot(source).await?;
            return Ok(Share { upper: None, spans: vec![Span::default()] });
        }
        Limit::Xmin => Kind::Xmin,
        Limit::Column(_, kind) | Limit::Placeholders(kind) => *kind,
    };
    if kind == Kind::Xmin {
        return share_by_xmin(reached, source).await;
    }
    if plan.query.mode == QueryMode::Overwrite {
        let borders = asked::borders(plan, kind, source, None, None).await?;
        asked::open_snapshot(source).await?;
        return Ok(Share { upper: None, spans: divide(None, None, borders) });
    }
    let Some(bound) = asked::choose(plan, kind, source, reached).await? else {
        return Ok(Share { upper: None, spans: Vec::new() });
    };
    fail_point!("query bound chosen");
    asked::wait(context, plan, kind, source, round, &bound).await?;
    // Not in the transaction that holds the snapshot: it would keep its lock on the table for as long as the round takes.
    let borders = asked::borders(plan, kind, source, bound.from.as_deref(), Some(&bound.upper)).await?;
    asked::open_snapshot(source).await?;
    Ok(Share { spans: divide(bound.from, Some(bound.upper.clone()), borders), upper: Some(bound.upper) })
}

/// All transactions before the snapshot's first one have ended, and what they have committed is seen: nobody needs to be waited for.
async fn share_by_xmin(reached: Option<&str>, source: &PeerSession) -> Result<Share, Error> {
    let reached = match reached.map(str::parse::<u64>) {
        None => None,
        Some(Ok(reached)) => Some(reached),
        Some(Err(error)) => return Err(Error::protocol(&source.peer, error)),
    };
    asked::open_snapshot(source).await?;
    let (xmin, xmax) = asked::transaction_numbers(source).await?;
    if let Some(reached) = reached.filter(|reached| *reached > xmax) {
        let message = format!("transactions of peer \"{}\" have lower numbers than those that were read", source.peer);
        return Err(Error::ResyncRequired(
            Problem::new(SqlState::WRONG_STATE, message)
                .detail(format!("The mirror has read all before {reached}, and the next one will be {xmax}. It is another server, or one that was set back."))
                .hint("RESYNC MIRROR takes all rows anew."),
        ));
    }
    let spans = xmin_spans(reached, xmin, xmax);
    if spans.is_empty() {
        source.run("commit").await?;
    }
    let upper = Some(xmin.max(reached.unwrap_or_default()).to_string());
    Ok(Share { upper, spans })
}

/// Carries the partitions that are not done.
async fn carry_all(
    context: &Context,
    plan: &Plan,
    open: &Open,
    stage: Option<&str>,
    source: &PeerSession,
    target: &PeerSession,
) -> Result<(), Error> {
    let left: VecDeque<Partition> = open.partitions.iter().filter(|p| p.rows.is_none()).cloned().collect();
    let Some(first) = left.front() else { return Ok(()) };
    let (turn, _) = watch::channel(first.number);
    let turn = Arc::new(turn);
    let workers = plan.query.workers.min(left.len());
    if left.len() == 1 {
        let destination = Destination { context, plan, stage, turn: &turn };
        return carry(&destination, open.round, first, source, target).await;
    }
    let snapshot: Arc<str> = asked::export(source).await?.into();
    let left = Arc::new(Mutex::new(left));
    let mut running = JoinSet::new();
    for _ in 0..workers {
        let (context, plan, stage) = (context.clone(), plan.clone(), stage.map(str::to_owned));
        let (turn, left, snapshot, round) = (turn.clone(), left.clone(), snapshot.clone(), open.round);
        running.spawn(async move {
            let source = PeerSession::open(&context.mirror.source_name, &context.mirror.source).await?;
            become_reader(&source).await?;
            let target = open_target(&context, &plan.search_path).await?;
            let destination = Destination { context: &context, plan: &plan, stage: stage.as_deref(), turn: &turn };
            loop {
                let next = left.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                let Some(partition) = next else { return Ok::<(), Error>(()) };
                // In a transaction of its own: who wants to alter a table that it reads waits for the partition, and not for the round.
                asked::import(&source, &snapshot).await?;
                carry(&destination, round, &partition, &source, &target).await?;
                source.run("commit").await?;
            }
        });
    }
    // Dropping the set on an error or a stop ends the others and closes their connections.
    while let Some(ended) = running.join_next().await {
        match ended {
            Ok(result) => result?,
            Err(panic) => {
                let message = format!("worker of a partition failed: {panic}");
                return Err(Error::Blocked(Problem::new(SqlState::INTERNAL_ERROR, message)));
            }
        }
    }
    Ok(())
}

async fn carry(
    destination: &Destination<'_>,
    round: i64,
    partition: &Partition,
    source: &PeerSession,
    target: &PeerSession,
) -> Result<(), Error> {
    let (catalog, id) = (&destination.context.catalog, destination.context.mirror.id);
    catalog.begin_partition(id, round, partition.number).await?;
    let carried = destination.carry(partition, source, target).await?;
    catalog.end_partition(id, round, partition.number, carried.rows, carried.bytes).await?;
    Ok(())
}

/// Puts the gathered rows in the place of those that are there, deletes what the query has no more, and notes that the round is completed: all at once. Returns
/// how many rows were deleted.
async fn finish(
    context: &Context,
    plan: &Plan,
    round: i64,
    stage: Option<&str>,
    source: &PeerSession,
    target: &PeerSession,
) -> Result<i64, Error> {
    let mirror = &context.mirror.object_name;
    target.run("begin").await?;
    progress_row::hold(target, mirror, MAIN_LANE, context.epoch).await?;
    if let Some(stage) = stage {
        let (columns, table) = (plan.column_list(), plan.query.target.quoted());
        let insert = format!(
            "insert into {table} ({columns}) overriding system value select {columns} from {stage}; drop table {stage}"
        );
        target.run(&format!("delete from {}; {insert}", plan.alone)).await?;
        fail_point!("query rows replaced");
    }
    let deleted = if plan.query.detect_deletes { transfer::delete_missing(plan, source, target).await? } else { 0 };
    progress::complete(target, mirror, round).await?;
    fail_point!("query round noted as completed");
    target.run("commit").await?;
    Ok(deleted)
}
