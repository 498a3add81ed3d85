//! Mirrors: what was asked for, and what the engine reports.

mod definition;
pub mod query;
mod report;
mod rounds;
mod tables;
mod wishes;

use pg::Lsn;
use tokio_postgres::Row;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

pub use self::definition::{
    Bookkeeping, ColumnChoice, Ddl, Mirror, MirrorOptions, Mode, OnError, SelectedTable, Selection,
};
pub use self::report::{Applied, Failure, Status};
pub use self::rounds::{PartitionRow, RoundEnd, RoundTask};
pub use self::tables::{MirrorTable, RenamedTable, TableRow, TableStatus};
pub use self::wishes::{TableTask, Wishes};
use crate::{Catalog, Error};

/// How often a statement is run that meets a deadlock each time.
const DEADLOCKS_MAX: u32 = 5;

fn lsn(row: &Row, column: usize) -> Option<Lsn> {
    row.get::<_, Option<&str>>(column).and_then(|t| t.parse().ok())
}

impl Catalog {
    /// Runs a statement that is a transaction of its own. If it meets another transaction that waits for it in turn, it is run again, as nothing
    /// of it was done.
    async fn execute(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<u64, Error> {
        let client = self.client().await?;
        for _ in 1..DEADLOCKS_MAX {
            match client.execute(statement, parameters).await {
                Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => {}
                result => return Ok(result?),
            }
        }
        Ok(client.execute(statement, parameters).await?)
    }
}
