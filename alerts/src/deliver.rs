//! Tells what there is to tell, and tries again what could not be told.

use std::convert::Infallible;
use std::time::Duration;

use catalog::Catalog;
use catalog::alert::{Delivery, Outcome};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::channel;

/// How often deliveries that are due are asked for.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// How many are made together.
const TOGETHER: i64 = 16;

/// How long a delivery is this process' own; longer than it may take.
const LEASE: Duration = Duration::from_secs(90);

/// How long a delivery may take whatever its channel's timeout says.
const PATIENCE: Duration = Duration::from_secs(75);

/// The pause after the first failed attempt; each one after it is twice as long.
const PAUSE_MIN: Duration = Duration::from_secs(5);

/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// How old an event may be before it is given up.
const AGE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

pub(crate) async fn run(catalog: &Catalog) -> Infallible {
    let mut ticks = interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            // What comes next on the same channel need not wait for the tick.
            Some(_) = running.join_next() => {}
        }
        let free = TOGETHER - i64::try_from(running.len()).unwrap_or(TOGETHER);
        if free <= 0 {
            continue;
        }
        // A catalog that cannot be reached is told of elsewhere.
        let Ok(due) = catalog.take_deliveries(LEASE, free).await else { continue };
        for delivery in due {
            let catalog = catalog.clone();
            running.spawn(async move { deliver(&catalog, &delivery).await });
        }
    }
}

async fn deliver(catalog: &Catalog, delivery: &Delivery) {
    let outcome = match delivery.open_channel(catalog) {
        Ok(None) => Outcome::Canceled,
        Ok(Some(channel)) if channel.kind == "notify" => {
            let name = channel.get("channel").unwrap_or_default();
            match catalog.deliver_by_notify(delivery, name).await {
                Ok(()) => return,
                Err(error) => after_failure(delivery, catalog::connect::chain(&error)),
            }
        }
        Ok(Some(channel)) => match timeout(PATIENCE, channel::send(&channel, &delivery.event)).await {
            Ok(Ok(())) => Outcome::Sent,
            Ok(Err(error)) => after_failure(delivery, error.to_string()),
            Err(_) => after_failure(delivery, format!("no answer within {PATIENCE:?}")),
        },
        Err(error) => after_failure(delivery, error.to_string()),
    };
    let failed = match &outcome {
        Outcome::RetryIn(_, error) | Outcome::Failed(error) => Some(error),
        Outcome::Sent | Outcome::Canceled => None,
    };
    if let Some(error) = failed {
        let (alert, attempt) = (delivery.event["alert"].as_str(), delivery.attempt);
        tracing::warn!(alert, attempt, error, "alert not delivered");
    }
    if let Err(error) = catalog.end_delivery(delivery, &outcome).await {
        tracing::warn!(error = %error, "delivery of an alert not noted; it will be made again");
    }
}

/// What follows from a failed attempt. A test is not tried again: somebody is looking at it.
fn after_failure(delivery: &Delivery, error: String) -> Outcome {
    if delivery.is_test || delivery.age >= AGE_MAX {
        return Outcome::Failed(error);
    }
    let doublings = u32::try_from(delivery.attempt - 1).unwrap_or(0).min(10);
    Outcome::RetryIn(PAUSE_MIN.saturating_mul(1 << doublings).min(PAUSE_MAX), error)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn delivery(attempt: i32, age: Duration, is_test: bool) -> Delivery {
        Delivery { id: 1, attempt, age, is_test, event: json!({}), channel: None }
    }

    #[test]
    fn pauses_double_up_to_five_minutes_for_a_day() {
        let pause = |attempt| match after_failure(&delivery(attempt, Duration::ZERO, false), String::new()) {
            Outcome::RetryIn(pause, _) => pause.as_secs(),
            other => panic!("{other:?}"),
        };
        assert_eq!([1, 2, 3, 6, 7, 8, 1000, i32::MAX].map(pause), [5, 10, 20, 160, 300, 300, 300, 300]);
        let given_up = after_failure(&delivery(9, AGE_MAX, false), "x".to_owned());
        assert_eq!(given_up, Outcome::Failed("x".to_owned()));
        assert_eq!(after_failure(&delivery(1, Duration::ZERO, true), "x".to_owned()), Outcome::Failed("x".to_owned()));
    }

    #[test]
    fn a_delivery_ends_before_it_can_be_anothers() {
        assert!(PATIENCE < LEASE);
    }
}
