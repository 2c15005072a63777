//! Marking: which copy of each blob the points need, one bit per entry of the index.
//!
//! Trees are walked from the manifests down; a node whose bit is set is not walked again, so the
//! work follows the distinct nodes, not the points. Chunk ids are gathered in batches, sorted, and
//! joined with the index segment by segment: each block is read once per batch.
//!
//! Memory: a bit per index entry (25 MB for 50 TiB of chunks of 256 KiB), the batch with its places
//! (72 MiB), some 100 bytes per pack of 64 MiB (here and in the collector's own lists) and 20 per
//! point. Of a tree no more than 16 nodes and their children per level are open.
//!
//! Of several copies of a blob exactly one is marked: one in a pack that is neither condemned nor
//! damaged if there is one, one in a damaged pack only if there is no other. A blob that no pack has
//! stops the marking: what the points need is not known then, and nothing may be deleted.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::task::JoinSet;

use crate::content::ContentHash;
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::repo::blobs::Blobs;
use crate::repo::condemned::PackId;
use crate::repo::index::{PackRef, Segment, missing};
use crate::repo::manifest::Manifest;
use crate::repo::seal::{BlobId, BlobKind};
use crate::repo::tree::{Node, Shape};
use crate::repo::writer::StoredDisk;

/// Chunk ids gathered before they are looked up: 32 MiB.
const BATCH_IDS: usize = 1 << 20;

/// Tree nodes read at once.
const READS_IN_FLIGHT: usize = 16;

/// Whether a pack may be relied on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// It is not in the store: its entries are void.
    Missing,
    /// It is known to be damaged: what only it has may yet be readable in part.
    Damaged,
    /// It is on a published list: only where there is no other copy.
    Condemned,
    /// It is there.
    Fine,
}

/// What of a pack is needed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Use {
    /// Bytes of its blobs that are marked, sealed.
    pub(super) bytes: u64,
}

/// A copy of a blob.
#[derive(Clone, Debug)]
pub(super) struct Place {
    segment: usize,
    ordinal: u64,
    pub(super) pack: Arc<PackRef>,
    stored_bytes: u32,
    standing: Standing,
}

/// A segment and the marks of its entries.
struct Marked {
    segment: Arc<Segment>,
    words: Vec<u64>,
}

/// Marks what points need.
pub(super) struct Marker {
    blobs: Arc<Blobs>,
    chunk_levels: u32,
    segments: Vec<Marked>,
    /// Standing of every pack that is there.
    packs: HashMap<PackId, Standing>,
    uses: HashMap<PackId, Use>,
    batch: Vec<BlobId>,
}

impl Marker {
    /// Nothing is marked yet. `packs` are those in the store, listed after `segments` were loaded.
    pub(super) fn new(
        blobs: &Arc<Blobs>,
        chunk_levels: u32,
        segments: &[Arc<Segment>],
        packs: HashMap<PackId, Standing>,
    ) -> Self {
        let mut marker = Self {
            blobs: Arc::clone(blobs),
            chunk_levels,
            segments: Vec::new(),
            packs,
            uses: HashMap::new(),
            batch: Vec::new(),
        };
        for segment in segments {
            marker.add_segment(segment);
        }
        marker
    }

    /// Takes in a segment that was written since, unless it is known.
    pub(super) fn add_segment(&mut self, segment: &Arc<Segment>) {
        if self.segments.iter().any(|known| known.segment.id == segment.id) {
            return;
        }
        let words = usize::try_from(segment.entries().div_ceil(64)).expect("bits fit memory");
        let segment = Arc::clone(segment);
        self.segments.push(Marked { segment, words: vec![0; words] });
    }

