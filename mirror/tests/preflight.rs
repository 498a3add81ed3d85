//! What cannot work is said before anything is made, all of it at once.

use crate::support::{ask, start, start_servers};

#[tokio::test(flavor = "multi_thread")]
async fn all_that_is_wrong_is_said_at_once() {
    let fixture = start().await;
    let schema = "create table narrow (id int primary key, b int)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture
        .target
        .batch_execute("create table narrow (id int primary key); insert into narrow values (1)")
        .await
        .unwrap();
    let table = |name: &str| {
        format!(
            r#"{{"from": {{"schema": "public", "name": "{name}"}}, "to": {{"schema": "public", "name": "{name}"}}}}"#
        )
    };
    let selection = format!(r#"{{"tables": [{}, {}]}}"#, table("missing"), table("narrow"));
    fixture.create_mirror(&selection, "{}").await;
    let error = fixture.try_caught_up().await.unwrap_err();
    for said in [
        r#"table "public.missing" does not exist on peer "shop""#,
        r#"target table "public.narrow" lacks column "b""#,
        r#"target table "public.narrow" is not empty"#,
    ] {
        assert!(error.contains(said), "{said}\n{error}");
    }
    assert_eq!(fixture.ask("select state || ' ' || error_sqlstate from peergate.mirror_status").await, "blocked 42P01");
    assert_eq!(fixture.ask("select state from peergate.tasks").await, "failed");
    for made in ["select count(*) from pg_publication", "select count(*) from pg_replication_slots"] {
        assert_eq!(ask(&fixture.source, made).await, "0");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mended_mirror_goes_on_when_it_is_resumed() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key); insert into t values (1)").await.unwrap();
    fixture.target.batch_execute("create table t (id int primary key); insert into t values (7)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    assert!(fixture.try_caught_up().await.unwrap_err().contains("is not empty"));
    assert_eq!(ask(&fixture.target, "select string_agg(id::text, ',') from t").await, "7");
    fixture.target.batch_execute("delete from t").await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_decode_is_told_so() {
    let mut fixture = start_servers(&[("wal_level", "replica")]).await;
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.start_engine("node-1");
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    let error = fixture.try_caught_up().await.unwrap_err();
    assert!(
        error.contains("wal_level of peer \"shop\" is replica") && error.contains("ALTER SYSTEM SET wal_level"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_without_the_privileges_are_told_which() {
    let fixture = start().await;
    let schema = "create table t (id int primary key); create role weak login";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture
        .control
        .batch_execute("update peergate.peers set options = options || '{\"user\": \"weak\"}' where name = 'shop'")
        .await
        .unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    let error = fixture.try_caught_up().await.unwrap_err();
    for said in
        ["may not replicate from peer", "may not create a publication", "may not read table", "may not publish table"]
    {
        assert!(error.contains(said), "{said}\n{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_without_a_key_take_inserts_and_do_not_hinder_the_source() {
    let fixture = start().await;
    fixture.source.batch_execute("create table keyless (id int); insert into keyless values (1), (1)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    fixture.source.batch_execute("insert into keyless values (2), (2)").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    // A publication of updates would make this fail for the source's users.
    fixture.source.batch_execute("update keyless set id = 3 where id = 2").await.unwrap();
    assert!(fixture.ask("select warning from peergate.mirror_tables").await.contains("only INSERT"));
    fixture.source.batch_execute("truncate keyless").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_table_and_its_partition_are_not_mirrored_together() {
    let fixture = start().await;
    let schema = "create table root (id int primary key) partition by range (id);
                  create table part partition of root for values from (0) to (9)";
    fixture.source.batch_execute(schema).await.unwrap();
    let table = |name: &str| {
        format!(
            r#"{{"from": {{"schema": "public", "name": "{name}"}}, "to": {{"schema": "public", "name": "{name}"}}}}"#
        )
    };
    fixture.create_mirror(&format!(r#"{{"tables": [{}, {}]}}"#, table("root"), table("part")), "{}").await;
    let error = fixture.try_caught_up().await.unwrap_err();
    assert!(error.contains(r#"table "public.part" is a partition of "public.root""#), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_somebody_made_in_place_of_ours_is_theirs() {
    let fixture = start().await;
    let schema = "create table t (id bigint primary key, pad text default repeat('x', 300)); insert into t (id) select generate_series(1, 300000)";
    fixture.source.batch_execute(schema).await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, r#"{"copy_parallel_workers": "1"}"#).await;
    fixture.wait_for_state("copying").await;
    fixture.control.batch_execute("call peergate.pause_mirror('m')").await.unwrap();
    fixture.wait_for_state("paused").await;
    let theirs = "drop table t; create table t (id bigint primary key, pad text, extra int); insert into t values (1, 'theirs', 1)";
    fixture.target.batch_execute(theirs).await.unwrap();
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    let error = fixture.try_caught_up().await.unwrap_err();
    assert!(error.contains("is not empty"), "{error}");
    assert_eq!(ask(&fixture.target, "select pad from t").await, "theirs");
}
