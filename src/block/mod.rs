//! The vocabulary of disks: sources, sinks, ranges, extents, buffers.
//!
//! A [`BlockSource`] is a disk that does not change while it is read (a point in time, a stored
//! disk, an idle image); a [`BlockSink`] is a disk being made. Everything that copies, serves or
//! verifies works on these two traits; NBD exports, repository disks, files and memory implement
//! them. [`conformance`] is the suite every implementation runs.
//!
//! Contract of both:
//! - Ranges lie within [`Geometry::size_bytes`] and respect [`Geometry::align_bytes`] (the tail of
//!   an unaligned disk excepted); a violation is the caller's bug and may panic.
//! - Requests run concurrently, up to [`Geometry::in_flight`] of them usefully, in any order;
//!   each takes at most [`Geometry::request_bytes_max`] of payload.
//! - An error is returned, never turned into zeroes or short data.
//! - Buffers are passed by value, so a dropped future leaves no borrowed memory behind; dropping a
//!   future abandons the request (a write may or may not have happened).

mod buffer;
pub mod conformance;
mod extent;
pub mod file;
pub mod layer;
pub mod memory;
pub mod null;
pub mod overlay;
mod range;

pub use buffer::{Budget, Buffer, Share};
pub use extent::{Extent, ExtentKind, ExtentMap};
pub use range::ByteRange;

use std::sync::Arc;

use async_trait::async_trait;

use crate::error::Result;

/// Size and limits of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Virtual size; at most `i64::MAX`.
    pub size_bytes: u64,
    /// Offsets and lengths of requests are multiples of this power of two.
    pub align_bytes: u64,
    /// Requests of a multiple of this size and alignment are cheapest. A sink that takes only
    /// whole chunks (the repository) says so with `align_bytes == preferred_bytes`.
    pub preferred_bytes: u64,
    /// Largest payload of one read or write.
    pub request_bytes_max: u64,
    /// Requests worth having in flight at once; at least 1.
    pub in_flight: usize,
}

impl Geometry {
    /// The whole disk.
    pub fn range(&self) -> ByteRange {
        ByteRange::new(0, self.size_bytes)
    }
}

/// Reading on the caller's own thread, for sources whose bytes are a system call away.
pub trait BlockingRead: Send + Sync {
    /// Fills `bytes` from `offset` on, and says whether that had to wait for a disk.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<Waited>;
}

/// Whether a read had to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// No: the bytes were in memory.
    No,
    /// For a disk: more reads at a time would be faster.
    ForDisk,
}

/// Writing on the caller's own thread.
pub trait BlockingWrite: Send + Sync {
    /// Stores `bytes` at `offset`.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Makes `range` read as zeroes.
    fn zero_at(&self, range: ByteRange, mode: ZeroMode) -> Result<()>;

    /// Whether a write waits for a disk: more at a time are faster.
    fn waits(&self) -> bool {
        false
    }
}

/// Giving up what nobody needs of a disk that is read once, where somebody pays for keeping it.
#[async_trait]
pub trait Release: Send + Sync {
    /// Gives up `range`, which is neither read nor asked about ([`BlockSource::extents`]) again: both
    /// may fail there from now on, and never show anything else than the disk. A hint: less may be
    /// given up. Cancel-safe.
    async fn release(&self, range: ByteRange) -> Result<()>;
}

/// A disk that can be read and does not change meanwhile.
#[async_trait]
pub trait BlockSource: Send + Sync {
    /// Size and limits; constant.
    fn geometry(&self) -> Geometry;

    /// What a prefix of `range` holds: the map starts at `range.offset()`, ends within `range` and
    /// covers at least one byte, so callers loop. Data is always a right answer; Zero is a promise.
    /// Unchanged appears only in sources opened against a base. `range` is not empty and, unlike in
    /// reads, of any length. Cancel-safe.
    async fn extents(&self, range: ByteRange) -> Result<ExtentMap>;

    /// Fills the buffer's window with the bytes from `offset` on. The whole window is filled when
    /// it returns `Ok`. Cancel-safe: nothing of the request survives but traffic.
    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer>;

    /// The same disk for threads that may wait, if it needs no reactor.
    fn blocking(&self) -> Option<Arc<dyn BlockingRead>> {
        None
    }

    /// How parts of it are given up, if that is of use to anybody.
    fn release(&self) -> Option<Arc<dyn Release>> {
        None
    }
}

/// How a sink may make zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroMode {
    /// As cheaply as it can: holes are welcome.
    Sparse,
    /// Space stays allocated.
    Allocated,
    /// Only when it costs less than writing zeroes; else fails with [`Kind::Unsupported`] and
    /// changes nothing.
    ///
    /// [`Kind::Unsupported`]: crate::error::Kind::Unsupported
    FastOnly,
}

/// A disk being written.
///
/// Each byte is given exactly once, by `write`, `zero` or `keep`; afterwards [`BlockSink::flush`]
/// makes everything that completed durable. Committing (renaming the file, writing the manifest)
/// is not the sink's business but that of whoever opened it.
#[async_trait]
pub trait BlockSink: Send + Sync {
    /// Size and limits; constant.
    fn geometry(&self) -> Geometry;

    /// Whether the whole disk reads as zeroes before the first write, so that zeroes can be left out.
    fn starts_zero(&self) -> bool {
        false
    }

    /// Whether [`BlockSink::zero`] may cost less than writing zeroes. Where it never does, zeroes
    /// found in data are best written with the data around them.
    fn can_zero(&self) -> bool {
        true
    }

    /// What a prefix of `range` holds before the first write, as in [`BlockSource::extents`], from
    /// one query. Data is always a right answer.
    async fn existing(&self, range: ByteRange) -> Result<ExtentMap> {
        Ok(ExtentMap::uniform(range, ExtentKind::Data))
    }

    /// Stores the buffer's window at `offset`.
    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()>;

    /// Makes `range` read as zeroes.
    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()>;

    /// Leaves `range` as it was in the base. Only sinks opened against a base accept it; others
    /// fail with [`Kind::Unsupported`](crate::error::Kind::Unsupported).
    async fn keep(&self, range: ByteRange) -> Result<()>;

    /// Makes every completed write durable; an error means that data is lost.
    async fn flush(&self) -> Result<()>;

    /// The same disk for threads that may wait, if it needs no reactor.
    fn blocking_sink(&self) -> Option<Arc<dyn BlockingWrite>> {
        None
    }
}

/// Reads all of `source` (for small disks, artefacts and tests; at most `bytes_max`).
pub async fn read_all(source: &dyn BlockSource, bytes_max: usize) -> Result<Vec<u8>> {
    use crate::error::{Error, Kind};
    let geometry = source.geometry();
    let size = usize::try_from(geometry.size_bytes).ok().filter(|size| *size <= bytes_max);
    let Some(size) = size else {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "{} bytes are more than the {bytes_max} this place may hold",
                geometry.size_bytes
            ),
        ));
    };
    let mut out = Vec::with_capacity(size);
    for piece in geometry.range().pieces(geometry.request_bytes_max.min(1 << 20)) {
        let len = usize::try_from(piece.len()).expect("a piece is at most 1 MiB");
        let buffer = source.read(piece.offset(), Buffer::unbudgeted(vec![0; len])).await?;
        out.extend_from_slice(&buffer);
    }
    Ok(out)
}
