//! A stored disk as a [`BlockSource`].
//!
//! Every chunk is proven against the tree, the tree against the top, the top against the content
//! root: what reads without an error is what the disk held. Chunks that lie side by side in a pack,
//! as a full backup leaves them, are fetched with one read.
//!
//! A reader that salvages ([`super::losses`]) is the one exception: what is proven to be damaged reads
//! as zeroes there, and is on its list. Every other error stays one.
//!
//! Two ways lead through it. Over the reactor (here): the store answers when it can, a worker opens
//! and proves. On the caller's own thread (`direct`), where the store is a system call away: a
//! restore to a file then does a whole step on one thread, and no byte changes hands.

mod direct;

use std::collections::VecDeque;
use std::sync::Arc;

use async_trait::async_trait;

use super::blobs::{self, Blobs};
use super::index::{Location, PackRef};
use super::losses::Losses;
use super::salvage::may_have_another;
use super::seal::{BlobId, BlobKind, Opener};
use super::tree::{FANOUT, Node, Shape};
use super::writer::StoredDisk;
use crate::block::{BlockSource, BlockingRead, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry};
use crate::content::ContentHash;
use crate::error::{Error, Kind, Result};

/// Reads worth having in flight.
const IN_FLIGHT: usize = 16;

/// Largest read: a few chunks, so that neighbours in a pack come with one request.
const REQUEST_BYTES_MAX: u64 = 4 << 20;

/// Nodes of height 1 that one answer about extents looks at.
const EXTENT_NODES_MAX: usize = 64;

/// A disk of a restore point.
#[derive(Clone)]
pub struct DiskReader {
    blobs: Arc<Blobs>,
    shape: Shape,
    stored: StoredDisk,
    /// Where damage is noted instead of ending a read.
    losses: Option<Arc<Losses>>,
}

/// A chunk, or part of one, that a read needs.
#[derive(Clone, Debug)]
struct Piece {
    /// Binary levels of a chunk.
    levels: u32,
    /// Where in the buffer's window.
    at: usize,
    /// How many bytes.
    len: usize,
    /// Where in the chunk.
    skip: usize,
    /// Which chunk.
    hash: ContentHash,
    /// Its first byte on the disk.
    disk_offset: u64,
}

/// A node that cannot be read.
struct Unreadable {
    id: BlobId,
    error: Error,
    /// The first chunk past those below it.
    until_chunk: u64,
}

/// Chunks that lie side by side in one pack.
struct Batch {
    pieces: Vec<(Piece, Location)>,
}

impl Batch {
    /// Its pack, where it begins there, and its sealed length.
    fn run(&self) -> (&PackRef, u32, u64) {
        let (_, first) = &self.pieces[0];
        let len = self.pieces.iter().map(|(_, l)| u64::from(l.stored_bytes)).sum();
        (&first.pack, first.offset, len)
    }

    /// The pieces, to be looked for elsewhere.
    fn into_pieces(self) -> Vec<Piece> {
        self.pieces.into_iter().map(|(piece, _)| piece).collect()
    }

    /// Opens and proves what was read, each piece to where it belongs; those that do not open. CPU
    /// work.
    fn open(self, opener: &Opener, sealed: &mut [u8], target: &mut [u8]) -> Vec<Piece> {
        let (mut rest, mut failed) = (sealed, Vec::new());
        for (piece, location) in self.pieces {
            let (blob, after) = rest.split_at_mut(location.stored_bytes as usize);
            rest = after;
            let target = &mut target[piece.at..piece.at + piece.len];
            if decode_piece(opener, &location, &piece, blob, target).is_err() {
                failed.push(piece);
            }
        }
        failed
    }
}

impl DiskReader {
    /// The disk; its top node is read and proven against the content root.
    pub(super) async fn open(
        blobs: Arc<Blobs>,
        chunk_levels: u32,
        stored: &StoredDisk,
    ) -> Result<Self> {
        let reader = Self::new(blobs, chunk_levels, stored, None);
        reader.prove_root().await?;
        Ok(reader)
    }

    /// The same, to read what can be read; the rest is zero and on the list.
    pub(super) async fn open_salvaging(
        blobs: Arc<Blobs>,
        chunk_levels: u32,
        stored: &StoredDisk,
    ) -> Result<(Self, Arc<Losses>)> {
        let losses = Arc::new(Losses::new(Arc::clone(&blobs)));
        let reader = Self::new(blobs, chunk_levels, stored, Some(Arc::clone(&losses)));
        let (height, top) = (reader.shape.height(), &stored.top);
        match reader.blobs.node(height, top).await {
            Ok(_) => reader.prove_root().await?,
            // Nothing of the disk is known then, which its extents tell.
            Err(error) => drop(losses.admit(&reader.node_id(height, top), error).await?),
        }
        Ok((reader, losses))
    }

