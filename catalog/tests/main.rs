//! Integration tests of the catalog crate, in one binary. They start their own servers.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

mod alerts;
mod cluster;
mod migrations;
mod peers;
mod roles;
mod statements;

/// Brings a cluster's database `postgres` up to date.
pub(crate) async fn migrate(cluster: &catalog::cluster::TestCluster) {
    migrations::catalog(cluster).migrate().await.unwrap();
}
