//! A catalog, a source and a target on a real server, an engine between them, and ways to look at both sides.

use std::sync::Arc;
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::cluster::{Binaries, StopMode, TestCluster};
use catalog::connect::Connector;
use catalog::peer::PeerOptions;
use catalog::secret::Keyring;
use mirror::engine::{self, EngineOptions};
use pg::TableName;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use crate::proxy::Proxy;

/// How long anything that is waited for may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// The servers and the engine of one test.
pub(crate) struct Fixture {
    /// The server with the source's and the catalog's databases, and the target's unless that has its own.
    pub(crate) cluster: TestCluster,
    /// The target's server when source and target are to be of different versions.
    target_cluster: Option<TestCluster>,
    /// Through what the engine reaches source and target.
    pub(crate) proxies: Option<[Proxy; 2]>,
    /// Sessions on the three databases.
    pub(crate) control: Client,
    pub(crate) source: Client,
    pub(crate) target: Client,
    pub(crate) catalog: Catalog,
    engine: Option<RunningEngine>,
}

/// How to stop an engine, and what it says when it has.
pub(crate) type RunningEngine = (watch::Sender<bool>, JoinHandle<Result<(), mirror::error::Error>>);

/// Starts a server with an empty source and target, the catalog, both peers, and an engine.
pub(crate) async fn start() -> Fixture {
    let mut fixture = start_servers(&[]).await;
    fixture.start_engine("node-1");
    fixture
}

/// As [`start`], without an engine, and with other server settings.
pub(crate) async fn start_servers(settings: &'static [(&'static str, &'static str)]) -> Fixture {
    start_with(settings, false).await
}

/// As [`start`], but the engine reaches source and target through proxies, which can stall and cut.
pub(crate) async fn start_behind_proxies() -> Fixture {
    let mut fixture = start_with(&[], true).await;
    fixture.start_engine("node-1");
    fixture
}

async fn start_with(settings: &'static [(&'static str, &'static str)], proxied: bool) -> Fixture {
    let [source, target] = binaries();
    let second = (source != target).then(|| start_cluster(target, settings));
    let cluster = start_cluster(source, settings).await;
    let target_cluster = match second {
        Some(second) => Some(second.await),
        None => None,
    };
    let of_target = target_cluster.as_ref().unwrap_or(&cluster);
    for (server, database) in [(&cluster, "control"), (&cluster, "shop"), (of_target, "dwh")] {
        let admin = connect(server, "postgres").await;
        admin.batch_execute(&format!("create database {database}")).await.unwrap();
    }
    let options = PeerOptions::plain([
        ("host", "127.0.0.1".to_owned()),
        ("port", cluster.port().to_string()),
        ("user", "postgres".to_owned()),
        ("database", "control".to_owned()),
    ]);
    let keyring = Arc::new(Keyring::parse(&"5a".repeat(32)).unwrap());
    let catalog = Catalog::new(Connector::new(&options).unwrap(), keyring).unwrap();
    catalog.migrate().await.unwrap();
    let control = connect(&cluster, "control").await;
    let mut ports = [cluster.port(), of_target.port()];
    let proxies = if proxied {
        let proxies = [Proxy::start(ports[0]).await, Proxy::start(ports[1]).await];
        ports = [proxies[0].port(), proxies[1].port()];
        Some(proxies)
    } else {
        None
    };
    for (peer, port) in [("shop", ports[0]), ("dwh", ports[1])] {
        let options = format!(
            "{{\"host\": \"127.0.0.1\", \"port\": \"{port}\", \"user\": \"postgres\", \"database\": \"{peer}\"}}"
        );
        control.batch_execute(&format!("call peergate.create_peer('{peer}', 'postgres', '{options}')")).await.unwrap();
    }
    let (source, target) = (connect(&cluster, "shop").await, connect(of_target, "dwh").await);
    Fixture { cluster, target_cluster, proxies, control, source, target, catalog, engine: None }
}

/// The servers that source and target run on: `PEERGATE_PG_BIN_SOURCE` and `PEERGATE_PG_BIN_TARGET` name their folders.
pub(crate) fn binaries() -> [Binaries; 2] {
    ["PEERGATE_PG_BIN_SOURCE", "PEERGATE_PG_BIN_TARGET"].map(|variable| match std::env::var_os(variable) {
        Some(folder) if !folder.is_empty() => Binaries::in_directory(folder.as_ref()).unwrap(),
        _ => Binaries::find(None).unwrap(),
    })
}

