//! The audit of a dirty bitmap: a sample of what it calls clean is read from the snapshot and
//! compared with the base.
//!
//! ```text
//!  copy ─► Sampled (keeps: which chunks?) ─► DiskWriter
//!               │ at the end of the disk: those with the smallest draws
//!               └► read from the snapshot ─► hash = the base tree's? ── no ─► the bitmap lied
//! ```
//!
//! A bitmap is the word of QEMU and of everybody who could write to the image while QEMU was not
//! looking; a wrong one makes every later point wrong without a sign. A sample does not find a
//! single lost block, but it finds what goes wrong in the field: images replaced, rolled back or
//! written by other programs, in which much differs. Only the base's tree is read, none of its data.
//!
//! Which chunks are looked at follows from the seed and the disk alone, so that a finding can be had
//! again. What became of a lying bitmap is the caller's decision.

use std::collections::BinaryHeap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::task::JoinSet;

use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, Geometry, ZeroMode};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::repo::{DiskReader, DiskWriter};
use crate::vm::Audit;

/// Chunks of a disk that are looked at even if its share is less.
const CHUNKS_MIN: usize = 64;

/// Chunks being read at once: 4 MiB with the largest chunks in use.
const IN_FLIGHT: usize = 4;

/// How much of what a bitmap calls clean is looked at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sample {
    /// Nothing.
    None,
    /// This share of the chunks, 0 to 1; at least 64 of each disk.
    Share(f64),
}

impl Default for Sample {
    /// One chunk in a thousand.
    fn default() -> Self {
        Self::Share(0.001)
    }
}

/// The writer of a disk, with an eye on what is kept.
pub(super) struct Sampled {
    writer: Arc<DiskWriter>,
    draws: Mutex<Draws>,
}

impl Sampled {
    pub(super) fn new(writer: Arc<DiskWriter>, share: f64, seed: u32) -> Self {
        Self { writer, draws: Mutex::new(Draws::new(share, seed)) }
    }

    /// Looks at the sample, now that every chunk was given.
    pub(super) async fn audit(
        &self,
        source: &Arc<dyn BlockSource>,
        base: &Arc<DiskReader>,
        control: &Control,
    ) -> Result<Audit> {
        let (seed, chunks) = {
            let draws = self.draws.lock().unwrap_or_else(PoisonError::into_inner);
            (draws.seed, draws.chosen())
        };
        let geometry = self.writer.geometry();
        let count = chunks.len() as u64;
        let mut reads = JoinSet::new();
        let mut differing: Vec<u64> = Vec::new();
        for chunk in chunks {
            if reads.len() >= IN_FLIGHT {
                differing.extend(next(&mut reads, control).await?);
            }
            let range = chunk_range(chunk, geometry);
            let (source, base) = (Arc::clone(source), Arc::clone(base));
            reads.spawn(async move {
                let bytes = read(&*source, range).await?;
                let same = base.has_chunk(range.offset(), bytes).await?;
                Ok((!same).then_some(range.offset()))
            });
        }
        while !reads.is_empty() {
            differing.extend(next(&mut reads, control).await?);
        }
        Ok(Audit { seed, chunks: count, differs_at: differing.into_iter().min() })
    }
}

type Reads = JoinSet<Result<Option<u64>>>;

async fn next(reads: &mut Reads, control: &Control) -> Result<Option<u64>> {
    let died = |e| Error::new(Kind::Internal, "a read of the audit died").source(e);
    let joined = async { reads.join_next().await.expect("a read is in flight").map_err(died) };
    control.run(joined).await?
}

fn chunk_range(chunk: u64, geometry: Geometry) -> ByteRange {
    let offset = chunk * geometry.align_bytes;
    ByteRange::between(offset, (offset + geometry.align_bytes).min(geometry.size_bytes))
}

