//! Any text in any encoding through the splitter, the parser and the rewriter.

#![no_main]

#[path = "../../gateway/tests/properties.rs"]
#[allow(dead_code, reason = "each target uses its part")]
mod properties;

libfuzzer_sys::fuzz_target!(|data: &[u8]| properties::text(data));
