//! A plain QEMU through its monitor: the instant of its disks, in full and incrementally, and what
//! happens where the instant, the bitmaps or the QEMU cannot be trusted.
//!
//! The oracle for an instant is independent of us: while nothing writes, the content of each disk
//! is read out of QEMU by another way (`qemu-img convert` of its image, `-U`), before the guest
//! writes on. Guest writes are made with the monitor command `qemu-io -d DEVICE`.

// Helpers of tests are tests: a failed unwrap is a failed test (clippy only sees `#[test]`).
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../support/mod.rs"]
mod support;

mod machine;
mod reading;

mod disturbed;
mod frozen;
mod gone;
mod guest_first;
mod hanging;
mod incremental;
mod killed;
mod leftovers;
mod moved;
mod paced;
mod program;
mod reclaim;
mod refusals;
mod scratch;
mod stopped;
mod traps;
