//! A raw image that is written in place while others are kept out.
//!
//! Raw only: a program that is killed while it writes another format may leave an image that nobody
//! can open, a raw one is always what was written last.

use std::path::Path;

use async_trait::async_trait;

use super::ImageLock;
use crate::block::file::FileDisk;
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode};
use crate::error::Result;

/// An open raw image, locked in the way QEMU understands.
#[derive(Debug)]
pub struct WritableImage {
    disk: FileDisk,
    _lock: ImageLock,
}

impl WritableImage {
    /// Opens and locks it; [`Kind::Busy`](crate::error::Kind::Busy) if someone uses it.
    pub fn open(path: &Path) -> Result<Self> {
        let lock = ImageLock::acquire_to_write(path)?;
        Ok(Self { disk: FileDisk::open(path)?, _lock: lock })
    }
}

#[async_trait]
impl BlockSource for WritableImage {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&self.disk)
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
        BlockSink::geometry(&self.disk)
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
