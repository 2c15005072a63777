//! Looking at a disk of a snapshot a second time: a sample of what a dirty bitmap calls clean is held
//! against the base, a sample of what was stored against what is in the new tree.
//!
//! ```text
//!  copy ─► Sampled (keeps, stores: which chunks?) ─► DiskWriter
//!               │ at the end of the disk: those with the smallest draws
//!               ├► kept: read from the snapshot ─► hash = the base tree's? ── no ─► the bitmap lied
//!               └► stored: read again ─► hash = the one in the new tree? ──── no ─► the source is not
//!                                                                                    what was stored
//! ```
//!
//! A bitmap is the word of QEMU and of everybody who could write to the image while QEMU was not
//! looking; a wrong one makes every later point wrong without a sign. A sample does not find a
//! single lost block, but it finds what goes wrong in the field: images replaced, rolled back or
//! written by other programs, in which much differs. Only the base's tree is read, none of its data.
//!
//! What was stored can differ from the snapshot because memory, a cable or a disk changed it on the way,
//! or because somebody writes to an image that must stand still. A second read may come from a cache
//! that has the same wrong bytes: then it finds nothing.
//!
//! What becomes of either finding is the caller's decision.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use serde::Serialize;

use super::sample::{Draws, Sample, differing};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, Geometry, ZeroMode};
use crate::content::ContentHash;
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::repo::{DiskReader, DiskWriter};
use crate::vm::Audit;

/// Offsets that are named where a second read differs.
const OFFSETS_TOLD_MAX: usize = 10;

/// The writer of a disk, with an eye on what it is given.
pub(super) struct Sampled {
    writer: Arc<DiskWriter>,
    /// What is kept from the base. Both are locked to give or choose, never across an await.
    kept: Option<Mutex<Draws<()>>>,
    /// What is stored, and its hash in the new tree.
    stored: Option<Mutex<Draws<ContentHash>>>,
}

/// What a second look at what was stored found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Recheck {
    looked_at: SourceCheck,
    /// Offsets of chunks that read differently; sorted.
    differ_at: Vec<u64>,
}

/// A second read of what was stored, without a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SourceCheck {
    /// Where the sample came from.
    pub seed: u32,
    /// Chunks looked at.
    pub chunks: u64,
}

impl Recheck {
    /// What was looked at; [`Kind::Mismatch`] where something differed.
    pub(super) fn into_result(self, disk: &str, vm: &str) -> Result<SourceCheck> {
        let count = self.differ_at.len();
        if count == 0 {
            return Ok(self.looked_at);
        }
        let offsets = self.differ_at.iter().take(OFFSETS_TOLD_MAX).map(u64::to_string);
        let offsets = offsets.collect::<Vec<_>>().join(", ");
        let more = match count.saturating_sub(OFFSETS_TOLD_MAX) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let message = format!(
            "{disk} of {vm} read differently the second time: {count} of {} chunks looked at, at \
             offset {offsets}{more}",
            self.looked_at.chunks
        );
        Err(Error::new(Kind::Mismatch, message).hint(
            "no point was made. Look for what writes to the image while it must stand still, then \
             test memory, cables and disks of this host",
        ))
    }
}

impl Sampled {
    /// Watches `writer`; `kept` and `stored` say how much of each is looked at.
    pub(super) fn new(
        writer: Arc<DiskWriter>,
        (kept, stored): (Sample, Sample),
        seed: u32,
    ) -> Self {
        Self { writer, kept: draws(kept, seed), stored: draws(stored, seed) }
    }

    /// Looks at the sample of what is kept, now that every chunk was given. None without one.
    pub(super) async fn audit(
        &self,
        source: &Arc<dyn BlockSource>,
        base: &Arc<DiskReader>,
        control: &Control,
    ) -> Result<Option<Audit>> {
        let Some((seed, chosen)) = chosen(self.kept.as_ref()) else { return Ok(None) };
        let chunks = chosen.len() as u64;
        let base = Arc::clone(base);
        let is_same = move |offset, bytes, ()| {
            let base = Arc::clone(&base);
            async move { base.has_chunk(offset, bytes).await }
        };
        let geometry = self.writer.geometry();
        let differ = differing(source, geometry, chosen, is_same, control).await?;
        Ok(Some(Audit { seed, chunks, differs_at: differ.first().copied() }))
    }

    /// Looks at the sample of what was stored, now that every chunk was given. None without one.
    pub(super) async fn recheck(
        &self,
        source: &Arc<dyn BlockSource>,
        control: &Control,
    ) -> Result<Option<Recheck>> {
        let Some((seed, chosen)) = chosen(self.stored.as_ref()) else { return Ok(None) };
        let chunks = chosen.len() as u64;
        let writer = Arc::clone(&self.writer);
        let is_same = move |_, bytes, stored| {
            let writer = Arc::clone(&writer);
            async move { Ok(writer.hash_of(bytes).await? == stored) }
        };
        let geometry = self.writer.geometry();
        let differ_at = differing(source, geometry, chosen, is_same, control).await?;
        Ok(Some(Recheck { looked_at: SourceCheck { seed, chunks }, differ_at }))
    }

    /// Takes note of the chunks of `range`.
    fn give<T: Copy>(&self, draws: Option<&Mutex<Draws<T>>>, range: ByteRange, known: T) {
        let Some(draws) = draws else { return };
        let chunk_bytes = self.writer.geometry().align_bytes;
        let mut draws = draws.lock().unwrap_or_else(PoisonError::into_inner);
        for chunk in range.offset() / chunk_bytes..range.end().div_ceil(chunk_bytes) {
            draws.give(chunk, known);
        }
    }
}

fn draws<T: Copy>(sample: Sample, seed: u32) -> Option<Mutex<Draws<T>>> {
    match sample {
        Sample::None => None,
        Sample::Share(share) => Some(Mutex::new(Draws::new(share, seed))),
    }
}

/// The seed and the chunks to look at.
fn chosen<T: Copy>(draws: Option<&Mutex<Draws<T>>>) -> Option<(u32, Vec<(u64, T)>)> {
    let draws = draws?.lock().unwrap_or_else(PoisonError::into_inner);
    Some((draws.seed, draws.chosen()))
}

#[async_trait]
impl BlockSink for Sampled {
    fn geometry(&self) -> Geometry {
        self.writer.geometry()
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let hash = self.writer.store(offset, buffer).await?;
        self.give(self.stored.as_ref(), range, hash);
        Ok(())
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.writer.zero(range, mode).await?;
        self.give(self.stored.as_ref(), range, ContentHash::ZERO);
        Ok(())
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.writer.keep(range).await?;
        self.give(self.kept.as_ref(), range, ());
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.writer.flush().await
    }
}
