//! Connects to the peers of which an alert asks whether they can be reached.

use std::convert::Infallible;
use std::time::Duration;

use catalog::Catalog;
use catalog::alert::PeerCheck;
use catalog::connect::check_peer;
use catalog::peer::PeerOptions;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// How often each peer is connected to, by one of the processes.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// How often peers that are due are asked for.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// How many are connected to together.
const TOGETHER: i64 = 8;

/// How long a peer may take.
const PATIENCE: Duration = Duration::from_secs(15);

pub(crate) async fn run(catalog: &Catalog) -> Infallible {
    let mut ticks = interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // A catalog that cannot be reached is told of elsewhere.
        let Ok(due) = catalog.due_peer_checks(CHECK_INTERVAL, TOGETHER).await else { continue };
        let mut checks = JoinSet::new();
        for check in due {
            let catalog = catalog.clone();
            checks.spawn(async move {
                let error = reach(&catalog, &check).await.err();
                if let Err(error) = catalog.set_reachability(check.peer_id, error.as_deref()).await {
                    tracing::debug!(peer = check.name, error = %error, "reachability not noted");
                }
            });
        }
        while checks.join_next().await.is_some() {}
    }
}

/// Connects to a peer, or says why it cannot be.
async fn reach(catalog: &Catalog, check: &PeerCheck) -> Result<(), String> {
    let options = PeerOptions::from_document(&check.document, catalog.keyring()).map_err(|error| error.to_string())?;
    match timeout(PATIENCE, check_peer(&options)).await {
        Ok(connected) => connected.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {PATIENCE:?}")),
    }
}
