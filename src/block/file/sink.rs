//! Writing a raw file or device.
//!
//! Writes to one file take turns in the kernel (the inode's lock), so a sink has two threads of its
//! own: one copies into the page cache while the other waits its turn. Write-back starts as soon as
//! the writers have moved on, so the final sync finds little left to do; what has reached the disk
//! leaves the page cache, which belongs to the host's guests and not to a restore. One call does
//! both: `POSIX_FADV_DONTNEED` begins asynchronous write-back of dirty pages and drops clean ones
//! (Linux `mm/fadvise.c`). Devices are written past the cache. Files are not: a direct write into a
//! hole holds ext4's inode lock until the disk has it, so that the disk waits for the writers and they
//! for it (measured: a restore took half as long again).

use std::fs::{File, OpenOptions};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use rustix::fs::{
    Access as AccessMode, Advice, FallocateFlags, OFlags, access, fadvise, fallocate, fdatasync,
};

use super::bypass::{Bypass, Gather};
use super::{Access, FileSource, Medium, blocking, examine, failed, is_unsupported, open};
use crate::block::{
    BlockSink, BlockSource, BlockingWrite, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode,
};
use crate::error::{Error, Kind, Result};
use crate::units::{ByteSize, MIB};
use crate::workers::Workers;

/// See the module head.
const THREADS: usize = 2;

/// Requests worth having in flight: the threads and their queue.
const IN_FLIGHT: usize = 8;

/// Write-back is started in windows of this size: large enough for one seek not to matter, small
/// enough to leave little for the end.
const WRITEBACK_BYTES: u64 = 8 * MIB;

/// A window is dropped from the cache when the writers are this many past it: by then it is clean.
const DROP_WINDOWS: u64 = 8;

/// Zeroing calls of devices work on whole logical blocks and drop whole pages of their cache; 4 KiB
/// is the largest of both on the machines we run on.
const ZERO_ALIGN_BYTES: u64 = 4096;

/// What a file without a size may grow to: the largest that can be written (`loff_t`).
const SIZE_BYTES_MAX: u64 = i64::MAX.cast_unsigned();

/// Literal zeroes are written in pieces of this size.
const ZEROES_BYTES: usize = 1 << 20;

/// A file or block device of the disk's size, writable.
#[derive(Debug)]
pub struct FileSink {
    inner: Arc<Inner>,
    starts_zero: bool,
    threads: Workers,
}

#[derive(Debug)]
struct Inner {
    file: File,
    name: String,
    size_bytes: u64,
    medium: Medium,
    access: Access,
    bypass: Option<Bypass>,
    /// The window being written; those behind it are on their way to the disk.
    frontier: AtomicU64,
    /// Whether no sync failed so far. Held during each: of two at a time only one would be told.
    sound: Mutex<bool>,
}

impl FileSink {
    /// Opens an existing block device or file, the first `size_bytes` of which are to be overwritten
    /// in place. It must have them; what it has beyond stays as it is, as `dd` and `qemu-img convert
    /// -n` leave it: volumes are made of extents and rarely as large as a disk. A device that is
    /// mounted or otherwise claimed is refused (`O_EXCL`, open(2)).
    pub fn open(path: &Path, size_bytes: u64) -> Result<Self> {
        let mut sink = Self::open_any(path)?;
        check_size(path, sink.inner.size_bytes, size_bytes)?;
        if let Some(inner) = Arc::get_mut(&mut sink.inner) {
            inner.size_bytes = size_bytes;
            if inner.medium == Medium::Device {
                inner.bypass = Bypass::of(&inner.file);
            }
        }
        Ok(sink)
    }

    /// Bytes of the file or device: more than are written where it is larger than the disk.
    pub fn whole_bytes(&self) -> Result<u64> {
        Ok(examine(&self.inner.file, Path::new(&self.inner.name))?.1)
    }

    /// Fails where [`FileSink::open`] would. Opens it for reading only and changes nothing.
    pub fn probe(path: &Path, size_bytes: u64) -> Result<()> {
        let flags = exclusive(path)?;
        let (_, _, found) = open(path, OpenOptions::new().read(true), flags)?;
        check_size(path, found, size_bytes)?;
        access(path, AccessMode::READ_OK | AccessMode::WRITE_OK)
            .map_err(|e| Error::open(path, e.into()))
    }

    /// The same, whatever its size, through the page cache.
    pub fn open_any(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let (file, medium, size_bytes) = open(path, &mut options, exclusive(path)?)?;
        Self::new((file, path), (medium, size_bytes), Access::Once)
    }

    pub(super) fn handle(&self) -> std::io::Result<File> {
        self.inner.file.try_clone()
    }

