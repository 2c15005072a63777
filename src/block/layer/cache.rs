//! A source with a bounded cache of chunks and read-ahead, for disks that are read in small pieces
//! by somebody who waits: a guest that boots from a restore point.
//!
//! A chunk is what the inner source likes to be asked for. It is read once however many want it at
//! the same time, kept until others were used later, and shared, never copied, until its bytes go
//! into the reader's buffer. A chunk of zeroes costs an entry and no memory. Requests of whole chunks
//! that are not cached go straight through: who copies the disk does not push out what a guest uses.
//!
//! Reads that go on where one ended a moment ago have the next chunks fetched in the background.
//! Errors are not cached: the next reader asks again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::{OnceCell, Semaphore};

use crate::block::{BlockSource, Buffer, ByteRange, ExtentMap, Geometry};
use crate::error::Result;

/// Chunks fetched ahead of a sequential reader, and at most in the background at once.
const AHEAD_CHUNKS: u64 = 8;

/// Sequential readers told apart.
const STREAMS: usize = 8;

/// Caches of sources with larger chunks use this size: a small read must not cost a large one.
const CHUNK_BYTES_MAX: u64 = 4 << 20;

/// Smallest chunk: less is not worth an entry.
const CHUNK_BYTES_MIN: u64 = 64 << 10;

/// A source with a cache. Clones share it.
#[derive(Clone)]
pub struct CachedSource {
    shared: Arc<Shared>,
}

struct Shared {
    inner: Arc<dyn BlockSource>,
    geometry: Geometry,
    chunk_bytes: u64,
    chunks_max: usize,
    state: Mutex<State>,
    ahead: Arc<Semaphore>,
}

#[derive(Default)]
struct State {
    entries: HashMap<u64, Entry>,
    /// Counts uses: the entry with the smallest number was used the longest ago.
    clock: u64,
    /// Where sequential readers will go on, the newest last.
    streams: Vec<u64>,
}

struct Entry {
    cell: Arc<OnceCell<Chunk>>,
    used: u64,
}

/// The content of a chunk.
#[derive(Clone)]
enum Chunk {
    Zero,
    Data(Arc<Vec<u8>>),
}

impl CachedSource {
    /// Caches up to `cache_bytes` of `inner` (at least a few chunks).
    pub fn new(inner: Arc<dyn BlockSource>, cache_bytes: u64) -> Self {
        let geometry = inner.geometry();
        let limit = CHUNK_BYTES_MAX.min(geometry.request_bytes_max).max(geometry.align_bytes);
        let chunk_bytes = geometry.preferred_bytes.max(CHUNK_BYTES_MIN).min(limit);
        let chunk_bytes = chunk_bytes.next_multiple_of(geometry.align_bytes);
        let chunks_max = usize::try_from(cache_bytes / chunk_bytes).unwrap_or(usize::MAX).max(16);
        let ahead = Arc::new(Semaphore::new(usize::try_from(AHEAD_CHUNKS).expect("small")));
        let state = Mutex::default();
        let shared = Shared { inner, geometry, chunk_bytes, chunks_max, state, ahead };
        Self { shared: Arc::new(shared) }
    }

    fn chunk_range(&self, chunk: u64) -> ByteRange {
        let unit = self.shared.chunk_bytes;
        ByteRange::new(chunk * unit, unit).intersect(self.shared.geometry.range())
    }

    /// The chunk, from the cache or from below. Cancel-safe: another who waits goes on reading.
    async fn chunk(&self, chunk: u64) -> Result<Chunk> {
        let cell = self.shared.cell(chunk);
        let found = cell.get_or_try_init(|| async {
            let range = self.chunk_range(chunk);
            let len = usize::try_from(range.len()).expect("a chunk is a few MiB");
            let buffer = Buffer::unbudgeted(vec![0; len]);
            let buffer = self.shared.inner.read(range.offset(), buffer).await?;
            let zero = buffer.iter().all(|byte| *byte == 0);
            Ok(if zero { Chunk::Zero } else { Chunk::Data(Arc::new(buffer.to_vec())) })
        });
        found.await.cloned()
    }

