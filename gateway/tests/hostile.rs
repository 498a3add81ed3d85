//! Clients that do not keep to the rules, or take them to their limits: never a panic, never a stuck session, never memory without
//! bound, and where the server has an answer, the server's.
//!
//! What is random comes from `HOSTILE_SEED`, which each run prints.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::process::{Process, begin, in_time, seed};
use crate::properties;
use crate::support::{eventually, frame, read_frame, read_to_end, read_until, startup};

/// What the last query of a script gives, so that its answer can be told from those before.
const LAST: &str = "the last answer";

pub(crate) fn query(text: impl AsRef<[u8]>) -> Vec<u8> {
    frame(b'Q', &[text.as_ref(), b"\0"].concat())
}

pub(crate) fn parse(name: &str, text: impl AsRef<[u8]>) -> Vec<u8> {
    frame(b'P', &[name.as_bytes(), b"\0", text.as_ref(), b"\0\0\0"].concat())
}

pub(crate) fn bind(portal: &str, statement: &str) -> Vec<u8> {
    frame(b'B', &[portal.as_bytes(), b"\0", statement.as_bytes(), b"\0\0\0\0\0\0\0"].concat())
}

pub(crate) fn execute(portal: &str, rows: u32) -> Vec<u8> {
    frame(b'E', &[portal.as_bytes(), b"\0", &rows.to_be_bytes()].concat())
}

pub(crate) fn sync() -> Vec<u8> {
    frame(b'S', b"")
}

/// Ends whatever a script has begun, and asks for the last answer.
fn epilogue() -> Vec<u8> {
    [frame(b'f', b"over\0"), sync(), query("rollback"), query(format!("select '{LAST}'"))].concat()
}

/// Sends a script in pieces and reads its answers, up to the last one or the other side's end.
async fn answers(mut socket: TcpStream, script: Vec<u8>, pieces: Vec<usize>) -> Vec<(char, Vec<u8>)> {
    let (read, mut write) = socket.split();
    let mut read = tokio::io::BufReader::new(read);
    let writing = async {
        let mut from = 0;
        for to in pieces.into_iter().chain([script.len()]) {
            // The other side may have had enough.
            if write.write_all(&script[from..to]).await.is_err() {
                break;
            }
            from = to;
            tokio::task::yield_now().await;
        }
    };
    let reading = async {
        let mut answers = Vec::new();
        loop {
            let Ok(tag) = read.read_u8().await else { return answers };
            let Ok(length) = read.read_u32().await else { return answers };
            let mut body = vec![0; length as usize - 4];
            if read.read_exact(&mut body).await.is_err() {
                return answers;
            }
            let last = tag == b'D' && body.ends_with(LAST.as_bytes());
            answers.push((char::from(tag), body));
            if last {
                return answers;
            }
        }
    };
    tokio::join!(writing, reading).1
}

/// A message that a client might send, mostly well-formed, in no order at all.
fn message(random: &mut StdRng, texts: &[&[u8]]) -> Vec<u8> {
    let name = *["", "", "a", "b"].choose(random).unwrap();
    let statement = *["", "", "a", "b"].choose(random).unwrap();
    let text = *texts.choose(random).unwrap();
    let whole = match random.random_range(0..26) {
        0..5 => query(text),
        5..8 => parse(statement, text),
        8..11 => bind(name, statement),
        11..13 => frame(b'D', &[&[one_of(random, b"SPx")], name.as_bytes(), b"\0"].concat()),
        13..17 => execute(name, random.random_range(0..3)),
        17 => frame(b'C', &[&[one_of(random, b"SP")], name.as_bytes(), b"\0"].concat()),
        18..21 => sync(),
        21 => frame(b'H', b""),
        22 => frame(b'd', if random.random() { b"1\tx\n" } else { b"no number\n" }),
        23 => frame(b'c', b""),
        24 => frame(b'f', b"no more\0"),
        _ => frame(b'F', &random.random::<[u8; 12]>()),
    };
    if random.random_range(0..12) > 0 {
        return whole;
    }
    // Cut short, or with bytes too many, but as long as it says.
    let mut body = whole[5..].to_vec();
    body.truncate(random.random_range(0..=body.len()));
    body.extend_from_slice(&vec![0xff; random.random_range(0..3)]);
    frame(whole[0], &body)
}

fn one_of(random: &mut StdRng, bytes: &[u8]) -> u8 {
    *bytes.choose(random).unwrap()
}

