//! Another server in the source's place.

use catalog::cluster::TestCluster;
use tokio::task::block_in_place;

use crate::support::{Fixture, binaries, connect, start};

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
