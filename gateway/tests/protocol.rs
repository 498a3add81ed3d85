//! The corners of the protocol, with our statements in them: what Postgres does there, the gateway does too.

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::hostile::{bind, execute, parse, query, sync};
use crate::process::in_time;
use crate::support::{Gateway, frame, read_frame, read_to_end, read_until, start};

/// The SQLSTATE in an ErrorResponse.
fn code(body: &[u8]) -> String {
    let field = body.split(|b| *b == 0).find_map(|field| field.strip_prefix(b"C")).unwrap();
    String::from_utf8(field.to_vec()).unwrap()
}

/// Reads up to `count` ReadyForQuery; returns command tags, SQLSTATEs of errors, and `s` for a portal that has more.
async fn outcomes(socket: &mut TcpStream, count: usize) -> Vec<String> {
    let (mut out, mut ready) = (Vec::new(), 0);
    while ready < count {
        match read_frame(socket).await.unwrap() {
            (b'C', tag) => out.push(String::from_utf8(tag).unwrap().trim_end_matches('\0').to_owned()),
            (b'E', fields) => out.push(code(&fields)),
            (b's', _) => out.push("s".to_owned()),
            (b'I', _) => out.push(String::new()),
            (b'Z', _) => ready += 1,
            _ => {}
        }
    }
    out
}

async fn ask(socket: &mut TcpStream, messages: impl AsRef<[u8]>, ready: usize) -> Vec<String> {
    socket.write_all(messages.as_ref()).await.unwrap();
    in_time("an answer", outcomes(socket, ready)).await
}

/// One statement in the extended protocol, without its Sync.
fn extended(name: &str, text: &str) -> Vec<u8> {
    let describe = frame(b'D', &[b"S", name.as_bytes(), b"\0"].concat());
    [parse(name, text), describe, bind("", name), execute("", 0)].concat()
}

