//! Compares both sides of a mirror at one position, while changes go on: VERIFY MIRROR.
//!
//! A run takes one moment of both sides ([`moment`]), reads each table on both at that moment ([`scan`]), by sums of hashes in buckets
//! first ([`tally`]), then row by row where those differ ([`merge`]), and tells the catalog what it finds; if that is wanted, it mends
//! those rows ([`repair`]). A run that is cut short by
//! whatever ends the mirror's attempt begins anew with the next one.

pub mod brake;
pub mod merge;
pub mod moment;
pub mod repair;
pub mod scan;
pub mod tally;
pub mod text;

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use catalog::mirror::Mirror;
use catalog::verification::{
    DIFFERENCES_KEPT_MAX, Difference, DifferenceKind, TableResult, Verification, VerifiedTable,
};
use pg::{Lsn, SqlState, TableName};

use crate::error::{Error, Problem, retry_delay};
use crate::late::Main;
use crate::prepare::{describe_targets, known_tables};
use crate::schema::{TablePlan, TargetTable};
use crate::session::PeerSession;
use crate::sink::marks;
use crate::source::preflight::{Findings, plan_known_tables};
use crate::verify::merge::Found;
use crate::verify::moment::Moment;
use crate::verify::repair::Patient;
use crate::verify::scan::{Fraction, Reader, choose_hash, rows_that_differ};
use crate::verify::tally::buckets_for;
use crate::verify::text::{Comparison, Hash, print_key};
use crate::worker::Context;

/// How often the catalog is asked for verifications without having been notified.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// How often it is looked whether a run is still wanted.
const WANTED_INTERVAL: Duration = Duration::from_secs(1);

/// How often the catalog is told of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// Tables that were rewritten while they were compared are compared once more, at another moment, so often.
const ROUNDS: u32 = 3;

/// Attempts at a run before what passes by itself ends it.
const ATTEMPTS: u32 = 5;

/// Rows that differ are told to the catalog by so many.
const TOLD_ROWS: usize = 500;

/// Runs verifications of the mirror, one after the other, for as long as the main stream runs.
///
/// # Errors
/// [`Error::Fenced`] if another process has taken the mirror over, [`Error::Stopped`] if the stream has ended.
pub async fn run(context: Context, main: Arc<Main>) -> Result<Infallible, Error> {
    loop {
        match context.catalog.take_verification(context.mirror.id).await {
            Ok(Some(verification)) => {
                if let Err(error) = attend(&context, &main, &verification).await {
                    // The catalog is out of reach, which others tell; or the mirror is not ours any more.
                    if error.problem().is_none() {
                        return Err(error);
                    }
                    tracing::warn!(error = %error, "verification not recorded");
                }
                continue;
            }
            Ok(None) => {}
            Err(error) => tracing::debug!(error = %error, "catalog cannot be asked for verifications"),
        }
        tokio::select! {
            () = context.to_verify.notified() => {}
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
    }
}

/// Runs one verification to its end, unless nobody wants it any more.
async fn attend(context: &Context, main: &Main, verification: &Verification) -> Result<(), Error> {
    let task = verification.task_id;
    tracing::info!(task, "verification begins");
    let result = tokio::select! {
        result = try_repeatedly(context, main, verification) => result,
        gone = until_unwanted(context, task) => {
            gone?;
            tracing::info!(task, "verification canceled");
            return Ok(context.catalog.cancel_verification(task).await?);
        }
    };
    match result {
        Ok(()) => {
            tracing::info!(task, "verification completed");
            Ok(context.catalog.complete_verification(task).await?)
        }
        Err(error) => {
            let Some(problem) = error.problem() else { return Err(error) };
            tracing::warn!(task, sqlstate = %problem.sqlstate, error = problem.message, "verification failed");
            let (sqlstate, detail, hint) =
                (problem.sqlstate.to_string(), problem.detail.as_deref(), problem.hint.as_deref());
            Ok(context.catalog.fail_verification(task, &sqlstate, &problem.message, detail, hint).await?)
        }
    }
}

async fn until_unwanted(context: &Context, task: i64) -> Result<(), Error> {
    while context.catalog.is_verification_wanted(task).await? {
        tokio::time::sleep(WANTED_INTERVAL).await;
    }
    Ok(())
}

async fn try_repeatedly(context: &Context, main: &Main, verification: &Verification) -> Result<(), Error> {
    let mut attempt = 1;
    let mut done = Vec::new();
    loop {
        let run = Run { context, main, verification };
        match run.compare(&mut done).await {
            Err(Error::Transient(problem)) if attempt < ATTEMPTS => {
                let message = format!("tried again: {}", problem.message);
                context.catalog.log_task(verification.task_id, &message).await?;
                tokio::time::sleep(retry_delay(attempt)).await;
                attempt += 1;
            }
            other => return other,
        }
    }
}

/// A verification that runs.
struct Run<'a> {
    context: &'a Context,
    main: &'a Main,
    verification: &'a Verification,
}

