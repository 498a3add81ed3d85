//! What a session may make the gateway hold.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::hostile::{bind, execute, parse, query, sync};
use crate::process::{Process, STUCK, in_time};
use crate::support::{frame, read_until};

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_never_answered_are_not_kept() {
    let process = Process::start().await;
    let mut socket = process.session().await;
    let (before, _) = process.memory_kb();
    // The server ignores the end of copy data where there is no copy, and after an error all but Sync.
    let ends = frame(b'c', b"").repeat(200_000);
    for _ in 0..20 {
        in_time("ends of nothing", socket.write_all(&ends)).await.unwrap();
    }
    socket.write_all(&[parse("", "select nonsense"), frame(b'H', b"")].concat()).await.unwrap();
    read_until(&mut socket, b'E').await;
    let requests = [parse("", "select 1"), bind("", ""), execute("", 0)].concat().repeat(50_000);
    for _ in 0..5 {
        in_time("requests after an error", socket.write_all(&requests)).await.unwrap();
    }
    socket.write_all(&[sync(), query("show peers")].concat()).await.unwrap();
    assert_eq!(in_time("the end of it", read_until(&mut socket, b'C')).await.0, "ZTC");
    read_until(&mut socket, b'Z').await;
    let (_, peak) = process.memory_kb();
    eprintln!("{before} kB before, {peak} kB at most");
    assert!(peak < before + 20_000, "{before} kB before, {peak} kB at most");
    drop(socket);
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_that_are_held_whole_are_let_go_afterwards() {
    let process = Process::alone(&[]).await;
    let (before, _) = process.memory_kb();
    process.forget_peak();
    let text = format!("show peers; select length('{}'); show tasks", "x".repeat(15 << 20));
    let one = async || {
        let client = process.client().await;
        let messages = in_time("a text of 15 MB", client.simple_query(&text)).await.unwrap();
        let complete = messages.iter().filter(|m| matches!(m, tokio_postgres::SimpleQueryMessage::CommandComplete(_)));
        assert_eq!(complete.count(), 3);
        client
    };
    let clients = tokio::join!(one(), one(), one(), one());
    let (_, peak) = process.memory_kb();
    // The message, what is made of it, and copies between.
    assert!(peak < before + 4 * 6 * 16 * 1024, "{before} kB before, {peak} kB at most");
    let mut more = Vec::new();
    for _ in 0..8 {
        more.push(one().await);
    }
    // The allocator keeps some for each of the threads, but no session keeps its text.
    let (after, _) = process.memory_kb();
    eprintln!("{before} kB before, {peak} kB at most, {after} kB after");
    assert!(after < before + 100_000, "{before} kB before, {after} kB after");
    drop((clients, more));
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_all_sessions_hold_together_is_bounded() {
    let process = Process::alone(&[]).await;
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(process.port()).user("postgres").dbname("peergate_admin");
    let (console, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    // Texts that lack their end: four of 15 MiB are held within 64 MiB.
    let text = query(format!("select length('{}')", "x".repeat(15 << 20)));
    let begun = &text[..text.len() - 1];
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut socket = process.session().await;
        in_time("a text that is held", socket.write_all(begun)).await.unwrap();
        held.push(socket);
    }
    let received = async || {
        let sessions = console.query("show sessions", &[]).await.unwrap();
        sessions.iter().map(|session| session.get::<_, i64>("bytes_received")).sum::<i64>()
    };
    let since = Instant::now();
    while received().await < 4 * begun.len() as i64 {
        assert!(since.elapsed() < STUCK * 2, "the texts are not read");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // One more has no place, and is told so when none has become free; what it still has to say is not read.
    let mut late = process.session().await;
    let (mut from, mut to) = late.split();
    let mut refusal = Vec::new();
    let writes = async {
        let _ = to.write_all(begun).await;
        std::future::pending().await
    };
    tokio::select! {
        _ = in_time("a refusal", from.read_to_end(&mut refusal)) => {}
        () = writes => {}
    }
    let refusal = String::from_utf8_lossy(&refusal);
    assert!(refusal.contains("FATAL") && refusal.contains("53200"), "{refusal}");
    // The others go on, and what they held can be had again.
    for socket in &mut held {
        socket.write_all(&text[text.len() - 1..]).await.unwrap();
        assert_eq!(in_time("its answer", read_until(socket, b'Z')).await.0, "TDCZ");
    }
    let mut again = process.session().await;
    again.write_all(&text).await.unwrap();
    assert_eq!(in_time("one more answer", read_until(&mut again, b'Z')).await.0, "TDCZ");
    drop((held, again, late, console));
    process.finish(&[]).await;
}
