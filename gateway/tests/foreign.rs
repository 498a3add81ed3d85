//! Peers' tables as foreign tables in the catalog, and `peer.schema.table`: what is read through them is what the peer has, for those that may.

use catalog::foreign::{GatewayAddress, TOKEN_ROLE};
use tokio::sync::watch;
use tokio_postgres::error::{ErrorPosition, SqlState};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::execute::{Shop, shop};
use crate::support::catalog_in;

/// What makes it hard: a type of each kind, odd names, partitions, generated columns, and other schemas.
const MORE: &str = r#"
    create extension hstore;
    create schema "Odd Schema";
    create table "Odd Schema"."T. ""x""" ("a b" int, "select" text, "é" mood);
    insert into "Odd Schema"."T. ""x""" values (1, 'x', 'ok');
    create table parts (id int, at date, twice int generated always as (id * 2) stored) partition by range (at);
    create table parts_1 partition of parts for values from ('2020-01-01') to ('2021-01-01');
    insert into parts (id, at) values (1, '2020-05-05'), (2, '2020-06-06');
    create materialized view totals as select count(*) as n from parts;
    create table kinds (i int, m mood[], s span, h hstore, c address[], r regclass, d price[], n name, x xml, j jsonb, b bit(3), v varchar(5), k char(3),
        t text collate "C");
    insert into kinds values (1, '{ok,sad}', '[1,2)', 'a=>1', array[('x', 1)::address], 'pg_class', '{1.5}', 'n', '<a/>', '{"a": 1}', b'101', 'v', 'k', 't');
    create table none ();
    create table wide (id int primary key, name text);
    insert into wide select i, 'n' || i from generate_series(1, 1000) i;"#;

struct Federation {
    shop: Shop,
    _stop: watch::Sender<bool>,
}

/// A peer with all that in it, and what an engine does for its tables.
async fn federation() -> Federation {
    let shop = shop().await;
    shop.on_peer().await.batch_execute(MORE).await.unwrap();
    let catalog = catalog_in(&shop.gateway.cluster, &shop.gateway.database);
    let (stop, stopped) = watch::channel(false);
    let address = GatewayAddress { host: "127.0.0.1".to_owned(), port: shop.gateway.address.port() };
    tokio::spawn(async move { catalog.keep_foreign_tables(Some(address), stopped).await });
    let federation = Federation { shop, _stop: stop };
    // It may have been looked at before it was complete.
    federation.refresh(&federation.shop.gateway.connect().await).await;
    federation
}

impl Federation {
    async fn refresh(&self, client: &Client) {
        client.batch_execute("alter peer shop refresh schema").await.unwrap();
        client.batch_execute("call peergate.wait_for_import('shop')").await.unwrap();
    }

    async fn connect_as(&self, role: &str) -> Client {
        let mut config = self.shop.gateway.config(self.shop.gateway.address.port());
        let (client, connection) = config.user(role).connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }
}

/// All rows of all results, as text.
async fn rows(client: &Client, text: &str) -> Vec<Vec<Option<String>>> {
    let all = client.simple_query(text).await.unwrap_or_else(|error| panic!("{text}: {error:?}"));
    all.iter()
        .filter_map(|m| match m {
            SimpleQueryMessage::Row(row) => Some((0..row.len()).map(|n| row.get(n).map(str::to_owned)).collect()),
            _ => None,
        })
        .collect()
}

async fn one(client: &Client, text: &str) -> String {
    rows(client, text).await[0][0].clone().unwrap_or_default()
}

async fn refused(client: &Client, text: &str) -> (SqlState, String) {
    let error = client.batch_execute(text).await.expect_err(text);
    let error = error.as_db_error().unwrap();
    (error.code().clone(), error.message().to_owned())
}