async fn start_cluster(binaries: Binaries, settings: &'static [(&'static str, &'static str)]) -> TestCluster {
    tokio::task::spawn_blocking(move || TestCluster::start_with(&binaries, settings)).await.unwrap().unwrap()
}

/// Opens a session of the superuser.
pub(crate) async fn connect(cluster: &TestCluster, database: &str) -> Client {
    let (client, connection) = cluster.config(database).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

impl Fixture {
    /// The target's server.
    pub(crate) fn target_cluster(&self) -> &TestCluster {
        self.target_cluster.as_ref().unwrap_or(&self.cluster)
    }

    /// Opens a further session on the target.
    pub(crate) async fn connect_target(&self) -> Client {
        connect(self.target_cluster(), "dwh").await
    }

    /// The servers: one, or two when source and target are of different versions.
    fn clusters(&mut self) -> impl Iterator<Item = &mut TestCluster> {
        std::iter::once(&mut self.cluster).chain(&mut self.target_cluster)
    }

    /// Stops the servers in that way and starts them again, and opens the three sessions anew.
    pub(crate) async fn restart_servers(mut self, mode: StopMode) -> Fixture {
        self = tokio::task::spawn_blocking(move || {
            for cluster in self.clusters() {
                cluster.cluster().stop(mode);
                cluster.cluster().restart().unwrap();
            }
            self
        })
        .await
        .unwrap();
        self.control = connect(&self.cluster, "control").await;
        self.source = connect(&self.cluster, "shop").await;
        self.target = self.connect_target().await;
        self
    }

    /// Starts an engine in this process.
    pub(crate) fn start_engine(&mut self, node_id: &str) {
        assert!(self.engine.is_none(), "an engine runs already");
        self.engine = Some(spawn_engine(&self.catalog, node_id));
    }

    /// Stops the engine as SIGTERM does.
    pub(crate) async fn stop_engine(&mut self) {
        let (stop, running) = self.engine.take().unwrap();
        stop.send_replace(true);
        running.await.unwrap().unwrap();
    }

    /// Ends the engine as SIGKILL does: its tasks go, its connections close.
    pub(crate) async fn abort_engine(&mut self) {
        let (_, running) = self.engine.take().unwrap();
        running.abort();
        let _ = running.await;
    }

    /// Makes a peer of a database on the source's server, named like that.
    pub(crate) async fn create_peer(&self, database: &str) {
        let options = format!(
            "{{\"host\": \"127.0.0.1\", \"port\": \"{}\", \"user\": \"postgres\", \"database\": \"{database}\"}}",
            self.cluster.port()
        );
        let create = format!("call peergate.create_peer('{database}', 'postgres', '{options}')");
        self.control.batch_execute(&create).await.unwrap();
    }

    /// Creates mirror `m` from `shop` to `dwh`.
    pub(crate) async fn create_mirror(&self, selection: &str, options: &str) {
        let call = format!(
            "call peergate.create_mirror('m', 'shop', 'dwh', '{}', '{options}')",
            selection.replace('\'', "''")
        );
        self.control.batch_execute(&call).await.unwrap();
    }

    /// Creates mirror `m` of a query from `shop` to `dwh`; the options are those of a JSON object.
    pub(crate) async fn create_query(&self, query: &str, options: &str) {
        let call = format!("call peergate.create_query_mirror('m', 'shop', 'dwh', $q${query}$q$, '{{{options}}}')");
        if let Err(error) = self.control.batch_execute(&call).await {
            panic!("{}", describe(&error));
        }
    }

    /// Waits until the target has all that the source had committed.
    pub(crate) async fn caught_up(&self) {
        if let Err(error) = self.try_caught_up().await {
            panic!("not caught up: {error}\n{}", self.explain().await);
        }
    }

    /// As [`Fixture::caught_up`], for a mirror of another name.
    pub(crate) async fn mirror_caught_up(&self, mirror: &str) {
        if let Err(error) = self.try_wait_for(mirror).await {
            panic!("{mirror} not caught up: {error}\n{}", self.explain().await);
        }
    }

    /// As [`Fixture::caught_up`], with the error that a user would see.
    pub(crate) async fn try_caught_up(&self) -> Result<(), String> {
        self.try_wait_for("m").await
    }

    async fn try_wait_for(&self, mirror: &str) -> Result<(), String> {
        let wait = format!("call peergate.wait_for_mirror('{mirror}', timeout => '180s')");
        let nudge = format!("select pg_notify('peergate', 'wait:{mirror}')");
        let wait = self.control.batch_execute(&wait);
        let mut wait = std::pin::pin!(wait);
        // What the gateway does when it sees WAIT FOR MIRROR; again and again, as the mirror may not run yet.
        let nudger = connect(&self.cluster, "control").await;
        loop {
            tokio::select! {
                result = &mut wait => return result.map_err(|e| describe(&e)),
                () = tokio::time::sleep(Duration::from_millis(100)) => {
                    nudger.batch_execute(&nudge).await.unwrap();
                }
            }
        }
    }

    /// What the catalog says of the mirror, for a test that fails.
    pub(crate) async fn explain(&self) -> String {
        let query = "select string_agg(concat_ws(' | ', level, kind, message, detail, hint), E'\\n' order by id) from peergate.mirror_events";
        self.control.query_one(query, &[]).await.unwrap().get::<_, Option<String>>(0).unwrap_or_default()
    }

    /// Asks the catalog, see [`ask`].
    pub(crate) async fn ask(&self, query: &str) -> String {
        ask(&self.control, query).await
    }

    /// Waits until a query on the catalog gives `expected`.
    pub(crate) async fn wait_until(&self, query: &str, expected: &str) {
        let mut last = String::new();
        if !eventually(async || {
            last = self.ask(query).await;
            last == expected
        })
        .await
        {
            panic!("{query} gives {last}, not {expected}\n{}", self.explain().await);
        }
    }

    /// Waits until the mirror is in a state.
    pub(crate) async fn wait_for_state(&self, state: &str) {
        self.wait_until("select state from peergate.mirrors where name = 'm'", state).await;
    }

    /// Compares all tables of both sides as multisets of rows, and returns how many there are.
    pub(crate) async fn assert_equal(&self) -> usize {
        let tables = "select schemaname::text, tablename::text from pg_tables
                      where schemaname not in ('information_schema', 'peergate') and schemaname not like 'pg%' order by 1, 2";
        let tables = self.source.query(tables, &[]).await.unwrap();
        for table in &tables {
            let (schema, name): (&str, &str) = (table.get(0), table.get(1));
            let rows = |rows: Vec<tokio_postgres::Row>| -> Vec<(String, i64)> {
                rows.iter().map(|r| (r.get(0), r.get(1))).collect()
            };
            let query = format!(
                "select whole_row::text, count(*) from {} whole_row group by 1 order by 1",
                TableName::new(schema, name).quoted()
            );
            let source = rows(self.source.query(&query, &[]).await.unwrap());
            let target = rows(self.target.query(&query, &[]).await.unwrap());
            if source != target {
                let difference: Vec<_> = source.iter().filter(|r| !target.contains(r)).take(3).collect();
                let surplus: Vec<_> = target.iter().filter(|r| !source.contains(r)).take(3).collect();
                panic!("table {schema}.{name} differs\nmissing: {difference:?}\ntoo much: {surplus:?}");
            }
        }
        tables.len()
    }
}

/// Starts an engine in this process.
pub(crate) fn spawn_engine(catalog: &Catalog, node_id: &str) -> RunningEngine {
    let (stop, stopped) = watch::channel(false);
    let options = EngineOptions { node_id: node_id.to_owned(), host: "test".to_owned(), role: "engine" };
    (stop, tokio::spawn(engine::run(catalog.clone(), options, stopped)))
}

/// Returns the first column of the first row as text; empty when there is none, or it is NULL.
pub(crate) async fn ask(client: &Client, query: &str) -> String {
    let messages = client.simple_query(query).await.unwrap();
    let first = messages.iter().find_map(|m| if let SimpleQueryMessage::Row(row) = m { row.get(0) } else { None });
    first.unwrap_or_default().to_owned()
}

/// Looks again and again until something holds; false when it does not in time.
pub(crate) async fn eventually(mut holds: impl AsyncFnMut() -> bool) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < DEADLINE {
        if holds().await {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    false
}

/// An error as a user sees it: SQLSTATE, message, detail and hint.
pub(crate) fn describe(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!(
            "{}: {} DETAIL: {} HINT: {}",
            db.code().code(),
            db.message(),
            db.detail().unwrap_or_default(),
            db.hint().unwrap_or_default()
        ),
        None => error.to_string(),
    }
}
