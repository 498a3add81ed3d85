//! Looks a table up in the source's catalogs while the stream waits: what a RELATION message leaves out.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use catalog::peer::PeerOptions;
use pg::SqlState;

use crate::error::{Error, Problem};
use crate::schema::ddl::{self, Prerequisite};
use crate::schema::introspect::{source_table_by_oid, types};
use crate::schema::storage::Doubt;
use crate::schema::{SourceTable, Types};
use crate::session::PeerSession;

/// Who alters a table for long keeps us from looking at it: then it is tried again.
pub const LOCK_TIMEOUT: &str = "set lock_timeout = '5s'";

/// How long to wait until a transaction that was sent can be seen.
const VISIBLE_PATIENCE: Duration = Duration::from_secs(30);

/// Pause between two looks at whether it can.
const VISIBLE_PAUSE: Duration = Duration::from_millis(5);

/// What the source's catalogs say of a table now.
#[derive(Debug)]
pub struct Look {
    /// The table; `None` if it is gone.
    pub table: Option<SourceTable>,
    /// The types of its columns.
    pub types: Types,
    /// What its columns need, and those that were known do not.
    pub prerequisites: Vec<Prerequisite>,
    /// Its partitions that may have brought rows along or lost some, compared with those that are `doubted_since`.
    pub doubts: Vec<Doubt>,
    /// The files that a partitioned table had when it was last known.
    pub doubted_since: BTreeMap<u32, u32>,
    /// When it was looked at, or a moment later.
    pub taken: Instant,
}

impl Look {
    /// What there is to say of a table whose columns are of known types.
    pub fn new(table: Option<SourceTable>) -> Look {
        Look {
            table,
            types: Types::new(),
            prerequisites: Vec::new(),
            doubts: Vec::new(),
            doubted_since: BTreeMap::new(),
            taken: Instant::now(),
        }
    }
}

/// A session for looking, opened when it is first needed.
pub struct Looker {
    peer: String,
    options: PeerOptions,
    session: Option<PeerSession>,
}

impl Looker {
    /// Will look on this peer.
    pub fn new(peer: &str, options: &PeerOptions) -> Looker {
        Looker { peer: peer.to_owned(), options: options.clone(), session: None }
    }

    async fn session(&mut self) -> Result<&PeerSession, Error> {
        if self.session.is_none() {
            let session = PeerSession::open(&self.peer, &self.options).await?;
            session.run(LOCK_TIMEOUT).await?;
            self.session = Some(session);
        }
        Ok(self.session.as_ref().expect("opened above"))
    }

    /// Looks at the table that is known as `known`, and was described in transaction `xid`.
    ///
    /// # Errors
    /// [`Error`] as the server's SQLSTATE says.
    pub async fn look(&mut self, known: &SourceTable, xid: Option<u32>) -> Result<Look, Error> {
        let session = self.session().await?;
        if let Some(xid) = xid {
            wait_until_visible(session, xid).await?;
        }
        let table = source_table_by_oid(session, known.oid).await.map_err(|e| session.error(&e))?;
        match table {
            Some(table) => complete(session, known, table).await,
            None => Ok(Look::new(None)),
        }
    }
}

/// Waits until others see what a transaction has done: it is sent as soon as its commit is on disk, which may be a moment earlier, or
/// much earlier when it waits for a synchronous standby.
async fn wait_until_visible(session: &PeerSession, xid: u32) -> Result<(), Error> {
    let query = "select exists (select from pg_catalog.pg_snapshot_xip(pg_catalog.pg_current_snapshot()) x
                                where x::text::numeric % 4294967296 = $1::int8)";
    let begun = Instant::now();
    while session.client.query_one(query, &[&i64::from(xid)]).await.map_err(|e| session.error(&e))?.get(0) {
        if begun.elapsed() > VISIBLE_PATIENCE {
            let message = format!("transaction {xid} of peer \"{}\" is committed and not yet visible", session.peer);
            let problem = Problem::new(SqlState::OBJECT_IN_USE, message);
            return Err(Error::Transient(problem.detail("It probably waits for a synchronous standby.")));
        }
        tokio::time::sleep(VISIBLE_PAUSE).await;
    }
    Ok(())
}

/// Adds what the columns need that are not as they were known.
///
/// # Errors
/// [`Error`] as the server's SQLSTATE says.
pub async fn complete(session: &PeerSession, known: &SourceTable, table: SourceTable) -> Result<Look, Error> {
    let before: HashSet<_> = known.columns.iter().map(|c| (c.number, c.type_oid, &c.default)).collect();
    let mut look = Look::new(None);
    if table.columns.iter().any(|c| !before.contains(&(c.number, c.type_oid, &c.default))) {
        let oids: Vec<u32> = table.columns.iter().map(|c| c.type_oid).collect();
        look.types = types(&session.client, &oids, session.version).await.map_err(|e| session.error(&e))?;
        look.prerequisites = ddl::prerequisites(&session.client, &[&table]).await.map_err(|e| session.error(&e))?;
    }
    look.table = Some(table);
    Ok(look)
}