/// A table and how it is compared at a moment.
struct Subject<'a> {
    plan: &'a TablePlan,
    target: &'a TargetTable,
    readers: [Reader<'a>; 2],
    comparison: Comparison,
}

impl Run<'_> {
    /// Compares the tables that are not `done` yet.
    async fn compare(&self, done: &mut Vec<TableName>) -> Result<(), Error> {
        let mut last = Vec::new();
        for _ in 0..ROUNDS {
            last = self.compare_at_one_moment(done).await?;
            if last.is_empty() {
                return Ok(());
            }
        }
        for (table, why) in last {
            self.record(&skipped(&table, why), done).await?;
        }
        Ok(())
    }

    /// Compares what is not done; returns the tables for which it has to be another moment, with the reason.
    async fn compare_at_one_moment(
        &self,
        done: &mut Vec<TableName>,
    ) -> Result<Vec<((TableName, TableName), String)>, Error> {
        let Run { context, main, verification } = self;
        let mirror = &context.mirror;
        let moment = Moment::take(context, main, false).await?;
        let message = format!(
            "both sides are compared at {}, for which the stream stood still for {} ms",
            moment.lsn,
            moment.stood_still.as_millis()
        );
        tracing::debug!(lsn = %moment.lsn, stood_still_ms = moment.stood_still.as_millis(), "moment taken");
        context.catalog.set_verification_lsn(verification.task_id, moment.lsn, &message).await?;
        let mut sessions = open_readers(mirror).await?;
        let known = known_tables(context).await?;
        let streaming = self.streaming(&sessions[1], &moment).await?;
        let asked = |table: &TableName| verification.tables.as_ref().is_none_or(|tables| tables.contains(table));
        let wanted = known.values().filter(|t| t.state != "removed" && asked(&t.source) && !done.contains(&t.source));
        let (mut names, mut others) = (Vec::new(), Vec::new());
        for table in wanted {
            let name = (table.source.clone(), table.target.clone());
            if streaming.contains(&table.source) { names.push(name) } else { others.push((name, &table.state)) }
        }
        for (name, state) in others {
            self.record(&skipped(&name, format!("the table is {state}")), done).await?;
        }
        let mut again = Vec::new();
        let count = names.len();
        for (n, name) in names.into_iter().enumerate() {
            let part = [n as f64 / count as f64, 1.0 / count as f64];
            match self.verify_table(&moment, &sessions, &name, part).await {
                Ok(table) => self.record(&table, done).await?,
                Err(Error::CopyAgain(problem) | Error::Blocked(problem)) if is_of_a_moment(&problem) => {
                    again.push((name, problem.message));
                    sessions = open_readers(mirror).await?;
                }
                Err(Error::Blocked(problem) | Error::CopyAgain(problem)) => {
                    self.record(&skipped(&name, problem.message), done).await?;
                    sessions = open_readers(mirror).await?;
                }
                Err(other) => return Err(other),
            }
        }
        Ok(again)
    }

    /// Returns the tables whose rows on the target are as of the moment: by their marks, as its snapshot shows them.
    async fn streaming(&self, target: &PeerSession, moment: &Moment) -> Result<Vec<TableName>, Error> {
        moment::join(target, &moment.target).await?;
        let marks = marks::read(target, &self.context.mirror.object_name).await?;
        target.run("commit").await?;
        let lsn: Lsn = moment.lsn;
        Ok(marks.into_iter().filter(|(_, from)| *from <= lsn).map(|(table, _)| table).collect())
    }

    async fn record(&self, table: &VerifiedTable, done: &mut Vec<TableName>) -> Result<(), Error> {
        self.context.catalog.set_verified_table(self.verification.task_id, table).await?;
        done.push(table.source.clone());
        Ok(())
    }

    async fn verify_table(
        &self,
        moment: &Moment,
        sessions: &[PeerSession; 2],
        name: &(TableName, TableName),
        part: [f64; 2],
    ) -> Result<VerifiedTable, Error> {
        let (mirror, [source, target]) = (&self.context.mirror, sessions);
        let mut findings = Findings::default();
        let plans = plan_known_tables(mirror, source, std::slice::from_ref(name), &mut findings).await?;
        findings.into_result()?;
        let mut targets = describe_targets(target, &plans, &mirror.options.bookkeeping).await?;
        let (plan, found) = match (plans.first(), targets.remove(&name.1)) {
            (Some(plan), Some(found)) => (plan, found),
            _ => return Ok(skipped(name, format!("target table \"{}\" does not exist", name.1))),
        };
        // A change of the source's schema may not have come yet.
        plan.check_target(&found).map_err(Error::CopyAgain)?;
        let hash: Hash = choose_hash(source, target).await?;
        let types = scan::target_types(target, found.oid).await?;
        let readers = [
            Reader::open(source, &moment.source, plan.source.oid).await?,
            Reader::open(target, &moment.target, found.oid).await?,
        ];
        let buckets = buckets_for(readers[0].bytes().max(readers[1].bytes()));
        let comparison =
            Comparison::new(plan, &found.alone(), found.bookkeeping.soft_delete.as_deref(), &types, hash, buckets);
        let subject = Subject { plan, target: &found, readers, comparison };
        let mut table = VerifiedTable {
            source: name.0.clone(),
            target: name.1.clone(),
            result: TableResult::Equal,
            lsn: Some(moment.lsn),
            rows: None,
            missing: 0,
            different: 0,
            extra: 0,
            repaired: 0,
            message: None,
        };
        let differing = self.compare_sums(&subject, &mut table, part).await?;
        if !differing.is_empty() {
            table.result = TableResult::Different;
            // Given up, the queries are canceled on both servers.
            let found = self.find_rows(&subject, &differing, &mut table);
            source.watched(target.watched(found)).await?;
            source.run("commit").await?;
            target.run("commit").await?;
        }
        Ok(table)
    }

    /// Compares the sums; returns the buckets that differ.
    async fn compare_sums(
        &self,
        subject: &Subject<'_>,
        table: &mut VerifiedTable,
        [before, share]: [f64; 2],
    ) -> Result<Vec<i64>, Error> {
        let Subject { readers: [source, target], comparison, .. } = subject;
        let done = [Fraction::default(), Fraction::default()];
        let sums = async {
            tokio::try_join!(
                source.tally(comparison, &comparison.source, &done[0]),
                target.tally(comparison, &comparison.target, &done[1])
            )
        };
        let mut sums = std::pin::pin!(sums);
        let (of_source, of_target) = loop {
            tokio::select! {
                sums = &mut sums => break sums?,
                () = tokio::time::sleep(PROGRESS_INTERVAL) => {
                    // What follows is finding the rows.
                    let whole = before + share * 0.9 * (done[0].get() + done[1].get()) / 2.0;
                    self.context.catalog.advance_verification(self.verification.task_id, whole).await?;
                }
            }
        };
        table.rows = Some([of_source.rows(), of_target.rows()]);
        Ok(of_source.differing(&of_target))
    }

    /// Finds the rows that differ, tells the catalog of them, and mends them if that is wanted.
    async fn find_rows(&self, subject: &Subject<'_>, buckets: &[i64], table: &mut VerifiedTable) -> Result<(), Error> {
        let Subject { plan, target: of_target, readers: [source, target], comparison } = subject;
        let (catalog, task) = (&self.context.catalog, self.verification.task_id);
        let name = &plan.source.name;
        let patient = Patient { plan, target: of_target, comparison };
        catalog.clear_differences(task, name).await?;
        let (mut kept, mut untold, mut unmended) = (0, Vec::new(), Vec::new());
        let mut rows = rows_that_differ([source, target], comparison, buckets).await?;
        while let Some(found) = rows.next().await? {
            match found.kind {
                DifferenceKind::Missing => table.missing += found.copies,
                DifferenceKind::Different => table.different += found.copies,
                DifferenceKind::Extra => table.extra += found.copies,
            }
            if kept < DIFFERENCES_KEPT_MAX {
                let key = print_key(&comparison.key, &found.key);
                untold.push(Difference { kind: found.kind, key, copies: found.copies });
                kept += 1;
            }
            if untold.len() >= TOLD_ROWS {
                catalog.add_differences(task, name, &untold).await?;
                untold.clear();
            }
            if self.verification.repair {
                unmended.push(found);
            }
            if unmended.len() >= repair::ROWS_MAX {
                self.mend(&patient, &mut unmended, table).await?;
            }
        }
        catalog.add_differences(task, name, &untold).await?;
        if self.verification.repair {
            self.mend(&patient, &mut unmended, table).await?;
            if table.message.is_none() {
                table.result = TableResult::Repaired;
            }
        }
        Ok(())
    }

    /// Mends rows, unless some could not be: then the table is left as it is.
    async fn mend(&self, patient: &Patient<'_>, rows: &mut Vec<Found>, table: &mut VerifiedTable) -> Result<(), Error> {
        let rows = std::mem::take(rows);
        if rows.is_empty() || table.message.is_some() {
            return Ok(());
        }
        match repair::mend(self.context, self.main, patient, &rows).await {
            Ok(mended) => table.repaired += mended,
            Err(Error::Blocked(problem)) => {
                let detail = problem.detail.map(|detail| format!(" ({detail})")).unwrap_or_default();
                table.message = Some(format!("not repaired: {}{detail}", problem.message));
            }
            Err(other) => return Err(other),
        }
        Ok(())
    }
}

/// Whether it may be otherwise at another moment: a table was rewritten, or looks different on both sides because its schema has just
/// been changed.
fn is_of_a_moment(problem: &Problem) -> bool {
    problem.sqlstate == SqlState::WRONG_STATE || problem.sqlstate.class() == "42"
}

/// Opens the two sessions that read.
async fn open_readers(mirror: &Mirror) -> Result<[PeerSession; 2], Error> {
    let source = PeerSession::open(&mirror.source_name, &mirror.source).await?;
    Ok([source, PeerSession::open(&mirror.target_name, &mirror.target).await?])
}

/// A table that could not be compared.
fn skipped((source, target): &(TableName, TableName), why: String) -> VerifiedTable {
    VerifiedTable {
        source: source.clone(),
        target: target.clone(),
        result: TableResult::Skipped,
        lsn: None,
        rows: None,
        missing: 0,
        different: 0,
        extra: 0,
        repaired: 0,
        message: Some(why),
    }
}
