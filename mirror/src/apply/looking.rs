//! How the loop sees what the stream does not tell of the source's tables.

use bytes::Bytes;
use pg::Lsn;
use tokio::sync::mpsc;

use super::Apply;
use crate::assemble::Tables;
use crate::error::Error;
use crate::hindsight::{Hindsight, Watch};
use crate::source::look::Looker;

/// Who looks for it.
pub struct Looking {
    /// Looks at a table that was just described.
    pub looker: Looker,
    /// What was seen by looking now and then.
    pub seen: mpsc::Receiver<Hindsight>,
    /// Tells whoever looks now and then.
    pub watch: mpsc::UnboundedSender<Watch>,
}

impl Looking {
    /// Only looks at tables that are described.
    pub fn at_described(looker: Looker) -> Looking {
        let ((_, seen), (watch, _)) = (mpsc::channel(1), mpsc::unbounded_channel());
        Looking { looker, seen, watch }
    }

    /// Has these tables looked at now and then too.
    pub(super) fn watch(&self, tables: &Tables) {
        for known in tables.known.values() {
            self.tell(Watch(known.plan.source.clone()));
        }
    }

    fn tell(&self, watch: Watch) {
        // Whoever looks has ended if nobody listens, which ends the loop too.
        let _ = self.watch.send(watch);
    }
}

impl Apply {
    /// Takes one message. A table that may have changed is looked up on the source at once: what comes next depends on it.
    pub(super) async fn message(&mut self, start: Lsn, body: Bytes) -> Result<(), Error> {
        self.assembler.message(start, body)?;
        while let Some(relation) = self.assembler.undescribed() {
            let Some(known) = self.assembler.known(relation.oid) else { continue };
            let look = self.looking.looker.look(&known.plan.source, self.assembler.transaction()).await?;
            self.assembler.describe(&relation, look)?;
        }
        Ok(())
    }

    /// Takes up what was seen of the source's tables once everything before that has been gathered.
    pub(super) fn take_up_hindsight(&mut self) -> Result<(), Error> {
        let assembler = &self.assembler;
        let Some(Hindsight { begun, at, looks }) = self.hindsight.take_if(|seen| assembler.has_reached(seen.at)) else {
            return Ok(());
        };
        for look in looks {
            if let Some(oid) = self.assembler.take_up(look, begun, at)? {
                let known = self.assembler.known(oid).map(|known| known.plan.source.clone());
                known.into_iter().for_each(|table| self.looking.tell(Watch(table)));
            }
        }
        Ok(())
    }
}
