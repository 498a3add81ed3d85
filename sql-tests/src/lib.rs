//! Tests of what a user sees and uses, through a real `peergate serve`: golden cases by psql, and real clients.
//!
//! There is nothing in the library; it imports none of ours, it runs the binary. The runners are in `tests/`.
