//! A disk being stored: a [`BlockSink`] that takes whole chunks.
//!
//! ```text
//!  write ─► worker: hash ─► zero? known? ── yes ──────────────────────────► tree
//!                      └─ new: encode, slot, seal ─► pack's channel ─► tree
//! ```
//!
//! Each chunk is given once, by `write`, `zero` or `keep` (a second time is a bug and panics). When
//! [`DiskWriter::finish`] returns, the disk's tree is complete; it is durable once the run commits.
//! Only nodes in the middle of being filled are in memory, so memory and time follow what is
//! written, not the disk.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::durable::Durability;
use super::seal::{BlobId, BlobKind};
use super::session::{Known, RunShared, SealedBlob, Sent};
use super::tree::{Child, Node, Ready, Seams, Shape, TreeBuilder};
use crate::block::{BlockSink, Buffer, ByteRange, Geometry, ZeroMode};
use crate::content::{ContentHash, ContentRoot};
use crate::error::{Error, Kind, Result};

/// Writes worth having in flight: enough to keep every core busy while packs are written. As many
/// nodes of a base are read at once: a slow store answers each of them late.
const IN_FLIGHT: usize = 16;

/// What a manifest needs to find a disk's content again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredDisk {
    /// Virtual size.
    pub size_bytes: u64,
    /// Hash of the top node of its tree; ZERO when all of it is zero.
    pub top: ContentHash,
    /// The content root: independent of this repository and its chunk size.
    pub root: ContentRoot,
}

/// A chunk that was stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    /// Its hash in the tree.
    pub hash: ContentHash,
    /// When its content is durable.
    pub durability: Durability,
}

/// What became of the chunks of a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteStats {
    /// Bytes that were given as data, zeroes found among them included.
    pub written_bytes: u64,
    /// Bytes of those that the repository held already.
    pub known_bytes: u64,
    /// Bytes of those that were new, before compression.
    pub new_bytes: u64,
    /// Bytes that the new ones take in packs, tree nodes included.
    pub stored_bytes: u64,
}

#[derive(Debug, Default)]
struct Counters {
    written: AtomicU64,
    known: AtomicU64,
    new: AtomicU64,
    stored: AtomicU64,
}

/// A disk being stored by a run.
pub struct DiskWriter {
    run: Arc<RunShared>,
    tree: TreeBuilder,
    base: Option<StoredDisk>,
    counters: Counters,
    // Set once, when the top node is complete.
    root: Mutex<Option<ContentRoot>>,
}

impl DiskWriter {
    /// A disk of `size_bytes`, of which ranges may be kept from `base` if that has the same size.
    pub(super) fn new(run: Arc<RunShared>, size_bytes: u64, base: Option<StoredDisk>) -> Self {
        let tree = TreeBuilder::new(Shape::new(size_bytes, run.chunk_levels));
        let base = base.filter(|base| base.size_bytes == size_bytes);
        Self { run, tree, base, counters: Counters::default(), root: Mutex::default() }
    }

