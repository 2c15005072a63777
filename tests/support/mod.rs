//! What integration tests share: a hermetic environment, tool wrappers, a real guest.
//!
//! Used by `#[path = "../support/mod.rs"] mod support;` in `tests/<subject>/main.rs`. Nothing here
//! but the steps of the journal knows the library: tests drive the built program and compare with what independent tools say.
//!
//! Invariants: everything a test creates lies in its [`TestEnv`] or carries its unique name;
//! processes end with the guard that started them, and only those; every wait has a deadline.
//!
//! Each test binary uses a part of it, hence the allowance for dead code.
#![allow(dead_code, unused_imports)]

mod domain;
mod env;
mod guest;
mod hanging_disk;
pub(crate) mod libvirt;
mod listening;
mod luks;
mod memory;
mod nbd_log;
mod outcome;
mod own_libvirt;
mod slow_disk;
mod slow_writes;
mod small_disk;
mod ssh;
mod steps;
mod tools;

pub(crate) use domain::{DiskFormat, DiskSpec, Domain, DomainSpec, Pool};
pub(crate) use env::TestEnv;
pub(crate) use guest::{Guest, GuestFiles};
pub(crate) use hanging_disk::HangingDisk;
pub(crate) use listening::is_listening;
pub(crate) use memory::{peak_mib, with_peak_mib};
pub(crate) use nbd_log::NbdLog;
pub(crate) use outcome::Outcome;
pub(crate) use own_libvirt::{BESIDE_URI, OwnLibvirt};
pub(crate) use slow_disk::SlowDisk;
pub(crate) use slow_writes::SlowWrites;
pub(crate) use small_disk::SmallDisk;
pub(crate) use ssh::Ssh;
pub(crate) use steps::{Restored, is_asked_for, steps, stopped_takes, write_pattern};
pub(crate) use tools::{
    NbdServer, Process, assert_same_content, virtual_size, wait_for, wait_until,
};
