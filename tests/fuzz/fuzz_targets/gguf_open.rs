//! Any bytes as a GGUF file: `cargo +nightly fuzz run gguf_open --fuzz-dir tests/fuzz`.
#![no_main]

#[path = "../probe.rs"]
mod probe;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    probe::probe(bytes);
});
