//! TLS of NBD: our client against qemu-nbd and nbdkit, our server against libnbd, QEMU and nbdkit,
//! and whoever must be refused.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod attacks;
mod client;
mod peers;
mod pki;
mod refusals;
mod server;
