//! A catalog with two peers and a mirror, whose figures the tests set themselves; no engine runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use catalog::Catalog;
use catalog::alert::channel::{GivenChannel, documents, seal};
use catalog::cluster::TestCluster;
use catalog::connect::Connector;
use catalog::peer::PeerOptions;
use catalog::secret::Keyring;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

/// How long anything that is waited for may take.
const DEADLINE: Duration = Duration::from_secs(60);

/// Waits until `look` finds something.
pub(crate) async fn wait_for<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(begun.elapsed() < DEADLINE, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub(crate) struct Fixture {
    cluster: TestCluster,
    pub(crate) client: Client,
    pub(crate) catalog: Catalog,
    pub(crate) keyring: Arc<Keyring>,
}

/// A process that watches and tells.
pub(crate) struct Process {
    shutdown: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Process {
    /// Ends it as a signal would.
    pub(crate) async fn stop(self) {
        self.shutdown.send(true).unwrap();
        self.task.await.unwrap();
    }

    /// Ends it as a crash would: in the middle of whatever it does.
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

impl Fixture {
    pub(crate) async fn start() -> Fixture {
        let cluster = tokio::task::spawn_blocking(|| TestCluster::start(&[])).await.unwrap().unwrap();
        let options = PeerOptions::plain([
            ("host", "127.0.0.1".to_owned()),
            ("port", cluster.port().to_string()),
            ("user", "postgres".to_owned()),
            ("database", "postgres".to_owned()),
        ]);
        let keyring = Arc::new(Keyring::parse(&"5a".repeat(32)).unwrap());
        let catalog = Catalog::new(Connector::new(&options).unwrap(), keyring.clone()).unwrap();
        catalog.migrate().await.unwrap();
        let (client, connection) = cluster.config("postgres").connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        let peer = format!(
            r#"{{"host": "127.0.0.1", "port": "{}", "user": "postgres", "database": "postgres"}}"#,
            cluster.port()
        );
        let setup = format!(
            r#"call peergate.create_peer('shop', 'postgres', '{peer}'); call peergate.create_peer('dwh', 'postgres', '{peer}');
               call peergate.create_mirror('orders', 'shop', 'dwh', '{{"all": true}}');
               update peergate.mirror_runtime set state = 'running', applied_lsn = '0/10', source_lsn = '0/10', lag_seconds = 0, source_lsn_at = now()"#
        );
        client.batch_execute(&setup).await.unwrap();
        Fixture { cluster, client, catalog, keyring }
    }

    /// Another session.
    pub(crate) async fn connect(&self) -> Client {
        let (client, connection) = self.cluster.config("postgres").connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// Starts a process.
    pub(crate) fn run(&self, node_id: &str) -> Process {
        let (shutdown, receiver) = watch::channel(false);
        let task = tokio::spawn(alerts::run(self.catalog.clone(), node_id.to_owned(), receiver));
        Process { shutdown, task }
    }

    /// Makes an alert `a`. `when` is JSON, as is `options`.
    pub(crate) async fn create_alert(
        &self,
        on: (&str, Option<&str>),
        when: &str,
        channels: &[Channel<'_>],
        options: &str,
    ) {
        let given: Vec<GivenChannel> = channels.iter().map(Channel::given).collect();
        let secrets = seal(&given, &self.keyring).unwrap();
        let statement = "call peergate.create_alert('a', $1, $2, $3::text::jsonb, $4, $5::text::jsonb, $6)";
        self.client.execute(statement, &[&on.0, &on.1, &when, &documents(&given), &options, &secrets]).await.unwrap();
    }

    /// Sets the mirror's lag.
    pub(crate) async fn set_lag(&self, seconds: f64) {
        self.client.execute("update peergate.mirror_runtime set lag_seconds = $1", &[&seconds]).await.unwrap();
    }

    pub(crate) async fn text(&self, query: &str) -> String {
        let row = self.client.query_one(query, &[]).await.unwrap();
        row.get::<_, Option<String>>(0).unwrap_or_default()
    }

    /// Waits until a query gives this text.
    pub(crate) async fn wait_for_text(&self, query: &str, expected: &str) {
        let found = async || (self.text(query).await == expected).then_some(());
        wait_for(&format!("{query} to be {expected}"), found).await;
    }

    /// Waits until these events were told, and no others.
    pub(crate) async fn wait_for_events(&self, expected: &str) {
        self.wait_for_text("select string_agg(kind, ' ' order by id) from peergate.alert_events", expected).await;
    }

    /// Waits until the alert has been looked at once more, from beginning to end.
    pub(crate) async fn wait_for_look(&self) {
        let now = self.text("select clock_timestamp()::text").await;
        for _ in 0..2 {
            let query = format!("select (max(evaluated_at) > '{now}')::text from peergate.alert_runtime");
            self.wait_for_text(&query, "true").await;
        }
    }
}

/// A channel: its kind and options.
pub(crate) struct Channel<'a>(pub(crate) &'a str, pub(crate) &'a [(&'a str, &'a str)]);

impl Channel<'_> {
    fn given(&self) -> GivenChannel {
        let options = self.1.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        GivenChannel { kind: self.0.to_owned(), options }
    }
}
