//! The NBD client, against a server that says these parts.
#![no_main]
#![allow(dead_code)]

#[path = "../parts.rs"]
mod parts;
#[path = "../../tests/nbd/said.rs"]
mod said;
#[path = "../../tests/nbd/script.rs"]
mod script;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    said::ended(&said::Transcript::of(&parts::decode(bytes)));
});
