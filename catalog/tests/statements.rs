//! The procedures behind the statements, and plain DML, which must be as safe.

use catalog::cluster::TestCluster;
use tokio_postgres::{Client, NoTls};

async fn client() -> (TestCluster, Client) {
    let cluster = tokio::task::spawn_blocking(|| TestCluster::start(&[])).await.unwrap().unwrap();
    let (client, connection) = cluster.config("postgres").connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    crate::migrate(&cluster).await;
    let peers = r#"call peergate.create_peer('shop', 'postgres', '{"user": "u"}'); call peergate.create_peer('dwh', 'POSTGRES', '{"user": "u"}')"#;
    client.batch_execute(peers).await.unwrap();
    (cluster, client)
}

/// SQLSTATE, message and the part at fault.
async fn fails(client: &Client, statement: &str) -> (String, String, String) {
    let error = client.batch_execute(statement).await.expect_err(statement);
    let error = error.as_db_error().unwrap();
    (error.code().code().to_owned(), error.message().to_owned(), error.column().unwrap_or_default().to_owned())
}

async fn text(client: &Client, query: &str) -> String {
    client.query_one(query, &[]).await.unwrap().get::<_, Option<String>>(0).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn options_are_checked_and_made_canonical() {
    let (_cluster, client) = client().await;
    for (options, sqlstate, part) in [
        (r#"{"hst": "h", "user": "u"}"#, "HV00D", "option.hst"),
        (r#"{"sslmode": "requre", "user": "u"}"#, "22023", "option.sslmode.value"),
        (r#"{"connect_timeout": "0", "user": "u"}"#, "22023", "option.connect_timeout.value"),
        (r#"{"keepalives": "perhaps", "user": "u"}"#, "22023", "option.keepalives.value"),
        (r#"{"password": "p", "user": "u"}"#, "22023", "option.password"),
        (r#"{"dbname": "a", "database": "b", "user": "u"}"#, "42601", "option.database"),
        (r#"{"host": "h"}"#, "42601", "options"),
    ] {
        let (code, message, at) =
            fails(&client, &format!("call peergate.create_peer('x', 'postgres', '{options}')")).await;
        assert_eq!((code.as_str(), at.as_str()), (sqlstate, part), "{options}: {message}");
        // Plain DML is held to the same.
        let (code, _, _) =
            fails(&client, &format!("insert into peergate.peers (name, options) values ('x', '{options}')")).await;
        assert_eq!(code, sqlstate);
    }
    let mirror = r#"call peergate.create_mirror('m', 'shop', 'dwh', '{"all": true}', '{"do_initial_copy": "true", "max_batch_size": "1000", "batch_bytes_max": "1MB", "sync_interval": "5"}')"#;
    client.batch_execute(mirror).await.unwrap();
    assert_eq!(
        text(&client, "select options::text from peergate.mirrors").await,
        r#"{"mode": "copy_and_stream", "sync_interval": "00:00:05", "batch_rows_max": "1000", "batch_bytes_max": "1048576"}"#
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_in_use_stay_and_cascade_takes_the_mirrors_along() {
    let (_cluster, client) = client().await;
    client.batch_execute(r#"call peergate.create_mirror('m', 'shop', 'dwh', '{"all": true}')"#).await.unwrap();
    for statement in [
        "call peergate.drop_peer(array['shop'])",
        "delete from peergate.peers where name = 'dwh'",
        "delete from peergate.peers",
    ] {
        assert_eq!(fails(&client, statement).await.0, "2BP01", "{statement}");
    }
    assert_eq!(fails(&client, "truncate peergate.peers cascade").await.0, "0A000");
    assert_eq!(fails(&client, "call peergate.drop_peer(array['shp'])").await.0, "42704");
    client.batch_execute("call peergate.drop_peer(array['nobody'], if_exists => true)").await.unwrap();
    client.batch_execute("call peergate.drop_peer(array['shop', 'dwh'], cascade => true)").await.unwrap();
    assert_eq!(text(&client, "select count(*)::text from peergate.peers").await, "0");
    // What is to be cleaned up on the peers is remembered with all that it takes.
    assert_eq!(text(&client, "select source ->> 'name' from peergate.mirror_drops").await, "shop");
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_dml_on_mirrors_does_what_the_statements_do() {
    let (_cluster, client) = client().await;
    let insert = r#"insert into peergate.mirrors (name, source, target, selection) values ('m', 'shop', 'dwh', '{"all": true}')"#;
    client.batch_execute(insert).await.unwrap();
    client.batch_execute("update peergate.mirrors set desired_state = 'paused' where name = 'm'").await.unwrap();
    assert_eq!(fails(&client, "update peergate.mirrors set desired_state = 'on fire'").await.0, "22023");
    assert_eq!(fails(&client, "update peergate.mirrors set source = 'dwh'").await.0, "0A000");
    assert_eq!(fails(&client, r#"update peergate.mirrors set options = '{"mode": "copy_only"}'"#).await.0, "0A000");
    let update = r#"update peergate.mirrors set name = 'n', options = '{"on_error": "quarantine_table"}'; update peergate.mirrors set name = 'm'"#;
    client.batch_execute(update).await.unwrap();
    let options = "select options::text from peergate.mirrors where name = 'm'";
    assert_eq!(text(&client, options).await, r#"{"on_error": "quarantine_table"}"#);
    assert_eq!(fails(&client, insert).await.0, "42710");
    client.batch_execute("delete from peergate.mirrors where name = 'm'").await.unwrap();
    let kinds = "select string_agg(kind || ' ' || state, ', ' order by id) from peergate.tasks";
    assert_eq!(text(&client, kinds).await, "create_mirror canceled, pause_mirror canceled, drop_mirror pending");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_that_makes_no_sense_is_refused() {
    let (_cluster, client) = client().await;
    let table = |from: &str, to: &str| {
        format!(r#"{{"from": {{"schema": "s", "name": "{from}"}}, "to": {{"schema": "s", "name": "{to}"}}}}"#)
    };
    let twice = format!(r#"{{"tables": [{}, {}]}}"#, table("a", "a"), table("a", "b"));
    let onto_one = format!(r#"{{"tables": [{}, {}]}}"#, table("a", "x"), table("b", "x"));
    for (source, target, selection, sqlstate, part) in [
        ("nobody", "dwh", r#"{"all": true}"#, "42704", "source"),
        ("shop", "nobody", r#"{"all": true}"#, "42704", "target"),
        ("shop", "shop", r#"{"all": true}"#, "22023", "target"),
        ("shop", "dwh", "{}", "22023", "tables"),
        ("shop", "dwh", &twice, "42712", "table.2"),
        ("shop", "dwh", &onto_one, "42712", "table.2"),
    ] {
        let (code, message, at) =
            fails(&client, &format!("call peergate.create_mirror('m', '{source}', '{target}', '{selection}')")).await;
        assert_eq!((code.as_str(), at.as_str()), (sqlstate, part), "{selection}: {message}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_says_why_it_cannot_come_true() {
    let (_cluster, client) = client().await;
    client.batch_execute(r#"call peergate.create_mirror('m', 'shop', 'dwh', '{"all": true}')"#).await.unwrap();
    assert_eq!(fails(&client, "call peergate.wait_for_mirror('m', timeout => '50ms')").await.0, "57014");
    assert_eq!(fails(&client, "call peergate.wait_for_mirror('n')").await.0, "42704");
    assert_eq!(fails(&client, "call peergate.wait_for_mirror('m', up_to_state => 'flying')").await.0, "22023");
    let in_transaction = "begin; savepoint s; call peergate.pause_mirror('m'); call peergate.wait_for_mirror('m')";
    assert_eq!(fails(&client, in_transaction).await.0, "55000");
    client.batch_execute("rollback").await.unwrap();
    let isolated = "begin isolation level repeatable read; call peergate.wait_for_mirror('m')";
    assert_eq!(fails(&client, isolated).await.0, "25001");
    client.batch_execute("rollback").await.unwrap();
    client.batch_execute("call peergate.wait_for_mirror('m', up_to_state => 'created')").await.unwrap();
}

/// What looks for work and finds none must not wake itself.
#[tokio::test(flavor = "multi_thread")]
async fn looking_for_peers_to_import_in_vain_notifies_nobody() {
    let (cluster, client) = client().await;
    let (listener, mut connection) = cluster.config("postgres").connect(NoTls).await.unwrap();
    let (heard, mut hears) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            if let tokio_postgres::AsyncMessage::Notification(notification) = message {
                heard.send(notification.payload().to_owned()).unwrap();
            }
        }
    });
    listener.batch_execute("listen peergate").await.unwrap();
    let claim = "update peergate.peer_import_runs set state = 'running' where due_at < '-infinity'";
    client.batch_execute(&format!("{claim}; select pg_notify('peergate', 'end')")).await.unwrap();
    assert_eq!(hears.recv().await.unwrap(), "end");
    client.batch_execute("update peergate.peer_import_runs set state = 'pending'").await.unwrap();
    assert_eq!(hears.recv().await.unwrap(), "import");
}
