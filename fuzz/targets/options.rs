//! The NBD server's parser of options: one option after the other, each with a payload of its own.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/nbd_server/heard.rs"]
mod heard;
#[path = "../parts.rs"]
mod parts;
#[path = "../../tests/nbd_server/raw.rs"]
mod raw;
#[path = "../../tests/nbd_server/rig.rs"]
mod rig;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let parts = parts::decode(bytes);
    let options = parts.iter().filter_map(|part| part.split_first());
    let options = options.map(|(option, payload)| (u32::from(*option), payload));
    heard::ended(&heard::negotiation(options, &[]));
});
