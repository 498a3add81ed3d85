//! What users see and use, through a real `peergate serve`, in one binary. The tests start their own servers.

#![allow(clippy::unwrap_used, reason = "clippy.toml allows it in tests, but not in their helpers")]

mod clients;
mod docs;
mod golden;
mod regress;
mod support;
