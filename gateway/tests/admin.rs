//! The admin console, as psql, drivers and exporters use it.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::{Client, Error, NoTls, SimpleQueryMessage};

use crate::support::{Gateway, eventually, frame, read_to_end, read_until, start, start_with, startup};

const DATABASE: &str = "peergate_admin";

async fn connect_as(gateway: &Gateway, user: &str) -> Result<Client, Error> {
    let mut config = gateway.config(gateway.address.port());
    let (client, connection) = config.user(user).dbname(DATABASE).connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn console(gateway: &Gateway) -> Client {
    connect_as(gateway, "postgres").await.unwrap()
}

/// Returns the rows of a simple query, each with its column's name.
async fn show(console: &Client, what: &str) -> Vec<Vec<(String, Option<String>)>> {
    let row = |message| match message {
        SimpleQueryMessage::Row(row) => {
            let cell = |(n, column): (usize, &tokio_postgres::SimpleColumn)| {
                (column.name().to_owned(), row.get(n).map(str::to_owned))
            };
            Some(row.columns().iter().enumerate().map(cell).collect())
        }
        _ => None,
    };
    console.simple_query(&format!("SHOW {what}")).await.unwrap().into_iter().filter_map(row).collect()
}

fn cell<'a>(row: &'a [(String, Option<String>)], column: &str) -> &'a str {
    let (_, value) = row.iter().find(|(name, _)| name == column).unwrap_or_else(|| panic!("no {column}: {row:?}"));
    value.as_deref().unwrap_or("")
}

fn code(error: &Error) -> &str {
    error.code().unwrap().code()
}

/// Returns the id of the session whose server has that process id.
async fn id(console: &Client, pid: i32) -> String {
    let sessions = show(console, "SESSIONS").await;
    let row = sessions.iter().find(|row| cell(row, "remote_pid") == pid.to_string()).unwrap();
    cell(row, "id").to_owned()
}

async fn psql(gateway: &Gateway, arguments: &[&str]) -> String {
    let psql = catalog::cluster::Binaries::find(None).unwrap().tool("psql").unwrap();
    let dsn = format!("host=127.0.0.1 port={} user=postgres dbname={DATABASE}", gateway.address.port());
    let mut command = tokio::process::Command::new(psql);
    let output = command.args(["-X", "-v", "VERBOSITY=verbose", "-d", &dsn]).args(arguments).output().await.unwrap();
    String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
}

#[tokio::test]
async fn sessions_and_what_they_have_done_are_shown() {
    let gateway = start().await;
    let mut config = gateway.config(gateway.address.port());
    let (client, connection) = config.application_name("till").connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client.batch_execute("begin; select repeat('x', 5000)").await.unwrap();
    let console = console(&gateway).await;

    let sessions = show(&console, "SESSIONS").await;
    assert_eq!(sessions.len(), 2, "{sessions:?}");
    let till = sessions.iter().find(|row| cell(row, "application_name") == "till").unwrap();
    assert_eq!((cell(till, "user"), cell(till, "database")), ("postgres", gateway.database.as_str()));
    assert_eq!(
        (cell(till, "state"), cell(till, "addr"), cell(till, "type")),
        ("idle in transaction", "127.0.0.1", "C")
    );
    let pid: i32 = client.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    assert_eq!(cell(till, "remote_pid"), pid.to_string());
    let ours = sessions.iter().find(|row| cell(row, "database") == DATABASE).unwrap();
    assert_eq!((cell(ours, "type"), cell(ours, "state")), ("A", "active"));

    let stats = show(&console, "STATS").await;
    assert_eq!((stats.len(), cell(&stats[0], "database")), (1, gateway.database.as_str()));
    assert!(cell(&stats[0], "total_sent").parse::<u64>().unwrap() > 5000);
    let pools = show(&console, "POOLS").await;
    assert_eq!((cell(&pools[0], "cl_active"), cell(&pools[0], "sv_active")), ("1", "1"));
    let databases = show(&console, "DATABASES").await;
    assert_eq!(cell(&databases[0], "port"), gateway.cluster.port().to_string());
    assert_eq!(cell(&databases[0], "current_connections"), "1");

    // What a session that has ended had done is kept.
    drop(client);
    eventually("the session ends", async || show(&console, "CLIENTS").await.len() == 1).await;
    let stats = show(&console, "STATS_TOTALS").await;
    assert!(cell(&stats[0], "bytes_sent").parse::<u64>().unwrap() > 5000);
}

