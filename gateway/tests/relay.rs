//! What is relayed: everything else that Postgres does, and what happens when one side misbehaves or leaves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, pin_mut};
use gateway::config::TlsFiles;
use rustls::RootCertStore;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_postgres::{AsyncMessage, NoTls};
use tokio_rustls::TlsConnector;

use crate::support::{eventually, frame, read_frame, read_to_end, read_until, start, start_with, startup};

const SSL_REQUEST: &[u8] = b"\0\0\0\x08\x04\xd2\x16\x2f";

fn tls_files() -> TlsFiles {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tls");
    TlsFiles { certificate: folder.join("certificate.pem"), key: folder.join("key.pem") }
}

fn connector(alpn: bool) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(tls_files().certificate).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    if alpn {
        config.alpn_protocols = vec![b"postgresql".to_vec()];
    }
    TlsConnector::from(Arc::new(config))
}

#[tokio::test]
async fn answers_are_the_bytes_that_the_server_sent() {
    let gateway = start().await;
    let parse = |text: &str| frame(b'P', &[b"\0", text.as_bytes(), b"\0\0\0"].concat());
    let (bind, execute) = (frame(b'B', b"\0\0\0\0\0\0\0\0"), frame(b'E', b"\0\0\0\0\x02"));
    let (describe, sync, flush) = (frame(b'D', b"P\0"), frame(b'S', b""), frame(b'H', b""));
    let query = |text: &str| frame(b'Q', &[text.as_bytes(), b"\0"].concat());
    let script = [
        query(""),
        query("select 1; select 'peer', 'mirror'; truncate t; \
               insert into t select n, repeat('x', n) from generate_series(1, 500) n; select * from t"),
        query("select nonsense"),
        query("set client_encoding = latin1; select 'peer \u{e9}'; reset client_encoding; notify c, 'mirror'; listen c; notify c"),
        [parse("select * from generate_series(1, 5)"), bind.clone(), describe, execute.clone(), execute.clone(), execute.clone(), sync.clone()].concat(),
        [parse("select 1/0"), flush, bind.clone(), execute.clone(), query("select 1"), sync.clone()].concat(),
        query("copy t to stdout; copy t to stdout (format binary)"),
        [query("copy t from stdin"), frame(b'd', b"1\tx\n2\ty\n"), frame(b'c', b"")].concat(),
        [query("copy t from stdin"), frame(b'd', b"bad\n"), frame(b'c', b"")].concat(),
        [query("copy t from stdin"), frame(b'f', b"no\0")].concat(),
        [parse("copy t from stdin"), bind, execute, sync.clone(), frame(b'd', b"1\tx\n"), frame(b'c', b""), sync].concat(),
        // lo_creat by its function call message.
        frame(b'F', b"\0\0\x03\xbd\0\x01\0\x01\0\x01\0\0\0\x04\0\0\0\0\0\x01"),
        query("begin; declare c cursor for select 1; fetch 1 from c; savepoint peer; select 1/0"),
        query("rollback; do $$ begin raise notice 'mirror'; end $$; vacuum t; select pg_sleep(0)"),
    ]
    .concat();
    gateway.connect_directly().await.batch_execute("create table t (a int, b text)").await.unwrap();
    let mut seen = Vec::new();
    for (port, piece) in
        [(gateway.cluster.port(), script.len()), (gateway.address.port(), script.len()), (gateway.address.port(), 7)]
    {
        let mut socket = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        socket.write_all(&startup(&gateway.database)).await.unwrap();
        read_until(&mut socket, b'Z').await;
        let (mut read, mut write) = socket.into_split();
        let script = [&script[..], &frame(b'X', b"")].concat();
        let writing = tokio::spawn(async move {
            for part in script.chunks(piece) {
                write.write_all(part).await.unwrap();
            }
            write
        });
        let mut answer = Vec::new();
        read.read_to_end(&mut answer).await.unwrap();
        drop(writing.await.unwrap());
        seen.push(frames(&answer));
    }
    assert!(seen[0].len() > 1000, "{}", seen[0].len());
    for through in &seen[1..] {
        for (at, (direct, gateway)) in seen[0].iter().zip(through).enumerate() {
            assert_eq!(direct, gateway, "frame {at}");
        }
        assert_eq!(seen[0].len(), through.len());
    }
}

