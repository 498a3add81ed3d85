//! Alerts on a real catalog, told to receivers in this process.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

mod deliveries;
mod receivers;
mod support;
mod tls;
mod watching;
