//! tokio-postgres, the driver that Peergate itself is built on: binary values, pipelines, portals, COPY, cancel.

use std::pin::pin;

use futures_util::{SinkExt, StreamExt, TryStreamExt, future};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio_postgres::binary_copy::{BinaryCopyInWriter, BinaryCopyOutStream};
use tokio_postgres::error::ErrorPosition;
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client, Config, NoTls, SimpleQueryMessage};

use super::{PASSWORD, Place, USER};

const LARGE_ROWS: i64 = 200_000;
const LARGE_SUM: i64 = LARGE_ROWS * (LARGE_ROWS + 1) / 2;

/// Runs it all; panics where something is not as it should be.
pub(super) fn run(place: &Place) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut client = connect(place, place.port).await;
        plain_sql(&client).await;
        transactions(&mut client).await;
        parameters(&client).await;
        errors(&client).await;
        pipeline(&client).await;
        cancel(&client, place).await;
        large_result(&mut client).await;
        copy(&client).await;
        notifications(place).await;
    });
}

fn config(place: &Place, port: u16) -> Config {
    let mut config = Config::new();
    config.host("127.0.0.1").port(port).user(USER).password(PASSWORD).dbname(&place.database);
    config
}

async fn connect(place: &Place, port: u16) -> Client {
    let (client, connection) = config(place, port).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The peers beside the two that are always there.
async fn peers(client: &Client) -> Vec<String> {
    let query = "select name from peers where name not in ('source', 'target') order by name";
    client.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// SQLSTATE and position of an error.
fn said(error: &tokio_postgres::Error) -> (&str, Option<u32>) {
    let error = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
    let position = match error.position() {
        Some(ErrorPosition::Original(position)) => Some(*position),
        _ => None,
    };
    (error.code().code(), position)
}

async fn plain_sql(client: &Client) {
    let row =
        client.query_one("select $1::int8, $2::text, $3::int4[], null::text", &[&1i64, &"é🐘", &vec![1, 2]]).await;
    let row = row.unwrap();
    assert_eq!((row.get(0), row.get(1), row.get(2)), (1i64, "é🐘", vec![1, 2]));
    assert_eq!(row.get::<_, Option<&str>>(3), None);
    client.batch_execute("create type mood as enum ('sad', 'happy'); create table moods (mood mood)").await.unwrap();
    // Of a type that it does not know, the driver asks the catalogs.
    let statement = client.prepare("insert into moods values ($1) returning mood").await.unwrap();
    assert_eq!(statement.params()[0].name(), "mood");
    let messages = client.simple_query("select 1 as a; create table several (a int); table several").await.unwrap();
    let ends = messages.iter().filter(|message| matches!(message, SimpleQueryMessage::CommandComplete(_)));
    assert_eq!(ends.count(), 3);
}

async fn transactions(client: &mut Client) {
    let transaction = client.transaction().await.unwrap();
    transaction.batch_execute("create table t_rolled_back (a int)").await.unwrap();
    let create = "create peer rolled_back from postgres with (host = 'h', user = 'u', validate = false)";
    transaction.execute(create, &[]).await.unwrap();
    transaction.execute("create mirror rolled_back from source to rolled_back for table orders", &[]).await.unwrap();
    assert_eq!(peers(transaction.client()).await, ["rolled_back"]);
    transaction.rollback().await.unwrap();
    assert!(peers(client).await.is_empty());
    let table = client.query_one("select to_regclass('t_rolled_back')::text", &[]).await.unwrap();
    assert_eq!(table.get::<_, Option<&str>>(0), None);

    let mut transaction = client.transaction().await.unwrap();
    let create = "create peer kept from postgres with (host = 'h', user = 'u', validate = false)";
    transaction.execute(create, &[]).await.unwrap();
    let savepoint = transaction.savepoint("s").await.unwrap();
    savepoint.execute("drop peer kept", &[]).await.unwrap();
    savepoint.rollback().await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(peers(client).await, ["kept"]);
}

async fn parameters(client: &Client) {
    let text = "create peer bound from postgres with (host = $1, port = $2, user = $3, password = $4, validate = $5)";
    let statement = client.prepare(text).await.unwrap();
    assert_eq!(statement.params(), vec![Type::TEXT; 5]);
    assert!(statement.columns().is_empty());
    for user in ["u'", "ü"] {
        client.execute(&statement, &[&"db.example", &"6543", &user, &"geheim", &"false"]).await.unwrap();
        let options = client.query_one("select options->>'user' from peers where name = 'bound'", &[]).await.unwrap();
        assert_eq!(options.get::<_, &str>(0), user);
        client.execute("drop peer bound", &[]).await.unwrap();
    }
    let shown = client.query("show peers", &[]).await.unwrap();
    assert_eq!(shown.iter().map(|row| row.get("name")).collect::<Vec<&str>>(), ["kept", "source", "target"]);
}

async fn errors(client: &Client) {
    let unknown = "create peer x from postgres with (hosst = 'h', user = 'u', validate = false)";
    for (text, state, position) in [
        ("select 'é', nope from pg_class", "42703", 13),
        (unknown, "HV00D", 35),
        ("create peer x frm postgres", "42601", 15),
        ("drop peer kept, no_such_peer", "42704", 17),
    ] {
        let expected = (state, Some(position));
        assert_eq!(said(&client.query(text, &[]).await.unwrap_err()), expected, "{text}");
        assert_eq!(said(&client.simple_query(text).await.unwrap_err()), expected, "{text}");
    }
    let several = "create table gone (a int); drop peer kept; drop peer no_such_peer";
    assert_eq!(said(&client.batch_execute(several).await.unwrap_err()), ("42704", Some(54)));
    assert_eq!(peers(client).await, ["kept"]);
}

/// The driver sends what is asked before earlier answers are there.
async fn pipeline(client: &Client) {
    let statement = client.prepare("select $1::int4").await.unwrap();
    let numbers = future::join_all((0..500i32).map(|i| {
        let statement = &statement;
        async move { client.query_one(statement, &[&i]).await.unwrap().get::<_, i32>(0) }
    }));
    assert_eq!(numbers.await, (0..500).collect::<Vec<_>>());
    let (made, failed, dropped) = tokio::join!(
        client.simple_query("create peer piped from postgres with (host = 'h', user = 'u', validate = false)"),
        client.simple_query("drop peer no_such_peer"),
        client.simple_query("drop peer piped"),
    );
    made.unwrap();
    assert_eq!(said(&failed.unwrap_err()).0, "42704");
    dropped.unwrap();
}

async fn cancel(client: &Client, place: &Place) {
    let direct = connect(place, place.direct_port).await;
    let pid: i32 = client.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    let running = "select count(*) from pg_stat_activity where pid = $1 and state = 'active'
                   and wait_event_type is not null and wait_event <> 'ClientRead'";
    for text in ["select pg_sleep(600)", "wait for mirror unfinished"] {
        let token = client.cancel_token();
        let (result, ()) = tokio::join!(client.query(text, &[]), async {
            while direct.query_one(running, &[&pid]).await.unwrap().get::<_, i64>(0) != 1 {}
            let mut socket = TcpStream::connect(("127.0.0.1", place.port)).await.unwrap();
            token.cancel_query_raw(&mut socket, NoTls).await.unwrap();
            // Until the server closes it, it may signal once more, and what comes next would be canceled.
            socket.read_to_end(&mut Vec::new()).await.unwrap();
        });
        assert_eq!(said(&result.unwrap_err()).0, "57014", "{text}");
    }
    assert_eq!(client.query_one("select 1", &[]).await.unwrap().get::<_, i32>(0), 1);
}

async fn large_result(client: &mut Client) {
    let text = "select i, repeat(md5(i::text), 3) from generate_series(1, $1::int8) i";
    let mut rows = pin!(client.query_raw(text, [LARGE_ROWS]).await.unwrap());
    let (mut sum, mut length) = (0i64, 0);
    while let Some(row) = rows.try_next().await.unwrap() {
        sum += row.get::<_, i64>(0);
        length += row.get::<_, &str>(1).len();
    }
    assert_eq!((sum, length), (LARGE_SUM, LARGE_ROWS as usize * 96));
    // A portal that is read 1000 rows at a time.
    let transaction = client.transaction().await.unwrap();
    let portal = transaction.bind(text, &[&20_000i64]).await.unwrap();
    let mut sum = 0;
    loop {
        let rows = transaction.query_portal(&portal, 1000).await.unwrap();
        if rows.is_empty() {
            break;
        }
        sum += rows.iter().map(|row| row.get::<_, i64>(0)).sum::<i64>();
    }
    assert_eq!(sum, 20_000 * 20_001 / 2);
    transaction.commit().await.unwrap();
}

async fn copy(client: &Client) {
    client.batch_execute("create temp table copied (i int8, s text)").await.unwrap();
    let sink = client.copy_in("copy copied from stdin (format binary)").await.unwrap();
    let mut writer = pin!(BinaryCopyInWriter::new(sink, &[Type::INT8, Type::TEXT]));
    for i in 1..=LARGE_ROWS {
        writer.as_mut().write(&[&i, &"row\t\n\\"]).await.unwrap();
    }
    assert_eq!(writer.finish().await.unwrap(), LARGE_ROWS as u64);
    let stream = client.copy_out("copy copied to stdout (format binary)").await.unwrap();
    let rows = BinaryCopyOutStream::new(stream, &[Type::INT8, Type::TEXT]);
    let sum = rows.try_fold(0, |sum, row| future::ready(Ok(sum + row.get::<i64>(0)))).await.unwrap();
    assert_eq!(sum, LARGE_SUM);
    // The driver has sent its Sync before it learns that the server refuses the rows.
    let mut sink = pin!(client.copy_in("copy copied from stdin").await.unwrap());
    let sent = sink.send(bytes(b"no number\tx\n")).await;
    let refused = match sent {
        Ok(()) => sink.finish().await.unwrap_err(),
        Err(error) => error,
    };
    assert_eq!(said(&refused).0, "22P02");
    assert_eq!(client.query_one("select count(*) from copied", &[]).await.unwrap().get::<_, i64>(0), LARGE_ROWS);
}

fn bytes(text: &'static [u8]) -> std::io::Cursor<&'static [u8]> {
    std::io::Cursor::new(text)
}

async fn notifications(place: &Place) {
    let (client, mut connection) = config(place, place.port).connect(NoTls).await.unwrap();
    let messages = futures_util::stream::poll_fn(move |context| connection.poll_message(context));
    let mut messages = pin!(messages);
    let listen = client.batch_execute("listen news; notify news, 'é'");
    let heard = async {
        loop {
            match messages.next().await {
                Some(Ok(AsyncMessage::Notification(notification))) => break notification.payload().to_owned(),
                Some(Ok(_)) => {}
                other => panic!("{:?}", other.map(|message| message.err())),
            }
        }
    };
    assert_eq!(heard_while(heard, listen).await, "é");
}

/// Runs both; a connection has to be read for its own requests to be answered.
async fn heard_while(
    heard: impl Future<Output = String>,
    listen: impl Future<Output = Result<(), tokio_postgres::Error>>,
) -> String {
    let mut heard = pin!(heard);
    let mut listen = pin!(listen);
    tokio::select! {
        payload = &mut heard => payload,
        listening = &mut listen => {
            listening.unwrap();
            heard.await
        }
    }
}