    fn new(
        blobs: Arc<Blobs>,
        chunk_levels: u32,
        stored: &StoredDisk,
        losses: Option<Arc<Losses>>,
    ) -> Self {
        let shape = Shape::new(stored.size_bytes, chunk_levels);
        Self { blobs, shape, stored: stored.clone(), losses }
    }

    async fn prove_root(&self) -> Result<()> {
        let root = if self.stored.top.is_zero() {
            self.shape.zero_root()
        } else {
            let top = self.blobs.node(self.shape.height(), &self.stored.top).await?;
            let children = self.shape.children_of(self.shape.height(), 0);
            self.shape.root(&top.children()[..children])
        };
        if root != self.stored.root {
            let what = "the tree of a stored disk does not have the content root of its manifest";
            return Err(Error::new(Kind::Corrupt, what));
        }
        Ok(())
    }

    /// What is stored.
    pub fn stored(&self) -> &StoredDisk {
        &self.stored
    }

    /// How its tree is made.
    pub(super) fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Whether the chunk at `offset` has this content, by the tree alone: no data is read.
    pub async fn has_chunk(&self, offset: u64, bytes: Buffer) -> Result<bool> {
        let stored = self.subtree(0, offset / self.shape.chunk_bytes()).await?;
        let levels = self.shape.chunk_levels();
        let hash = move || ContentHash::of_chunk(&bytes, levels);
        Ok(self.blobs.workers.run(hash).await? == stored)
    }

    /// The hash of the subtree of `height`, at most the tree's, over `chunk`, which the disk has.
    pub(super) async fn subtree(&self, height: u8, chunk: u64) -> Result<ContentHash> {
        let mut hash = self.stored.top;
        for above in (height + 1..=self.shape.height()).rev() {
            hash = self.child(above, &hash, chunk).await?;
        }
        Ok(hash)
    }

    /// The hash of the child over `chunk` of the node `hash` of `height`.
    pub(super) async fn child(
        &self,
        height: u8,
        hash: &ContentHash,
        chunk: u64,
    ) -> Result<ContentHash> {
        let node = self.blobs.node(height, hash).await.map_err(|e| self.at_chunk(chunk, e))?;
        let slot = chunk / Shape::chunks_below(height - 1) % FANOUT as u64;
        Ok(node.child(usize::try_from(slot).expect("below 256")))
    }

    /// The node of height 1 over `chunk`, or the zero range around it: `(node, None)` or
    /// `(empty node, Some(first chunk past the zeroes))`.
    async fn node_over(&self, chunk: u64) -> Result<(Arc<Node>, Option<u64>), Unreadable> {
        let mut hash = self.stored.top;
        let mut height = self.shape.height();
        loop {
            let below = Shape::chunks_below(height);
            let end = (chunk / below + 1).saturating_mul(below).min(self.shape.chunks());
            if hash.is_zero() {
                return Ok((Arc::new(Node::new(Vec::new())), Some(end)));
            }
            let node = self.blobs.node(height, &hash).await.map_err(|error| Unreadable {
                id: self.node_id(height, &hash),
                error,
                until_chunk: end,
            })?;
            if height == 1 {
                return Ok((node, None));
            }
            height -= 1;
            let slot = chunk / Shape::chunks_below(height) % FANOUT as u64;
            hash = node.child(usize::try_from(slot).expect("below 256"));
        }
    }

    fn node_id(&self, height: u8, hash: &ContentHash) -> BlobId {
        self.blobs.keys.blob_id(BlobKind::Node { height }, hash)
    }

    /// Notes that `range` is lost because of `error`, where damage does not end a read.
    async fn lost(&self, range: ByteRange, id: &BlobId, error: Error) -> Result<()> {
        let at_range = |e| self.at_chunk(range.offset() / self.shape.chunk_bytes(), e);
        match &self.losses {
            Some(losses) => {
                let reason = losses.admit(id, error).await.map_err(at_range)?;
                losses.note(range, reason);
                Ok(())
            }
            None => Err(at_range(error)),
        }
    }

    /// Says which part of the disk an error concerns.
    fn at_chunk(&self, chunk: u64, error: Error) -> Error {
        let offset = chunk * self.shape.chunk_bytes();
        error.context(format!("cannot read the stored disk at offset {offset}"))
    }

