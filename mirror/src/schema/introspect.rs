//! Reads what tables look like from a server's system catalogs.
//!
//! Sessions have an empty search path here, so that every name that the server prints is complete. Types without modifiers are printed
//! with -1 and not with NULL: a cast to `character` or `bit` means one character or bit, to `bpchar` or `"bit"` any number.

use std::collections::HashMap;

use pg::TableName;
use tokio_postgres::{Client, Row};

use super::{FIRST_USER_OID, Leaf, SourceTable, TargetColumn, TargetTable, TypeInfo, Types};
use crate::schema::wire::{TypeNode, wire_form};
use crate::session::PeerSession;

type SqlResult<T> = Result<T, tokio_postgres::Error>;

/// Returns the tables that a mirror of everything takes: ordinary and partitioned tables, without partitions, system schemas,
/// temporary and unlogged tables, extensions' own tables and Peergate's own schema.
pub async fn list_tables(client: &Client) -> SqlResult<Vec<TableName>> {
    let query = "
        select n.nspname::text, c.relname::text
        from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where c.relkind in ('r', 'p') and not c.relispartition and c.relpersistence = 'p'
          and n.nspname not in ('pg_catalog', 'information_schema', 'peergate') and n.nspname not like 'pg\\_toast%'
          and not exists (select from pg_catalog.pg_depend d
                          where d.classid = 'pg_catalog.pg_class'::regclass and d.objid = c.oid and d.deptype = 'e')
        order by 1, 2";
    Ok(client
        .query(query, &[])
        .await?
        .iter()
        .map(|r| TableName::new(r.get::<_, &str>(0), r.get::<_, &str>(1)))
        .collect())
}