#[tokio::test]
async fn foreign_tables_hold_what_the_peer_has() {
    let federation = federation().await;
    let (client, direct) = (federation.shop.gateway.connect().await, federation.shop.on_peer().await);
    let import = rows(&client, "select state, tables, warning_texts from peer_imports").await;
    assert_eq!(import, [[Some("ready".to_owned()), Some("8".to_owned()), Some("{}".to_owned())]], "{import:?}");
    let mut compared = 0;
    for (there, condition) in [
        ("orders", ""),
        ("orders", "where state = 'ok'"),
        ("orders", "where state in ('ok', 'sad') and cost > 1"),
        ("orders", "where state > 'sad'"),
        ("orders", "where during::text = 'empty'"),
        ("orders", "where (home).number = 7"),
        ("orders", "where note like 'é%'"),
        ("orders", "where tags @> array['a']"),
        ("\"Odd Schema\".\"T. \"\"x\"\"\"", "where \"select\" = 'x' and \"é\" = 'ok'"),
        ("parts", "where twice = 4"),
        ("totals", ""),
        ("kinds", ""),
        ("kinds", "where h::text = '\"a\"=>\"1\"' and r::text = 'pg_class'"),
        ("kinds", "where m[1] = 'ok' and t = 't' and n = 'n' and k = 'k'"),
        ("big", "where i < 10"),
        ("wide", "where id between 5 and 15"),
    ] {
        let query = |table: &str| format!("select * from {table} t {condition} order by t::text");
        let local = match there.strip_prefix("\"Odd Schema\"") {
            Some(table) => format!("\"shop__Odd Schema\"{table}"),
            None => format!("shop.{there}"),
        };
        let named = if local.starts_with('"') { format!("shop.{there}") } else { format!("shop.public.{there}") };
        let expected = rows(&direct, &query(there)).await;
        assert_eq!(rows(&client, &query(&local)).await, expected, "{local} {condition}");
        assert_eq!(rows(&client, &query(&named)).await, expected, "{named} {condition}");
        assert!(!expected.is_empty(), "{there} {condition}");
        compared += 2;
    }
    println!("{compared} statements on foreign tables compared, 0 differences");
    assert_eq!(rows(&client, "select * from shop.none").await, Vec::<Vec<Option<String>>>::new());
    // What the peer has no operator for is not sent there.
    let plan = rows(
        &client,
        "explain (verbose, costs off) select id from shop.public.orders where id = 1 and during = '[1.5,2)'",
    )
    .await;
    let plan = plan.concat().into_iter().flatten().collect::<Vec<_>>().join("\n");
    assert!(plan.contains("Remote SQL: SELECT id, during FROM public.orders WHERE ((id = 1))"), "{plan}");
}

#[tokio::test]
async fn names_of_three_parts_work_wherever_a_table_does() {
    let federation = federation().await;
    let (client, gateway) = (federation.shop.gateway.connect().await, &federation.shop.gateway);
    client.batch_execute(&federation.shop.create_peer("other")).await.unwrap();
    client.batch_execute("create table mine (id int, note text); insert into mine values (7, 'seven')").await.unwrap();
    // The tables of a peer that was made a moment ago are waited for.
    assert_eq!(one(&client, "select count(*) from other.public.wide").await, "1000");
    let join = "select m.note, a.name, b.name from mine m join shop.public.wide a on a.id = m.id left join other.public.wide as b on b.id = m.id";
    assert_eq!(rows(&client, join).await.concat(), ["seven", "n7", "n7"].map(|t| Some(t.to_owned())));
    let row = client
        .query_one("select w.name, $2::text from shop.public.wide w where w.id = $1", &[&5_i32, &"x"])
        .await
        .unwrap();
    assert_eq!(row.get::<_, String>(0), "n5");
    client
        .batch_execute("create view seen as select shop.public.wide.id from shop.public.wide where id < 3")
        .await
        .unwrap();
    assert_eq!(one(&client, "select count(*) from seen").await, "2");
    client
        .batch_execute(
            "begin; declare c cursor for select id from shop.public.wide order by id; fetch 2 from c; commit",
        )
        .await
        .unwrap();
    let copied = gateway.psql("copy (select id from shop.public.wide where id = 9) to stdout;\nprepare w(int) as select name from shop.public.wide where id = $1;\nexecute w(3);\nexplain (costs off) select * from shop.public.wide;").await;
    assert!(copied.starts_with("9\n") && copied.contains("n3") && copied.contains("Foreign Scan on wide"), "{copied}");
    // Positions are those of the client's text, before and behind the name.
    for (text, at) in [
        ("select nonsense from shop.public.wide", 8),
        ("select 1 from shop.public.nowhere", 15),
        ("select 1 from shop.public.wide where nonsense = 1", 38),
        ("select 'é' from shop.public.wide, shop . public . wide w where w.nonsense = 1", 64),
    ] {
        let error = client.batch_execute(text).await.unwrap_err();
        assert_eq!(error.as_db_error().unwrap().position(), Some(&ErrorPosition::Original(at)), "{text}");
    }
    // The catalog's own database, and what is no peer, are PostgreSQL's.
    assert_eq!(one(&client, &format!("select count(*) from {}.public.mine", gateway.database)).await, "1");
    assert_eq!(refused(&client, "select 1 from nobody.public.mine").await.0, SqlState::FEATURE_NOT_SUPPORTED);
    assert_eq!(one(&client, "select 'shop.public.wide'").await, "shop.public.wide");
    let error = refused(&client, &federation.shop.create_peer(&gateway.database)).await;
    assert_eq!(error.0, SqlState::DUPLICATE_SCHEMA);
}

