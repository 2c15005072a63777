//! The copy engine: joins a [`BlockSource`] to a [`BlockSink`]. Backup, restore, import, hashing
//! and comparing are all this one pipeline with different ends.
//!
//! ```text
//!  clear ─► walk ──extent maps──► plan ──steps──► pipeline ──► step: take buffer ► read ► write
//!  (zeroes) (windows ahead)       (pure)          (bounded)          zero, keep
//! ```
//!
//! Where both ends are a system call away (files), threads of their own do whole steps instead
//! (`direct`): no byte changes hands between threads.
//!
//! Invariants:
//! - *Partition*: the steps cover the disk exactly once, in order, each beginning and ending at
//!   multiples of the sink's alignment (a repository's chunk) or at the disk's end.
//! - *Errors travel*: the first error of any step ends the copy and is its result, with the side
//!   and the disk offset; no completion is dropped unseen. What could not be read is never
//!   written, least of all as zeroes.
//! - *Bounded*: bytes in flight by [`Options::budget`], requests by [`Options::requests`], extents
//!   by the walker's window.
//! - *Once*: behind what the sink was given the source is neither read nor asked, so that it may be
//!   given up there ([`Release`](crate::block::Release)).
//! - Extents known to be zero are not read; Unchanged is handed to the sink as `keep` where a whole
//!   chunk is unchanged, and read where it shares a chunk with a change.
//!
//! Steps begin in the order of the disk, each with its buffer in hand; their requests may reach the
//! sink in any order. A sink must not hold on to buffers while it waits for
//! further ones: the budget may be spent on what it holds.
//!
//! Deliberately not done here: retries (a source that is opened again does them, `nbd::reconnect`), the decision what is
//! incremental (the source's extents), committing (the job).

mod canary;
mod clear;
mod compare;
mod direct;
mod hash;
mod kept;
mod pipeline;
mod plan;
mod sparse;
mod step;
mod stream;
#[cfg(test)]
mod tests;
mod walk;

pub use compare::{Comparison, compare};
pub use hash::content_root;
pub use kept::kept;
pub use stream::copy_pipe;

use std::sync::Arc;

use crate::block::{BlockSink, BlockSource, Budget, ByteRange, Geometry};
use crate::content::{ContentRoot, LEAF_BYTES};
use crate::control::{Control, DiskProgress};
use crate::error::{Error, Kind, Result};
use crate::units::{KIB, MIB};
use crate::workers::Workers;

/// Bytes in flight of a copy that was given no budget of a job: small enough that buffers stay in
/// the processor's cache (nbdcopy: +43 % and more with 2 MiB against unlimited, libnbd 837e00c).
const BUDGET_BYTES: usize = 16 << 20;

/// The best request size between files: a step's bytes stay in the cache of a core (nbdcopy's sweep,
/// libnbd e9665aa and 4ff9e62).
const REQUEST_BYTES_DIRECT: u64 = 256 * KIB;

/// The same where either end is a server: fewer wake-ups of both for the same bytes. Measured on two
/// cores with nbdkit and qemu-nbd: 0.73 to 0.97 x the time with 256 KiB, and more again with 2 MiB;
/// and what is in flight fills 20 ms of latency.
const REQUEST_BYTES: u64 = MIB;

/// Into how many writes what is read at once may be cut, for a sink that takes no larger ones: a
/// repository takes chunks, but a server is asked for more at a time.
const WRITES_PER_READ: u64 = 4;

/// Largest request size that can be asked for: NBD servers refuse more (QEMU, nbd/server.c).
pub const REQUEST_BYTES_MAX: u64 = 32 * MIB;

/// Fewest and most requests in flight when not told.
const REQUESTS: std::ops::RangeInclusive<usize> = 4..=64;

/// How to copy.
#[derive(Clone, Debug)]
pub struct Options {
    /// What the source is called in errors ("vda of domain foo").
    pub source_name: String,
    /// What the sink is called in errors.
    pub sink_name: String,
    /// Requests in flight at either end; as many reads as both ends find useful if not given, and up to
    /// [`WRITES_PER_READ`] writes for each.
    pub requests: Option<usize>,
    /// Size of one read, made to fit both ends (a sink that takes less at a time is written to in several
    /// requests); what suits them, and the search for zeroes, if not given.
    pub request_bytes: Option<u64>,
    /// Bound on bytes in flight, perhaps shared with the other disks of a job.
    pub budget: Budget,
    /// What becomes of zeroes.
    pub zeroes: Zeroes,
    /// What the sink holds before the copy.
    pub destination: Destination,
    /// What becomes of the sink's bytes behind the end of a source of an odd size.
    pub tail: Tail,
    /// What becomes of ranges that are as in the base.
    pub unchanged: Unchanged,
    /// Whether the copy ends durable.
    pub flush: Flush,
}