/// Takes a stream apart; process ids in notifications and new objects' ids differ between sessions.
fn frames(bytes: &[u8]) -> Vec<(char, Vec<u8>)> {
    let (mut out, mut rest) = (Vec::new(), bytes);
    while let [tag, a, b, c, d, ..] = *rest {
        let end = 1 + u32::from_be_bytes([a, b, c, d]) as usize;
        let body = if matches!(tag, b'A' | b'V') { Vec::new() } else { rest[5..end].to_vec() };
        out.push((char::from(tag), body));
        rest = &rest[end..];
    }
    out
}

#[tokio::test]
async fn copy_notifications_and_cancel_work() {
    let gateway = start().await;
    let (client, mut connection) = gateway.config(gateway.address.port()).connect(NoTls).await.unwrap();
    let (send, mut notifications) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        let messages = futures_util::stream::poll_fn(move |cx| connection.poll_message(cx));
        pin_mut!(messages);
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notification(n) = message {
                send.send(n.payload().to_owned()).unwrap();
            }
        }
    });
    client.batch_execute("create table t (a int); listen mirror").await.unwrap();
    let sink = client.copy_in("copy t from stdin").await.unwrap();
    pin_mut!(sink);
    for _ in 0..100 {
        sink.send(Bytes::from("12\n".repeat(1000))).await.unwrap();
    }
    assert_eq!(sink.finish().await.unwrap(), 100_000);
    let stream = client.copy_out("copy t to stdout").await.unwrap();
    let bytes = stream.fold(0, async |n, chunk| n + chunk.unwrap().len()).await;
    assert_eq!(bytes, 300_000);
    // While the session is idle.
    gateway.connect().await.batch_execute("notify mirror, 'peer'").await.unwrap();
    assert_eq!(notifications.recv().await.unwrap(), "peer");
    let (cancel, started) = (client.cancel_token(), Instant::now());
    let cancelling = async {
        let direct = gateway.connect_directly().await;
        eventually("the query runs", async || {
            let sql = "select 1 from pg_stat_activity where query like '%pg_sleep(60)%' and state = 'active' and pid <> pg_backend_pid()";
            !direct.query(sql, &[]).await.unwrap().is_empty()
        })
        .await;
        cancel.cancel_query(NoTls).await.unwrap();
    };
    let (result, ()) = tokio::join!(client.query("select pg_sleep(60)", &[]), cancelling);
    assert_eq!(result.unwrap_err().code().unwrap().code(), "57014");
    assert!(started.elapsed() < Duration::from_secs(10));
    client.query("select 1", &[]).await.unwrap();
}

#[tokio::test]
async fn a_client_that_vanishes_in_a_copy_frees_its_backing_session_within_a_second() {
    let gateway = start().await;
    let direct = gateway.connect_directly().await;
    direct.batch_execute("create table t (a text)").await.unwrap();
    for copy in ["copy t from stdin", "copy (select repeat('x', 1000) from generate_series(1, 100000000)) to stdout"] {
        let mut socket = gateway.raw_session().await;
        socket.write_all(&frame(b'Q', &[copy.as_bytes(), b"\0"].concat())).await.unwrap();
        // Part of a frame only.
        socket.write_all(b"d\0\x01\0\0half").await.unwrap();
        read_frame(&mut socket).await.unwrap();
        let running = async || {
            let sql = "select 1 from pg_stat_activity where query = $1 and pid <> pg_backend_pid()";
            !direct.query(sql, &[&copy]).await.unwrap().is_empty()
        };
        eventually("the copy runs", async || running().await).await;
        drop(socket);
        let started = Instant::now();
        eventually("the backing session ends", async || !running().await).await;
        assert!(started.elapsed() < Duration::from_secs(1), "{copy}: {:?}", started.elapsed());
    }
}

