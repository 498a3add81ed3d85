//! Writes `docs/catalog.md` from the comments in the catalog.

use std::fmt::Write;

use tokio_postgres::Client;

/// Relations that are not part of the contract: the engine's own, and what lies under the public views.
const INTERNAL: &[&str] = &[
    "alert_definitions",
    "alert_runtime",
    "alert_secrets",
    "mirror_definitions",
    "mirror_runtime",
    "mirror_table_runtime",
    "mirror_drops",
    "mirror_leases",
    "peer_import_runs",
    "peer_objects",
    "peer_schemas",
    "peer_secrets",
    "query_partitions",
    "query_rounds",
    "schema_migrations",
];

/// Returns the reference page of the catalog: public relations first, then internal ones, then the settings.
///
/// # Errors
/// [`tokio_postgres::Error`] if the session broke.
pub async fn catalog_markdown(client: &Client) -> Result<String, tokio_postgres::Error> {
    let mut page = String::from(
        "# The catalog\n\nGenerated from the comments in schema `peergate` (`\\d+` shows the same); do not edit. \
         `UPDATE=1 cargo test -p catalog docs` writes it anew.\n",
    );
    let relations = client
        .query(
            "select c.oid, c.relname, case c.relkind when 'v' then 'view' else 'table' end, obj_description(c.oid, 'pg_class')
             from pg_class c where c.relnamespace = 'peergate'::regnamespace and c.relkind in ('r', 'v')
             order by c.relname = any ($1), c.relname",
            &[&INTERNAL],
        )
        .await?;
    let mut internal = false;
    page.push_str("\n## Public relations\n");
    for relation in relations {
        let (oid, name, kind, comment): (u32, String, String, Option<String>) =
            (relation.get(0), relation.get(1), relation.get(2), relation.get(3));
        if !internal && INTERNAL.contains(&name.as_str()) {
            internal = true;
            page.push_str("\n## Internal relations\n\nThey may change in any version.\n");
        }
        let _ = write!(page, "\n### {name} ({kind})\n\n{}\n\n", comment.unwrap_or_default());
        page.push_str("| column | type | meaning |\n| --- | --- | --- |\n");
        let columns = client
            .query(
                "select attname::text, format_type(atttypid, atttypmod), coalesce(col_description(attrelid, attnum), '')
                 from pg_attribute where attrelid = $1 and attnum > 0 and not attisdropped order by attnum",
                &[&oid],
            )
            .await?;
        for column in columns {
            let (name, kind, comment): (String, String, String) = (column.get(0), column.get(1), column.get(2));
            let _ = writeln!(page, "| `{name}` | {kind} | {} |", comment.replace('|', "\\|"));
        }
    }
    page.push_str("\n## Settings\n");
    let scopes = [
        ("peer", "Options of a peer"),
        ("mirror", "Options of a mirror"),
        ("query mirror", "Options of a mirror of a query"),
        ("alert", "Options of an alert"),
        ("webhook", "Options of an alert's channel webhook"),
        ("slack", "Options of an alert's channel slack"),
        ("email", "Options of an alert's channel email"),
        ("notify", "Options of an alert's channel notify"),
    ];
    for (scope, title) in scopes {
        let _ = write!(page, "\n### {title}\n\n| option | type | default | meaning |\n| --- | --- | --- | --- |\n");
        let query = "select name, case when allowed is null then type else array_to_string(allowed, ', ') end,
                            coalesce(default_value, ''), description from peergate.settings where scope = $1 order by name";
        for row in client.query(query, &[&scope]).await? {
            let cells: Vec<String> = (0..4).map(|n| row.get::<_, String>(n).replace('|', "\\|")).collect();
            let _ = writeln!(page, "| `{}` | {} | {} | {} |", cells[0], cells[1], cells[2], cells[3]);
        }
    }
    Ok(page)
}
