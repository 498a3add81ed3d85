//! Integration tests of the engine, in one binary. Each starts its own servers.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

mod acceptance;
mod constraints;
mod continuity;
mod copying;
mod events;
mod every_type;
mod exactly_once;
mod failover;
mod filters;
mod huge;
mod keyless;
mod late;
mod lifecycle;
mod newcomers;
mod ownership;
mod partitions;
mod peers;
mod poison;
mod preflight;
mod protection;
mod proxies;
mod proxy;
mod query;
mod schema_changes;
mod shapes;
mod soft_delete;
mod streaming;
mod support;
mod tls;
mod types;
mod verify;
