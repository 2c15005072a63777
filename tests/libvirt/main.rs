//! Backup and restore of real libvirt domains with a real guest that writes.
//!
//! The oracle for an instant is independent of us: the domain is suspended, its images are copied
//! with qemu-img, the backup begins, the domain resumes when the job is active and writes on.

#[path = "../support/mod.rs"]
mod support;

mod disturbed;
mod frozen;
mod killed;
mod killed_restore;
mod lifecycle;
mod luks;
mod migrated;
mod online;
mod paced;
mod refusals;
mod remote;
mod restore;
mod rig;
mod space;
mod stalled;
mod stopped;
mod testbed;
mod volumes;
