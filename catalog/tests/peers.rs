//! Where secrets may go: the catalog and the gateway must judge alike.

use catalog::cluster::TestCluster;
use catalog::peer::{GivenPeer, PeerOptions};
use tokio_postgres::NoTls;

#[tokio::test(flavor = "multi_thread")]
async fn catalog_and_gateway_agree_on_where_secrets_may_go() {
    let cluster = tokio::task::spawn_blocking(|| TestCluster::start(&[])).await.unwrap().unwrap();
    crate::migrate(&cluster).await;
    let (client, connection) = cluster.config("postgres").connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    let peers: Vec<serde_json::Value> = [
        "{}",
        r#"{"host": "a"}"#,
        r#"{"host": " localhost "}"#,
        r#"{"host": "localhost", "port": "5432"}"#,
        r#"{"hostaddr": "127.0.0.1"}"#,
        r#"{"port": "5433"}"#,
        r#"{"sslmode": "disable"}"#,
        r#"{"sslmode": "allow"}"#,
        r#"{"sslmode": "prefer", "sslrootcert": "/ca"}"#,
        r#"{"sslmode": "require"}"#,
        r#"{"sslmode": "require", "root_ca": "x"}"#,
        r#"{"sslmode": "verify-ca", "sslrootcert": "/ca"}"#,
        r#"{"sslmode": "verify-full", "sslrootcert": "/ca"}"#,
        r#"{"sslmode": "verify-full", "sslrootcert": "/ca2"}"#,
        r#"{"sslmode": "verify-full", "tls_host": "b"}"#,
        r#"{"sslmode": "verify-full", "skip_cert_verification": "true"}"#,
        r#"{"sslmode": "verify-full", "disable_tls": "true"}"#,
        r#"{"require_tls": "true"}"#,
        r#"{"require_tls": "false"}"#,
        r#"{"require_tls": "true", "root_ca": "x"}"#,
        r#"{"require_tls": "true", "sslmode": "prefer"}"#,
        r#"{"application_name": "x", "user": "other"}"#,
    ]
    .iter()
    .map(|text| serde_json::from_str(text).unwrap())
    .collect();
    let options = |value: &serde_json::Value| -> PeerOptions {
        let pairs = value.as_object().unwrap().iter().map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned()));
        GivenPeer::new(pairs.collect()).unwrap().peer_options()
    };
    let mut may = [0, 0];
    for before in &peers {
        let destination: String = client.query_one("select peergate.destination($1)", &[before]).await.unwrap().get(0);
        assert_eq!(destination, options(before).destination());
        for after in &peers {
            let row = client.query_one("select peergate.secrets_hindrance($1, $2)", &[before, after]).await.unwrap();
            let hindrance: Option<String> = row.get(0);
            let stay = options(before).secrets_may_stay(&options(after));
            assert_eq!(hindrance.is_none(), stay, "{before} to {after}: {hindrance:?}");
            may[usize::from(stay)] += 1;
        }
    }
    assert!(may[0] > 100 && may[1] > 50, "{may:?}");
}
