//! TLS towards clients: what each `sslmode` gets, what clients must show, and certificates that change.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use catalog::cluster::Binaries;
use catalog::connect::Connector;
use catalog::peer::PeerOptions;
use gateway::config::{ClientCheck, TlsClients, TlsFiles};
use gateway::server::ServerOptions;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::support::{Gateway, eventually, start, start_with};

/// A folder with the files of certificates, and the authority that signs them. Removed when dropped.
pub(crate) struct Certificates {
    pub(crate) folder: PathBuf,
    authority: CertifiedIssuer<'static, KeyPair>,
}

fn params(name: &str, alternatives: &[&str]) -> CertificateParams {
    let names: Vec<String> = alternatives.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

impl Certificates {
    /// Makes an authority, in `ca.crt`.
    pub(crate) fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("peergate-tls-{:016x}", rand::random::<u64>()));
        std::fs::create_dir(&folder).unwrap();
        let mut params = params(&folder.display().to_string(), &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(folder.join("ca.crt"), authority.pem()).unwrap();
        Self { folder, authority }
    }

    /// Writes `<file>.crt` and `<file>.key`: a certificate for that common name and those names of hosts.
    pub(crate) fn issue(&self, file: &str, name: &str, hosts: &[&str]) -> TlsFiles {
        let key = KeyPair::generate().unwrap();
        let certificate = params(name, hosts).signed_by(&key, &self.authority).unwrap();
        let files = TlsFiles { certificate: self.path(file, "crt"), key: self.path(file, "key") };
        std::fs::write(&files.certificate, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        // libpq wants nobody else to read a key.
        std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o600)).unwrap();
        files
    }

    fn path(&self, file: &str, extension: &str) -> PathBuf {
        self.folder.join(file).with_extension(extension)
    }

    fn authority_file(&self) -> PathBuf {
        self.path("ca", "crt")
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Connects with psql. Returns what it says of the connection, or its error.
async fn conninfo(gateway: &Gateway, more: &str) -> Result<String, String> {
    let psql = Binaries::find(None).unwrap().tool("psql").unwrap();
    let host = if more.contains("host=") { "" } else { "host=127.0.0.1" };
    let (port, database) = (gateway.address.port(), &gateway.database);
    let dsn = format!("{host} hostaddr=127.0.0.1 port={port} user=postgres dbname={database} {more}");
    // Without a home libpq looks for no certificates of its own.
    let mut command = tokio::process::Command::new(psql);
    command.env("HOME", "/nonexistent").args(["-X", "-A", "-t", "-d", &dsn, "-c", "\\conninfo"]);
    let output = command.output().await.unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// Says whether a session uses TLS.
async fn is_tls(gateway: &Gateway, more: &str) -> Result<bool, String> {
    conninfo(gateway, more).await.map(|said| said.contains("SSL connection"))
}

/// Opens sessions as sslmode=verify-full does.
fn verifying_connector(gateway: &Gateway, authority: &Path) -> Connector {
    let options = PeerOptions::plain([
        ("host", "localhost".to_owned()),
        ("hostaddr", "127.0.0.1".to_owned()),
        ("port", gateway.address.port().to_string()),
        ("user", "postgres".to_owned()),
        ("database", gateway.database.clone()),
        ("sslmode", "verify-full".to_owned()),
        ("sslrootcert", authority.display().to_string()),
    ]);
    Connector::new(&options).unwrap()
}

/// Asks for TLS and returns the certificate that is shown.
pub(crate) async fn shown_certificate(address: SocketAddr, authority: &Path) -> CertificateDer<'static> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(authority).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = builder.with_root_certificates(roots).with_no_client_auth();
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").await.unwrap();
    assert_eq!(socket.read_u8().await.unwrap(), b'S');
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let stream = connector.connect(ServerName::try_from("localhost").unwrap(), socket).await.unwrap();
    stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

#[tokio::test]
async fn every_sslmode_gets_what_it_asks_for() {
    let certificates = Certificates::new();
    let others = Certificates::new();
    let files = certificates.issue("server", "localhost", &["localhost"]);
    let gateway = start_with(|o| o.tls = Some(files.clone())).await;
    let ca = format!("sslrootcert={}", certificates.authority_file().display());
    let other = format!("sslrootcert={}", others.authority_file().display());
    for (mode, tls) in [("disable", false), ("allow", false), ("prefer", true), ("require", true)] {
        assert_eq!(is_tls(&gateway, &format!("sslmode={mode}")).await, Ok(tls), "{mode}");
    }
    assert_eq!(is_tls(&gateway, &format!("sslmode=verify-ca {ca}")).await, Ok(true));
    assert_eq!(is_tls(&gateway, &format!("sslmode=verify-full host=localhost {ca}")).await, Ok(true));
    let error = is_tls(&gateway, &format!("sslmode=verify-full host=elsewhere {ca}")).await.unwrap_err();
    assert!(error.contains("does not match host name"), "{error}");
    for mode in ["verify-ca", "verify-full host=localhost"] {
        let error = is_tls(&gateway, &format!("sslmode={mode} {other}")).await.unwrap_err();
        assert!(error.contains("certificate verify failed"), "{error}");
    }
    for version in ["TLSv1.2", "TLSv1.3"] {
        let bounds = format!("ssl_min_protocol_version={version} ssl_max_protocol_version={version}");
        let said = conninfo(&gateway, &format!("sslmode=require {bounds}")).await.unwrap();
        assert!(said.contains(&format!("protocol: {version}")), "{said}");
    }
    let error =
        is_tls(&gateway, "sslmode=require ssl_min_protocol_version=TLSv1 ssl_max_protocol_version=TLSv1.1").await;
    assert!(error.unwrap_err().contains("SSL error"));
}

#[tokio::test]
async fn sslmode_without_tls_and_where_it_must_be() {
    let gateway = start().await;
    for mode in ["disable", "allow", "prefer"] {
        assert_eq!(is_tls(&gateway, &format!("sslmode={mode}")).await, Ok(false), "{mode}");
    }
    let error = is_tls(&gateway, "sslmode=require").await.unwrap_err();
    assert!(error.contains("server does not support SSL, but SSL was required"), "{error}");

    let certificates = Certificates::new();
    let files = certificates.issue("server", "localhost", &["localhost"]);
    let gateway = start_with(|o| (o.tls, o.tls_required) = (Some(files), true)).await;
    for mode in ["allow", "prefer", "require"] {
        assert_eq!(is_tls(&gateway, &format!("sslmode={mode}")).await, Ok(true), "{mode}");
    }
    let error = is_tls(&gateway, "sslmode=disable").await.unwrap_err();
    assert!(error.contains("FATAL:  this server takes only TLS connections"), "{error}");
}

#[tokio::test]
async fn clients_show_the_certificates_that_are_asked_for() {
    let (certificates, others) = (Certificates::new(), Certificates::new());
    let server = certificates.issue("server", "localhost", &["localhost"]);
    let shown = |files: &TlsFiles| {
        format!("sslmode=require sslcert={} sslkey={}", files.certificate.display(), files.key.display())
    };
    let right = shown(&certificates.issue("right", "postgres", &[]));
    let wrong = shown(&certificates.issue("wrong", "ann", &[]));
    let foreign = shown(&others.issue("foreign", "postgres", &[]));
    let with = |check| {
        let clients = TlsClients { authorities: certificates.authority_file(), check };
        let server = server.clone();
        start_with(move |o| (o.tls, o.tls_required, o.tls_clients) = (Some(server), true, Some(clients)))
    };

    let gateway = with(ClientCheck::VerifyCa).await;
    assert_eq!(is_tls(&gateway, &right).await, Ok(true));
    assert_eq!(is_tls(&gateway, &wrong).await, Ok(true));
    assert!(is_tls(&gateway, &foreign).await.unwrap_err().contains("unknown ca"));
    let error = is_tls(&gateway, "sslmode=require").await.unwrap_err();
    assert!(error.contains("FATAL:  connection requires a valid client certificate"), "{error}");

    let gateway = with(ClientCheck::VerifyFull).await;
    for version in ["TLSv1.2", "TLSv1.3"] {
        assert_eq!(is_tls(&gateway, &format!("{right} ssl_max_protocol_version={version}")).await, Ok(true));
    }
    let error = is_tls(&gateway, &wrong).await.unwrap_err();
    assert!(error.contains("FATAL:  certificate authentication failed"), "{error}");
    assert!(is_tls(&gateway, &foreign).await.is_err());
}

#[tokio::test]
async fn new_sessions_get_the_new_certificate_and_old_ones_go_on() {
    let certificates = Certificates::new();
    let old = certificates.issue("old", "localhost", &["localhost"]);
    let new = certificates.issue("new", "localhost", &["localhost"]);
    let der = |files: &TlsFiles| CertificateDer::from_pem_file(&files.certificate).unwrap();
    let ca = certificates.authority_file();
    let gateway = start_with(|o| o.tls = Some(old.clone())).await;
    assert_eq!(shown_certificate(gateway.address, &ca).await, der(&old));
    let connector = verifying_connector(&gateway, &ca);
    let mut session = connector.connect().await.unwrap().0;

    let mut options = ServerOptions::new(gateway.address);
    options.tls = Some(new.clone());
    gateway.control.apply(gateway.control.prepare(&options).await.unwrap());
    assert_eq!(shown_certificate(gateway.address, &ca).await, der(&new));
    let transaction = session.transaction().await.unwrap();
    assert_eq!(transaction.query_one("select 1", &[]).await.unwrap().get::<_, i32>(0), 1);

    // What cannot be used is refused by name, before anything changes.
    let nowhere = TlsFiles { key: "/nonexistent".into(), ..new.clone() };
    let of_another = TlsFiles { key: old.key.clone(), ..new.clone() };
    let not_pem = TlsFiles { certificate: new.key.clone(), ..new.clone() };
    for (files, named) in [(nowhere, "/nonexistent"), (of_another, "new.crt"), (not_pem, "new.key")] {
        options.tls = Some(files);
        let error = gateway.control.prepare(&options).await.err().unwrap().to_string();
        assert!(error.contains(named), "{error}");
    }
    options.tls = Some(old.clone());
    options.tls_clients = Some(TlsClients { authorities: old.key.clone(), check: ClientCheck::VerifyCa });
    assert!(gateway.control.prepare(&options).await.err().unwrap().to_string().contains("old.key"));
    assert_eq!(shown_certificate(gateway.address, &ca).await, der(&new));
    drop(transaction);
    assert_eq!(session.query_one("select 2", &[]).await.unwrap().get::<_, i32>(0), 2);
}

#[tokio::test]
async fn cancel_requests_come_over_tls_too() {
    let certificates = Certificates::new();
    let files = certificates.issue("server", "localhost", &["localhost"]);
    let gateway = start_with(|o| (o.tls, o.tls_required) = (Some(files), true)).await;
    let connector = verifying_connector(&gateway, &certificates.authority_file());
    let (session, attempt) = connector.connect().await.unwrap();
    let direct = gateway.connect_directly().await;
    let pid: i32 = session.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    let cancel = async {
        let asleep = "select from pg_stat_activity where pid = $1 and wait_event = 'PgSleep'";
        eventually("it sleeps", async || !direct.query(asleep, &[&pid]).await.unwrap().is_empty()).await;
        session.cancel_token().cancel_query(attempt.tls.clone()).await.unwrap();
    };
    let (slept, ()) = tokio::join!(session.batch_execute("select pg_sleep(60)"), cancel);
    assert_eq!(slept.unwrap_err().code().unwrap().code(), "57014");
}