#[tokio::test]
async fn usage_decides_who_reads_and_the_token_is_of_no_use_elsewhere() {
    let federation = federation().await;
    let client = federation.shop.gateway.connect().await;
    let ann = format!("ann_{:016x}", rand::random::<u64>());
    client.batch_execute(&format!("create role {ann} login")).await.unwrap();
    let as_ann = federation.connect_as(&ann).await;
    let read = "select count(*) from shop.public.wide";
    assert_eq!(
        refused(&as_ann, read).await,
        (SqlState::INSUFFICIENT_PRIVILEGE, "permission denied for schema shop".to_owned())
    );
    client.batch_execute(&format!("grant usage on peer shop to {ann}")).await.unwrap();
    assert_eq!(one(&as_ann, read).await, "1000");
    assert_eq!(refused(&as_ann, "delete from shop.public.wide").await.0, SqlState::INSUFFICIENT_PRIVILEGE);
    as_ann.batch_execute("create temp view v as select * from shop.public.wide").await.unwrap();
    // Neither she nor a view of hers reads on when it is taken away.
    client.batch_execute(&format!("revoke usage on peer shop from {ann}")).await.unwrap();
    assert_eq!(refused(&as_ann, read).await.0, SqlState::INSUFFICIENT_PRIVILEGE);
    assert_eq!(refused(&as_ann, "select count(*) from v").await.0, SqlState::INSUFFICIENT_PRIVILEGE);

    let hidden = "select count(*) from pg_user_mappings where srvname like 'peergate%' and umoptions is not null";
    assert_eq!((one(&as_ann, hidden).await, one(&client, hidden).await), ("0".to_owned(), "1".to_owned()));
    let options = one(&client, "select umoptions from pg_user_mappings where srvname like 'peergate%'").await;
    assert!(
        options.starts_with(&format!("{{user={TOKEN_ROLE},password=")) && !options.contains("postgres"),
        "{options}"
    );
    let token = options.trim_end_matches('}').rsplit('=').next().unwrap().to_owned();
    assert!(!federation.shop.gateway.server_log().contains(&token), "it is in no log");
    let log_in = async |database: &str, password: &str| {
        let mut config = federation.shop.gateway.config(federation.shop.gateway.address.port());
        config.user(TOKEN_ROLE).dbname(database).password(password).connect(NoTls).await
    };
    let (session, connection) = log_in("shop", &token).await.unwrap();
    tokio::spawn(connection);
    // Not even with the token can be written.
    assert_eq!(refused(&session, "delete from wide").await.0, SqlState::READ_ONLY_SQL_TRANSACTION);
    client.batch_execute(&federation.shop.create_peer("other")).await.unwrap();
    for (database, password) in
        [("shop", "wrong"), ("other", token.as_str()), (federation.shop.gateway.database.as_str(), token.as_str())]
    {
        assert!(log_in(database, password).await.is_err(), "{database}");
    }
    // A new one takes its place, and what has been read before is good for a moment.
    client
        .batch_execute("update peergate.peer_import_runs set token_made_at = now() - interval '2 days'")
        .await
        .unwrap();
    federation.refresh(&client).await;
    assert_ne!(
        one(&client, "select umoptions from pg_user_mappings where srvname like 'peergate%' order by srvname limit 1")
            .await,
        options
    );
    assert_eq!(one(&client, read).await, "1000");
    assert!(log_in("shop", &token).await.is_ok());
    client
        .batch_execute("update peergate.peer_import_runs set token_made_at = now() - interval '10 minutes'")
        .await
        .unwrap();
    assert!(log_in("shop", &token).await.is_err(), "the old one is over");
}

