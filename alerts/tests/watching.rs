//! What fires when, once, whoever looks.

use std::future::poll_fn;
use std::sync::{Arc, Mutex};

use tokio_postgres::AsyncMessage;

use crate::receivers::Receiver;
use crate::support::{Channel, Fixture, wait_for};

const LAG: &str = r#"[{"metric": "lag_seconds", "op": ">", "value": "10"}]"#;
const ORDERS: (&str, Option<&str>) = ("mirror", Some("orders"));

#[tokio::test(flavor = "multi_thread")]
async fn every_channel_is_told_of_firing_and_recovery() {
    let fixture = Fixture::start().await;
    let (web, slack, mail) = (Receiver::web(None).await, Receiver::web(None).await, Receiver::mail(None).await);
    let listening = listen(&fixture).await;
    let (hook, incoming) =
        (format!("http://u:p@127.0.0.1:{}/h?k=v", web.port()), format!("http://127.0.0.1:{}/s", slack.port()));
    let port = mail.port().to_string();
    let mail_options = [
        ("from", "pg@example.com"),
        ("to", "a@example.com, b@example.com"),
        ("host", "127.0.0.1"),
        ("port", &port),
        ("tls", "never"),
    ];
    let channels = [
        Channel("webhook", &[("url", &hook), ("authorization", "Bearer t")]),
        Channel("slack", &[("url", &incoming)]),
        Channel("email", &mail_options),
        Channel("notify", &[]),
    ];
    fixture.create_alert(ORDERS, LAG, &channels, "{}").await;
    let process = fixture.run("node-1");
    fixture.set_lag(93.25).await;
    web.wait(1).await;
    mail.wait(1).await;
    slack.wait(1).await;
    fixture.set_lag(0.0).await;
    let told = web.wait(2).await;

    assert!(told[0].head.starts_with("POST /h?k=v HTTP/1.1\r\n"), "{}", told[0].head);
    assert!(told[0].head.contains("authorization: Bearer t\r\n"), "{}", told[0].head);
    let (fired, recovered) = (told[0].json(), told[1].json());
    assert_eq!(fired["event"], "fired");
    assert_eq!((&fired["alert"], &fired["mirror"], &fired["value"]), (&"a".into(), &"orders".into(), &"93.2".into()));
    assert_eq!(fired["message"], "mirror \"orders\": lag_seconds is 93.2 (lag_seconds > 10)");
    assert_eq!((&recovered["event"], &recovered["incident_id"]), (&"recovered".into(), &fired["event_id"]));
    assert_eq!(
        slack.wait(2).await[0].json()["text"],
        ":rotating_light: *FIRED a on mirror \"orders\"*\nmirror \"orders\": lag_seconds is 93.2 (lag_seconds &gt; 10)"
    );
    let mails = mail.wait(2).await;
    assert!(mails[0].head.contains("RCPT TO:<b@example.com>"), "{}", mails[0].head);
    assert!(mails[0].body.contains("Subject: [Peergate] FIRED a on mirror \"orders\"\r\n"), "{}", mails[0].body);
    assert!(mails[1].body.contains("RECOVERED"), "{}", mails[1].body);
    let notified = || listening.lock().unwrap().clone();
    wait_for("two notifications", async || (notified().len() == 2).then_some(())).await;
    assert_eq!(serde_json::from_str::<serde_json::Value>(&notified()[0]).unwrap(), fired);
    fixture.wait_for_text("select string_agg(distinct state, ' ') from peergate.alert_deliveries", "sent").await;
    process.stop().await;
}

/// What is notified on the default channel.
async fn listen(fixture: &Fixture) -> Arc<Mutex<Vec<String>>> {
    let mut config = tokio_postgres::Config::new();
    let port = fixture.text("select current_setting('port')").await.parse().unwrap();
    let config = config.host("127.0.0.1").port(port).user("postgres").dbname("postgres");
    let (client, mut connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
    let got: Arc<Mutex<Vec<String>>> = Arc::default();
    let kept = got.clone();
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notification(notification) = message {
                kept.lock().unwrap().push(notification.payload().to_owned());
            }
        }
    });
    client.batch_execute("listen peergate_alerts").await.unwrap();
    // It listens as long as its client is there: as long as the test.
    std::mem::forget(client);
    got
}

