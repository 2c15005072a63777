//! Buffers whose share of a memory budget travels with them.
//!
//! A [`Budget`] bounds the bytes in flight of a job. [`Budget::take`] waits until there is room
//! and hands out a [`Buffer`]; wherever the buffer goes (a request in flight, a worker's queue, a
//! pack being written) its permit goes too, and dropping it gives the room back. Memory is reused,
//! never handed out uninitialised; whoever fills a buffer proves that it filled all of it.

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::{Bytes, BytesMut};
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
    /// Spent memory for the next taker.
    spare: Mutex<Spare>,
}

/// Where buffers begin: the kernel copies to and from a cache line's beginning twice as fast as to
/// the 16th byte after it, where an allocator puts large blocks (`rep movsb`, measured on AMD Zen).
/// And where writes past the page cache may begin.
const ALIGN_BYTES: usize = super::file::MEMORY_BYTES;

/// Memory that was given back. Its capacity never exceeds the budget, and none of it is handed out
/// for much less than it is: otherwise a few large buffers among many small ones would leave every
/// small one with the memory of a large one.
#[derive(Debug, Default)]
struct Spare {
    buffers: Vec<BytesMut>,
    capacity_bytes: usize,
}

impl Spare {
    /// Memory for `len` bytes: the newest that fits, else fresh.
    fn take(&mut self, len: usize) -> BytesMut {
        let Some(bytes) = self.buffers.pop() else { return BytesMut::new() };
        self.capacity_bytes -= bytes.capacity();
        if bytes.capacity() <= len.max(PERMIT_BYTES) * 2 { bytes } else { BytesMut::new() }
    }

    fn give(&mut self, bytes: BytesMut, budget_bytes: usize) {
        // An eighth more: what alignment and the allocator add.
        if self.capacity_bytes + bytes.capacity() <= budget_bytes / 8 * 9 {
            self.capacity_bytes += bytes.capacity();
            self.buffers.push(bytes);
        }
    }
}

impl Shared {
    fn spare(&self) -> std::sync::MutexGuard<'_, Spare> {
        // Held for a push or a pop, never across an await.
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn budget_bytes(&self) -> usize {
        (self.permits_max as usize).saturating_mul(PERMIT_BYTES)
    }
}

impl Budget {
    /// A budget of `bytes` (rounded up to 4 KiB, at least that).
    pub fn new(bytes: usize) -> Self {
        let permits_max = u32::try_from(bytes.div_ceil(PERMIT_BYTES).max(1)).unwrap_or(u32::MAX);
        Self {
            shared: Arc::new(Shared {
                permits: Arc::new(Semaphore::new(permits_max as usize)),
                permits_max,
                spare: Mutex::default(),
            }),
        }
    }

    /// A buffer of `len` bytes as soon as the budget has room for it. A buffer larger than the
    /// whole budget waits for all of it, so one request always gets through. Cancel-safe.
    pub async fn take(&self, len: usize) -> Buffer {
        self.share(len).await.into_buffer(len)
    }

    /// A share without a buffer, for `len` bytes that are in other memory. Cancel-safe.
    pub async fn share(&self, len: usize) -> Share {
        let permits = u32::try_from(len.div_ceil(PERMIT_BYTES))
            .unwrap_or(u32::MAX)
            .clamp(1, self.shared.permits_max);
        let permit = Arc::clone(&self.shared.permits)
            .acquire_many_owned(permits)
            .await
            .expect("the semaphore of a budget is never closed");
        Share { shared: Arc::clone(&self.shared), permit: Some(permit), home: Weak::new() }
    }
}

/// Bytes on their way. Dereferences to the current *window*, at first the whole buffer.
#[derive(Debug)]
pub struct Buffer {
    bytes: BytesMut,
    /// The buffer within its memory.
    whole: Range<usize>,
    /// The window within the memory.
    window: Range<usize>,
    home: Option<Arc<Home>>,
}

/// Where the memory of a buffer goes back to, with all the pieces it was split into.
#[derive(Debug)]
struct Home {
    shared: Arc<Shared>,
    away: Mutex<Away>,
}

/// What of the budget a buffer and its pieces have, less what shares of them have: none of it is free until
/// the last of the memory is back.
#[derive(Debug)]
struct Away {
    permit: OwnedSemaphorePermit,
    /// Pieces of the memory that are back.
    back: Vec<BytesMut>,
}

impl Home {
    fn away(&self) -> std::sync::MutexGuard<'_, Away> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let away = self.away.get_mut().unwrap_or_else(PoisonError::into_inner);
        away.back.sort_unstable_by_key(|piece| piece.as_ptr());
        let pieces = std::mem::take(&mut away.back).into_iter();
        let Some(bytes) = pieces.reduce(|mut all, piece| {
            all.unsplit(piece);
            all
        }) else {
            return;
        };
        self.shared.spare().give(bytes, self.shared.budget_bytes());
        // The permit is released after the memory is back: spare memory stays below the budget.
    }
}

impl Buffer {
    /// A buffer outside any budget: for small or test data.
    pub fn unbudgeted(bytes: Vec<u8>) -> Self {
        let bytes = BytesMut::from(Bytes::from(bytes));
        let whole = 0..bytes.len();
        Self { window: whole.clone(), whole, bytes, home: None }
    }

    /// Restricts the buffer to `window` of the *whole* buffer: a read fills the window only.
    ///
    /// # Panics
    /// When the window passes the buffer's end.
    #[must_use]
    pub fn with_window(mut self, window: Range<usize>) -> Self {
        assert!(
            window.start <= window.end && window.end <= self.whole.len(),
            "window outside buffer"
        );
        self.window = self.whole.start + window.start..self.whole.start + window.end;
        self
    }

