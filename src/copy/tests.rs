//! The engine against memory disks, chunk sinks that count, and faults at every kind of place.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use proptest::prelude::*;

use super::*;
use crate::block::file::{Access, Existing, FileSource, NewFile};
use crate::block::layer::faulty::{Faults, FaultySink, FaultySource};
use crate::block::memory::MemoryDisk;
use crate::block::{Buffer, ExtentMap, ZeroMode, conformance};

/// A sink of whole chunks over a base, as the repository is: every chunk exactly once.
struct ChunkSink {
    content: Mutex<Vec<u8>>,
    given: Mutex<Vec<u8>>,
    chunk: usize,
    zeroed: AtomicUsize,
    in_flight: AtomicUsize,
    in_flight_max: AtomicUsize,
}

impl ChunkSink {
    fn over(base: Vec<u8>, chunk: usize) -> Arc<Self> {
        let chunks = base.len().div_ceil(chunk);
        Arc::new(Self {
            content: Mutex::new(base),
            given: Mutex::new(vec![0; chunks]),
            chunk,
            zeroed: AtomicUsize::new(0),
            in_flight: AtomicUsize::new(0),
            in_flight_max: AtomicUsize::new(0),
        })
    }

    fn give(&self, range: ByteRange) -> std::ops::Range<usize> {
        let (start, end) =
            (usize::try_from(range.offset()).unwrap(), usize::try_from(range.end()).unwrap());
        let size = self.content.lock().unwrap().len();
        assert!(start.is_multiple_of(self.chunk), "{range} does not begin a chunk");
        assert!(end.is_multiple_of(self.chunk) || end == size, "{range} does not end a chunk");
        for times in &mut self.given.lock().unwrap()[start / self.chunk..end.div_ceil(self.chunk)] {
            *times += 1;
        }
        start..end
    }

    fn assert_complete(&self) {
        assert!(self.given.lock().unwrap().iter().all(|times| *times == 1), "each chunk once");
    }
}

