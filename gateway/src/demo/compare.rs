//! Whether two databases hold the same rows, and whether a dropped mirror has left anything behind.
//!
//! It asks the sample servers themselves and nothing of Peergate: what is checked has no say in the check.

use std::time::{Duration, Instant};

use tokio_postgres::{Client, Config, NoTls};

use super::stage::Output;
use super::{DemoError, group};

/// One table on both sides. The checksum does not depend on the order of the rows, and counts rows that occur twice twice.
pub(super) struct TableComparison {
    table: String,
    source: Side,
    target: Option<Side>,
}

#[derive(PartialEq)]
struct Side {
    rows: i64,
    checksum: String,
}

impl TableComparison {
    pub(super) fn is_equal(&self) -> bool {
        self.target.as_ref() == Some(&self.source)
    }

    pub(super) fn source_rows(&self) -> i64 {
        self.source.rows
    }
}

/// Connects, with the settings that decide how values are written set the same everywhere.
async fn connect(config: &Config) -> Result<Client, DemoError> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    client
        .batch_execute(
            "set timezone = 'UTC'; set datestyle = 'ISO'; set intervalstyle = 'postgres'; set bytea_output = 'hex'; set extra_float_digits = 3",
        )
        .await?;
    Ok(client)
}

/// Compares all tables of the source with those of the same name on the target.
pub(super) async fn compare(source: &Config, target: &Config) -> Result<Vec<TableComparison>, DemoError> {
    let (source, target) = tokio::try_join!(connect(source), connect(target))?;
    let tables = source
        .query(
            "select format('%I.%I', n.nspname, c.relname), string_agg(quote_ident(a.attname), ', ' order by a.attnum)
             from pg_class c join pg_namespace n on n.oid = c.relnamespace
             join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
             where c.relkind = 'r' and n.nspname not in ('pg_catalog', 'information_schema', 'peergate') and n.nspname !~ '^pg_'
             group by n.nspname, c.relname order by n.nspname, c.relname",
            &[],
        )
        .await?;
    let mut comparison = Vec::new();
    for row in tables {
        let (table, columns): (String, String) = (row.get(0), row.get(1));
        let sql = format!(
            "select count(*), coalesce(sum(hashtextextended(row({columns})::text, 0)::numeric), 0)::text from only {table}"
        );
        let exists: bool = target.query_one("select to_regclass($1) is not null", &[&table]).await?.get(0);
        let there = async { if exists { look(&target, &sql).await.map(Some) } else { Ok(None) } };
        let (source, target) = tokio::try_join!(look(&source, &sql), there)?;
        comparison.push(TableComparison { table, source, target });
    }
    Ok(comparison)
}

async fn look(client: &Client, sql: &str) -> Result<Side, DemoError> {
    let row = client.query_one(sql, &[]).await?;
    Ok(Side { rows: row.get(0), checksum: row.get(1) })
}

/// Prints the comparison as a table.
pub(super) fn print(out: &Output, comparison: &[TableComparison]) {
    let width = comparison.iter().map(|table| table.table.chars().count()).max().unwrap_or_default().max(5);
    // The last digits are enough for the eye; what is compared is all of them.
    let tail =
        |side: &Side| side.checksum.chars().skip(side.checksum.chars().count().saturating_sub(10)).collect::<String>();
    out.say(&format!(
        "  {:<width$}  {:>12}  {:>12}  {:>12}  {:>12}",
        "table", "rows: shop", "dwh", "hash: shop", "dwh"
    ));
    for table in comparison {
        let (rows, checksum) = match &table.target {
            Some(side) => (group(side.rows.max(0) as u64), tail(side)),
            None => ("missing".to_owned(), String::new()),
        };
        let line = format!(
            "  {:<width$}  {:>12}  {rows:>12}  {:>12}  {checksum:>12}",
            table.table,
            group(table.source.rows.max(0) as u64),
            tail(&table.source)
        );
        out.mark(&line, table.is_equal());
    }
}

/// Waits until a dropped mirror has left nothing on the two servers; says what is still there after `timeout`.
pub(super) async fn wait_until_clean(
    source: &Config,
    target: &Config,
    timeout: Duration,
) -> Result<Option<String>, DemoError> {
    let (source, target) = tokio::try_join!(connect(source), connect(target))?;
    let deadline = Instant::now() + timeout;
    loop {
        let left = left_behind(&source, &target).await?;
        if left.is_none() || Instant::now() > deadline {
            return Ok(left);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn left_behind(source: &Client, target: &Client) -> Result<Option<String>, DemoError> {
    let mut left = Vec::new();
    let objects = source
        .query("select 'slot ' || slot_name from pg_replication_slots union all select 'publication ' || pubname from pg_publication", &[])
        .await?;
    left.extend(objects.iter().map(|row| row.get::<_, String>(0)));
    let tables = target
        .query(
            "select format('%I.%I', n.nspname, c.relname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
             where n.nspname = 'peergate' and c.relkind = 'r'",
            &[],
        )
        .await?;
    for table in tables.iter().map(|row| row.get::<_, String>(0)) {
        // The schema goes with the last mirror, perhaps just now.
        let count = match target.query_one(&format!("select count(*) from {table}"), &[]).await {
            Ok(row) => row.get::<_, i64>(0),
            Err(error) if error.code() == Some(&tokio_postgres::error::SqlState::UNDEFINED_TABLE) => 0,
            Err(error) => return Err(error.into()),
        };
        if count > 0 {
            left.push(format!("{count} rows in {table} on dwh"));
        }
    }
    Ok((!left.is_empty()).then(|| left.join(", ")))
}
