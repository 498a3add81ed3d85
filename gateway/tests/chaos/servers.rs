//! The servers of a run, the proxies before them, and the engines.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::cluster::{Binaries, StopMode, TestCluster};
use catalog::connect::Connector;
use catalog::peer::PeerOptions;
use catalog::secret::Keyring;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};

use crate::engine::{Engine, log_of};
use crate::journal::Journal;
use crate::proxy::Proxy;
use crate::schema::Schema;

/// A server and the proxy through which the engines reach it.
pub(crate) struct Server {
    pub(crate) name: &'static str,
    cluster: Arc<Mutex<TestCluster>>,
    pub(crate) proxy: Proxy,
}

/// How long a server may take to start again.
const RESTART_PATIENCE: Duration = Duration::from_secs(60);

/// How a server goes down.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Down {
    Killed,
    Immediate,
    Fast,
}

impl Server {
    async fn start(name: &'static str, variable: &str, database: &str) -> Server {
        let binaries = match std::env::var_os(variable) {
            Some(folder) if !folder.is_empty() => Binaries::in_directory(folder.as_ref()).unwrap(),
            _ => Binaries::find(None).unwrap(),
        };
        let start = move || TestCluster::start_with(&binaries, &[("deadlock_timeout", "200ms")]).unwrap();
        let cluster = tokio::task::spawn_blocking(start).await.unwrap();
        let proxy = Proxy::start(cluster.port()).await;
        let server = Server { name, cluster: Arc::new(Mutex::new(cluster)), proxy };
        let admin = server.connect("postgres").await.unwrap();
        admin.batch_execute(&format!("create database {database}")).await.unwrap();
        server
    }

    /// How the test itself reaches it.
    pub(crate) fn config(&self, database: &str) -> Config {
        let mut config = self.cluster.lock().unwrap().config(database);
        config.connect_timeout(Duration::from_secs(5));
        config
    }

    pub(crate) async fn connect(&self, database: &str) -> Result<Client, tokio_postgres::Error> {
        connect(&self.config(database)).await
    }

    /// Takes it down and starts it again.
    pub(crate) async fn bounce(&self, down: Down) {
        let cluster = self.cluster.clone();
        let bounce = move || {
            let mut cluster = cluster.lock().unwrap();
            match down {
                Down::Killed => cluster.cluster().kill(),
                Down::Immediate => cluster.cluster().stop(StopMode::Immediate),
                Down::Fast => cluster.cluster().stop(StopMode::Fast),
            }
            // Processes of a server that was killed may go on for a moment, and it does not start before they are gone.
            let begun = Instant::now();
            while let Err(error) = cluster.cluster().restart() {
                assert!(begun.elapsed() < RESTART_PATIENCE, "not started again: {error:?}");
                std::thread::sleep(Duration::from_millis(200));
            }
        };
        tokio::task::spawn_blocking(bounce).await.unwrap();
    }
}

/// Everything there is: three servers, and two engines on one catalog.
pub(crate) struct World {
    pub(crate) source: Server,
    pub(crate) target: Server,
    pub(crate) catalog: Server,
    pub(crate) engines: [Option<Engine>; 2],
    folder: PathBuf,
}

impl World {
    pub(crate) async fn start(journal: &Journal) -> World {
        let (source, target, catalog) = tokio::join!(
            Server::start("source", "PEERGATE_PG_BIN_SOURCE", "shop"),
            Server::start("target", "PEERGATE_PG_BIN_TARGET", "dwh"),
            Server::start("catalog", "PEERGATE_PG_BIN", "control"),
        );
        let folder = std::env::temp_dir().join(format!("peergate-chaos-{:016x}", rand::random::<u64>()));
        for n in 0..2 {
            std::fs::create_dir_all(folder.join(n.to_string())).unwrap();
        }
        let options = |port: u16, database: &str| {
            PeerOptions::plain([
                ("host", "127.0.0.1".to_owned()),
                ("port", port.to_string()),
                ("user", "postgres".to_owned()),
                ("database", database.to_owned()),
            ])
        };
        let keyring = Arc::new(Keyring::parse(&"5a".repeat(32)).unwrap());
        let direct = Connector::new(&options(catalog.config("control").get_ports()[0], "control")).unwrap();
        Catalog::new(direct, keyring).unwrap().migrate().await.unwrap();
        let control = catalog.connect("control").await.unwrap();
        for (peer, server, database) in [("shop", &source, "shop"), ("dwh", &target, "dwh")] {
            let options = format!(
                "{{\"host\": \"127.0.0.1\", \"port\": \"{}\", \"user\": \"postgres\", \"database\": \"{database}\"}}",
                server.proxy.port()
            );
            let call = format!("call peergate.create_peer('{peer}', 'postgres', '{options}')");
            control.batch_execute(&call).await.unwrap();
        }
        journal.note("servers started");
        World { source, target, catalog, engines: [None, None], folder }
    }

    pub(crate) fn servers(&self) -> [&Server; 3] {
        [&self.source, &self.target, &self.catalog]
    }

    pub(crate) fn start_engine(&mut self, n: usize, fail_points: Option<&str>) {
        let url = format!("postgres://postgres@127.0.0.1:{}/control?sslmode=disable", self.catalog.proxy.port());
        self.engines[n] = Some(Engine::start(&self.folder.join(n.to_string()), &url, fail_points));
    }

