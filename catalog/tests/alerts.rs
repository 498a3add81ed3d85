//! What the catalog holds of alerts: secrets that nobody reads, and references that not everybody may give.

use catalog::alert::channel::{GivenChannel, documents, seal};
use catalog::cluster::TestCluster;
use catalog::secret::Keyring;
use tokio_postgres::{Client, NoTls};

const WHEN: &str = r#"'[{"metric": "errors", "op": ">", "value": 0}]'"#;

async fn session(cluster: &TestCluster, role: &str) -> Client {
    let (client, connection) = cluster.config("postgres").user(role).connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

fn channel(kind: &str, options: &[(&str, &str)]) -> GivenChannel {
    let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    GivenChannel { kind: kind.to_owned(), options }
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_of_channels_are_sealed_anew_with_those_of_peers() {
    let cluster = tokio::task::spawn_blocking(|| TestCluster::start(&[])).await.unwrap().unwrap();
    let catalog = crate::migrations::catalog(&cluster);
    catalog.migrate().await.unwrap();
    let client = session(&cluster, "postgres").await;
    let keyring = Keyring::parse(&"5a".repeat(32)).unwrap();
    let given = [
        channel("notify", &[]),
        channel("webhook", &[("url", "https://h/geheim"), ("authorization", "geheim")]),
        channel("email", &[("user", "u"), ("port", "025"), ("password", "geheim"), ("from", "a@b"), ("to", "c@d")]),
    ];
    let statement = format!("call peergate.create_alert('a', 'mirror', null, {WHEN}, $1, secrets => $2)");
    client.execute(&statement, &[&documents(&given), &seal(&given, &keyring).unwrap()]).await.unwrap();
    let sealed = "select string_agg(sealed, ' ' order by channel, option) from peergate.alert_secrets";
    let before: String = client.query_one(sealed, &[]).await.unwrap().get(0);
    catalog.reseal().await.unwrap();
    let after: String = client.query_one(sealed, &[]).await.unwrap().get(0);
    assert!(before.split(' ').zip(after.split(' ')).all(|(before, after)| before != after));

    client.batch_execute("call peergate.test_alert('a')").await.unwrap();
    let taken = catalog.take_deliveries(std::time::Duration::from_secs(60), 10).await.unwrap();
    let opened: Vec<_> = taken.iter().map(|d| d.open_channel(&catalog).unwrap().unwrap()).collect();
    assert_eq!(opened[1].get("authorization"), Some("geheim"));
    assert_eq!((opened[2].get("password"), opened[2].get("timeout_seconds")), (Some("geheim"), Some("10")));
    // Behind our back: the password would go elsewhere.
    let evil = r#"update peergate.alert_definitions set channels = jsonb_set(channels, '{2,options,host}', '"evil"')"#;
    client.batch_execute(evil).await.unwrap();
    assert!(catalog.reseal().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_may_read_the_servers_files_names_them() {
    let cluster = tokio::task::spawn_blocking(|| TestCluster::start(&[])).await.unwrap().unwrap();
    crate::migrate(&cluster).await;
    let owner = session(&cluster, "postgres").await;
    owner.batch_execute("create role adm login in role peergate_admin").await.unwrap();
    let admin = session(&cluster, "adm").await;
    for option in ["url_env", "url_file", "authorization_env", "authorization_file"] {
        let url = if option.starts_with("url") { "" } else { r#""url_env": "U", "# };
        let insert = format!(
            r#"insert into peergate.alerts (name, conditions, channels) values ('a', {WHEN}, '[{{"channel": "webhook", "options": {{{url}"{option}": "X"}}}}]')"#
        );
        let error = admin.batch_execute(&insert).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42501", "{option}");
        owner.batch_execute(&insert).await.unwrap();
        owner.batch_execute("delete from peergate.alerts").await.unwrap();
    }
}
