//! What a statement about a mirror would make of it: it is run, what it has made is read, and all of it is undone.

use pg::TableName;
use tokio_postgres::error::SqlState;

use crate::mirror::{Mirror, MirrorTable};
use crate::{Catalog, Error};

/// The transaction must not wait for that of the client who asks: they would wait for each other.
const LOCK_TIMEOUT: &str = "set local lock_timeout = '1s'; set local client_min_messages = warning";

/// A mirror as a statement would make it.
#[derive(Debug)]
pub struct Rehearsal {
    /// The mirror as it would be.
    pub mirror: Mirror,
    /// It would be new.
    pub is_new: bool,
    /// The tables that it has now.
    pub tables: Vec<MirrorTable>,
    /// Its tables would be compared with those that it is to take.
    pub takes_tables: bool,
    /// Tables among them that would be copied anew.
    pub resyncs: Vec<TableName>,
    /// What else would change, from what to what.
    pub changes: Vec<Change>,
}

/// Something about a mirror that would become something else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// An option, or `name`.
    pub what: String,
    /// What it is; `None`: its default.
    pub from: Option<String>,
    /// What it would be.
    pub to: Option<String>,
}

impl Catalog {
    /// Runs the call of `procedure` that `statement` is, as far as `role` may, and undoes it. `None` if it fails or would have to wait: then
    /// there is nothing to be told of it, and the client's own session has the error.
    ///
    /// # Errors
    /// [`Error`] if the catalog cannot be asked, or a secret of a peer cannot be opened.
    pub async fn rehearse(
        &self,
        role: &str,
        procedure: &str,
        statement: &str,
        mirror: &str,
    ) -> Result<Option<Rehearsal>, Error> {
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        // Or a role that it can become with SET ROLE.
        let allowed = "select exists (select from pg_catalog.pg_roles r, pg_catalog.pg_proc f
                           where f.pronamespace = 'peergate'::regnamespace and f.proname = $2
                               and pg_catalog.pg_has_role($1, r.oid, 'member') and pg_catalog.has_function_privilege(r.oid, f.oid, 'execute')
                               and pg_catalog.has_schema_privilege(r.oid, 'peergate', 'usage'))";
        if !transaction.query_one(allowed, &[&role, &procedure]).await?.get::<_, bool>(0) {
            return Ok(None);
        }
        transaction.batch_execute(LOCK_TIMEOUT).await?;
        let find = "select d.id, d.name, d.options from peergate.mirror_definitions d where d.name = $1";
        let before = transaction.query_opt(find, &[&mirror]).await?;
        match transaction.batch_execute(statement).await {
            Ok(()) => {}
            Err(error) if error.code().is_some_and(|code| *code != SqlState::QUERY_CANCELED) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let id: Option<i64> = match &before {
            Some(row) => Some(row.get(0)),
            None => transaction.query_opt(find, &[&mirror]).await?.map(|row| row.get(0)),
        };
        let Some(id) = id else { return Ok(None) };
        let Some(as_made) = self.read_mirror(&*transaction, id).await? else { return Ok(None) };
        // Tasks of this transaction are no older than it, and those of others are not younger: the mirror's row is locked.
        let tasks = "
            select t.kind, array(select n -> 'schema' #>> '{}' from jsonb_array_elements(t.tables) n),
                   array(select n -> 'name' #>> '{}' from jsonb_array_elements(t.tables) n)
            from peergate.tasks t where t.mirror_id = $1 and t.kind in ('alter_mirror', 'resync_mirror') and t.created_at >= pg_catalog.now()";
        let (mut takes_tables, mut resyncs) = (before.is_none(), Vec::new());
        for row in transaction.query(tasks, &[&id]).await? {
            takes_tables = true;
            if row.get::<_, &str>(0) == "resync_mirror" {
                let (schemas, names): (Vec<String>, Vec<String>) = (row.get(1), row.get(2));
                resyncs.extend(schemas.into_iter().zip(names).map(|(schema, name)| TableName { schema, name }));
            }
        }
        let changes = match &before {
            Some(row) => {
                let mut changes = Vec::new();
                let name: String = row.get(1);
                if name != as_made.name {
                    changes.push(Change { what: "name".to_owned(), from: Some(name), to: Some(as_made.name.clone()) });
                }
                let differing = "
                    select s.name, coalesce(b.before ->> s.name, s.default_value), coalesce(d.options ->> s.name, s.default_value)
                    from peergate.settings s, peergate.mirror_definitions d, (select $2::jsonb as before) b
                    where s.scope = case when d.selection ? 'query' then 'query mirror' else 'mirror' end and d.id = $1 and b.before ->> s.name is distinct from d.options ->> s.name order by s.name";
                let before: serde_json::Value = row.get(2);
                let rows = transaction.query(differing, &[&id, &before]).await?;
                changes.extend(rows.iter().map(|r| Change { what: r.get(0), from: r.get(1), to: r.get(2) }));
                changes
            }
            None => Vec::new(),
        };
        transaction.rollback().await?;
        // As it is without the statement.
        let tables = if before.is_some() { self.mirror_tables(id).await? } else { Vec::new() };
        Ok(Some(Rehearsal { mirror: as_made, is_new: before.is_none(), tables, takes_tables, resyncs, changes }))
    }
}
