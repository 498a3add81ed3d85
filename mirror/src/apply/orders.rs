//! What a running stream can be told: to leave tables out, and to stand still: until others are handed over to it, or both sides are looked at.

use pg::{Lsn, TableName};
use tokio::sync::oneshot;

use super::Apply;
use crate::assemble::Tables;
use crate::error::Error;
use crate::verify::brake;

/// What a running stream can be told.
pub enum Order {
    /// To leave the changes of these tables out from now on.
    Ignore {
        /// The tables.
        tables: Vec<TableName>,
        /// Is told when the target has all that was taken in before: from then on nothing is written to the tables.
        settled: oneshot::Sender<()>,
    },
    /// To take nothing in from the next end of a transaction on, and to say where that is. It goes on when it is released, with the tables
    /// that it gets then, if any. When nobody is left who could do so, its attempt ends with [`Error::Restart`].
    Hold {
        /// Is told the position: all that commits before it was taken in, and nothing after it.
        at: oneshot::Sender<Lsn>,
        /// Releases.
        released: oneshot::Receiver<Option<Tables>>,
    },
    /// To stand still at a position that is known only later, see [`Brake`](brake::Brake).
    Brake(brake::Ask),
}

/// Where a hold is.
pub(super) enum Hold {
    No,
    Asked(oneshot::Sender<Lsn>, oneshot::Receiver<Option<Tables>>),
    Held(oneshot::Receiver<Option<Tables>>),
}

impl Apply {
    pub(super) fn obey(&mut self, order: Order) {
        match order {
            Order::Ignore { tables, settled } => {
                self.assembler.ignore(&tables);
                let open = !self.assembler.open().is_empty();
                if open || self.applying || self.uncommitted > 0 {
                    self.settling.push((self.handed_over + u64::from(open), settled));
                } else {
                    // If nobody waits for it any more, nothing depends on it.
                    let _ = settled.send(());
                }
            }
            Order::Hold { at, released } => self.hold = Hold::Asked(at, released),
            Order::Brake(ask) => self.brake.ask(ask),
        }
    }

    /// Returns where the target is, when nothing that was taken in is still on its way there.
    pub(super) fn written(&self) -> Option<Lsn> {
        let on_its_way = self.applying || self.uncommitted > 0 || !self.assembler.open().is_empty();
        (!on_its_way).then_some(self.applied)
    }

    /// Begins a hold that was asked for, when no transaction is under way.
    pub(super) fn hold_if_asked(&mut self) {
        let (Some(boundary), Hold::Asked(..)) = (self.assembler.boundary(), &self.hold) else { return };
        if let Hold::Asked(at, released) = std::mem::replace(&mut self.hold, Hold::No) {
            // If nobody listens any more, the release fails too.
            let _ = at.send(boundary);
            self.hold = Hold::Held(released);
        }
    }

    pub(super) fn go_on(&mut self, tables: Option<Tables>) {
        self.hold = Hold::No;
        if let Some(tables) = tables {
            self.looking.watch(&tables);
            self.assembler.take_over(tables);
        }
    }
}

/// Waits for the release of a hold; for ever when there is none.
pub(super) async fn released(hold: &mut Hold) -> Result<Option<Tables>, Error> {
    match hold {
        Hold::Held(released) => released.await.map_err(|_| Error::Restart),
        Hold::No | Hold::Asked(..) => std::future::pending().await,
    }
}