#[tokio::test(flavor = "multi_thread")]
async fn it_fires_after_its_hold_and_repeats_at_its_interval() {
    let fixture = Fixture::start().await;
    let when = r#"[{"metric": "lag_seconds", "op": ">", "value": "10", "for": "2 seconds"}]"#;
    fixture.create_alert(ORDERS, when, &[Channel("notify", &[])], r#"{"repeat_interval": "2"}"#).await;
    fixture.set_lag(60.0).await;
    let begun = fixture.text("select clock_timestamp()::text").await;
    let process = fixture.run("node-1");
    fixture.wait_for_events("fired repeated repeated").await;
    fixture.set_lag(1.0).await;
    fixture.wait_for_text("select count(*)::text from peergate.alert_events where kind = 'recovered'", "1").await;
    let gaps = format!(
        "select bool_and(gap >= interval '1.9 s')::text from (select at - lag(at, 1, '{begun}') over (order by id) as gap from peergate.alert_events where kind <> 'recovered') e"
    );
    assert_eq!(fixture.text(&gaps).await, "true");
    assert_eq!(fixture.text("select count(distinct incident_id)::text from peergate.alert_events").await, "1");
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_fires_once_however_many_look_and_however_often_they_are_killed() {
    let fixture = Fixture::start().await;
    let web = Receiver::web(None).await;
    let url = format!("http://127.0.0.1:{}/", web.port());
    fixture.create_alert(("mirror", None), LAG, &[Channel("webhook", &[("url", &url)])], "{}").await;
    let first = fixture.run("node-1");
    let second = fixture.run("node-2");
    fixture.set_lag(60.0).await;
    web.wait(1).await;
    fixture.wait_for_text("select count(distinct node_id)::text from peergate.alert_runtime", "1").await;
    first.kill().await;
    fixture.wait_for_look().await;
    second.kill().await;
    let third = fixture.run("node-3");
    fixture.wait_for_look().await;
    assert_eq!(fixture.text("select string_agg(kind, ' ') from peergate.alert_events").await, "fired");
    fixture.wait_for_text("select string_agg(state, ' ') from peergate.alert_deliveries", "sent").await;
    assert_eq!(web.all().len(), 1);
    // The same again, in another process' hands.
    fixture.create_replacement(&url).await;
    fixture.wait_for_look().await;
    fixture.set_lag(0.0).await;
    fixture.wait_for_events("fired recovered").await;
    third.stop().await;
}

impl Fixture {
    async fn create_replacement(&self, url: &str) {
        let given = [catalog::alert::channel::GivenChannel {
            kind: "webhook".to_owned(),
            options: vec![("url".to_owned(), url.to_owned())],
        }];
        let secrets = catalog::alert::channel::seal(&given, &self.keyring).unwrap();
        let channels = catalog::alert::channel::documents(&given);
        let statement =
            "call peergate.create_alert('a', 'mirror', null, $1::text::jsonb, $2, secrets => $3, or_replace => true)";
        self.client.execute(statement, &[&LAG, &channels, &secrets]).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_mirror_is_can_be_watched_whatever_it_is() {
    let fixture = Fixture::start().await;
    for (metric, op, value, cause) in [
        ("state", "=", "blocked", "state = 'blocked'"),
        ("errors", ">=", "3", "attempt = 2, error_sqlstate = '08006', error_message = 'no'"),
        ("conflicts", ">", "0", "error_sqlstate = '23505', error_message = 'twice'"),
        ("lag_bytes", ">", "15", "source_lsn = '0/20'"),
        // It does not stream: what it last knew, and the time since.
        ("lag_seconds", ">", "3600", "state = 'retrying', source_lsn_at = now() - interval '2 hours'"),
        ("slot_wal_bytes", ">=", "1GB", "slot_wal_bytes = 1073741824"),
    ] {
        let when = format!(r#"[{{"metric": "{metric}", "op": "{op}", "value": "{value}"}}]"#);
        let table = "insert into peergate.mirror_table_runtime (mirror_id, source_schema, source_name, target_schema, target_name, state)
                     select id, 's', 't', 's', 't', 'blocked' from peergate.mirrors";
        fixture.create_alert(("mirror", None), &when, &[Channel("notify", &[])], "{}").await;
        let process = fixture.run("node-1");
        fixture.wait_for_look().await;
        assert_eq!(fixture.text("select count(*)::text from peergate.alert_events").await, "0", "{metric}");
        fixture.client.batch_execute(&format!("update peergate.mirror_runtime set {cause}")).await.unwrap();
        if metric == "errors" {
            fixture.client.batch_execute(table).await.unwrap();
        }
        fixture.wait_for_events("fired").await;
        process.stop().await;
        let reset = "call peergate.drop_alert(array['a']); delete from peergate.alert_events; delete from peergate.mirror_table_runtime;
            update peergate.mirror_runtime set state = 'running', attempt = 0, error_sqlstate = null, error_message = null, source_lsn = '0/10', source_lsn_at = now()";
        fixture.client.batch_execute(reset).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_cannot_be_reached_is_told_of_until_it_can_be() {
    let fixture = Fixture::start().await;
    let when = r#"[{"metric": "unreachable_seconds", "op": ">", "value": "0"}]"#;
    fixture.create_alert(("peer", None), when, &[Channel("notify", &[])], "{}").await;
    let process = fixture.run("node-1");
    fixture
        .wait_for_text("select count(*)::text from peergate.peer_reachability where reached_at is not null", "2")
        .await;
    let port = fixture.text("select options ->> 'port' from peergate.peers where name = 'shop'").await;
    // Nobody listens there, and what is noted is due at once.
    let point = async |port: &str| {
        let statement = format!(
            r#"update peergate.peers set options = options || '{{"port": "{port}"}}' where name = 'shop'; update peergate.peer_reachability set checked_at = null"#
        );
        fixture.client.batch_execute(&statement).await.unwrap();
    };
    point("1").await;
    fixture.wait_for_events("fired").await;
    let message = fixture.text("select message from peergate.alert_events").await;
    assert!(message.starts_with("peer \"shop\": unreachable_seconds is") && message.contains("127.0.0.1"), "{message}");
    point(&port).await;
    fixture.wait_for_events("fired recovered").await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alert_ends_with_what_it_watches_or_with_itself() {
    let fixture = Fixture::start().await;
    fixture.create_alert(("mirror", None), LAG, &[Channel("notify", &[])], "{}").await;
    let process = fixture.run("node-1");
    fixture.set_lag(60.0).await;
    fixture.wait_for_events("fired").await;
    // Who drops an alert and does not commit keeps nobody waiting, and neither does who changes it.
    let mut other = fixture.connect().await;
    let transaction = other.transaction().await.unwrap();
    transaction.batch_execute("call peergate.create_alert('b', 'mirror', 'orders', '[{\"metric\": \"errors\", \"op\": \">\", \"value\": \"0\"}]', '[{\"channel\": \"notify\"}]')").await.unwrap();
    transaction.commit().await.unwrap();
    let transaction = other.transaction().await.unwrap();
    transaction.batch_execute("call peergate.drop_alert(array['b'])").await.unwrap();
    fixture.wait_for_look().await;
    transaction.rollback().await.unwrap();
    fixture.client.batch_execute("call peergate.drop_mirror(array['orders'])").await.unwrap();
    fixture.wait_for_events("fired recovered").await;
    assert_eq!(
        fixture.text("select message from peergate.alert_events where kind = 'recovered'").await,
        "mirror \"orders\" is not watched any more"
    );
    assert_eq!(fixture.text("select string_agg(name, ' ') from peergate.alerts").await, "a", "b went with its mirror");
    fixture.client.batch_execute("call peergate.drop_alert(array['a'])").await.unwrap();
    assert_eq!(fixture.text("select count(*)::text from peergate.alert_states").await, "0");
    assert_eq!(fixture.text("select count(*)::text from peergate.alert_events").await, "2", "what happened is kept");
    process.stop().await;
}
