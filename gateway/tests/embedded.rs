//! What the embedded catalog promises about its directory, its roles and their passwords.

use std::fs;
use std::os::unix::fs::PermissionsExt;
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

/// The user's way in.
fn user(catalog: &EmbeddedCatalog, password: &str) -> Config {
    let mut config = catalog.config().clone();
    config.user("peergate").password(password);
    config
}

fn file(place: &Path) -> String {
    fs::read_to_string(place.join("password")).unwrap().trim_end().to_owned()
}

#[tokio::test]
async fn first_start_makes_roles_database_and_passwords_and_the_second_finds_them() {
    let place = Place::new();
    let (directory, catalog) = start(&place.0, None).await;
    assert_eq!(*catalog.password_place(), PasswordPlace::File(place.0.join("password")));
    let described = "select concat_ws(' ', current_user, current_database(), (select rolsuper from pg_roles where rolname = user),
        (select pg_get_userbyid(datdba) from pg_database where datname = current_database()), current_setting('wal_level'))";
    let password = file(&place.0);
    assert_eq!(ask(&user(&catalog, &password), described).await.unwrap(), "peergate peergate t peergate logical");
    assert_eq!(ask(catalog.config(), described).await.unwrap(), "peergate_internal peergate t peergate logical");
    for refused in [&user(&catalog, "wrong"), catalog.config().clone().password("wrong")] {
        assert!(ask(refused, "select user::text").await.is_err());
    }
    assert_eq!(fs::metadata(place.0.join("internal-password")).unwrap().permissions().mode() & 0o777, 0o600);
    catalog.stop().await;
    drop(directory);

    let (_directory, catalog) = start(&place.0, None).await;
    assert_eq!(file(&place.0), password);
    assert_eq!(*catalog.password_place(), PasswordPlace::File(place.0.join("password")));
    assert_eq!(ask(&user(&catalog, &password), "select user::text").await.unwrap(), "peergate");
    catalog.stop().await;
}

#[tokio::test]
async fn password_given_at_a_later_start_replaces_the_old_one() {
    let place = Place::new();
    let (directory, catalog) = start(&place.0, None).await;
    catalog.stop().await;
    drop(directory);

    let (directory, catalog) = start(&place.0, Some("it's new")).await;
    assert_eq!(*catalog.password_place(), PasswordPlace::Environment);
    assert!(!place.0.join("password").exists(), "a password that is not the password any more is not left");
    assert_eq!(ask(&user(&catalog, "it's new"), "select user::text").await.unwrap(), "peergate");
    catalog.stop().await;
    drop(directory);

    // Not given any more, it stays what it is, and no other is made up.
    let (_directory, catalog) = start(&place.0, None).await;
    assert_eq!(*catalog.password_place(), PasswordPlace::Elsewhere);
    assert!(!place.0.join("password").exists());
    assert_eq!(ask(&user(&catalog, "it's new"), "select user::text").await.unwrap(), "peergate");
    catalog.stop().await;
}

#[tokio::test]
async fn password_changed_in_sql_stays_until_another_is_given() {
    let place = Place::new();
    let (directory, catalog) = start(&place.0, None).await;
    let change = "do $$ begin alter role peergate password 'mine'; end $$";
    let (client, connection) = user(&catalog, &file(&place.0)).connect(NoTls).await.unwrap();
    let connection = tokio::spawn(connection);
    client.batch_execute(change).await.unwrap();
    drop(client);
    connection.await.unwrap().unwrap();
    assert_eq!(ask(catalog.config(), "select user::text").await.unwrap(), "peergate_internal");
    catalog.stop().await;
    drop(directory);

    let (directory, catalog) = start(&place.0, None).await;
    assert_eq!(*catalog.password_place(), PasswordPlace::Elsewhere);
    assert_eq!(ask(&user(&catalog, "mine"), "select user::text").await.unwrap(), "peergate");
    assert!(ask(&user(&catalog, &file(&place.0)), "select user::text").await.is_err());
    catalog.stop().await;
    drop(directory);

    let (_directory, catalog) = start(&place.0, Some("given")).await;
    assert_eq!(ask(&user(&catalog, "given"), "select user::text").await.unwrap(), "peergate");
    catalog.stop().await;
}

#[tokio::test]
async fn data_directory_without_the_internal_role_gets_it() {
    let place = Place::new();
    let (directory, catalog) = start(&place.0, None).await;
    let (client, connection) = user(&catalog, &file(&place.0)).connect(NoTls).await.unwrap();
    let connection = tokio::spawn(connection);
    client.batch_execute("drop role peergate_internal").await.unwrap();
    drop(client);
    connection.await.unwrap().unwrap();
    catalog.stop().await;
    drop(directory);
    fs::remove_file(place.0.join("internal-password")).unwrap();

    let (_directory, catalog) = start(&place.0, None).await;
    assert_eq!(ask(catalog.config(), "select user::text").await.unwrap(), "peergate_internal");
    assert_eq!(ask(&user(&catalog, &file(&place.0)), "select user::text").await.unwrap(), "peergate");
    catalog.stop().await;
}
