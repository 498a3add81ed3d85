//! Statements about alerts through the extended protocol: parameters, and secrets that stay in the gateway.

use tokio_postgres::Client;

use crate::support::start;

async fn text(client: &Client, query: &str) -> String {
    client.query_one(query, &[]).await.unwrap().get::<_, Option<String>>(0).unwrap_or_default()
}

#[tokio::test]
async fn alerts_are_made_and_changed_with_parameters() {
    let gateway = start().await;
    let client = gateway.connect().await;
    let create = "create alert a on all mirrors when lag_seconds > $4 for $1 or state = $2 notify slack (url = $3), email (host = $5, from = 'a@b', to = 'c@d') with (repeat_interval = $6)";
    let create = client.prepare(create).await.unwrap();
    assert_eq!((create.params().len(), create.columns().len()), (6, 0), "the hidden parameter is not described");
    let values = ["5 minutes", "blocked", "https://h/geheim", "90", "smtp", "60"];
    let parameters: Vec<&(dyn tokio_postgres::types::ToSql + Sync)> = values.iter().map(|v| v as _).collect();
    client.execute(&create, &parameters).await.unwrap();
    let stored = text(&client, "select concat_ws(' ', conditions, channels, options) from alerts").await;
    for part in ["\"for\": \"00:05:00\"", "\"value\": \"90\"", "\"blocked\"", "\"host\": \"smtp\"", "00:01:00"] {
        assert!(stored.contains(part), "{part}: {stored}");
    }
    assert!(!stored.contains("geheim"), "{stored}");
    assert_eq!(text(&client, "select string_agg(option, ' ') from alert_secrets").await, "url");

    let error = client.execute(&create, &parameters).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42710");
    let alter = client.prepare("alter alert a when errors > $1 notify webhook (url = $2)").await.unwrap();
    client.execute(&alter, &[&"3", &"https://h/geheim"]).await.unwrap();
    let error = client.execute(&alter, &[&"3", &"geheim"]).await.unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.code().code(), "22023");
    assert!(error.message().contains("\"url\"") && !error.message().contains("geheim"), "{error:?}");
    let error = client.execute(&alter, &[&"3", &None::<String>]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "22023");
    let error = client.execute(&alter, &[&"many", &"https://h/geheim"]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "22023");
    client.execute("alter alert a set (repeat_interval = $1)", &[&"2 h"]).await.unwrap();
    client.execute("comment on alert a is $1", &[&"it's ours"]).await.unwrap();
    assert_eq!(
        text(&client, "select options::text || comment from alerts").await,
        r#"{"repeat_interval": "02:00:00"}it's ours"#
    );
    client.execute("wait for alert a timeout $1", &[&"10 s"]).await.unwrap();
    client.execute("drop alert a", &[]).await.unwrap();
}
