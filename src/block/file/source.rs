//! Reading a raw file or device.
//!
//! A read first takes what is in the page cache, right where it is polled (`RWF_NOWAIT`, Linux
//! 4.14): no thread is woken for bytes that are a memcpy away. What is missing is read on a
//! blocking thread. Read once ([`Access::Once`]), the pages this brought in are dropped again: a
//! backup must not push the working set of the host out of its cache. Kernel read-ahead is off
//! then (the reader has many requests in flight), so "was not cached" is exact.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use rustix::fs::{Advice, OFlags, fadvise};
use rustix::io::{Errno, ReadWriteFlags};

use super::{Medium, blocking, examine, failed, is_unsupported, open, seek};
use crate::block::{
    BlockSource, BlockingRead, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry, Waited,
};
use crate::error::Result;

/// Requests worth having in flight: what keeps an NVMe device busy.
const IN_FLIGHT: usize = 16;

/// Most extents reported at once: about 1 MiB of map.
const EXTENTS_MAX: usize = 32 * 1024;

/// How often the content will be wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Once, in large requests: the page cache is left as it was found.
    Once,
    /// Again and again: what was read stays cached, and the kernel reads ahead.
    Repeated,
}

/// A raw file or block device, read-only.
#[derive(Debug)]
pub struct FileSource {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    name: String,
    size_bytes: u64,
    medium: Medium,
    access: Access,
    /// Cleared when the file system does not know `RWF_NOWAIT`.
    try_cache: AtomicBool,
}

impl FileSource {
    /// Opens `path` for reading.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        let (file, medium, size_bytes) =
            open(path, OpenOptions::new().read(true), OFlags::empty())?;
        Ok(Self::new(file, path, (medium, size_bytes), access))
    }

    /// Reads through a file that is open already (and perhaps locked); `path` names it in errors.
    pub fn from_file(file: File, path: &Path, access: Access) -> Result<Self> {
        let examined = examine(&file, path)?;
        Ok(Self::new(file, path, examined, access))
    }

    fn new(file: File, path: &Path, (medium, size_bytes): (Medium, u64), access: Access) -> Self {
        if access == Access::Once {
            // Advice: a refusal changes nothing but speed.
            let _ = fadvise(&file, 0, None, Advice::Random);
        }
        let name = path.display().to_string();
        let try_cache = AtomicBool::new(true);
        Self { inner: Arc::new(Inner { file, name, size_bytes, medium, access, try_cache }) }
    }
}

#[async_trait]
impl BlockSource for FileSource {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.inner.size_bytes,
            align_bytes: 1,
            preferred_bytes: 4096,
            request_bytes_max: 32 << 20,
            in_flight: IN_FLIGHT,
        }
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        // Devices have no holes to ask for (blkdev_llseek knows no SEEK_DATA).
        if self.inner.medium == Medium::Device {
            return Ok(ExtentMap::uniform(range, ExtentKind::Data));
        }
        let inner = Arc::clone(&self.inner);
        blocking(move || inner.extents(range)).await
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let done = self.inner.read_cached(offset, &mut buffer);
        if done == buffer.len() {
            return Ok(buffer);
        }
        let inner = Arc::clone(&self.inner);
        blocking(move || {
            inner.read(offset + done as u64, &mut buffer[done..])?;
            Ok(buffer)
        })
        .await
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingRead>> {
        Some(self.inner.clone())
    }
}

/// Fills as much of `bytes` as the page cache holds of a file, from the front; how much that was, and
/// whether the file system tells.
pub fn read_cached(file: &File, offset: u64, bytes: &mut [u8]) -> (usize, bool) {
    let mut done = 0;
    while done < bytes.len() {
        let mut rest = [IoSliceMut::new(&mut bytes[done..])];
        let at = offset + done as u64;
        match rustix::io::preadv2(file, &mut rest, at, ReadWriteFlags::NOWAIT) {
            // The end of the file is for the blocking read to report.
            Ok(0) | Err(Errno::AGAIN) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            // A real error comes back in the blocking read, with nothing lost.
            Err(error) => return (done, !is_unsupported(error)),
        }
    }
    (done, true)
}

impl BlockingRead for Inner {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<Waited> {
        let done = self.read_cached(offset, bytes);
        if done == bytes.len() {
            return Ok(Waited::No);
        }
        self.read(offset + done as u64, &mut bytes[done..])?;
        Ok(Waited::ForDisk)
    }
}

impl Inner {
    /// Fills as much of `bytes` as the page cache holds, from the front.
    fn read_cached(&self, offset: u64, bytes: &mut [u8]) -> usize {
        if !self.try_cache.load(Ordering::Relaxed) {
            return 0;
        }
        let (done, known) = read_cached(&self.file, offset, bytes);
        self.try_cache.store(known, Ordering::Relaxed);
        done
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let len = bytes.len() as u64;
        self.file.read_exact_at(bytes, offset).map_err(|e| {
            failed(format_args!("read {}", ByteRange::new(offset, len)), &self.name, e)
        })?;
        if self.access == Access::Once {
            let _ = fadvise(&self.file, offset, NonZeroU64::new(len), Advice::DontNeed);
        }
        Ok(())
    }

    /// Walks data and holes. A file system that does not know holes reports one piece of data.
    fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let mut map = ExtentMap::starting_at(range.offset());
        while map.end() < range.end() && map.count() < EXTENTS_MAX {
            let at = map.end();
            let Some(data) = self.seek(rustix::fs::SeekFrom::Data(at), at)? else {
                map.push(range.end() - at, ExtentKind::Zero);
                break;
            };
            let data = data.clamp(at, range.end());
            map.push(data - at, ExtentKind::Zero);
            if data < range.end() {
                let hole = self.seek(rustix::fs::SeekFrom::Hole(data), data)?;
                let hole = hole.unwrap_or(range.end()).min(range.end());
                // A hole that begins where data begins would be no progress: read it as data.
                let hole = if hole <= data { range.end() } else { hole };
                map.push(hole - data, ExtentKind::Data);
            }
        }
        Ok(map)
    }

    /// [`seek`], from `at`: no data or hole behind it, unless the file ends there. Then it shrank,
    /// and a hole it is not.
    fn seek(&self, to: rustix::fs::SeekFrom, at: u64) -> Result<Option<u64>> {
        let failed = |error: io::Error| failed(format_args!("map byte {at}"), &self.name, error);
        let found = seek(&self.file, to).map_err(|error| failed(error.into()))?;
        if found.is_none() && self.len()? < self.size_bytes {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(found)
    }

    fn len(&self) -> Result<u64> {
        self.file.metadata().map(|m| m.len()).map_err(|e| failed("read the size", &self.name, e))
    }
}
