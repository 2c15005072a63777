//! The NBD client, against a server that says these parts; the first byte is what the client wants.
#![no_main]
#![allow(dead_code)]

#[path = "../parts.rs"]
mod parts;
#[path = "../../tests/nbd/said.rs"]
mod said;
#[path = "../../tests/nbd/script.rs"]
mod script;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else { return };
    let sessions = said::Session::ALL;
    let about = sessions[usize::from(*first) % sessions.len()];
    said::ended(about, &said::Transcript::of(&parts::decode(rest)));
});
