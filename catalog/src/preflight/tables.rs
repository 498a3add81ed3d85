//! What the tables of the peer's database are like, for a source.

use pg::name::quote_ident;
use tokio_postgres::Client;

use super::server::Server;
use super::{Check, Uses};

/// How many names a check tells.
const NAMES_MAX: i64 = 5;

/// A question about tables: each row of its query is a name that has the matter.
struct Question {
    name: &'static str,
    query: &'static str,
    fine: &'static str,
    matter: &'static str,
    hint: String,
}

/// Ordinary and partitioned tables of the database that a mirror could take: `t`, of namespace `n`.
const TABLES: &str = "from pg_catalog.pg_class t join pg_catalog.pg_namespace n on n.oid = t.relnamespace
    where t.relkind in ('r', 'p') and t.relpersistence = 'p' and not t.relispartition
      and n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'peergate')";

/// Asks about the tables. A peer that is a target only is asked for what matters there.
pub(super) async fn check(
    client: &Client,
    server: &Server,
    uses: Uses,
    checks: &mut Vec<Check>,
) -> Result<(), tokio_postgres::Error> {
    let role = quote_ident(&server.role);
    let deferrable = Question {
        name: "deferrable keys",
        query: "and exists (select from pg_catalog.pg_constraint c where c.conrelid = t.oid and c.contype in ('p', 'u', 'x') and c.condeferrable)",
        fine: "no table has one",
        matter: "have deferrable keys: a deferrable primary key identifies no rows on a source, and on a target none is enforced while replicating",
        hint: "ALTER TABLE … DROP CONSTRAINT …, then add it again NOT DEFERRABLE.".to_owned(),
    };
    let of_source = [
        Question {
            name: "replica identity",
            query: "and (t.relreplident = 'n' or t.relreplident = 'd'
                         and not exists (select from pg_catalog.pg_index i where i.indrelid = t.oid and i.indisprimary and i.indimmediate))",
            fine: "every table has one",
            matter: "have neither primary key nor replica identity: only INSERT and TRUNCATE are mirrored, and the publication makes UPDATE and DELETE fail",
            hint: "ALTER TABLE … ADD PRIMARY KEY (…), or ALTER TABLE … REPLICA IDENTITY USING INDEX …".to_owned(),
        },
        Question {
            name: "identity without key",
            query: "and t.relreplident = 'f' and not exists (select from pg_catalog.pg_index i where i.indrelid = t.oid and i.indisprimary)",
            fine: "no table has REPLICA IDENTITY FULL and no primary key",
            matter: "have REPLICA IDENTITY FULL and no primary key",
            hint: "ALTER TABLE … ADD PRIMARY KEY (…), so that rows can be told apart.".to_owned(),
        },
        Question {
            name: "table privileges",
            query: "and not (pg_catalog.has_schema_privilege(n.oid, 'usage') and pg_catalog.has_table_privilege(t.oid, 'select'))",
            fine: "every table can be read",
            matter: "cannot be read",
            hint: format!("GRANT USAGE ON SCHEMA … TO {role}; GRANT SELECT ON … TO {role}"),
        },
        Question {
            name: "table owners",
            query: "and not pg_catalog.pg_has_role(t.relowner, 'usage')",
            fine: "every table can be published",
            matter: "belong to roles that this one is no member of, and cannot be published",
            hint: format!("GRANT <owner> TO {role}"),
        },
    ];
    let asked = of_source.into_iter().filter(|_| uses.may_be_source()).chain([deferrable]);
    for question in asked {
        let query = format!(
            "select count(*), pg_catalog.string_agg(name, ', ' order by name) filter (where n <= {NAMES_MAX})
             from (select pg_catalog.format('%I.%I', n.nspname, t.relname) as name, row_number() over (order by n.nspname, t.relname) as n
                   {TABLES} {}) x",
            question.query
        );
        let row = client.query_one(&query, &[]).await?;
        let (count, names): (i64, Option<String>) = (row.get(0), row.get(1));
        checks.push(if count == 0 {
            Check::ok(question.name, question.fine)
        } else {
            let names = names.unwrap_or_default();
            let more = if count > NAMES_MAX { ", …" } else { "" };
            let detail =
                format!("{count} {} {}: {names}{more}", if count == 1 { "table" } else { "tables" }, question.matter);
            Check::warning(question.name, detail).hint(question.hint)
        });
    }
    if uses.may_be_source() {
        checks.push(not_replicated(client).await?);
    }
    Ok(())
}

/// What logical replication leaves out: unlogged tables and large objects.
async fn not_replicated(client: &Client) -> Result<Check, tokio_postgres::Error> {
    let query = "select (select count(*) from pg_catalog.pg_class where relkind = 'r' and relpersistence = 'u'),
                        (select count(*) from pg_catalog.pg_largeobject_metadata)";
    let row = client.query_one(query, &[]).await?;
    let (unlogged, large): (i64, i64) = (row.get(0), row.get(1));
    Ok(if unlogged + large == 0 {
        Check::ok("not replicated", "no unlogged tables, no large objects")
    } else {
        Check::warning("not replicated", format!("unlogged tables: {unlogged}, large objects: {large}"))
            .hint("ALTER TABLE … SET LOGGED; large objects are not replicated by PostgreSQL.")
    })
}
