//! Our statements through psql and a driver: results, tags, errors with their positions, transactions, secrets.

use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_postgres::error::ErrorPosition;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::support::{eventually, frame, read_to_end, read_until, start, startup};

async fn peers(client: &Client) -> Vec<String> {
    client.query("select name from peers order by name", &[]).await.unwrap().iter().map(|r| r.get(0)).collect()
}

/// SQLSTATE, position and message of an error.
fn said(error: &tokio_postgres::Error) -> (String, Option<u32>, String) {
    let error = error.as_db_error().unwrap_or_else(|| panic!("{error:?}"));
    let position = match error.position() {
        Some(ErrorPosition::Original(n)) => Some(*n),
        _ => None,
    };
    (error.code().code().to_owned(), position, error.message().to_owned())
}

#[tokio::test]
async fn psql_sees_tags_errors_and_positions() {
    let gateway = start().await;
    let options = gateway.peer_options();
    let script = "\
create peer shop from postgres with (OPTIONS);
create peer shop from postgres with (user = 'u');
create peer if not exists shop from postgres with (OPTIONS);
create peer if not exists shop from postgres with (user = 'u');
create peer x frm postgres with (password = 'geheim');
create peer x from postgres with (hosst = 'h', user = 'u', validate = false);
create peer x from postgres with (user = 'u', sslmode = 'nope', validate = false);
create peer x from mysql;
select 'é' as a\\; drop peer shop, nix;
select 'é' as a\\; show peers\\; select nonsense;
create mirror m from shop to shop for table t set (a = b(a));
create mirror m from shop to shp for table a to b;
wait for mirror m lsn 'x';
show mirror m;
alter peer shop sett (password 'geheim');
create peer x from postgres with (host = $1);
\\set QUIET off
drop peer shop;
drop peer if exists shop;
";
    let output = gateway.psql(&script.replace("OPTIONS", &options)).await;
    let peer_columns = "name | type | host | port | database | user | mirrors";
    let output: String = output
        .lines()
        .filter(|l| !l.starts_with(" shop | ") && !l.starts_with("DETAIL:  Valid"))
        .map(|l| format!("{l}\n"))
        .collect();
    let expected = r#"ERROR:  42710: peer "shop" already exists
LINE 1: create peer shop from postgres with (user = 'u');
                    ^
NOTICE:  42710: peer "shop" already exists, skipping
NOTICE:  42710: peer "shop" already exists, skipping
NOTICE:  00000: the existing peer "shop" has different options, which were not changed
ERROR:  42601: syntax error at or near "frm"
LINE 1: create peer x frm postgres with (password = 'geheim');
                      ^
LOCATION:  scanner_yyerror, scan.l:1188
ERROR:  HV00D: unrecognized peer option "hosst"
LINE 1: create peer x from postgres with (hosst = 'h', user = 'u', v...
                                          ^
HINT:  Did you mean "host"?
ERROR:  22023: invalid value for option "sslmode": "nope"
LINE 1: ... peer x from postgres with (user = 'u', sslmode = 'nope', va...
                                                             ^
DETAIL:  It takes one of: disable, allow, prefer, require, verify-ca, verify-full.
ERROR:  0A000: peer type "mysql" is not supported
LINE 1: create peer x from mysql;
                           ^
DETAIL:  Supported types are: POSTGRES.
 a 
---
 é
(1 row)

ERROR:  42704: peer "nix" does not exist
LINE 1: select 'é' as a; drop peer shop, nix;
                                         ^
 a 
---
 é
(1 row)

 PEER COLUMNS 
(1 row)

ERROR:  42703: column "nonsense" does not exist
LINE 1: select 'é' as a; show peers; select nonsense;
                                            ^
LOCATION:  errorMissingColumn, parse_relation.c:3665
ERROR:  0A000: a column expression (SET) is not supported yet
LINE 1: create mirror m from shop to shop for table t set (a = b(a))...
                                                      ^
ERROR:  42704: peer "shp" does not exist
LINE 1: create mirror m from shop to shp for table a to b;
                                     ^
HINT:  Did you mean "shop"?
ERROR:  22P02: invalid input syntax for type pg_lsn: "x"
LINE 1: wait for mirror m lsn 'x';
                              ^
ERROR:  42704: mirror "m" does not exist
LINE 1: show mirror m;
                    ^
ERROR:  42601: syntax error at or near "sett"
LINE 1: alter peer shop sett (password 'geheim');
                        ^
ERROR:  42P02: there is no parameter $1
LINE 1: create peer x from postgres with (host = $1);
                                                 ^
DROP PEER
NOTICE:  00000: peer "shop" does not exist, skipping
DROP PEER
"#;
    let without_rules = |text: &str| -> String {
        // The lines under headings are as wide as the values; LOCATION is the server version's.
        let kept = text.lines().filter(|l| !l.starts_with("---") && !l.starts_with("LOCATION") || *l == "---");
        kept.filter(|l| !l.starts_with("------"))
            .map(|l| format!("{}\n", l.split_whitespace().collect::<Vec<_>>().join(" ")))
            .collect()
    };
    assert_eq!(without_rules(&output), without_rules(&expected.replace("PEER COLUMNS", peer_columns)));
    assert!(!gateway.server_log().contains("geheim"));
}

#[tokio::test]
async fn statements_are_part_of_the_client_s_transaction() {
    let gateway = start().await;
    let mut client = gateway.connect().await;
    let options = format!("{}, password = 'geheim'", gateway.peer_options());
    let create = |name: &str| format!("create peer {name} from postgres with ({options})");

    let transaction = client.transaction().await.unwrap();
    transaction.batch_execute(&create("a")).await.unwrap();
    assert_eq!(transaction.query("select name from peers", &[]).await.unwrap().len(), 1);
    transaction.rollback().await.unwrap();
    assert!(peers(&client).await.is_empty());

    let transaction = client.transaction().await.unwrap();
    transaction.batch_execute(&create("a")).await.unwrap();
    transaction.batch_execute(&format!("savepoint s; {}; rollback to s", create("b"))).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(peers(&client).await, ["a"]);

    // One string is one transaction: the last statement undoes the first.
    let script = format!("{}; create table t (a int); select 'é' / 0", create("c"));
    let error = client.batch_execute(&script).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "22P02");
    assert_eq!(peers(&client).await, ["a"]);
    assert!(client.query("select from t", &[]).await.is_err());

    let error = client.batch_execute("begin; select 1/0").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "22012");
    let error = client.batch_execute("drop peer a").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "25P02");
    client.batch_execute("rollback; begin read only").await.unwrap();
    assert_eq!(client.batch_execute("drop peer a").await.unwrap_err().code().unwrap().code(), "25006");
    client.batch_execute("rollback").await.unwrap();

    client.execute("delete from peers where name = 'a'", &[]).await.unwrap();
    assert!(peers(&client).await.is_empty());
    assert!(!gateway.server_log().contains("geheim"));
}

