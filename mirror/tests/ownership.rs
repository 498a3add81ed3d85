//! Who owns a mirror, and what an older owner can still do: nothing, neither on the target nor in the catalog.

use std::time::Duration;

use catalog::Catalog;
use catalog::connect::Connector;
use catalog::peer::PeerOptions;

use crate::proxy::Proxy;
use crate::support::{Fixture, ask, eventually, spawn_engine, start, start_servers};

async fn streaming(fixture: &Fixture, options: &str) {
    fixture.source.batch_execute("create table t (id int primary key)").await.unwrap();
    fixture.create_mirror(r#"{"all": true}"#, options).await;
    fixture.caught_up().await;
}

/// An owner that stands still between writing its progress and its commit: it holds the row, and whatever else it has written.
async fn hung_owner(fixture: &Fixture, epoch: &str) -> tokio_postgres::Client {
    let hung = fixture.connect_target().await;
    let hold = format!(
        "select pg_advisory_lock_shared(hashtext('peergate/' || mirror), {epoch}) from peergate.progress;
         begin; update peergate.progress set applied_lsn = applied_lsn"
    );
    hung.batch_execute(&hold).await.unwrap();
    hung
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_stands_still_amid_a_batch_is_ended_by_whoever_takes_over() {
    let mut fixture = start().await;
    streaming(&fixture, "{}").await;
    fixture.stop_engine().await;
    let epoch = fixture.ask("select epoch from peergate.mirror_leases").await;
    let hung = hung_owner(&fixture, &epoch).await;
    fixture.source.batch_execute("insert into t values (1)").await.unwrap();
    fixture.start_engine("node-2");
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert!(hung.batch_execute("commit").await.is_err(), "its transaction is over");
}

/// The owner reaches source and target, and not the catalog: on a connection into nothing, which no error ends.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_that_is_cut_off_from_the_catalog_is_replaced_and_writes_no_more() {
    let fixture = start_servers(&[]).await;
    let proxy = Proxy::start(fixture.cluster.port()).await;
    let options = PeerOptions::plain([
        ("host", "127.0.0.1".to_owned()),
        ("port", proxy.port().to_string()),
        ("user", "postgres".to_owned()),
        ("database", "control".to_owned()),
    ]);
    let cut_off = Catalog::new(Connector::new(&options).unwrap(), fixture.catalog.keyring().clone()).unwrap();
    let (stop_first, first) = spawn_engine(&cut_off, "node-1");
    streaming(&fixture, "{}").await;
    assert_eq!(fixture.ask("select node_id from peergate.mirror_status").await, "node-1");
    let epoch = fixture.ask("select epoch from peergate.mirror_leases").await;
    proxy.stall();
    let (stop_second, second) = spawn_engine(&fixture.catalog, "node-2");
    fixture.source.batch_execute("insert into t values (1)").await.unwrap();
    fixture.wait_until("select node_id from peergate.mirror_status where state = 'running'", "node-2").await;
    fixture.source.batch_execute("insert into t values (2)").await.unwrap();
    fixture.caught_up().await;
    // Awake again it finds that the mirror is another's.
    proxy.pass();
    fixture.source.batch_execute("insert into t values (3)").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    assert_eq!(fixture.ask("select node_id from peergate.mirror_status").await, "node-2");
    assert_eq!(ask(&fixture.target, &format!("select epoch > {epoch} from peergate.progress")).await, "t");
    for (stop, engine) in [(stop_first, first), (stop_second, second)] {
        stop.send_replace(true);
        engine.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_owner_does_not_end_a_newer_one() {
    let mut fixture = start().await;
    streaming(&fixture, "{}").await;
    fixture.stop_engine().await;
    let newer = fixture.connect_target().await;
    let mark = "select pg_advisory_lock_shared(hashtext('peergate/' || mirror), 1000) from peergate.progress;
                update peergate.progress set epoch = 1000";
    newer.batch_execute(mark).await.unwrap();
    fixture.start_engine("node-1");
    // It takes the lease again and again, and the target refuses it each time.
    fixture.wait_until("select epoch > 3 from peergate.mirror_leases", "t").await;
    newer.batch_execute("select 1").await.unwrap();
    assert_eq!(ask(&fixture.target, "select epoch from peergate.progress").await, "1000");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_owner_writes_nothing_into_the_catalog() {
    let mut fixture = start().await;
    streaming(&fixture, "{}").await;
    fixture.stop_engine().await;
    let id: i64 = fixture.ask("select id from peergate.mirrors").await.parse().unwrap();
    let epoch: i64 = fixture.ask("select epoch from peergate.mirror_leases").await.parse().unwrap();
    let catalog = &fixture.catalog;
    assert_eq!(catalog.set_mirror_state(id, epoch - 1, "copying").await.unwrap(), None);
    assert!(!catalog.set_mirror_status(id, epoch - 1, &Default::default()).await.unwrap());
    assert_eq!(fixture.ask("select state, applied_lsn > '0/0' from peergate.mirror_runtime").await, "running");
    assert_eq!(fixture.ask("select applied_lsn > '0/0' from peergate.mirror_runtime").await, "t");
    assert_eq!(catalog.set_mirror_state(id, epoch, "catchup").await.unwrap().as_deref(), Some("running"));
}

/// As in acceptance scenario D.3 #23: PostgreSQL 16 to 18 advance an origin's progress when a marked transaction fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_marked_transaction_that_fails_at_its_commit_comes_again() {
    let mut fixture = start_servers(&[("track_commit_timestamp", "on")]).await;
    fixture.start_engine("node-1");
    streaming(&fixture, "{}").await;
    let refuse = "create function refuse() returns trigger language plpgsql as $$ begin raise exception 'not now' using errcode = '40001'; end $$;
        create constraint trigger refuse after insert on t deferrable initially deferred for each row execute function refuse();
        alter table t enable always trigger refuse";
    fixture.target.batch_execute(refuse).await.unwrap();
    fixture.source.batch_execute("insert into t values (1), (2)").await.unwrap();
    fixture.wait_until("select attempt >= 2 from peergate.mirror_status", "t").await;
    assert_eq!(fixture.ask("select error_sqlstate from peergate.mirror_status").await, "40001");
    // Where the server lets the origin run ahead, it is not what we go by.
    let version: u32 = ask(&fixture.target, "select current_setting('server_version_num')").await.parse().unwrap();
    let ahead = "select bool_or(o.remote_lsn > p.applied_lsn) from pg_replication_origin_status o, peergate.progress p";
    assert_eq!(ask(&fixture.target, ahead).await, if version >= 160_000 { "t" } else { "f" });
    fixture.target.batch_execute("drop trigger refuse on t").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    // The rows are marked with the source's commit time, and with the mirror's origin.
    assert_eq!(ask(&fixture.target, "select roname from pg_replication_origin").await, "peergate/shop/m");
    if version >= 140_000 {
        let marked = "select bool_and(x.roident = o.roident and x.timestamp = p.commit_time)
                      from t, pg_xact_commit_timestamp_origin(t.xmin) x, pg_replication_origin o, peergate.progress p";
        assert_eq!(ask(&fixture.target, marked).await, "t");
    }
    fixture.control.batch_execute("call peergate.drop_mirror(array['m'])").await.unwrap();
    fixture.wait_until("select state from peergate.tasks where kind = 'drop_mirror'", "completed").await;
    assert_eq!(ask(&fixture.target, "select count(*) from pg_replication_origin").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_not_use_origins_mirrors_all_the_same() {
    let fixture = start().await;
    let role =
        "create role writer login; grant create on database dwh to writer; grant create on schema public to writer";
    fixture.target.batch_execute(role).await.unwrap();
    let options = format!(
        r#"{{"host": "127.0.0.1", "port": "{}", "user": "writer", "database": "dwh"}}"#,
        fixture.target_cluster().port()
    );
    fixture
        .control
        .batch_execute(&format!("update peergate.peers set options = '{options}' where name = 'dwh'"))
        .await
        .unwrap();
    streaming(&fixture, "{}").await;
    fixture.source.batch_execute("insert into t values (1)").await.unwrap();
    fixture.caught_up().await;
    fixture.assert_equal().await;
    let told = "select concat_ws(' ', level, detail, hint like 'Marks serve%') from peergate.mirror_events where message like '%replication origin%'";
    let told = fixture.ask(told).await;
    // What 14 calls a lack of permission, 13 leaves to superusers altogether.
    let why = told.contains("permission denied") || told.contains("only superusers");
    assert!(told.starts_with("warning") && why && told.ends_with('t'), "{told}");
}

/// The processes of the source's walsenders.
async fn walsenders(fixture: &Fixture) -> Vec<i32> {
    let rows = fixture.source.query("select pid from pg_stat_replication", &[]).await.unwrap();
    rows.iter().map(|r| r.get(0)).collect()
}

fn signal(pid: i32, name: &str) {
    let status = std::process::Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap();
    assert!(status.success(), "kill -{name} {pid}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_walsender_that_hangs_is_noticed_by_its_silence() {
    let fixture = start().await;
    streaming(&fixture, r#"{"wal_receiver_timeout": "15s"}"#).await;
    let walsender = walsenders(&fixture).await[0];
    signal(walsender, "STOP");
    fixture.source.batch_execute("insert into t values (1)").await.unwrap();
    let noticed = eventually(async || {
        let told = "select count(*) > 0 from peergate.mirror_events where message like 'retrying%silent for 15s%' and sqlstate = '08000'";
        fixture.ask(told).await == "t"
    });
    let noticed = noticed.await;
    signal(walsender, "CONT");
    assert!(noticed, "nobody noticed");
    fixture.caught_up().await;
    fixture.assert_equal().await;
    let gone = eventually(async || !walsenders(&fixture).await.contains(&walsender)).await;
    assert!(gone, "the old walsender is still there after {:?}", Duration::from_secs(60));
}
