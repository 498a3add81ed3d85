//! The SQL front door: relays each client's session to a session of its own on the catalog, and turns our statements, inside the
//! client's own messages, into calls of catalog procedures.
//!
//! Nothing here runs a mirror: the gateway and the engine meet in the catalog.

pub mod config;
pub mod demo;
pub mod embedded;
pub mod encoding;
pub mod healthcheck;
pub mod parser;
pub mod rewrite;
pub mod split;
pub mod statement;
