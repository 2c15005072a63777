//! Walking the tree of a disk for parts that do not restore.
//!
//! A subtree that was found whole is not walked again, so points that share content cost little.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Findings, describe, is_damage};
use crate::block::ByteRange;
use crate::content::ContentHash;
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::repo::blobs::{self, Blobs};
use crate::repo::index::{Location, missing};
use crate::repo::seal::{BlobId, BlobKind};
use crate::repo::tree::Shape;
use crate::repo::writer::StoredDisk;

/// Whole subtrees remembered: about 64 MiB. Beyond it starts over, at the cost of time only.
const WHOLE_MAX: usize = 1 << 20;

/// Ranges of one disk that are kept apart; further ones extend the last.
const RANGES_MAX: usize = 10_000;

/// Bad ranges of a disk and the reason for the first.
type Bad = (Vec<ByteRange>, String);

pub(super) struct Walker<'a> {
    blobs: &'a Arc<Blobs>,
    chunk_levels: u32,
    findings: &'a Findings,
    control: &'a Control,
    /// Nodes under which everything is there, by height.
    whole: HashSet<(u8, ContentHash)>,
}

/// A node and where it is on the disk.
#[derive(Clone, Copy)]
struct Subtree {
    height: u8,
    first_chunk: u64,
    hash: ContentHash,
}

/// The disk being walked.
struct Disk {
    shape: Shape,
    ranges: Vec<ByteRange>,
    reason: Option<String>,
}

impl Disk {
    fn bad(&mut self, first_chunk: u64, chunks: u64, reason: impl FnOnce() -> String) {
        let chunk_bytes = self.shape.chunk_bytes();
        let start = first_chunk.saturating_mul(chunk_bytes).min(self.shape.size_bytes());
        let end = first_chunk.saturating_add(chunks).saturating_mul(chunk_bytes);
        let end = end.min(self.shape.size_bytes());
        self.reason.get_or_insert_with(reason);
        let full = self.ranges.len() >= RANGES_MAX;
        match self.ranges.last_mut() {
            Some(last) if full || last.end() == start => {
                *last = ByteRange::between(last.offset(), end);
            }
            _ => self.ranges.push(ByteRange::between(start, end)),
        }
    }
}

impl<'a> Walker<'a> {
    pub(super) fn new(
        blobs: &'a Arc<Blobs>,
        chunk_levels: u32,
        findings: &'a Findings,
        control: &'a Control,
    ) -> Self {
        Self { blobs, chunk_levels, findings, control, whole: HashSet::new() }
    }

    /// What of the disk does not restore, and why; none if all of it does.
    pub(super) async fn bad_ranges(&mut self, stored: &StoredDisk) -> Result<Option<Bad>> {
        let shape = Shape::new(stored.size_bytes, self.chunk_levels);
        let (height, chunks) = (shape.height(), shape.chunks());
        let mut disk = Disk { shape, ranges: Vec::new(), reason: None };
        self.walk(&mut disk, Subtree { height, first_chunk: 0, hash: stored.top }).await?;
        if disk.ranges.is_empty() && self.root_differs(&disk.shape, stored).await? {
            let what = "its tree does not have the content root of its manifest";
            disk.bad(0, chunks, || what.to_owned());
        }
        Ok(disk.reason.map(|reason| (disk.ranges, reason)))
    }

    async fn root_differs(&self, shape: &Shape, stored: &StoredDisk) -> Result<bool> {
        if stored.top.is_zero() {
            return Ok(shape.zero_root() != stored.root);
        }
        let top = self.blobs.node(shape.height(), &stored.top).await?;
        let children = shape.children_of(shape.height(), 0);
        Ok(shape.root(&top.children()[..children]) != stored.root)
    }

