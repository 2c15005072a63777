//! The parser of NBD URIs.
#![no_main]

#[path = "../../tests/nbd/uris.rs"]
mod uris;

libfuzzer_sys::fuzz_target!(|text: &str| {
    uris::ended(text);
});
