//! Integration tests of the gateway crate, in one binary. They start their own servers.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

mod admin;
mod alerts;
mod bounds;
mod crash;
mod embedded;
mod execute;
mod foreign;
mod hostile;
mod lifetime;
mod metrics;
mod peer_changes;
mod peers;
mod process;
mod processes;
mod properties;
mod protocol;
mod relay;
mod reload;
mod serve;
mod stage;
mod statements;
mod support;
mod tls;
mod verify;
