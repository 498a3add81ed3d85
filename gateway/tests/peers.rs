//! `dbname=<peer>`: sessions on peers, who may have them, and what they are compared with a direct connection.

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::support::{Gateway, start};

/// A gateway with a database of its own as the peer `shop`, and a role `ann` that may log in.
async fn with_peer() -> (Gateway, String) {
    let gateway = start().await;
    let database = format!("shop_{:016x}", rand::random::<u64>());
    let role = format!("ann_{:016x}", rand::random::<u64>());
    let direct = gateway.connect_directly().await;
    direct.batch_execute(&format!("create database {database}")).await.unwrap();
    direct.batch_execute(&format!("create role {role} login")).await.unwrap();
    let client = gateway.connect().await;
    let create = format!(
        "create peer shop from postgres with (host = '127.0.0.1', port = {}, user = 'postgres', database = '{database}',
         application_name = 'the peer', options = '-c work_mem=7MB -c geqo_seed=0.5')",
        gateway.cluster.port()
    );
    client.batch_execute(&create).await.unwrap();
    (gateway, role)
}

async fn connect(gateway: &Gateway, role: &str, database: &str) -> Result<Client, tokio_postgres::Error> {
    let mut config = gateway.config(gateway.address.port());
    let (client, connection) = config.user(role).dbname(database).connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

fn said(error: tokio_postgres::Error) -> (SqlState, String, Option<String>) {
    let error = error.as_db_error().expect("the server's words").clone();
    (error.code().clone(), error.message().to_owned(), error.hint().map(str::to_owned))
}

async fn value(client: &Client, query: &str) -> String {
    let messages = client.simple_query(query).await.unwrap();
    let row = messages.iter().find_map(|m| if let SimpleQueryMessage::Row(row) = m { row.get(0) } else { None });
    row.unwrap().to_owned()
}

#[tokio::test]
async fn a_session_on_a_peer_is_the_peer_s() {
    let (gateway, _) = with_peer().await;
    let mut config = gateway.config(gateway.address.port());
    config.dbname("shop").options("-c work_mem=9MB -c peer.own=yes").application_name("mine");
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    assert!(value(&client, "select current_database()").await.starts_with("shop_"));
    assert_eq!(value(&client, "show work_mem").await, "9MB", "the client's wish counts");
    assert_eq!(value(&client, "show geqo_seed").await, "0.5", "the peer's option too");
    assert_eq!(value(&client, "show peer.own").await, "yes");
    assert_eq!(value(&client, "show application_name").await, "mine");
    // Its statements are its own: ours are not looked for.
    let error = client.batch_execute("select 1; create peer x from postgres").await.unwrap_err();
    assert_eq!(said(error).0, SqlState::SYNTAX_ERROR);
    let client = connect(&gateway, "postgres", "shop").await.unwrap();
    assert_eq!(value(&client, "show application_name").await, "the peer");
}

#[tokio::test]
async fn a_peer_is_for_those_that_have_usage() {
    let (gateway, ann) = with_peer().await;
    let owner = gateway.connect().await;
    let refused = said(connect(&gateway, &ann, "shop").await.err().unwrap());
    assert_eq!(
        (refused.0, refused.1.as_str()),
        (SqlState::INSUFFICIENT_PRIVILEGE, "permission denied for peer \"shop\"")
    );
    assert_eq!(refused.2.unwrap(), "Role \"postgres\" or a superuser can GRANT USAGE ON PEER \"shop\".");

    owner.batch_execute(&format!("begin; grant usage on peer shop to {ann}; rollback")).await.unwrap();
    assert!(connect(&gateway, &ann, "shop").await.is_err(), "what was rolled back is not granted");
    owner.batch_execute(&format!("grant usage on peer shop to {ann}, {ann}")).await.unwrap();
    connect(&gateway, &ann, "shop").await.unwrap();
    owner.batch_execute(&format!("revoke all on peer shop from {ann}")).await.unwrap();
    assert!(connect(&gateway, &ann, "shop").await.is_err());

    owner.batch_execute(&format!("create role {ann}_group; grant {ann}_group to {ann}")).await.unwrap();
    owner.batch_execute(&format!("grant all privileges on peer shop to group {ann}_group")).await.unwrap();
    connect(&gateway, &ann, "shop").await.unwrap();
    owner.batch_execute(&format!("drop role {ann}_group")).await.unwrap();
    assert!(connect(&gateway, &ann, "shop").await.is_err(), "the role is gone");
    owner.batch_execute("grant usage on peer shop to public").await.unwrap();
    connect(&gateway, &ann, "shop").await.unwrap();
    let left = value(&owner, "select count(*) from peergate.peer_privileges").await;
    owner.batch_execute("revoke usage on peer shop from public").await.unwrap();
    assert_eq!(
        (left.as_str(), value(&owner, "select count(*) from peergate.peer_privileges").await.as_str()),
        ("2", "0")
    );
}

#[tokio::test]
async fn only_the_owner_grants() {
    let (gateway, ann) = with_peer().await;
    let owner = gateway.connect().await;
    owner
        .batch_execute(&format!(
            "grant usage on schema peergate to {ann}; grant execute on all routines in schema peergate to {ann}"
        ))
        .await
        .unwrap();
    let client = connect(&gateway, &ann, &gateway.database).await.unwrap();
    let error = said(client.batch_execute("grant usage on peer shop to current_user").await.unwrap_err());
    assert_eq!((error.0, error.1.as_str()), (SqlState::INSUFFICIENT_PRIVILEGE, "must be owner of peer \"shop\""));
    let error = owner.batch_execute("grant usage on peer shop, shpo to nobody_there").await.unwrap_err();
    let position = match error.as_db_error().unwrap().position() {
        Some(tokio_postgres::error::ErrorPosition::Original(position)) => *position,
        other => panic!("{other:?}"),
    };
    assert_eq!((said(error).1.as_str(), position), ("peer \"shpo\" does not exist", 27));
    let error = said(owner.batch_execute("revoke usage on peer shop from nobody_there").await.unwrap_err());
    assert_eq!((error.0, error.1.as_str()), (SqlState::UNDEFINED_OBJECT, "role \"nobody_there\" does not exist"));
}

#[tokio::test]
async fn a_name_that_is_no_database_is_answered_with_the_peers() {
    let (gateway, ann) = with_peer().await;
    let refused = said(connect(&gateway, "postgres", "shpo").await.err().unwrap());
    assert_eq!((refused.0, refused.1.as_str()), (SqlState::UNDEFINED_DATABASE, "database \"shpo\" does not exist"));
    assert_eq!(refused.2.as_deref(), Some("Peers to connect to: shop."));
    let refused = said(connect(&gateway, &ann, "shpo").await.err().unwrap());
    assert_eq!(refused.2, None, "what a role may not use is not shown to it");
    let refused = said(connect(&gateway, "nobody_there", "shpo").await.err().unwrap());
    assert_eq!(refused.2, None);
    let client = connect(&gateway, "postgres", "postgres").await.unwrap();
    assert_eq!(value(&client, "select current_database()").await, "postgres");
}

#[tokio::test]
async fn a_peer_that_cannot_be_reached_says_why() {
    let (gateway, _) = with_peer().await;
    let client = gateway.connect().await;
    let options = "host = '127.0.0.1', port = 1, user = 'x', validate = false";
    client.batch_execute(&format!("create peer gone from postgres with ({options})")).await.unwrap();
    let error = connect(&gateway, "postgres", "gone").await.err().unwrap();
    let error = error.as_db_error().unwrap();
    assert_eq!((error.code().code(), error.message()), ("HV00N", "could not connect to peer \"gone\""));
    assert!(error.detail().unwrap().starts_with("127.0.0.1:1: "), "{error:?}");
}

#[tokio::test]
async fn a_cancel_request_reaches_the_peer() {
    let (gateway, _) = with_peer().await;
    let client = connect(&gateway, "postgres", "shop").await.unwrap();
    let token = client.cancel_token();
    let sleeping = tokio::spawn(async move { client.batch_execute("select pg_sleep(600)").await });
    let watcher = gateway.connect_directly().await;
    crate::support::eventually("the statement runs", || async {
        let query = "select 1 from pg_stat_activity where query = 'select pg_sleep(600)' and datname like 'shop_%' and state = 'active'";
        !watcher.query(query, &[]).await.unwrap().is_empty()
    })
    .await;
    token.cancel_query(NoTls).await.unwrap();
    assert_eq!(said(sleeping.await.unwrap().unwrap_err()).0, SqlState::QUERY_CANCELED);
}

/// Answers are compared byte by byte, but for the key: rows, types, errors, notices, COPY, in both protocols.
#[tokio::test]
async fn what_a_peer_says_is_what_it_says_directly() {
    let (gateway, _) = with_peer().await;
    let direct = gateway.connect().await;
    let database = value(&direct, "select options->>'database' from peers where name = 'shop'").await;
    let script = r#"
        create type mood as enum ('sad', 'ok'); create domain positive as int check (value > 0);
        create table t (a int primary key, b mood, c positive[], d numeric, e jsonb, f bytea, g timestamptz, h int4range);
        insert into t values (1, 'ok', '{1,2}', 'NaN', '{"x": 1}', '\x00ff', '2020-01-01 00:00+00', '[1,5)'), (2, null, null, null, null, null, null, null);
        do $$ begin raise notice 'hello'; raise warning using message = 'careful', detail = 'd', hint = 'h'; end $$;
        select * from t order by a; table t; select b, count(*) from t group by b order by 1;
        insert into t values (1); select 1/0; select nosuch from t; selekt;
        copy t to stdout; copy (select a, b, d, e, f, g, h from t) to stdout with (format binary);
        begin; insert into t(a) values (9); savepoint s; insert into t(a) values (9); rollback to s; select count(*) from t; rollback;
        explain (costs off) select * from t where a = 1; show server_version; select current_database(), session_user;
        prepare p as select $1::mood; execute p('sad'); execute p('bad'); drop table t; drop type mood; drop domain positive;"#;
    let through = gateway.run_psql_on(gateway.address.port(), "shop", script).await;
    let directly = gateway.run_psql_on(gateway.cluster.port(), &database, script).await;
    let text = |output: &std::process::Output| String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text(&through), text(&directly));
    assert!(text(&through).contains("invalid input value for enum mood"), "{}", text(&through));
    let client = connect(&gateway, "postgres", "shop").await.unwrap();
    let row = client.query_one("select $1::int8 + 1, array['a', null], '{}'::jsonb", &[&41_i64]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, Vec<Option<String>>>(1)), (42, vec![Some("a".to_owned()), None]));
}