#[async_trait]
impl BlockSink for ChunkSink {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.content.lock().unwrap().len() as u64,
            align_bytes: self.chunk as u64,
            preferred_bytes: self.chunk as u64,
            request_bytes_max: self.chunk as u64,
            in_flight: 4,
        }
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        let now = self.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.in_flight_max.fetch_max(now, Ordering::SeqCst);
        tokio::task::yield_now().await;
        let range = self.give(ByteRange::new(offset, buffer.len() as u64));
        self.content.lock().unwrap()[range].copy_from_slice(&buffer);
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    async fn zero(&self, range: ByteRange, _mode: ZeroMode) -> Result<()> {
        self.zeroed.fetch_add(1, Ordering::SeqCst);
        let range = self.give(range);
        self.content.lock().unwrap()[range].fill(0);
        Ok(())
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.give(range);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

pub(super) async fn run(
    source: Arc<dyn BlockSource>,
    sink: Arc<dyn BlockSink>,
    options: &Options,
) -> Result<Report> {
    let control = Control::new();
    let progress = control.add_disk("vda", source.geometry().size_bytes);
    let report = copy(source, sink, options, &control, &progress).await?;
    assert_eq!(progress.done_bytes(), progress.total_bytes);
    assert_eq!(progress.read_bytes(), report.read_bytes);
    Ok(report)
}

pub(super) fn options() -> Options {
    Options::new("the source", "the sink")
}

/// A base and what it became: overwritten, zeroed and untouched ranges.
fn changed(size: usize, changes: &[(usize, usize, bool)]) -> (Vec<u8>, Vec<u8>, Vec<ByteRange>) {
    let base = conformance::pattern(size);
    let mut now = base.clone();
    let mut marks = vec![false; size];
    for (start, len, zero) in changes {
        let (start, end) = (start % size, (start % size + len).min(size));
        now[start..end].fill(if *zero { 0 } else { 0xa5 });
        marks[start..end].fill(true);
    }
    let mut ranges: Vec<ByteRange> = Vec::new();
    for (at, _) in marks.iter().enumerate().filter(|(_, mark)| **mark) {
        match ranges.last_mut() {
            Some(last) if last.end() == at as u64 => {
                *last = ByteRange::between(last.offset(), at as u64 + 1);
            }
            _ => ranges.push(ByteRange::new(at as u64, 1)),
        }
    }
    (base, now, ranges)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn an_incremental_makes_the_base_equal_to_the_source(
        size in 1usize..200_000,
        changes in prop::collection::vec((0usize..200_000, 1usize..30_000, any::<bool>()), 0..8),
        chunk_shift in 9u32..17,
    ) {
        let (base, now, ranges) = changed(size, &changes);
        let chunk = 1 << chunk_shift;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let source = Arc::new(MemoryDisk::changed_since_base(now.clone(), ranges.clone()));
            let sink = ChunkSink::over(base.clone(), chunk);
            let report = run(source.clone(), sink.clone(), &options()).await.unwrap();
            sink.assert_complete();
            assert!(*sink.content.lock().unwrap() == now, "content differs");
            // No chunk without a change is read.
            let touched: std::collections::BTreeSet<_> =
                ranges.iter().flat_map(|r| r.offset() / chunk as u64..=(r.end() - 1) / chunk as u64).collect();
            assert!(report.read_bytes <= touched.len() as u64 * chunk as u64);
            assert_eq!(report.kept_bytes == size as u64, ranges.is_empty());

            // The same source read in full, into a sink without a base.
            let sink = Arc::new(MemoryDisk::with_content(vec![0x77; size]));
            let whole = Options { unchanged: Unchanged::Read, ..options() };
            run(source, sink.clone(), &whole).await.unwrap();
            assert!(sink.content() == now, "content differs");
        });
    }

    #[test]
    fn a_read_error_anywhere_fails_the_copy_and_names_the_place(
        size in 1usize..300_000,
        place in 0usize..300_000,
        request_shift in 12u32..18,
    ) {
        let content = conformance::pattern(size);
        let at = (place % size) as u64;
        let is_data = |at: u64| {
            let block = usize::try_from(at).unwrap() / 4096 * 4096;
            content[block..(block + 4096).min(size)].iter().any(|b| *b != 0)
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let options = Options { request_bytes: Some(1 << request_shift), ..options() };
            let inner = Arc::new(MemoryDisk::with_content(content.clone()));
            let faults = Faults { read_at: Some(at), ..Faults::default() };
            let source = Arc::new(FaultySource::new(inner.clone(), faults));
            let sink = Arc::new(MemoryDisk::with_content(vec![0x77; size]));
            let result = run(source, sink.clone(), &options).await;
            if is_data(at) {
                let error = result.unwrap_err();
                assert_eq!(error.kind(), Kind::Io);
                assert!(error.to_string().contains("of the source"), "{error}");
                assert_eq!(sink.content()[usize::try_from(at).unwrap()], 0x77, "written unread");
            } else {
                // A hole is not read, so its fault is not met.
                result.unwrap();
                assert!(sink.content() == content);
            }
            for faults in [
                Faults { extents_at: Some(at), ..Faults::default() },
            ] {
                let source = Arc::new(FaultySource::new(inner.clone(), faults));
                run(source, sink.clone(), &options).await.unwrap_err();
            }
            for faults in [
                Faults { write_at: Some(at), ..Faults::default() },
                Faults { torn_at: Some(at).filter(|at| is_data(*at)), flush: true, ..Faults::default() },
            ] {
                let sink = Arc::new(FaultySink::new(sink.clone(), faults));
                let error = run(inner.clone(), sink, &options).await.unwrap_err();
                assert!(error.to_string().contains("the sink"), "{error}");
            }
        });
    }
}

