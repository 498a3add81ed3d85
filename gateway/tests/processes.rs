//! Several processes on one catalog: whoever is killed, or stands still, is replaced within the lease's time, and one that wakes up again
//! writes nothing. A table without a key shows every row that is lost or comes twice.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use catalog::cluster::TestCluster;
use nix::sys::signal::Signal;
use tokio_postgres::Client;

use crate::serve::{Place, Server};
use crate::stage::{ask, connect, eventually};

/// An engine in a process of its own.
struct Process {
    node_id: String,
    server: Server,
    _place: Place,
}

impl Process {
    fn start(catalog: &str) -> Process {
        let place = Place::new();
        let server = Server::start(&place.0, &["--role", "engine", "--catalog", catalog]);
        let node_id = fs::read_to_string(place.0.join("node")).unwrap().trim().to_owned();
        Process { node_id, server, _place: place }
    }
}

/// Waits until a process has taken the mirror over after `epoch` and runs it; returns which, and its epoch.
async fn successor(control: &Client, target: &Client, epoch: i64) -> (String, i64) {
    let progress = "select epoch from peergate.progress";
    eventually("somebody takes the mirror over", async || {
        ask(target, "select to_regclass('peergate.progress') is not null").await == "t"
            && ask(target, progress).await.parse::<i64>().is_ok_and(|now| now > epoch)
    })
    .await;
    let runs = "select node_id from peergate.mirror_status where state = 'running'";
    eventually("it runs", async || !ask(control, runs).await.is_empty()).await;
    (ask(control, runs).await, ask(target, progress).await.parse().unwrap())
}

fn take(processes: &mut Vec<Process>, node_id: &str) -> Process {
    let at = processes.iter().position(|p| p.node_id == node_id).unwrap();
    processes.remove(at)
}

#[tokio::test(flavor = "multi_thread")]
async fn of_three_processes_whoever_is_killed_or_stands_still_is_replaced() {
    let cluster = tokio::task::spawn_blocking(|| TestCluster::start(&[]).unwrap()).await.unwrap();
    let admin = connect(&cluster.config("postgres")).await;
    for database in ["control", "shop", "dwh"] {
        admin.batch_execute(&format!("create database {database}")).await.unwrap();
    }
    let url = cluster.url("control");
    let mut processes: Vec<Process> = (0..3).map(|_| Process::start(&url)).collect();
    let [control, source, target] = [
        connect(&cluster.config("control")).await,
        connect(&cluster.config("shop")).await,
        connect(&cluster.config("dwh")).await,
    ];
    let tables = "create table log (n bigint);
        create table t (id int primary key, n bigint not null);
        insert into t select i, 0 from generate_series(1, 100) i";
    source.batch_execute(tables).await.unwrap();
    for peer in ["shop", "dwh"] {
        let options = format!(
            r#"{{"host": "127.0.0.1", "port": "{}", "user": "postgres", "database": "{peer}"}}"#,
            cluster.port()
        );
        control.batch_execute(&format!("call peergate.create_peer('{peer}', 'postgres', '{options}')")).await.unwrap();
    }
    control.batch_execute(r#"call peergate.create_mirror('m', 'shop', 'dwh', '{"all": true}')"#).await.unwrap();
    let (owner, epoch) = successor(&control, &target, 0).await;
    let stop = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn({
        let (stop, writer) = (stop.clone(), connect(&cluster.config("shop")).await);
        async move {
            let mut n = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                // A little at a time: five processes and their servers share the machine.
                let write = format!(
                    "select pg_sleep(0.005); insert into log select {n} * 10 + i from generate_series(1, 10) i; update t set n = {n} where id = {n} % 100 + 1"
                );
                writer.batch_execute(&write).await.unwrap();
                n += 1;
            }
            n
        }
    });

    // Killed: its lease runs out.
    let mut killed = take(&mut processes, &owner);
    killed.server.child.kill().unwrap();
    killed.server.child.wait().unwrap();
    let (owner, epoch) = successor(&control, &target, epoch).await;
    assert_ne!(owner, killed.node_id);

    // Standing still for longer than its lease, and awake again.
    let stopped = take(&mut processes, &owner);
    stopped.server.signal(Signal::SIGSTOP);
    let (owner, _) = successor(&control, &target, epoch).await;
    assert_ne!(owner, stopped.node_id);
    stopped.server.signal(Signal::SIGCONT);
    eventually("it notices that it was replaced", async || {
        let log = stopped.server.log();
        log.contains("another process has taken the mirror over")
            || log.contains("lease lost")
            || log.contains("mirror failed")
    })
    .await;
    processes.push(stopped);

    // The catalog's clock steps forward: the lease seems to be over, and is taken while its owner still writes.
    let epoch: i64 = ask(&target, "select epoch from peergate.progress").await.parse().unwrap();
    control.batch_execute("update peergate.mirror_leases set expires_at = now() - interval '1 hour'").await.unwrap();
    let (owner_now, epoch) = successor(&control, &target, epoch).await;
    eprintln!("{owner} had the mirror, {owner_now} has it after the clock's step");

    // The clock steps back, and the owner dies: the lease seems to hold for a day more.
    let mut killed = take(&mut processes, &owner_now);
    killed.server.child.kill().unwrap();
    killed.server.child.wait().unwrap();
    control.batch_execute("update peergate.mirror_leases set expires_at = now() + interval '1 day'").await.unwrap();
    let (last, _) = successor(&control, &target, epoch).await;
    assert_ne!(last, owner_now);

    stop.store(true, Ordering::Relaxed);
    let transactions = load.await.unwrap();
    control.batch_execute("call peergate.wait_for_mirror('m', timeout => '120s')").await.unwrap();
    for query in [
        "select count(*) || ' ' || sum(n) || ' ' || count(distinct n) from log",
        "select string_agg(n::text, ' ' order by id) from t",
    ] {
        assert_eq!(ask(&source, query).await, ask(&target, query).await, "after {transactions} transactions");
    }
    assert_eq!(ask(&target, "select count(*) from log").await, (transactions * 10).to_string());
}
