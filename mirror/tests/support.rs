//! A catalog, a source and a target on a real server, an engine between them, and ways to look at both sides.

use std::sync::Arc;
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::cluster::TestCluster;
use catalog::connect::Connector;
use catalog::peer::PeerOptions;
use catalog::secret::Keyring;
use mirror::engine::{self, EngineOptions};
use pg::TableName;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

/// How long anything that is waited for may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// The servers and the engine of one test.
pub(crate) struct Fixture {
    pub(crate) cluster: TestCluster,
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
    let cluster = tokio::task::spawn_blocking(move || TestCluster::start(settings)).await.unwrap().unwrap();
    let admin = connect(&cluster, "postgres").await;
    for database in ["control", "shop", "dwh"] {
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
    let port = cluster.port();
    for peer in ["shop", "dwh"] {
        let options = format!(
            "{{\"host\": \"127.0.0.1\", \"port\": \"{port}\", \"user\": \"postgres\", \"database\": \"{peer}\"}}"
        );
        control.batch_execute(&format!("call peergate.create_peer('{peer}', 'postgres', '{options}')")).await.unwrap();
    }
    let (source, target) = (connect(&cluster, "shop").await, connect(&cluster, "dwh").await);
    Fixture { cluster, control, source, target, catalog, engine: None }
}

/// Opens a session of the superuser.
pub(crate) async fn connect(cluster: &TestCluster, database: &str) -> Client {
    let (client, connection) = cluster.config(database).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

impl Fixture {
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

    /// Creates mirror `m` from `shop` to `dwh`.
    pub(crate) async fn create_mirror(&self, selection: &str, options: &str) {
        let call = format!("call peergate.create_mirror('m', 'shop', 'dwh', '{selection}', '{options}')");
        self.control.batch_execute(&call).await.unwrap();
    }

    /// Waits until the target has all that the source had committed.
    pub(crate) async fn caught_up(&self) {
        if let Err(error) = self.try_caught_up().await {
            panic!("not caught up: {error}\n{}", self.explain().await);
        }
    }

    /// As [`Fixture::caught_up`], with the error that a user would see.
    pub(crate) async fn try_caught_up(&self) -> Result<(), String> {
        let wait = self.control.batch_execute("call peergate.wait_for_mirror('m', timeout => '60s')");
        let mut wait = std::pin::pin!(wait);
        // What the gateway does when it sees WAIT FOR MIRROR; again and again, as the mirror may not run yet.
        let nudger = connect(&self.cluster, "control").await;
        loop {
            tokio::select! {
                result = &mut wait => return result.map_err(|e| describe(&e)),
                () = tokio::time::sleep(Duration::from_millis(100)) => {
                    nudger.batch_execute("select pg_notify('peergate', 'wait:m')").await.unwrap();
                }
            }
        }
    }

    /// What the catalog says of the mirror, for a test that fails.
    async fn explain(&self) -> String {
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
