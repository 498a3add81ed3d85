//! What becomes of deliveries that fail, wait, or were made by a process that died.

use std::time::Duration;

use catalog::alert::Outcome;

use crate::receivers::Receiver;
use crate::support::{Channel, Fixture};

const LAG: &str = r#"[{"metric": "lag_seconds", "op": ">", "value": "10"}]"#;
const ORDERS: (&str, Option<&str>) = ("mirror", Some("orders"));
const NOW: &str = "update peergate.alert_deliveries set retry_at = now() where state = 'pending'";

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_tried_again_in_order_and_shown_meanwhile() {
    let fixture = Fixture::start().await;
    let web = Receiver::web(None).await;
    web.answer_with(Some("503 Busy"));
    let url = format!("http://127.0.0.1:{}/geheim", web.port());
    fixture.create_alert(ORDERS, LAG, &[Channel("webhook", &[("url", &url)]), Channel("notify", &[])], "{}").await;
    let process = fixture.run("node-1");
    fixture.set_lag(60.0).await;
    let error = format!("127.0.0.1:{} refused: 503 Service Unavailable: said so it", web.port());
    fixture.wait_for_text("select delivery_error from peergate.alerts", &error).await;
    fixture.set_lag(0.0).await;
    fixture.wait_for_events("fired recovered").await;
    // The other channel is told; this one is not told of the end before the beginning.
    let states =
        "select string_agg(state || ' ' || (attempt > 0), ', ' order by channel, id) from peergate.alert_deliveries";
    fixture.wait_for_text(states, "pending true, pending false, sent true, sent true").await;
    assert_eq!(
        fixture.text("select (retry_at > now())::text from peergate.alert_deliveries where error is not null").await,
        "true"
    );
    web.answer_with(None);
    fixture.client.batch_execute(NOW).await.unwrap();
    let told: Vec<_> = web.wait(2).await.iter().map(|r| r.json()["event"].clone()).collect();
    assert_eq!(told, ["fired", "recovered"]);
    fixture.wait_for_text("select coalesce(delivery_error, 'none') || undelivered from peergate.alerts", "none0").await;
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_process_left_is_made_by_another() {
    let fixture = Fixture::start().await;
    let web = Receiver::web(None).await;
    let url = format!("http://127.0.0.1:{}/", web.port());
    fixture.create_alert(ORDERS, LAG, &[Channel("webhook", &[("url", &url)])], "{}").await;
    fixture.client.batch_execute("call peergate.test_alert('a')").await.unwrap();
    let taken = fixture.catalog.take_deliveries(Duration::from_secs(600), 10).await.unwrap();
    assert_eq!(taken.len(), 1);
    assert!(
        fixture.catalog.take_deliveries(Duration::from_secs(600), 10).await.unwrap().is_empty(),
        "it has been taken"
    );
    let process = fixture.run("node-1");
    fixture.client.batch_execute(NOW).await.unwrap();
    web.wait(1).await;
    fixture.wait_for_text("select state from peergate.alert_deliveries", "sent").await;
    // The one that was thought dead is late, and changes nothing.
    fixture.catalog.end_delivery(&taken[0], &Outcome::Failed("late".to_owned())).await.unwrap();
    assert_eq!(fixture.text("select state || attempt from peergate.alert_deliveries").await, "sent2");
    process.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_says_what_came_of_it() {
    let fixture = Fixture::start().await;
    let (web, mail) = (Receiver::web(None).await, Receiver::mail(None).await);
    let url = format!("http://127.0.0.1:{}/geheim", web.port());
    let port = mail.port().to_string();
    let mail_options =
        [("from", "pg@example.com"), ("to", "a@example.com"), ("host", "127.0.0.1"), ("port", &port), ("tls", "never")];
    fixture
        .create_alert(
            ("peer", None),
            r#"[{"metric": "unreachable_seconds", "op": ">", "value": "60"}]"#,
            &[Channel("webhook", &[("url", &url)]), Channel("email", &mail_options)],
            "{}",
        )
        .await;
    let process = fixture.run("node-1");
    let test = async || {
        fixture.client.batch_execute("call peergate.test_alert('a')").await.unwrap();
        let waited = fixture.client.batch_execute("call peergate.wait_for_alert('a', timeout => '50 s')").await;
        waited.map_err(|error| {
            let error = error.as_db_error().unwrap();
            (error.code().code().to_owned(), format!("{}: {}", error.message(), error.detail().unwrap_or_default()))
        })
    };
    test().await.unwrap();
    assert_eq!(web.all()[0].json()["event"], "test");
    assert_eq!(web.all()[0].json()["message"], "test of alert \"a\", requested by postgres");
    mail.answer_with(Some("550 5.7.1 go away"));
    let (code, message) = test().await.unwrap_err();
    assert_eq!(code, "58030");
    assert!(
        message.contains("could not be delivered to channel 2 (email)") && message.contains("go away"),
        "{message}"
    );
    // It is not tried again: somebody was looking.
    fixture
        .wait_for_text(
            "select string_agg(distinct state, ' ' order by state) from peergate.alert_deliveries",
            "failed sent",
        )
        .await;
    mail.answer_with(None);
    web.answer_with(Some("302 Found"));
    let (_, message) = test().await.unwrap_err();
    assert!(message.contains("302 Found") && !message.contains("geheim"), "{message}");
    // Nobody listens there.
    let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let given = [catalog::alert::channel::GivenChannel {
        kind: "webhook".to_owned(),
        options: vec![("url".to_owned(), format!("http://127.0.0.1:{port}/geheim"))],
    }];
    let secrets = catalog::alert::channel::seal(&given, &fixture.keyring).unwrap();
    let channels = catalog::alert::channel::documents(&given);
    fixture
        .client
        .execute("call peergate.alter_alert('a', channels => $1, secrets => $2)", &[&channels, &secrets])
        .await
        .unwrap();
    let (_, message) = test().await.unwrap_err();
    assert!(message.contains(&format!("cannot reach 127.0.0.1:{port}")) && !message.contains("geheim"), "{message}");
    process.stop().await;
}
