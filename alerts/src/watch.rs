//! Looks at the alerts again and again.

use std::convert::Infallible;
use std::time::Duration;

use catalog::Catalog;
use tokio::time::{MissedTickBehavior, interval};

use crate::decide::decide;

/// How often each alert is looked at, by one of the processes.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

pub(crate) async fn run(catalog: &Catalog, node_id: &str) -> Infallible {
    let mut ticks = interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        ticks.tick().await;
        // Half of it, so that one's own tick finds what one looked at in the tick before.
        let looked = catalog.look_at_alerts(node_id, LOOK_INTERVAL / 2, decide).await;
        match &looked {
            Err(error) if !failing => tracing::warn!(error = %error, "alerts cannot be looked at"),
            _ => {}
        }
        failing = looked.is_err();
    }
}