#[tokio::test]
async fn a_password_bound_as_a_parameter_is_sealed_and_in_no_log() {
    let gateway = start().await;
    let client = gateway.connect().await;
    let text = format!(
        "create peer shop from postgres with ({}, password = $1, application_name = $2, connect_timeout = $3)",
        gateway.peer_options()
    );
    let statement = client.prepare_typed(&text, &[Type::VARCHAR, Type::UNKNOWN, Type::INT4]).await.unwrap();
    assert_eq!(statement.params().len(), 3, "the hidden parameter is not described");
    assert!(statement.columns().is_empty());
    let tag = client.execute(&statement, &[&"geheim-é", &"app", &7_i32]).await;
    assert_eq!(tag.unwrap(), 0);
    let row = client
        .query_one("select options->>'application_name', options->>'connect_timeout' from peers", &[])
        .await
        .unwrap();
    assert_eq!((row.get(0), row.get(1)), ("app", "7"));
    let sealed: String =
        client.query_one("select sealed from peer_secrets where option = 'password'", &[]).await.unwrap().get(0);
    assert!(sealed.starts_with("v1."));

    // The same prepared statement again: the error is of this execution.
    let error = client.execute(&statement, &[&"geheim-2", &"app", &7_i32]).await.unwrap_err();
    assert_eq!(said(&error), ("42710".to_owned(), Some(13), "peer \"shop\" already exists".to_owned()));

    // Literals stay in the gateway as well, and so does a statement that is one of several in a Parse.
    let text = format!("create peer two from postgres with ({}, password = 'geheim-3')", gateway.peer_options());
    client.execute(&text, &[]).await.unwrap();
    let error = client.prepare("select 1; create peer x from postgres with (password = 'geheim-4')").await.unwrap_err();
    assert_eq!(said(&error).2, "cannot insert multiple commands into a prepared statement");
    let error = client.prepare("create peer x frm postgres with (password = 'geheim-5')").await.unwrap_err();
    assert_eq!(said(&error), ("42601".to_owned(), Some(15), "syntax error at or near \"frm\"".to_owned()));
    let error = client
        .execute("create peer x from postgres with (user = $1, password = $2)", &[&"u", &None::<String>])
        .await
        .unwrap_err();
    assert_eq!(said(&error), ("22023".to_owned(), Some(57), "option \"password\" cannot be null".to_owned()));
    let uri = format!("postgres://postgres:geheim-6@127.0.0.1:{}/postgres", gateway.cluster.port());
    client.execute("create peer three from postgres with (uri = $1)", &[&uri]).await.unwrap();
    assert_eq!(peers(&client).await, ["shop", "three", "two"]);
    let log = gateway.server_log();
    assert!(log.contains("CALL peergate.create_peer("), "the log is the right one");
    assert!(!log.contains("geheim"), "{}", log.lines().filter(|l| l.contains("geheim")).collect::<String>());
}

