//! The QEMU monitor and guest agent, for a controller. Knows nothing of backup.
//!
//! - [`Monitor`]: one connection to a QMP socket. One task owns the socket; handles are clones.
//!   Commands are matched by id, have a time-out each, and may be dropped at any await without
//!   hurting another. Events are a bounded [`Subscription`]; what this crate does not know passes
//!   through as it came.
//! - Typed helpers for what a controller of block devices uses: the block graph and its bitmaps
//!   ([`block`]), jobs ([`jobs`]), NBD exports ([`export`]), the machine ([`machine`]). Anything
//!   else goes through [`Monitor::execute`] with a type of [`qapi`] or [`Monitor::execute_raw`].
//! - [`Features`]: what this QEMU can do, from `query-qmp-schema`, never from its version.
//! - [`Agent`]: the guest agent over its own socket: handshake, freeze with a deadline, thaw.
//!
//! Commands are sent with the types of the `qapi` crate where it has them. Its schema stops at
//! QEMU 9.1 and its reply enums are closed, so a reply that grows with QEMU (block nodes, jobs,
//! exports) is read into the tolerant types of this crate, and members newer than that schema are
//! added to the JSON by hand ([`Action`], [`block::blockdev_add`](Monitor::blockdev_add)).
//! Its connection is not used: it aborts the process when a pending command is cancelled, ends at
//! an unknown event, and never sees the `oob` capability (qapi 0.15.0).
//!
//! This crate never prints, reads the environment or starts processes.

mod address;
mod agent;
pub mod block;
mod connection;
mod error;
mod events;
pub mod export;
mod features;
pub mod jobs;
mod lines;
pub mod machine;
mod transaction;
mod wire;

pub use address::Address;
pub use agent::{Agent, AgentOptions, FileSystem, FreezeStatus};
pub use connection::{Monitor, Options};
pub use error::{Error, ErrorClass, Kind, Result};
pub use events::{Event, Received, Subscription};
pub use features::{Features, Schema};
pub use qapi;
pub use transaction::{Action, BackupJob, OnTargetFailure};
pub use wire::{Greeting, Version};
