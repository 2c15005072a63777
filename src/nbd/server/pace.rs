//! Bytes that have to move: neither a client that stops in the middle of something nor one that
//! drips a byte now and then may hold what it was given.

use std::io;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::end::End;

/// What has to move within [`Limits::stall`](super::Limits::stall), or the rest if that is less: at
/// 60 s that is 1 KiB a second, which any network has.
const PROGRESS_BYTES_MIN: u64 = 64 << 10;

/// As many times that long a transfer may take in all: it holds memory that others wait for.
const WINDOWS_MAX: u64 = 16;

/// The pace of one transfer.
pub(super) struct Pace {
    what: &'static str,
    stall: Duration,
    deadline: Instant,
    /// What has to move until then.
    wanted_bytes: u64,
    moved_bytes: u64,
}

impl Pace {
    /// A transfer of `len` bytes that begins now; `what` is what the client is in the middle of.
    pub(super) fn new(what: &'static str, stall: Duration, len: u64) -> Self {
        let wanted_bytes = (len / WINDOWS_MAX).max(PROGRESS_BYTES_MIN);
        Self { what, stall, deadline: Instant::now() + stall, wanted_bytes, moved_bytes: 0 }
    }

    /// Moves a few bytes by `step` and says how many.
    pub(super) async fn step(
        &mut self,
        step: impl Future<Output = io::Result<usize>>,
    ) -> Result<usize, End> {
        let moved = timeout_at(self.deadline, step).await;
        let moved = moved.map_err(|_| End::Stalled(self.stall.as_secs(), self.what))??;
        self.moved_bytes += moved as u64;
        if self.moved_bytes >= self.wanted_bytes {
            (self.deadline, self.moved_bytes) = (Instant::now() + self.stall, 0);
        }
        Ok(moved)
    }
}