/// A server that has nothing to say would not notice; one whose client said goodbye finishes, as without a gateway.
#[tokio::test]
async fn a_client_that_vanishes_ends_what_runs_but_one_that_says_goodbye_does_not() {
    let gateway = start().await;
    let direct = gateway.connect_directly().await;
    direct.batch_execute("create table done (a text)").await.unwrap();
    for polite in [false, true] {
        let sql = format!("select pg_sleep({}); insert into done values ('{polite}')", if polite { 1 } else { 60 });
        let mut socket = gateway.raw_session().await;
        socket.write_all(&frame(b'Q', &[sql.as_bytes(), b"\0"].concat())).await.unwrap();
        let running = async || {
            let asked = "select from pg_stat_activity where query = $1 and wait_event = 'PgSleep'";
            !direct.query(asked, &[&sql]).await.unwrap().is_empty()
        };
        eventually("it runs", running).await;
        if polite {
            socket.write_all(&frame(b'X', b"")).await.unwrap();
        }
        drop(socket);
        let gone = Instant::now();
        eventually("it ends", async || !running().await).await;
        assert!(polite || gone.elapsed() < Duration::from_secs(1), "{:?}", gone.elapsed());
    }
    let done = async || {
        direct.query_one("select string_agg(a, ',') from done", &[]).await.unwrap().get::<_, Option<String>>(0)
    };
    eventually("the polite one's work is done", async || done().await.as_deref() == Some("true")).await;
}

fn resident_kilobytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_client_that_does_not_read_costs_no_memory() {
    let gateway = start().await;
    let direct = gateway.connect_directly().await;
    let mut sockets = Vec::new();
    let before = resident_kilobytes();
    for _ in 0..8 {
        let mut socket = gateway.raw_session().await;
        let text = b"select repeat('x', 10000000) from generate_series(1, 100) /* stalled */\0";
        socket.write_all(&frame(b'Q', text)).await.unwrap();
        sockets.push(socket);
    }
    eventually("the servers wait for their clients", async || {
        let sql = "select count(*) from pg_stat_activity where query like '%stalled%' and wait_event = 'ClientWrite'";
        direct.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 8
    })
    .await;
    let grown = resident_kilobytes().saturating_sub(before);
    // Other tests run at the same time in this process.
    assert!(grown < 40_000, "{grown} kB");
    // A row far larger than any buffer arrives whole.
    let (tags, row) = read_until(&mut sockets[0], b'D').await;
    assert_eq!((tags.as_str(), row.len()), ("TD", 10_000_006));
}

#[tokio::test]
async fn a_query_that_is_too_large_to_look_into_goes_on() {
    let gateway = start().await;
    let client = gateway.connect().await;
    let text = format!("select length('{}') -- peer", "x".repeat(20_000_000));
    let rows = client.simple_query(&text).await.unwrap();
    assert!(
        rows.iter().any(|m| matches!(m, tokio_postgres::SimpleQueryMessage::Row(r) if r.get(0) == Some("20000000")))
    );
    // Held whole, and not ours after all.
    let text = format!("select length('{}') -- peer", "x".repeat(8_000_000));
    client.simple_query(&text).await.unwrap();
}

