//! Ends and loads: whoever goes, the others are told and nothing is left; and what many or slow clients cost in memory.

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use catalog::cluster::Binaries;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_postgres::{Client, NoTls};

use crate::hostile::query;
use crate::process::{Process, in_time};
use crate::support::{eventually, frame, read_frame, read_to_end, read_until, startup};

/// A psql of its own, ended with the test.
struct Psql(Child);

impl Psql {
    fn start(process: &Process, sql: &str) -> Psql {
        let dsn = format!(
            "host=127.0.0.1 port={} user=postgres dbname={} application_name=victim",
            process.port(),
            process.database
        );
        let mut command = Command::new(Binaries::find(None).unwrap().tool("psql").unwrap());
        command.args(["-X", "-d", &dsn, "-c", sql]);
        Psql(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Psql {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn holds(client: &Client, condition: &str) -> bool {
    client.query_one(&format!("select {condition}"), &[]).await.unwrap().get(0)
}

/// Whether the victim's backing session is as described.
async fn victim_is(client: &Client, description: &str) -> bool {
    let from = "exists (select from pg_stat_activity where application_name = 'victim' and pid <> pg_backend_pid()";
    holds(client, &format!("{from} and {description})")).await
}

/// Kills a psql that does this, once its backing session is as described, and waits for that session's end.
async fn kill_and_wait(process: &Process, sql: &str, is: &str) {
    let direct = process.direct().await;
    let mut psql = Psql::start(process, sql);
    if sql.ends_with("from stdin") {
        psql.0.stdin.as_mut().unwrap().write_all(b"half a li").unwrap();
    }
    eventually(sql, async || victim_is(&direct, is).await).await;
    psql.0.kill().unwrap();
    let killed = Instant::now();
    while victim_is(&direct, "true").await {
        assert!(killed.elapsed() < Duration::from_secs(1), "{sql}: its session is still there");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    eprintln!("{sql}: freed after {:?}", killed.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_killed_in_a_copy_frees_its_backing_session_within_a_second() {
    let process = Process::start().await;
    process.direct().await.batch_execute("create table t (a text)").await.unwrap();
    kill_and_wait(&process, "copy t from stdin", "query like 'copy t%' and wait_event = 'ClientRead'").await;
    let rows = "select repeat('x', 1000) from generate_series(1, 1000000)";
    kill_and_wait(&process, &format!("copy ({rows}) to stdout"), "wait_event = 'ClientWrite'").await;
    kill_and_wait(&process, "begin; lock t; select 1; copy t from stdin", "wait_event = 'ClientRead'").await;
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_killed_in_a_query_frees_its_backing_session_within_a_second() {
    let process = Process::start().await;
    kill_and_wait(&process, "select pg_sleep(600)", "wait_event = 'PgSleep'").await;
    let count = "select count(*) from generate_series(1, 1000000000000)";
    kill_and_wait(&process, count, "state = 'active'").await;
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_of_the_server_ends_every_client_with_a_reason() {
    let process = Process::alone(&[("restart_after_crash", "on")]).await;
    let direct = process.direct().await;
    direct.batch_execute("create table t (a text)").await.unwrap();
    let mut ends = Vec::new();
    for sql in ["select 1", "begin; select 1", "select pg_sleep(600)", "copy t from stdin", "select 'the killed one'"] {
        let mut socket = process.session().await;
        socket.write_all(&query(sql)).await.unwrap();
        match sql {
            "select pg_sleep(600)" => {}
            "copy t from stdin" => drop(read_until(&mut socket, b'G').await),
            _ => drop(read_until(&mut socket, b'Z').await),
        }
        ends.push((sql, socket));
    }
    eventually("it sleeps", async || {
        holds(&direct, "exists (select from pg_stat_activity where wait_event = 'PgSleep')").await
    })
    .await;
    let pid = "select pid from pg_stat_activity where query like '%the killed one%' and pid <> pg_backend_pid()";
    let pid: i32 = direct.query_one(pid, &[]).await.unwrap().get(0);
    // The server ends all sessions when one of its processes dies in this way, and starts anew.
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    for (sql, mut socket) in ends {
        let answer = in_time(sql, read_to_end(&mut socket)).await;
        let text = String::from_utf8_lossy(&answer);
        let reasons = ["C57P01\0", "C57P02\0", "C57P03\0", "C08006\0"];
        assert!(text.contains("SFATAL") || text.contains("SWARNING"), "{sql}: {text}");
        assert!(reasons.iter().any(|reason| text.contains(reason)), "{sql}: {text}");
    }
    eventually("there are sessions again", async || {
        let mut socket = process.socket().await;
        let _ = socket.write_all(&startup(&process.database)).await;
        matches!(read_frame(&mut socket).await, Ok((b'R', _)))
    })
    .await;
    // The gateway may say that it could not reach the catalog.
    process.finish(&["catalog", "deadpool"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_ends_its_clients_and_a_new_one_is_used() {
    let mut process = Process::alone(&[]).await;
    let mut idle = process.session().await;
    let mut busy = process.session().await;
    busy.write_all(&query("select pg_sleep(600)")).await.unwrap();
    let cluster = std::sync::Arc::get_mut(&mut process.cluster).unwrap();
    tokio::task::block_in_place(|| cluster.cluster().restart().unwrap());
    for socket in [&mut idle, &mut busy] {
        let answer = in_time("a stopped server", read_to_end(socket)).await;
        let text = String::from_utf8_lossy(&answer);
        assert!(text.contains("C57P01\0"), "{text}");
        assert_eq!(text.matches("SFATAL").count(), 1, "{text}");
    }
    let mut socket = process.session().await;
    socket.write_all(&query("show peers")).await.unwrap();
    assert!(read_until(&mut socket, b'Z').await.0.starts_with('T'));
    drop(socket);
    process.finish(&["catalog", "deadpool"]).await;
}

/// Reads up to a ReadyForQuery at the end of what there is; returns how many bytes that was.
async fn read_to_ready(socket: &mut TcpStream) -> usize {
    let (mut bytes, mut buffer, mut tail) = (0, vec![0; 1 << 16], Vec::new());
    loop {
        let n = socket.read(&mut buffer).await.unwrap();
        assert!(n > 0, "closed after {bytes} bytes");
        bytes += n;
        tail.extend_from_slice(&buffer[..n]);
        tail.drain(..tail.len().saturating_sub(6));
        if tail == b"Z\0\0\0\x05I" {
            return bytes;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_slowly_costs_no_memory() {
    let process = Process::start().await;
    let direct = process.direct().await;
    let (before, _) = process.memory_kb();
    process.forget_peak();
    let mut readers = Vec::new();
    for sql in [
        "select repeat('x', 1000) from generate_series(1, 200000)",
        "copy (select repeat('x', 1000) from generate_series(1, 200000)) to stdout",
        // One row of 200 MB.
        "select repeat('x', 200000000)",
    ] {
        let mut socket = process.session().await;
        socket.write_all(&query(sql)).await.unwrap();
        readers.push((sql, socket));
    }
    let stopped =
        "count(*) = 3 from pg_stat_activity where wait_event = 'ClientWrite' and datname = current_database()";
    eventually("the server waits for them", async || holds(&direct, stopped).await).await;
    let (_, peak) = process.memory_kb();
    assert!(peak < before + 10_000, "{before} kB before, {peak} kB at most");
    for (sql, mut socket) in readers {
        let bytes = in_time(sql, read_to_ready(&mut socket)).await;
        assert!(bytes > 200_000_000, "{sql}: {bytes}");
    }
    let (after, peak) = process.memory_kb();
    eprintln!("600 MB to slow readers: {before} kB before, {peak} kB at most, {after} kB after");
    assert!(peak < before + 10_000, "{before} kB before, {peak} kB at most");
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_reads_slowly_costs_no_memory() {
    let process = Process::start().await;
    let direct = process.direct().await;
    let slow = "create table t (a text);
        create function wait() returns trigger language plpgsql as
            $$ begin perform pg_advisory_xact_lock(7); return new; end $$;
        create trigger wait before insert on t for each row execute function wait();
        select pg_advisory_lock(7)";
    direct.batch_execute(slow).await.unwrap();
    let (before, _) = process.memory_kb();
    process.forget_peak();
    let mut socket = process.session().await;
    socket.write_all(&query("copy t from stdin")).await.unwrap();
    read_until(&mut socket, b'G').await;
    let data = frame(b'd', format!("{}\n", "x".repeat(999)).as_bytes()).repeat(1000);
    let (mut read, mut write) = socket.into_split();
    let sent = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let sending = {
        let sent = sent.clone();
        tokio::spawn(async move {
            for _ in 0..100 {
                write.write_all(&data).await.unwrap();
                sent.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
            write.write_all(&frame(b'c', b"")).await.unwrap();
            write
        })
    };
    let waiting = "exists (select from pg_locks where locktype = 'advisory' and not granted)";
    eventually("the server waits", async || holds(&direct, waiting).await).await;
    // Until no more of it goes on: half a second without a megabyte having been taken.
    let mut last = (usize::MAX, Instant::now());
    in_time("the client is stopped", async {
        while last.1.elapsed() < Duration::from_millis(500) {
            let now = sent.load(std::sync::atomic::Ordering::Relaxed);
            if now != last.0 {
                last = (now, Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(last.0 < 50, "{} MB were taken", last.0);
    direct.batch_execute("select pg_advisory_unlock(7)").await.unwrap();
    let write = in_time("the rest", sending).await.unwrap();
    let mut answer = Vec::new();
    let complete = async {
        while !answer.ends_with(b"Z\0\0\0\x05I") {
            assert!(read.read_buf(&mut answer).await.unwrap() > 0);
        }
    };
    in_time("the end of the copy", complete).await;
    assert!(answer.windows(11).any(|w| w == b"COPY 100000"), "{}", String::from_utf8_lossy(&answer));
    let (after, peak) = process.memory_kb();
    eprintln!("100 MB to a slow server: {before} kB before, {peak} kB at most, {after} kB after");
    assert!(peak < before + 10_000, "{before} kB before, {peak} kB at most");
    drop((read, write));
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_sessions_cost_little() {
    let process = Process::alone(&[("max_connections", "250")]).await;
    drop(process.session().await);
    let (before, _) = process.memory_kb();
    let mut sessions = Vec::new();
    for _ in 0..200 {
        let mut socket = process.session().await;
        // They have worked before: what that took must be given back.
        socket.write_all(&query("select repeat('x', 100000)")).await.unwrap();
        read_until(&mut socket, b'Z').await;
        sessions.push(socket);
    }
    let (after, _) = process.memory_kb();
    let each = after.saturating_sub(before) / 200;
    eprintln!("200 idle sessions: {before} kB before, {after} kB after, {each} kB each");
    assert!(each < 64, "{each} kB each");
    drop(sessions);
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_cancel_requests_cancels_one_and_hurts_nobody() {
    let process = Process::start().await;
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(process.port()).user("postgres").dbname(&process.database);
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    let token = client.cancel_token();
    let mut bystander = process.session().await;
    let direct = process.direct().await;
    let running = tokio::spawn(async move { client.query("select pg_sleep(600)", &[]).await });
    eventually("it sleeps", async || {
        holds(
            &direct,
            "exists (select from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database())",
        )
        .await
    })
    .await;
    bystander.write_all(&query("select pg_sleep(0.5)")).await.unwrap();
    let mut storm = tokio::task::JoinSet::new();
    for n in 0..300_u32 {
        let port = process.port();
        storm.spawn(async move {
            let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            // A key that nobody has; every tenth is cut short, or far too long.
            let key = match n % 10 {
                0 => vec![0; 3],
                1 => vec![0xff; 300],
                _ => [n.to_be_bytes(), n.to_be_bytes()].concat(),
            };
            let body = [b"\x04\xd2\x16\x2e", &key[..]].concat();
            let _ = socket.write_all(&[&(body.len() as u32 + 4).to_be_bytes()[..], &body].concat()).await;
            let _ = socket.shutdown().await;
            read_to_end(&mut socket).await
        });
    }
    token.cancel_query(NoTls).await.unwrap();
    let canceled = in_time("the right one is canceled", running).await.unwrap().unwrap_err();
    assert_eq!(canceled.code().unwrap().code(), "57014");
    while let Some(answer) = in_time("the storm", storm.join_next()).await {
        let answer = answer.unwrap();
        assert!(answer.is_empty() || answer[0] == b'E', "{answer:?}");
    }
    assert_eq!(in_time("the bystander", read_until(&mut bystander, b'Z')).await.0, "TDCZ");
    drop(bystander);
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_what_runs_finish() {
    let process = Process::start().await;
    let direct = process.direct().await;
    direct.batch_execute("create table t (a int); select pg_advisory_lock(9)").await.unwrap();
    let mut idle = process.session().await;
    let mut busy = process.session().await;
    busy.write_all(&query("insert into t values (1); select pg_advisory_lock(9)")).await.unwrap();
    let waiting = "exists (select from pg_locks where locktype = 'advisory' and not granted and objid = 9)";
    eventually("it waits", async || holds(&direct, waiting).await).await;
    process.server.signal(Signal::SIGTERM);
    let answer = in_time("an idle session", read_to_end(&mut idle)).await;
    assert!(answer.windows(7).any(|w| w == b"C57P01\0"), "{}", String::from_utf8_lossy(&answer));
    let mut late = process.socket().await;
    late.write_all(&startup(&process.database)).await.unwrap();
    let answer = in_time("a late login", read_to_end(&mut late)).await;
    assert!(answer.windows(7).any(|w| w == b"C57P03\0"), "{}", String::from_utf8_lossy(&answer));
    direct.batch_execute("select pg_advisory_unlock(9)").await.unwrap();
    assert!(in_time("the statement", read_until(&mut busy, b'Z')).await.0.ends_with('Z'));
    let answer = in_time("its end", read_to_end(&mut busy)).await;
    assert!(answer.windows(7).any(|w| w == b"C57P01\0"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(direct.query_one("select count(*) from t", &[]).await.unwrap().get::<_, i64>(0), 1);
    let Process { server, _place, .. } = process;
    // It checks the exit status, and how long it took.
    let log = tokio::task::spawn_blocking(|| server.stop()).await.unwrap();
    assert!(!log.contains("panicked") && !log.contains("ERROR"), "{log}");
}
