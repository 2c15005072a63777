//! The NBD server against real clients, our own, and hostile ones.

#![allow(clippy::unwrap_used, unreachable_pub)]

#[path = "../nbd/corpus.rs"]
mod corpus;
mod crowd;
mod fuzz;
mod heard;
mod hostile;
mod own;
mod raw;
mod real;
mod rig;
mod seen;
