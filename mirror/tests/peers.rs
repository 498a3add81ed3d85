//! Peers that change under a mirror: it connects anew with what they are now, and loses and doubles nothing.

use catalog::cluster::free_port;

use crate::support::{Fixture, ask, start};

async fn alter(fixture: &Fixture, peer: &str, options: &str) {
    fixture.control.batch_execute(&format!("call peergate.alter_peer('{peer}', '{options}')")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_peer_takes_effect_in_a_running_mirror() {
    let fixture = start().await;
    fixture.source.batch_execute("create table t (id int primary key); insert into t values (0)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, "{}").await;
    fixture.caught_up().await;
    for (n, peer) in ["shop", "dwh"].into_iter().enumerate() {
        alter(&fixture, peer, &format!(r#"{{"application_name": "changed_{peer}"}}"#)).await;
        // Written while it connects anew.
        fixture.source.batch_execute(&format!("insert into t values ({})", n + 1)).await.unwrap();
        let sessions = format!(
            "select case when exists (select from pg_stat_activity where application_name = 'changed_{peer}') then 'yes' end"
        );
        fixture.wait_until(&sessions, "yes").await;
        fixture.caught_up().await;
        fixture.assert_equal().await;
    }
    let walsender = "select string_agg(pid::text || ' ' || application_name, ',') from pg_stat_replication";
    let before = ask(&fixture.source, walsender).await;
    assert!(before.ends_with("changed_shop"), "{before}");

    // A name, a comment and an owner are nothing to connect anew for.
    let looks = "call peergate.rename_peer('shop', 'store'); call peergate.comment_on_peer('store', 'x'); \
                 call peergate.change_peer_owner('store', current_user); call peergate.comment_on_mirror('m', 'y')";
    fixture.control.batch_execute(looks).await.unwrap();
    fixture.source.batch_execute("insert into t values (10)").await.unwrap();
    fixture.caught_up().await;
    assert_eq!(ask(&fixture.source, walsender).await, before);

    // A peer that is pointed to nowhere and back: plain DML does the same.
    let port = free_port().unwrap();
    let point = |port: u16| {
        format!(r#"update peergate.peers set options = options || '{{"port": "{port}"}}' where name = 'store'"#)
    };
    fixture.control.batch_execute(&point(port)).await.unwrap();
    fixture.wait_for_state("retrying").await;
    fixture.source.batch_execute("insert into t values (11)").await.unwrap();
    fixture.control.batch_execute(&point(fixture.cluster.port())).await.unwrap();
    fixture.wait_for_state("running").await;
    fixture.caught_up().await;
    fixture.assert_equal().await;

    // What is still to be removed is removed with the options that the peer has now.
    fixture.control.batch_execute(&point(port)).await.unwrap();
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
    fixture
        .wait_until("select case when max(attempt) > 0 then 'failed' end from peergate.mirror_drops", "failed")
        .await;
    fixture.control.batch_execute(&point(fixture.cluster.port())).await.unwrap();
    fixture.wait_until("select state from peergate.tasks where kind = 'drop_mirror'", "completed").await;
    assert_eq!(ask(&fixture.source, "select count(*) from pg_replication_slots").await, "0");
}
