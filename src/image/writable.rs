//! A raw image that is written in place while others are kept out.
//!
//! Raw only: a program that is killed while it writes another format may leave an image that nobody
//! can open, a raw one is always what was written last.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;

use super::ImageLock;
use crate::block::file::{FileDisk, blocking};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode};
use crate::error::Result;

/// An open raw image, locked in the way QEMU understands.
#[derive(Debug)]
pub struct WritableImage {
    disk: Arc<FileDisk>,
    lock: Arc<ImageLock>,
}

impl WritableImage {
    /// Opens and locks it; [`Kind::Busy`](crate::error::Kind::Busy) if someone uses it.
    pub fn open(path: &Path) -> Result<Self> {
        let lock = Arc::new(ImageLock::acquire_to_write(path)?);
        Ok(Self { disk: Arc::new(FileDisk::open(path)?), lock })
    }

    /// The same image, as large as it is now, if that is more than `size_bytes`: somebody has made
    /// it larger (`truncate`, a volume that was extended). This one goes on with the size it has.
    /// Cancel-safe.
    pub async fn grown(&self, size_bytes: u64) -> Result<Option<Self>> {
        let disk = Arc::clone(&self.disk);
        let grown = blocking(move || disk.grown(size_bytes)).await?;
        let lock = Arc::clone(&self.lock);
        Ok(grown.map(|disk| Self { disk: Arc::new(disk), lock }))
    }
}

#[async_trait]
impl BlockSource for WritableImage {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&*self.disk)
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.disk.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.disk.read(offset, buffer).await
    }
}

#[async_trait]
impl BlockSink for WritableImage {
    fn geometry(&self) -> Geometry {
        BlockSink::geometry(&*self.disk)
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.disk.write(offset, buffer).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.disk.zero(range, mode).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.disk.keep(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.disk.flush().await
    }
}