    /// Takes in segments that others wrote since. Their packs were durable before them; but a run
    /// that was suspended while it merged segments may bring back packs that are gone.
    pub(super) async fn take_in_new(&mut self, segments: &[Arc<Segment>]) -> Result<()> {
        for segment in segments {
            if self.segments.iter().any(|known| known.segment.id == segment.id) {
                continue;
            }
            for pack in segment.packs() {
                if self.packs.contains_key(&pack.id) {
                    continue;
                }
                match self.blobs.store.stat(&pack.name()).await {
                    Ok(_) => {}
                    Err(error) if error.is_not_found() => continue,
                    Err(error) => return Err(error.into()),
                }
                let damaged = self.blobs.damaged.contains(&pack.id);
                let standing = if damaged { Standing::Damaged } else { Standing::Fine };
                self.packs.insert(pack.id, standing);
            }
            self.add_segment(segment);
        }
        Ok(())
    }

    /// One that knows the same and has marked nothing.
    pub(super) fn unmarked(&self) -> Self {
        let segments: Vec<_> = self.segments().map(Arc::clone).collect();
        Self::new(&self.blobs, self.chunk_levels, &segments, self.packs.clone())
    }

    /// The segments it knows.
    pub(super) fn segments(&self) -> impl Iterator<Item = &Arc<Segment>> {
        self.segments.iter().map(|marked| &marked.segment)
    }

    /// Takes in that a pack was made.
    pub(super) fn take_in(&mut self, pack: PackId) {
        self.packs.insert(pack, Standing::Fine);
    }

    /// Takes in that a pack was condemned, or emptied.
    pub(super) fn condemn(&mut self, pack: PackId) {
        if self.standing(&pack) != Standing::Damaged {
            self.packs.insert(pack, Standing::Condemned);
        }
    }

    /// Whether a pack may be relied on.
    pub(super) fn standing(&self, pack: &PackId) -> Standing {
        self.packs.get(pack).copied().unwrap_or(Standing::Missing)
    }

    /// What of `pack` is needed; none if nothing.
    pub(super) fn use_of(&self, pack: &PackId) -> Option<Use> {
        self.uses.get(pack).copied()
    }

    /// What of `pack` was needed is needed from elsewhere now.
    pub(super) fn moved_away(&mut self, pack: &PackId) {
        self.uses.remove(pack);
    }

    /// Marks everything a point needs.
    pub(super) async fn mark(&mut self, manifest: &Manifest, control: &Control) -> Result<()> {
        let disks = manifest.body.disks.iter().map(|disk| &disk.stored);
        let artifacts = manifest.body.artifacts.iter().map(|artifact| &artifact.stored);
        for stored in disks.chain(artifacts) {
            self.mark_tree(stored, control).await.map_err(|error| {
                let (vm, point) = (&manifest.body.vm.name, manifest.point.short());
                error.context(format!("cannot tell what point {point} of {vm} needs"))
            })?;
        }
        Ok(())
    }

    /// Looks up the chunks gathered so far: call it after the last point.
    pub(super) async fn finish(&mut self) -> Result<()> {
        let ids = std::mem::take(&mut self.batch);
        self.mark_ids(ids).await
    }

    /// Marks blobs by their ids.
    pub(super) async fn mark_ids(&mut self, mut ids: Vec<BlobId>) -> Result<()> {
        ids.sort_unstable();
        ids.dedup();
        for (id, place) in ids.iter().zip(self.places(&ids).await?) {
            let place = place.ok_or_else(|| missing(id))?;
            self.set(&place);
        }
        Ok(())
    }

    /// The copy of `id` to rely on, if there is one.
    pub(super) async fn place(&self, id: &BlobId) -> Result<Option<Place>> {
        Ok(self.places(std::slice::from_ref(id)).await?.pop().flatten())
    }

    /// Whether this copy is marked.
    pub(super) fn is_marked(&self, place: &Place) -> bool {
        let (word, bit) = word_and_bit(place.ordinal);
        self.segments[place.segment].words[word] & bit != 0
    }

    /// Whether entry `ordinal` of segment number `segment` is marked.
    pub(super) fn is_entry_marked(&self, segment: usize, ordinal: u64) -> bool {
        let (word, bit) = word_and_bit(ordinal);
        self.segments[segment].words[word] & bit != 0
    }