    /// The chunks that a read of `range` needs, zero ones left out.
    async fn pieces(&self, range: ByteRange) -> Result<Vec<Piece>> {
        let chunk_bytes = self.shape.chunk_bytes();
        let mut pieces = Vec::new();
        let mut node: Option<(u64, Arc<Node>)> = None;
        let to_usize = |n: u64| usize::try_from(n).expect("a request is a few MiB");
        for part in range.pieces(chunk_bytes) {
            let chunk = part.offset() / chunk_bytes;
            let over = chunk / FANOUT as u64;
            let current = match &node {
                Some((index, node)) if *index == over => Arc::clone(node),
                _ => match self.node_over(chunk).await {
                    Ok((found, _)) => {
                        node = Some((over, Arc::clone(&found)));
                        found
                    }
                    Err(unreadable) => {
                        self.lost(part, &unreadable.id, unreadable.error).await?;
                        continue;
                    }
                },
            };
            let hash = current.child(to_usize(chunk % FANOUT as u64));
            if hash.is_zero() {
                continue;
            }
            pieces.push(Piece {
                levels: self.shape.chunk_levels(),
                at: to_usize(part.offset() - range.offset()),
                len: to_usize(part.len()),
                skip: to_usize(part.offset() % chunk_bytes),
                hash,
                disk_offset: part.offset(),
            });
        }
        Ok(pieces)
    }

    /// Finds the pieces and gathers those that lie side by side; also those that are nowhere.
    async fn batches(&self, pieces: Vec<Piece>) -> Result<(Vec<Batch>, Vec<Piece>)> {
        let mut batches: Vec<Batch> = Vec::new();
        let mut nowhere = Vec::new();
        for piece in pieces {
            let location = match self.blobs.locate(&self.chunk_id(&piece)).await {
                Ok(location) => location,
                Err(error) if self.losses.is_some() && error.kind() == Kind::Corrupt => {
                    nowhere.push(piece);
                    continue;
                }
                Err(error) => return Err(self.at_piece(&piece, error)),
            };
            let neighbour = batches.last_mut().filter(|batch| {
                let (_, last) = &batch.pieces[batch.pieces.len() - 1];
                last.pack.id == location.pack.id
                    && last.offset.checked_add(last.stored_bytes) == Some(location.offset)
            });
            match neighbour {
                Some(batch) => batch.pieces.push((piece, location)),
                None => batches.push(Batch { pieces: vec![(piece, location)] }),
            }
        }
        Ok((batches, nowhere))
    }

    fn chunk_id(&self, piece: &Piece) -> BlobId {
        self.blobs.keys.blob_id(BlobKind::Chunk, &piece.hash)
    }

    /// What has to be read for the window at `offset`, and what no pack that is there is known to
    /// have. Zeroes are in place when it returns; everything else is overwritten.
    async fn find(&self, offset: u64, window: &mut [u8]) -> Result<(VecDeque<Batch>, Vec<Piece>)> {
        let pieces = self.pieces(ByteRange::new(offset, window.len() as u64)).await?;
        // Chunks that are zero are not among the pieces.
        if pieces.iter().map(|piece| piece.len).sum::<usize>() < window.len() {
            window.fill(0);
        }
        let (batches, nowhere) = self.batches(pieces).await?;
        Ok((batches.into(), nowhere))
    }

    fn at_piece(&self, piece: &Piece, error: Error) -> Error {
        self.at_chunk(piece.disk_offset / self.shape.chunk_bytes(), error)
    }

    /// Reads a batch; none when its pack was collected meanwhile.
    async fn fetch(&self, batch: &Batch) -> Result<Option<Vec<u8>>> {
        let (pack, offset, len) = batch.run();
        let sealed = self.blobs.read_run(pack, offset, len).await;
        sealed.map_err(|e| self.at_piece(&batch.pieces[0].0, e))
    }

