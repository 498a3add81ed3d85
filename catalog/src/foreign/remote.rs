//! What a peer has: relations, their columns, and the types of those, as its catalogs tell.

use std::collections::HashMap;

use tokio_postgres::{Client, Error};

/// A peer's relations and types.
#[derive(Debug, Default)]
pub(super) struct Remote {
    pub(super) tables: Vec<RemoteTable>,
    pub(super) types: HashMap<u32, RemoteType>,
    /// Its default collation, encoding and provider, to be compared with the catalog's.
    pub(super) collation: String,
}

/// A relation.
#[derive(Debug)]
pub(super) struct RemoteTable {
    pub(super) schema: String,
    pub(super) name: String,
    pub(super) columns: Vec<RemoteColumn>,
}

/// A column, or an attribute of a composite type.
#[derive(Debug, Clone)]
pub(super) struct RemoteColumn {
    pub(super) name: String,
    pub(super) type_id: u32,
    /// The type with its modifier, as `format_type` writes it.
    pub(super) formatted: String,
    /// Schema and name of a collation that is not the type's own.
    pub(super) collation: Option<(String, String)>,
}

/// A type.
#[derive(Debug, Default)]
pub(super) struct RemoteType {
    pub(super) schema: String,
    pub(super) name: String,
    /// `pg_type.typtype`.
    pub(super) kind: u8,
    /// For an array: the element.
    pub(super) element: Option<u32>,
    pub(super) delimiter: String,
    /// For a domain: what it is made of, and that with its modifier.
    pub(super) base: Option<(u32, String)>,
    /// The extension that it belongs to.
    pub(super) extension: Option<String>,
    pub(super) labels: Vec<String>,
    /// For a composite type that is no table's: its attributes.
    pub(super) attributes: Vec<RemoteColumn>,
}

const TABLES: &str = "
    select n.nspname::text, c.relname::text, a.attname::text, a.atttypid, pg_catalog.format_type(a.atttypid, a.atttypmod), cn.nspname::text, co.collname::text
    from pg_catalog.pg_class c
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    left join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    left join pg_catalog.pg_type t on t.oid = a.atttypid
    left join pg_catalog.pg_collation co on co.oid = a.attcollation and a.attcollation <> t.typcollation
    left join pg_catalog.pg_namespace cn on cn.oid = co.collnamespace
    where c.relkind in ('r', 'p', 'v', 'm', 'f') and not c.relispartition
      and n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'peergate', 'peergate_public')
      and ($1::text[] is null or n.nspname = any ($1))
      and pg_catalog.has_schema_privilege(n.oid, 'usage') and pg_catalog.has_any_column_privilege(c.oid, 'select')
    order by 1, 2, a.attnum";

const TYPES: &str = "
    select t.oid, n.nspname::text, t.typname::text, t.typtype, case when t.typlen = -1 and t.typelem <> 0 and t.typcategory = 'A' then t.typelem end,
           coalesce(el.typdelim, t.typdelim)::text, nullif(t.typbasetype, 0), pg_catalog.format_type(t.typbasetype, t.typtypmod),
           (select e.extname::text from pg_catalog.pg_depend d join pg_catalog.pg_extension e on e.oid = d.refobjid
            where d.classid = 'pg_catalog.pg_type'::pg_catalog.regclass and d.objid = t.oid and d.deptype = 'e'
              and d.refclassid = 'pg_catalog.pg_extension'::pg_catalog.regclass limit 1),
           array(select l.enumlabel::text from pg_catalog.pg_enum l where l.enumtypid = t.oid order by l.enumsortorder)
    from pg_catalog.pg_type t
    join pg_catalog.pg_namespace n on n.oid = t.typnamespace
    left join pg_catalog.pg_type el on el.oid = t.typelem";

const ATTRIBUTES: &str = "
    select c.reltype, a.attname::text, a.atttypid, pg_catalog.format_type(a.atttypid, a.atttypmod)
    from pg_catalog.pg_class c join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    where c.relkind = 'c' order by c.oid, a.attnum";

/// Text that is the same on two databases whose default collations sort alike. `datlocprovider` came with PostgreSQL 15.
pub(super) const COLLATION: &str = "
    select concat_ws(' ', d.datcollate, pg_catalog.pg_encoding_to_char(d.encoding), coalesce(to_jsonb(d) ->> 'datlocprovider', 'c'),
                     coalesce(to_jsonb(d) ->> 'datlocale', to_jsonb(d) ->> 'daticulocale'))
    from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()";

/// Reads the catalogs of the session's database; `schemas`: only these.
///
/// # Errors
/// [`Error`] if a statement fails or the session breaks.
pub(super) async fn read(client: &mut Client, schemas: Option<&[String]>) -> Result<Remote, Error> {
    // One view of all of them, and names written in full.
    let transaction = client.build_transaction().isolation_level(tokio_postgres::IsolationLevel::RepeatableRead);
    let transaction = transaction.read_only(true).start().await?;
    transaction.batch_execute("set local search_path = pg_catalog").await?;
    let mut remote = Remote { collation: transaction.query_one(COLLATION, &[]).await?.get(0), ..Remote::default() };
    for row in transaction.query(TABLES, &[&schemas]).await? {
        let (schema, name): (String, String) = (row.get(0), row.get(1));
        if remote.tables.last().is_none_or(|t| (&t.schema, &t.name) != (&schema, &name)) {
            remote.tables.push(RemoteTable { schema, name, columns: Vec::new() });
        }
        if let (Some(name), Some(table)) = (row.get::<_, Option<String>>(2), remote.tables.last_mut()) {
            let collation = row.get::<_, Option<String>>(5).zip(row.get(6));
            table.columns.push(RemoteColumn { name, type_id: row.get(3), formatted: row.get(4), collation });
        }
    }
    for row in transaction.query(TYPES, &[]).await? {
        let kind: i8 = row.get(3);
        let of = RemoteType {
            schema: row.get(1),
            name: row.get(2),
            kind: kind.cast_unsigned(),
            element: row.get(4),
            delimiter: row.get(5),
            base: row.get::<_, Option<u32>>(6).zip(row.get(7)),
            extension: row.get(8),
            labels: row.get(9),
            attributes: Vec::new(),
        };
        remote.types.insert(row.get(0), of);
    }
    for row in transaction.query(ATTRIBUTES, &[]).await? {
        if let Some(composite) = remote.types.get_mut(&row.get::<_, u32>(0)) {
            let attribute =
                RemoteColumn { name: row.get(1), type_id: row.get(2), formatted: row.get(3), collation: None };
            composite.attributes.push(attribute);
        }
    }
    transaction.commit().await?;
    Ok(remote)
}