#[tokio::test]
async fn statements_work_in_the_extended_protocol() {
    let gateway = start().await;
    let client = gateway.connect().await;
    let create = format!("create peer shop from postgres with ({})", gateway.peer_options());
    client.execute(&create, &[]).await.unwrap();
    let statement = client.prepare("show peers").await.unwrap();
    assert_eq!(statement.columns()[0].name(), "name");
    for _ in 0..3 {
        assert_eq!(client.query(&statement, &[]).await.unwrap()[0].get::<_, String>(0), "shop");
    }
    // A target of its own: nothing runs the mirror here.
    client.execute(&create.replace("shop", "dwh"), &[]).await.unwrap();
    let create = "create mirror m from shop to dwh for table a, b to s.c with (copy_parallel_workers = $1)";
    let error = client.execute(create, &[&"x"]).await.unwrap_err();
    assert_eq!(said(&error).0, "22023");
    assert_eq!(said(&error).1, Some(create.find("$1").unwrap() as u32 + 1));
    client.execute(create, &[&"2"]).await.unwrap();
    let options: serde_json::Value = client.query_one("select options from mirrors", &[]).await.unwrap().get(0);
    assert_eq!(options, serde_json::json!({"copy_parallel_workers": "2"}));
    let error = client.execute("wait for mirror m timeout $1", &[&"0.05s"]).await.unwrap_err();
    assert_eq!(said(&error).0, "57014");
    let error = client.execute("drop peer dwh, shop", &[]).await.unwrap_err();
    assert_eq!((said(&error).0.as_str(), said(&error).1), ("2BP01", Some(11)));
    client.execute("drop peer shop, dwh cascade", &[]).await.unwrap();

    // Ours and theirs in one pipeline: all are prepared, so that each sends at its first turn, in this order.
    let create = client.prepare("create peer p from postgres with (user = 'u', validate = false)").await.unwrap();
    let (one, count) =
        (client.prepare("select 1").await.unwrap(), client.prepare("select count(*) from peers").await.unwrap());
    let (a, b, c, d) = tokio::join!(
        biased;
        client.query_one(&one, &[]),
        client.execute(&create, &[]),
        client.execute(&create, &[]),
        client.query_one(&count, &[]),
    );
    assert_eq!((a.unwrap().get::<_, i32>(0), b.unwrap(), d.unwrap().get::<_, i64>(0)), (1, 0, 1));
    assert_eq!(said(&c.unwrap_err()), ("42710".to_owned(), Some(13), "peer \"p\" already exists".to_owned()));
}