/// The text of an expression that describes the source table with the oid `{oid}` as JSON, in the form of [`SourceTable`]; NULL if there
/// is none, or it is no table.
///
/// One statement, so that all of it is of one moment. Marked as identity is the index that the rows' identity depends on: the replica
/// identity's, and with FULL the primary key, by which whole old rows can be found just as well. A value that rows older than a column
/// have is kept with the rows: a partitioned table has it in its partitions.
pub const DESCRIBE: &str = "
    (select pg_catalog.jsonb_build_object(
        'oid', c.oid::int8, 'name', pg_catalog.jsonb_build_array(n.nspname, c.relname), 'partitioned', c.relkind = 'p',
        'last_number', c.relnatts,
        'root', (select r.relid::oid::int8 from pg_catalog.pg_partition_ancestors(c.oid) r where c.relispartition and r.relid <> c.oid
                 order by (select count(*) from pg_catalog.pg_partition_ancestors(r.relid)) limit 1),
        'files', (select coalesce(pg_catalog.jsonb_object_agg(l.oid::text, l.relfilenode::int8), '{}')
                  from pg_catalog.pg_class l
                  where l.oid = c.oid and c.relkind = 'r'
                     or l.oid in (select t.relid from pg_catalog.pg_partition_tree(c.oid) t where t.isleaf and c.relkind = 'p')),
        'storage', pg_catalog.jsonb_build_object('seen', pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::int8)
            || coalesce((select pg_catalog.jsonb_build_object(
                'bounds', coalesce(pg_catalog.jsonb_object_agg(t.relid::oid::text, b.bound) filter (where t.isleaf and b.bound is not null), '{}'),
                'has_default', coalesce(bool_or(pg_catalog.pg_get_expr(l.relpartbound, l.oid) = 'DEFAULT'), false))
            from pg_catalog.pg_partition_tree(c.oid) t join pg_catalog.pg_class l on l.oid = t.relid,
                lateral (select pg_catalog.pg_get_partition_constraintdef(t.relid) as bound) b
            having c.relkind = 'p'), '{}'),
        'identity', coalesce(
            (select pg_catalog.jsonb_build_object('Key', i.columns) from indexes i where i.identity order by i.indisprimary desc, i.relname limit 1),
            case when c.relreplident = 'f' then '\"WholeRow\"' else '\"InsertsOnly\"' end::jsonb),
        'columns', (
            select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
                'number', a.attnum, 'name', a.attname, 'type_oid', a.atttypid::int8, 'type_modifier', a.atttypmod,
                'type_sql', pg_catalog.format_type(a.atttypid, a.atttypmod),
                'collation', case when a.attcollation <> y.typcollation
                    then (select pg_catalog.quote_ident(m.nspname) || '.' || pg_catalog.quote_ident(o.collname)
                          from pg_catalog.pg_collation o join pg_catalog.pg_namespace m on m.oid = o.collnamespace
                          where o.oid = a.attcollation) end,
                'not_null', a.attnotnull,
                'default', case when a.attgenerated = '' then pg_catalog.pg_get_expr(d.adbin, d.adrelid) end,
                'generated', case when a.attgenerated <> '' then pg_catalog.pg_get_expr(d.adbin, d.adrelid) end,
                'identity', nullif(a.attidentity, ''),
                'missing', case when c.relkind = 'p'
                    then (select (p.attmissingval::text::text[])[1] from pg_catalog.pg_partition_tree(c.oid) t
                          join pg_catalog.pg_attribute p on p.attrelid = t.relid and p.attname = a.attname and p.atthasmissing
                          where t.isleaf limit 1)
                    when a.atthasmissing then (a.attmissingval::text::text[])[1] end
                ) order by a.attnum), '[]')
            from pg_catalog.pg_attribute a
            join pg_catalog.pg_type y on y.oid = a.atttypid
            left join pg_catalog.pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
            where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped),
        'indexes', (
            select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
                'name', i.relname, 'primary', i.indisprimary, 'unique', i.indisunique, 'constraint', i.constraint_definition,
                -- The statement that the server prints names the table; what follows is the same for every table.
                'definition', pg_catalog.substr(i.definition, pg_catalog.strpos(i.definition, i.using_method) + 1),
                'identity', i.identity) order by i.indisprimary desc, i.relname), '[]')
            from indexes i),
        'constraints', (
            select coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object(
                'name', k.conname, 'definition', pg_catalog.pg_get_constraintdef(k.oid),
                'references', (select pg_catalog.jsonb_build_array(f.oid::int8, pg_catalog.quote_ident(m.nspname) || '.' || pg_catalog.quote_ident(f.relname))
                               from pg_catalog.pg_class f join pg_catalog.pg_namespace m on m.oid = f.relnamespace where f.oid = k.confrelid)
                ) order by k.conname), '[]')
            from pg_catalog.pg_constraint k where k.conrelid = c.oid and k.contype in ('c', 'f') and k.conparentid = 0))
     from pg_catalog.pg_class c
     join pg_catalog.pg_namespace n on n.oid = c.relnamespace
     where c.oid = {oid} and c.relkind in ('r', 'p'))";

/// What [`DESCRIBE`] reads the indexes from; to be put before it, as `WITH` list.
pub const DESCRIBE_INDEXES: &str = "
    indexes as (
        select ic.relname, i.indisprimary, i.indisunique, ' USING ' || am.amname || ' (' as using_method,
               pg_catalog.pg_get_indexdef(i.indexrelid) as definition,
               case when k.oid is not null then pg_catalog.pg_get_constraintdef(k.oid) end as constraint_definition,
               i.indimmediate and i.indisunique and i.indpred is null and i.indexprs is null
                   and case c.relreplident when 'd' then i.indisprimary when 'f' then i.indisprimary when 'i' then i.indisreplident else false end
                   as identity,
               array(select a.attname::text from pg_catalog.unnest(i.indkey[0:i.indnkeyatts - 1]) with ordinality u (attnum, n)
                     join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.attnum order by u.n) as columns
        from pg_catalog.pg_index i
        join pg_catalog.pg_class c on c.oid = i.indrelid
        join pg_catalog.pg_class ic on ic.oid = i.indexrelid
        join pg_catalog.pg_am am on am.oid = ic.relam
        left join pg_catalog.pg_constraint k on k.conindid = i.indexrelid and k.conrelid = i.indrelid and k.contype in ('p', 'u', 'x')
        where i.indrelid = {oid} and i.indisvalid)";