    pub(crate) async fn make_schema(&self, schema: &Schema) {
        let source = self.source.connect("shop").await.unwrap();
        source.batch_execute(&schema.create()).await.unwrap();
        self.target.connect("dwh").await.unwrap().batch_execute("create schema if not exists public").await.unwrap();
    }

    pub(crate) async fn create_mirror(&self, options: &str) {
        let call = format!("call peergate.create_mirror('m', 'shop', 'dwh', '{{\"all\": true}}', '{options}')");
        self.catalog.connect("control").await.unwrap().batch_execute(&call).await.unwrap();
    }

    /// Nothing goes wrong any more: all proxies pass, one engine runs, the mirror is wanted.
    pub(crate) async fn heal(&mut self, journal: &Journal) -> Result<(), String> {
        journal.note("all is well again");
        for server in self.servers() {
            server.proxy.pass();
        }
        for n in 0..2 {
            if let Some(engine) = self.engines[n].take() {
                engine.kill();
            }
        }
        let control = self.catalog.connect("control").await.map_err(|e| e.to_string())?;
        control
            .batch_execute("update peergate.mirrors set desired_state = 'running'")
            .await
            .map_err(|e| e.to_string())?;
        self.start_engine(0, None);
        Ok(())
    }

    /// Waits until the target has all that the source has committed. Nobody may be needed for that.
    pub(crate) async fn caught_up(&self, within: Duration) -> Result<(), String> {
        let nudger = self.catalog.connect("control").await.map_err(|e| e.to_string())?;
        let waiter = self.catalog.connect("control").await.map_err(|e| e.to_string())?;
        let call = format!("call peergate.wait_for_mirror('m', timeout => '{} s')", within.as_secs());
        let mut wait = std::pin::pin!(waiter.batch_execute(&call));
        loop {
            tokio::select! {
                result = &mut wait => return result.map_err(|error| format!("not caught up: {error:?}")),
                () = tokio::time::sleep(Duration::from_millis(200)) => {
                    nudger.batch_execute("select pg_notify('peergate', 'wait:m')").await.map_err(|e| e.to_string())?;
                }
            }
        }
    }

    /// Drops the mirror, and waits until nothing of it is left on the source.
    pub(crate) async fn drop_mirror(&self) -> Result<(), String> {
        let control = self.catalog.connect("control").await.map_err(|e| e.to_string())?;
        control.batch_execute("call peergate.drop_mirror(array['m'])").await.map_err(|e| e.to_string())?;
        let begun = Instant::now();
        while ask(&control, "select count(*) from peergate.mirror_drops").await? != "0" {
            if begun.elapsed() > Duration::from_secs(120) {
                return Err("the dropped mirror is not removed".to_owned());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let source = self.source.connect("shop").await.map_err(|e| e.to_string())?;
        let left = "select (select count(*) from pg_replication_slots) + (select count(*) from pg_publication)";
        match ask(&source, left).await?.as_str() {
            "0" => Ok(()),
            left => Err(format!("{left} slots and publications are left on the source")),
        }
    }

    /// Makes room for the next life.
    pub(crate) async fn clean(&mut self) -> Result<(), String> {
        self.engines = [None, None];
        let clean = "drop schema public cascade; create schema public";
        for (server, database) in [(&self.source, "shop"), (&self.target, "dwh")] {
            let client = server.connect(database).await.map_err(|e| e.to_string())?;
            client.batch_execute(clean).await.map_err(|e| e.to_string())?;
        }
        let control = self.catalog.connect("control").await.map_err(|e| e.to_string())?;
        control.batch_execute("delete from peergate.mirror_events").await.map_err(|e| e.to_string())?;
        for n in 0..2 {
            let _ = std::fs::remove_file(log_of(&self.folder.join(n.to_string())));
        }
        Ok(())
    }

    /// What the catalog and the engines' logs say, for a run that failed.
    pub(crate) async fn explain(&self) -> String {
        let events = "select string_agg(concat_ws(' | ', to_char(at, 'HH24:MI:SS.MS'), node_id, level, kind, lsn, sqlstate, message, detail), E'\\n' order by id)
            from (select * from peergate.mirror_events order by id desc limit 60) e";
        let events = match self.catalog.connect("control").await {
            Ok(control) => ask(&control, events).await,
            Err(error) => Err(error.to_string()),
        };
        let log = |n: usize| {
            let text = std::fs::read_to_string(log_of(&self.folder.join(n.to_string()))).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(40)..].join("\n")
        };
        format!(
            "events:\n{}\n\nlog of engine 0:\n{}\n\nlog of engine 1:\n{}",
            events.unwrap_or_else(|e| e),
            log(0),
            log(1)
        )
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.engines = [None, None];
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

pub(crate) async fn connect(config: &Config) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Returns the first column of the first row as text; empty when there is none, or it is NULL.
pub(crate) async fn ask(client: &Client, query: &str) -> Result<String, String> {
    let messages = client.simple_query(query).await.map_err(|error| format!("{query}: {error:?}"))?;
    let first = messages.iter().find_map(|m| if let SimpleQueryMessage::Row(row) = m { row.get(0) } else { None });
    Ok(first.unwrap_or_default().to_owned())
}
