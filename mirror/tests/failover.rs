//! A source that fails over to a standby, and another server in its place.

use std::process::Command;
use std::time::Duration;

use catalog::cluster::{Cluster, ClusterOptions, Listen, StopMode, TestCluster, free_port};
use tokio::task::block_in_place;
use tokio_postgres::{Client, NoTls};

use crate::support::{Fixture, ask, binaries, connect, eventually, start, start_servers};

/// Points peer `shop` to these ports, of which the first with a server that takes writes is used.
async fn point_source(fixture: &Fixture, ports: &[u16]) {
    let hosts = vec!["127.0.0.1"; ports.len()].join(",");
    let ports = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
    let options = format!(
        r#"{{"host": "{hosts}", "port": "{ports}", "user": "postgres", "database": "shop", "target_session_attrs": "read-write"}}"#
    );
    fixture
        .control
        .batch_execute(&format!("update peergate.peers set options = '{options}' where name = 'shop'"))
        .await
        .unwrap();
}

/// Makes a standby from the files of a primary, which is stopped shortly. Slots are not part of a base backup.
fn standby_of(primary: &mut TestCluster, port: u16, synchronizes_slots: bool) -> Cluster {
    let copy = primary.directory().join("standby");
    let primary_port = primary.port();
    let run = |program: &str, arguments: &[&str]| {
        assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program} {arguments:?}");
    };
    let binaries = primary.cluster().binaries().clone();
    primary.cluster().stop(StopMode::Fast);
    let data = primary.cluster().data_dir().to_str().unwrap().to_owned();
    let copied = copy.to_str().unwrap();
    run("cp", &["-a", &data, copied]);
    run("cp", &["-a", &format!("{copied}/PG_VERSION"), &format!("{copied}/standby.signal")]);
    run("sh", &["-c", &format!("rm -rf {copied}/pg_replslot/*")]);
    primary.cluster().restart().unwrap();
    let mut options = ClusterOptions::new(copy, "postgres");
    options.socket_dir = Some(primary.directory().join("run-standby"));
    options.listen = Listen::Loopback { port };
    options.durable = false;
    options.start_timeout = Duration::from_secs(60);
    let mut settings = vec![
        ("wal_level", "logical".to_owned()),
        ("max_wal_senders", "20".to_owned()),
        ("max_replication_slots", "20".to_owned()),
        ("max_worker_processes", "20".to_owned()),
        ("max_prepared_transactions", "20".to_owned()),
        ("max_connections", "100".to_owned()),
        ("primary_conninfo", format!("host=127.0.0.1 port={primary_port} user=postgres dbname=postgres")),
    ];
    if synchronizes_slots {
        settings.push(("primary_slot_name", "standby".to_owned()));
        settings.push(("hot_standby_feedback", "on".to_owned()));
        settings.push(("sync_replication_slots", "on".to_owned()));
    }
    options.settings = settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Cluster::start(&binaries, options).unwrap()
}

async fn connect_standby(standby: &Cluster) -> Client {
    let (client, connection) = standby.conninfo().config("shop").connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_a_mirror_goes_on_with_its_slot_and_says_why_not_without() {
    let mut fixture = start_servers(&[]).await;
    let [binaries, _] = binaries();
    let synchronizes_slots = binaries.major() >= 17;
    let mut primary = block_in_place(|| TestCluster::start_with(&binaries, &[]).unwrap());
    connect(&primary, "postgres").await.batch_execute("create database shop").await.unwrap();
    fixture.source = connect(&primary, "shop").await;
    if synchronizes_slots {
        fixture.source.batch_execute("select pg_create_physical_replication_slot('standby')").await.unwrap();
    }
    let port = free_port().unwrap();
    point_source(&fixture, &[primary.port(), port]).await;
    fixture.source.batch_execute("create table t (id int primary key); insert into t values (1)").await.unwrap();
    fixture.start_engine("node-1");
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;

    let standby = block_in_place(|| standby_of(&mut primary, port, synchronizes_slots));
    fixture.source = connect(&primary, "shop").await;
    fixture.source.batch_execute("insert into t values (2)").await.unwrap();
    fixture.caught_up().await;
    let on_standby = connect_standby(&standby).await;
    let followed = eventually(async || {
        // A slot is synchronized once the primary's has moved past what the standby keeps.
        for statement in ["insert into t select max(id) + 1 from t", "checkpoint"] {
            fixture.source.batch_execute(statement).await.unwrap();
        }
        fixture.caught_up().await;
        let synced = "select count(*) from pg_replication_slots where synced and not temporary";
        !synchronizes_slots || ask(&on_standby, synced).await == "1"
    });
    assert!(followed.await, "the standby has no slot");
    // A clean end: the standby gets everything before it.
    block_in_place(|| primary.cluster().stop(StopMode::Fast));
    on_standby.batch_execute("select pg_promote()").await.unwrap();
    fixture.source = connect_standby(&standby).await;
    if synchronizes_slots {
        fixture.source.batch_execute("insert into t select max(id) + 1 from t").await.unwrap();
        fixture.caught_up().await;
        fixture.assert_equal().await;
        let told = "select level from peergate.mirror_events where message = 'the source is now on timeline 2'";
        assert_eq!(fixture.ask(told).await, "warning");
        assert_eq!(fixture.ask("select timeline from peergate.mirror_status").await, "2");
    } else {
        fixture.wait_for_state("resync_required").await;
        let said = fixture.ask("select error_message || ': ' || error_detail from peergate.mirror_status").await;
        assert!(said.contains("does not exist on the source") && said.contains("has failed over"), "{said}");
        assert_eq!(ask(&fixture.source, "select count(*) from pg_replication_slots").await, "0", "never made anew");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_in_the_sources_place_is_found_out_and_the_right_one_taken_again() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key); insert into t values (1)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    let [binaries, _] = binaries();
    let other = block_in_place(|| TestCluster::start_with(&binaries, &[]).unwrap());
    connect(&other, "postgres").await.batch_execute("create database shop").await.unwrap();
    point_source(&fixture, &[other.port()]).await;
    fixture.wait_for_state("resync_required").await;
    let said = fixture.ask("select error_message || ': ' || error_detail from peergate.mirror_status").await;
    assert!(said.contains("another server") && said.contains("system identifier"), "{said}");
    fixture.source.batch_execute("insert into t values (2)").await.unwrap();
    point_source(&fixture, &[fixture.cluster.port()]).await;
    fixture.control.batch_execute("call peergate.resume_mirror('m')").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
}