/// Returns a query that describes the source table whose oid the SQL expression `oid` gives, see [`DESCRIBE`].
pub fn describe_query(oid: &str) -> String {
    format!("with {} select {}", DESCRIBE_INDEXES.replace("{oid}", oid), DESCRIBE.replace("{oid}", oid))
}

/// Describes the source table of this name; `None` if there is none, or it is no table.
pub async fn source_table(source: &PeerSession, name: &TableName) -> SqlResult<Option<SourceTable>> {
    let find = "select c.oid from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p')";
    match source.client.query_opt(find, &[&name.schema, &name.name]).await? {
        Some(row) => source_table_by_oid(source, row.get(0)).await,
        None => Ok(None),
    }
}

/// Describes the source table of this oid; `None` if there is none.
pub async fn source_table_by_oid(source: &PeerSession, oid: u32) -> SqlResult<Option<SourceTable>> {
    // Planning it takes longer than running it, and there may be ten thousand tables.
    let prepare = || async { source.client.prepare(&describe_query("$1::oid")).await };
    let statement = source.describe.get_or_try_init(prepare).await?;
    let row = source.client.query_one(statement, &[&oid]).await?;
    let described: Option<tokio_postgres::types::Json<SourceTable>> = row.try_get(0)?;
    Ok(described.map(|json| json.0))
}

/// Returns, for each of these tables that is there, a text that is another one when its columns, defaults, indexes, constraints,
/// partitions or files have changed; and the number of a transaction before which all had ended then, 64 bits wide.
pub async fn fingerprints(client: &Client, oids: &[u32]) -> SqlResult<(HashMap<u32, String>, i64)> {
    let query = "
        select f.relation, pg_catalog.concat_ws(' ', count(*), sum(pg_catalog.hashtext(f.version)::int8)),
               pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::text::int8
        from (
            select oid as relation, ctid::text || ' ' || xmin::text as version from pg_catalog.pg_class where oid = any ($1)
            union all select attrelid, ctid::text || ' ' || xmin::text from pg_catalog.pg_attribute where attrelid = any ($1)
            union all select adrelid, ctid::text || ' ' || xmin::text from pg_catalog.pg_attrdef where adrelid = any ($1)
            union all select indrelid, ctid::text || ' ' || xmin::text from pg_catalog.pg_index where indrelid = any ($1)
            union all select conrelid, ctid::text || ' ' || xmin::text from pg_catalog.pg_constraint where conrelid = any ($1)
            union all select p.oid, l.oid::text || ' ' || l.relfilenode::text
                from pg_catalog.pg_class p, lateral pg_catalog.pg_partition_tree(p.oid) t join pg_catalog.pg_class l on l.oid = t.relid
                where p.oid = any ($1) and p.relkind = 'p'
        ) f group by f.relation";
    let rows = client.query(query, &[&oids]).await?;
    let ended = rows.first().map_or(0, |row| row.get(2));
    Ok((rows.iter().map(|r| (r.get(0), r.get(1))).collect(), ended))
}

/// Returns the relations that hold a table's rows, with their sizes now: itself, or its partitions at every level.
pub async fn leaves(client: &Client, oid: u32) -> SqlResult<Vec<Leaf>> {
    let query = "
        select c.oid, n.nspname::text, c.relname::text,
               pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::int8, pg_catalog.pg_table_size(c.oid)
        from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        where c.relkind = 'r'
          and (c.oid = $1 or c.oid in (select t.relid from pg_catalog.pg_partition_tree($1::oid::regclass) t where t.isleaf))
        order by 4 desc, c.oid";
    let leaf = |row: &Row| Leaf {
        oid: row.get(0),
        name: TableName::new(row.get::<_, &str>(1), row.get::<_, &str>(2)),
        blocks: row.get(3),
        bytes: row.get(4),
    };
    Ok(client.query(query, &[&oid]).await?.iter().map(leaf).collect())
}

