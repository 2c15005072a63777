//! Walking the tree of a disk for parts that do not restore.
//!
//! A subtree that was found whole is not walked again, so points that share content cost little.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use super::{Fault, Findings, Repair, is_finding};
use crate::block::ByteRange;
use crate::content::ContentHash;
use crate::control::Control;
use crate::error::{Result, with_causes};
use crate::repo::blobs::Blobs;
use crate::repo::index::{Location, missing};
use crate::repo::reader;
use crate::repo::seal::{BlobId, BlobKind};
use crate::repo::store::ObjectName;
use crate::repo::tree::Shape;
use crate::repo::writer::StoredDisk;

/// Whole subtrees remembered: about 64 MiB. Beyond it starts over, at the cost of time only.
const WHOLE_MAX: usize = 1 << 20;

/// Ranges of one disk that are kept apart; further ones extend the last.
const RANGES_MAX: usize = 10_000;

/// Bad ranges of a disk and the reason for the first.
type Bad = (Vec<ByteRange>, String);

/// Nodes under which everything is there, by height.
pub(super) type Whole = HashSet<(u8, ContentHash)>;

pub(super) struct Walker<'a> {
    blobs: &'a Arc<Blobs>,
    chunk_levels: u32,
    findings: &'a Findings,
    control: &'a Control,
    whole: Whole,
    /// What is wrong with the packs of which something is missed.
    faults: BTreeMap<ObjectName, Fault>,
    /// Blobs that are missed and in no segment of the index.
    unlisted: u64,
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
        Self {
            blobs,
            chunk_levels,
            findings,
            control,
            whole: HashSet::new(),
            faults: BTreeMap::new(),
            unlisted: 0,
        }
    }

    /// Begins with what an earlier one, of the same findings, found whole.
    pub(super) fn begin_with(&mut self, whole: Whole) {
        self.whole = whole;
    }

    /// What was found whole.
    pub(super) fn into_whole(self) -> Whole {
        self.whole
    }

    /// The packs that something was missed of, and what is wrong with each.
    pub(super) fn into_faults(self) -> BTreeMap<ObjectName, Fault> {
        self.faults
    }

    /// What is wrong with the index, if it does not list what points need.
    pub(super) fn unlisted(&self, repair: Repair) -> Option<String> {
        let step = match repair {
            Repair::Nothing => "'check --rebuild-index' puts back those that packs hold",
            Repair::RebuildIndex => "no pack holds them; 'full' stores anew what the VM still has",
        };
        let blobs = self.unlisted;
        (blobs > 0)
            .then(|| format!("{blobs} blobs that points need are in none of its segments: {step}"))
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
            Err(error) if is_finding(&error) => {
                self.blame_node(height, &hash, &Fault::of(&error)).await?;
                disk.bad(first_chunk, chunks, || with_causes(&error));
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

    /// Says which packs a node that cannot be read was looked for in.
    async fn blame_node(&mut self, height: u8, hash: &ContentHash, fault: &Fault) -> Result<()> {
        let id = self.blobs.keys.blob_id(BlobKind::Node { height }, hash);
        let copies = match self.blobs.index.copies(&id).await {
            Ok(copies) => copies,
            // A segment of the index is a finding of its own.
            Err(error) if is_finding(&error) => return Ok(()),
            Err(error) => return Err(error),
        };
        self.unlisted += u64::from(copies.is_empty());
        for copy in copies {
            let known = self.known_fault(&id, &copy).await?;
            let fault = known.unwrap_or_else(|| fault.clone());
            self.faults.entry(copy.pack.name()).or_insert(fault);
        }
        Ok(())
    }

    /// Why a chunk does not restore; none if one of its copies does.
    async fn chunk_damage(&mut self, hash: &ContentHash) -> Result<Option<String>> {
        let id = self.blobs.keys.blob_id(BlobKind::Chunk, hash);
        let mut reason = None;
        let mut faults = Vec::new();
        for segment in self.blobs.index.segments().iter().filter(|s| s.may_contain(&id)) {
            let entries = match self.blobs.index.entries_of(segment, &id).await {
                Ok(entries) => entries,
                Err(error) if is_finding(&error) => {
                    reason = Some(with_causes(&error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            for (_, copy) in entries {
                let Some(fault) = self.chunk_fault(&id, hash, &copy).await? else {
                    return Ok(None);
                };
                reason = Some(fault.what.clone());
                faults.push((copy.pack.name(), fault));
            }
        }
        for (object, fault) in faults {
            self.faults.entry(object).or_insert(fault);
        }
        self.unlisted += u64::from(reason.is_none());
        Ok(Some(reason.unwrap_or_else(|| missing(&id).to_string())))
    }

    /// What is wrong with a copy of a chunk.
    async fn chunk_fault(
        &self,
        id: &BlobId,
        hash: &ContentHash,
        copy: &Location,
    ) -> Result<Option<Fault>> {
        let known = self.known_fault(id, copy).await?;
        if known.is_some() || !self.findings.doubtful.contains(&copy.pack.id) {
            return Ok(known);
        }
        let (hash, levels) = (*hash, self.chunk_levels);
        let prove = move |copy: &Location, plain| reader::prove(copy, plain, &hash, levels);
        match self.blobs.read_copy(copy.clone(), prove).await {
            Ok(_) => Ok(None),
            Err(error) if is_finding(&error) => Ok(Some(Fault::of(&error))),
            Err(error) => Err(error),
        }
    }

    /// What is wrong with a copy of a blob as far as it is known without reading it.
    async fn known_fault(&self, id: &BlobId, copy: &Location) -> Result<Option<Fault>> {
        let name = copy.pack.name();
        let Some(size_bytes) = self.findings.packs.get(&copy.pack.id) else {
            // It may be newer than our list.
            return match self.blobs.store.stat(&name).await {
                Ok(_) => Ok(None),
                Err(error) if error.is_not_found() => {
                    Ok(Some(Fault::damage(format!("pack {name} is missing"))))
                }
                Err(error) => Err(error.into()),
            };
        };
        let end = u64::from(copy.offset) + u64::from(copy.stored_bytes);
        if end > *size_bytes {
            let what = format!("pack {name} is cut off: {size_bytes} bytes, needed up to {end}");
            return Ok(Some(Fault::damage(what)));
        }
        let bad = self.findings.bad.contains(&(copy.pack.id, copy.counter));
        Ok(bad.then(|| Fault::damage(format!("blob {id} of pack {name} is damaged"))))
    }
}
