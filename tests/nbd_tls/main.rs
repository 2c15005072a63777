//! TLS of NBD: our client against qemu-nbd, nbdkit and nbd-server, our server against libnbd, QEMU and nbdkit,
//! and whoever must be refused; the same of `vmbackup serve`.

#![allow(clippy::unwrap_used, unreachable_pub)]

#[path = "../serve/rig.rs"]
#[allow(dead_code)]
mod rig;
#[path = "../support/mod.rs"]
mod support;

mod attacks;
mod client;
mod command;
mod debian;
mod peers;
mod pki;
mod refusals;
mod server;
