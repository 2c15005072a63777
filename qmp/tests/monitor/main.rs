//! The monitor and agent connections, against the QEMU that is installed, against what a QEMU 10.0.2
//! said (transcripts; of no other version so far), and against peers that misbehave.
// Helpers of tests are tests: a failed unwrap is a failed test (clippy only sees `#[test]`).
#![allow(clippy::unwrap_used, missing_docs)]

mod agent;
mod hostile;
mod live;
mod peer;
mod qemu;
mod replay;
mod scenarios;
mod talk;