/// Texts that mean the same in every session.
const THEIRS: &[&[u8]] = &[
    b"",
    b";",
    b"select 1",
    b"select 1; select 'two'",
    b"select * from generate_series(1, 300)",
    b"select nonsense",
    b"select 1; select 1/0; select 2",
    b"select $1::text",
    b"select 'mirror', 'peer' -- show peers",
    b"select '\xff\xfe'",
    b"select \xe9",
    b"begin",
    b"commit",
    b"rollback",
    b"savepoint s",
    b"rollback to s",
    b"insert into t values (1, 'x') returning a + 0",
    b"copy t from stdin",
    b"copy t to stdout",
    b"select 1; copy t from stdin; select 2",
    b"create temp table u (a int)",
    b"prepare a as select 1",
    b"declare b cursor with hold for select 1",
    b"set client_encoding = latin1",
    b"set client_encoding = sjis",
    b"set standard_conforming_strings = off; select 'a\\'",
    b"do $$ begin raise notice 'mirror'; end $$",
    b"discard all",
    b"/* peer",
    b"select 'peer",
];

const OURS: &[&[u8]] = &[
    b"show peers",
    b"select 1; show mirrors; select 1/0",
    b"drop peer if exists nobody",
    b"drop peer nobody; select 1",
    b"create peer x from postgres with (host = $1)",
    b"create peer x from postgres with (host = 'x', validate = false)",
    b"create peer x from postgres with (host = '\xff', validate = false)",
    b"create peer x frm",
    b"alter peer x set (password 'y')",
    b"wait for mirror nobody timeout '1 ms'",
    b"show mirror nobody",
    b"begin; show tasks",
];

