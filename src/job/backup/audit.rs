//! Looking at a disk of a snapshot a second time: a sample of what a dirty bitmap calls clean is held
//! against the base, a sample of what was stored against what is in the new tree.
//!
//! ```text
//!  copy ─► Sampled (keeps, stores: which chunks?) ─► DiskWriter
//!               │ at the end of the disk (of stored ones also when they are many): those with the
//!               │ smallest draws
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

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use serde::Serialize;

use super::sample::{self, Differing, Draws, Known, OFFSETS_MAX, Sample};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, Geometry, ZeroMode};
use crate::content::ContentHash;
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::repo::{DiskReader, DiskWriter};
use crate::vm::Audit;

/// Chunks of a range that are drawn for at once, under the lock and without a pause: far less than a
/// millisecond.
const PIECE_CHUNKS: u64 = 1 << 14;

/// The writer of a disk, with an eye on what it is given.
pub(super) struct Sampled {
    writer: Arc<DiskWriter>,
    /// What the disk is read from.
    source: Arc<dyn BlockSource>,
    control: Control,
    /// What is kept from the base. Both are locked to give or take, never across an await.
    kept: Option<Mutex<Draws>>,
    /// What is stored, and its hash in the new tree; zero where none is known.
    stored: Option<Mutex<Draws>>,
    /// What a second look at what was stored found so far. Held while looking: who stores more than
    /// can be held on to waits.
    found: tokio::sync::Mutex<Differing>,
}

/// What a second look at what was stored found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Recheck {
    seed: u32,
    found: Differing,
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
        let Differing { looked_at, count, first } = self.found;
        if count == 0 {
            return Ok(SourceCheck { seed: self.seed, chunks: looked_at });
        }
        let offsets = first.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let more = match count.saturating_sub(OFFSETS_MAX as u64) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let message = format!(
            "{disk} of {vm} read differently the second time: {count} of {looked_at} chunks looked \
             at, at offset {offsets}{more}"
        );
        Err(Error::new(Kind::Mismatch, message).hint(
            "no point was made. Look for what writes to the image while it must stand still, then \
             test memory, cables and disks of this host",
        ))
    }
}

impl Sampled {
    /// Watches `writer`, which is given what `source` holds; `kept` and `stored` say how much of each
    /// is looked at. Stops looking when `control` asks for it.
    pub(super) fn new(
        writer: Arc<DiskWriter>,
        source: Arc<dyn BlockSource>,
        (kept, stored): (Sample, Sample),
        seed: u32,
        control: Control,
    ) -> Self {
        let Geometry { size_bytes, align_bytes, .. } = writer.geometry();
        let draws = |sample| match sample {
            Sample::None => None,
            Sample::Share(share) => {
                Some(Mutex::new(Draws::new(share, seed, size_bytes.div_ceil(align_bytes))))
            }
        };
        let (kept, stored) = (draws(kept), draws(stored));
        Self { writer, source, control, kept, stored, found: tokio::sync::Mutex::default() }
    }

    /// Takes note of a range that is going to be kept, for a look at it before the copy.
    pub(super) fn kept(&self, range: ByteRange) {
        let Some(kept) = &self.kept else { return };
        for piece in range.pieces(PIECE_CHUNKS * self.geometry().align_bytes) {
            self.give_piece(kept, piece);
        }
    }

    /// Looks at the sample of what is kept, now that every chunk was given. None without one.
    pub(super) async fn audit(&self, base: &Arc<DiskReader>) -> Result<Option<Audit>> {
        let Some(kept) = &self.kept else { return Ok(None) };
        let (seed, chosen) = {
            let mut draws = lock(kept);
            (draws.seed, draws.take_rest())
        };
        let base = Arc::clone(base);
        let is_same = move |offset, bytes, _| {
            let base = Arc::clone(&base);
            async move { base.has_chunk(offset, bytes).await }
        };
        let mut found = Differing::default();
        let end = (&mut found, &self.control);
        sample::look(&self.source, self.geometry(), chosen, is_same, end).await?;
        let differs_at = found.first.first().copied();
        Ok(Some(Audit { seed, chunks: found.looked_at, differs_at }))
    }

    /// Looks at what is left of the sample of what was stored, now that every chunk was given. None
    /// without one.
    pub(super) async fn recheck(&self) -> Result<Option<Recheck>> {
        let Some(stored) = &self.stored else { return Ok(None) };
        let (seed, chosen) = {
            let mut draws = lock(stored);
            (draws.seed, draws.take_rest())
        };
        let mut found = self.found.lock().await;
        self.look_at_stored(chosen, &mut found).await?;
        Ok(Some(Recheck { seed, found: found.clone() }))
    }

    async fn look_at_stored(
        &self,
        chosen: impl Iterator<Item = (u64, Known)> + Send,
        found: &mut Differing,
    ) -> Result<()> {
        let writer = Arc::clone(&self.writer);
        let is_same = move |_, bytes, stored: Known| {
            let writer = Arc::clone(&writer);
            async move { Ok(writer.hash_of(bytes).await? == stored.unwrap_or(ContentHash::ZERO)) }
        };
        let end = (found, &self.control);
        sample::look(&self.source, self.geometry(), chosen, is_same, end).await
    }

    /// Takes note of a chunk that was stored, and looks at those noted when there are too many.
    async fn stored(&self, offset: u64, hash: ContentHash) -> Result<()> {
        let Some(stored) = &self.stored else { return Ok(()) };
        let is_full = {
            let mut draws = lock(stored);
            let known = (!hash.is_zero()).then_some(hash);
            draws.give(offset / self.geometry().align_bytes, known);
            draws.is_full()
        };
        if is_full {
            let mut found = self.found.lock().await;
            // Somebody may have looked at them meanwhile.
            let round = lock(stored).take_round();
            if let Some(round) = round {
                self.look_at_stored(round.into_iter(), &mut found).await?;
            }
        }
        Ok(())
    }

    /// Takes note of the chunks of `range`, of which nothing else is known. The whole disk may be one
    /// range.
    async fn give_range(&self, draws: Option<&Mutex<Draws>>, range: ByteRange) {
        let Some(draws) = draws else { return };
        for piece in range.pieces(PIECE_CHUNKS * self.geometry().align_bytes) {
            self.give_piece(draws, piece);
            tokio::task::yield_now().await;
        }
    }

    fn give_piece(&self, draws: &Mutex<Draws>, piece: ByteRange) {
        let chunk_bytes = self.geometry().align_bytes;
        let mut draws = lock(draws);
        for chunk in piece.offset() / chunk_bytes..piece.end().div_ceil(chunk_bytes) {
            draws.give(chunk, None);
        }
    }
}

/// A panic while a chunk is noted leaves nothing half done.
fn lock(draws: &Mutex<Draws>) -> MutexGuard<'_, Draws> {
    draws.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl BlockSink for Sampled {
    fn geometry(&self) -> Geometry {
        self.writer.geometry()
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        let chunk = self.writer.store(offset, buffer).await?;
        self.stored(offset, chunk.hash).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.writer.zero(range, mode).await?;
        self.give_range(self.stored.as_ref(), range).await;
        Ok(())
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.writer.keep(range).await?;
        self.give_range(self.kept.as_ref(), range).await;
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.writer.flush().await
    }
}