async fn read(source: &dyn BlockSource, range: ByteRange) -> Result<Buffer> {
    let geometry = source.geometry();
    let len = usize::try_from(range.len()).expect("a chunk fits memory");
    let request = geometry.request_bytes_max - geometry.request_bytes_max % geometry.align_bytes;
    let mut buffer = Buffer::unbudgeted(vec![0; len]);
    for part in range.pieces(request.max(geometry.align_bytes)) {
        let at = |n: u64| usize::try_from(n - range.offset()).expect("within the chunk");
        let window = buffer.with_window(at(part.offset())..at(part.end()));
        let filled = source.read(part.offset(), window).await;
        let context = || format!("cannot read {part} to audit the dirty bitmap");
        buffer = filled.map_err(|e| e.context(context()))?.whole();
    }
    Ok(buffer)
}

/// Draws a number for every chunk that is kept and holds on to the chunks with small ones.
#[derive(Debug)]
struct Draws {
    seed: u32,
    /// Draws below it are chosen.
    threshold: u64,
    below: Vec<u64>,
    /// The smallest draws, largest first: what is looked at where `below` are too few.
    smallest: BinaryHeap<(u64, u64)>,
}

impl Draws {
    fn new(share: f64, seed: u32) -> Self {
        // Exact where it matters: nothing for 0, and all but one in 2^53 for 1.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 2^64")]
        #[expect(clippy::cast_precision_loss, reason = "a threshold, to 53 bits")]
        let threshold = (share.clamp(0.0, 1.0) * u64::MAX as f64) as u64;
        Self { seed, threshold, below: Vec::new(), smallest: BinaryHeap::new() }
    }

    fn give(&mut self, chunk: u64) {
        let draw = splitmix64(u64::from(self.seed) << 32 ^ splitmix64(chunk));
        if draw < self.threshold {
            self.below.push(chunk);
        }
        let full = self.smallest.len() >= CHUNKS_MIN;
        if !full {
            self.smallest.push((draw, chunk));
        } else if self.smallest.peek().is_some_and(|(largest, _)| draw < *largest) {
            self.smallest.pop();
            self.smallest.push((draw, chunk));
        }
    }

    /// The chunks to look at, in the order of the disk.
    fn chosen(&self) -> Vec<u64> {
        let mut chosen: Vec<u64> = if self.below.len() >= CHUNKS_MIN {
            self.below.clone()
        } else {
            self.smallest.iter().map(|(_, chunk)| *chunk).collect()
        };
        chosen.sort_unstable();
        chosen
    }
}

/// The finalizer of `SplitMix64` (Steele, Lea and Flood, OOPSLA 2014): every bit of the result
/// depends on every bit of `n`.
fn splitmix64(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}

#[async_trait]
impl BlockSink for Sampled {
    fn geometry(&self) -> Geometry {
        self.writer.geometry()
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.writer.write(offset, buffer).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.writer.zero(range, mode).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.writer.keep(range).await?;
        let chunk_bytes = self.writer.geometry().align_bytes;
        let mut draws = self.draws.lock().unwrap_or_else(PoisonError::into_inner);
        for chunk in range.offset() / chunk_bytes..range.end().div_ceil(chunk_bytes) {
            draws.give(chunk);
        }
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.writer.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(share: f64, seed: u32, chunks: impl Iterator<Item = u64>) -> Vec<u64> {
        let mut draws = Draws::new(share, seed);
        chunks.for_each(|chunk| draws.give(chunk));
        draws.chosen()
    }

    #[test]
    fn a_small_disk_is_looked_at_whole() {
        assert_eq!(chosen(0.001, 7, 0..64), (0..64).collect::<Vec<_>>());
    }

    #[test]
    fn at_least_64_chunks_are_looked_at() {
        assert_eq!(chosen(0.001, 7, 0..10_000).len(), 64);
    }

    #[test]
    fn of_a_large_disk_about_its_share_is_looked_at() {
        let count = chosen(0.001, 7, 0..1_000_000).len();
        assert!((900..1100).contains(&count), "{count}");
    }

    #[test]
    fn the_seed_decides_and_the_order_of_the_copy_does_not() {
        let sample = chosen(0.001, 7, 0..200_000);
        assert_eq!(sample, chosen(0.001, 7, (0..200_000).rev()));
        assert_ne!(sample, chosen(0.001, 8, 0..200_000));
    }
}