#[tokio::test]
async fn a_refresh_brings_in_what_has_changed_and_a_drop_takes_all_away() {
    let federation = federation().await;
    let (client, direct) = (federation.shop.gateway.connect().await, federation.shop.on_peer().await);
    client.batch_execute("create view seen as select id, state from shop.orders").await.unwrap();
    let before = one(&client, "select 'shop.parts'::regclass::oid").await;
    direct
        .batch_execute(
            "alter type mood add value 'glad' before 'happy'; alter table orders add column more int default 5, drop column note;
             create table fresh (id int); insert into fresh values (1); drop table wide; alter table kinds alter column i type bigint;
             drop schema \"Odd Schema\" cascade; create schema later; create table later.t (id int)",
        )
        .await
        .unwrap();
    federation.refresh(&client).await;
    let import = rows(&client, "select state, warning_texts from peer_imports").await;
    assert_eq!(import, [[Some("ready".to_owned()), Some("{}".to_owned())]]);
    assert_eq!(one(&client, "select id from shop.public.fresh").await, "1");
    assert_eq!(one(&client, "select count(*) from shop.later.t").await, "0");
    assert_eq!(one(&client, "select more from shop.public.orders where id = 1").await, "5");
    assert_eq!(one(&client, "select pg_typeof(i) from shop.kinds").await, "bigint");
    assert_eq!(refused(&client, "select note from shop.orders").await.0, SqlState::UNDEFINED_COLUMN);
    assert_eq!(refused(&client, "table shop.wide").await.0, SqlState::UNDEFINED_TABLE);
    assert_eq!(one(&client, "select count(*) from pg_namespace where nspname = 'shop__Odd Schema'").await, "0");
    direct.batch_execute("update orders set state = 'glad' where id = 1").await.unwrap();
    assert_eq!(one(&client, "select state from seen where id = 1").await, "glad");
    assert_eq!(one(&client, "select 'shop.parts'::regclass::oid").await, before, "what is as it was is left alone");
    // What cannot be changed is told, and the rest is done.
    direct.batch_execute("alter table orders drop column state; create table last ()").await.unwrap();
    federation.refresh(&client).await;
    assert_eq!(
        one(
            &client,
            "select bool_or(w like '%orders%depend%') from unnest((select warning_texts from peer_imports)) w"
        )
        .await,
        "t"
    );
    client.batch_execute("table shop.last").await.unwrap();

    let error = client.batch_execute("drop peer shop").await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(
        (error.code(), error.message(), error.detail()),
        (
            &SqlState::DEPENDENT_OBJECTS_STILL_EXIST,
            "cannot drop peer \"shop\" because other objects depend on its tables",
            Some("view public.seen depends on foreign table shop.orders")
        )
    );
    client.batch_execute("begin; drop peer shop cascade; rollback").await.unwrap();
    assert_eq!(one(&client, "select count(*) from shop.fresh").await, "1");
    client.batch_execute("drop peer shop cascade").await.unwrap();
    let left = "select (select count(*) from pg_foreign_server) + (select count(*) from pg_namespace where nspname like 'shop%')
                + (select count(*) from pg_class where relname = 'seen')";
    assert_eq!(one(&client, left).await, "0");
    client.batch_execute(&federation.shop.create_peer("shop")).await.unwrap();
    assert_eq!(one(&client, "select count(*) from shop.public.fresh").await, "1");
}

#[tokio::test]
async fn options_decide_what_is_brought_in_and_whether_it_can_be_written() {
    let federation = federation().await;
    let client = federation.shop.gateway.connect().await;
    assert_eq!(
        refused(&client, "insert into shop.wide values (5000, 'x')").await.0,
        SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE
    );
    let create = |name: &str, more: &str| federation.shop.create_peer(name).replace(")", &format!(", {more})"));
    client.batch_execute(&create("writable", "updatable = true, import = 'public'")).await.unwrap();
    client.batch_execute(&create("nothing", "import = none")).await.unwrap();
    client
        .batch_execute("call peergate.wait_for_import('writable'); call peergate.wait_for_import('nothing')")
        .await
        .unwrap();
    client
        .batch_execute(
            "insert into writable.public.wide values (5000, 'x'); update writable.wide set name = 'y' where id = 5000",
        )
        .await
        .unwrap();
    assert_eq!(one(&client, "select name from shop.wide where id = 5000").await, "y");
    let schemas =
        "select string_agg(nspname, ' ' order by nspname) from pg_namespace where nspname ~ '^(writable|nothing)'";
    assert_eq!(one(&client, schemas).await, "writable");
    assert_eq!(one(&client, "select state from peer_imports where peer = 'nothing'").await, "off");
    // A peer that cannot be reached says so, and one that is gone gives its tables back when it is there.
    client
        .batch_execute(
            "create peer away from postgres with (host = '127.0.0.1', port = 1, user = 'x', validate = false)",
        )
        .await
        .unwrap();
    let (code, message) = refused(&client, "call peergate.wait_for_import('away')").await;
    assert_eq!(code.code(), "HV00N");
    assert!(message.starts_with("the tables of peer \"away\" could not be brought in: 127.0.0.1:1"), "{message}");
}