    pub(super) fn set_len(&self, size_bytes: u64) -> Result<()> {
        let failed = |e| Error::io(format!("cannot size {}", self.inner.name), e);
        self.inner.file.set_len(size_bytes).map_err(failed)
    }

    /// What was written, as a source; nothing else is to write meanwhile.
    pub fn reader(&self) -> Result<FileSource> {
        let Inner { file, name, .. } = &*self.inner;
        let file = file.try_clone().map_err(|e| Error::io(format!("cannot open {name}"), e))?;
        FileSource::from_file(file, Path::new(name), Access::Repeated)
    }

    /// A sink on a file just made: empty, all hole. Without a size it grows as it is written.
    pub(super) fn on_new(file: File, path: &Path, size_bytes: Option<u64>) -> Result<Self> {
        if let Some(size_bytes) = size_bytes {
            let failed = |e| Error::io(format!("cannot size {}", path.display()), e);
            file.set_len(size_bytes).map_err(failed)?;
        }
        let size_bytes = size_bytes.unwrap_or(SIZE_BYTES_MAX);
        let sink = Self::new((file, path), (Medium::File, size_bytes), Access::Once)?;
        Ok(Self { starts_zero: true, ..sink })
    }

    /// A sink on a file that is open for writing and will be written and read again and again: what
    /// is written stays cached.
    pub(super) fn repeated(file: File, path: &Path) -> Result<Self> {
        let examined = examine(&file, path)?;
        Self::new((file, path), examined, Access::Repeated)
    }

    fn new(
        (file, path): (File, &Path),
        (medium, size_bytes): (Medium, u64),
        access: Access,
    ) -> Result<Self> {
        let (name, frontier) = (path.display().to_string(), AtomicU64::new(0));
        let sound = Mutex::new(true);
        let inner = Inner { file, name, size_bytes, medium, access, bypass: None, frontier, sound };
        let threads = Workers::new(THREADS)?;
        Ok(Self { inner: Arc::new(inner), starts_zero: false, threads })
    }
}

/// What keeps a block device that is mounted or held by a volume group from being opened (open(2)).
fn exclusive(path: &Path) -> Result<OFlags> {
    let data = std::fs::metadata(path);
    let data = data.map_err(|e| Error::open(path, e))?;
    Ok(if data.file_type().is_block_device() { OFlags::EXCL } else { OFlags::empty() })
}

fn check_size(path: &Path, found: u64, size_bytes: u64) -> Result<()> {
    if found >= size_bytes {
        return Ok(());
    }
    let message = format!(
        "{} has {found} bytes ({}), the disk has {size_bytes} ({})",
        path.display(),
        ByteSize(found),
        ByteSize(size_bytes)
    );
    let hint = format!("it must have at least {size_bytes} bytes");
    Err(Error::new(Kind::Usage, message).hint(hint))
}

#[async_trait]
impl BlockSink for FileSink {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.inner.size_bytes,
            align_bytes: 1,
            preferred_bytes: 4096,
            request_bytes_max: 32 << 20,
            in_flight: IN_FLIGHT,
        }
    }

    fn starts_zero(&self) -> bool {
        self.starts_zero
    }

    async fn existing(&self, range: ByteRange) -> Result<ExtentMap> {
        self.reader()?.extents(range).await
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        let inner = Arc::clone(&self.inner);
        self.threads.run(move || inner.write(offset, &buffer)).await??;
        if let Some((from, to)) = self.inner.left_behind(offset) {
            let inner = Arc::clone(&self.inner);
            // Detached on purpose: advice, whose failure the final sync makes good.
            drop(tokio::task::spawn_blocking(move || inner.write_back(from, to)));
        }
        Ok(())
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let inner = Arc::clone(&self.inner);
        self.threads.run(move || inner.zero(range, mode)).await?
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        let message = format!("{} has no base to keep {range} from", self.inner.name);
        Err(Error::new(Kind::Unsupported, message))
    }

    async fn flush(&self) -> Result<()> {
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.sync()).await
    }

    fn blocking_sink(&self) -> Option<Arc<dyn BlockingWrite>> {
        Some(self.inner.clone())
    }
}

impl BlockingWrite for Inner {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.write(offset, bytes)?;
        if let Some((from, to)) = self.left_behind(offset) {
            self.write_back(from, to);
        }
        Ok(())
    }

    fn zero_at(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.zero(range, mode)
    }

    fn waits(&self) -> bool {
        self.bypass.as_ref().is_some_and(Bypass::works)
    }
}

