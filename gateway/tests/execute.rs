//! `EXECUTE peer ($$ … $$)`: what comes back is what a direct connection to the peer would say, and the rest of the client's text goes
//! on as if it were one statement of the catalog's.

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_postgres::NoTls;
use tokio_postgres::error::SqlState;

use crate::support::{Gateway, eventually, frame, read_frame, start, startup};

/// A gateway with a database of its own as the peer `shop`.
pub(crate) struct Shop {
    pub(crate) gateway: Gateway,
    pub(crate) database: String,
}

/// What the peer's database holds: types of each kind, and something that says more than rows.
const SCHEMA: &str = "
    create type mood as enum ('sad', 'ok', 'happy');
    create domain price as numeric(10, 2) check (value >= 0);
    create type address as (street text, number int);
    create type span as range (subtype = float8);
    create table orders (id int primary key, state mood, cost price, home address, tags text[], during span, note text);
    insert into orders values (1, 'ok', 9.50, ('Main \"St\"', 7), '{a,null,\"b c\"}', '[1.5,2)', 'é😀'),
        (2, 'sad', null, null, '{}', 'empty', null), (3, 'happy', 0, ('', null), null, '(,)', repeat('x', 100000));
    create function noisy(n int) returns int language plpgsql as $$
        begin raise notice 'n is %', n; raise warning using message = 'look', detail = 'D', hint = 'H', errcode = '01004'; return n; end $$;
    create procedure two(inout a int, inout b text) language plpgsql as $$ begin a := a * 2; b := b || '!'; end $$;
    create view big as select * from generate_series(1, 20000) i;";

pub(crate) async fn shop() -> Shop {
    let gateway = start().await;
    let database = format!("shop_{:016x}", rand::random::<u64>());
    gateway.connect_directly().await.batch_execute(&format!("create database {database}")).await.unwrap();
    let shop = Shop { gateway, database };
    shop.on_peer().await.batch_execute(SCHEMA).await.unwrap();
    let client = shop.gateway.connect().await;
    client.batch_execute(&shop.create_peer("shop")).await.unwrap();
    shop
}

impl Shop {
    pub(crate) fn create_peer(&self, name: &str) -> String {
        let port = self.gateway.cluster.port();
        format!(
            "create peer {name} from postgres with (host = '127.0.0.1', port = {port}, user = 'postgres', database = '{}')",
            self.database
        )
    }

