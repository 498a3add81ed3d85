//! Makes in the catalog what a peer's tables need, in one transaction: whoever reads sees all of a refresh or nothing.

use std::collections::{BTreeMap, BTreeSet};

use pg::name::{quote_ident, quote_literal};
use tokio_postgres::{Client, Transaction};

use crate::connect::Connector;

use super::mapping::{Kind, Local, Object, added_labels, changes, in_schemas, local_schema, objects};
use super::remote::{COLLATION, Remote};
use super::{Failure, GatewayAddress, Outcome, TOKEN_ROLE, token_hash};

/// What a refresh is for.
pub(super) struct Target<'a> {
    pub(super) peer_id: i64,
    pub(super) updatable: bool,
    /// `None`: all that there is goes away.
    pub(super) gateway: Option<&'a GatewayAddress>,
    /// Only these schemas are looked at; `None`: all.
    pub(super) only: Option<Vec<String>>,
}

type Present = BTreeMap<(String, Kind, String), String>;

/// Brings the catalog in step with `remote`.
///
/// # Errors
/// [`Failure`]; then nothing is changed.
pub(super) async fn apply(connector: &Connector, target: &Target<'_>, remote: &Remote) -> Result<Outcome, Failure> {
    let (mut client, _) = connector.connect().await?;
    if target.gateway.is_some() {
        have_wrapper(&client).await?;
    }
    let local = read_local(&client).await?;
    let transaction = client.transaction().await?;
    let result = Applying { transaction: &transaction, target, warnings: Vec::new(), schemas: BTreeMap::new() };
    let outcome = result.run(remote, &local).await?;
    transaction.commit().await?;
    Ok(outcome)
}

/// Sees to the extension, which is made once in a catalog.
async fn have_wrapper(client: &Client) -> Result<(), Failure> {
    let sql = "select exists (select from pg_extension where extname = 'postgres_fdw'),
                      exists (select from pg_available_extensions where name = 'postgres_fdw')";
    let row = client.query_one(sql, &[]).await?;
    let (there, available): (bool, bool) = (row.get(0), row.get(1));
    if there {
        return Ok(());
    }
    if !available {
        return Err(Failure::new(
            "58P01",
            "extension \"postgres_fdw\" is not available on the catalog's server",
            Some("Install it there: it comes with PostgreSQL's contrib modules."),
        ));
    }
    let create = "create extension if not exists postgres_fdw with schema peergate_public";
    if let Err(error) = client.batch_execute(create).await {
        // Another process may have made it at the same moment.
        let row = client.query_one(sql, &[]).await?;
        if !row.get::<_, bool>(0) {
            let failure = Failure::from(error);
            let hint = "A superuser of the catalog can run CREATE EXTENSION postgres_fdw there.";
            return Err(Failure { hint: Some(hint.to_owned()), ..failure });
        }
    }
    Ok(())
}

async fn read_local(client: &Client) -> Result<Local, Failure> {
    let mut local = Local::default();
    let builtin =
        "select typname::text from pg_catalog.pg_type where typnamespace = 'pg_catalog'::regnamespace and oid < 16384";
    local.builtin = client.query(builtin, &[]).await?.iter().map(|row| row.get(0)).collect();
    let collations = "select collname::text from pg_catalog.pg_collation where collnamespace = 'pg_catalog'::regnamespace
                      and collencoding in (-1, (select encoding from pg_catalog.pg_database where datname = current_database()))";
    local.collations = client.query(collations, &[]).await?.iter().map(|row| row.get(0)).collect();
    let extensions = "
        select e.extname::text, t.typname::text, quote_ident(n.nspname) || '.' || quote_ident(t.typname)
        from pg_catalog.pg_depend d join pg_catalog.pg_extension e on e.oid = d.refobjid
        join pg_catalog.pg_type t on t.oid = d.objid join pg_catalog.pg_namespace n on n.oid = t.typnamespace
        where d.classid = 'pg_catalog.pg_type'::regclass and d.refclassid = 'pg_catalog.pg_extension'::regclass and d.deptype = 'e'";
    for row in client.query(extensions, &[]).await? {
        local.extension_types.insert((row.get(0), row.get(1)), row.get(2));
    }
    Ok(local)
}

