//! Alerts: looks at mirrors and peers, and tells people what they asked to be told.
//!
//! Runs beside the mirror engine, in the same processes, and like it is never called: what is wanted is in the catalog, and so is all that
//! it knows from one look to the next. So processes may come, go and be killed, and nothing is told twice but what one of them had sent
//! and not yet noted.
//!
//! Reading order: [`decide`] (what follows from what is seen; pure), `watch` (looking), `deliver` and `channel` (telling), `reach`
//! (can peers be connected to?).

mod channel;
pub mod decide;
mod deliver;
mod reach;
mod watch;

use std::sync::Arc;

use catalog::Catalog;
use tokio::sync;

/// Watches and tells until `shutdown` says otherwise. A catalog that cannot be reached is waited for.
///
/// What is being delivered then is given up, and made again by whoever comes next.
pub async fn run(catalog: Catalog, node_id: String, mut shutdown: sync::watch::Receiver<bool>) {
    let node_id: Arc<str> = node_id.into();
    tokio::select! {
        never = watch::run(&catalog, &node_id) => match never {},
        never = deliver::run(&catalog) => match never {},
        never = reach::run(&catalog) => match never {},
        _ = shutdown.wait_for(|stop| *stop) => {}
    }
}
