//! Random samples of the chunks of a disk: which, and reading them again.
//!
//! Which chunks are in a sample follows from the seed and the disk alone, so that a finding can be had
//! again. What the sample is held against is the caller's: a base's tree ([`super::audit`]), or what
//! was stored a moment ago (the same module).
//!
//! Memory is bounded whatever the disk and the share: a bit for each chunk of the disk, of which only
//! what is set takes memory, and [`HASHES_MAX`] hashes of stored chunks, which are looked at when they
//! are that many ([`Draws::take_round`]).

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::block::{BlockSource, Buffer, ByteRange, Geometry};
use crate::content::ContentHash;
use crate::control::Control;
use crate::error::{Error, Kind, Result};

/// Chunks of a disk that are looked at even if its share is less.
const CHUNKS_MIN: usize = 64;

/// Most hashes of stored chunks held: 40 MiB of memory, and 256 GiB of data that went through the
/// caches of the host between the first and the second read.
const HASHES_MAX: usize = 1 << 20;

/// Most offsets of differences held.
pub(super) const OFFSETS_MAX: usize = 10;

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

/// What is known of a chunk to look at: the hash of what was stored, or nothing but the kind of range
/// it came in.
pub(super) type Known = Option<ContentHash>;

/// Draws a number for every chunk that is given and holds on to the chunks with small ones, and to
/// what is known of them.
#[derive(Debug)]
pub(super) struct Draws {
    pub(super) seed: u32,
    /// Draws below it are chosen.
    threshold: u64,
    /// How many were chosen so far.
    chosen: u64,
    /// Those of them of which nothing else is known.
    plain: ChunkSet,
    /// Those that were stored, not looked at yet.
    hashed: Vec<(u64, ContentHash)>,
    hashes_max: usize,
    /// The smallest draws, with their chunks: what is looked at where too few were chosen.
    smallest: BTreeMap<(u64, u64), Known>,
}

impl Draws {
    /// For a disk of so many chunks.
    pub(super) fn new(share: f64, seed: u32, chunks: u64) -> Self {
        // Exact where it matters: nothing for 0, and all but one in 2^53 for 1.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 2^64")]
        #[expect(clippy::cast_precision_loss, reason = "a threshold, to 53 bits")]
        let threshold = (share.clamp(0.0, 1.0) * u64::MAX as f64) as u64;
        Self {
            seed,
            threshold,
            chosen: 0,
            plain: ChunkSet::of(chunks),
            hashed: Vec::new(),
            hashes_max: HASHES_MAX,
            smallest: BTreeMap::new(),
        }
    }