#[tokio::test]
async fn raw_pipelines_get_tags_and_errors_where_they_belong() {
    let gateway = start().await;
    let mut socket = gateway.raw_session().await;
    let parse = |name: &str, text: &str| frame(b'P', &[name.as_bytes(), b"\0", text.as_bytes(), b"\0\0\0"].concat());
    let bind = |name: &str| frame(b'B', &[b"\0", name.as_bytes(), b"\0\0\0\0\0\0\0"].concat());
    let describe = |name: &str| frame(b'D', &[b"S", name.as_bytes(), b"\0"].concat());
    let (execute, sync) = (frame(b'E', b"\0\0\0\0\0"), frame(b'S', b""));
    let text = "create peer a from postgres with (user = 'u', validate = false)";
    let pipeline = [
        parse("", "select 1"),
        bind(""),
        execute.clone(),
        parse("s", text),
        describe("s"),
        bind("s"),
        execute.clone(),
        parse("", "drop peer nix"),
        bind(""),
        execute.clone(),
        parse("", "select 2"),
        bind(""),
        execute.clone(),
        sync.clone(),
        bind("s"),
        execute.clone(),
        sync.clone(),
    ]
    .concat();
    socket.write_all(&pipeline).await.unwrap();
    let (tags, error) = read_until(&mut socket, b'E').await;
    assert_eq!(tags, "12DC1tn2C12E");
    assert!(error.windows(4).any(|w| w == b"P11\0"));
    assert_eq!(read_until(&mut socket, b'Z').await.0, "Z");
    // The pipeline's transaction was undone, the prepared statement was not.
    let (tags, tag) = read_until(&mut socket, b'C').await;
    assert_eq!((tags.as_str(), tag.as_slice()), ("2C", &b"CREATE PEER\0"[..]));
    assert_eq!(read_until(&mut socket, b'Z').await.0, "Z");
    // Flush instead of Sync, one byte at a time.
    for byte in [parse("t", "show peers"), describe("t"), frame(b'H', b"")].concat() {
        socket.write_all(&[byte]).await.unwrap();
    }
    assert_eq!(read_until(&mut socket, b'T').await.0, "1tT");
    socket.write_all(&[frame(b'C', b"Ss\0"), bind("s"), sync].concat()).await.unwrap();
    let (tags, error) = read_until(&mut socket, b'Z').await;
    assert_eq!(tags, "3EZ");
    assert_eq!(error, b"I");
}

#[tokio::test]
async fn statements_with_rows_are_read_through_portals() {
    let gateway = start().await;
    let client = gateway.connect().await;
    for name in ["a", "b", "c"] {
        let create = format!("create peer {name} from postgres with (user = 'u', validate = false)");
        client.execute(&create, &[]).await.unwrap();
    }
    let mut socket = gateway.raw_session().await;
    let execute = |rows: u8| frame(b'E', &[b"p\0", &[0, 0, 0, rows][..]].concat());
    let portal = [
        frame(b'P', b"\0show peers\0\0\0"),
        // One result format for all columns: binary.
        frame(b'B', b"p\0\0\0\0\0\0\0\x01\0\x01"),
        frame(b'D', b"Pp\0"),
        execute(2),
        execute(1),
        execute(0),
        frame(b'C', b"Pp\0"),
        frame(b'S', b""),
    ];
    socket.write_all(&portal.concat()).await.unwrap();
    assert_eq!(read_until(&mut socket, b'Z').await.0, "12TDDsDsC3Z");

    // Parameters in binary, of the types that the driver knows them to be.
    client.execute("create peer d from postgres with (user = 'u', validate = false)", &[]).await.unwrap();
    let text = "create mirror m from a to d for table t with (copy_parallel_workers = $1, create_tables = $2)";
    let create = client.prepare_typed(text, &[Type::INT4, Type::BOOL]).await.unwrap();
    client.execute(&create, &[&3_i32, &false]).await.unwrap();
    let options: serde_json::Value = client.query_one("select options from mirrors", &[]).await.unwrap().get(0);
    assert_eq!(options, serde_json::json!({"copy_parallel_workers": "3", "create_tables": "false"}));
    let text = "create peer e from postgres with (user = $1, port = $2, validate = $3)";
    let create = client.prepare_typed(text, &[Type::VARCHAR, Type::INT2, Type::BOOL]).await.unwrap();
    client.execute(&create, &[&"u", &5433_i16, &false]).await.unwrap();
    let port: String =
        client.query_one("select options->>'port' from peers where name = 'e'", &[]).await.unwrap().get(0);
    assert_eq!(port, "5433");
    let wait =
        client.prepare_typed("wait for mirror m lsn $1 timeout $2", &[Type::PG_LSN, Type::UNKNOWN]).await.unwrap();
    let error = client.execute(&wait, &[&tokio_postgres::types::PgLsn::from(1), &"0.05s"]).await.unwrap_err();
    assert_eq!(said(&error).0, "57014");
}

