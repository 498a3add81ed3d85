//! The frames of a session, from both sides and in any pieces, through the walker, the interceptor and the tracker.

#![no_main]

#[path = "../../gateway/tests/properties.rs"]
#[allow(dead_code, reason = "each target uses its part")]
mod properties;

libfuzzer_sys::fuzz_target!(|data: &[u8]| properties::frames(data));
