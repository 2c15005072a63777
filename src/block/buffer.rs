//! Buffers whose share of a memory budget travels with them.
//!
//! A [`Budget`] bounds the bytes in flight of a job. [`Budget::take`] waits until there is room
//! and hands out a [`Buffer`]; wherever the buffer goes (a request in flight, a worker's queue, a
//! pack being written) its permit goes too, and dropping it gives the room back. Memory is reused,
//! never handed out uninitialised; whoever fills a buffer proves that it filled all of it.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The unit in which a budget counts, so that budgets past 4 GiB fit tokio's `u32` permits.
const PERMIT_BYTES: usize = 4096;

/// A bound on bytes in flight. Clones share it.
#[derive(Clone, Debug)]
pub struct Budget {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    permits: Arc<Semaphore>,
    permits_max: u32,
    /// Spent memory for the next taker. Never longer than what the permits allow.
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Budget {
    /// A budget of `bytes` (rounded up to 4 KiB, at least that).
    pub fn new(bytes: usize) -> Self {
        let permits_max = u32::try_from(bytes.div_ceil(PERMIT_BYTES).max(1)).unwrap_or(u32::MAX);
        Self {
            shared: Arc::new(Shared {
                permits: Arc::new(Semaphore::new(permits_max as usize)),
                permits_max,
                spare: Mutex::new(Vec::new()),
            }),
        }
    }

    /// A buffer of `len` bytes as soon as the budget has room for it. A buffer larger than the
    /// whole budget waits for all of it, so one request always gets through. Cancel-safe.
    pub async fn take(&self, len: usize) -> Buffer {
        let permits = u32::try_from(len.div_ceil(PERMIT_BYTES))
            .unwrap_or(u32::MAX)
            .clamp(1, self.shared.permits_max);
        let permit = Arc::clone(&self.shared.permits)
            .acquire_many_owned(permits)
            .await
            .expect("the semaphore of a budget is never closed");
        let spare = self.shared.spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut bytes = spare.unwrap_or_default();
        bytes.resize(len, 0);
        Buffer { window: 0..len, bytes, home: Some((Arc::clone(&self.shared), permit)) }
    }
}

/// Bytes on their way. Dereferences to the current *window*, at first the whole buffer.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    window: Range<usize>,
    home: Option<(Arc<Shared>, OwnedSemaphorePermit)>,
}

impl Buffer {
    /// A buffer outside any budget: for small or test data.
    pub fn unbudgeted(bytes: Vec<u8>) -> Self {
        Self { window: 0..bytes.len(), bytes, home: None }
    }

    /// Restricts the buffer to `window` of the *whole* buffer: a read fills the window only.
    ///
    /// # Panics
    /// When the window passes the buffer's end.
    #[must_use]
    pub fn with_window(mut self, window: Range<usize>) -> Self {
        assert!(
            window.start <= window.end && window.end <= self.bytes.len(),
            "window outside buffer"
        );
        self.window = window;
        self
    }

    /// The whole buffer again.
    #[must_use]
    pub fn whole(mut self) -> Self {
        self.window = 0..self.bytes.len();
        self
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.window.clone()]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.window.clone()]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some((shared, _permit)) = self.home.take() else { return };
        let bytes = std::mem::take(&mut self.bytes);
        shared.spare.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
        // The permit is released after the memory is back: spare memory stays below the budget.
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_spent_budget_makes_the_next_taker_wait() {
        let budget = Budget::new(8192);
        let first = budget.take(8192).await;
        let wait = tokio::time::timeout(Duration::from_secs(1), budget.take(1)).await;
        assert!(wait.is_err(), "the budget was spent");
        drop(first);
        assert_eq!(budget.take(1).await.len(), 1);
    }

    #[tokio::test]
    async fn a_request_larger_than_the_budget_gets_through_alone() {
        let budget = Budget::new(4096);
        assert_eq!(budget.take(1 << 20).await.len(), 1 << 20);
    }
}
