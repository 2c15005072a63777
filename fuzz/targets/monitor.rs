//! The reader of QEMU monitors, with a peer that says these parts; it greets if the first byte is odd.
#![no_main]
#![allow(dead_code)]

#[path = "../parts.rs"]
mod parts;
#[path = "../../qmp/tests/monitor/peer.rs"]
mod peer;
#[path = "../../qmp/tests/monitor/talk.rs"]
mod talk;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((first, rest)) = bytes.split_first() else { return };
    talk::ends_in_time(first % 2 == 1, &parts::decode(rest));
});