#[tokio::test]
async fn requests_and_bytes_in_flight_are_bounded() {
    let content = vec![1; 4 << 20];
    let sink = ChunkSink::over(vec![0; 4 << 20], 65536);
    let source = Arc::new(MemoryDisk::with_content(content.clone()));
    let options = Options { requests: Some(3), ..options() };
    run(source.clone(), sink.clone(), &options).await.unwrap();
    assert!((2..=3).contains(&sink.in_flight_max.load(Ordering::SeqCst)));

    let sink = ChunkSink::over(vec![0; 4 << 20], 65536);
    let options = Options { budget: Budget::new(65536), ..options };
    run(source, sink.clone(), &options).await.unwrap();
    assert_eq!(sink.in_flight_max.load(Ordering::SeqCst), 1);
    assert!(*sink.content.lock().unwrap() == content);
}

/// A server is asked for more at a time than a sink of chunks takes.
#[tokio::test]
async fn what_is_read_at_once_is_written_in_the_requests_that_the_sink_takes() {
    let mut content = vec![1; 4 << 20];
    content[65536 * 5..65536 * 6].fill(0);
    let source = Arc::new(MemoryDisk::with_content(content.clone()));
    for (requests, reads) in [(None, 17), (Some(3), 63)] {
        let counted = Arc::new(CountedReads { inner: source.clone(), reads: AtomicUsize::new(0) });
        let sink = ChunkSink::over(vec![0xee; 4 << 20], 65536);
        run(counted.clone(), sink.clone(), &Options { requests, ..options() }).await.unwrap();
        sink.assert_complete();
        assert!(*sink.content.lock().unwrap() == content);
        assert_eq!(counted.reads.load(Ordering::SeqCst), reads);
    }
}

/// Counts reads.
struct CountedReads {
    inner: Arc<MemoryDisk>,
    reads: AtomicUsize,
}

#[async_trait]
impl BlockSource for CountedReads {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&*self.inner)
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.inner.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.inner.read(offset, buffer).await
    }
}

#[tokio::test]
async fn a_hole_is_one_zero_request_and_is_left_out_where_the_sink_is_zero() {
    let size = 64 << 20;
    let source = Arc::new(MemoryDisk::zeroed(size));
    let sink = ChunkSink::over(vec![1; size], 65536);
    let report = run(source.clone(), sink.clone(), &options()).await.unwrap();
    assert_eq!((report.read_bytes, report.zero_bytes), (0, size as u64));
    assert_eq!(sink.zeroed.load(Ordering::SeqCst), 1);
    let sink = ChunkSink::over(vec![0; size], 65536);
    let options = Options { destination: Destination::Zero, ..options() };
    run(source, sink.clone(), &options).await.unwrap();
    assert_eq!(sink.zeroed.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_stop_ends_a_copy_at_once() {
    let faults = Faults { delay: Duration::from_secs(3600), ..Faults::default() };
    let inner = Arc::new(MemoryDisk::with_content(vec![1; 1 << 20]));
    let source = Arc::new(FaultySource::new(inner, faults));
    let control = Control::new();
    let progress = control.add_disk("vda", 1 << 20);
    let sink = Arc::new(MemoryDisk::zeroed(1 << 20));
    let options = options();
    let copying = copy(source, sink, &options, &control, &progress);
    let (result, ()) = tokio::join!(copying, async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        control.cancel();
    });
    assert_eq!(result.unwrap_err().kind(), Kind::Cancelled);
}

#[tokio::test]
async fn a_smaller_sink_is_refused_before_the_first_write() {
    let source = Arc::new(MemoryDisk::with_content(vec![1; 8192]));
    let sink = Arc::new(MemoryDisk::zeroed(4096));
    let error = run(source, sink.clone(), &options()).await.unwrap_err();
    assert_eq!(error.kind(), Kind::Usage);
    assert_eq!(sink.content(), vec![0; 4096]);
}

/// Zeroes written as data (a full image) become holes again, down to the threshold.
#[tokio::test]
async fn a_copied_file_is_sparse_and_equal() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("a.raw"), dir.path().join("b.raw"));
    let mut content = conformance::pattern((4 << 20) + 123);
    content[1 << 20..3 << 20].fill(0);
    std::fs::write(&from, &content).unwrap();
    let source = Arc::new(FileSource::open(&from, Access::Once).unwrap());
    let new = NewFile::create(&to, content.len() as u64, Existing::Refuse).unwrap();
    let report = run(source.clone(), new.sink(), &options()).await.unwrap();
    assert_eq!(report.read_bytes, content.len() as u64, "the source has no holes");
    assert!(report.zero_bytes > 2 << 20);
    new.commit().await.unwrap();
    assert!(std::fs::read(&to).unwrap() == content);
    let allocated = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&to).unwrap()) * 512;
    assert!(allocated < report.written_bytes + (1 << 20), "{allocated} bytes allocated");

    let control = Control::new();
    let progress = control.add_disk("vda", content.len() as u64);
    let copied: Arc<dyn BlockSource> = Arc::new(FileSource::open(&to, Access::Once).unwrap());
    let same = compare(source, copied, &options(), &control, &progress).await.unwrap();
    assert!(same.is_equal());
}