/// Returns all built-in types and those given, by oid.
pub async fn types(client: &Client, oids: &[u32], server_version: u32) -> SqlResult<Types> {
    let query = "
        with recursive node as (
            select t.oid from pg_catalog.pg_type t where t.oid < $1 and t.typtype in ('b', 'r', 'm') or t.oid = any ($2)
            union
            select u.part from node n join pg_catalog.pg_type t on t.oid = n.oid,
                lateral pg_catalog.unnest(array[t.typbasetype, case when t.typcategory = 'A' then t.typelem end]
                    || array(select r.rngsubtype from pg_catalog.pg_range r where r.rngtypid = t.oid)
                    || array(select r.rngtypid from pg_catalog.pg_range r
                             where t.typtype = 'm' and pg_catalog.to_jsonb(r) ->> 'rngmultitypid' = t.oid::text)
                    || array(select a.atttypid from pg_catalog.pg_attribute a
                             where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped)) u (part)
            where u.part <> 0
        )
        select t.oid, pg_catalog.format_type(t.oid, -1), t.typtype::text, t.typsend <> 0, t.typreceive <> 0,
               t.oid < $1 and (t.typname like 'reg%' or t.typname in ('int2vector', 'oidvector', 'tsquery')), t.typcategory = 'A' and t.typelem <> 0,
               case when t.typtype = 'd' then array[t.typbasetype] when t.typcategory = 'A' and t.typelem <> 0 then array[t.typelem]
                    when t.typtype = 'r' then array(select r.rngsubtype from pg_catalog.pg_range r where r.rngtypid = t.oid)
                    when t.typtype = 'm' then array(select r.rngtypid from pg_catalog.pg_range r
                                                    where pg_catalog.to_jsonb(r) ->> 'rngmultitypid' = t.oid::text)
                    when t.typtype = 'c' then array(select a.atttypid from pg_catalog.pg_attribute a where a.attrelid = t.typrelid
                                                    and a.attnum > 0 and not a.attisdropped order by a.attnum)
                    else array[]::oid[] end,
               (select e.extname || ' ' || e.extversion || ' ' || t.typname
                from pg_catalog.pg_depend d join pg_catalog.pg_extension e on e.oid = d.refobjid
                where d.classid = 'pg_catalog.pg_type'::regclass and d.objid = t.oid and d.deptype = 'e'
                  and d.refclassid = 'pg_catalog.pg_extension'::regclass)
        from node n join pg_catalog.pg_type t on t.oid = n.oid";
    let rows = client.query(query, &[&FIRST_USER_OID, &oids]).await?;
    let node = |row: &Row| TypeNode {
        kind: row.get::<_, &str>(2).chars().next().unwrap_or_default(),
        binary: row.get::<_, bool>(3) && row.get::<_, bool>(4),
        local: row.get(5),
        array: row.get(6),
        parts: row.get(7),
        extension: row.get(8),
    };
    let nodes: HashMap<u32, TypeNode> = rows.iter().map(|row| (row.get(0), node(row))).collect();
    let info = |row: &Row| {
        let oid = row.get(0);
        let wire = wire_form(oid, &nodes, server_version);
        // A domain is sent as its base.
        let mut sender = oid;
        while let Some(TypeNode { kind: 'd', parts, .. }) = nodes.get(&sender) {
            sender = parts.first().copied().unwrap_or_default();
        }
        let sends = rows.iter().any(|r| r.get::<_, u32>(0) == sender && r.get::<_, bool>(3));
        (oid, TypeInfo { oid, sql: row.get(1), builtin: oid < FIRST_USER_OID, sends, wire })
    };
    Ok(rows.iter().map(info).collect())
}