#[tokio::test]
async fn several_of_ours_in_one_query_each_get_their_tag() {
    let gateway = start().await;
    let mut socket = gateway.raw_session().await;
    let text = b"create peer a from postgres with (user = 'u', validate = false); select 1; \
        create peer b from postgres with (user = 'u', validate = false); drop peer a, b; drop peer a\0";
    socket.write_all(&frame(b'Q', text)).await.unwrap();
    let mut tags = Vec::new();
    for _ in 0..4 {
        tags.push(String::from_utf8(read_until(&mut socket, b'C').await.1).unwrap());
    }
    assert_eq!(tags, ["CREATE PEER\0", "SELECT 1\0", "CREATE PEER\0", "DROP PEER\0"]);
    let (_, error) = read_until(&mut socket, b'E').await;
    let position = format!("P{}\0", text.len() - 1);
    assert!(error.windows(position.len()).any(|w| w == position.as_bytes()), "{}", String::from_utf8_lossy(&error));
    for key in [b'c', b'W', b'F', b'L', b'R'] {
        assert!(!error.split(|b| *b == 0).any(|field| field.first() == Some(&key)));
    }
    read_until(&mut socket, b'Z').await;
    // A notice that only looks like ours is left alone.
    let text = b"do $$ begin raise info using errcode = 'PGT01', message = 'n:FAKE'; end $$\0";
    socket.write_all(&frame(b'Q', text)).await.unwrap();
    assert_eq!(read_until(&mut socket, b'Z').await.0, "NCZ");
}

#[tokio::test]
async fn a_peer_that_cannot_be_reached_is_an_error_and_is_not_stored() {
    let gateway = start().await;
    let client = gateway.connect().await;
    let port = catalog::cluster::free_port().unwrap();
    let text = format!("create peer shop from postgres with (host = '127.0.0.1', port = {port}, user = 'u')");
    let error = client.batch_execute(&text).await.unwrap_err();
    assert_eq!(said(&error), ("HV00N".to_owned(), Some(13), "could not connect to peer \"shop\"".to_owned()));
    assert!(error.as_db_error().unwrap().detail().unwrap().contains("refused"));
    assert!(peers(&client).await.is_empty());
    // Skipped when nothing can come of it.
    client.batch_execute(&text.replace("user = 'u'", "user = 'u', validate = false")).await.unwrap();
    assert_eq!(said(&client.batch_execute(&text).await.unwrap_err()).0, "42710");
    client.batch_execute(&text.replace("peer shop", "peer if not exists shop")).await.unwrap();
}

/// A server that takes connections and says nothing, and a CREATE PEER that connects to it.
async fn silent_peer() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let text = format!("create peer shop from postgres with (host = '127.0.0.1', port = {port}, user = 'u')");
    (listener, text)
}

#[tokio::test]
async fn what_the_gateway_itself_does_can_be_cancelled() {
    let gateway = start().await;
    let (listener, text) = silent_peer().await;
    let client = gateway.connect().await;
    let prepared = client.prepare(&text).await.unwrap();
    for extended in [false, true] {
        let started = Instant::now();
        let cancel = client.cancel_token();
        let cancelling = async {
            let _peer = listener.accept().await.unwrap();
            cancel.cancel_query(NoTls).await.unwrap();
        };
        let running = async {
            if extended { client.execute(&prepared, &[]).await.map(drop) } else { client.batch_execute(&text).await }
        };
        let (result, ()) = tokio::join!(running, cancelling);
        let message = "canceling statement due to user request".to_owned();
        assert_eq!(said(&result.unwrap_err()), ("57014".to_owned(), None, message));
        assert!(started.elapsed() < Duration::from_secs(4));
    }
    assert!(peers(&client).await.is_empty());
}