/// What becomes of zeroes at the sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroes {
    /// Holes where the sink can have them. Data is searched for runs of zeroes of at least
    /// `detect_bytes` (a power of two) too; sinks of chunks that large do that by themselves.
    Sparse {
        /// Shortest run made a hole, as far as the ends take requests that large; none is searched
        /// for if not given.
        detect_bytes: Option<u64>,
    },
    /// Space is allocated for them; nothing is left out.
    Allocated,
}

impl Zeroes {
    /// Shortest run of zeroes that is looked for in data.
    fn detect_bytes(self) -> Option<u64> {
        match self {
            Self::Sparse { detect_bytes } => detect_bytes,
            Self::Allocated => None,
        }
    }
}

/// What the sink holds before the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Whatever [`BlockSink::starts_zero`] says.
    AsItSays,
    /// All zeroes: the caller knows.
    Zero,
    /// Anything, and nobody needs it: the sink is asked what it holds, and cleared in advance where
    /// that is fast. Only for sinks that may be written more than once.
    Overwritten,
}

/// What may become of the bytes of the sink that share a block with the end of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// They stay: a sink that cannot write less than the block does not fit.
    Kept,
    /// They are made zero, up to the end of the block: of a new disk they are before, and where a disk is
    /// given another, shorter one nothing is in them.
    Zero,
}

/// What becomes of Unchanged ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unchanged {
    /// Handed to [`BlockSink::keep`].
    Keep,
    /// Read like data: for sinks without a base.
    Read,
}

/// Whether the copy ends with [`BlockSink::flush`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// All writes are durable when the copy returns `Ok`.
    AtEnd,
    /// The caller flushes, or does not care.
    Never,
}

impl Options {
    /// The defaults, with names for both ends.
    pub fn new(source_name: impl Into<String>, sink_name: impl Into<String>) -> Self {
        Self {
            source_name: source_name.into(),
            sink_name: sink_name.into(),
            requests: None,
            request_bytes: None,
            budget: Budget::new(BUDGET_BYTES),
            zeroes: Zeroes::Sparse { detect_bytes: Some(4 * KIB) },
            destination: Destination::AsItSays,
            tail: Tail::Kept,
            unchanged: Unchanged::Keep,
            flush: Flush::AtEnd,
        }
    }
}

/// What a copy did with the bytes of the disk: the four add up to its size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Written as data.
    pub written_bytes: u64,
    /// Zeroed, or left out where the sink was zero already.
    pub zero_bytes: u64,
    /// Kept as in the base.
    pub kept_bytes: u64,
    /// Read from the source: what was written, without known zeroes, plus zeroes found in data.
    pub read_bytes: u64,
}

/// Copies all of `source` to `sink`.
///
/// Stops with [`Kind::Cancelled`] as soon as `control` asks for it. Not cancel-safe beyond that: a
/// dropped copy abandons requests in flight and leaves the sink half written, as any error does.
pub async fn copy(
    source: Arc<dyn BlockSource>,
    sink: Arc<dyn BlockSink>,
    options: &Options,
    control: &Control,
    progress: &Arc<DiskProgress>,
) -> Result<Report> {
    run((source, sink), None, options, (control, progress)).await
}

/// The same, and the content root of what was read, computed on the way. Ranges that are Unchanged
/// are read like all others.
pub async fn copy_hashed(
    source: Arc<dyn BlockSource>,
    sink: Arc<dyn BlockSink>,
    workers: &Workers,
    options: &Options,
    (control, progress): (&Control, &Arc<DiskProgress>),
) -> Result<(Report, ContentRoot)> {
    let hash = Arc::new(hash::HashSink::new(source.geometry().size_bytes, workers.clone()));
    let options = Options { unchanged: Unchanged::Read, ..options.clone() };
    let ends = (source, sink);
    let report = run(ends, Some(Arc::clone(&hash)), &options, (control, progress)).await?;
    Ok((report, hash.root()))
}

