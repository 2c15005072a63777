//! A writable disk on top of one that cannot be written: what is written goes to a scratch file,
//! the base stays as it is.
//!
//! ```text
//!  read  ─► block written? ─ yes ─► scratch file
//!                          └ no ──► base
//!  write ─► scratch file ─► mark the blocks        (part of a block: the rest is copied up first)
//! ```
//!
//! The scratch file is sparse and as long as the disk. Which blocks were written is a bitmap in
//! memory; a kept overlay ([`Overlay::kept`]) has it in the file, too (`layout.rs`).
//!
//! A disk may be larger than its base: zeroes follow the end of the base. An overlay that is kept
//! remembers its size, and can grow, also while it is in use: an [`Overlay`] is a view of one size,
//! and [`Overlay::grown`] makes another view of the same disk. Both see what either writes.
//!
//! Order of a flush (*a block that the file calls written holds what was written*): the changed
//! parts of the bitmap are remembered, data made durable, the remembered parts written, made
//! durable. After a crash the overlay is what it was at the last flush, plus perhaps later writes
//! to blocks that were written before, which is what any disk with a write cache is.
//!
//! A block is marked after its data is in the file, and copying up takes turns with all other
//! writes, so a read that comes in between gets the old or the new bytes and never others'.

mod bitmap;
mod file;
mod growing;
mod layout;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::{Mutex, RwLock};

use super::file::{FileDisk, blocking};
use super::layer::grown::GrownSource;
use super::{BlockSink, BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry, ZeroMode};
use crate::error::{Error, Kind, Result};
use bitmap::{BLOCK_BYTES, Bitmap};
use file::{Kept, Size, Wish};
use layout::HEADER_BYTES;

/// Runs that one answer about what was written has.
const RUNS_MAX: usize = 1024;

/// Most bytes of one request.
const REQUEST_BYTES_MAX: u64 = 4 << 20;

/// A base with a writable layer, of one size.
pub struct Overlay {
    /// With zeroes behind its end, where the disk is larger.
    base: Arc<dyn BlockSource>,
    scratch: Scratch,
    layer: Arc<Layer>,
}

/// The writable layer, whatever its size.
struct Layer {
    /// As it was given.
    base: Arc<dyn BlockSource>,
    written: Bitmap,
    /// Copying up excludes all writes; whole blocks are written side by side.
    copy_up: RwLock<()>,
    kept: Option<KeptLayer>,
}

/// What is kept of a layer.
struct KeptLayer {
    /// The lock makes flushes and growing take turns.
    file: Mutex<Kept>,
    wish: Arc<Wish>,
}

/// The scratch file: the disk begins at `at`.
struct Scratch {
    disk: FileDisk,
    at: u64,
}

impl Scratch {
    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let range = ByteRange::new(range.offset() + self.at, range.len());
        let told = self.disk.extents(range).await?;
        let mut map = ExtentMap::starting_at(range.offset() - self.at);
        told.iter().for_each(|extent| map.push(extent.range.len(), extent.kind));
        Ok(map)
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.disk.read(offset + self.at, buffer).await
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.disk.write(offset + self.at, buffer).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.disk.zero(ByteRange::new(range.offset() + self.at, range.len()), mode).await
    }
}

impl Overlay {
    /// A layer that is thrown away: its file has no name and goes with it.
    /// `size_bytes` makes the disk larger than its base, with zeroes.
    pub fn temporary(
        base: Arc<dyn BlockSource>,
        size_bytes: Option<u64>,
        directory: &Path,
    ) -> Result<Self> {
        let failed = |e| Error::io(format!("cannot make a file in {}", directory.display()), e);
        let least = base.geometry().size_bytes;
        Size { least, wanted: size_bytes }.check()?;
        let size_bytes = size_bytes.unwrap_or(least);
        let file = tempfile::tempfile_in(directory).map_err(failed)?;
        file.set_len(size_bytes).map_err(failed)?;
        let disk = FileDisk::from_file(file, &directory.join("(scratch)"))?;
        let (written, copy_up) = (Bitmap::new(size_bytes), RwLock::new(()));
        let layer = Layer { base, written, copy_up, kept: None };
        Ok(Self::new(Arc::new(layer), size_bytes, Scratch { disk, at: 0 }))
    }