    /// Stores a chunk, as [`BlockSink::write`] does.
    pub async fn store(&self, offset: u64, buffer: Buffer) -> Result<StoredChunk> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.check(range);
        let chunk = self.tree.shape().chunk_bytes();
        assert!(range.len() <= chunk, "a write is at most one chunk");
        let stored = self.store_chunk(buffer).await?;
        self.give(0, offset / chunk, Child::Is(stored.hash)).await?;
        Ok(stored)
    }

    /// The hash that a chunk with this content has in a tree.
    pub async fn hash_of(&self, bytes: Buffer) -> Result<ContentHash> {
        let levels = self.run.chunk_levels;
        self.run.blobs.workers.run(move || ContentHash::of_chunk(&bytes, levels)).await
    }

    /// To be told which chunks will be kept, for [`Self::foresee`].
    pub fn seams(&self) -> Seams {
        Seams::new(self.tree.shape().clone())
    }

    /// Reads what of the base's tree is needed where such chunks are kept: if it is damaged, that is
    /// met here and not in the middle of the disk. Cancel-safe.
    pub async fn foresee(&self, seams: Seams) -> Result<()> {
        let Some(base) = &self.base else { return Ok(()) };
        let (top_height, top) = (self.tree.shape().height(), base.top);
        let mut reads = JoinSet::new();
        let died = |e| Error::new(Kind::Internal, "reading a tree node died").source(e);
        for (height, index) in seams.into_nodes() {
            if reads.len() >= IN_FLIGHT
                && let Some(read) = reads.join_next().await
            {
                read.map_err(died)??;
            }
            let blobs = Arc::clone(&self.run.blobs);
            reads.spawn(
                async move { blobs.node_at(top_height, &top, height, index).await.map(drop) },
            );
        }
        while let Some(read) = reads.join_next().await {
            read.map_err(died)??;
        }
        Ok(())
    }

    /// The stored disk, once every chunk was given. It exists for others when the run commits.
    pub async fn finish(&self) -> Result<(StoredDisk, WriteStats)> {
        if self.tree.shape().size_bytes() == 0 {
            self.give(0, 0, Child::Is(ContentHash::ZERO)).await?;
        }
        let top = self.tree.finish().map_err(|open| {
            let what = format!("a disk was finished with {open} incomplete tree nodes");
            Error::new(Kind::Internal, what)
        })?;
        let size_bytes = self.tree.shape().size_bytes();
        let root = *self.root.lock().unwrap_or_else(PoisonError::into_inner);
        let stored = match (top, root, &self.base) {
            (Child::Is(top), Some(root), _) => StoredDisk { size_bytes, top, root },
            (Child::Keep, _, Some(base)) => base.clone(),
            _ => return Err(Error::new(Kind::Internal, "a disk was finished without a root")),
        };
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let stats = WriteStats {
            written_bytes: read(&self.counters.written),
            known_bytes: read(&self.counters.known),
            new_bytes: read(&self.counters.new),
            stored_bytes: read(&self.counters.stored),
        };
        Ok((stored, stats))
    }

    /// Hashes a chunk and stores it if it is new.
    async fn store_chunk(&self, buffer: Buffer) -> Result<StoredChunk> {
        let len = buffer.len() as u64;
        self.counters.written.fetch_add(len, Ordering::Relaxed);
        let run = Arc::clone(&self.run);
        let work = move || hash_and_seal(&run, buffer);
        let (hash, fate) = self.run.blobs.workers.run(work).await??;
        let durability = match fate {
            Fate::Zero => Durability::Now,
            Fate::Known(durability) => self.count_known(len, durability),
            Fate::New(blob) => self.count_new(len, self.run.send(blob).await?),
            Fate::Ask(id, buffer) => match self.run.known(&id).await? {
                Known::Yes(durability) => self.count_known(len, durability),
                Known::New(claim) => {
                    let sent = self.run.store_new(claim, BlobKind::Chunk, buffer).await?;
                    self.count_new(len, sent)
                }
            },
        };
        Ok(StoredChunk { hash, durability })
    }

    fn count_known(&self, len: u64, durability: Durability) -> Durability {
        self.counters.known.fetch_add(len, Ordering::Relaxed);
        durability
    }

    fn count_new(&self, len: u64, sent: Sent) -> Durability {
        self.counters.stored.fetch_add(sent.stored_bytes, Ordering::Relaxed);
        self.counters.new.fetch_add(len, Ordering::Relaxed);
        sent.durability
    }

    /// Gives a subtree to the tree and stores every node that this completes.
    async fn give(&self, mut height: u8, mut index: u64, mut child: Child) -> Result<()> {
        while let Some(ready) = self.tree.give(height, index, child) {
            (height, index) = (ready.height, ready.index);
            child = self.close(ready).await?;
        }
        Ok(())
    }

    /// Stores a complete node, unless it is as it was or all zero.
    async fn close(&self, ready: Ready) -> Result<Child> {
        if ready.children.iter().all(|child| *child == Child::Keep) {
            return Ok(Child::Keep);
        }
        let node = Node::new(self.resolve(&ready).await?);
        let shape = self.tree.shape();
        if ready.height == shape.height() {
            let root = shape.root(node.children());
            *self.root.lock().unwrap_or_else(PoisonError::into_inner) = Some(root);
        }
        let run = Arc::clone(&self.run);
        let kind = BlobKind::Node { height: ready.height };
        let work = move || {
            let hash = node.hash();
            (hash, run.blobs.keys.blob_id(kind, &hash), node)
        };
        let (hash, id, node) = self.run.blobs.workers.run(work).await?;
        if hash.is_zero() {
            return Ok(Child::Is(hash));
        }
        if let Known::New(claim) = self.run.known(&id).await? {
            let bytes = Buffer::unbudgeted(node.encode());
            let sent = self.run.store_new(claim, kind, bytes).await?;
            self.counters.stored.fetch_add(sent.stored_bytes, Ordering::Relaxed);
        }
        Ok(Child::Is(hash))
    }

    /// The hashes of a node's children, kept ones from the base.
    async fn resolve(&self, ready: &Ready) -> Result<Vec<ContentHash>> {
        let base = match &self.base {
            Some(base) if ready.children.contains(&Child::Keep) => {
                let top_height = self.tree.shape().height();
                let blobs = &self.run.blobs;
                Some(blobs.node_at(top_height, &base.top, ready.height, ready.index).await?)
            }
            _ => None,
        };
        let resolve = |(slot, child): (usize, &Child)| match (child, &base) {
            (Child::Is(hash), _) => *hash,
            (Child::Keep, Some(base)) => base.child(slot),
            (Child::Keep, None) => unreachable!("keep is refused without a base"),
        };
        Ok(ready.children.iter().enumerate().map(resolve).collect())
    }

    /// Gives the chunks of `range`, which is made of whole ones.
    async fn give_range(&self, range: ByteRange, child: Child) -> Result<()> {
        self.check(range);
        let chunk = self.tree.shape().chunk_bytes();
        let (start, end) = (range.offset() / chunk, range.end().div_ceil(chunk));
        for (height, index) in self.tree.subtrees(start, end) {
            self.give(height, index, child).await?;
        }
        Ok(())
    }

    /// # Panics
    /// When `range` is not made of whole chunks of this disk: the caller's bug.
    fn check(&self, range: ByteRange) {
        let shape = self.tree.shape();
        let (chunk, size) = (shape.chunk_bytes(), shape.size_bytes());
        let whole = range.offset().is_multiple_of(chunk)
            && (range.end().is_multiple_of(chunk) || range.end() == size);
        assert!(whole && range.end() <= size, "{range:?} is not made of chunks of {chunk} bytes");
    }
}

