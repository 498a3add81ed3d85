//! Events: what happened to mirrors, kept after they are dropped.

use pg::{Lsn, SqlState};

use crate::{Catalog, Error};

/// One row of `peergate.mirror_events`.
#[derive(Clone, Debug)]
pub struct Event {
    /// `info`, `warning` or `error`.
    pub level: &'static str,
    /// What kind of event; the catalog's column comment lists them.
    pub kind: &'static str,
    /// What happened.
    pub message: String,
    /// Where in the source's WAL, if it has a place there.
    pub lsn: Option<Lsn>,
    /// The kind of error, if it is one.
    pub sqlstate: Option<SqlState>,
    /// More about it.
    pub detail: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Event {
    /// Makes an event of level `info`.
    pub fn info(kind: &'static str, message: impl Into<String>) -> Event {
        Event { level: "info", kind, message: message.into(), lsn: None, sqlstate: None, detail: None, hint: None }
    }

    /// Makes an event of level `warning`.
    pub fn warning(kind: &'static str, message: impl Into<String>) -> Event {
        Event { level: "warning", ..Event::info(kind, message) }
    }

    /// Makes an event of level `error`.
    pub fn error(kind: &'static str, message: impl Into<String>) -> Event {
        Event { level: "error", ..Event::info(kind, message) }
    }

    /// Says where in the source's WAL it happened.
    pub fn at(self, lsn: Lsn) -> Event {
        Event { lsn: Some(lsn), ..self }
    }

    /// Says more about it.
    pub fn detail(self, detail: impl Into<String>) -> Event {
        Event { detail: Some(detail.into()), ..self }
    }

    /// Says what to do about it.
    pub fn hint(self, hint: impl Into<String>) -> Event {
        Event { hint: Some(hint.into()), ..self }
    }
}

impl Catalog {
    /// Records an event, and adds its message to the log of the mirror's open tasks.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be reached.
    pub async fn record_event(&self, mirror_id: i64, mirror: &str, node_id: &str, event: &Event) -> Result<(), Error> {
        let statement = "
            with logged as (
                insert into peergate.task_log (task_id, message)
                select id, $5 from peergate.tasks where mirror_id = $1 and state in ('pending', 'running')
            )
            insert into peergate.mirror_events (mirror_id, mirror, level, kind, message, lsn, sqlstate, detail, hint, node_id)
            values ($1, $2, $3, $4, $5, $6::text::pg_lsn, $7, $8, $9, $10)";
        let lsn = event.lsn.map(|l| l.to_string());
        let sqlstate = event.sqlstate.map(|s| s.to_string());
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 10] = [
            &mirror_id,
            &mirror,
            &event.level,
            &event.kind,
            &event.message,
            &lsn,
            &sqlstate,
            &event.detail,
            &event.hint,
            &node_id,
        ];
        self.client().await?.execute(statement, &parameters).await?;
        Ok(())
    }
}