#[tokio::test]
async fn a_comparison_tells_every_differing_sector() {
    let size = 1 << 20;
    let content = conformance::pattern(size);
    let mut other = content.clone();
    for at in [0, 5000, 600_000, size - 1] {
        other[at] ^= 0x80;
    }
    // Zero in one, data in the other, both ways round.
    let hole = 4096;
    assert!(content[hole..hole + 4096].iter().all(|b| *b == 0));
    for (a, b) in [(&content, &other), (&other, &content)] {
        let control = Control::new();
        let progress = control.add_disk("vda", size as u64);
        let (a, b) = (MemoryDisk::with_content(a.clone()), MemoryDisk::with_content(b.clone()));
        let found =
            compare(Arc::new(a), Arc::new(b), &options(), &control, &progress).await.unwrap();
        let sectors: Vec<_> = [0_u64, 4608, 599_552, (size - 512) as u64]
            .iter()
            .map(|at| ByteRange::new(*at, 512))
            .collect();
        assert_eq!(found, Comparison { differences: sectors, more: false });
    }
    let control = Control::new();
    let progress = control.add_disk("vda", size as u64);
    let (a, b) = (MemoryDisk::with_content(content), MemoryDisk::zeroed(size));
    let found = compare(Arc::new(a), Arc::new(b), &options(), &control, &progress).await.unwrap();
    assert!(!found.is_equal());
}

/// A sink that holds something and clears itself at `bytes_per_second`, whatever it is asked.
struct Clearing {
    inner: MemoryDisk,
    bytes_per_second: u64,
    zeroed: Mutex<Vec<(ByteRange, ZeroMode)>>,
    written: AtomicUsize,
}

#[async_trait]
impl BlockSink for Clearing {
    fn geometry(&self) -> Geometry {
        BlockSink::geometry(&self.inner)
    }

    async fn existing(&self, range: ByteRange) -> Result<crate::block::ExtentMap> {
        self.inner.existing(range).await
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.written.fetch_add(buffer.len(), Ordering::SeqCst);
        self.inner.write(offset, buffer).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.zeroed.lock().unwrap().push((range, mode));
        let ms = range.len() * 1000 / self.bytes_per_second;
        tokio::time::sleep(Duration::from_millis(ms)).await;
        self.inner.zero(range, mode).await
    }

