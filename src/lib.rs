//! vmbackup: the backup and migration orchestrator for libvirt and plain QEMU.
//!
//! A **platform** yields sources, a **repository** (or a platform) yields sinks, the **copy
//! engine** joins a source to a sink, a **job** wraps that in open → copy → commit or abort, and
//! the **faces** start jobs.
//!
//! ```text
//!  platform::*  ── BlockSource ──►  copy  ── BlockSink ──►  repo::DiskWriter ──► ObjectStore
//!  VmSnapshot                                               + manifest
//!  restore      ◄── BlockSink ───   copy  ◄─ BlockSource ─  repo::DiskReader
//! ```
//!
//! Layers; imports go downward only (a test enforces it):
//!
//! | layer | modules |
//! |---|---|
//! | L6 | [`cli`] |
//! | L3 | [`job`]: the only place where platform meets repository |
//! | L2 | [`copy`], [`repo`], [`platform`], [`policy`]; none sees another |
//! | L1 | [`freeze`], [`journal`]; [`nbd`], and [`image`] on top of it |
//! | L0 | [`block`], [`clock`], [`content`], [`control`], [`error`], [`units`], [`vm`], [`workers`] |
//!
//! The crate `qmp` beside this one speaks to QEMU monitors and knows nothing of backup.
//!
//! Invariants, each stated once where it is kept: *Partition* ([`block::ExtentMap`]), *Commit
//! order* ([`job`]), *Two-sided transaction* ([`platform`]), *Bounded* ([`block::Budget`],
//! [`workers`]), *Errors travel* ([`block`]), *Deletion* ([`repo`]). The library never prints,
//! exits, reads the environment or the clock; faces do.

pub mod block;
pub mod cli;
pub mod clock;
pub mod content;
pub mod control;
pub mod copy;
#[cfg(test)]
mod dice;
pub mod error;
pub mod freeze;
pub mod image;
pub mod job;
pub mod journal;
pub mod nbd;
pub mod platform;
pub mod policy;
pub mod repo;
pub mod units;
pub mod vm;
pub mod workers;
