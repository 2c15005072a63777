//! A source or sink that moves no more than so many bytes a second, so that a copy leaves the
//! storage or the link to those who were there first.
//!
//! A [`Rate`] may be shared by all disks of a job. Each request books its time on a common time
//! line before it starts; an idle rate saves up at most [`BURST`]. Only bytes count: extents,
//! zeroes and keeps pass freely.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::Instant;

use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode};
use crate::error::Result;

/// What an idle time may be made up for: enough to not lose rate to a late timer, too little to be
/// felt by others.
const BURST: Duration = Duration::from_millis(100);

/// Bytes per second for all who share it.
#[derive(Clone, Debug)]
pub struct Rate {
    bytes_per_second: u64,
    /// When the next request may start.
    next: Arc<Mutex<Option<Instant>>>,
}

impl Rate {
    /// A rate of `bytes_per_second` (at least one).
    pub fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second: bytes_per_second.max(1), next: Arc::default() }
    }

    /// Waits until `bytes` may move. Cancel-safe; what was booked stays booked.
    async fn book(&self, bytes: usize) {
        let cost_ns = bytes as u128 * 1_000_000_000 / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(cost_ns).unwrap_or(u64::MAX));
        let start = {
            // Held for a sum, never across an await.
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let earliest = now.checked_sub(BURST).unwrap_or(now);
            let start = next.map_or(now, |next| next.max(earliest));
            *next = Some(start + cost);
            start
        };
        tokio::time::sleep_until(start).await;
    }
}

/// A source with a speed limit for reads.
pub struct ThrottledSource {
    inner: Arc<dyn BlockSource>,
    rate: Rate,
}

impl ThrottledSource {
    /// Limits the reads of `inner`.
    pub fn new(inner: Arc<dyn BlockSource>, rate: Rate) -> Self {
        Self { inner, rate }
    }
}

#[async_trait]
impl BlockSource for ThrottledSource {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.inner.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.rate.book(buffer.len()).await;
        self.inner.read(offset, buffer).await
    }
}

/// A sink with a speed limit for writes.
pub struct ThrottledSink {
    inner: Arc<dyn BlockSink>,
    rate: Rate,
}

impl ThrottledSink {
    /// Limits the writes of `inner`.
    pub fn new(inner: Arc<dyn BlockSink>, rate: Rate) -> Self {
        Self { inner, rate }
    }
}

#[async_trait]
impl BlockSink for ThrottledSink {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn starts_zero(&self) -> bool {
        self.inner.starts_zero()
    }

    fn can_zero(&self) -> bool {
        self.inner.can_zero()
    }

    async fn existing(&self, range: ByteRange) -> Result<ExtentMap> {
        self.inner.existing(range).await
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.rate.book(buffer.len()).await;
        self.inner.write(offset, buffer).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.inner.zero(range, mode).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.inner.keep(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.inner.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::conformance;
    use crate::block::memory::MemoryDisk;

    #[tokio::test(start_paused = true)]
    async fn disks_that_share_a_rate_share_its_bytes() {
        let rate = Rate::new(1 << 20);
        let disk: Arc<dyn BlockSource> = Arc::new(MemoryDisk::zeroed(1 << 20));
        let disks = [0, 1].map(|_| Arc::new(ThrottledSource::new(Arc::clone(&disk), rate.clone())));
        let begun = Instant::now();
        let mut reads = tokio::task::JoinSet::new();
        for index in 0..96_u64 {
            let disk = Arc::clone(&disks[usize::from(index % 2 == 0)]);
            let buffer = Buffer::unbudgeted(vec![0; 65536]);
            reads.spawn(async move { disk.read(index % 16 * 65536, buffer).await.map(|_| ()) });
        }
        assert!(reads.join_all().await.into_iter().all(|read| read.is_ok()));
        // 6 MiB at 1 MiB/s; the last one has only to start.
        let took = begun.elapsed();
        assert!((5.9..6.1).contains(&took.as_secs_f64()), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_throttled_disk_conforms() {
        let content = conformance::pattern(300_000);
        let inner = Arc::new(MemoryDisk::with_content(content.clone()));
        let source = ThrottledSource::new(Arc::clone(&inner) as _, Rate::new(1 << 20));
        conformance::source(&source, &content).await;
        let sink = ThrottledSink::new(Arc::clone(&inner) as _, Rate::new(1 << 20));
        conformance::sink(&sink, || async { inner.content() }).await;
    }
}