impl Inner {
    /// The windows well behind the write at `offset` that are to be written back now, if any.
    fn left_behind(&self, offset: u64) -> Option<(u64, u64)> {
        if self.access == Access::Repeated || self.bypass.as_ref().is_some_and(Bypass::works) {
            return None;
        }
        let window = offset / WRITEBACK_BYTES;
        let before = self.frontier.fetch_max(window, Ordering::Relaxed);
        // The window just left may have writes in flight: it goes with the next step.
        let (from, to) = (before.saturating_sub(1), window.saturating_sub(1));
        (from < to).then_some((from, to))
    }

    /// Starts the write-back of these windows, and drops those that are clean by now.
    fn write_back(&self, from: u64, to: u64) {
        let dropped = (from.saturating_sub(DROP_WINDOWS), to.saturating_sub(DROP_WINDOWS));
        for (from, to) in [(from, to), dropped] {
            if let Some(len) = NonZeroU64::new((to - from) * WRITEBACK_BYTES) {
                let _ = fadvise(&self.file, from * WRITEBACK_BYTES, Some(len), Advice::DontNeed);
            }
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let range = ByteRange::new(offset, bytes.len() as u64);
        assert!(range.end() <= self.size_bytes, "a write past the end of the disk: {range:?}");
        let failed = |e| failed(format_args!("write {range}"), &self.name, e);
        let past_cache = match &self.bypass {
            Some(bypass) => bypass.write_at(bytes, offset).map_err(failed)?,
            None => 0,
        };
        self.file.write_all_at(&bytes[past_cache..], offset + past_cache as u64).map_err(failed)
    }

    /// Makes what was written durable. The system tells of writes that it lost once, whoever's they
    /// were, and takes the pages for clean (fsync(2)): after that no sync is believed, as in QEMU
    /// (`raw_co_flush`, block/file-posix.c).
    fn sync(&self) -> Result<()> {
        let mut sound = self.sound.lock().unwrap_or_else(PoisonError::into_inner);
        if !*sound {
            let name = &self.name;
            let message = format!("what was written to {name} may be lost: a sync of it failed");
            return Err(Error::new(Kind::Io, message)
                .hint("look at the system's log, and open it anew when its file system is sound"));
        }
        let synced = fdatasync(&self.file);
        *sound = synced.is_ok();
        synced.map_err(|e| failed("sync data", &self.name, e))
    }

    /// Zeroes by the cheapest call that exists, the edges of odd ranges on devices by writing.
    fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        assert!(range.end() <= self.size_bytes, "zeroes past the end of the disk: {range:?}");
        let core = match self.medium {
            Medium::File => range,
            Medium::Device => inner_pages(range),
        };
        if core.is_empty() || !self.try_zero(core, mode)? {
            if mode == ZeroMode::FastOnly {
                let message = format!("{} has no fast way to zero {range}", self.name);
                return Err(Error::new(Kind::Unsupported, message));
            }
            return self.write_zeroes(range);
        }
        self.write_zeroes(ByteRange::between(range.offset(), core.offset()))?;
        self.write_zeroes(ByteRange::between(core.end(), range.end()))
    }

    /// Tries the calls that fit `mode`, best first; `false` when none exists here. On devices a
    /// punched hole is "write zeroes, may unmap", not a discard (Linux `blkdev_fallocate`).
    fn try_zero(&self, range: ByteRange, mode: ZeroMode) -> Result<bool> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let ways: &[_] = match (mode, self.medium) {
            (ZeroMode::Sparse, _) => &[punch, zero],
            // On devices ZERO_RANGE may mean that the kernel writes zeroes, on files it allocates
            // what may be written anyway.
            (ZeroMode::FastOnly, _) => &[punch],
            (ZeroMode::Allocated, _) => &[zero],
        };
        for flags in ways {
            match fallocate(&self.file, *flags, range.offset(), range.len()) {
                Ok(()) => return Ok(true),
                Err(error) if is_unsupported(error) => {}
                Err(error) => return Err(failed(format_args!("zero {range}"), &self.name, error)),
            }
        }
        Ok(false)
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mut zeroes = Gather::new(ZEROES_BYTES);
        zeroes.fill(&vec![0; ZEROES_BYTES]);
        for piece in range.pieces(ZEROES_BYTES as u64) {
            let len = usize::try_from(piece.len()).expect("a piece is at most 1 MiB");
            self.write(piece.offset(), &zeroes.bytes()[..len])?;
        }
        Ok(())
    }
}

/// The whole pages within `range`; empty when there are none.
fn inner_pages(range: ByteRange) -> ByteRange {
    let start = range.offset().next_multiple_of(ZERO_ALIGN_BYTES);
    let end = range.end() - range.end() % ZERO_ALIGN_BYTES;
    ByteRange::between(start.min(range.end()), end.max(start.min(range.end())))
}