    async fn keep(&self, _range: ByteRange) -> Result<()> {
        unreachable!("nothing is kept here")
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// Every other MiB of 64 is zero; the sink holds `before`.
async fn overwrite(before: Vec<u8>, bytes_per_second: u64) -> Arc<Clearing> {
    let mut content = vec![1; 64 << 20];
    content.chunks_mut(1 << 20).step_by(2).for_each(|block| block.fill(0));
    let sink = Arc::new(Clearing {
        inner: MemoryDisk::with_content(before),
        bytes_per_second,
        zeroed: Mutex::default(),
        written: AtomicUsize::new(0),
    });
    let options = Options { destination: Destination::Overwritten, ..options() };
    let source = Arc::new(MemoryDisk::with_content(content.clone()));
    run(source, sink.clone(), &options).await.unwrap();
    assert!(sink.inner.content() == content);
    assert_eq!(sink.written.load(Ordering::SeqCst), 32 << 20, "data is written once");
    sink
}

#[tokio::test(start_paused = true)]
async fn a_sink_that_calls_slow_clearing_fast_is_found_out_by_a_small_trial() {
    let sink = overwrite(vec![7; 64 << 20], 10 << 20).await;
    let zeroed = sink.zeroed.lock().unwrap().clone();
    let fast = zeroed.iter().filter(|(_, mode)| *mode == ZeroMode::FastOnly);
    let tried: u64 = fast.map(|(range, _)| range.len()).sum();
    assert!(tried <= 6 << 20, "{tried} bytes tried: {zeroed:?}");
    let zeroed: u64 = zeroed.iter().map(|(range, _)| range.len()).sum();
    assert!(zeroed <= 36 << 20, "{zeroed} bytes zeroed");

    let sink = overwrite(vec![7; 64 << 20], 100 << 30).await;
    let zeroed: Vec<_> = sink.zeroed.lock().unwrap().iter().map(|(range, _)| range.len()).collect();
    assert_eq!(zeroed, [4096, 1 << 20, 4 << 20, 59 << 20], "a block, two trials and the rest");
}

#[tokio::test(start_paused = true)]
async fn what_a_sink_says_is_zero_is_not_zeroed() {
    let sink = overwrite(vec![0; 64 << 20], 1 << 20).await;
    assert_eq!(*sink.zeroed.lock().unwrap(), []);
    let mut before = vec![0; 64 << 20];
    before[62 << 20..].fill(7);
    // Too slow to be cleared: what is known to be zero needs nothing, the last hole is made.
    let sink = overwrite(before, 1 << 20).await;
    let zeroed = sink.zeroed.lock().unwrap().clone();
    let made: Vec<_> = zeroed.iter().filter(|(_, mode)| *mode == ZeroMode::Sparse).collect();
    assert_eq!(made.len(), 1, "{zeroed:?}");
    assert_eq!(made[0].0, ByteRange::new(62 << 20, 1 << 20));
}

#[tokio::test]
async fn the_root_computed_on_the_way_is_that_of_the_source() {
    for size in [0, 4096, 1_000_000, 3_333_333] {
        let content = conformance::pattern(size);
        let source = Arc::new(MemoryDisk::with_content(content.clone()));
        let sink = Arc::new(MemoryDisk::with_content(vec![7; size]));
        let workers = Workers::new(2).unwrap();
        let control = Control::new();
        let progress = control.add_disk("vda", size as u64);
        let shown = (&control, &progress);
        let (report, root) =
            copy_hashed(source.clone(), sink.clone(), &workers, &options(), shown).await.unwrap();
        assert_eq!(report.written_bytes + report.zero_bytes, size as u64);
        assert!(sink.content() == content);
        let expected =
            content_root(source, &options(), &workers, &control, &progress).await.unwrap();
        assert_eq!(root, expected, "{size}");
    }
}

#[tokio::test]
async fn a_stop_ends_a_copy_between_files() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("a.raw"), dir.path().join("b.raw"));
    std::fs::write(&from, vec![1; 64 << 20]).unwrap();
    let source = Arc::new(FileSource::open(&from, Access::Once).unwrap());
    let new = NewFile::create(&to, 64 << 20, Existing::Refuse).unwrap();
    let control = Control::new();
    let progress = control.add_disk("vda", 64 << 20);
    control.cancel();
    let copied = copy(source, new.sink(), &options(), &control, &progress).await;
    assert_eq!(copied.unwrap_err().kind(), Kind::Cancelled);
}