    /// The whole buffer again.
    #[must_use]
    pub fn whole(mut self) -> Self {
        self.window = self.whole.clone();
        self
    }

    /// Splits off the first `len` bytes of the *whole* buffer as a buffer of their own, without copying.
    /// The budget has its room back when the last piece is gone.
    ///
    /// # Panics
    /// When the buffer is shorter.
    #[must_use]
    pub fn split_to(&mut self, len: usize) -> Self {
        assert!(len <= self.whole.len(), "a split outside the buffer");
        let start = self.whole.start;
        let bytes = self.bytes.split_to(start + len);
        self.whole = 0..self.whole.len() - len;
        self.window = self.whole.clone();
        let whole = start..start + len;
        Self { bytes, window: whole.clone(), whole, home: self.home.clone() }
    }
}

/// A share of a budget without a buffer: for what is in other memory, or was made of its bytes.
#[derive(Debug)]
pub struct Share {
    shared: Arc<Shared>,
    permit: Option<OwnedSemaphorePermit>,
    /// Where its room goes back to as long as pieces of the memory it was taken for are away.
    home: Weak<Home>,
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Some((home, permit)) = self.home.upgrade().zip(self.permit.take()) {
            home.away().permit.merge(permit);
        }
    }
}

impl Share {
    /// A buffer of `len` bytes, which the share was taken for.
    pub fn into_buffer(mut self, len: usize) -> Buffer {
        let shared = Arc::clone(&self.shared);
        let permit = self.permit.take().expect("it has one until it is dropped");
        let mut bytes = shared.spare().take(len);
        if bytes.is_empty() {
            // Fresh memory is zero already, most of the time.
            bytes = BytesMut::zeroed(len + ALIGN_BYTES);
        } else {
            bytes.resize(len + ALIGN_BYTES, 0);
        }
        let start = bytes.as_ptr().align_offset(ALIGN_BYTES).min(ALIGN_BYTES);
        let whole = start..start + len;
        let away = Away { permit, back: Vec::new() };
        let home = Arc::new(Home { shared, away: Mutex::new(away) });
        Buffer { window: whole.clone(), whole, bytes, home: Some(home) }
    }
}

impl Buffer {
    /// Gives the memory back, and keeps a share of the budget for `len` bytes (at most the buffer's
    /// own); none outside a budget.
    #[must_use]
    pub fn into_share(self, len: usize) -> Option<Share> {
        let home = self.home.clone()?;
        let wanted = len.min(self.whole.len()).div_ceil(PERMIT_BYTES).max(1);
        let permit = {
            let mut away = home.away();
            let wanted = wanted.min(away.permit.num_permits());
            away.permit.split(wanted)?
        };
        let home_of = Arc::downgrade(&home);
        Some(Share { shared: Arc::clone(&home.shared), permit: Some(permit), home: home_of })
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
        if let Some(home) = &self.home {
            home.away().back.push(std::mem::take(&mut self.bytes));
        }
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
    async fn a_small_buffer_never_keeps_the_memory_of_a_large_one() {
        let budget = Budget::new(1 << 20);
        drop(budget.take(1 << 20).await);
        assert!(budget.take(4096).await.bytes.capacity() <= 8192);
        drop(budget.take(4 << 20).await);
        assert!(budget.shared.spare().capacity_bytes <= 1 << 20, "no more than the budget is kept");
    }

    #[tokio::test]
    async fn a_share_holds_what_it_is_for_and_gives_it_back() {
        let budget = Budget::new(64 << 10);
        let share = budget.take(64 << 10).await.into_share(5000).unwrap();
        assert_eq!(budget.shared.permits.available_permits(), 14);
        drop(share);
        assert_eq!(budget.shared.permits.available_permits(), 16);
    }

    #[tokio::test]
    async fn a_request_larger_than_the_budget_gets_through_alone() {
        let budget = Budget::new(4096);
        assert_eq!(budget.take(1 << 20).await.len(), 1 << 20);
    }

    #[tokio::test]
    async fn pieces_are_disjoint_and_have_the_memory_until_the_last_is_gone() {
        let budget = Budget::new(64 << 10);
        let mut rest = budget.take(64 << 10).await;
        let memory = rest.as_ptr();
        rest.fill(9);
        let mut first = rest.split_to(16 << 10);
        let second = rest.split_to(16 << 10).with_window(0..10);
        first.fill(1);
        assert_eq!((first.len(), second.len(), rest.len()), (16 << 10, 10, 32 << 10));
        assert!(second.iter().chain(&*rest).all(|byte| *byte == 9));
        let share = first.into_share(5000).unwrap();
        drop(rest);
        let other = second.into_share(100).unwrap();
        assert_eq!(budget.shared.permits.available_permits(), 13);
        drop((share, other));
        assert_eq!(budget.shared.permits.available_permits(), 16);
        let mut rest = budget.take(64 << 10).await;
        let share = rest.split_to(16 << 10).into_share(5000).unwrap();
        drop(share);
        assert_eq!(budget.shared.permits.available_permits(), 0, "the memory is not back");
        drop(rest);
        let next = budget.take(64 << 10).await;
        assert_eq!(next.as_ptr(), memory, "the same memory in one piece");
        assert!(next[..16 << 10].iter().all(|byte| *byte == 1));
    }
}
