//! Where a mirror's changes go.

pub mod alter;
pub mod encode;
pub mod marks;
#[cfg(test)]
pub(crate) mod memory;
pub mod origin;
pub mod postgres;
pub mod progress_row;
pub mod row;
pub mod shapes;
pub mod stage;

use std::future::Future;

use crate::batch::Batch;
use crate::error::Error;
use crate::progress::DurableLsn;

/// Writes batches to one kind of target.
///
/// # Contract
/// * **Order.** Batches come in commit order, one at a time; a sink never reorders them.
/// * **Atomicity.** A batch that ends ([`Batch::end`]) and those before it that did not become visible together, or not at all. They
///   hold whole source transactions, so a reader of the target never sees half of one.
/// * **Durability.** The returned position is durable on the target *and* recorded there, in the same transaction as the rows. Nothing
///   weaker may be returned: it is acknowledged to the source, which then forgets.
/// * **Duplicates.** After an error the sink is dropped and a new one asks the target how far it is; no batch is applied twice, since
///   the record goes with the rows.
/// * **Fencing.** A sink whose epoch is not the newest fails with [`Error::Fenced`] and writes nothing.
/// * **Cancellation.** Dropping the future leaves the target as it was before the batch, once the connection is closed.
pub trait Sink: Send {
    /// Applies a batch; returns how far the target is once the batch ends, `None` while its transaction goes on.
    fn apply(&mut self, batch: &Batch) -> impl Future<Output = Result<Option<DurableLsn>, Error>> + Send;
}