/// Our statements, each with its command tag or SQLSTATE in an empty catalog, and whether it writes.
const STATEMENTS: &[(&str, &str, bool)] = &[
    ("create peer p from postgres with (host = 'h', user = 'u', validate = false)", "CREATE PEER", true),
    ("create peer p from nothing with (validate = false)", "0A000", true),
    ("create peer p frm postgres", "42601", false),
    ("create or replace peer p from postgres with (host = 'h', user = 'u', validate = false)", "CREATE PEER", true),
    ("alter peer p set (password 'secret')", "42704", true),
    ("alter peer if exists p reset (password)", "ALTER PEER", true),
    ("alter peer p sett (password 'secret')", "42601", false),
    ("comment on mirror m is 'x'", "42704", true),
    ("show peer p", "42704", false),
    ("drop peer if exists p", "DROP PEER", true),
    ("drop peer p", "42704", true),
    ("create mirror m from p to q for all tables", "42704", true),
    ("drop mirror if exists m", "DROP MIRROR", true),
    ("pause mirror if exists m", "PAUSE MIRROR", true),
    ("resume mirror m", "42704", true),
    ("grant usage on peer p to postgres", "42704", true),
    ("revoke usage on peer p from postgres", "42704", true),
    ("show peers", "SELECT 0", false),
    ("show mirrors", "SELECT 0", false),
    ("show mirror m", "42704", false),
    ("/* a /* nested */ comment */ show -- and another\n peers", "SELECT 0", false),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_statement_comes_to_the_same_in_every_form() {
    let gateway = start().await;
    let mut socket = gateway.raw_session().await;
    let socket = &mut socket;
    for (statement, expected, writes) in STATEMENTS {
        let is_error = expected.len() == 5 && *expected != "BEGIN";
        let is_syntax = *expected == "42601";
        // Alone, and undone: each begins with an empty catalog.
        let expect = |before: &[&str], after: &[&str]| -> Vec<String> {
            let parts = [before, &[*expected], if is_error { &[] } else { after }].concat();
            // A syntax error anywhere in a text keeps all of it from running.
            if is_syntax { vec!["42601".to_owned()] } else { parts.into_iter().map(str::to_owned).collect() }
        };
        let rollback = query("rollback");
        let undone = async |socket: &mut TcpStream, text: &str| {
            let seen = ask(socket, query(text), 1).await;
            ask(socket, &rollback, 1).await;
            seen
        };
        assert_eq!(undone(socket, &format!("begin; {statement}")).await, expect(&["BEGIN"], &[]), "{statement}");
        let first = format!("{statement}; select 1; rollback");
        ask(socket, query("begin"), 1).await;
        assert_eq!(undone(socket, &first).await, expect(&[], &["SELECT 1", "ROLLBACK"]), "{statement}");
        let middle = format!("begin; select 'é', $$;peer;$$; {statement}; select 'mirror'");
        assert_eq!(undone(socket, &middle).await, expect(&["BEGIN", "SELECT 1"], &["SELECT 1"]), "{statement}");
        let savepoint = format!("begin; savepoint s; {statement}; rollback to s; select 1");
        let after = ["ROLLBACK", "SELECT 1"];
        assert_eq!(undone(socket, &savepoint).await, expect(&["BEGIN", "SAVEPOINT"], &after), "{statement}");
        // The implicit transaction of a text is undone by what fails last.
        let failing = format!("{statement}; select 1/0");
        assert_eq!(ask(socket, query(&failing), 1).await, expect(&[], &["22012"]), "{statement}");

        let read_only = undone(socket, &format!("begin read only; {statement}")).await;
        let refused = if *writes && !is_syntax { vec!["BEGIN", "25006"] } else { vec![] };
        // Only the catalog knows whether there is anything to write.
        let same = expect(&["BEGIN"], &[]);
        assert!(read_only == refused || read_only == same, "{statement}: {read_only:?}");
        assert!(*expected != "CREATE PEER" || read_only == refused, "{statement}: {read_only:?}");
        ask(socket, query("begin; select 1/0"), 1).await;
        let failed = undone(socket, statement).await;
        assert_eq!(failed, [if is_syntax { "42601" } else { "25P02" }], "{statement}");

        for name in ["", "named"] {
            let messages = [extended("", "begin"), sync(), extended(name, statement), sync()].concat();
            let seen = ask(socket, messages, 2).await;
            assert_eq!(seen, ["BEGIN", expected], "{statement}");
            ask(socket, &rollback, 1).await;
            ask(socket, [frame(b'C', &[b"S", name.as_bytes(), b"\0"].concat()), sync()].concat(), 1).await;
        }
        // In one pipeline with others: an error skips the rest, and takes back what came before.
        let pipeline = [extended("", "select 1"), extended("", statement), extended("", "select 1/0"), sync()].concat();
        let expected = if is_error { vec!["SELECT 1", expected] } else { vec!["SELECT 1", expected, "22012"] };
        assert_eq!(ask(socket, pipeline, 1).await, expected, "{statement}");
    }
    assert_eq!(ask(socket, query("select 1 from peers"), 1).await, ["SELECT 0"], "something was not undone");
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_requests_in_one_go_are_answered_in_order() {
    let gateway = start().await;
    let (mut messages, mut expected) = (Vec::new(), Vec::new());
    for n in 0..10_000 {
        match n % 100 {
            17 => {
                messages.push([extended("", "drop peer if exists p"), sync()].concat());
                expected.push("DROP PEER");
            }
            54 => {
                messages.push([extended("", "drop peer p"), extended("", "select 1"), sync()].concat());
                expected.push("42704");
            }
            _ => {
                messages.push([extended("", "select 1"), sync()].concat());
                expected.push("SELECT 1");
            }
        }
    }
    for n in 0..1_000 {
        let ours = n % 10 == 3;
        messages.push(query(if ours { "show peers" } else { "select 1" }));
        expected.push(if ours { "SELECT 0" } else { "SELECT 1" });
    }
    let (count, all) = (messages.len(), messages.concat());
    let mut socket = gateway.raw_session().await;
    let mut seen = Vec::new();
    let exchange = async {
        let (read, mut write) = socket.split();
        let mut read = tokio::io::BufReader::new(read);
        let reading = async {
            let mut ready = 0;
            while ready < count {
                use tokio::io::AsyncReadExt;
                let tag = read.read_u8().await.unwrap();
                let mut body = vec![0; read.read_u32().await.unwrap() as usize - 4];
                read.read_exact(&mut body).await.unwrap();
                match tag {
                    b'C' => seen.push(String::from_utf8(body).unwrap().trim_end_matches('\0').to_owned()),
                    b'E' => seen.push(code(&body)),
                    b'Z' => ready += 1,
                    _ => {}
                }
            }
        };
        let (written, ()) = tokio::join!(write.write_all(&all), reading);
        written.unwrap();
    };
    in_time("11,000 requests", exchange).await;
    assert_eq!(seen, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn portals_are_suspended_and_flushed_as_by_postgres() {
    let gateway = start().await;
    let mut socket = gateway.raw_session().await;
    for name in ["a", "b", "c"] {
        let create = format!("create peer {name} from postgres with (host = 'h', user = 'u', validate = false)");
        assert_eq!(ask(&mut socket, query(create), 1).await, ["CREATE PEER"]);
    }
    // Flush instead of Sync: answers come, and the transaction goes on.
    let flush = frame(b'H', b"");
    socket.write_all(&[parse("s", "show peers"), frame(b'D', b"Ss\0"), flush.clone()].concat()).await.unwrap();
    assert_eq!(in_time("Describe", read_until(&mut socket, b'T')).await.0, "1tT");
    socket.write_all(&[bind("p", "s"), execute("p", 2), flush.clone()].concat()).await.unwrap();
    assert_eq!(in_time("two rows", read_until(&mut socket, b's')).await.0, "2DDs");
    socket.write_all(&[execute("p", 2), flush].concat()).await.unwrap();
    let (tags, tag) = in_time("the third", read_until(&mut socket, b'C')).await;
    assert_eq!((tags.as_str(), &tag[..]), ("DC", &b"SELECT 1\0"[..]));
    socket.write_all(&sync()).await.unwrap();
    assert_eq!(in_time("Sync", read_until(&mut socket, b'Z')).await.0, "Z");
    // In a transaction a portal and a cursor outlive Sync, with statements of ours between.
    let begin = [query("begin; declare c cursor for select 1 union select 2"), bind("p", "s"), execute("p", 1), sync()];
    assert_eq!(ask(&mut socket, begin.concat(), 2).await, ["BEGIN", "DECLARE CURSOR", "s"]);
    let between = [query("fetch 1 from c; drop peer a; fetch 1 from c"), execute("p", 1), sync(), query("commit")];
    let seen = ask(&mut socket, between.concat(), 3).await;
    assert_eq!(seen, ["FETCH 1", "DROP PEER", "FETCH 1", "s", "COMMIT"]);
    assert_eq!(ask(&mut socket, [execute("p", 1), sync()].concat(), 1).await, ["34000"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn our_statements_have_their_tags_after_whatever_came_before() {
    let gateway = start().await;
    gateway.connect_directly().await.batch_execute("create table t (a int)").await.unwrap();
    let mut socket = gateway.raw_session().await;
    let copy = |text: &str| [parse("", text), bind("", ""), execute("", 0)].concat();
    let (data, done, fail) = (frame(b'd', b"1\n"), frame(b'c', b""), frame(b'f', b"enough\0"));
    let ours = [query("drop peer if exists p"), extended("", "drop mirror if exists m"), sync()].concat();
    let before: &[(&str, Vec<u8>, usize, &[&str])] = &[
        ("copied", [query("copy t from stdin"), data.clone(), done.clone()].concat(), 1, &["COPY 1"]),
        ("given up by the client", [query("copy t from stdin"), data.clone(), fail.clone()].concat(), 1, &["57014"]),
        (
            "given up by the server",
            [query("copy t from stdin"), frame(b'd', b"x\n"), done.clone()].concat(),
            1,
            &["22P02"],
        ),
        ("Sync in the copy", [copy("copy t from stdin"), sync(), data, sync(), done, sync()].concat(), 1, &["COPY 1"]),
        ("extended, given up", [copy("copy t from stdin"), fail, sync()].concat(), 1, &["57014"]),
        ("a function call", frame(b'F', b"\0\0\x03\xbd\0\x01\0\x01\0\x01\0\0\0\x04\0\0\0\0\0\x01"), 1, &[]),
        ("a function call that fails", frame(b'F', b"\xff\xff\xff\xff\0\0\0\0\0\0"), 1, &["42883"]),
        ("copy data outside of a copy", [frame(b'd', b"x"), frame(b'c', b""), frame(b'H', b"")].concat(), 0, &[]),
        ("nothing", query(""), 1, &[""]),
        ("several copies", query("copy t to stdout; copy t to stdout"), 1, &["COPY 2", "COPY 2"]),
        ("a skipped query", [parse("", "nonsense"), query("select 1"), sync()].concat(), 1, &["42601"]),
    ];
    for (what, messages, ready, expected) in before {
        let seen = ask(&mut socket, [&messages[..], &ours].concat(), ready + 2).await;
        assert_eq!(seen, [expected, &["DROP PEER", "DROP MIRROR"][..]].concat(), "{what}");
    }
}

/// A start-up packet.
fn packet(version: u32, parameters: &[&str]) -> Vec<u8> {
    let mut body = version.to_be_bytes().to_vec();
    for text in parameters {
        body.extend_from_slice(text.as_bytes());
        body.push(0);
    }
    body.push(0);
    [&(body.len() as u32 + 4).to_be_bytes()[..], &body].concat()
}

/// What a server says to a first packet: message types up to the first ReadyForQuery or its end, and SQLSTATEs.
async fn first_answer(port: u16, packet: &[u8]) -> (String, Vec<String>, Vec<u8>) {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    socket.write_all(packet).await.unwrap();
    let (mut tags, mut codes, mut negotiated) = (String::new(), Vec::new(), Vec::new());
    while let Ok((tag, body)) = in_time("a first answer", read_frame(&mut socket)).await {
        tags.push(char::from(tag));
        match tag {
            b'E' => codes.push(code(&body)),
            b'v' => negotiated = body,
            b'Z' => break,
            _ => {}
        }
    }
    (tags, codes, negotiated)
}

#[tokio::test(flavor = "multi_thread")]
async fn first_packets_are_answered_as_by_the_server() {
    let gateway = start().await;
    let database = gateway.database.as_str();
    let known = ["user", "postgres", "database", database];
    let with = |more: &[&'static str]| -> Vec<String> { known.iter().chain(more).map(|s| (*s).to_owned()).collect() };
    for (version, parameters) in [
        (0x0003_0000, with(&[])),
        (0x0003_0002, with(&[])),
        (0x0003_270f, with(&[])),
        (0x0003_0000, with(&["_pq_.nothing", "1", "_pq_.more", "x"])),
        (0x0003_0002, with(&["_pq_.nothing", "1"])),
        (0x0002_0000, with(&[])),
        (0x0004_0000, with(&[])),
        (0x0001_0000, with(&[])),
        (0x0003_0000, with(&["no_such_setting", "1"])),
        (0x0003_0000, with(&["options", "-c geqo=off", "DateStyle", "German", "extra_float_digits", "3"])),
        (0x0003_0000, with(&["client_encoding", "nonsense"])),
        (0x0003_0000, with(&["replication", "database"])),
        (0x0003_0000, vec!["database".to_owned(), database.to_owned()]),
        (0x0003_0000, vec!["user".to_owned(), "nobody_there".to_owned(), "database".to_owned(), database.to_owned()]),
    ] {
        let texts: Vec<&str> = parameters.iter().map(String::as_str).collect();
        let packet = packet(version, &texts);
        let direct = first_answer(gateway.cluster.port(), &packet).await;
        let through = first_answer(gateway.address.port(), &packet).await;
        assert_eq!(through, direct, "{version:08x} {parameters:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replication_sessions_copy_both_ways() {
    let gateway = start().await;
    let direct = gateway.connect_directly().await;
    direct.batch_execute("create table t (a int); create publication p for table t").await.unwrap();
    let mut socket = gateway.socket().await;
    let parameters = ["user", "postgres", "database", &gateway.database, "replication", "database"];
    socket.write_all(&packet(0x0003_0000, &parameters)).await.unwrap();
    read_until(&mut socket, b'Z').await;
    let create = query("CREATE_REPLICATION_SLOT peer TEMPORARY LOGICAL pgoutput NOEXPORT_SNAPSHOT");
    assert_eq!(ask(&mut socket, create, 1).await, ["CREATE_REPLICATION_SLOT"]);
    direct.batch_execute("insert into t values (1)").await.unwrap();
    let begin = "START_REPLICATION SLOT peer LOGICAL 0/0 (proto_version '1', publication_names 'p')";
    socket.write_all(&query(begin)).await.unwrap();
    assert_eq!(in_time("the stream", read_until(&mut socket, b'W')).await.0, "W");
    let mut seen = String::new();
    while !seen.ends_with("IC") {
        let (tag, body) = in_time("a change", read_frame(&mut socket)).await.unwrap();
        assert_eq!(tag, b'd');
        // XLogData: its header is 25 bytes, then comes the message.
        if body[0] == b'w' {
            seen.push(char::from(body[25]));
        }
    }
    assert_eq!(seen, "BRIC");
    // A status that asks for an answer, then the end, while the server may still be sending.
    let status = [&b"r"[..], &[0; 32], &[1]].concat();
    socket.write_all(&[frame(b'd', &status), frame(b'c', b"")].concat()).await.unwrap();
    let (tags, _) = in_time("the end of the stream", read_until(&mut socket, b'Z')).await;
    assert!(tags.contains('c') && tags.ends_with("CZ"), "{tags}");
    // Another grammar is spoken here: what looks like ours is the server's to answer.
    assert_eq!(ask(&mut socket, query("IDENTIFY_SYSTEM"), 1).await, ["IDENTIFY_SYSTEM"]);
    assert_eq!(ask(&mut socket, query("show peers"), 1).await, ["42704"]);
    socket.write_all(&frame(b'X', b"")).await.unwrap();
    read_to_end(&mut socket).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_in_sjis_pass_and_ours_in_ascii_work() {
    let gateway = start().await;
    let both = async |gateway: &Gateway, text: &[u8]| {
        let mut seen = Vec::new();
        for port in [gateway.cluster.port(), gateway.address.port()] {
            let mut socket = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let parameters = ["user", "postgres", "database", &gateway.database, "client_encoding", "SJIS"];
            socket.write_all(&packet(0x0003_0000, &parameters)).await.unwrap();
            read_until(&mut socket, b'Z').await;
            socket.write_all(&query(text)).await.unwrap();
            let mut answer = Vec::new();
            while answer.last().is_none_or(|(tag, _)| *tag != b'Z') {
                answer.push(in_time("an answer", read_frame(&mut socket)).await.unwrap());
            }
            seen.push(answer);
        }
        assert_eq!(seen[0], seen[1], "{}", text.escape_ascii());
    };
    // The second byte of each character is a backslash or a letter.
    both(&gateway, b"select '\x83\x5c', 'peer'; select '\x83\x4d\x83\x42' as mirror, 1/0").await;
    both(&gateway, b"select 'peer \x83' from nothing").await;
    let mut socket = gateway.raw_session().await;
    ask(&mut socket, query("set client_encoding = sjis"), 1).await;
    assert_eq!(
        ask(&mut socket, query("select 1; drop peer if exists p; drop peer p"), 1).await,
        ["SELECT 1", "DROP PEER", "42704"]
    );
}
