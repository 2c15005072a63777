//! The content root of a disk, computed by copying it into a sink that keeps only hashes.
//!
//! Leaves arrive in any order; a subtree is folded as soon as both its halves are there, so memory
//! follows what is in flight and not the disk. Zeroes are whole subtrees at once and are not read.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::{Flush, Options, Unchanged, Zeroes, copy};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, Geometry, ZeroMode};
use crate::content::{ContentHash, ContentRoot, LEAF_BYTES, levels};
use crate::control::{Control, DiskProgress};
use crate::error::{Error, Kind, Result};
use crate::workers::Workers;

/// The content root of `source`, whose name in errors is `options.source_name`. Ranges that are
/// Unchanged are read like all others. Stops with [`Kind::Cancelled`] when `control` asks for it.
pub async fn content_root(
    source: Arc<dyn BlockSource>,
    options: &Options,
    workers: &Workers,
    control: &Control,
    progress: &Arc<DiskProgress>,
) -> Result<ContentRoot> {
    let sink = Arc::new(HashSink::new(source.geometry().size_bytes, workers.clone()));
    let options = Options {
        zeroes: Zeroes::Sparse { detect_bytes: None },
        unchanged: Unchanged::Read,
        flush: Flush::Never,
        ..options.clone()
    };
    copy(source, Arc::clone(&sink) as Arc<dyn BlockSink>, &options, control, progress).await?;
    Ok(sink.root())
}

/// Takes whole leaves and keeps what is needed for the root.
pub(super) struct HashSink {
    size_bytes: u64,
    workers: Workers,
    tree: Mutex<Tree>,
}

impl HashSink {
    pub(super) fn new(size_bytes: u64, workers: Workers) -> Self {
        Self { size_bytes, workers, tree: Mutex::new(Tree::new(size_bytes)) }
    }

    fn insert(&self, level: u32, index: u64, hash: ContentHash) {
        // Held for a few hashes of 64 bytes, never across an await.
        self.tree.lock().unwrap_or_else(PoisonError::into_inner).insert(level, index, hash);
    }

    /// Hashes the leaves of a buffer that lies at `offset` and gives it back.
    pub(super) async fn pass(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        assert!(offset.is_multiple_of(LEAF_BYTES), "a buffer of whole leaves");
        let leaf = usize::try_from(LEAF_BYTES).expect("a leaf fits memory");
        let hash = move || {
            let hashes: Vec<_> = buffer.chunks(leaf).map(ContentHash::of_leaf).collect();
            (buffer, hashes)
        };
        let (buffer, hashes) = self.workers.run(hash).await?;
        for (index, hash) in (offset / LEAF_BYTES..).zip(hashes) {
            self.insert(0, index, hash);
        }
        Ok(buffer)
    }

    /// Notes whole leaves of zeroes.
    pub(super) fn pass_zeroes(&self, range: ByteRange) {
        let leaves = range.offset() / LEAF_BYTES..range.end().div_ceil(LEAF_BYTES);
        for (level, index) in subtrees(leaves) {
            self.insert(level, index, ContentHash::ZERO);
        }
    }

    pub(super) fn root(&self) -> ContentRoot {
        let mut tree = self.tree.lock().unwrap_or_else(PoisonError::into_inner);
        ContentRoot::new(self.size_bytes, &tree.finish(self.size_bytes))
    }
}

#[async_trait]
impl BlockSink for HashSink {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            align_bytes: LEAF_BYTES,
            preferred_bytes: LEAF_BYTES,
            request_bytes_max: LEAF_BYTES,
            in_flight: 16,
        }
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.pass(offset, buffer).await.map(|_| ())
    }

    async fn zero(&self, range: ByteRange, _mode: ZeroMode) -> Result<()> {
        self.pass_zeroes(range);
        Ok(())
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        Err(Error::new(Kind::Unsupported, format!("{range} cannot be hashed without being read")))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// The finished subtrees that wait for their sibling.
#[derive(Debug)]
struct Tree {
    top: u32,
    waiting: BTreeMap<(u32, u64), ContentHash>,
}

impl Tree {
    fn new(size_bytes: u64) -> Self {
        Self { top: levels(size_bytes), waiting: BTreeMap::new() }
    }

    fn insert(&mut self, mut level: u32, mut index: u64, mut hash: ContentHash) {
        while level < self.top {
            let Some(sibling) = self.waiting.remove(&(level, index ^ 1)) else { break };
            hash = match index % 2 {
                0 => ContentHash::of_pair(&hash, &sibling),
                _ => ContentHash::of_pair(&sibling, &hash),
            };
            (level, index) = (level + 1, index / 2);
        }
        let twice = self.waiting.insert((level, index), hash);
        assert!(twice.is_none(), "leaf {index} of level {level} was hashed twice");
    }

    /// Adds the missing leaves behind the disk's end and yields the top.
    fn finish(&mut self, size_bytes: u64) -> ContentHash {
        for (level, index) in subtrees(size_bytes.div_ceil(LEAF_BYTES)..1 << self.top) {
            self.insert(level, index, ContentHash::ZERO);
        }
        let top = self.waiting.remove(&(self.top, 0)).expect("every leaf was hashed");
        assert!(self.waiting.is_empty(), "every leaf is below the top");
        top
    }
}

/// The largest full subtrees that make up a range of leaves, as (level, index).
fn subtrees(leaves: std::ops::Range<u64>) -> impl Iterator<Item = (u32, u64)> {
    let mut at = leaves.start;
    std::iter::from_fn(move || {
        let left = leaves.end.checked_sub(at).filter(|left| *left > 0)?;
        let level = at.trailing_zeros().min(left.ilog2());
        let index = at >> level;
        at += 1 << level;
        Some((level, index))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::conformance;
    use crate::block::memory::MemoryDisk;

    async fn root(content: Vec<u8>) -> ContentRoot {
        let control = Control::new();
        let progress = control.add_disk("vda", content.len() as u64);
        let source = Arc::new(MemoryDisk::with_content(content));
        let workers = Workers::new(2).unwrap();
        let options = Options::new("source", "hash");
        content_root(source, &options, &workers, &control, &progress).await.unwrap()
    }

    fn reference(content: &[u8]) -> ContentRoot {
        let size = content.len() as u64;
        ContentRoot::new(size, &ContentHash::of_chunk(content, levels(size)))
    }

    #[tokio::test]
    async fn the_root_of_any_size_is_that_of_the_whole_tree() {
        for size in [0, 1, 262_144, 262_145, 1_000_000, 5 * 262_144, 3_333_333] {
            let content = conformance::pattern(size);
            assert_eq!(root(content.clone()).await, reference(&content), "{size}");
            let mut holes = content;
            holes[size / 4..size].fill(0);
            assert_eq!(root(holes.clone()).await, reference(&holes), "{size} with a hole");
        }
    }
}