#[tokio::test(flavor = "multi_thread")]
async fn messages_in_any_order_are_answered_as_by_the_server() {
    let process = Process::start().await;
    let mut random = StdRng::seed_from_u64(seed());
    for n in 0..150 {
        let mut messages = vec![query("create temp table t (a int, b text)")];
        messages.extend((0..random.random_range(1..30)).map(|_| message(&mut random, THEIRS)));
        if random.random_range(0..10) == 0 {
            let tag = one_of(&mut random, b"\0zp?\xff");
            messages.insert(random.random_range(1..messages.len()), frame(tag, b"what is this"));
        }
        let script = [messages.concat(), epilogue()].concat();
        let mut pieces: Vec<usize> =
            (0..random.random_range(0..20)).map(|_| random.random_range(0..script.len())).collect();
        pieces.sort_unstable();
        let mut seen = Vec::new();
        for (port, pieces) in [(process.cluster.port(), Vec::new()), (process.port(), pieces)] {
            let socket = begin(TcpStream::connect(("127.0.0.1", port)).await.unwrap(), &process.database).await;
            seen.push(in_time("a script", answers(socket, script.clone(), pieces)).await);
        }
        let (direct, through) = (&seen[0], &seen[1]);
        // A server that ends a session while something is on its way to it resets the connection, which can overtake its last words.
        let ended = !direct.iter().chain(through).any(|(tag, body)| *tag == 'D' && body.ends_with(LAST.as_bytes()));
        for (at, (direct, through)) in direct.iter().zip(through).enumerate() {
            assert_eq!(direct, through, "script {n}, answer {at}: {}", script.escape_ascii());
        }
        assert!(ended || direct.len() == through.len(), "script {n}: {}", script.escape_ascii());
    }
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn our_statements_in_any_order_are_answered() {
    let process = Process::start().await;
    let mut random = StdRng::seed_from_u64(seed());
    let texts = [THEIRS, OURS, OURS, OURS].concat();
    for n in 0..150 {
        let mut messages = vec![query("create temp table t (a int, b text)")];
        messages.extend((0..random.random_range(1..30)).map(|_| message(&mut random, &texts)));
        let script = [messages.concat(), epilogue()].concat();
        let answers = in_time("a script", answers(process.session().await, script.clone(), Vec::new())).await;
        // The server gives up a session in which what is no copy data comes in the middle of it.
        let is_end =
            |tag, body: &[u8]| tag == 'D' && body.ends_with(LAST.as_bytes()) || tag == 'E' && code(body) == "08P01";
        let end = answers.last().is_some_and(|(tag, body)| is_end(*tag, body));
        assert!(end, "script {n} is not answered to its end: {}", script.escape_ascii());
        for (tag, body) in answers {
            let text = String::from_utf8_lossy(&body);
            assert!(tag != 'E' && tag != 'N' || !text.contains("GW001"), "{text}");
        }
    }
    // What the scripts have made.
    process.client().await.batch_execute("drop peer if exists x").await.unwrap();
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_messages_end_their_session_and_nothing_else() {
    let process = Process::start().await;
    let mut random = StdRng::seed_from_u64(seed());
    let texts = [THEIRS, OURS].concat();
    for n in 0..200 {
        let mut bytes: Vec<u8> = (0..random.random_range(1..20)).flat_map(|_| message(&mut random, &texts)).collect();
        let login = n % 4 == 0;
        if login {
            bytes = [startup(&process.database), bytes].concat();
        }
        for _ in 0..random.random_range(1..8) {
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..5) {
                0 => bytes[at] = random.random(),
                1 => bytes[at] ^= 1 << random.random_range(0..8),
                2 => bytes.truncate(at.max(1)),
                3 => drop(bytes.splice(at..at, random.random::<[u8; 5]>())),
                _ => {
                    let length = odd_length(&mut random);
                    let end = (at + 4).min(bytes.len());
                    bytes.splice(at..end, length.to_be_bytes());
                }
            }
        }
        let mut socket = if login { process.socket().await } else { process.session().await };
        let exchange = async {
            let (mut read, mut write) = socket.split();
            let writing = async {
                // The other side may have had enough.
                let _ = write.write_all(&bytes).await;
                let _ = write.shutdown().await;
            };
            let mut answer = Vec::new();
            let (_, _) = tokio::join!(writing, read.read_to_end(&mut answer));
        };
        in_time(&format!("after {}", bytes.escape_ascii()), exchange).await;
    }
    process.finish(&[]).await;
}

/// A length that is wrong, or only just right.
fn odd_length(random: &mut StdRng) -> i32 {
    *[0, 1, 2, 3, 4, 5, -1, i32::MIN, i32::MAX, 0x0100_0000, 0x00ff_ffff, 10_001].choose(random).unwrap()
}

#[test]
fn what_the_fuzzers_look_for_holds_for_seeded_bytes_too() {
    let mut random = StdRng::seed_from_u64(seed());
    let words: Vec<&[u8]> = include_str!("../../fuzz/words.dict")
        .lines()
        .filter_map(|line| line.strip_prefix('"')?.strip_suffix('"'))
        .map(str::as_bytes)
        .chain([&b"; "[..], b", ", b") ", b" a ", b"\0", b"'", b"\"", b"(", b"{", b"\xff", b"\n"])
        .collect();
    for _ in 0..20_000 {
        let mut data = vec![random.random()];
        for _ in 0..random.random_range(0..14) {
            data.extend_from_slice(words.choose(&mut random).unwrap());
        }
        properties::text(&data);
        // A step of a script is two bytes and what follows them.
        let mut script = vec![random.random()];
        for _ in 0..random.random_range(0..14) {
            let body: Vec<u8> =
                (0..random.random_range(0..5)).flat_map(|_| words.choose(&mut random).unwrap().to_vec()).collect();
            script.extend_from_slice(&[random.random(), body.len().min(255) as u8]);
            script.extend_from_slice(&body);
        }
        properties::frames(&script);
    }
    for seeds in ["text", "frames"] {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(seeds);
        for file in std::fs::read_dir(folder).unwrap() {
            let data = std::fs::read(file.unwrap().path()).unwrap();
            if seeds == "text" { properties::text(&data) } else { properties::frames(&data) }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_of_a_hundred_megabytes_pass_and_are_not_held() {
    let process = Process::alone(&[]).await;
    let client = process.client().await;
    let (before, _) = process.memory_kb();
    let long = "x".repeat(100 << 20);
    for text in [format!("select length('{long}') -- peer"), format!("select length('{long}'), 'mirror'; select 1")] {
        process.forget_peak();
        let rows = in_time("a text of 100 MB", client.simple_query(&text)).await.unwrap();
        assert!(
            rows.iter()
                .any(|m| matches!(m, tokio_postgres::SimpleQueryMessage::Row(r) if r.get(0) == Some("104857600")))
        );
        let (_, peak) = process.memory_kb();
        assert!(peak < before + 20_000, "{before} kB before, {peak} kB at most");
    }
    // Too long to be looked into, as docs/limits.md says: the server answers.
    let error = in_time("ours", client.simple_query(&format!("show peers -- {long}"))).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42704");
    drop(client);
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_statements_in_one_text_are_all_answered() {
    let process = Process::alone(&[]).await;
    let mut socket = process.session().await;
    let statements: Vec<String> = (0..20_000)
        .map(|n| match n % 10 {
            3 => "show peers".to_owned(),
            7 => format!("drop peer if exists nobody_{n}"),
            _ => format!("select {n}"),
        })
        .collect();
    socket.write_all(&query(statements.join(";\n"))).await.unwrap();
    let (mut tags, mut notices) = (Vec::new(), 0);
    let reading = async {
        loop {
            match read_frame(&mut socket).await.unwrap() {
                (b'C', tag) => tags.push(String::from_utf8(tag).unwrap()),
                (b'N', _) => notices += 1,
                (b'E', fields) => panic!("{}", String::from_utf8_lossy(&fields)),
                (b'Z', _) => return,
                _ => {}
            }
        }
    };
    in_time("20,000 statements", reading).await;
    assert_eq!((tags.len(), notices), (20_000, 2_000));
    assert_eq!(tags.iter().filter(|tag| *tag == "DROP PEER\0").count(), 2_000);
    // The error of the last is where it is in the client's text, and undoes all.
    let text =
        [&["create table t ()".to_owned()][..], &statements, &["drop peer nobody".to_owned()]].concat().join(";");
    socket.write_all(&query(&text)).await.unwrap();
    let (_, fields) = in_time("20,001 statements", read_until(&mut socket, b'E')).await;
    let fields = String::from_utf8(fields).unwrap();
    let position = format!("\0P{}\0", text.rfind("nobody").unwrap() + 1);
    assert!(fields.contains(&position) && fields.contains("\0C42704\0"), "{fields}");
    read_until(&mut socket, b'Z').await;
    drop(socket);
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_cut_anywhere_are_answered_alike() {
    let process = Process::start().await;
    let script = [
        query("select 'é'; show peers; drop peer if exists nobody; select nonsense"),
        parse("s", "wait for mirror nobody timeout $1"),
        frame(b'D', b"Ss\0"),
        frame(b'B', b"p\0s\0\0\0\0\x01\0\0\0\x04\x31 ms\0\0"),
        execute("p", 0),
        sync(),
        query("create peer x frm postgres"),
        epilogue(),
    ]
    .concat();
    let whole = in_time("whole", answers(process.session().await, script.clone(), Vec::new())).await;
    let errors: Vec<&str> = whole.iter().filter(|(tag, _)| *tag == 'E').map(|(_, body)| code(body)).collect();
    assert_eq!(errors, ["42703", "42704", "42601"]);
    // Round trips on another session let the gateway read the first part before the second is sent.
    let mut other = process.session().await;
    for at in 1..script.len() {
        let mut socket = process.session().await;
        socket.write_all(&script[..at]).await.unwrap();
        other.write_all(&query("")).await.unwrap();
        read_until(&mut other, b'Z').await;
        let rest = in_time("a cut", answers(socket, script[at..].to_vec(), Vec::new())).await;
        assert_eq!(rest, whole, "cut at {at}");
    }
    // And all of it one byte at a time, the start-up packet too.
    let mut socket = process.socket().await;
    for byte in startup(&process.database) {
        socket.write_all(&[byte]).await.unwrap();
    }
    read_until(&mut socket, b'Z').await;
    let bytes = in_time("single bytes", answers(socket, script.clone(), (1..script.len()).collect())).await;
    assert_eq!(bytes, whole);
    drop(other);
    process.finish(&[]).await;
}

/// The SQLSTATE in an ErrorResponse.
fn code(body: &[u8]) -> &str {
    let field = body.split(|b| *b == 0).find_map(|field| field.strip_prefix(b"C")).unwrap();
    std::str::from_utf8(field).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_say_nothing_hold_nobody_up() {
    let process = Process::start_with("sessions_max = 40\nlogin_timeout = \"2s\"\n").await;
    let mut session = process.session().await;
    let (before, _) = process.memory_kb();
    let packet = startup(&process.database);
    let mut silent = Vec::new();
    for n in 0..300 {
        let mut socket = process.socket().await;
        // Nothing, or the beginning of a start-up packet. The gateway may have closed it already: there are too many.
        let _ = socket.write_all(&packet[..n % packet.len()]).await;
        silent.push(socket);
    }
    session.write_all(&query("select 1")).await.unwrap();
    assert_eq!(in_time("a session among them", read_until(&mut session, b'Z')).await.0, "TDCZ");
    let (_, peak) = process.memory_kb();
    assert!(peak < before + 20_000, "{before} kB before, {peak} kB at most");
    // They are ended without a word: nobody has said who is there.
    for mut socket in silent {
        assert!(in_time("a silent one", read_to_end(&mut socket)).await.is_empty());
    }
    eventually("there is room again", async || {
        let mut socket = process.socket().await;
        socket.write_all(&packet).await.is_ok() && matches!(read_frame(&mut socket).await, Ok((b'R', _)))
    })
    .await;
    drop(session);
    process.finish(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn start_up_packets_are_as_long_as_the_server_takes_them() {
    let process = Process::start().await;
    let packet = |length: usize| {
        let name =
            [b"\0\x03\0\0user\0postgres\0database\0", process.database.as_bytes(), b"\0application_name\0"].concat();
        let filler = vec![b'x'; length - 4 - name.len() - 2];
        [&(length as u32).to_be_bytes()[..], &name, &filler, b"\0\0"].concat()
    };
    for (length, taken) in [(10_000, true), (10_004, true), (10_005, false), (20_000, false)] {
        for port in [process.cluster.port(), process.port()] {
            let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            // One that is too long is refused before it is read.
            let _ = socket.write_all(&packet(length)).await;
            let first = tokio::time::timeout(Duration::from_secs(10), socket.read_u8()).await.unwrap();
            assert_eq!(matches!(first, Ok(b'R')), taken, "{length} bytes to {port}: {first:?}");
        }
    }
    process.finish(&[]).await;
}