#[tokio::test]
async fn every_table_is_shown_in_both_protocols() {
    let gateway = start().await;
    let console = console(&gateway).await;
    for what in [
        "CONFIG",
        "DATABASES",
        "HELP",
        "LISTENERS",
        "LISTS",
        "MEM",
        "POOLS",
        "SESSIONS",
        "STATE",
        "STATS",
        "STATS_AVERAGES",
        "STATS_TOTALS",
        "USERS",
        "VERSION",
    ] {
        let simple = show(&console, what).await;
        let rows = console.query(&format!("show {what}"), &[]).await.unwrap();
        assert_eq!(rows.len(), simple.len(), "{what}");
        for (row, simple) in rows.iter().zip(&simple) {
            let names: Vec<&str> = row.columns().iter().map(|column| column.name()).collect();
            assert_eq!(names, simple.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>());
        }
    }
    let version: String = console.query_one("show version", &[]).await.unwrap().get(0);
    assert!(version.starts_with("Peergate "));
    let row = console.query("show sessions", &[]).await.unwrap().remove(0);
    assert_eq!((row.get::<_, i64>("id"), row.get::<_, &str>("database")), (1, DATABASE));
    let port: i32 = console.query_one("show listeners", &[]).await.unwrap().get("port");
    assert_eq!(port, i32::from(gateway.address.port()));
    // What drivers say on their own does no harm.
    console.batch_execute("BEGIN; SET extra_float_digits = 3; SHOW VERSION; COMMIT").await.unwrap();
}

#[tokio::test]
async fn psql_shows_tables_and_errors_with_their_place() {
    let gateway = start().await;
    let said = psql(&gateway, &["-c", "show version"]).await;
    assert!(said.contains("Peergate ") && said.contains("(1 row)") && !said.contains("WARNING"), "{said}");
    let said = psql(&gateway, &["-x", "-c", "show listeners"]).await;
    assert!(said.contains("addr                | 127.0.0.1"), "{said}");
    let said = psql(&gateway, &["-c", "reload; shwo stats"]).await;
    assert!(said.contains("42601") && said.contains("LINE 1: reload; shwo stats\n                ^"), "{said}");
    assert!(said.contains("HINT:  There are SHOW CONFIG | DATABASES"), "{said}");
    let said = psql(&gateway, &["-c", "\\d"]).await;
    assert!(said.contains("the console takes no SQL") && said.contains("Connect to another database"), "{said}");
    let said = psql(&gateway, &["-c", "pause"]).await;
    assert!(said.contains("0A000: the console has no PAUSE") && said.contains("HINT:"), "{said}");
}

#[tokio::test]
async fn sessions_are_ended_and_cancelled_by_their_ids() {
    let gateway = start().await;
    let console = console(&gateway).await;
    let direct = gateway.connect_directly().await;
    let asleep = "select from pg_stat_activity where pid = $1 and wait_event = 'PgSleep'";
    let victim = gateway.connect().await;
    let pid: i32 = victim.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    // The driver closes its statement in passing; the answer to that is not to be the last word.
    victim.batch_execute("select 1").await.unwrap();
    let sleeping = victim.batch_execute("select pg_sleep(60)");
    let cancel = async {
        let id = id(&console, pid).await;
        eventually("it sleeps", async || !direct.query(asleep, &[&pid]).await.unwrap().is_empty()).await;
        let sessions = show(&console, "SESSIONS").await;
        assert!(sessions.iter().any(|row| cell(row, "id") == id && cell(row, "state") == "active"), "{sessions:?}");
        console.batch_execute(&format!("CANCEL {id}")).await.unwrap();
        id
    };
    let (slept, ended) =
        tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(sleeping, cancel) }).await.unwrap();
    assert_eq!(code(&slept.unwrap_err()), "57014");
    victim.batch_execute("select 1").await.unwrap();
    console.batch_execute(&format!("KILL {ended}")).await.unwrap();
    eventually("it is gone", async || victim.is_closed()).await;
    eventually("its server is gone", async || {
        direct.query("select from pg_stat_activity where pid = $1", &[&pid]).await.unwrap().is_empty()
    })
    .await;
    let error = console.batch_execute(&format!("KILL {ended}")).await.unwrap_err();
    assert_eq!(code(&error), "42704");

    // A session that is busy ends too, with its server.
    let victim = gateway.connect().await;
    let pid: i32 = victim.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    let sleeping = victim.batch_execute("select pg_sleep(60)");
    let kill = async {
        eventually("it sleeps", async || !direct.query(asleep, &[&pid]).await.unwrap().is_empty()).await;
        console.batch_execute(&format!("KILL {}", id(&console, pid).await)).await.unwrap();
    };
    let (slept, ()) =
        tokio::time::timeout(Duration::from_secs(10), async { tokio::join!(sleeping, kill) }).await.unwrap();
    assert_eq!(code(&slept.unwrap_err()), "57P01");
    eventually("its server is gone", async || {
        direct.query("select from pg_stat_activity where pid = $1", &[&pid]).await.unwrap().is_empty()
    })
    .await;
    assert_eq!(code(&console.batch_execute("RELOAD").await.unwrap_err()), "0A000");
}