    fn set(&mut self, place: &Place) {
        let (word, bit) = word_and_bit(place.ordinal);
        let word = &mut self.segments[place.segment].words[word];
        if *word & bit == 0 {
            *word |= bit;
            let used = self.uses.entry(place.pack.id).or_default();
            used.bytes += u64::from(place.stored_bytes);
        }
    }

    async fn mark_tree(&mut self, stored: &StoredDisk, control: &Control) -> Result<()> {
        let height = Shape::new(stored.size_bytes, self.chunk_levels).height();
        let mut open = vec![(height, stored.top)];
        while !open.is_empty() {
            control.check()?;
            let from = open.len().saturating_sub(READS_IN_FLIGHT);
            let mut nodes = Vec::new();
            for (height, hash) in open.split_off(from) {
                if !hash.is_zero() && self.mark_node(height, &hash).await? {
                    nodes.push((height, hash));
                }
            }
            for (height, node) in self.read_nodes(nodes).await? {
                let children = node.children().iter().filter(|child| !child.is_zero());
                if height > 1 {
                    open.extend(children.map(|child| (height - 1, *child)));
                    continue;
                }
                let keys = &self.blobs.keys;
                self.batch.extend(children.map(|child| keys.blob_id(BlobKind::Chunk, child)));
            }
            if self.batch.len() >= BATCH_IDS {
                self.finish().await?;
            }
        }
        Ok(())
    }

    /// Marks a node; whether it was not marked before.
    async fn mark_node(&mut self, height: u8, hash: &ContentHash) -> Result<bool> {
        let id = self.blobs.keys.blob_id(BlobKind::Node { height }, hash);
        let place = self.place(&id).await?.ok_or_else(|| missing(&id))?;
        let new = !self.is_marked(&place);
        self.set(&place);
        Ok(new)
    }

    async fn read_nodes(&self, nodes: Vec<(u8, ContentHash)>) -> Result<Vec<(u8, Arc<Node>)>> {
        let mut tasks: JoinSet<Result<(u8, Arc<Node>)>> = JoinSet::new();
        for (height, hash) in nodes {
            let blobs = Arc::clone(&self.blobs);
            tasks.spawn(async move { Ok((height, blobs.node(height, &hash).await?)) });
        }
        let mut read = Vec::with_capacity(tasks.len());
        while let Some(task) = tasks.join_next().await {
            let died = |e| Error::new(Kind::Internal, "reading a tree node died").source(e);
            read.push(task.map_err(died)??);
        }
        Ok(read)
    }

    /// The best copy of each of `ids`, which are sorted.
    async fn places(&self, ids: &[BlobId]) -> Result<Vec<Option<Place>>> {
        let mut places: Vec<Option<Place>> = vec![None; ids.len()];
        for (number, Marked { segment, .. }) in self.segments.iter().enumerate() {
            for (id, place) in ids.iter().zip(&mut places) {
                let settled = place.as_ref().is_some_and(|p| p.standing == Standing::Fine);
                if settled || !segment.may_contain(id) {
                    continue;
                }
                // Ids are sorted: the block it needs is usually the last one, which is cached.
                for (ordinal, location) in self.blobs.index.entries_of(segment, id).await? {
                    let standing = self.standing(&location.pack.id);
                    let best = place.as_ref().map_or(Standing::Missing, |p| p.standing);
                    if standing > best {
                        *place = Some(Place {
                            segment: number,
                            ordinal,
                            pack: location.pack,
                            stored_bytes: location.stored_bytes,
                            standing,
                        });
                    }
                }
            }
        }
        Ok(places)
    }
}

fn word_and_bit(ordinal: u64) -> (usize, u64) {
    (usize::try_from(ordinal / 64).expect("bits fit memory"), 1 << (ordinal % 64))
}