    /// A layer kept in the file `path`, which is made if it is not there. `identity` says what the
    /// base is; a file that belongs to another base is refused. The disk has `size_bytes`, or what
    /// it had the last time, or what the base has. [`Kind::Busy`] if another process has the file
    /// open: a larger `size_bytes` is left there as a wish then, which the other grants at the next
    /// [`Overlay::grown`], or whoever opens the file next, unless with a `size_bytes` of its own.
    pub fn kept(
        base: Arc<dyn BlockSource>,
        size_bytes: Option<u64>,
        (path, identity): (&Path, &[u8; 32]),
    ) -> Result<Self> {
        let size = Size { least: base.geometry().size_bytes, wanted: size_bytes };
        let (kept, written) = Kept::open(path, size, identity)?;
        let size_bytes = kept.size_bytes();
        let disk = FileDisk::from_file(kept.file()?, path)?;
        let wish = Arc::new(kept.wish());
        let kept = Some(KeptLayer { file: Mutex::new(kept), wish });
        let layer = Layer { base, written, copy_up: RwLock::new(()), kept };
        Ok(Self::new(Arc::new(layer), size_bytes, Scratch { disk, at: HEADER_BYTES }))
    }

    fn new(layer: Arc<Layer>, size_bytes: u64, scratch: Scratch) -> Self {
        let base = Arc::clone(&layer.base);
        let base = if size_bytes == base.geometry().size_bytes {
            base
        } else {
            Arc::new(GrownSource::new(base, size_bytes))
        };
        Self { base, scratch, layer }
    }

    /// The same disk, if it has more than `size_bytes` by now: as many as another process wished
    /// for ([`Overlay::kept`]). Neither is in the way of who reads and writes. Not cancel-safe: let
    /// it end.
    pub async fn grown(&self, size_bytes: u64) -> Result<Option<Self>> {
        let Some(KeptLayer { file, wish }) = &self.layer.kept else { return Ok(None) };
        let wish = Arc::clone(wish);
        let Some(wished) = blocking(move || wish.read()).await? else { return Ok(None) };
        if wished <= size_bytes {
            return Ok(None);
        }
        let mut kept = file.lock().await;
        if wished > kept.size_bytes() {
            kept.grow(wished, &self.layer.written).await?;
        }
        let disk = FileDisk::from_file(kept.file()?, kept.path())?;
        let scratch = Scratch { disk, at: self.scratch.at };
        Ok(Some(Self::new(Arc::clone(&self.layer), kept.size_bytes(), scratch)))
    }

    /// Bytes that were written, in whole blocks.
    pub fn written_bytes(&self) -> u64 {
        self.layer.written.count() * BLOCK_BYTES
    }

    fn range(&self) -> ByteRange {
        self.base.geometry().range()
    }

    /// The block around `at`.
    fn block(&self, at: u64) -> ByteRange {
        ByteRange::new(at / BLOCK_BYTES * BLOCK_BYTES, BLOCK_BYTES).intersect(self.range())
    }

    /// The blocks that `range` covers in part and that nobody wrote yet: at most its ends.
    fn torn(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut torn = Vec::new();
        for at in [range.offset(), range.end() - 1] {
            let block = self.block(at);
            let covered = range.contains(block) || self.layer.written.has(block.offset());
            if !covered && !torn.contains(&block) {
                torn.push(block);
            }
        }
        torn
    }

    /// Does a change of `range` by `change`, which writes to the scratch file, and marks it.
    async fn change<T>(
        &self,
        range: ByteRange,
        change: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        assert!(
            !range.is_empty() && self.range().contains(range),
            "a write past the end: {range:?}"
        );
        let shared = self.layer.copy_up.read().await;
        if self.torn(range).is_empty() {
            let done = change.await?;
            self.layer.written.mark(range);
            return Ok(done);
        }
        drop(shared);
        let _alone = self.layer.copy_up.write().await;
        // Looked at again: another may have written the block meanwhile.
        for block in self.torn(range) {
            let len = usize::try_from(block.len()).expect("4 KiB");
            let buffer = self.base_read(block.offset(), Buffer::unbudgeted(vec![0; len])).await?;
            self.scratch.write(block.offset(), buffer).await?;
            self.layer.written.mark(block);
        }
        let done = change.await?;
        self.layer.written.mark(range);
        Ok(done)
    }

