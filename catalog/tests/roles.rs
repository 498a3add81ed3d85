//! What the three roles may do, each by a login role that is its member.

use catalog::Catalog;
use catalog::cluster::TestCluster;
use catalog::connect::Connector;
use catalog::peer::PeerOptions;
use catalog::secret::Keyring;
use std::sync::Arc;
use tokio_postgres::{Client, NoTls};

async fn session(cluster: &TestCluster, database: &str, role: &str) -> Client {
    let (client, connection) = cluster.config(database).user(role).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Who may run a statement: anybody with the reader's role, with the operator's, or with the admin's.
#[derive(Clone, Copy, PartialEq, PartialOrd, Debug)]
enum Least {
    Reader,
    Operator,
    Admin,
    Nobody,
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_may_do_its_part_and_no_more() {
    use Least::{Admin, Nobody, Operator, Reader};
    let cluster = tokio::task::spawn_blocking(|| TestCluster::start(&[])).await.unwrap().unwrap();
    crate::migrate(&cluster).await;
    let owner = session(&cluster, "postgres", "postgres").await;
    let setup = r#"
        create role r login in role peergate_reader; create role o login in role peergate_operator; create role a login in role peergate_admin;
        create role n login;
        call peergate.create_peer('shop', 'postgres', '{"user": "u"}'); call peergate.create_peer('dwh', 'postgres', '{"user": "u"}');
        call peergate.create_mirror('m', 'shop', 'dwh', '{"all": true}');
        call peergate.create_alert('q', 'mirror', null, '[{"metric": "errors", "op": ">", "value": 0}]', '[{"channel": "notify"}]')"#;
    owner.batch_execute(setup).await.unwrap();
    let statements = [
        (
            Reader,
            "select * from peergate.peers, peergate.mirrors, peergate.mirror_status, peergate.tasks, peergate.settings, peergate.mirror_events",
        ),
        (
            Reader,
            "select * from peergate.show_peers, peergate.show_mirrors, peergate.show_mirror('m'), peergate.show_peer('shop')",
        ),
        (
            Reader,
            "select * from peergate.alerts, peergate.alert_events, peergate.alert_deliveries, peergate.show_alert('q')",
        ),
        (Operator, "call peergate.wait_for_alert('q'); call peergate.test_alert('q')"),
        (Admin, "call peergate.alter_alert('q', enabled => false); call peergate.drop_alert(array['q'])"),
        (Admin, "update peergate.alerts set enabled = false; delete from peergate.alerts"),
        (Nobody, "select * from peergate.alert_secrets"),
        (Operator, "call peergate.pause_mirror('m'); call peergate.resume_mirror('m')"),
        (Operator, "update peergate.mirrors set desired_state = 'paused' where name = 'm'"),
        (Operator, "call peergate.wait_for_mirror('m', up_to_state => 'created')"),
        (Operator, "select * from peergate.validate_peer('shop', '[]')"),
        (Admin, "update peergate.mirrors set options = '{}', desired_state = 'paused'"),
        (Admin, r#"call peergate.create_peer('x', 'postgres', '{"user": "u"}')"#),
        (Admin, r#"insert into peergate.peers (name, options) values ('x', '{"user": "u"}')"#),
        (
            Admin,
            "update peergate.peers set comment = 'x' where name = 'shop'; delete from peergate.mirrors; delete from peergate.peers",
        ),
        (Admin, r#"call peergate.alter_peer('shop', '{"host": "h"}'); call peergate.rename_peer('shop', 'x')"#),
        (Admin, "call peergate.comment_on_peer('shop', 'x'); call peergate.comment_on_mirror('m', 'x')"),
        (
            Admin,
            "call peergate.grant_peer(array['shop'], array['n']); call peergate.revoke_peer(array['shop'], array['n'])",
        ),
        (Admin, "call peergate.drop_peer(array['shop', 'dwh'], cascade => true)"),
        (
            Admin,
            r#"call peergate.create_mirror('y', 'dwh', 'shop', '{"all": true}'); call peergate.drop_mirror(array['m', 'y'])"#,
        ),
        (Nobody, "update peergate.peers set owner = 'a'"),
        (Nobody, "update peergate.peers set generation = 1"),
        (Nobody, "select * from peergate.peer_secrets"),
        (Nobody, "select * from peergate.mirror_drops"),
        (Nobody, "select peergate.peer_document(1)"),
        (Nobody, "delete from peergate.tasks"),
        (Nobody, "update peergate.settings set default_value = 'x'"),
        (Nobody, r#"call peergate.create_peer('x', 'postgres', '{"user": "u", "password_env": "HOME"}')"#),
    ];
    for (role, rank) in [("n", None), ("r", Some(Reader)), ("o", Some(Operator)), ("a", Some(Admin))] {
        let client = session(&cluster, "postgres", role).await;
        for (least, statement) in &statements {
            client.batch_execute("begin").await.unwrap();
            let result = client.batch_execute(statement).await;
            client.batch_execute("rollback").await.unwrap();
            let code = result.as_ref().err().map(|error| error.code().unwrap().code().to_owned());
            if rank.is_some_and(|rank| rank >= *least) {
                // A statement that goes too far for one's rank is not permitted; any other end is the statement's own.
                assert!(
                    code.is_none() || statement.contains("set options") && code.as_deref() == Some("0A000"),
                    "{role}: {statement}: {code:?}"
                );
            } else {
                assert_eq!(code.as_deref(), Some("42501"), "{role}: {statement}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_who_may_not_make_roles_needs_none_and_grants_those_that_are_made_later() {
    let cluster = tokio::task::spawn_blocking(|| TestCluster::start(&[])).await.unwrap().unwrap();
    let superuser = session(&cluster, "postgres", "postgres").await;
    superuser.batch_execute("create role plain login").await.unwrap();
    superuser.batch_execute("create database plain owner plain").await.unwrap();
    let options = PeerOptions::plain([
        ("host", "127.0.0.1".to_owned()),
        ("port", cluster.port().to_string()),
        ("user", "plain".to_owned()),
        ("database", "plain".to_owned()),
    ]);
    let keyring = Arc::new(Keyring::parse(&"5a".repeat(32)).unwrap());
    let catalog = Catalog::new(Connector::new(&options).unwrap(), keyring).unwrap();
    catalog.migrate().await.unwrap();
    let roles = "select count(*) from pg_roles where rolname like 'peergate%'";
    assert_eq!(superuser.query_one(roles, &[]).await.unwrap().get::<_, i64>(0), 0);
    superuser.batch_execute("create role peergate_reader; create role r login in role peergate_reader").await.unwrap();
    catalog.migrate().await.unwrap();
    session(&cluster, "plain", "r").await.batch_execute("select * from peergate.show_peers").await.unwrap();
}
