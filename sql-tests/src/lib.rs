//! Golden tests of what a user sees: real psql through a real `peergate serve`. The runner is `tests/golden.rs`.
//!
//! There is nothing in the library; it imports none of ours, it runs the binary.
