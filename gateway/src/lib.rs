//! The SQL front door: relays each client's session to a session of its own on the catalog, and turns our statements, inside the
//! client's own messages, into calls of catalog procedures.
//!
//! Reading order: [`server`] and `session` (sockets and logins), `relay` (the two pumps), `intercept` (what becomes of a message),
//! [`split`], [`parser`] and [`rewrite`] (the way in), [`tracker`] and [`patch`] (the way back), [`bind`] and `validate` (CREATE
//! PEER's values). Beside them the binary's [`config`] and [`embedded`] catalog.
//!
//! Nothing here runs a mirror: the gateway and the engine meet in the catalog.

pub mod bind;
pub mod config;
pub mod embedded;
pub mod encoding;
pub mod fields;
pub mod parser;
pub mod patch;
pub mod rewrite;
pub mod split;
pub mod statement;
pub mod tracker;
