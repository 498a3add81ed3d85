//! Postgres vocabulary: positions, names, error codes, and the codecs of the replication stream.
//!
//! Nothing here opens a connection or waits for anything; every function takes bytes and gives values or the reverse.

pub mod frame;
pub mod lsn;
pub mod name;
pub mod pgoutput;
pub mod sqlstate;
pub mod stream;

pub use lsn::Lsn;
pub use name::TableName;
pub use sqlstate::SqlState;
