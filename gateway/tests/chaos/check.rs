//! What must hold: all the time for a reader of the target, and in the end for all rows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config};

use crate::servers::{World, ask, connect};

/// Asks in one statement, so from one snapshot. There is a whole to see only once the copy is complete, which the progress row says, and
/// while none of these tables is copied by itself, ahead of the others or behind them: then their marks are not after the progress.
const LOOK: &str = "
    select p.applied_lsn::text, p.applied_lsn - '0/0', (select sum(n) from acc_a), (select sum(n) from acc_b),
        (select count(*) from mark_a), (select count(*) from mark_b), (select coalesce(sum(id), 0) from mark_a) = (select coalesce(sum(id), 0) from mark_b)
    from peergate.progress p
    where p.lane = 0 and p.applied_lsn > '0/0' and not exists (select from peergate.progress where lane <> 0)
      and 4 = (select count(*) from peergate.progress_tables t
               where t.source_name in ('acc_a', 'acc_b', 'mark_a', 'mark_b') and t.from_lsn <= p.applied_lsn)";

/// Looks at the target all the time.
pub(crate) struct Reader {
    stop: Arc<AtomicBool>,
    looks: Arc<AtomicU64>,
    running: JoinHandle<Result<(), String>>,
    seen_wrong: Arc<AtomicBool>,
}

impl Reader {
    pub(crate) fn start(target: Config) -> Reader {
        let stop = Arc::new(AtomicBool::new(false));
        let looks = Arc::new(AtomicU64::new(0));
        let seen_wrong = Arc::new(AtomicBool::new(false));
        let (stopped, count, wrong) = (stop.clone(), looks.clone(), seen_wrong.clone());
        let running = tokio::spawn(async move {
            let mut client: Option<Client> = None;
            let mut before = String::new();
            while !stopped.load(Ordering::Relaxed) {
                tokio::time::sleep(Duration::from_millis(25)).await;
                let Some(connected) = &client else {
                    client = connect(&target).await.ok();
                    continue;
                };
                match connected.simple_query(LOOK).await {
                    Ok(messages) => {
                        let row = messages.iter().find_map(|m| match m {
                            tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
                            _ => None,
                        });
                        let Some(row) = row else { continue };
                        let fields: Vec<&str> = (0..7).map(|n| row.get(n).unwrap_or("null")).collect();
                        count.fetch_add(1, Ordering::Relaxed);
                        let sum = |n: usize| fields[n].parse::<i64>().unwrap_or(i64::MIN / 4);
                        if sum(2) + sum(3) != 0 || fields[4] != fields[5] || fields[6] != "t" {
                            wrong.store(true, Ordering::Relaxed);
                            return Err(format!("half a transaction was seen at {}: {fields:?}", fields[0]));
                        }
                        let position = format!("{:>24}", fields[1]);
                        if position < before {
                            wrong.store(true, Ordering::Relaxed);
                            return Err(format!("the target went back from {before} to {position}"));
                        }
                        before = position;
                    }
                    // The tables are not there yet, or the server is going down.
                    Err(error) if error.is_closed() || connected.is_closed() => client = None,
                    Err(_) => {}
                }
            }
            Ok(())
        });
        Reader { stop, looks, running, seen_wrong }
    }

    /// Fails as soon as something wrong was seen.
    pub(crate) fn verdict(&self) -> Result<(), String> {
        if self.seen_wrong.load(Ordering::Relaxed) {
            Err("the reader of the target saw something wrong".to_owned())
        } else {
            Ok(())
        }
    }

    /// Ends it once it has had a look at a target that nothing disturbs any more; returns how often it looked.
    pub(crate) async fn stop(self) -> Result<u64, String> {
        let (before, begun) = (self.looks.load(Ordering::Relaxed), Instant::now());
        while self.looks.load(Ordering::Relaxed) == before && !self.running.is_finished() {
            if begun.elapsed() > Duration::from_secs(60) {
                return Err("the reader never finds the target whole".to_owned());
            }
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        self.stop.store(true, Ordering::Relaxed);
        self.running.await.unwrap()?;
        Ok(self.looks.load(Ordering::Relaxed))
    }
}

/// Compares all tables of both sides as multisets of rows.
pub(crate) async fn compare(world: &World) -> Result<(), String> {
    let source = world.source.connect("shop").await.map_err(|e| e.to_string())?;
    let target = world.target.connect("dwh").await.map_err(|e| e.to_string())?;
    let tables = "select coalesce(string_agg(quote_ident(relname), E'\\n' order by relname), '') from pg_class
        where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') and not relispartition";
    for table in ask(&source, tables).await?.lines() {
        let columns = format!(
            "select string_agg(quote_ident(attname), ', ' order by attname) from pg_attribute where attrelid = 'public.{}'::regclass and attnum > 0 and not attisdropped",
            table.replace('\'', "''")
        );
        let columns = ask(&source, &columns).await?;
        let print = format!(
            "select concat_ws(' ', count(*), sum(hashtextextended(r::text, 1)), sum(hashtextextended(r::text, 2))) from (select {columns} from {table}) r"
        );
        let (there, here) = (ask(&source, &print).await?, ask(&target, &print).await?);
        if there != here {
            let rows = difference(&source, &target, table, &columns).await?;
            return Err(format!("{table} differs: source {there}, target {here}\n{rows}"));
        }
    }
    Ok(())
}

/// Rows that one side has more often than the other.
async fn difference(source: &Client, target: &Client, table: &str, columns: &str) -> Result<String, String> {
    let query = format!("select r::text, count(*) from (select {columns} from {table}) r group by 1");
    let mut counts = BTreeMap::<String, i64>::new();
    for (client, sign) in [(source, 1), (target, -1)] {
        for row in client.query(&query, &[]).await.map_err(|e| e.to_string())? {
            *counts.entry(row.get(0)).or_default() += sign * row.get::<_, i64>(1);
        }
    }
    let all = counts.values().filter(|n| **n != 0).count();
    let rows = counts.iter().filter(|(_, n)| **n != 0).take(10);
    let rows: Vec<String> =
        rows.map(|(row, n)| format!("{n:+} on the source: {}", row.chars().take(200).collect::<String>())).collect();
    Ok(format!("{all} rows differ, such as\n{}", rows.join("\n")))
}
