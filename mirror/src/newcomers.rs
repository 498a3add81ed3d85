//! Finds tables that were made on the source after the mirror, and that it takes: with `ddl = apply`, a mirror of everything or of schemas
//! stays one.

use catalog::event::Event;
use catalog::mirror::{Ddl, SelectedTable, Selection, Wishes};

use crate::error::Error;
use crate::session::PeerSession;
use crate::source::preflight::list_selected;
use crate::wishes;
use crate::worker::Context;

/// Looks at the source's list of tables now and then, and at the catalog only when that has changed.
#[derive(Default)]
pub struct Newcomers {
    source: Option<PeerSession>,
    last: Option<Vec<SelectedTable>>,
}

impl Newcomers {
    /// Adds tables that are new to the mirror; returns whether there were any. What cannot be looked at now is looked at the next time.
    pub async fn take_in(&mut self, context: &Context) -> bool {
        match self.try_to(context).await {
            Ok(taken) => taken,
            Err(error) => {
                tracing::debug!(error = %error, "new tables not looked for");
                *self = Newcomers::default();
                false
            }
        }
    }

    async fn try_to(&mut self, context: &Context) -> Result<bool, Error> {
        let mirror = &context.mirror;
        if mirror.options.ddl != Ddl::Apply || matches!(mirror.selection, Selection::Tables(_)) {
            return Ok(false);
        }
        let source = match self.source.take() {
            Some(source) => source,
            None => PeerSession::open(&mirror.source_name, &mirror.source).await?,
        };
        let listed = list_selected(&source, &mirror.selection).await?;
        let source = self.source.insert(source);
        if self.last.as_ref() == Some(&listed) {
            return Ok(false);
        }
        // What is to be left out may have changed since the attempt began.
        let Some(Wishes { selection, .. }) = context.catalog.wishes(mirror.id).await? else {
            return Err(Error::Stopped);
        };
        let known = context.catalog.mirror_tables(mirror.id).await?;
        let added = wishes::listed_difference(source, &selection, &known).await?.added;
        for table in &added {
            let message = format!("table \"{}\" is new on the source", table.source);
            context.event(&Event::info("table", message)).await?;
        }
        wishes::add(context, &added).await?;
        self.last = Some(listed);
        Ok(!added.is_empty())
    }
}