async fn run(
    (source, sink): (Arc<dyn BlockSource>, Arc<dyn BlockSink>),
    hash: Option<Arc<hash::HashSink>>,
    options: &Options,
    (control, progress): (&Control, &Arc<DiskProgress>),
) -> Result<Report> {
    let direct = match &hash {
        // Hashing keeps the cores busy beside reading and writing.
        Some(_) => None,
        None => source.blocking().zip(sink.blocking_sink()),
    };
    // A thread of a direct copy writes in one piece what it read, and whoever says how many requests there
    // may be means either end.
    let (usual, writes) = match &direct {
        Some(_) => (REQUEST_BYTES_DIRECT, 1),
        None if options.requests.is_some() => (REQUEST_BYTES, 1),
        None => (REQUEST_BYTES, WRITES_PER_READ),
    };
    let geometries = (&source.geometry(), &sink.geometry());
    let mut shape = Shape::between(geometries, options, (usual, writes))?;
    let size_bytes = shape.size_bytes;
    let zeroes = clear::prepare((&source, &sink), options, shape, control).await?;
    if hash.is_some() {
        shape = shape.in_cells_of(LEAF_BYTES);
    }
    let job = Arc::new(step::Copying::new((source, sink), options, (shape, zeroes), hash));
    let report = match direct {
        Some(ends) => direct::run(job, ends, options, (control, progress)).await?,
        None => pipeline::run(job, options, control, progress).await?,
    };
    let covered = report.written_bytes + report.zero_bytes + report.kept_bytes;
    assert_eq!(covered, size_bytes, "the steps of a copy partition the disk");
    Ok(report)
}

/// The sizes in which a copy works, made to fit both ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    size_bytes: u64,
    /// Steps begin and end at multiples of this.
    cell_bytes: u64,
    /// Reads do not cross multiples of this; a multiple of the cell.
    request_bytes: u64,
    /// The same of writes.
    write_bytes: u64,
    requests: usize,
}

impl Shape {
    fn between(
        (source, sink): (&Geometry, &Geometry),
        options: &Options,
        (usual_bytes, writes): (u64, u64),
    ) -> Result<Self> {
        let cell_bytes = source.align_bytes.max(sink.align_bytes).max(1);
        let size_bytes = source.size_bytes;
        let fits = if cell_bytes > 1 && !size_bytes.is_multiple_of(cell_bytes) {
            // The odd tail of a disk is written where the sink ends as well, or with zeroes behind it.
            match options.tail {
                Tail::Kept => size_bytes == sink.size_bytes,
                Tail::Zero => size_bytes <= sink.size_bytes,
            }
        } else {
            size_bytes <= sink.size_bytes
        };
        if !fits {
            let message = format!(
                "{} has {} bytes and does not fit {} of {} bytes",
                options.source_name, size_bytes, options.sink_name, sink.size_bytes
            );
            return Err(Error::new(Kind::Usage, message)
                .hint(format!("make the target {size_bytes} bytes long")));
        }
        if sink.request_bytes_max < cell_bytes {
            let message = format!(
                "{} takes requests of at most {} bytes and {} needs {cell_bytes}",
                options.sink_name, sink.request_bytes_max, options.source_name
            );
            return Err(Error::new(Kind::Unsupported, message));
        }
        let largest = source.request_bytes_max.min(REQUEST_BYTES_MAX);
        // A run of zeroes is found within one request.
        let usual_bytes = usual_bytes.max(options.zeroes.detect_bytes().unwrap_or(0));
        let wanted = options.request_bytes.unwrap_or(usual_bytes);
        let write_bytes = sink.request_bytes_max - sink.request_bytes_max % cell_bytes;
        let wanted = wanted.min(largest).min(write_bytes.saturating_mul(writes)).max(cell_bytes);
        let both = source.in_flight.saturating_add(sink.in_flight);
        let requests = options.requests.unwrap_or(both.clamp(*REQUESTS.start(), *REQUESTS.end()));
        Ok(Self {
            size_bytes,
            cell_bytes,
            request_bytes: wanted - wanted % cell_bytes,
            write_bytes,
            requests: requests.max(1),
        })
    }

    /// The same with steps of multiples of `unit`, a power of two, too.
    fn in_cells_of(self, unit: u64) -> Self {
        let cell_bytes = self.cell_bytes.max(unit);
        let request_bytes = self.request_bytes.max(cell_bytes);
        Self { cell_bytes, request_bytes: request_bytes - request_bytes % cell_bytes, ..self }
    }

    fn range(&self) -> ByteRange {
        ByteRange::new(0, self.size_bytes)
    }
}