/// Describes the target tables of these names that exist.
pub async fn target_tables(
    client: &Client,
    names: &[&TableName],
    server_version: u32,
) -> SqlResult<HashMap<TableName, TargetTable>> {
    let mut tables = HashMap::new();
    for name in names {
        if let Some(table) = target_table(client, name).await? {
            tables.insert((*name).clone(), table);
        }
    }
    let columns = |t: &TargetTable| t.columns.iter().map(|c| c.type_oid).collect::<Vec<_>>();
    let mut oids: Vec<u32> = tables.values().flat_map(columns).collect();
    oids.sort_unstable();
    oids.dedup();
    let types = types(client, &oids, server_version).await?;
    for column in tables.values_mut().flat_map(|t| &mut t.columns) {
        column.wire = types.get(&column.type_oid).and_then(|t| t.wire.clone());
    }
    Ok(tables)
}

async fn target_table(client: &Client, name: &TableName) -> SqlResult<Option<TargetTable>> {
    let find = "select c.oid, c.relkind = 'p', k.has, k.cascades
                from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace,
                    lateral (select count(*) > 0 as has, coalesce(bool_or(f.confdeltype = 'c' or f.confupdtype = 'c'), false) as cascades
                             from pg_catalog.pg_constraint f where f.conrelid = c.oid and f.contype = 'f') k
                where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p')";
    let Some(row) = client.query_opt(find, &[&name.schema, &name.name]).await? else { return Ok(None) };
    let (oid, partitioned): (u32, bool) = (row.get(0), row.get(1));
    let (has_foreign_keys, cascades): (bool, bool) = (row.get(2), row.get(3));
    let query = "
        select distinct n.nspname::text
        from pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid
        join pg_catalog.pg_type b on b.oid in (t.oid, t.typbasetype) join pg_catalog.pg_namespace n on n.oid = b.typnamespace
        where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped and n.nspname <> 'pg_catalog'";
    let type_schemas = client.query(query, &[&oid]).await?.iter().map(|r| r.get(0)).collect();
    let query = "
        select a.attname::text, a.atttypid, pg_catalog.format_type(a.atttypid, -1), a.attgenerated <> '', a.attidentity = 'a',
               a.attnotnull and not a.atthasdef and a.attidentity = '',
               b.typtype = 'e' or b.oid = 'varchar'::regtype
                   or exists (select from pg_catalog.pg_opclass o join pg_catalog.pg_am m on m.oid = o.opcmethod
                              where o.opcintype = b.oid and o.opcdefault and m.amname = 'btree')
        from pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid
        join pg_catalog.pg_type b on b.oid = case t.typtype when 'd' then t.typbasetype else t.oid end
        where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped order by a.attnum";
    let column = |row: &Row| TargetColumn {
        name: row.get(0),
        type_oid: row.get(1),
        type_sql: row.get(2),
        generated: row.get(3),
        identity_always: row.get(4),
        required: row.get(5),
        has_equality: row.get(6),
        // Looked up for all tables at once.
        wire: None,
    };
    let columns = client.query(query, &[&oid]).await?.iter().map(column).collect();
    let query = "
        select i.indimmediate and i.indpred is null and i.indexprs is null and not i.indisexclusion,
               array(select a.attname::text from pg_catalog.unnest(i.indkey[0:i.indnkeyatts - 1]) with ordinality u (attnum, n)
                     join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = u.attnum order by u.n)
        from pg_catalog.pg_index i where i.indrelid = $1 and (i.indisunique or i.indisexclusion) and i.indisvalid";
    let uniques = client.query(query, &[&oid]).await?;
    let (plain, odd): (Vec<&Row>, Vec<&Row>) = uniques.iter().partition(|r| r.get(0));
    let alone = if partitioned { name.quoted() } else { format!("only {}", name.quoted()) };
    let query = format!("select exists (select from {alone})");
    let has_rows = client.query_one(&query, &[]).await?.get(0);
    Ok(Some(TargetTable {
        bookkeeping: catalog::mirror::Bookkeeping::default(),
        oid,
        name: name.clone(),
        partitioned,
        type_schemas,
        columns,
        unique_keys: plain.iter().map(|r| r.get(1)).collect(),
        other_unique: false,
        odd_unique: !odd.is_empty(),
        has_rows,
        has_foreign_keys,
        cascades,
    }))
}