    pub(super) fn give(&mut self, chunk: u64, known: Known) {
        let draw = splitmix64(u64::from(self.seed) << 32 ^ splitmix64(chunk));
        if draw < self.threshold {
            self.chosen += 1;
            match known {
                Some(hash) => self.hashed.push((chunk, hash)),
                None => self.plain.insert(chunk),
            }
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

    /// Whether there are too many hashes to hold on to.
    pub(super) fn is_full(&self) -> bool {
        self.hashed.len() >= self.hashes_max
    }

    /// Chosen chunks to look at now, if there are too many to hold on to.
    pub(super) fn take_round(&mut self) -> Option<Vec<(u64, Known)>> {
        self.is_full().then(|| self.take_hashed())
    }

    /// What is left to look at when every chunk was given; in the order of the disk, first what was
    /// stored.
    pub(super) fn take_rest(&mut self) -> impl Iterator<Item = (u64, Known)> + use<> {
        let (first, plain) = if self.chosen >= CHUNKS_MIN as u64 {
            (self.take_hashed(), std::mem::take(&mut self.plain))
        } else {
            let smallest = std::mem::take(&mut self.smallest);
            let mut all: Vec<_> = smallest.into_iter().map(|((_, chunk), k)| (chunk, k)).collect();
            all.sort_unstable_by_key(|(chunk, _)| *chunk);
            (all, ChunkSet::default())
        };
        first.into_iter().chain(plain.into_chunks().map(|chunk| (chunk, None)))
    }

    fn take_hashed(&mut self) -> Vec<(u64, Known)> {
        let mut hashed = std::mem::take(&mut self.hashed);
        hashed.sort_unstable_by_key(|(chunk, _)| *chunk);
        hashed.into_iter().map(|(chunk, hash)| (chunk, Some(hash))).collect()
    }
}

/// A bit for each chunk of a disk: 8 MiB for 16 TiB. Zeroed memory is not there before it is written.
#[derive(Debug, Default)]
struct ChunkSet(Vec<u64>);

impl ChunkSet {
    fn of(chunks: u64) -> Self {
        let words = usize::try_from(chunks.div_ceil(64)).expect("a bit per chunk fits memory");
        Self(vec![0; words])
    }

    fn insert(&mut self, chunk: u64) {
        let word = usize::try_from(chunk / 64).expect("the chunk is one of the disk");
        self.0[word] |= 1 << (chunk % 64);
    }

    fn into_chunks(self) -> impl Iterator<Item = u64> {
        let of_word = |(word, first): (u64, u64)| {
            (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| first + bit)
        };
        self.0.into_iter().zip((0..).step_by(64)).filter(|(word, _)| *word != 0).flat_map(of_word)
    }
}

/// What was found to differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Differing {
    /// How many chunks were looked at.
    pub(super) looked_at: u64,
    /// How many of them differ.
    pub(super) count: u64,
    /// The first offsets of those, sorted; [`OFFSETS_MAX`] at most.
    pub(super) first: Vec<u64>,
}

impl Differing {
    /// Takes note of a chunk that was looked at, and where it is if it differs.
    fn add(&mut self, differs_at: Option<u64>) {
        self.looked_at += 1;
        if let Some(offset) = differs_at {
            self.count += 1;
            let place = self.first.partition_point(|other| *other < offset);
            self.first.insert(place, offset);
            self.first.truncate(OFFSETS_MAX);
        }
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

/// Reads the chosen chunks of `source` again and adds those that `is_same` refuses, given offset,
/// content, and what is known, to what was found so far. `chunks` is the geometry of which each is a
/// request.
pub(super) async fn look<Check, Same>(
    source: &Arc<dyn BlockSource>,
    chunks: Geometry,
    chosen: impl Iterator<Item = (u64, Known)> + Send,
    is_same: Check,
    (found, control): (&mut Differing, &Control),
) -> Result<()>
where
    Check: Fn(u64, Buffer, Known) -> Same + Clone + Send + Sync + 'static,
    Same: Future<Output = Result<bool>> + Send,
{
    let mut reads = JoinSet::new();
    for (chunk, known) in chosen {
        if reads.len() >= IN_FLIGHT {
            found.add(next(&mut reads, control).await?);
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
        found.add(next(&mut reads, control).await?);
    }
    Ok(())
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
        let mut draws = Draws::new(share, seed, 1_000_000);
        chunks.for_each(|chunk| draws.give(chunk, None));
        draws.take_rest().map(|(chunk, _)| chunk).collect()
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

    /// Every chosen chunk was once held, and copied when they were looked at: 5 GiB for all of a thin
    /// disk of 16 TiB.
    #[test]
    fn all_of_a_large_disk_takes_a_bit_for_each_chunk_and_a_bounded_number_of_hashes() {
        let mut draws = Draws::new(1.0, 7, 1_000_000);
        draws.hashes_max = 1000;
        let mut seen = Vec::new();
        for chunk in 0..1_000_000 {
            let hash = (chunk % 100 == 0).then_some(ContentHash([1; 32]));
            draws.give(chunk, hash);
            if let Some(round) = draws.take_round() {
                assert_eq!(round.len(), 1000);
                seen.extend(round);
            }
            assert!(draws.hashed.len() < 1000);
        }
        assert_eq!(seen.len(), 10_000);
        seen.extend(draws.take_rest());
        assert!(seen.iter().all(|(chunk, known)| known.is_some() == (chunk % 100 == 0)));
        let mut chunks: Vec<_> = seen.into_iter().map(|(chunk, _)| chunk).collect();
        chunks.sort_unstable();
        assert_eq!(chunks, (0..1_000_000).collect::<Vec<_>>());
    }

    #[test]
    fn of_many_differences_the_first_are_named_and_all_are_counted() {
        let mut found = Differing::default();
        (0..1000_u64).rev().for_each(|n| found.add((n % 2 == 0).then_some(n)));
        assert_eq!((found.looked_at, found.count), (1000, 500));
        assert_eq!(found.first, (0..20).step_by(2).collect::<Vec<_>>());
    }
}
