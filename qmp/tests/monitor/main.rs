//! The monitor and agent connections, against real QEMUs, against what real QEMUs said
//! (transcripts), and against peers that misbehave.
// Helpers of tests are tests: a failed unwrap is a failed test (clippy only sees `#[test]`).
#![allow(clippy::unwrap_used, missing_docs)]

mod agent;
mod hostile;
mod live;
mod peer;
mod qemu;
mod replay;
mod scenarios;
