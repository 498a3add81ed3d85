//! The SQL front door: relays each client's session to a session of its own on the catalog, and turns our statements, inside the
//! client's own messages, into calls of catalog procedures.
//!
//! Reading order: [`server`], `session` and `login` (sockets and logins), `registry` (who is there), `relay` (the two pumps), `intercept` (what becomes of a message),
//! [`split`], [`parser`] and [`rewrite`] (the way in), [`tracker`] and [`patch`] (the way back), [`bind`] and `validate` (what is found
//! out about peers). Beside them the binary's [`config`], its [`reload`], [`metrics`] and [`embedded`]
//! catalog.
//!
//! Nothing here runs a mirror: the gateway and the engine meet in the catalog.

mod admin;
mod backend;
pub mod bind;
pub mod config;
pub mod demo;
pub mod dump;
pub mod embedded;
pub mod encoding;
pub mod error;
mod execute;
pub mod explain;
pub mod fields;
mod halves;
pub mod healthcheck;
mod help;
mod intake;
pub mod intercept;
mod login;
pub mod metrics;
pub mod parser;
pub mod patch;
pub mod peers;
mod registry;
mod relay;
pub mod reload;
pub mod rewrite;
pub mod server;
mod session;
pub mod split;
mod startup;
pub mod statement;
mod tls;
pub mod tracker;
mod validate;