    /// Reads the base, whatever its alignment.
    async fn base_read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        let align_bytes = self.base.geometry().align_bytes;
        let range = ByteRange::new(offset, buffer.len() as u64);
        let wide = range.widen(align_bytes, self.range().end());
        if wide == range {
            return self.base.read(offset, buffer).await;
        }
        let index = |n: u64| usize::try_from(n).expect("a request is a few MiB");
        let all = Buffer::unbudgeted(vec![0; index(wide.len())]);
        let all = self.base.read(wide.offset(), all).await?;
        let from = index(offset - wide.offset());
        let mut buffer = buffer;
        let len = buffer.len();
        buffer.copy_from_slice(&all[from..from + len]);
        Ok(buffer)
    }
}

#[async_trait]
impl BlockSource for Overlay {
    fn geometry(&self) -> Geometry {
        let base = self.base.geometry();
        Geometry {
            align_bytes: 1,
            preferred_bytes: BLOCK_BYTES,
            request_bytes_max: REQUEST_BYTES_MAX.min(base.request_bytes_max),
            ..base
        }
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let mut map = ExtentMap::starting_at(range.offset());
        let (run, written) = self.layer.written.run(range);
        if written {
            let told = self.scratch.extents(run).await?;
            told.iter().for_each(|extent| map.push(extent.range.len(), extent.kind));
        } else {
            for extent in self.base.extents(run).await?.iter() {
                // Unchanged since a base of the base: no answer about this disk.
                let zero = extent.kind == ExtentKind::Zero;
                let kind = if zero { ExtentKind::Zero } else { ExtentKind::Data };
                map.push(extent.range.len(), kind);
            }
        }
        Ok(map)
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let mut rest = ByteRange::new(offset, buffer.len() as u64);
        if rest.is_empty() {
            return Ok(buffer);
        }
        let (run, written) = self.layer.written.run(rest);
        if run == rest {
            return self.read_run(offset, buffer, written).await;
        }
        // Several runs: each into a buffer of its own, because a window is of the whole buffer.
        let mut done = 0;
        while !rest.is_empty() {
            let (run, written) = self.layer.written.run(rest);
            let len = usize::try_from(run.len()).expect("a request is a few MiB");
            let part = Buffer::unbudgeted(vec![0; len]);
            let part = self.read_run(run.offset(), part, written).await?;
            buffer[done..done + len].copy_from_slice(&part);
            done += len;
            rest = ByteRange::between(run.end(), rest.end());
        }
        Ok(buffer)
    }
}

impl Overlay {
    async fn read_run(&self, offset: u64, buffer: Buffer, written: bool) -> Result<Buffer> {
        if written {
            self.scratch.read(offset, buffer).await
        } else {
            self.base_read(offset, buffer).await
        }
    }
}

/// What was written to an overlay, without its base: everything else is Unchanged.
pub struct Written(Arc<Overlay>);

impl Written {
    /// The upper layer of `overlay`.
    pub fn of(overlay: Arc<Overlay>) -> Self {
        Self(overlay)
    }
}

#[async_trait]
impl BlockSource for Written {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&*self.0)
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let mut map = ExtentMap::starting_at(range.offset());
        while map.end() < range.end() && map.count() < RUNS_MAX {
            let (run, written) =
                self.0.layer.written.run(ByteRange::between(map.end(), range.end()));
            map.push(run.len(), if written { ExtentKind::Data } else { ExtentKind::Unchanged });
        }
        Ok(map)
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.0.read(offset, buffer).await
    }
}

#[async_trait]
impl BlockSink for Overlay {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(self)
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.change(range, self.scratch.write(offset, buffer)).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.change(range, self.scratch.zero(range, mode)).await
    }

    async fn keep(&self, _range: ByteRange) -> Result<()> {
        // What is not written is kept; but who copies onto a layer wants all of a disk in it.
        Err(Error::new(Kind::Unsupported, "a served disk is no base to keep anything from"))
    }

    async fn flush(&self) -> Result<()> {
        let scratch = &self.scratch.disk;
        let Some(KeptLayer { file, .. }) = &self.layer.kept else { return scratch.flush().await };
        let kept = file.lock().await;
        kept.check()?;
        let changed = self.layer.written.take_changed();
        let result = async {
            scratch.flush().await?;
            if changed.is_empty() {
                return Ok(());
            }
            kept.store(&changed).await?;
            scratch.flush().await
        };
        let result = result.await;
        if result.is_err() {
            // The next flush must not believe that these are stored.
            self.layer.written.give_back_changed(&changed);
        }
        result
    }
}
