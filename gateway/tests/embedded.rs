//! What the embedded catalog promises about its directory, its role and its password.

use std::fs;
use std::path::{Path, PathBuf};

use gateway::config::Secret;
use gateway::embedded::{DataDir, EmbeddedCatalog, PasswordPlace};
use tokio_postgres::{Config, NoTls};

struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("peergate-embedded-{:016x}", rand::random::<u64>())))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

async fn start(place: &Path, password: Option<&str>) -> (DataDir, EmbeddedCatalog) {
    let directory = DataDir::lock(place).unwrap();
    let password = password.map(Secret::new);
    let catalog = EmbeddedCatalog::start(&directory, password.as_ref()).await.unwrap();
    (directory, catalog)
}

async fn ask(config: &Config, sql: &str) -> Result<String, tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    client.query_one(sql, &[]).await.map(|row| row.get(0))
}

#[tokio::test]
async fn first_start_makes_role_database_and_password_and_the_second_finds_them() {
    let place = Place::new();
    let (directory, catalog) = start(&place.0, None).await;
    assert_eq!(*catalog.password_place(), PasswordPlace::File(place.0.join("password")));
    let described = "select concat_ws(' ', current_user, current_database(), (select rolsuper from pg_roles where rolname = user), current_setting('wal_level'))";
    assert_eq!(ask(catalog.config(), described).await.unwrap(), "peergate peergate t logical");
    assert!(ask(catalog.config().clone().password("wrong"), "select user::text").await.is_err());
    let password = catalog.config().get_password().unwrap().to_vec();
    catalog.stop().await;
    drop(directory);

    let (_directory, catalog) = start(&place.0, None).await;
    assert_eq!(catalog.config().get_password().unwrap(), password);
    assert_eq!(ask(catalog.config(), "select user::text").await.unwrap(), "peergate");
    catalog.stop().await;
}

#[tokio::test]
async fn password_given_at_a_later_start_replaces_the_old_one() {
    let place = Place::new();
    let (directory, catalog) = start(&place.0, None).await;
    catalog.stop().await;
    drop(directory);

    let (_directory, catalog) = start(&place.0, Some("it's new")).await;
    assert_eq!(*catalog.password_place(), PasswordPlace::Environment);
    assert!(!place.0.join("password").exists(), "a password that is not the password any more is not left");
    assert_eq!(ask(catalog.config().clone().password("it's new"), "select user::text").await.unwrap(), "peergate");
    catalog.stop().await;
}
