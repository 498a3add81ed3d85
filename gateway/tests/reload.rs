//! SIGHUP: what is wrong changes nothing, what is right holds for new sessions, and nobody is thrown out.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::sys::signal::Signal;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::time::Duration;
use tokio_postgres::{AsyncMessage, NoTls};

use crate::serve::{Place, Server};
use crate::support::{eventually, new_database};
use crate::tls::{Certificates, shown_certificate};

/// A server with a configuration file, on a catalog in the shared cluster.
struct Configured {
    server: Server,
    file: PathBuf,
    database: String,
    _cluster: Arc<catalog::cluster::TestCluster>,
}

impl Configured {
    async fn start(place: &Path, certificates: &Certificates, more: &str) -> Configured {
        let (cluster, database) = new_database().await;
        let file = certificates.folder.join("peergate.toml");
        fs::write(&file, more).unwrap();
        let (file_name, url) = (file.to_str().unwrap().to_owned(), cluster.url(&database) + "?sslmode=disable");
        let place = place.to_owned();
        let start = move || Server::start(&place, &["--catalog", &url, "--config", &file_name, "--role", "gateway"]);
        let server = tokio::task::spawn_blocking(start).await.unwrap();
        Configured { server, file, database, _cluster: cluster }
    }

    /// Changes the file and says so; returns what is logged about it.
    async fn reload(&self, text: &str) -> String {
        let before = self.server.log().len();
        fs::write(&self.file, text).unwrap();
        self.server.signal(Signal::SIGHUP);
        let said = || self.server.log()[before..].to_owned();
        eventually("the reload is logged", async || {
            ["cannot reload", "were read again", "with a restart"].iter().any(|line| said().contains(line))
        })
        .await;
        said()
    }

    fn config(&self) -> tokio_postgres::Config {
        self.server.config_as("postgres", "", &self.database)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_changes_certificates_and_limits_and_drops_nobody() {
    let (place, certificates) = (Place::new(), Certificates::new());
    let first = certificates.issue("server", "localhost", &["localhost"]);
    let shown = CertificateDer::from_pem_file(&first.certificate).unwrap();
    let tls =
        format!("tls_cert = '{}'\ntls_key = '{}'\nlog = 'info'\n", first.certificate.display(), first.key.display());
    let running = Configured::start(&place.0, &certificates, &tls).await;
    let address = running.server.address().parse().unwrap();
    let ca = certificates.folder.join("ca.crt");
    assert_eq!(shown_certificate(address, &ca).await, shown);
    let (client, connection) = running.config().connect(NoTls).await.unwrap();
    tokio::spawn(connection);

    // Nothing changes until all of it is right.
    for (text, complaint) in [
        ("sessions_max = 0\n".to_owned() + &tls, "sessions_max"),
        ("sesions_max = 5\n".to_owned() + &tls, "unknown field"),
        ("tls_cert = '/nonexistent'\ntls_key = '/nonexistent'\n".to_owned(), "/nonexistent"),
        (tls.replace("'info'", "'a=b=c'"), "log filter"),
    ] {
        let said = running.reload(&text).await;
        assert!(said.contains("ERROR") && said.contains(complaint), "{said}");
        assert_eq!(shown_certificate(address, &ca).await, shown);
    }

    let second = certificates.issue("server", "localhost", &["localhost"]);
    let required = format!("tls = 'required'\nsessions_max = 2\nlisten = '127.0.0.1:1'\n{tls}");
    let said = running.reload(&required).await;
    assert!(said.contains("changed=\"sessions_max, tls\""), "{said}");
    // A flag wins over the file, so the listening address is none of those that wait for a restart.
    assert!(!said.contains("WARN"), "{said}");
    assert_eq!(shown_certificate(address, &ca).await, CertificateDer::from_pem_file(&second.certificate).unwrap());
    let error = running.config().connect(NoTls).await.err().unwrap();
    assert_eq!(error.code().unwrap().code(), "28000");
    let said =
        running.reload(&format!("threads = 3\nlog = 'warn'\nsessions_max = 1\n{}", tls.replace("log", "#"))).await;
    assert!(said.contains("settings=\"threads\""), "{said}");
    let error = running.config().connect(NoTls).await.err().unwrap();
    assert_eq!(error.code().unwrap().code(), "53300");
    client.query("select 1", &[]).await.unwrap();
    drop(client);
    let log = tokio::task::spawn_blocking(|| running.server.stop()).await.unwrap();
    assert!(!log.contains("stopped"), "the log's filter did not change: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_reloads_and_stops_the_process() {
    let (place, certificates) = (Place::new(), Certificates::new());
    let mut running = Configured::start(&place.0, &certificates, "sessions_max = 7").await;
    let (console, mut connection) = running.config().dbname("peergate_admin").connect(NoTls).await.unwrap();
    let notices = Arc::new(Mutex::new(Vec::new()));
    let heard = notices.clone();
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notice(notice) = message {
                heard.lock().unwrap().push(notice.to_string());
            }
        }
    });
    let setting = async || {
        let rows = console.query("show config", &[]).await.unwrap();
        let row = rows.iter().find(|row| row.get::<_, &str>("key") == "sessions_max").unwrap();
        (row.get::<_, String>("value"), row.get::<_, String>("default"), row.get::<_, String>("changeable"))
    };
    assert_eq!(setting().await, ("7".to_owned(), "10000".to_owned(), "yes".to_owned()));
    fs::write(&running.file, "sessions_max = 8\nthreads = 5").unwrap();
    console.batch_execute("RELOAD").await.unwrap();
    assert_eq!(setting().await.0, "8");
    let said = notices.lock().unwrap().clone();
    assert_eq!(said, ["NOTICE: changed: sessions_max", "WARNING: these change only with a restart: threads"]);
    fs::write(&running.file, "sessions_max = 'many'").unwrap();
    let error = console.batch_execute("RELOAD").await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!((error.code().code(), error.detail()), ("F0000", Some("All stays as it was.")));
    assert_eq!(setting().await.0, "8");

    console.batch_execute("SHUTDOWN").await.unwrap();
    let ended = tokio::task::spawn_blocking(move || running.server.child.wait().unwrap());
    let status = tokio::time::timeout(Duration::from_secs(10), ended).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
}
