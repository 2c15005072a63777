//! `vmbackup copy` against real servers and images: how many requests a copy costs, what is shown
//! meanwhile, and what becomes of both ends when something breaks.

// Helpers of tests are tests: an unwrap that fails is a failed test.
#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod ends;
mod failures;
mod formats;
mod lost_target;
mod options;
mod progress;
mod replaced;
mod restarted;
mod sizes;
mod sparse;
mod zeroes;
