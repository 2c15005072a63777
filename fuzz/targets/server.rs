//! The NBD server, with a client that says this.
#![no_main]
#![allow(dead_code)]

#[path = "../../tests/nbd_server/heard.rs"]
mod heard;
#[path = "../../tests/nbd_server/raw.rs"]
mod raw;
#[path = "../../tests/nbd_server/rig.rs"]
mod rig;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    heard::ended(bytes);
});
