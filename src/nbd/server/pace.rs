//! Bytes that have to move: neither a client that stops in the middle of something nor one that
//! drips a byte now and then may hold what it was given.

use std::io;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::end::End;

/// What has to move at least within [`Limits::stall`](super::Limits::stall), or the rest if that is
/// less: at 60 s about 1 KiB a second.
const PROGRESS_BYTES_MIN: u64 = 64 << 10;

/// As many times that long a transfer may take in all, because it holds memory that others wait
/// for: of more than 1 MiB a sixteenth has to move each time. At 60 s that is 35 KiB a second for
/// the largest request (32 MiB), which any network has, and a quarter of an hour.
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
        let wanted_bytes = len.div_ceil(WINDOWS_MAX).max(PROGRESS_BYTES_MIN);
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

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(60);
    const ALMOST: Duration = Duration::from_secs(59);
    const LARGEST: u64 = 32 << 20;

    /// A transfer of `len` bytes, of which `step` move every `every`; how long it took, and how it
    /// ended. Time stands still but for the waiting.
    async fn transfer(len: u64, step: u64, every: Duration) -> (Duration, Result<(), End>) {
        let begun = Instant::now();
        let mut pace = Pace::new("a payload", STALL, len);
        let mut rest = len;
        while rest > 0 {
            let bytes = step.min(rest);
            let moved = pace.step(async {
                tokio::time::sleep(every).await;
                Ok(usize::try_from(bytes).unwrap())
            });
            if let Err(end) = moved.await {
                return (begun.elapsed(), Err(end));
            }
            rest -= bytes;
        }
        (begun.elapsed(), Ok(()))
    }

    fn is_stalled(end: &Result<(), End>) -> bool {
        matches!(end, Err(End::Stalled(60, "a payload")))
    }

    #[tokio::test(start_paused = true)]
    async fn the_largest_request_has_to_move_a_sixteenth_at_a_time() {
        // 64 KiB a minute do for a small request only.
        let (taken, end) = transfer(LARGEST, 64 << 10, ALMOST).await;
        assert!(is_stalled(&end) && taken == STALL, "{taken:?}");
        let (taken, end) = transfer(1 << 20, 64 << 10, ALMOST).await;
        end.unwrap();
        assert_eq!(taken, 16 * ALMOST);
        // 34 KiB a second are too few, 36 are enough.
        let second = Duration::from_secs(1);
        let (taken, end) = transfer(LARGEST, 34 << 10, second).await;
        assert!(is_stalled(&end) && taken == STALL, "{taken:?}");
        let (taken, end) = transfer(LARGEST, 36 << 10, second).await;
        end.unwrap();
        assert!(taken < 16 * STALL, "{taken:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn no_transfer_takes_longer_than_sixteen_windows_however_it_moves() {
        for len in [1, 4096, 64 << 10, (1 << 20) + 1, (16 << 20) + 15, LARGEST - 1, LARGEST] {
            // The slowest there is: all that has to move, at the last moment.
            let wanted = len.div_ceil(16).max(64 << 10);
            let (taken, end) = transfer(len, wanted, ALMOST).await;
            end.unwrap();
            assert!(taken <= 16 * STALL, "{len} bytes: {taken:?}");
            // A pause of a whole window ends it, whatever moved before.
            let (taken, end) = transfer(len, wanted, STALL + Duration::from_millis(1)).await;
            assert!(is_stalled(&end) && taken == STALL, "{len} bytes: {taken:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_buys_no_time_for_a_pause_after_it() {
        let mut pace = Pace::new("a payload", STALL, LARGEST);
        pace.step(async { Ok(30 << 20) }).await.unwrap();
        let begun = Instant::now();
        let silence = std::future::pending();
        assert!(is_stalled(&pace.step(silence).await.map(|_| ())));
        assert_eq!(begun.elapsed(), STALL);
    }
}
