//! Migrations, the comments on what they make, and the page that is made of them.

use std::sync::Arc;

use catalog::cluster::TestCluster;
use catalog::connect::Connector;
use catalog::peer::{COMPOSITE_OPTIONS, PeerOptions, SECRET_OPTIONS};
use catalog::secret::Keyring;
use catalog::{Catalog, Error, docs};
use tokio_postgres::{Client, NoTls};

pub(crate) fn catalog(cluster: &TestCluster) -> Catalog {
    let options = PeerOptions::plain([
        ("host", "127.0.0.1".to_owned()),
        ("port", cluster.port().to_string()),
        ("user", "postgres".to_owned()),
        ("database", "postgres".to_owned()),
    ]);
    let keyring = Arc::new(Keyring::parse(&"5a".repeat(32)).unwrap());
    Catalog::new(Connector::new(&options).unwrap(), keyring).unwrap()
}

async fn migrated() -> (TestCluster, Catalog, Client) {
    let cluster = tokio::task::spawn_blocking(|| TestCluster::start(&[])).await.unwrap().unwrap();
    let catalog = catalog(&cluster);
    catalog.migrate().await.unwrap();
    let (client, connection) = cluster.config("postgres").connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    (cluster, catalog, client)
}

async fn count(client: &Client, query: &str) -> i64 {
    client.query_one(query, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_processes_migrate_at_once_and_again() {
    let cluster = tokio::task::spawn_blocking(|| TestCluster::start(&[])).await.unwrap().unwrap();
    let processes: Vec<_> = (0..8)
        .map(|_| {
            let catalog = catalog(&cluster);
            tokio::spawn(async move { catalog.migrate().await })
        })
        .collect();
    for process in processes {
        process.await.unwrap().unwrap();
    }
    catalog(&cluster).migrate().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_released_file_that_changed_is_refused() {
    let (_cluster, catalog, client) = migrated().await;
    let change = "update peergate.schema_migrations set sha256 = 'other' where name = '0003_peers'";
    client.batch_execute(change).await.unwrap();
    assert!(matches!(catalog.migrate().await, Err(Error::MigrationChanged(name)) if name == "0003_peers"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_catalog_of_a_newer_version_is_refused() {
    let (_cluster, catalog, client) = migrated().await;
    let newer = "insert into peergate.schema_migrations (name, sha256) values ('9999_later', '')";
    client.batch_execute(newer).await.unwrap();
    assert!(matches!(catalog.migrate().await, Err(Error::CatalogNewer(name)) if name == "9999_later"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_relation_and_column_is_commented() {
    let (_cluster, _catalog, client) = migrated().await;
    let relations =
        "select count(*) from pg_class where relnamespace = 'peergate'::regnamespace and relkind in ('r', 'v')
                     and obj_description(oid, 'pg_class') is null";
    assert_eq!(count(&client, relations).await, 0);
    let columns = "select count(*) from pg_attribute a join pg_class c on c.oid = a.attrelid
                   where c.relnamespace = 'peergate'::regnamespace and c.relkind in ('r', 'v') and a.attnum > 0 and not a.attisdropped
                     and col_description(a.attrelid, a.attnum) is null";
    assert_eq!(count(&client, columns).await, 0);
}

/// `UPDATE=1` writes the page anew.
#[tokio::test(flavor = "multi_thread")]
async fn docs_catalog_page_is_current() {
    let (_cluster, _catalog, client) = migrated().await;
    let page = docs::catalog_markdown(&client).await.unwrap();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/catalog.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(path, &page).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(written == page, "docs/catalog.md is stale: UPDATE=1 cargo test -p catalog docs");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_options_that_are_sealed_are_those_that_the_settings_call_secret() {
    let (_cluster, _catalog, client) = migrated().await;
    let query = "select array_agg(name order by name collate \"C\")
                 from (select distinct name from peergate.settings where secret and (scope = 'peer') = $1) s";
    let of_peers: Vec<String> = client.query_one(query, &[&true]).await.unwrap().get(0);
    let mut sealed: Vec<&str> = SECRET_OPTIONS.to_vec();
    sealed.extend(COMPOSITE_OPTIONS);
    sealed.sort_unstable();
    assert_eq!(of_peers, sealed);
    let of_channels: Vec<String> = client.query_one(query, &[&false]).await.unwrap().get(0);
    assert_eq!(of_channels, catalog::alert::channel::SECRET_OPTIONS);
}

#[tokio::test(flavor = "multi_thread")]
async fn ordinary_roles_read_no_secrets_and_call_nothing() {
    let (cluster, _catalog, client) = migrated().await;
    client.batch_execute("create role ordinary login; grant usage on schema peergate to ordinary").await.unwrap();
    let (ordinary, connection) = cluster.config("postgres").user("ordinary").connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    for statement in [
        "select * from peergate.peer_secrets",
        "select * from peergate.mirror_drops",
        "call peergate.create_peer('p', 'postgres', '{\"user\": \"u\"}')",
        "select peergate.peer_document(1)",
    ] {
        let error = ordinary.batch_execute(statement).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42501", "{statement}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_secrets_are_sealed_anew_or_none() {
    let (_cluster, catalog, client) = migrated().await;
    let destination = "host=h hostaddr= port=5432";
    let sealed = catalog.keyring().seal(destination, "geheim").unwrap();
    let options = r#"{"host": "h", "user": "u"}"#;
    let create = format!("call peergate.create_peer('p', 'postgres', '{options}', '{{\"password\": \"{sealed}\"}}')");
    client.batch_execute(&create).await.unwrap();
    catalog.reseal().await.unwrap();
    let row = client.query_one("select peergate.peer_document(id) from peergate.peers", &[]).await.unwrap();
    let peer = PeerOptions::from_document(&row.get(0), catalog.keyring()).unwrap();
    assert_eq!(peer.get("password"), Some("geheim"));
    assert_eq!(
        count(&client, &format!("select count(*) from peergate.peer_secrets where sealed = '{sealed}'")).await,
        0
    );
    // Options that were pointed elsewhere behind the triggers' back make the secret unreadable, here as anywhere.
    let behind =
        "set session_replication_role = replica; update peergate.peers set options = options || '{\"host\": \"evil\"}'";
    client.batch_execute(behind).await.unwrap();
    assert!(matches!(catalog.reseal().await, Err(Error::Secret(_))));
}
