//! The source's side of a mirror: what is made there, and what comes from there.

pub mod condition;
pub mod look;
pub mod preflight;
pub mod publication;
pub mod replication;
pub mod slot;
pub mod storage;
