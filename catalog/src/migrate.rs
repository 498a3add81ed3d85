//! Applies the files of `migrations/`, each once and in order.

use pg::name::quote_literal;
use sha2::{Digest, Sha256};
use tokio_postgres::Client;

use crate::{Error, roles};

/// Held while migrating, so that two processes that start at once take turns. The number is `peergate` in ASCII.
const LOCK: i64 = 0x7065_6572_6761_7465;

/// The files, in order. A test compares this list with the folder.
const MIGRATIONS: &[(&str, &str)] = &[
    ("0001_schema", include_str!("../../migrations/0001_schema.sql")),
    ("0002_settings", include_str!("../../migrations/0002_settings.sql")),
    ("0003_peers", include_str!("../../migrations/0003_peers.sql")),
    ("0004_mirrors", include_str!("../../migrations/0004_mirrors.sql")),
    ("0005_statements", include_str!("../../migrations/0005_statements.sql")),
    ("0006_peer_privileges", include_str!("../../migrations/0006_peer_privileges.sql")),
    ("0007_mirror_trust", include_str!("../../migrations/0007_mirror_trust.sql")),
    ("0008_table_states", include_str!("../../migrations/0008_table_states.sql")),
    ("0009_alter_mirror", include_str!("../../migrations/0009_alter_mirror.sql")),
    ("0010_slot_health", include_str!("../../migrations/0010_slot_health.sql")),
    ("0011_execute", include_str!("../../migrations/0011_execute.sql")),
    ("0012_foreign_tables", include_str!("../../migrations/0012_foreign_tables.sql")),
    ("0013_peer_changes", include_str!("../../migrations/0013_peer_changes.sql")),
    ("0014_validate_and_roles", include_str!("../../migrations/0014_validate_and_roles.sql")),
    ("0015_memory", include_str!("../../migrations/0015_memory.sql")),
    ("0016_schema_changes", include_str!("../../migrations/0016_schema_changes.sql")),
    ("0017_refresh_schema", include_str!("../../migrations/0017_refresh_schema.sql")),
    ("0018_tasks", include_str!("../../migrations/0018_tasks.sql")),
    ("0019_alerts", include_str!("../../migrations/0019_alerts.sql")),
    ("0020_row_filters", include_str!("../../migrations/0020_row_filters.sql")),
    ("0021_verify", include_str!("../../migrations/0021_verify.sql")),
    ("0022_explain", include_str!("../../migrations/0022_explain.sql")),
    ("0023_query_mirrors", include_str!("../../migrations/0023_query_mirrors.sql")),
    ("0024_bookkeeping", include_str!("../../migrations/0024_bookkeeping.sql")),
    ("0025_peerdb_options", include_str!("../../migrations/0025_peerdb_options.sql")),
];

/// What must be there before the first file: the schema, and the record of what was applied.
const BOOTSTRAP: &str = "
    create schema if not exists peergate;
    create table if not exists peergate.schema_migrations (
        name       text primary key,
        sha256     text not null,
        applied_at timestamptz not null default now()
    );
    comment on table  peergate.schema_migrations            is 'The migrations that were applied. Written by: peergate serve.';
    comment on column peergate.schema_migrations.name       is 'Name of the file, without .sql.';
    comment on column peergate.schema_migrations.sha256     is 'SHA-256 of its text; another text is refused.';
    comment on column peergate.schema_migrations.applied_at is 'When it was applied.';
";

/// Brings the catalog's schema up to date. Any number of processes may call this at once.
///
/// # Errors
/// [`Error::MigrationChanged`] if a file differs from what was applied, [`Error::CatalogNewer`] if the catalog has files that this
/// binary does not know, [`Error::Migration`] if one fails; it then left nothing behind.
pub(crate) async fn migrate(client: &mut Client) -> Result<(), Error> {
    client.execute("select pg_advisory_lock($1)", &[&LOCK]).await?;
    let result = match apply(client, MIGRATIONS).await {
        Ok(()) => roles::provide(client).await.map_err(Error::from),
        error => error,
    };
    client.execute("select pg_advisory_unlock($1)", &[&LOCK]).await?;
    result
}

async fn apply(client: &mut Client, migrations: &[(&str, &str)]) -> Result<(), Error> {
    // Notices such as "already exists, skipping" would only alarm.
    client.batch_execute("set client_min_messages = warning").await?;
    let exists = client.query_one("select to_regclass('peergate.schema_migrations') is not null", &[]).await?;
    if !exists.get::<_, bool>(0) {
        client.batch_execute(BOOTSTRAP).await?;
    }
    let rows = client.query("select name, sha256 from peergate.schema_migrations order by name", &[]).await?;
    for row in &rows {
        let (name, hash): (&str, &str) = (row.get(0), row.get(1));
        match migrations.iter().find(|(known, _)| *known == name) {
            None => return Err(Error::CatalogNewer(name.to_owned())),
            Some((_, text)) if hash_of(text) != hash => return Err(Error::MigrationChanged(name.to_owned())),
            Some(_) => {}
        }
    }
    for (name, text) in migrations.iter().skip(rows.len()) {
        let transaction = client.transaction().await?;
        let record = format!(
            "insert into peergate.schema_migrations (name, sha256) values ({}, {})",
            quote_literal(name),
            quote_literal(&hash_of(text))
        );
        let applied = async {
            transaction.batch_execute(text).await?;
            transaction.batch_execute(&record).await
        };
        applied.await.map_err(|source| Error::Migration { name: (*name).to_owned(), source })?;
        transaction.commit().await?;
        tracing::info!(migration = name, "migration applied");
    }
    Ok(())
}

fn hash_of(text: &str) -> String {
    Sha256::digest(text).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_the_folder_is_embedded_in_order() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../migrations");
        let mut files: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|f| f.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        files.sort();
        assert_eq!(files, MIGRATIONS.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    }
}