#[tokio::test]
async fn a_client_that_leaves_while_the_gateway_connects_frees_its_session() {
    let gateway = start().await;
    let (listener, text) = silent_peer().await;
    let direct = gateway.connect_directly().await;
    let mut socket = gateway.raw_session().await;
    socket.write_all(&frame(b'Q', b"select pg_backend_pid()\0")).await.unwrap();
    let pid: i32 = String::from_utf8(read_until(&mut socket, b'D').await.1[6..].to_vec()).unwrap().parse().unwrap();
    read_until(&mut socket, b'Z').await;
    socket.write_all(&frame(b'Q', &[text.as_bytes(), b"\0"].concat())).await.unwrap();
    let _peer = listener.accept().await.unwrap();
    drop(socket);
    let started = Instant::now();
    eventually("the backing session ends", async || {
        direct.query("select from pg_stat_activity where pid = $1", &[&pid]).await.unwrap().is_empty()
    })
    .await;
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn nobody_is_connected_to_for_a_role_that_may_not_create_peers() {
    let gateway = start().await;
    let (listener, text) = silent_peer().await;
    let direct = gateway.connect_directly().await;
    let role = format!("nobody_{:016x}", rand::random::<u64>());
    direct.batch_execute(&format!("create role {role} login; grant usage on schema peergate to {role}")).await.unwrap();
    let mut config = gateway.config(gateway.address.port());
    let (client, connection) = config.user(&role).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    let error = client.batch_execute(&text).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42501");
    assert!(tokio::time::timeout(Duration::from_millis(100), listener.accept()).await.is_err());
}

#[tokio::test]
async fn names_are_cut_as_postgres_cuts_them() {
    let gateway = start().await;
    let long = "é".repeat(40);
    let output = gateway
        .psql(&format!(
            "create peer {long} from postgres with (user = 'u', validate = false);\ndrop peer {};\n",
            "é".repeat(31)
        ))
        .await;
    assert_eq!(output, format!("NOTICE:  42622: identifier \"{long}\" will be truncated to \"{}\"\n", "é".repeat(31)));
}

#[tokio::test]
async fn clients_in_latin1_are_understood() {
    let gateway = start().await;
    let mut socket = gateway.raw_session().await;
    let script = b"set client_encoding = latin1; create peer x from postgres with (user = 'u', validate = false)\0";
    socket.write_all(&frame(b'Q', script)).await.unwrap();
    read_until(&mut socket, b'Z').await;
    let script = b"create peer \"\xe9\" from postgres with (user = 'u', application_name = '\xe9', validate = false)\0";
    socket.write_all(&frame(b'Q', script)).await.unwrap();
    assert_eq!(read_until(&mut socket, b'Z').await.0, "CZ");
    let client = gateway.connect().await;
    assert_eq!(peers(&client).await, ["x", "é"]);
    let rows = client.simple_query("select options->>'application_name' from peers where name = 'é'").await.unwrap();
    assert!(rows.iter().any(|m| matches!(m, SimpleQueryMessage::Row(r) if r.get(0) == Some("é"))));
}

#[tokio::test]
async fn other_databases_are_only_relayed() {
    let gateway = start().await;
    let mut config = gateway.config(gateway.address.port());
    let (client, connection) = config.dbname("postgres").connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    let error = client.batch_execute("select 1; show peers").await.unwrap_err();
    assert_eq!(said(&error).2, "unrecognized configuration parameter \"peers\"");
}

#[tokio::test]
async fn a_query_that_comes_with_the_first_packet_is_looked_at() {
    let gateway = start().await;
    let mut socket = gateway.socket().await;
    let text = b"drop peer if exists x\0";
    socket.write_all(&[startup(&gateway.database), frame(b'Q', text)].concat()).await.unwrap();
    read_until(&mut socket, b'Z').await;
    let (_, tag) = read_until(&mut socket, b'C').await;
    assert_eq!(tag, b"DROP PEER\0");
}

#[tokio::test]
async fn nonsense_with_our_words_in_it_never_gets_a_session_stuck() {
    let gateway = start().await;
    let mut state = 42_u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let words = [
        "create", "drop", "peer", "mirror", "a", "from", "postgres", "with", "(", ")", "'", "$1", ";", "show", "\0",
        "\u{e9}", "=",
    ];
    for _ in 0..40 {
        let mut socket = gateway.raw_session().await;
        let mut script = Vec::new();
        for _ in 0..30 {
            let mut body = Vec::new();
            for _ in 0..random(8) {
                body.extend_from_slice(words[random(words.len())].as_bytes());
                body.push(b' ');
            }
            body.push(0);
            // Not F, which could call anything.
            script.extend(frame(b"QPBDECSHcd"[random(10)], &body));
        }
        script.extend(frame(b'S', b""));
        script.extend(frame(b'X', b""));
        socket.write_all(&script).await.unwrap();
        read_to_end(&mut socket).await;
    }
    gateway.connect().await.query("show peers", &[]).await.unwrap();
}