#[tokio::test]
async fn hostile_first_packets_end_their_connection_and_nothing_else() {
    let gateway = start().await;
    let long = [&10_001_u32.to_be_bytes()[..], b"\0\x03\0\0"].concat();
    for packet in [
        &b""[..],
        b"\0",
        b"\0\0\0\0",
        b"\0\0\0\x04",
        b"\0\0\0\x07\0\x03\0\0",
        b"\xff\xff\xff\xff\0\x03\0\0",
        b"\x7f\xff\xff\xff\0\x03\0\0",
        b"\0\0\0\x08\0\x03\0\0",
        b"\0\0\0\x09\0\x03\0\0\0",
        b"\0\0\0\x08\0\x02\0\0",
        b"\0\0\0\x0c\0\x03\0\0user",
        b"\0\0\0\x10\0\x03\0\0user\0\0\0\0",
        b"\0\0\0\x08\x04\xd2\x16\x2e",
        b"\0\0\0\x0c\x04\xd2\x16\x2e\0\0\0\x01",
        b"\0\0\0\x10\x04\xd2\x16\x2e\0\0\0\x01\0\0\0\x02",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\0\xa5\x01\0",
        &long,
    ] {
        let mut socket = gateway.socket().await;
        socket.write_all(packet).await.unwrap();
        socket.shutdown().await.unwrap();
        let answer = read_to_end(&mut socket).await;
        assert!(answer.is_empty() || answer[0] == b'E', "{packet:?}: {answer:?}");
    }
    // After a good start, frames that cannot be.
    for bytes in [&b"Q\0\0\0\x03"[..], b"Q\xff\xff\xff\xff", b"P\0\0\0\0", b"\0\0\0\0\0\0\0", b"B\x80\0\0\0"] {
        let mut socket = gateway.raw_session().await;
        socket.write_all(bytes).await.unwrap();
        let answer = read_to_end(&mut socket).await;
        assert!(answer.windows(7).any(|w| w == b"C08P01\0"), "{bytes:?}: {}", String::from_utf8_lossy(&answer));
    }
    gateway.connect().await.query("select 1", &[]).await.unwrap();
}

#[tokio::test]
async fn encryption_is_refused_politely_without_a_certificate() {
    let gateway = start().await;
    let mut socket = gateway.socket().await;
    socket.write_all(b"\0\0\0\x08\x04\xd2\x16\x30").await.unwrap();
    assert_eq!(socket.read_u8().await.unwrap(), b'N');
    socket.write_all(SSL_REQUEST).await.unwrap();
    assert_eq!(socket.read_u8().await.unwrap(), b'N');
    for byte in startup(&gateway.database) {
        socket.write_all(&[byte]).await.unwrap();
    }
    read_until(&mut socket, b'Z').await;
}

#[tokio::test]
async fn tls_sessions_work_and_nothing_is_smuggled_into_them() {
    let gateway = start_with(|o| o.tls = Some(tls_files())).await;
    let name = ServerName::try_from("localhost").unwrap();
    // Asked for, and direct.
    for direct in [false, true] {
        let mut socket = gateway.socket().await;
        if !direct {
            socket.write_all(SSL_REQUEST).await.unwrap();
            assert_eq!(socket.read_u8().await.unwrap(), b'S');
        }
        let mut tls = connector(direct).connect(name.clone(), socket).await.unwrap();
        tls.write_all(&[startup(&gateway.database), frame(b'X', b"")].concat()).await.unwrap();
        let mut answer = Vec::new();
        // Without TLS' own goodbye this would be an error.
        tls.read_to_end(&mut answer).await.unwrap();
        assert!(answer.ends_with(b"Z\0\0\0\x05I"));
    }
    // A direct handshake must say what it is for.
    let refused = async {
        let mut tls = connector(false).connect(name.clone(), gateway.socket().await).await?;
        tls.write_all(&startup(&gateway.database)).await?;
        let mut answer = Vec::new();
        tls.read_to_end(&mut answer).await.map(|_| answer)
    };
    assert!(refused.await.unwrap_or_default().is_empty());
    // CVE-2021-23214: what comes in plain text behind the request is not taken for the session's.
    let mut socket = gateway.socket().await;
    socket.write_all(&[SSL_REQUEST, &startup(&gateway.database)].concat()).await.unwrap();
    assert_eq!(socket.read_u8().await.unwrap(), b'S');
    let mut tls = connector(false).connect(name, socket).await.unwrap();
    let mut answer = Vec::new();
    let _ = tls.read_to_end(&mut answer).await;
    assert!(answer.windows(7).any(|w| w == b"C08P01\0"), "{}", String::from_utf8_lossy(&answer));
}

