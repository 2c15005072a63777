//! A disk in memory: the fake that lives beside the trait, for tests and simulation.

use std::sync::{Mutex, PoisonError};

use async_trait::async_trait;

use super::{BlockSink, BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry, ZeroMode};
use crate::error::{Error, Kind, Result};

/// Granularity at which zero runs are reported.
const BLOCK_BYTES: u64 = 4096;

/// A disk whose bytes are a vector.
#[derive(Debug)]
pub struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
    /// Ranges written since the base, if the disk was made as a changed successor of one.
    changed: Option<Vec<ByteRange>>,
}

impl MemoryDisk {
    /// A disk of `size_bytes` zeroes.
    pub fn zeroed(size_bytes: usize) -> Self {
        Self::with_content(vec![0; size_bytes])
    }

    /// A disk with this content.
    pub fn with_content(bytes: Vec<u8>) -> Self {
        Self { bytes: Mutex::new(bytes), changed: None }
    }

    /// A disk that reports everything outside `changed` (sorted, disjoint) as Unchanged.
    pub fn changed_since_base(bytes: Vec<u8>, changed: Vec<ByteRange>) -> Self {
        Self { bytes: Mutex::new(bytes), changed: Some(changed) }
    }

    /// A copy of the content.
    pub fn content(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u8>> {
        // Held for a copy only, never across an await.
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn span(range: ByteRange) -> std::ops::Range<usize> {
    let at = |n: u64| usize::try_from(n).expect("a memory disk fits the address space");
    at(range.offset())..at(range.end())
}

#[async_trait]
impl BlockSource for MemoryDisk {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.lock().len() as u64,
            align_bytes: 1,
            preferred_bytes: BLOCK_BYTES,
            request_bytes_max: 32 << 20,
            in_flight: 16,
        }
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let mut map = ExtentMap::starting_at(range.offset());
        let bytes = self.lock();
        for piece in range.pieces(BLOCK_BYTES) {
            let zero = bytes[span(piece)].iter().all(|byte| *byte == 0);
            map.push(piece.len(), if zero { ExtentKind::Zero } else { ExtentKind::Data });
        }
        let Some(changed) = &self.changed else { return Ok(map) };
        let mut runs = Vec::new();
        let mut at = range.offset();
        for change in changed.iter().map(|c| c.intersect(range)).filter(|c| !c.is_empty()) {
            runs.push((change.offset() - at, false));
            runs.push((change.len(), true));
            at = change.end();
        }
        runs.push((range.end() - at, false));
        Ok(map.masked(runs))
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        buffer.copy_from_slice(&self.lock()[span(range)]);
        Ok(buffer)
    }
}

#[async_trait]
impl BlockSink for MemoryDisk {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(self)
    }

    async fn existing(&self, range: ByteRange) -> Result<ExtentMap> {
        self.extents(range).await
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.lock()[span(range)].copy_from_slice(&buffer);
        Ok(())
    }

    async fn zero(&self, range: ByteRange, _mode: ZeroMode) -> Result<()> {
        self.lock()[span(range)].fill(0);
        Ok(())
    }

    async fn keep(&self, _range: ByteRange) -> Result<()> {
        match self.changed {
            Some(_) => Ok(()),
            None => Err(Error::new(Kind::Unsupported, "a memory disk has no base to keep from")),
        }
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::conformance;

    #[tokio::test]
    async fn memory_disk_conforms() {
        let content = conformance::pattern(300_000);
        conformance::source(&MemoryDisk::with_content(content.clone()), &content).await;
        let disk = MemoryDisk::zeroed(300_000);
        conformance::sink(&disk, || async { disk.content() }).await;
    }
}