    async fn walk(&mut self, disk: &mut Disk, subtree: Subtree) -> Result<()> {
        let Subtree { height, first_chunk, hash } = subtree;
        self.control.check()?;
        if hash.is_zero() || self.whole.contains(&(height, hash)) {
            return Ok(());
        }
        let before = disk.ranges.len();
        let chunks = Shape::chunks_below(height);
        let node = match self.blobs.node(height, &hash).await {
            Ok(node) => node,
            Err(error) if is_damage(&error) => {
                disk.bad(first_chunk, chunks, || describe(&error));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let below = Shape::chunks_below(height - 1);
        let mut fine = true;
        for (slot, child) in (0..).zip(node.children()).filter(|(_, child)| !child.is_zero()) {
            let at = first_chunk + slot * below;
            if height > 1 {
                // At most eight levels deep.
                let subtree = Subtree { height: height - 1, first_chunk: at, hash: *child };
                Box::pin(self.walk(disk, subtree)).await?;
            } else if let Some(reason) = self.chunk_damage(child).await? {
                fine = false;
                disk.bad(at, 1, || reason);
            }
        }
        if fine && disk.ranges.len() == before {
            if self.whole.len() >= WHOLE_MAX {
                self.whole.clear();
            }
            // Within a node above, a bad neighbour may have grown instead of being added: only
            // nodes over chunks are certain then.
            if height == 1 || disk.ranges.is_empty() {
                self.whole.insert((height, hash));
            }
        }
        Ok(())
    }

    /// Why a chunk does not restore; none if it does.
    async fn chunk_damage(&self, hash: &ContentHash) -> Result<Option<String>> {
        let id = self.blobs.keys.blob_id(BlobKind::Chunk, hash);
        let mut reason = None;
        for segment in self.blobs.index.segments().iter().filter(|s| s.may_contain(&id)) {
            let entries = match self.blobs.index.entries_of(segment, &id).await {
                Ok(entries) => entries,
                Err(error) if is_damage(&error) => {
                    reason = Some(describe(&error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            for (_, location) in entries {
                match self.location_damage(&id, hash, &location).await? {
                    None => return Ok(None),
                    found => reason = found,
                }
            }
        }
        Ok(Some(reason.unwrap_or_else(|| missing(&id).to_string())))
    }

    async fn location_damage(
        &self,
        id: &BlobId,
        hash: &ContentHash,
        location: &Location,
    ) -> Result<Option<String>> {
        let name = location.pack.name();
        let Some(size_bytes) = self.findings.packs.get(&location.pack.id) else {
            // It may be newer than our list.
            return match self.blobs.store.stat(&name).await {
                Ok(_) => Ok(None),
                Err(error) if error.is_not_found() => Ok(Some(format!("pack {name} is missing"))),
                Err(error) => Err(error.into()),
            };
        };
        let end = u64::from(location.offset) + u64::from(location.stored_bytes);
        if end > *size_bytes {
            return Ok(Some(format!("pack {name} is cut off")));
        }
        if self.findings.bad.contains(&(location.pack.id, location.counter)) {
            return Ok(Some(format!("blob {id} of pack {name} is damaged")));
        }
        if self.findings.unlisted.contains(&location.pack.id) {
            return match self.read_chunk(hash, location).await {
                Ok(()) => Ok(None),
                Err(error) if is_damage(&error) => Ok(Some(describe(&error))),
                Err(error) => Err(error),
            };
        }
        Ok(None)
    }

    /// Reads and proves a chunk of a pack whose own list of blobs is damaged.
    async fn read_chunk(&self, hash: &ContentHash, location: &Location) -> Result<()> {
        let len = location.stored_bytes.into();
        let sealed = self.blobs.read_run(&location.pack, location.offset, len).await?;
        let mut sealed = sealed.ok_or_else(|| Error::new(Kind::Corrupt, "its pack is missing"))?;
        let opener = self.blobs.opener(&location.pack)?;
        let (hash, location, levels) = (*hash, location.clone(), self.chunk_levels);
        let work = move || {
            let plain = blobs::open(&opener, &location, &mut sealed)?;
            if ContentHash::of_chunk(&plain, levels) == hash {
                return Ok(());
            }
            Err(blobs::damaged(&location, "its content is not what its tree says"))
        };
        self.blobs.workers.run(work).await?
    }
}
