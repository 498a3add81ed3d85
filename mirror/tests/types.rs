//! Columns whose type differs on the two sides, and databases in other encodings.

use catalog::cluster::TestCluster;
use tokio_postgres::Client;

use crate::support::{ask, connect, start, start_servers};

#[tokio::test(flavor = "multi_thread")]
async fn columns_of_other_types_on_the_target_are_read_from_text_in_a_binary_stream() {
    let fixture = start().await;
    let schema = "create table t (id int primary key, b bool, n int, x text, ts timestamp, big text, f float8, i inet); alter table t alter big set storage external;
                  insert into t values (1, true, 5, '12', '2001-02-03 04:05', '[' || repeat('1,', 50000) || '1]', 0.1, '10.0.0.1')";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.target.batch_execute("create table t (i text, f numeric, big json, ts text, x bigint, n numeric(10, 2), b text, id bigint primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let changes = "insert into t select i, false, -i, i::text, 'infinity', '[]', 'NaN', '::1/64' from generate_series(2, 20) i; update t set n = 6 where id = 1; update t set id = 100 where id = 1;
                   insert into t (id) values (50); update t set n = 7 where id > 10; delete from t where id = 3";
    fixture.source.batch_execute(changes).await.unwrap();
    fixture.caught_up().await;
    let binary = "select count(*) from pg_stat_activity where query like 'START_REPLICATION%binary%'";
    assert_eq!(ask(&fixture.source, binary).await, "1");
    let of_source =
        "select string_agg(concat_ws(' ', id, b, n::numeric(10, 2), x, ts, md5(big), f, i), E'\\n' order by id) from t";
    let of_target =
        "select string_agg(concat_ws(' ', id, b, n, x, ts, md5(big::text), f, i), E'\\n' order by id) from t";
    assert_eq!(ask(&fixture.target, of_target).await, ask(&fixture.source, of_source).await);
    // What the target's type cannot read stops the mirror.
    fixture.source.batch_execute("insert into t (id, x) values (60, 'not a number')").await.unwrap();
    let error = fixture.try_caught_up().await.unwrap_err();
    assert!(error.contains("22P02") && error.contains("The row is (id)=(60)."), "{error}");
}

/// Databases in other encodings: `(encoding, bytes in it)`.
const ENCODINGS: &[(&str, &str)] =
    &[("LATIN1", "e9fc20df"), ("EUC_JP", "a4b3a4f320c6fccbdc"), ("SQL_ASCII", "c3a920c3bc")];

#[tokio::test(flavor = "multi_thread")]
async fn sources_and_targets_in_other_encodings() {
    let mut fixture = start_servers(&[]).await;
    let mut mirrors = Vec::new();
    for (encoding, bytes) in ENCODINGS {
        let (from, to) = (format!("from_{}", encoding.to_lowercase()), format!("to_{}", encoding.to_lowercase()));
        for database in [&from, &to] {
            let create = format!(
                "create database {database} encoding '{encoding}' template template0 lc_collate 'C' lc_ctype 'C'"
            );
            fixture.control.batch_execute(&create).await.unwrap();
            fixture.create_peer(database).await;
        }
        let source = connect(&fixture.cluster, &from).await;
        let table = format!("t_{}", encoding.to_lowercase());
        let rows = format!(
            "create table {table} (id int primary key, v text); insert into {table} values (1, convert_from('\\x{bytes}', '{encoding}'))"
        );
        source.batch_execute(&rows).await.unwrap();
        for target in [&to, "dwh"] {
            let mirror = format!("{from}_{target}");
            let create =
                format!("call peergate.create_mirror('{mirror}', '{from}', '{target}', '{{\"all\": true}}', '{{}}')");
            fixture.control.batch_execute(&create).await.unwrap();
            mirrors.push((mirror, source_and_target(&fixture.cluster, &from, target).await, table.clone()));
        }
    }
    fixture.start_engine("node-1");
    for (mirror, (source, target), table) in &mirrors {
        fixture.mirror_caught_up(mirror).await;
        if !mirror.ends_with("dwh") {
            source.batch_execute(&format!("insert into {table} select 2, v || v from {table} where id = 1; update {table} set v = v || 'x' where id = 1")).await.unwrap();
        }
        fixture.mirror_caught_up(mirror).await;
        let of = |encoding: &str| {
            format!(
                "select string_agg(id || ' ' || encode(convert_to(v, '{encoding}'), 'hex'), ',' order by id) from {table}"
            )
        };
        let encoding = if table.ends_with("ascii") { "SQL_ASCII" } else { "UTF8" };
        let expected = ask(source, &of(encoding)).await;
        let target_encoding = if table.ends_with("ascii") && mirror.ends_with("dwh") { "UTF8" } else { encoding };
        assert_eq!(ask(target, &of(target_encoding)).await, expected, "{mirror}");
        assert!(expected.len() > 20, "{mirror}: {expected}");
    }
    // Bytes that are no text in any encoding pass between two databases that do not care, and not to one that does.
    let (_, (source, target), table) = &mirrors[4];
    source
        .batch_execute(&format!("insert into {table} values (9, convert_from('\\xff80fe', 'SQL_ASCII'))"))
        .await
        .unwrap();
    fixture.mirror_caught_up(&mirrors[4].0).await;
    assert_eq!(
        ask(target, &format!("select encode(convert_to(v, 'SQL_ASCII'), 'hex') from {table} where id = 9")).await,
        "ff80fe"
    );
    let state = "select error_sqlstate || ' ' || (error_detail like '%t_sql_ascii%') from peergate.mirror_status where mirror = 'from_sql_ascii_dwh'";
    fixture.wait_until(state, "22021 true").await;
}

async fn source_and_target(cluster: &TestCluster, source: &str, target: &str) -> (Client, Client) {
    (connect(cluster, source).await, connect(cluster, target).await)
}