    /// Fetches chunks in the background, as far as there is room for that.
    fn fetch_ahead(&self, chunks: std::ops::Range<u64>) {
        let end = self.shared.geometry.size_bytes.div_ceil(self.shared.chunk_bytes);
        for chunk in chunks.start..chunks.end.min(end) {
            if self.shared.is_known(chunk) {
                continue;
            }
            let Ok(place) = Arc::clone(&self.shared.ahead).try_acquire_owned() else { return };
            let this = self.clone();
            tokio::spawn(async move {
                let _place = place;
                // Whoever wants the chunk meets the error again.
                let _ = this.chunk(chunk).await;
            });
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Held for map operations only, never across an await.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_known(&self, chunk: u64) -> bool {
        self.lock().entries.contains_key(&chunk)
    }

    /// The place of a chunk, made if need be; the chunk that was unused the longest makes room.
    fn cell(&self, chunk: u64) -> Arc<OnceCell<Chunk>> {
        let mut state = self.lock();
        state.clock += 1;
        let used = state.clock;
        if let Some(entry) = state.entries.get_mut(&chunk) {
            entry.used = used;
            return Arc::clone(&entry.cell);
        }
        if state.entries.len() >= self.chunks_max {
            let oldest = state.entries.iter().min_by_key(|(_, entry)| entry.used);
            let oldest = oldest.map(|(chunk, _)| *chunk).expect("there are entries");
            state.entries.remove(&oldest);
        }
        let cell = Arc::new(OnceCell::new());
        state.entries.insert(chunk, Entry { cell: Arc::clone(&cell), used });
        cell
    }

    /// Notes a read; whether it goes on where one ended.
    fn is_sequential(&self, range: ByteRange) -> bool {
        let mut state = self.lock();
        let known = state.streams.iter().position(|end| *end == range.offset());
        match known {
            Some(index) => drop(state.streams.remove(index)),
            None if state.streams.len() >= STREAMS => drop(state.streams.remove(0)),
            None => {}
        }
        state.streams.push(range.end());
        known.is_some()
    }
}

#[async_trait]
impl BlockSource for CachedSource {
    fn geometry(&self) -> Geometry {
        self.shared.geometry
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.shared.inner.extents(range).await
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let unit = self.shared.chunk_bytes;
        let (first, end) = (range.offset() / unit, range.end().div_ceil(unit));
        let whole = range.offset().is_multiple_of(unit) && range.len() >= unit;
        if whole && (first..end).all(|chunk| !self.shared.is_known(chunk)) {
            return self.shared.inner.read(offset, buffer).await;
        }
        let ahead = if self.shared.is_sequential(range) { AHEAD_CHUNKS } else { 0 };
        // The chunks of one request are fetched side by side, too.
        if end + ahead > first + 1 {
            self.fetch_ahead(first..end + ahead);
        }
        for part in range.pieces(unit) {
            let chunk = self.chunk(part.offset() / unit).await?;
            let index = |n: u64| usize::try_from(n).expect("a request fits a buffer");
            let to = index(part.offset() - offset)..index(part.end() - offset);
            match chunk {
                Chunk::Zero => buffer[to].fill(0),
                Chunk::Data(bytes) => {
                    let from = index(part.offset() % unit);
                    let len = to.len();
                    buffer[to].copy_from_slice(&bytes[from..from + len]);
                }
            }
        }
        Ok(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::conformance;
    use crate::block::layer::faulty::{Faults, FaultySource};
    use crate::block::memory::MemoryDisk;
    use crate::error::Error;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Counts reads.
    struct Counted(MemoryDisk, AtomicUsize);

    #[async_trait]
    impl BlockSource for Counted {
        fn geometry(&self) -> Geometry {
            BlockSource::geometry(&self.0)
        }
        async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
            self.0.extents(range).await
        }
        async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
            self.1.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            self.0.read(offset, buffer).await
        }
    }

    fn counted(len: usize) -> (Arc<Counted>, Vec<u8>) {
        let content = conformance::pattern(len);
        let disk = MemoryDisk::with_content(content.clone());
        (Arc::new(Counted(disk, AtomicUsize::new(0))), content)
    }

    async fn read(source: &CachedSource, offset: u64, len: usize) -> Result<Vec<u8>, Error> {
        source.read(offset, Buffer::unbudgeted(vec![9; len])).await.map(|buffer| buffer.to_vec())
    }

    #[tokio::test]
    async fn a_cached_source_is_the_source() {
        for cache_bytes in [0, 64 << 20] {
            let (disk, content) = counted((3 << 20) + 4321);
            conformance::source(&CachedSource::new(disk, cache_bytes), &content).await;
        }
    }

    #[tokio::test]
    async fn a_chunk_is_read_once_however_many_want_it() {
        let (disk, content) = counted(1 << 20);
        let source = CachedSource::new(Arc::clone(&disk) as _, 1 << 20);
        let reads = (0..16).map(|n| (n, read(&source, n * 4096, 4096)));
        let mut set = tokio::task::JoinSet::new();
        for (n, _) in reads {
            let (source, content) = (source.clone(), content.clone());
            set.spawn(async move {
                let at = usize::try_from(n * 4096).unwrap();
                assert!(read(&source, n * 4096, 4096).await.unwrap() == content[at..at + 4096]);
            });
        }
        set.join_all().await;
        // The first chunk once; chunks ahead of what looked sequential once each.
        assert!(disk.1.load(Ordering::Relaxed) <= 16, "{:?}", disk.1);
        let before = disk.1.load(Ordering::Relaxed);
        read(&source, 100, 5000).await.unwrap();
        assert_eq!(disk.1.load(Ordering::Relaxed), before);
    }

    /// How often the disk was read, once nothing runs in the background.
    async fn reads_of(disk: &Counted) -> usize {
        for _ in 0..1000 {
            tokio::task::yield_now().await;
        }
        disk.1.load(Ordering::Relaxed)
    }

    #[tokio::test]
    async fn who_reads_on_finds_the_next_chunks_there() {
        let (disk, content) = counted(4 << 20);
        let source = CachedSource::new(Arc::clone(&disk) as _, 4 << 20);
        let unit = source.shared.chunk_bytes;
        let chunks_ahead = usize::try_from(AHEAD_CHUNKS).unwrap();
        read(&source, 0, 4096).await.unwrap();
        assert_eq!(reads_of(&disk).await, 1, "one read is no sequence");
        read(&source, 4096, 4096).await.unwrap();
        assert_eq!(reads_of(&disk).await, 1 + chunks_ahead);
        for chunk in 1..STREAMS as u64 {
            // Each for itself: this reader does not read on, and is not taken for more than there may be.
            let (at, len) = (chunk * unit + 512, usize::try_from(unit).unwrap() - 512);
            let start = usize::try_from(at).unwrap();
            assert!(read(&source, at, len).await.unwrap() == content[start..start + len]);
        }
        assert_eq!(reads_of(&disk).await, 1 + chunks_ahead, "they were there");
        // Again so many ahead of where the first one goes on, and none behind the end.
        read(&source, 8192, usize::try_from(unit).unwrap()).await.unwrap();
        assert_eq!(reads_of(&disk).await, 2 + chunks_ahead);
        let last = (4 << 20) - 2 * 4096;
        read(&source, last, 4096).await.unwrap();
        read(&source, last + 4096, 4096).await.unwrap();
        assert_eq!(reads_of(&disk).await, 3 + chunks_ahead);
    }

    #[tokio::test]
    async fn several_who_read_on_are_told_apart() {
        let (disk, _) = counted(16 << 20);
        let source = CachedSource::new(Arc::clone(&disk) as _, 16 << 20);
        let starts = [0, 4 << 20, 8 << 20];
        for start in starts {
            read(&source, start, 512).await.unwrap();
        }
        let mut expected = starts.len();
        for start in starts {
            read(&source, start + 512, 512).await.unwrap();
            expected += usize::try_from(AHEAD_CHUNKS).unwrap();
            assert_eq!(reads_of(&disk).await, expected);
        }
    }

    #[tokio::test]
    async fn who_reads_here_and_there_has_nothing_fetched_ahead() {
        let (disk, _) = counted(4 << 20);
        let source = CachedSource::new(Arc::clone(&disk) as _, 4 << 20);
        let unit = source.shared.chunk_bytes;
        let places = [7, 3, 30, 31, 12, 4, 21];
        for chunk in places {
            read(&source, chunk * unit + 1024, 4096).await.unwrap();
        }
        assert_eq!(reads_of(&disk).await, places.len());
    }

    #[tokio::test]
    async fn the_cache_stays_within_its_bound() {
        let (disk, _) = counted(8 << 20);
        let source = CachedSource::new(disk, 0);
        for n in 0..128 {
            read(&source, n * 65536 + 512, 512).await.unwrap();
        }
        assert_eq!(source.shared.lock().entries.len(), 16);
    }

    #[tokio::test]
    async fn an_error_is_not_cached() {
        let (disk, _) = counted(1 << 20);
        let faults = Faults { read_at: Some(70_000), ..Faults::default() };
        let source = CachedSource::new(Arc::new(FaultySource::new(disk, faults)), 1 << 20);
        for _ in 0..2 {
            read(&source, 65536, 512).await.unwrap_err();
        }
        read(&source, 0, 512).await.unwrap();
    }
}