    /// What opens a batch; none when that is damaged: each piece may have a copy in another pack.
    fn opener(&self, batch: &Batch) -> Result<Option<Arc<Opener>>> {
        match self.blobs.opener(batch.run().0) {
            Ok(opener) => Ok(Some(opener)),
            Err(error) if may_have_another(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Opens a batch and puts its plaintext where it belongs; also the pieces that do not open.
    async fn fill(
        &self,
        batch: Batch,
        mut sealed: Vec<u8>,
        mut buffer: Buffer,
    ) -> Result<(Buffer, Vec<Piece>)> {
        let Some(opener) = self.opener(&batch)? else { return Ok((buffer, batch.into_pieces())) };
        let work = move || {
            let failed = batch.open(&opener, &mut sealed, &mut buffer);
            (buffer, failed)
        };
        self.blobs.workers.run(work).await
    }

    /// Reads a piece from whichever copy of its chunk proves itself.
    async fn salvage(&self, piece: Piece, target: &mut [u8]) -> Result<()> {
        let id = self.chunk_id(&piece);
        let (hash, levels) = (piece.hash, piece.levels);
        let prove = move |copy: &Location, plain: Vec<u8>| prove(copy, plain, &hash, levels);
        let target = &mut target[piece.at..piece.at + piece.len];
        match self.blobs.salvage(&id, prove).await {
            Ok(plain) => copy_part(&plain, &piece, target),
            Err(error) => {
                let range = ByteRange::new(piece.disk_offset, piece.len as u64);
                self.lost(range, &id, error).await?;
                target.fill(0);
            }
        }
        Ok(())
    }
}

/// Opens a chunk, proves it, and copies the part that was asked for. CPU work.
fn decode_piece(
    opener: &Opener,
    location: &Location,
    piece: &Piece,
    sealed: &mut [u8],
    target: &mut [u8],
) -> Result<()> {
    let plain_bytes = blobs::plain_len(location)?;
    // The usual case decodes straight into place: the whole of what is stored is asked for.
    if piece.skip == 0 && plain_bytes == target.len() {
        blobs::open_into(opener, location, sealed, target)?;
        let proven = ContentHash::of_chunk(target, piece.levels) == piece.hash;
        let wrong = "its content is not what its tree says";
        return proven.then_some(()).ok_or_else(|| blobs::damaged(location, wrong));
    }
    let plain = blobs::open(opener, location, sealed)?;
    let plain = prove(location, plain, &piece.hash, piece.levels)?;
    copy_part(&plain, piece, target);
    Ok(())
}

/// The content of a chunk, if it has this hash. CPU work.
pub(super) fn prove(
    location: &Location,
    plain: Vec<u8>,
    hash: &ContentHash,
    levels: u32,
) -> Result<Vec<u8>> {
    if ContentHash::of_chunk(&plain, levels) == *hash {
        return Ok(plain);
    }
    Err(blobs::damaged(location, "its content is not what its tree says"))
}

/// Copies the part of a chunk that was asked for.
fn copy_part(plain: &[u8], piece: &Piece, target: &mut [u8]) {
    // A stored chunk may lack trailing zeroes: the tail of a disk is kept short.
    let stored = plain.get(piece.skip..).unwrap_or_default();
    let len = stored.len().min(target.len());
    target[..len].copy_from_slice(&stored[..len]);
    target[len..].fill(0);
}

#[async_trait]
impl BlockSource for DiskReader {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.stored.size_bytes,
            align_bytes: 1,
            preferred_bytes: self.shape.chunk_bytes(),
            request_bytes_max: REQUEST_BYTES_MAX,
            in_flight: IN_FLIGHT,
        }
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let chunk_bytes = self.shape.chunk_bytes();
        let mut map = ExtentMap::starting_at(range.offset());
        for _ in 0..EXTENT_NODES_MAX {
            if map.end() >= range.end() {
                break;
            }
            let chunk = map.end() / chunk_bytes;
            let until = |chunk: u64| chunk.saturating_mul(chunk_bytes).min(range.end());
            let (node, zero_until) = match self.node_over(chunk).await {
                Ok(found) => found,
                Err(Unreadable { id, error, until_chunk }) => {
                    let lost = ByteRange::between(map.end(), until(until_chunk));
                    self.lost(lost, &id, error).await?;
                    map.push(lost.len(), ExtentKind::Zero);
                    continue;
                }
            };
            if let Some(end) = zero_until {
                map.push(until(end) - map.end(), ExtentKind::Zero);
                continue;
            }
            let first = usize::try_from(chunk % FANOUT as u64).expect("below 256");
            for (slot, number) in (first..FANOUT).zip(chunk..) {
                let end = ((number + 1).saturating_mul(chunk_bytes)).min(range.end());
                if end <= map.end() {
                    break;
                }
                let zero = node.child(slot).is_zero();
                map.push(end - map.end(), if zero { ExtentKind::Zero } else { ExtentKind::Data });
            }
        }
        Ok(map)
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let (mut batches, nowhere) = self.find(offset, &mut buffer).await?;
        for piece in nowhere {
            self.salvage(piece, &mut buffer).await?;
        }
        while let Some(batch) = batches.pop_front() {
            let failed = match self.fetch(&batch).await {
                Ok(Some(sealed)) => {
                    let failed;
                    (buffer, failed) = self.fill(batch, sealed, buffer).await?;
                    failed
                }
                // Ends: a pack that is gone is not located again.
                Ok(None) => {
                    let (found, nowhere) = self.batches(batch.into_pieces()).await?;
                    batches.extend(found);
                    nowhere
                }
                Err(error) if may_have_another(&error) => batch.into_pieces(),
                Err(error) => return Err(error),
            };
            for piece in failed {
                self.salvage(piece, &mut buffer).await?;
            }
        }
        Ok(buffer)
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingRead>> {
        let direct = direct::DirectReader::new(self.clone())?;
        Some(Arc::new(direct))
    }
}