/// What a worker found out about a chunk.
enum Fate {
    Zero,
    Known(Durability),
    /// New, and sealed in the same go, while the chunk was in the processor's cache.
    New(SealedBlob),
    /// The index has to be read to know.
    Ask(BlobId, Buffer),
}

/// Hashes a chunk and seals it if it is certainly new. CPU work.
fn hash_and_seal(run: &RunShared, buffer: Buffer) -> Result<(ContentHash, Fate)> {
    let hash = ContentHash::of_chunk(&buffer, run.chunk_levels);
    if hash.is_zero() {
        return Ok((hash, Fate::Zero));
    }
    let id = run.blobs.keys.blob_id(BlobKind::Chunk, &hash);
    let fate = match run.known_at_once(&id) {
        Some(Known::Yes(durability)) => Fate::Known(durability),
        Some(Known::New(claim)) => Fate::New(run.seal(claim, BlobKind::Chunk, buffer)?),
        None => Fate::Ask(id, buffer),
    };
    Ok((hash, fate))
}

#[async_trait]
impl BlockSink for DiskWriter {
    fn geometry(&self) -> Geometry {
        let chunk = self.tree.shape().chunk_bytes();
        Geometry {
            size_bytes: self.tree.shape().size_bytes(),
            align_bytes: chunk,
            preferred_bytes: chunk,
            request_bytes_max: chunk,
            in_flight: IN_FLIGHT,
        }
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.store(offset, buffer).await.map(drop)
    }

    async fn zero(&self, range: ByteRange, _mode: ZeroMode) -> Result<()> {
        self.give_range(range, Child::Is(ContentHash::ZERO)).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        if self.base.is_none() {
            let what = "the disk has no base of the same size to keep data from";
            return Err(Error::new(Kind::Unsupported, what));
        }
        self.give_range(range, Child::Keep).await
    }

    /// Durability comes with the run's commit: packs are shared by its disks.
    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}
