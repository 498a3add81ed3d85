//! The port for monitoring, as Prometheus and a load balancer see it.

use std::net::SocketAddr;
use std::sync::Arc;

use catalog::Catalog;
use catalog::connect::Connector;
use catalog::peer::PeerOptions;
use catalog::secret::Keyring;
use gateway::config::Role;
use gateway::metrics::{self, Monitor};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_postgres::NoTls;

use crate::serve::{Place, Server};
use crate::support::{Gateway, catalog_in, eventually, new_database, start, start_with};

/// What a page says.
struct Page {
    status: u16,
    head: String,
    body: String,
}

async fn request(address: SocketAddr, line: &str) -> Page {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(format!("{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Page { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

async fn get(address: SocketAddr, path: &str) -> Page {
    request(address, &format!("GET {path}")).await
}

/// Returns the value of one metric, labels included in its name.
fn value(page: &Page, name: &str) -> Option<f64> {
    let line = page.body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map(|value| value.parse().unwrap())
}

async fn watch(gateway: &Gateway) -> (SocketAddr, Arc<Monitor>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let monitor = Monitor::new(Role::Gateway);
    tokio::spawn(metrics::serve(listener, monitor.clone()));
    monitor.watch_catalog(catalog_in(&gateway.cluster, &gateway.database));
    (address, monitor)
}

#[tokio::test]
async fn sessions_are_counted() {
    let gateway = start().await;
    let (address, monitor) = watch(&gateway).await;
    monitor.watch_gateway(gateway.control.clone());
    let client = gateway.connect().await;
    for _ in 0..3 {
        client.batch_execute("select repeat('x', 1000)").await.unwrap();
    }
    client.batch_execute("begin; select 1").await.unwrap();
    let page = get(address, "/metrics").await;
    assert!(page.head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{}", page.head);
    assert!(page.body.ends_with("# EOF\n"));
    assert_eq!(value(&page, "peergate_sessions{state=\"idle in transaction\"}"), Some(1.0), "{}", page.body);
    assert_eq!(value(&page, "peergate_sessions{state=\"idle\"}"), Some(0.0));
    assert_eq!(value(&page, "peergate_logins_total{result=\"ok\"}"), Some(1.0));
    assert_eq!(value(&page, "peergate_catalog_up"), Some(1.0));
    assert_eq!(value(&page, "peergate_draining"), Some(0.0));
    assert_eq!(value(&page, "peergate_backend_connect_seconds_count"), Some(1.0));
    assert!(value(&page, "peergate_bytes_total{direction=\"sent\"}").unwrap() > 3000.0);
    // The login's and the three statements'.
    assert!(value(&page, "peergate_transactions_total").unwrap() >= 4.0);

    // What sessions that have ended had counted is kept.
    drop(client);
    let refused = gateway.config(gateway.address.port()).user("nobody_here").connect(NoTls).await;
    assert!(refused.is_err());
    eventually("the session has ended", async || {
        let page = get(address, "/metrics").await;
        value(&page, "peergate_sessions{state=\"idle in transaction\"}") == Some(0.0)
            && value(&page, "peergate_logins_total{result=\"failed\"}") == Some(1.0)
            && value(&page, "peergate_bytes_total{direction=\"sent\"}").unwrap() > 3000.0
    })
    .await;
}

#[tokio::test]
async fn errors_cancels_and_handshakes_are_counted() {
    let certificates = crate::tls::Certificates::new();
    let files = certificates.issue("server", "localhost", &["localhost"]);
    let gateway = start_with(|o| (o.tls, o.sessions_max) = (Some(files), 1)).await;
    let (address, monitor) = watch(&gateway).await;
    monitor.watch_gateway(gateway.control.clone());
    let ca = certificates.folder.join("ca.crt");
    crate::tls::shown_certificate(gateway.address, &ca).await;
    // One that speaks no TLS after it has asked for it.
    let mut socket = gateway.socket().await;
    socket.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").await.unwrap();
    socket.read_u8().await.unwrap();
    socket.write_all(b"plain text, and enough of it").await.unwrap();
    crate::support::read_to_end(&mut socket).await;
    let sessions = async || {
        let page = get(address, "/metrics").await;
        let lines = page.body.lines().filter(|line| line.starts_with("peergate_sessions{"));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum::<f64>()
    };
    eventually("both are gone", async || sessions().await == 0.0).await;
    let client = gateway.connect().await;
    let error = gateway.config(gateway.address.port()).connect(NoTls).await.err().unwrap();
    assert_eq!(error.code().unwrap().code(), "53300");
    // Beside a session there is room for one connection more.
    eventually("the one that was refused is gone", async || sessions().await == 1.0).await;
    client.cancel_token().cancel_query(NoTls).await.unwrap();
    eventually("the cancel request has come", async || {
        value(&get(address, "/metrics").await, "peergate_cancels_total") == Some(1.0)
    })
    .await;
    let page = get(address, "/metrics").await;
    assert_eq!(value(&page, "peergate_errors_total{sqlstate=\"53300\"}"), Some(1.0), "{}", page.body);
    assert_eq!(value(&page, "peergate_tls_handshakes_total{result=\"ok\"}"), Some(1.0));
    assert_eq!(value(&page, "peergate_tls_handshakes_total{result=\"failed\"}"), Some(1.0));
    assert_eq!(value(&page, "peergate_sessions_max"), Some(1.0));
    let days = 24.0 * 3600.0;
    assert!(value(&page, "peergate_certificate_expiry_seconds").unwrap() > 20_000.0 * days);
}

#[tokio::test]
async fn mirrors_are_shown_with_state_and_lag() {
    let gateway = start().await;
    let (address, monitor) = watch(&gateway).await;
    monitor.watch_gateway(gateway.control.clone());
    let client = gateway.connect().await;
    let options = gateway.peer_options();
    for name in ["a", "b"] {
        client.batch_execute(&format!("create peer {name} from postgres with ({options})")).await.unwrap();
    }
    client.batch_execute("create mirror m from a to b for all tables").await.unwrap();
    let page = get(address, "/metrics").await;
    assert_eq!(value(&page, "peergate_mirror_state{mirror=\"m\",state=\"created\"}"), Some(1.0), "{}", page.body);
    assert_eq!(value(&page, "peergate_statements_total{statement=\"CREATE PEER\"}"), Some(2.0));
    assert_eq!(value(&page, "peergate_mirror_rows_total{mirror=\"m\"}"), Some(0.0));
}

#[tokio::test]
async fn readiness_follows_the_gateway_and_the_catalog() {
    let gateway = start().await;
    let (address, monitor) = watch(&gateway).await;
    assert_eq!(get(address, "/healthz").await.status, 200);
    let page = get(address, "/readyz").await;
    assert_eq!((page.status, page.body.as_str()), (503, "starting\n"));
    monitor.watch_gateway(gateway.control.clone());
    let page = get(address, "/readyz").await;
    assert_eq!((page.status, page.body.as_str()), (200, "ready\n"));
    // A session in a transaction is waited for.
    let client = gateway.connect().await;
    client.batch_execute("begin").await.unwrap();
    gateway.stop.send_replace(true);
    eventually("it drains", async || get(address, "/readyz").await.body == "draining\n").await;
    assert_eq!(get(address, "/healthz").await.status, 200);
    assert_eq!(value(&get(address, "/metrics").await, "peergate_draining"), Some(1.0));

    assert_eq!(get(address, "/").await.status, 404);
    assert_eq!(request(address, "POST /metrics").await.status, 405);
    assert_eq!(request(address, "HEAD /metrics").await.body, "");
}

#[tokio::test]
async fn a_catalog_that_is_away_is_a_number_and_a_reason() {
    let options = PeerOptions::plain([
        ("host", "127.0.0.1".to_owned()),
        ("port", catalog::cluster::free_port().unwrap().to_string()),
    ]);
    let keyring = Arc::new(Keyring::parse(&"5a".repeat(32)).unwrap());
    let monitor = Monitor::new(Role::Engine);
    assert_eq!(monitor.ready().await, Err("starting".to_owned()));
    monitor.watch_catalog(Catalog::new(Connector::new(&options).unwrap(), keyring).unwrap());
    let reason = monitor.ready().await.unwrap_err();
    assert!(reason.starts_with("the catalog does not answer"), "{reason}");
    assert!(monitor.metrics().await.contains("peergate_catalog_up 0\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_binary_serves_the_port_in_every_role() {
    for role in ["gateway", "engine"] {
        let (cluster, database) = new_database().await;
        let place = Place::new();
        let (folder, url) = (place.0.clone(), cluster.url(&database) + "?sslmode=disable");
        let start =
            move || Server::start(&folder, &["--catalog", &url, "--role", role, "--metrics-listen", "127.0.0.1:0"]);
        let server = tokio::task::spawn_blocking(start).await.unwrap();
        eventually("the port is logged", async || server.log().contains("/readyz address=")).await;
        let log = server.log();
        let address = log.split_once("/readyz address=").unwrap().1.lines().next().unwrap().parse().unwrap();
        eventually("it is ready", async || get(address, "/readyz").await.status == 200).await;
        let page = get(address, "/metrics").await;
        assert!(page.body.contains(&format!("role=\"{role}\"}} 1\n")), "{}", page.body);
        assert_eq!(value(&page, "peergate_sessions_max").is_some(), role == "gateway");
        tokio::task::spawn_blocking(|| server.stop()).await.unwrap();
    }
}