#[tokio::test]
async fn plain_text_is_refused_when_tls_is_required() {
    let gateway = start_with(|o| (o.tls, o.tls_required) = (Some(tls_files()), true)).await;
    let error = gateway.config(gateway.address.port()).connect(NoTls).await.err().unwrap();
    assert_eq!(error.code().unwrap().code(), "28000");
    let output = gateway.run_psql(gateway.address.port(), "\\conninfo\n").await;
    assert!(String::from_utf8_lossy(&output.stdout).contains("SSL connection"));
}

#[tokio::test]
async fn sessions_and_logins_are_limited() {
    let gateway = start_with(|o| (o.sessions_max, o.login_timeout) = (2, Duration::from_millis(300))).await;
    let first = gateway.connect().await;
    let _second = gateway.connect().await;
    let error = gateway.config(gateway.address.port()).connect(NoTls).await.err().unwrap();
    assert_eq!(error.code().unwrap().code(), "53300");
    // A cancel request gets through all the same.
    first.cancel_token().cancel_query(NoTls).await.unwrap();
    drop(first);
    eventually("a place is free", async || gateway.config(gateway.address.port()).connect(NoTls).await.is_ok()).await;
    // Slow to say hello.
    let mut socket = gateway.socket().await;
    socket.write_all(b"\0\0").await.unwrap();
    assert!(read_to_end(&mut socket).await.is_empty());
}

#[tokio::test]
async fn a_backing_session_that_is_ended_ends_its_client_with_the_reason() {
    let gateway = start().await;
    let direct = gateway.connect_directly().await;
    let mut socket = gateway.raw_session().await;
    socket.write_all(&frame(b'Q', b"select pg_backend_pid()\0")).await.unwrap();
    let (_, row) = read_until(&mut socket, b'D').await;
    let pid: i32 = String::from_utf8(row[6..].to_vec()).unwrap().parse().unwrap();
    read_until(&mut socket, b'Z').await;
    direct.query("select pg_terminate_backend($1)", &[&pid]).await.unwrap();
    let answer = read_to_end(&mut socket).await;
    assert!(answer.windows(7).any(|w| w == b"C57P01\0"));
    assert_eq!(answer.windows(6).filter(|w| *w == b"SFATAL").count(), 1);
}

#[tokio::test]
async fn a_catalog_that_is_away_is_said_to_be() {
    let keyring = Arc::new(catalog::secret::Keyring::parse(&"5a".repeat(32)).unwrap());
    let options = catalog::peer::PeerOptions::plain([
        ("host", "127.0.0.1".to_owned()),
        ("port", catalog::cluster::free_port().unwrap().to_string()),
        ("sslmode", "disable".to_owned()),
    ]);
    let connector = catalog::connect::Connector::new(&options).unwrap();
    let catalog = catalog::Catalog::new(connector, keyring).unwrap();
    let options = gateway::server::ServerOptions::new("127.0.0.1:0".parse().unwrap());
    let server = gateway::server::Server::bind(options, catalog).await.unwrap();
    let port = server.local_addr().unwrap().port();
    let (_stop, stopped) = tokio::sync::watch::channel(false);
    tokio::spawn(server.serve(stopped));
    let config = format!("host=127.0.0.1 port={port} user=x");
    let error = tokio_postgres::connect(&config, NoTls).await.err().unwrap();
    assert_eq!(error.code().unwrap().code(), "08006");
}

