//! ALTER PEER and CREATE OR REPLACE PEER through the extended protocol: parameters, secrets that stay in the gateway, who may.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::support::{Gateway, start};

async fn peer(client: &Client, column: &str) -> String {
    let query = format!("select ({column})::text from peers where name = 'shop'");
    client.query_one(&query, &[]).await.unwrap().get::<_, Option<String>>(0).unwrap_or_default()
}

fn code(error: &tokio_postgres::Error) -> &str {
    error.code().unwrap().code()
}

async fn create(gateway: &Gateway, client: &Client) {
    let create = format!("create peer shop from postgres with ({}, password = 'geheim-1')", gateway.peer_options());
    client.batch_execute(&create).await.unwrap();
}

#[tokio::test]
async fn peers_are_changed_with_parameters_and_secrets_stay_in_the_gateway() {
    let gateway = start().await;
    let client = gateway.connect().await;
    create(&gateway, &client).await;
    let alter = "alter peer shop set (application_name = $1, password = $2, connect_timeout = $3)";
    let alter = client.prepare_typed(alter, &[Type::VARCHAR, Type::TEXT, Type::INT4]).await.unwrap();
    assert_eq!((alter.params().len(), alter.columns().len()), (3, 0), "the hidden parameter is not described");
    client.execute(&alter, &[&"app", &"geheim-2", &7_i32]).await.unwrap();
    assert_eq!(peer(&client, "options ->> 'application_name'").await, "app");
    assert_eq!(peer(&client, "generation").await, "2");
    // The same again is no change: whoever runs a script twice disturbs no mirror.
    client.execute(&alter, &[&"app", &"geheim-2", &7_i32]).await.unwrap();
    assert_eq!(peer(&client, "generation").await, "2");
    client.execute(&alter, &[&"app", &"geheim-3", &7_i32]).await.unwrap();
    assert_eq!(peer(&client, "generation").await, "3");
    client.execute("alter peer shop reset (application_name)", &[]).await.unwrap();
    assert_eq!(peer(&client, "options ->> 'application_name'").await, "");
    client.execute("alter peer shop rename to store", &[]).await.unwrap();
    client.execute("alter peer store rename to shop", &[]).await.unwrap();
    client.execute("comment on peer shop is $1", &[&"it's ours"]).await.unwrap();
    assert_eq!(peer(&client, "comment").await, "it's ours");

    // A new place without the secret is refused, and nobody is connected to there.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = i32::from(listener.local_addr().unwrap().port());
    let error = client
        .execute(&client.prepare_typed("alter peer shop set (port = $1)", &[Type::INT4]).await.unwrap(), &[&port])
        .await
        .unwrap_err();
    assert_eq!(code(&error), "22023");
    let accepted = tokio::time::timeout(std::time::Duration::from_millis(100), listener.accept()).await;
    assert!(accepted.is_err());
    let error = client.execute("alter peer shop set (password = $1, host = $2)", &[&None::<String>, &"h"]).await;
    assert_eq!(code(&error.unwrap_err()), "22023");

    let replace = format!("create or replace peer shop from postgres with ({}, password = $1)", gateway.peer_options());
    let replace = client.prepare(&replace).await.unwrap();
    for _ in 0..2 {
        client.execute(&replace, &[&"geheim-4"]).await.unwrap();
    }
    let generation = peer(&client, "generation").await;
    client.execute(&replace, &[&"geheim-5"]).await.unwrap();
    assert_ne!(peer(&client, "generation").await, generation);
    let shown = client.query("show peer shop", &[]).await.unwrap();
    let password = shown.iter().find(|row| row.get::<_, &str>(0) == "password").unwrap();
    assert_eq!((password.get::<_, &str>(1), password.get::<_, &str>(2)), ("********", "sealed"));
    let log = gateway.server_log();
    assert!(log.contains("CALL peergate.alter_peer("), "the log is the right one");
    assert!(!log.contains("geheim"), "{}", log.lines().filter(|l| l.contains("geheim")).collect::<String>());
}

#[tokio::test]
async fn only_owners_change_peers_and_nobody_is_connected_to_for_others() {
    let gateway = start().await;
    let client = gateway.connect().await;
    create(&gateway, &client).await;
    let direct = gateway.connect_directly().await;
    let role = format!("other_{:016x}", rand::random::<u64>());
    let grants = format!(
        "create role {role} login; grant usage on schema peergate to {role}; grant select on all tables in schema peergate to {role};
         grant execute on all routines in schema peergate to {role}"
    );
    direct.batch_execute(&grants).await.unwrap();
    let mut config = gateway.config(gateway.address.port());
    let (other, connection) = config.user(&role).connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    for statement in [
        format!("alter peer shop set (host = '127.0.0.1', port = {port}, password = 'geheim')"),
        format!("create or replace peer shop from postgres with (host = '127.0.0.1', port = {port}, user = 'u')"),
        "alter peer shop reset (password)".to_owned(),
        "alter peer shop rename to mine".to_owned(),
        format!("alter peer shop owner to {role}"),
        "comment on peer shop is 'mine'".to_owned(),
        "drop peer shop".to_owned(),
        format!("grant usage on peer shop to {role}"),
        // Files and variables of the server are read for those only who could read them anyway.
        format!(
            "create peer mine from postgres with (host = '127.0.0.1', port = {port}, user = 'u', password_env = 'HOME')"
        ),
        format!(
            "create peer mine from postgres with (host = '127.0.0.1', port = {port}, user = 'u', password_file = '/etc/hostname')"
        ),
        format!(
            "create peer mine from postgres with (host = '127.0.0.1', port = {port}, user = 'u', passfile = '/etc/hostname')"
        ),
    ] {
        let error = other.batch_execute(&statement).await.unwrap_err();
        assert_eq!(code(&error), "42501", "{statement}");
    }
    let accepted = tokio::time::timeout(std::time::Duration::from_millis(100), listener.accept()).await;
    assert!(accepted.is_err());
    // Its own it may change, and give away to roles that it belongs to only.
    other
        .batch_execute(
            "create peer mine from postgres with (user = 'u', validate = false); alter peer mine rename to my",
        )
        .await
        .unwrap();
    let error = other.batch_execute("alter peer my owner to postgres").await.unwrap_err();
    assert_eq!(code(&error), "42501");
    client.batch_execute(&format!("alter peer shop owner to {role}")).await.unwrap();
    other.batch_execute("alter peer shop rename to store; drop peer store").await.unwrap();
}
