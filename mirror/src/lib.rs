//! The mirror engine: it learns what to do from the catalog, streams WAL from sources and writes it to targets. It is never called.
//!
//! Reading order: [`engine`] (which mirrors run here), [`worker`] (one mirror's life), [`copy`] (rows that are there), [`apply`] (rows
//! that change), [`batch`] and [`sink`] (how they are written), [`progress`] (what may be acknowledged, and when); [`query`] (mirrors of queries).

#[cfg(debug_assertions)]
#[macro_use]
pub mod failpoint;
/// Nothing: points at which tests make the engine fail are in other builds only.
#[cfg(not(debug_assertions))]
macro_rules! fail_point {
    ($name:literal) => {};
}

pub mod apply;
pub mod assemble;
pub mod batch;
pub mod bookkeeping;
pub mod copy;
pub mod engine;
pub mod enums;
pub mod error;
pub mod explain;
mod guard;
pub mod hindsight;
pub mod known;
pub mod late;
pub mod newcomers;
pub mod prepare;
pub mod progress;
pub mod query;
pub mod relation;
pub mod removal;
pub mod schema;
pub mod sequences;
pub mod session;
#[cfg(test)]
mod simulation;
pub mod sink;
pub mod source;
pub mod standing;
pub mod start;
pub mod state;
pub mod status;
pub mod table_state;
pub mod verify;
pub mod wishes;
pub mod worker;
