//! The libvirt platform against a real libvirt daemon and QEMU.
//!
//! Domains here have no guest system: they are started paused, and what "the guest" writes is
//! written through its disk device with the monitor's `qemu-io`, which takes the same path. The
//! real guest is the subject of `tests/libvirt`.
#![cfg(feature = "libvirt")]

#[path = "../support/mod.rs"]
mod support;

mod bare;
mod bases;
mod changes;
mod devices;
mod foreign;
mod handover;
mod hanging;
mod late;
mod plugged;
mod proxy;
mod quiesce;
mod remote;
mod restore;
mod running;
mod scratch;
mod stale;
mod stopped;