    pub(crate) async fn on_peer(&self) -> tokio_postgres::Client {
        let mut config = self.gateway.config(self.gateway.cluster.port());
        let (client, connection) = config.dbname(&self.database).connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// A plain socket to a database of the peer's server.
    pub(crate) async fn raw_on(&self, database: &str) -> TcpStream {
        let mut socket = TcpStream::connect(("127.0.0.1", self.gateway.cluster.port())).await.unwrap();
        socket.write_all(&startup(database)).await.unwrap();
        answer(&mut socket).await;
        socket
    }

    /// A plain socket to the gateway, connected to a peer by its name.
    async fn raw_as(&self, peer: &str) -> TcpStream {
        let mut socket = TcpStream::connect(self.gateway.address).await.unwrap();
        socket.write_all(&startup(peer)).await.unwrap();
        answer(&mut socket).await;
        socket
    }
}

/// Reads up to ReadyForQuery.
async fn whole_answer(socket: &mut TcpStream) -> Vec<(u8, Vec<u8>)> {
    let mut frames = Vec::new();
    loop {
        frames.push(read_frame(socket).await.unwrap());
        if frames.last().is_some_and(|(tag, _)| *tag == b'Z') {
            return frames;
        }
    }
}

/// Reads up to ReadyForQuery. Settings that changed are left out: they are the sessions' own.
async fn answer(socket: &mut TcpStream) -> Vec<(u8, Vec<u8>)> {
    let mut frames = whole_answer(socket).await;
    frames.retain(|(tag, _)| *tag != b'S');
    frames
}

async fn ask(socket: &mut TcpStream, message: &[u8]) -> Vec<(u8, Vec<u8>)> {
    socket.write_all(message).await.unwrap();
    answer(socket).await
}

fn query(text: &str) -> Vec<u8> {
    frame(b'Q', &[text.as_bytes(), b"\0"].concat())
}

/// Parse, Describe both ways, Bind, Execute, Sync, with all columns in one format.
fn pipeline(text: &str, format: u16) -> Vec<u8> {
    let bind = [&[0, 0, 0, 0, 0, 0, 0, 1][..], &format.to_be_bytes()].concat();
    [
        frame(b'P', &[b"\0", text.as_bytes(), b"\0\0\0"].concat()),
        frame(b'D', b"S\0"),
        frame(b'B', &bind),
        frame(b'D', b"P\0"),
        frame(b'E', &[0; 5]),
        frame(b'S', b""),
    ]
    .concat()
}

fn tags(frames: &[(u8, Vec<u8>)]) -> String {
    frames.iter().map(|(tag, _)| char::from(*tag)).collect()
}

/// The fields of an error or notice, its position `before` characters to the left.
fn fields(body: &[u8], before: usize) -> Vec<(u8, String)> {
    let texts = body.split(|b| *b == 0).filter(|f| !f.is_empty());
    let field = |f: &[u8]| (f[0], String::from_utf8_lossy(&f[1..]).into_owned());
    let moved = |(key, text): (u8, String)| {
        let text = if key == b'P' { (text.parse::<usize>().unwrap() - before).to_string() } else { text };
        (key, text)
    };
    texts.map(field).map(moved).collect()
}

/// A message as it is compared: its tag, an error's or notice's fields, and any other's body.
type Seen = (u8, Vec<(u8, String)>, Vec<u8>);

/// Statements for the comparison: one of each kind of answer, and each type that there is.
async fn statements(shop: &Shop) -> Vec<String> {
    let mut statements: Vec<String> = [
        "select 1",
        "select * from orders order by id",
        "table big",
        "select id, state, cost, home, tags, during from orders where id < 0",
        "select 'é' as \"Größe\", U&'\\0441', E'\\x41', '\\x00ff'::bytea",
        "select 'infinity'::timestamptz, '-infinity'::date, 'NaN'::numeric, 'Infinity'::float4, 1e300::float8, 1e-300::float8",
        "select interval '1 year 2 mons -3 days 04:05:06.789', time '24:00', timetz '01:02:03+04', timestamptz '1999-12-31 23:59:59.5+00'",
        "select array[[1,2],[3,null]], '[2:3]={5,6}'::int[], array[]::text[], array['a,b', null, 'null']",
        "select row(1, 'a', null), (1, 2)::record, ((1, 'x')::address).street",
        "select '{\"a\": [1, 2.50, null]}'::json, '{\"b\": 1, \"a\": \"\\u00e9\"}'::jsonb, '<a>é</a>'::xml, '$.a[*]'::jsonpath",
        "select point(1,2), '[(0,0),(1,1)]'::lseg, '<(0,0),3>'::circle, '((0,0),(1,2))'::polygon, '10.0.0.0/8'::cidr, '::1'::inet, macaddr '08:00:2b:01:02:03'",
        "select int4range(1, 5), '[2020-01-01,)'::daterange, 'a & b'::tsquery, 'a:1 b:2'::tsvector, b'101', 12.34::money, 'now'::text, 7::oid, 'orders'::regclass, '0/16B3748'::pg_lsn",
        "select ctid, xmin is not null, tableoid::regclass from orders order by 1",
        "insert into orders (id, note) values (4, 'x') returning id, note",
        "update orders set note = 'y' where id = 4",
        "delete from orders where id = 4",
        "select noisy(5)",
        "do $x$ begin raise info 'from do'; end $x$",
        "call two(4, 'a')",
        "explain (costs off) select * from orders where id = 1",
        "show work_mem",
        "begin",
        "insert into orders (id) values (9)",
        "savepoint a",
        "select 1/0",
        "select 1",
        "rollback",
        "select count(*) from orders",
        "create table if not exists orders (a int)",
        "create temp table mine as select 1 as a",
        "select a + 0 from mine",
        "values (1, 'a'), (2, null)",
        "",
        "-- nothing",
        "declare c cursor with hold for select i from generate_series(1, 5) i",
        "fetch 2 from c",
        "fetch all from c",
        "close c",
        "prepare p as select $1::int + 1",
        "execute p(41)",
        "deallocate p",
        "listen something",
        "set datestyle = 'German'",
        "select date '2020-02-03', now() is not null",
        "reset datestyle",
        "vacuum orders",
        // Errors, with and without a position, in each phase.
        "select nonsense",
        "select 'é', nonsense from orders",
        "selct 1",
        "select * from nowhere",
        "select 1 from",
        "insert into orders values (1)",
        "select 'x'::int",
        "select 'x'::price",
        "select (-1)::price",
        "select $1",
        "do $x$ begin raise exception using message = 'mine', detail = 'D', hint = 'H', errcode = 'ABCDE', column = 'c', table = 't'; end $x$",
        "select 1; select 2",
        "select noisy(1) from generate_series(1, 3)",
        "select pg_catalog.set_config('a.b', 'c', false)",
        "create type mood as enum ('x')",
        "drop table nowhere",
        "commit",
        "rollback",
        "lock table orders",
        "select 1 where false",
    ]
    .map(str::to_owned)
    .to_vec();
    let types = "select format_type(oid, null) from pg_type where typtype in ('b', 'e', 'd', 'r', 'm', 'c') and typname !~ '^_'
                 and (typrelid = 0 or typname = 'address') and typinput::oid <> 0 and typname not like 'pg_%' order by 1";
    for row in shop.on_peer().await.query(types, &[]).await.unwrap() {
        let name: String = row.get(0);
        statements.push(format!("select null::{name} as a, array[null]::{name}[] as b"));
    }
    statements
}

#[tokio::test]
async fn a_peer_s_answer_is_that_of_a_direct_connection() {
    let shop = shop().await;
    let statements = statements(&shop).await;
    let (mut compared, mut differences) = (0, Vec::new());
    for form in [None, Some(0), Some(1)] {
        // Databases with the same numbers of types and tables, so that what a statement leaves behind is there on both sides.
        let twin = format!("twin_{:016x}", rand::random::<u64>());
        let create = format!("create database {twin} template {}", shop.database);
        shop.gateway.connect_directly().await.batch_execute(&create).await.unwrap();
        let (mut direct, mut through) = (shop.raw_on(&twin).await, shop.gateway.raw_session().await);
        for text in &statements {
            let around = "execute shop ($q$";
            let wrapped = format!("{around}{text}$q$)");
            let message = |text: &str| form.map_or_else(|| query(text), |format| pipeline(text, format));
            let expected = ask(&mut direct, &message(text)).await;
            let got = ask(&mut through, &message(&wrapped)).await;
            compared += 1;
            // What a Describe tells twice, and the answers to Parse and Bind, are compared where there is no error; the status is the
            // catalog's.
            let seen = |frames: &[(u8, Vec<u8>)], before: usize| -> Vec<Seen> {
                let kept = frames.iter().filter(|(tag, _)| {
                    *tag != b'Z' && *tag != b'K' && (form.is_none() || !matches!(tag, b'1' | b'2' | b't'))
                });
                kept.map(|(tag, body)| match tag {
                    b'E' | b'N' => (*tag, fields(body, before), Vec::new()),
                    _ => (*tag, Vec::new(), body.clone()),
                })
                .collect()
            };
            let (mut expected, mut got) = (seen(&expected, 0), seen(&got, around.len()));
            if form.is_some() && expected.iter().any(|(tag, ..)| *tag == b'E') {
                // An error that Parse or Bind would raise comes with the Describe, or the Execute, behind what came before it.
                expected.retain(|(tag, ..)| matches!(tag, b'E' | b'N'));
                got.retain(|(tag, ..)| matches!(tag, b'E' | b'N'));
            }
            if expected != got {
                differences.push(format!("{form:?} {text}\n  direct:  {expected:?}\n  through: {got:?}"));
            }
        }
    }
    println!("{compared} statements compared, {} differences", differences.len());
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[tokio::test]
async fn a_session_by_the_peer_s_name_is_a_direct_connection() {
    let shop = shop().await;
    let statements = statements(&shop).await;
    let (mut compared, mut differences) = (0, Vec::new());
    for form in [None, Some(0), Some(1)] {
        // Each side has a copy of its own, with the same numbers of types and tables.
        let name = |side: &str| format!("{side}_{:016x}", rand::random::<u64>());
        let (twin, peer) = (name("twin"), name("peer"));
        for copy in [&twin, &peer] {
            let create = format!("create database {copy} template {}", shop.database);
            shop.gateway.connect_directly().await.batch_execute(&create).await.unwrap();
        }
        let create = shop.create_peer(&peer).replace(&shop.database, &peer);
        shop.gateway.connect().await.batch_execute(&create).await.unwrap();
        let (mut direct, mut through) = (shop.raw_on(&twin).await, shop.raw_as(&peer).await);
        for text in &statements {
            let message = form.map_or_else(|| query(text), |format| pipeline(text, format));
            direct.write_all(&message).await.unwrap();
            through.write_all(&message).await.unwrap();
            let (expected, got) = (whole_answer(&mut direct).await, whole_answer(&mut through).await);
            compared += 1;
            if expected != got {
                differences.push(format!("{form:?} {text}\n  direct:  {expected:?}\n  through: {got:?}"));
            }
        }
    }
    println!("{compared} statements compared, {} differences", differences.len());
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[tokio::test]
async fn it_is_one_statement_among_others() {
    let shop = shop().await;
    let mut session = shop.gateway.raw_session().await;
    // Rows of both servers, in order.
    let all = ask(
        &mut session,
        &query("select 1; execute shop ($$select 2; select 3$$); show peers; execute shop('select 4'); select 5"),
    )
    .await;
    assert_eq!(tags(&all), "TDCTDCTDCTDCTDCTDCZ");
    // What fails fails the text: nothing after it runs, and what the catalog did is undone, what the peer did is not.
    let text =
        "create table a (); execute shop ($$create table b ()$$); execute shop ($$select 1/0$$); create table c ()";
    let all = ask(&mut session, &query(text)).await;
    assert_eq!(tags(&all), "CCEZ");
    assert!(fields(&all[2].1, 0).contains(&(b'C', "22012".to_owned())));
    let there = "execute shop ($$select to_regclass('b') is not null$$); select to_regclass('a') is null";
    let all = ask(&mut session, &query(there)).await;
    assert_eq!((tags(&all).as_str(), &all[1].1[6..], &all[4].1[6..]), ("TDCTDCZ", &b"t"[..], &b"t"[..]));

    // In a transaction, and in one that has failed.
    for (text, expected) in [
        ("begin", "CZ"),
        ("execute shop ($$select nonsense$$)", "EZ"),
        ("execute shop ($$create table d ()$$)", "EZ"),
        ("rollback", "CZ"),
        ("execute shop ($$select to_regclass('d')$$)", "TDCZ"),
        ("begin read only", "CZ"),
        ("execute shop ($$select 1$$)", "EZ"),
        ("rollback", "CZ"),
    ] {
        assert_eq!(tags(&ask(&mut session, &query(text)).await), expected, "{text}");
    }
    let all = ask(&mut session, &query("begin read only; execute shop ($$select 1$$)")).await;
    let said = fields(&all[1].1, 0);
    assert!(
        said.contains(&(b'M', "cannot execute EXECUTE on a peer in a read-only transaction".to_owned())),
        "{said:?}"
    );
    ask(&mut session, &query("rollback")).await;

    // Queries and pipelines that are sent before anything has come back.
    let three = [
        query("execute shop ($$select 1$$)"),
        query("select 2"),
        query("execute shop ($$select nonsense$$)"),
        query("select 4"),
    ];
    session.write_all(&three.concat()).await.unwrap();
    let mut seen = String::new();
    for _ in 0..4 {
        seen += &tags(&answer(&mut session).await);
    }
    assert_eq!(seen, "TDCZTDCZEZTDCZ");
    let execute = |text: &str| {
        [frame(b'P', &[b"\0", text.as_bytes(), b"\0\0\0"].concat()), frame(b'B', &[0; 8]), frame(b'E', &[0; 5])]
            .concat()
    };
    let pipeline = [
        execute("select 1"),
        execute("execute shop ($$select 2$$)"),
        execute("select 3"),
        execute("execute shop ($$select 1/0$$)"),
        execute("select 5"),
        execute("execute shop ($$create table skipped ()$$)"),
        frame(b'S', b""),
        execute("execute shop ($$select to_regclass('skipped') is null$$)"),
        frame(b'S', b""),
    ];
    session.write_all(&pipeline.concat()).await.unwrap();
    assert_eq!(tags(&answer(&mut session).await), "12DC12DC12DC12EZ");
    let last = answer(&mut session).await;
    assert_eq!((tags(&last).as_str(), &last[2].1[6..]), ("12DCZ", &b"t"[..]));
    // Skipped from the start, before the error has been heard.
    let skipped =
        [execute("select nonsense"), execute("execute shop ($$select 1$$)"), frame(b'S', b""), query("select 1")];
    session.write_all(&skipped.concat()).await.unwrap();
    assert_eq!(tags(&answer(&mut session).await) + &tags(&answer(&mut session).await), "EZTDCZ");
}

#[tokio::test]
async fn rows_can_be_limited_and_copied_out() {
    let shop = shop().await;
    let mut session = shop.gateway.raw_session().await;
    let all =
        ask(&mut session, &query("execute shop ($$copy (select i from big order by i limit 3) to stdout$$)")).await;
    assert_eq!(tags(&all), "HdddcCZ");
    let limited = [
        frame(b'P', b"\0execute shop ($$table big$$)\0\0\0"),
        frame(b'B', &[0; 8]),
        frame(b'E', &[&b"\0"[..], &7_u32.to_be_bytes()].concat()),
        frame(b'S', b""),
    ];
    assert_eq!(tags(&ask(&mut session, &limited.concat()).await), "12DDDDDDDsZ");
    let all = ask(&mut session, &query("execute shop ($$copy orders from stdin$$)")).await;
    let said = fields(&all[0].1, 0);
    assert!(said.contains(&(b'C', "0A000".to_owned())), "{said:?}");
    assert_eq!(tags(&ask(&mut session, &query("select 1")).await), "TDCZ");
}

#[tokio::test]
async fn a_prepared_statement_of_the_name_is_postgres_unless_it_is_a_peer_s() {
    let shop = shop().await;
    let client = shop.gateway.connect().await;
    client.batch_execute("prepare other(text) as select $1; prepare shop(text) as select $1").await.unwrap();
    client.batch_execute("execute other('x'); execute shop('x'::text)").await.unwrap();
    let error = client.batch_execute("select 1; execute shop('x')").await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(
        (error.code(), error.message()),
        (&SqlState::DUPLICATE_PSTATEMENT, "\"shop\" is both a peer and a prepared statement")
    );
    assert_eq!(error.position(), Some(&tokio_postgres::error::ErrorPosition::Original(19)));
    client.batch_execute("deallocate shop; execute shop('select 1')").await.unwrap();
    let error = client.batch_execute("execute shpo('select 1')").await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::INVALID_SQL_STATEMENT_NAME));
}

#[tokio::test]
async fn usage_decides_and_the_role_in_force_counts() {
    let shop = shop().await;
    let client = shop.gateway.connect().await;
    let ann = format!("ann_{:016x}", rand::random::<u64>());
    client.batch_execute(&format!("create role {ann} login")).await.unwrap();
    let mut config = shop.gateway.config(shop.gateway.address.port());
    let (as_ann, connection) = config.user(&ann).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    let refused = |error: tokio_postgres::Error| {
        let error = error.as_db_error().unwrap().clone();
        (error.code().clone(), error.message().to_owned())
    };
    let expected = (SqlState::INSUFFICIENT_PRIVILEGE, "permission denied for peer \"shop\"".to_owned());
    assert_eq!(refused(as_ann.batch_execute("execute shop('select 1')").await.unwrap_err()), expected);
    assert_eq!(refused(as_ann.prepare("execute shop('select 1 as a')").await.unwrap_err()), expected);
    // The superuser that takes the role has what the role has.
    client.batch_execute(&format!("set role {ann}")).await.unwrap();
    assert_eq!(refused(client.batch_execute("execute shop('select 1')").await.unwrap_err()), expected);
    client.batch_execute(&format!("reset role; grant usage on peer shop to {ann}")).await.unwrap();
    as_ann.batch_execute("execute shop('select 1')").await.unwrap();
    let row = as_ann.query_one("execute shop('select 7::int8 as a')", &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>("a"), 7);
    // What is taken away is gone at once, on a session that is kept too.
    client.batch_execute(&format!("revoke usage on peer shop from {ann}")).await.unwrap();
    assert_eq!(refused(as_ann.batch_execute("execute shop('select 1')").await.unwrap_err()), expected);
}

#[tokio::test]
async fn the_session_on_the_peer_is_kept_and_follows_the_client_s_settings() {
    let shop = shop().await;
    let client = shop.gateway.connect().await;
    let value = async |text: &str| {
        let all = client.simple_query(text).await.unwrap();
        all.iter()
            .find_map(|m| {
                if let tokio_postgres::SimpleQueryMessage::Row(row) = m { row.get(0).map(str::to_owned) } else { None }
            })
            .unwrap()
    };
    let first = value("execute shop('select pg_backend_pid()')").await;
    assert_eq!(value("execute shop('select pg_backend_pid()')").await, first);
    client
        .batch_execute("execute shop('begin'); execute shop('create table t ()'); execute shop('rollback')")
        .await
        .unwrap();
    assert_eq!(value("execute shop($$select to_regclass('t') is null$$)").await, "t");
    client
        .batch_execute("set timezone = 'Asia/Tokyo'; set datestyle = 'German'; set client_encoding = 'latin1'")
        .await
        .unwrap();
    assert_eq!(value("execute shop($$select timestamptz '2020-01-02 00:00:00Z'$$)").await, "02.01.2020 09:00:00 JST");
    assert_eq!(value("execute shop('show client_encoding')").await, "LATIN1");
    client.batch_execute("set client_encoding = 'utf8'").await.unwrap();
    client.batch_execute("discard all").await.unwrap();
    assert_ne!(value("execute shop('select pg_backend_pid()')").await, first);
    // A session that the peer has ended is opened anew, unless a transaction goes with it.
    let pid = value("execute shop('select pg_backend_pid()')").await;
    let end = format!("select pg_terminate_backend({pid}, 60000)");
    shop.on_peer().await.batch_execute(&end).await.unwrap();
    let pid = value("execute shop('select pg_backend_pid()')").await;
    client.batch_execute("execute shop('begin')").await.unwrap();
    shop.on_peer().await.batch_execute(&format!("select pg_terminate_backend({pid}, 60000)")).await.unwrap();
    let error = client.batch_execute("execute shop('commit')").await.unwrap_err();
    assert_eq!(error.code().map(SqlState::code), Some("HV00N"));
    assert_eq!(value("execute shop('select 1')").await, "1");
    let error =
        client.batch_execute("execute shop('select pg_terminate_backend(pg_backend_pid())')").await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!((error.code().code(), error.message()), ("HV00N", "connection to peer \"shop\" was lost"));
    assert_eq!(value("select 1").await, "1");
}

#[tokio::test]
async fn what_runs_on_a_peer_can_be_cancelled_and_ends_with_its_client() {
    let shop = shop().await;
    let client = shop.gateway.connect().await;
    let direct = shop.on_peer().await;
    let running = async |wanted: i64| {
        let count = format!(
            "select count(*) from pg_stat_activity where query like 'select pg_sleep(100%' and state = 'active' and datname = '{}'",
            shop.database
        );
        let count: i64 = direct.query_one(&count, &[]).await.unwrap().get(0);
        count == wanted
    };
    let cancel = client.cancel_token();
    let sleep = client.batch_execute("execute shop('select pg_sleep(100)')");
    let (slept, ()) = tokio::join!(sleep, async {
        eventually("it runs", || running(1)).await;
        cancel.cancel_query(NoTls).await.unwrap();
    });
    let error = slept.unwrap_err();
    assert_eq!(error.as_db_error().unwrap().message(), "canceling statement due to user request");
    client.batch_execute("set statement_timeout = '200ms'").await.unwrap();
    let error = client.batch_execute("execute shop('select pg_sleep(100)')").await.unwrap_err();
    assert_eq!(error.as_db_error().unwrap().message(), "canceling statement due to statement timeout");
    client.batch_execute("reset statement_timeout").await.unwrap();
    let mut going = shop.gateway.raw_session().await;
    going.write_all(&query("execute shop('select pg_sleep(100)')")).await.unwrap();
    eventually("it runs", || running(1)).await;
    drop(going);
    eventually("nothing is left running", || running(0)).await;
}

#[tokio::test]
async fn peers_that_are_not_there_yet_or_cannot_be_reached_are_told_so() {
    let shop = shop().await;
    let client = shop.gateway.connect().await;
    let create = "create peer nowhere from postgres with (host = '127.0.0.1', port = 1, user = 'x', validate = false)";
    client.batch_execute(create).await.unwrap();
    let error = client.batch_execute("select 'é'; execute nowhere('select 1')").await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!((error.code().code(), error.message()), ("HV00N", "could not connect to peer \"nowhere\""));
    assert_eq!(error.position(), Some(&tokio_postgres::error::ErrorPosition::Original(21)));
    assert!(error.detail().unwrap().starts_with("127.0.0.1:1: "), "{error:?}");
    client.batch_execute("drop peer nowhere").await.unwrap();
    let error = client.batch_execute("execute nowhere('select 1')").await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::INVALID_SQL_STATEMENT_NAME));
}