#[tokio::test]
async fn a_shutdown_lets_running_statements_finish() {
    let mut gateway = start().await;
    let mut idle = gateway.raw_session().await;
    let _says_nothing = gateway.socket().await;
    let mut busy = gateway.raw_session().await;
    let direct = gateway.connect_directly().await;
    busy.write_all(&frame(b'Q', b"begin; select pg_advisory_lock(42)\0")).await.unwrap();
    read_until(&mut busy, b'Z').await;
    gateway.stop.send_replace(true);
    let answer = read_to_end(&mut idle).await;
    assert!(answer.windows(7).any(|w| w == b"C57P01\0"));
    let error = gateway.config(gateway.address.port()).connect(NoTls).await.err().unwrap();
    assert_eq!(error.code().unwrap().code(), "57P03");
    // A transaction is not torn.
    busy.write_all(&frame(b'Q', b"create table t ()\0")).await.unwrap();
    assert_eq!(read_until(&mut busy, b'Z').await.0, "CZ");
    busy.write_all(&frame(b'Q', b"commit\0")).await.unwrap();
    assert_eq!(read_until(&mut busy, b'Z').await.0, "CZ");
    assert!(read_to_end(&mut busy).await.windows(7).any(|w| w == b"C57P01\0"));
    let started = Instant::now();
    gateway.serving.take().unwrap().await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    direct.query("select from t", &[]).await.unwrap();
}

#[tokio::test]
async fn a_notification_does_not_make_a_session_busy() {
    let gateway = start().await;
    let mut socket = gateway.raw_session().await;
    socket.write_all(&frame(b'Q', b"listen news\0")).await.unwrap();
    read_until(&mut socket, b'Z').await;
    gateway.connect_directly().await.batch_execute("notify news").await.unwrap();
    assert_eq!(read_until(&mut socket, b'A').await.0, "A");
    gateway.stop.send_replace(true);
    // Long before the time for statements that run is over.
    let end = tokio::time::timeout(std::time::Duration::from_secs(5), read_until(&mut socket, b'E')).await;
    assert!(end.unwrap().1.windows(7).any(|field| field == b"C57P01\0"));
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_ever() {
    let mut gateway = start_with(|o| o.drain_timeout = Duration::from_millis(200)).await;
    let mut busy = gateway.raw_session().await;
    busy.write_all(&frame(b'Q', b"select pg_sleep(60)\0")).await.unwrap();
    gateway.stop.send_replace(true);
    assert!(read_to_end(&mut busy).await.windows(7).any(|w| w == b"C57P01\0"));
    gateway.serving.take().unwrap().await.unwrap().unwrap();
}

#[tokio::test]
async fn passwords_are_between_the_client_and_the_catalog() {
    let gateway = start_with(|o| o.tls = Some(tls_files())).await;
    let direct = gateway.connect_directly().await;
    let role = format!("scram_{:016x}", rand::random::<u64>());
    direct.batch_execute(&format!("create role {role} login password 's3cret'")).await.unwrap();
    let data: String = direct.query_one("show hba_file", &[]).await.unwrap().get(0);
    let rules = std::fs::read_to_string(&data).unwrap();
    std::fs::write(&data, format!("host all {role} all scram-sha-256\n{rules}")).unwrap();
    direct.query("select pg_reload_conf()", &[]).await.unwrap();
    let port = gateway.address.port();
    let connect = async |password: &str| {
        let mut config = gateway.config(port);
        config.user(&role).password(password).connect(NoTls).await.map(|(client, connection)| {
            tokio::spawn(connection);
            client
        })
    };
    eventually("the rule holds", async || connect("falsch").await.is_err()).await;
    let error = connect("falsch").await.err().unwrap();
    assert_eq!(error.as_db_error().unwrap().message(), format!("password authentication failed for user \"{role}\""));
    let client = connect("s3cret").await.unwrap();
    assert_eq!(client.query_one("select session_user::text", &[]).await.unwrap().get::<_, String>(0), role);
    // Over TLS libpq prefers to bind its exchange to the channel, and accepts that it cannot.
    let psql = catalog::cluster::Binaries::find(None).unwrap().tool("psql").unwrap();
    let dsn =
        format!("host=127.0.0.1 port={port} user={role} password=s3cret dbname={} sslmode=require", gateway.database);
    let output = tokio::process::Command::new(psql)
        .args(["-X", "-A", "-t", "-d", &dsn, "-c", "select session_user"])
        .output()
        .await;
    assert_eq!(String::from_utf8(output.unwrap().stdout).unwrap().trim(), role);
}
