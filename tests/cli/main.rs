//! The program as its users meet it: arguments, outputs, exit codes, errors.
//!
//! Real disks in, real disks out; each backup's truth is told by qemu-img, not by us.

// Helpers of tests are tests: an unwrap that fails is a failed test.
#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod audit;
mod check;
mod errors;
mod fixture;
mod help;
mod hints;
mod journey;
mod json;
mod killed;
mod killed_images;
mod memory;
mod preview;
mod recovery;
mod repository;
mod salvage;
mod space;
mod stopped;
mod verify_source;
mod wait;
