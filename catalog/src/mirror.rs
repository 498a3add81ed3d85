//! Mirrors: what was asked for, and what the engine reports.

mod definition;
pub mod query;
mod report;
mod rounds;
mod tables;
mod wishes;

use pg::Lsn;
use tokio_postgres::Row;
use tokio_postgres::types::ToSql;

pub use self::definition::{
    Bookkeeping, ColumnChoice, Ddl, Mirror, MirrorOptions, Mode, OnError, SelectedTable, Selection,
};
pub use self::report::{Applied, Failure, Status};
pub use self::rounds::{PartitionRow, RoundEnd, RoundTask};
pub use self::tables::{MirrorTable, RenamedTable, TableRow, TableStatus};
pub use self::wishes::{TableTask, Wishes};
use crate::{Catalog, Error};

fn lsn(row: &Row, column: usize) -> Option<Lsn> {
    row.get::<_, Option<&str>>(column).and_then(|t| t.parse().ok())
}

impl Catalog {
    async fn execute(&self, statement: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<u64, Error> {
        Ok(self.client().await?.execute(statement, parameters).await?)
    }
}