#[tokio::test]
async fn roles_may_do_what_the_catalog_says() {
    let gateway = start().await;
    let direct = gateway.connect_directly().await;
    let names = ["nobody", "monitor", "member"].map(|name| format!("{name}_{:016x}", rand::random::<u64>()));
    let [nobody, monitor, member] = &names;
    let owner = format!("owner_{:016x}", rand::random::<u64>());
    direct.batch_execute(&format!("create role {owner}; alter schema peergate owner to {owner}")).await.unwrap();
    for name in &names {
        direct.batch_execute(&format!("create role {name} login")).await.unwrap();
    }
    direct.batch_execute(&format!("grant pg_monitor to {monitor}; grant {owner} to {member}")).await.unwrap();

    assert_eq!(code(&connect_as(&gateway, nobody).await.err().unwrap()), "42501");
    // As anywhere: the catalog says it, in its own words.
    let error = connect_as(&gateway, "not_there_at_all").await.err().unwrap();
    assert_eq!(error.as_db_error().unwrap().message(), "role \"not_there_at_all\" does not exist");
    let console = connect_as(&gateway, monitor).await.unwrap();
    assert_eq!(show(&console, "VERSION").await.len(), 1);
    for statement in ["KILL 1", "CANCEL 1", "RELOAD", "DRAIN", "SHUTDOWN"] {
        assert_eq!(code(&console.batch_execute(statement).await.unwrap_err()), "42501", "{statement}");
    }
    let console = connect_as(&gateway, member).await.unwrap();
    assert_eq!(code(&console.batch_execute("KILL 999999").await.unwrap_err()), "42704");
    direct.batch_execute("alter schema peergate owner to postgres").await.unwrap();
}

#[tokio::test]
async fn drain_leaves_the_console_and_shutdown_ends_it_last() {
    let mut gateway = start_with(|o| o.sessions_max = 3).await;
    let console = console(&gateway).await;
    let busy = gateway.connect().await;
    busy.batch_execute("begin").await.unwrap();
    let mut idle = gateway.raw_session().await;
    // The console has room when there is none for others.
    let second = connect_as(&gateway, "postgres").await.unwrap();
    assert!(gateway.config(gateway.address.port()).connect(NoTls).await.is_err());
    console.batch_execute("DRAIN").await.unwrap();
    assert!(read_to_end(&mut idle).await.windows(7).any(|w| w == b"C57P01\0"));
    let error = gateway.config(gateway.address.port()).connect(NoTls).await.err().unwrap();
    assert_eq!(code(&error), "57P03");
    assert_eq!(cell(&show(&second, "STATE").await[0], "value"), "no");
    connect_as(&gateway, "postgres").await.unwrap();
    busy.batch_execute("commit").await.unwrap();
    eventually("only consoles are left", async || {
        show(&console, "SESSIONS").await.iter().all(|row| cell(row, "type") == "A")
    })
    .await;
    // Nothing is left to wait for, and yet it goes on.
    assert!(!gateway.serving.as_ref().unwrap().is_finished());
    let mut socket = gateway.socket().await;
    socket.write_all(&startup(DATABASE)).await.unwrap();
    read_until(&mut socket, b'Z').await;
    socket.write_all(&frame(b'Q', b"SHUTDOWN\0")).await.unwrap();
    let said = read_to_end(&mut socket).await;
    assert!(said.starts_with(b"C\0\0\0\x0dSHUTDOWN\0Z\0\0\0\x05I"), "{}", String::from_utf8_lossy(&said));
    assert!(said.windows(7).any(|w| w == b"C57P01\0"));
    tokio::time::timeout(Duration::from_secs(5), gateway.serving.take().unwrap()).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn what_is_not_the_protocol_ends_only_its_session() {
    let gateway = start().await;
    for bytes in [
        frame(b'B', b"\0"),
        frame(b'y', b""),
        b"Q\0\0\0\x01".to_vec(),
        b"Q\x7f\xff\xff\xffx".to_vec(),
        frame(b'Q', &[b'x'; 70_000]),
    ] {
        let mut socket = gateway.socket().await;
        socket.write_all(&startup(DATABASE)).await.unwrap();
        read_until(&mut socket, b'Z').await;
        socket.write_all(&bytes).await.unwrap();
        let said = read_to_end(&mut socket).await;
        assert!(said.windows(7).any(|w| w == b"C08P01\0"), "{bytes:?}: {}", String::from_utf8_lossy(&said));
    }
    // A message that comes byte by byte is whole in the end.
    let mut socket = gateway.socket().await;
    socket.write_all(&startup(DATABASE)).await.unwrap();
    read_until(&mut socket, b'Z').await;
    for byte in frame(b'Q', b"show version\0") {
        socket.write_all(&[byte]).await.unwrap();
    }
    assert_eq!(read_until(&mut socket, b'Z').await.0, "TDCZ");
    socket.write_all(&frame(b'X', b"")).await.unwrap();
    assert_eq!(socket.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn the_console_is_no_way_around_the_limit() {
    let gateway = start_with(|o| o.sessions_max = 100).await;
    let mut consoles = Vec::new();
    let refused = loop {
        match connect_as(&gateway, "postgres").await {
            Ok(console) => consoles.push(console),
            Err(error) => break error,
        }
    };
    assert_eq!((consoles.len(), code(&refused)), (32, "53300"));
}
