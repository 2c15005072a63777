//! Are two disks equal? The first is copied into a sink that compares with the second.
//!
//! What both know to be zero is read from neither.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::{Destination, Flush, Options, Unchanged, Zeroes, copy};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentKind, Geometry, ZeroMode};
use crate::content::is_zero;
use crate::control::{Control, DiskProgress};
use crate::error::{Error, Kind, Result};

/// Differences are told in blocks of this size.
const BLOCK_BYTES: u64 = 512;

/// Most differing ranges found before the comparison stops.
const DIFFERENCES_MAX: usize = 64;

/// Reads of the second disk where the first is zero.
const READ_BYTES: u64 = 256 * 1024;

/// What a comparison found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Ranges that differ, in whole 512-byte sectors, in order of their offsets. Empty: equal.
    pub differences: Vec<ByteRange>,
    /// Whether the comparison stopped early because it had found enough.
    pub more: bool,
}

impl Comparison {
    /// Whether both disks hold the same.
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty()
    }
}

/// Compares two disks, called `options.source_name` and `options.sink_name` in errors. Disks of
/// different sizes fail with [`Kind::Mismatch`]. Not cancel-safe beyond `control`.
pub async fn compare(
    first: Arc<dyn BlockSource>,
    second: Arc<dyn BlockSource>,
    options: &Options,
    control: &Control,
    progress: &Arc<DiskProgress>,
) -> Result<Comparison> {
    let sizes = (first.geometry().size_bytes, second.geometry().size_bytes);
    if sizes.0 != sizes.1 {
        let message = format!(
            "{} has {} bytes, {} has {}",
            options.source_name, sizes.0, options.sink_name, sizes.1
        );
        return Err(Error::new(Kind::Mismatch, message));
    }
    let options = Options {
        zeroes: Zeroes::Sparse { detect_bytes: None },
        destination: Destination::AsItSays,
        unchanged: Unchanged::Read,
        flush: Flush::Never,
        ..options.clone()
    };
    let sink = Arc::new(CompareSink { other: second, found: Mutex::default() });
    let copied = copy(first, Arc::clone(&sink) as _, &options, control, progress).await;
    let found = std::mem::take(&mut *sink.lock());
    match copied {
        Err(error) if !found.full => Err(error),
        _ => Ok(Comparison { differences: found.ranges, more: found.full }),
    }
}

struct CompareSink {
    other: Arc<dyn BlockSource>,
    found: Mutex<Found>,
}

#[derive(Debug, Default)]
struct Found {
    /// Sorted and disjoint.
    ranges: Vec<ByteRange>,
    full: bool,
}

impl CompareSink {
    fn lock(&self) -> std::sync::MutexGuard<'_, Found> {
        // Held for a sort of at most 65 ranges, never across an await.
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(&self, range: ByteRange) -> Result<Buffer> {
        let len = usize::try_from(range.len()).expect("a request fits memory");
        self.other.read(range.offset(), Buffer::unbudgeted(vec![0; len])).await
    }

    /// Notes where `equal` is false; an error ends the comparison once enough is found.
    fn note(&self, range: ByteRange, equal: impl Fn(std::ops::Range<usize>) -> bool) -> Result<()> {
        let at = |n: u64| usize::try_from(n - range.offset()).expect("a request fits memory");
        if equal(0..at(range.end())) {
            return Ok(());
        }
        let mut found = self.lock();
        for block in range.pieces(BLOCK_BYTES) {
            if !equal(at(block.offset())..at(block.end())) {
                found.add(block);
            }
        }
        if found.full {
            return Err(Error::new(Kind::Mismatch, "too many differences"));
        }
        Ok(())
    }
}

impl Found {
    fn add(&mut self, block: ByteRange) {
        let index = self.ranges.partition_point(|range| range.offset() <= block.offset());
        // Reads widened to the alignment of the second disk may overlap.
        let known = index > 0 && self.ranges[index - 1].contains(block);
        if self.full || known {
            return;
        }
        self.ranges.insert(index, block);
        // Merge with the right neighbour first, so that `index` stays right for the left one.
        for left in [index, index.wrapping_sub(1)] {
            let (Some(a), Some(b)) = (self.ranges.get(left), self.ranges.get(left.wrapping_add(1)))
            else {
                continue;
            };
            if a.end() == b.offset() {
                self.ranges[left] = ByteRange::between(a.offset(), b.end());
                self.ranges.remove(left + 1);
            }
        }
        if self.ranges.len() > DIFFERENCES_MAX {
            self.ranges.pop();
            self.full = true;
        }
    }
}

#[async_trait]
impl BlockSink for CompareSink {
    fn geometry(&self) -> Geometry {
        self.other.geometry()
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let other = self.read(range).await?;
        self.note(range, |part| buffer[part.clone()] == other[part])
    }

    async fn zero(&self, range: ByteRange, _mode: ZeroMode) -> Result<()> {
        let max = self.other.geometry().request_bytes_max.min(READ_BYTES);
        let mut at = range.offset();
        while at < range.end() {
            let map = self.other.extents(ByteRange::between(at, range.end())).await?;
            assert!(map.end() > at, "a map makes progress");
            at = map.end();
            for extent in map.iter().filter(|extent| extent.kind != ExtentKind::Zero) {
                for piece in aligned(extent.range, &self.geometry()).pieces(max) {
                    let other = self.read(piece).await?;
                    self.note(piece, |part| is_zero(&other[part]))?;
                }
            }
        }
        Ok(())
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        Err(Error::new(Kind::Unsupported, format!("{range} cannot be compared unread")))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// Extents of a source need not respect its alignment; reads must.
fn aligned(range: ByteRange, geometry: &Geometry) -> ByteRange {
    range.widen(geometry.align_bytes, geometry.size_bytes)
}