struct Applying<'a> {
    transaction: &'a Transaction<'a>,
    target: &'a Target<'a>,
    warnings: Vec<String>,
    /// Schemas of the peer, and those of the catalog that stand for them.
    schemas: BTreeMap<String, String>,
}

impl Applying<'_> {
    async fn run(mut self, remote: &Remote, local: &Local) -> Result<Outcome, Failure> {
        let (tx, peer_id) = (self.transaction, self.target.peer_id);
        // A reader's lock, or a transaction that is left open, must not hold us up for long, nor others behind us.
        tx.batch_execute("set local lock_timeout = '3s'").await?;
        // The peer first, as for whoever drops it; then the run, so that two that do the same take turns.
        let peer = "select name, peergate.server_of(id) from peergate.peers where id = $1 for key share";
        let Some(row) = tx.query_opt(peer, &[&peer_id]).await? else {
            return Ok(Outcome { off: true, tables: 0, warnings: Vec::new() });
        };
        let (name, server): (String, String) = (row.get(0), row.get(1));
        tx.execute("select from peergate.peer_import_runs where peer_id = $1 for update", &[&peer_id]).await?;
        let session = tx
            .query_one(
                "select quote_ident(r.rolname), (select rolsuper from pg_roles where rolname = current_user), r.rolsuper
                 from pg_namespace n join pg_roles r on r.oid = n.nspowner where n.nspname = 'peergate'",
                &[],
            )
            .await?;
        let (owner, super_session, super_owner): (String, bool, bool) =
            (session.get(0), session.get(1), session.get(2));
        if super_session {
            // A token is of no use elsewhere, but it has no business in a log either.
            tx.batch_execute("set local log_statement = none; set local log_min_duration_statement = -1").await?;
            if !super_owner && self.target.gateway.is_some() {
                tx.batch_execute(&format!("grant usage on foreign data wrapper postgres_fdw to {owner}")).await?;
            }
        }
        tx.batch_execute(&format!(
            "set local role {owner}; set local client_min_messages = error; set local search_path = pg_catalog"
        ))
        .await?;
        let objects = objects(remote, local, &server);
        self.have_schemas(&name, &objects).await?;
        if let Some(gateway) = self.target.gateway {
            let same = tx.query_one(COLLATION, &[]).await?.get::<_, String>(0) == remote.collation;
            if !same {
                self.warnings.push(format!(
                    "the peer's default collation ({}) is not the catalog's: text may come in the peer's order where ORDER BY is sent to it",
                    remote.collation
                ));
            }
            self.have_server(&server, &name, gateway, same).await?;
        }
        self.have_objects(&objects).await?;
        self.drop_empty_schemas().await?;
        if self.target.gateway.is_none() {
            self.try_it(&format!("drop server if exists {} cascade", quote_ident(&server)), "the foreign server")
                .await?;
        }
        tx.execute("select peergate.sync_peer_grants($1)", &[&peer_id]).await?;
        let tables: i64 = tx
            .query_one("select count(*) from peergate.peer_objects where peer_id = $1 and kind = 'table'", &[&peer_id])
            .await?
            .get(0);
        Ok(Outcome { off: false, tables: i32::try_from(tables).unwrap_or(i32::MAX), warnings: self.warnings })
    }

    /// Runs a statement that may fail, and notes a failure.
    async fn try_it(&mut self, sql: &str, about: &str) -> Result<bool, Failure> {
        let tx = self.transaction;
        tx.batch_execute("savepoint one").await?;
        match tx.batch_execute(sql).await {
            Ok(()) => {
                tx.batch_execute("release savepoint one").await?;
                Ok(true)
            }
            Err(error) => {
                tx.batch_execute("rollback to savepoint one; release savepoint one").await?;
                let failure = Failure::from(error);
                self.warnings.push(format!("{about}: {}", failure.message));
                Ok(false)
            }
        }
    }

    /// Sees to the schemas: renamed with the peer, and made where they are missing.
    async fn have_schemas(&mut self, peer: &str, objects: &[Object]) -> Result<(), Failure> {
        let (tx, peer_id) = (self.transaction, self.target.peer_id);
        for row in tx
            .query("select remote_schema, local_schema from peergate.peer_schemas where peer_id = $1", &[&peer_id])
            .await?
        {
            let (remote_schema, mut local): (String, String) = (row.get(0), row.get(1));
            let wanted = local_schema(peer, &remote_schema);
            if local != wanted {
                let rename = format!("alter schema {} rename to {}", quote_ident(&local), quote_ident(&wanted));
                if self.try_it(&rename, &format!("schema \"{local}\"")).await? {
                    let noted =
                        "update peergate.peer_schemas set local_schema = $3 where peer_id = $1 and remote_schema = $2";
                    tx.execute(noted, &[&peer_id, &remote_schema, &wanted]).await?;
                    local = wanted;
                }
            }
            self.schemas.insert(remote_schema, local);
        }
        let needed: BTreeSet<&str> = objects.iter().map(|object| object.remote_schema.as_str()).collect();
        for remote_schema in needed {
            if self.schemas.contains_key(remote_schema) {
                continue;
            }
            let local = local_schema(peer, remote_schema);
            let create = format!("create schema {}", quote_ident(&local));
            if self.try_it(&create, &format!("schema \"{local}\"")).await? {
                let note =
                    "insert into peergate.peer_schemas (peer_id, remote_schema, local_schema) values ($1, $2, $3)";
                tx.execute(note, &[&peer_id, &remote_schema, &local]).await?;
                let comment = format!("Foreign tables: schema {remote_schema} of peer {peer}.");
                tx.batch_execute(&format!("comment on schema {} is {}", quote_ident(&local), quote_literal(&comment)))
                    .await?;
                self.schemas.insert(remote_schema.to_owned(), local);
            }
        }
        Ok(())
    }

    /// Sees to the foreign server and its token, which is made anew each day.
    async fn have_server(&self, server: &str, peer: &str, gateway: &GatewayAddress, same: bool) -> Result<(), Failure> {
        let (tx, peer_id) = (self.transaction, self.target.peer_id);
        let version: i32 = tx.query_one("select current_setting('server_version_num')::int", &[]).await?.get(0);
        let port = gateway.port.to_string();
        let flag = |value: bool| if value { "true" } else { "false" };
        let mut options = vec![
            ("host", gateway.host.as_str()),
            ("port", port.as_str()),
            ("dbname", peer),
            ("gssencmode", "disable"),
            ("connect_timeout", "10"),
            ("fetch_size", "1000"),
            ("updatable", flag(self.target.updatable)),
            // An estimate of the peer's may choose its sort order for a merge: only where it sorts as the catalog does.
            ("use_remote_estimate", flag(same)),
        ];
        if version >= 140_000 {
            options.push(("async_capable", "true"));
        }
        let there: Option<Vec<String>> = tx
            .query_opt("select coalesce(srvoptions, '{}') from pg_foreign_server where srvname = $1", &[&server])
            .await?
            .map(|row| row.get(0));
        let list = |word: &dyn Fn(&str) -> &'static str| -> String {
            let each = options
                .iter()
                .map(|(name, value)| format!("{}{name} {}", word(name), quote_literal(value).trim_start()));
            each.collect::<Vec<_>>().join(", ")
        };
        match &there {
            None => {
                let create = format!(
                    "create server {} foreign data wrapper postgres_fdw options ({})",
                    quote_ident(server),
                    list(&|_| "")
                );
                tx.batch_execute(&create).await?;
            }
            Some(there) => {
                let same = options.iter().all(|(name, value)| there.contains(&format!("{name}={value}")));
                if !same {
                    let has = |name: &str| there.iter().any(|option| option.starts_with(&format!("{name}=")));
                    let word = |name: &str| if has(name) { "set " } else { "add " };
                    tx.batch_execute(&format!("alter server {} options ({})", quote_ident(server), list(&word)))
                        .await?;
                }
            }
        }
        let fresh = tx
            .query_one(
                "select coalesce(r.token_made_at > now() - interval '1 day', false)
                        and exists (select from pg_user_mappings m where m.srvname = $2 and m.umuser = 0)
                 from peergate.peer_import_runs r where r.peer_id = $1",
                &[&peer_id, &server],
            )
            .await?
            .get::<_, bool>(0);
        if !fresh {
            let token: String = tx
                .query_one("select replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', '')", &[])
                .await?
                .get(0);
            let note = "update peergate.peer_import_runs set token_hash_before = token_hash, token_hash = $2, token_made_at = now()
                        where peer_id = $1";
            tx.execute(note, &[&peer_id, &token_hash(&token)]).await?;
            tx.batch_execute(&format!(
                "drop user mapping if exists for public server {server}; create user mapping for public server {server} options (user '{TOKEN_ROLE}', password '{token}')",
                server = quote_ident(server),
            ))
            .await?;
        }
        Ok(())
    }

    async fn have_objects(&mut self, wanted: &[Object]) -> Result<(), Failure> {
        let mut present = self.present().await?;
        let wanted: Vec<Object> =
            wanted.iter().filter(|object| self.schemas.contains_key(&object.remote_schema)).cloned().collect();
        self.add_labels(&wanted, &mut present).await?;
        let mut changes = changes(&wanted, &present);
        if self.target.only.is_some() {
            // Types that only the tables of other schemas need.
            changes.drop.retain(|(_, kind, _)| *kind == Kind::Table);
        }
        let mut kept: BTreeSet<(String, Kind, String)> = BTreeSet::new();
        for key in &changes.drop {
            let (remote_schema, kind, name) = key;
            let local = format!("{}.{}", quote_ident(&self.schemas[remote_schema]), quote_ident(name));
            let drop = match kind {
                Kind::Table => format!("drop foreign table if exists {local}"),
                Kind::Type => format!("drop type if exists {local}"),
            };
            if self.try_it(&drop, &format!("{} {local}", kind.as_str())).await? {
                self.forget(key).await?;
            } else {
                kept.insert(key.clone());
            }
        }
        let (again, new): (Vec<Object>, Vec<Object>) = changes
            .make
            .into_iter()
            .partition(|object| kept.contains(&(object.remote_schema.clone(), object.kind, object.name.clone())));
        self.make_all(&new).await?;
        for object in again.iter().filter(|object| object.kind == Kind::Table) {
            let key = (object.remote_schema.clone(), object.kind, object.name.clone());
            self.change_columns(object, &present[&key]).await?;
        }
        Ok(())
    }

    /// What was made before and is still there.
    async fn present(&self) -> Result<Present, Failure> {
        let sql = "
            select o.remote_schema, o.kind, o.name, o.definition
            from peergate.peer_objects o join peergate.peer_schemas s using (peer_id, remote_schema)
            where o.peer_id = $1 and ($2::text[] is null or o.remote_schema = any ($2) or o.kind = 'type')
              and case o.kind
                  when 'table' then exists (select from pg_class c join pg_namespace n on n.oid = c.relnamespace
                                            where n.nspname = s.local_schema and c.relname = o.name and c.relkind = 'f')
                  else exists (select from pg_type t join pg_namespace n on n.oid = t.typnamespace
                               where n.nspname = s.local_schema and t.typname = o.name) end";
        let rows = self.transaction.query(sql, &[&self.target.peer_id, &self.target.only]).await?;
        Ok(rows
            .iter()
            .map(|row| {
                let kind = if row.get::<_, &str>(1) == "table" { Kind::Table } else { Kind::Type };
                ((row.get(0), kind, row.get(2)), row.get(3))
            })
            .collect())
    }

    /// An enum that only gains labels is not made anew: views may use it.
    async fn add_labels(&mut self, wanted: &[Object], present: &mut Present) -> Result<(), Failure> {
        for object in wanted.iter().filter(|object| !object.labels.is_empty()) {
            let key = (object.remote_schema.clone(), object.kind, object.name.clone());
            if present.get(&key).is_none_or(|definition| *definition == object.definition) {
                continue;
            }
            let local = &self.schemas[&object.remote_schema];
            let sql = "select array(select l.enumlabel::text from pg_enum l where l.enumtypid = t.oid order by l.enumsortorder)
                       from pg_type t join pg_namespace n on n.oid = t.typnamespace where n.nspname = $1 and t.typname = $2";
            let before: Vec<String> = self.transaction.query_one(sql, &[local, &object.name]).await?.get(0);
            let Some(added) = added_labels(&before, &object.labels) else { continue };
            let name = format!("{}.{}", quote_ident(local), quote_ident(&object.name));
            let mut statements = String::new();
            for (label, next) in added {
                let place = next.map(|next| format!(" before {}", quote_literal(next))).unwrap_or_default();
                statements.push_str(&format!("alter type {name} add value {}{place};", quote_literal(label)));
            }
            if self.try_it(&statements, &format!("type {name}")).await? {
                self.note(object).await?;
                present.insert(key, object.definition.clone());
            }
        }
        Ok(())
    }

    /// Makes objects: at once if that goes well, else one by one, so that one that cannot be made is the only one.
    async fn make_all(&mut self, objects: &[Object]) -> Result<(), Failure> {
        if objects.is_empty() {
            return Ok(());
        }
        let all: Vec<String> = objects.iter().map(|object| in_schemas(&object.definition, &self.schemas)).collect();
        let before = self.warnings.len();
        if self.try_it(&all.join(";"), "all at once").await? {
            for object in objects {
                self.note(object).await?;
            }
            return Ok(());
        }
        self.warnings.truncate(before);
        for (object, sql) in objects.iter().zip(&all) {
            let about = format!("{} \"{}\".\"{}\"", object.kind.as_str(), object.remote_schema, object.name);
            if self.try_it(sql, &about).await? {
                self.note(object).await?;
            }
        }
        Ok(())
    }

    /// A table that others depend on gets and loses columns where it stands.
    async fn change_columns(&mut self, object: &Object, before: &str) -> Result<(), Failure> {
        let local = &self.schemas[&object.remote_schema];
        let sql = "select a.attname::text from pg_attribute a join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
                   where n.nspname = $1 and c.relname = $2 and a.attnum > 0 and not a.attisdropped";
        let there: Vec<String> =
            self.transaction.query(sql, &[local, &object.name]).await?.iter().map(|row| row.get(0)).collect();
        let table = format!("{}.{}", quote_ident(local), quote_ident(&object.name));
        let added =
            object.columns.iter().filter(|(name, _)| !there.contains(name)).map(|(_, sql)| format!("add column {sql}"));
        let dropped = there
            .iter()
            .filter(|name| !object.columns.iter().any(|(wanted, _)| wanted == *name))
            .map(|name| format!("drop column {}", quote_ident(name)));
        let parts: Vec<String> = added.chain(dropped).map(|part| in_schemas(&part, &self.schemas)).collect();
        let done = parts.is_empty()
            || self
                .try_it(&format!("alter foreign table {table} {}", parts.join(", ")), &format!("table {table}"))
                .await?;
        if done && object.keeps_columns_of(before) {
            // That it could not be made anew does not matter then.
            self.warnings.retain(|warning| !warning.starts_with(&format!("table {table}: ")));
            self.note(object).await?;
        }
        Ok(())
    }

    async fn note(&self, object: &Object) -> Result<(), Failure> {
        let sql = "insert into peergate.peer_objects (peer_id, remote_schema, name, kind, definition) values ($1, $2, $3, $4, $5)
                   on conflict (peer_id, remote_schema, kind, name) do update set definition = excluded.definition";
        let (kind, peer_id) = (object.kind.as_str(), self.target.peer_id);
        self.transaction
            .execute(sql, &[&peer_id, &object.remote_schema, &object.name, &kind, &object.definition])
            .await?;
        Ok(())
    }

    async fn forget(&self, (remote_schema, kind, name): &(String, Kind, String)) -> Result<(), Failure> {
        let sql =
            "delete from peergate.peer_objects where peer_id = $1 and remote_schema = $2 and kind = $3 and name = $4";
        self.transaction.execute(sql, &[&self.target.peer_id, remote_schema, &kind.as_str(), name]).await?;
        Ok(())
    }

    async fn drop_empty_schemas(&mut self) -> Result<(), Failure> {
        let sql = "select s.remote_schema, s.local_schema from peergate.peer_schemas s join pg_namespace n on n.nspname = s.local_schema
                   where s.peer_id = $1 and not exists (select from pg_class c where c.relnamespace = n.oid)
                     and not exists (select from pg_type t where t.typnamespace = n.oid)
                     and not exists (select from pg_proc f where f.pronamespace = n.oid)";
        for row in self.transaction.query(sql, &[&self.target.peer_id]).await? {
            let (remote_schema, local): (String, String) = (row.get(0), row.get(1));
            if self.try_it(&format!("drop schema {}", quote_ident(&local)), &format!("schema \"{local}\"")).await? {
                let forget = "delete from peergate.peer_schemas where peer_id = $1 and remote_schema = $2";
                self.transaction.execute(forget, &[&self.target.peer_id, &remote_schema]).await?;
            }
        }
        Ok(())
    }
}
