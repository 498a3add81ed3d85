//! Web and mail servers behind TLS, whose authority is given, or not trusted.

use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio_rustls::TlsAcceptor;

use crate::receivers::Receiver;
use crate::support::{Channel, Fixture};

/// An authority's certificate as PEM, and a server that has one of its certificates for `localhost`.
fn authority() -> (String, TlsAcceptor) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let config = config.with_no_client_auth().with_single_cert(vec![certificate.der().clone()], key).unwrap();
    (issuer.pem(), TlsAcceptor::from(Arc::new(config)))
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_behind_tls_are_verified() {
    let fixture = Fixture::start().await;
    let (pem, acceptor) = authority();
    let file = std::env::temp_dir().join(format!("peergate-alerts-{}.pem", std::process::id()));
    std::fs::write(&file, pem).unwrap();
    let root = file.to_str().unwrap();
    let (web, mail) = (Receiver::web(Some(acceptor.clone())).await, Receiver::mail(Some(acceptor)).await);
    let url = format!("https://localhost:{}/", web.port());
    let port = mail.port().to_string();
    let mail_options = |root: Option<&'static str>| {
        let mut options = vec![("from", "pg@example.com"), ("to", "a@example.com"), ("user", "u"), ("password", "p")];
        options.extend(root.map(|root| ("sslrootcert", root)));
        options
    };
    let root: &'static str = Box::leak(root.to_owned().into_boxed_str());
    let port: &'static str = Box::leak(port.into_boxed_str());
    let when = r#"[{"metric": "errors", "op": ">", "value": "0"}]"#;
    let process = fixture.run("node-1");
    let test = async || {
        fixture.client.batch_execute("call peergate.test_alert('a')").await.unwrap();
        let waited = fixture.client.batch_execute("call peergate.wait_for_alert('a', timeout => '50 s')").await;
        waited.map_err(|error| error.as_db_error().unwrap().detail().unwrap_or_default().to_owned())
    };

    let mut trusting = mail_options(Some(root));
    trusting.push(("port", port));
    let hook = [("url", url.as_str()), ("sslrootcert", root)];
    fixture.create_alert(("mirror", None), when, &[Channel("webhook", &hook), Channel("email", &trusting)], "{}").await;
    test().await.unwrap();
    assert_eq!((web.all().len(), mail.all().len()), (1, 1));
    let said = &mail.all()[0].head;
    let (before, after) = said.split_at(said.find("STARTTLS").unwrap());
    assert!(!before.contains("AUTH") && after.contains("AUTH PLAIN AHUAcA=="), "{said}");
    fixture.client.batch_execute("call peergate.drop_alert(array['a'])").await.unwrap();

    let mut doubting = mail_options(None);
    doubting.push(("port", port));
    for channel in [Channel("webhook", &[("url", &url)]), Channel("email", &doubting)] {
        fixture.create_alert(("mirror", None), when, &[channel], "{}").await;
        let error = test().await.unwrap_err().to_lowercase();
        assert!(error.contains("certificate") || error.contains("issuer"), "{error}");
        fixture.client.batch_execute("call peergate.drop_alert(array['a'])").await.unwrap();
    }
    assert_eq!((web.all().len(), mail.all().len()), (1, 1));
    std::fs::remove_file(file).unwrap();
    process.stop().await;
}
