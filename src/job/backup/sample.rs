//! Random samples of the chunks of a disk: which, and reading them again.
//!
//! Which chunks are in a sample follows from the seed and the disk alone, so that a finding can be had
//! again. What the sample is held against is the caller's: a base's tree ([`super::audit`]), or what
//! was stored a moment ago (the same module).

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::block::{BlockSource, Buffer, ByteRange, Geometry};
use crate::control::Control;
use crate::error::{Error, Kind, Result};

/// Chunks of a disk that are looked at even if its share is less.
const CHUNKS_MIN: usize = 64;

/// Chunks being read at once: 4 MiB with the largest chunks in use.
const IN_FLIGHT: usize = 4;

/// How much is looked at.
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

/// Draws a number for every chunk that is given and holds on to the chunks with small ones, and to
/// what is known of them.
#[derive(Debug)]
pub(super) struct Draws<T> {
    pub(super) seed: u32,
    /// Draws below it are chosen.
    threshold: u64,
    below: Vec<(u64, T)>,
    /// The smallest draws, with their chunks: what is looked at where `below` are too few.
    smallest: BTreeMap<(u64, u64), T>,
}

impl<T: Copy> Draws<T> {
    pub(super) fn new(share: f64, seed: u32) -> Self {
        // Exact where it matters: nothing for 0, and all but one in 2^53 for 1.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 2^64")]
        #[expect(clippy::cast_precision_loss, reason = "a threshold, to 53 bits")]
        let threshold = (share.clamp(0.0, 1.0) * u64::MAX as f64) as u64;
        Self { seed, threshold, below: Vec::new(), smallest: BTreeMap::new() }
    }

    pub(super) fn give(&mut self, chunk: u64, known: T) {
        let draw = splitmix64(u64::from(self.seed) << 32 ^ splitmix64(chunk));
        if draw < self.threshold {
            self.below.push((chunk, known));
        }
        let full = self.smallest.len() >= CHUNKS_MIN;
        if full && self.smallest.last_key_value().is_some_and(|((most, _), _)| draw >= *most) {
            return;
        }
        self.smallest.insert((draw, chunk), known);
        if full {
            self.smallest.pop_last();
        }
    }

    /// The chunks to look at, in the order of the disk.
    pub(super) fn chosen(&self) -> Vec<(u64, T)> {
        let mut chosen: Vec<(u64, T)> = if self.below.len() >= CHUNKS_MIN {
            self.below.clone()
        } else {
            self.smallest.iter().map(|((_, chunk), known)| (*chunk, *known)).collect()
        };
        chosen.sort_unstable_by_key(|(chunk, _)| *chunk);
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

/// Reads the chosen chunks of `source` again; the offsets of those that `is_same` refuses, given
/// offset, content, and what is known. `chunks` is the geometry of which each is a request.
pub(super) async fn differing<T, Check, Same>(
    source: &Arc<dyn BlockSource>,
    chunks: Geometry,
    chosen: Vec<(u64, T)>,
    is_same: Check,
    control: &Control,
) -> Result<Vec<u64>>
where
    T: Send + 'static,
    Check: Fn(u64, Buffer, T) -> Same + Clone + Send + Sync + 'static,
    Same: Future<Output = Result<bool>> + Send,
{
    let mut reads = JoinSet::new();
    let mut differing: Vec<u64> = Vec::new();
    for (chunk, known) in chosen {
        if reads.len() >= IN_FLIGHT {
            differing.extend(next(&mut reads, control).await?);
        }
        let offset = chunk * chunks.align_bytes;
        let range =
            ByteRange::between(offset, (offset + chunks.align_bytes).min(chunks.size_bytes));
        let (source, is_same) = (Arc::clone(source), is_same.clone());
        reads.spawn(async move {
            let bytes = read(&*source, range).await?;
            Ok((!is_same(offset, bytes, known).await?).then_some(offset))
        });
    }
    while !reads.is_empty() {
        differing.extend(next(&mut reads, control).await?);
    }
    differing.sort_unstable();
    Ok(differing)
}

type Reads = JoinSet<Result<Option<u64>>>;

async fn next(reads: &mut Reads, control: &Control) -> Result<Option<u64>> {
    let died = |e| Error::new(Kind::Internal, "a read of a sample died").source(e);
    let joined = async { reads.join_next().await.expect("a read is in flight").map_err(died) };
    control.run(joined).await?
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
        let context = || format!("cannot read {part} of the snapshot a second time");
        buffer = filled.map_err(|e| e.context(context()))?.whole();
    }
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(share: f64, seed: u32, chunks: impl Iterator<Item = u64>) -> Vec<u64> {
        let mut draws = Draws::new(share, seed);
        chunks.for_each(|chunk| draws.give(chunk, ()));
        draws.chosen().into_iter().map(|(chunk, ())| chunk).collect()
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

    #[test]
    fn all_of_it_is_all_of_it() {
        assert_eq!(chosen(1.0, 7, 0..10_000).len(), 10_000);
    }
}
