//! A disk between the server and another one, which remembers what it was told.

use std::sync::Mutex;

use vmbackup::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode};
use vmbackup::error::{Error, Kind, Result};

/// A disk that writes down what it is told, and has no fast way to make zeroes.
pub struct Witness<D> {
    disk: D,
    seen: Mutex<Vec<Seen>>,
}

/// What it was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    Read(ByteRange),
    Write(ByteRange),
    Zero(ByteRange, ZeroMode),
    Flush,
}

impl<D> Witness<D> {
    pub fn of(disk: D) -> Self {
        Self { disk, seen: Mutex::default() }
    }

    fn saw(&self, seen: Seen) {
        self.seen.lock().unwrap().push(seen);
    }

    /// What it was told since it was asked last.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }
}

#[async_trait::async_trait]
impl<D: BlockSource> BlockSource for Witness<D> {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&self.disk)
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.disk.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.saw(Seen::Read(ByteRange::new(offset, buffer.len() as u64)));
        self.disk.read(offset, buffer).await
    }
}

#[async_trait::async_trait]
impl<D: BlockSink> BlockSink for Witness<D> {
    fn geometry(&self) -> Geometry {
        BlockSink::geometry(&self.disk)
    }

    fn can_zero(&self) -> bool {
        true
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.saw(Seen::Write(ByteRange::new(offset, buffer.len() as u64)));
        self.disk.write(offset, buffer).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.saw(Seen::Zero(range, mode));
        if mode == ZeroMode::FastOnly {
            return Err(Error::new(Kind::Unsupported, "zeroes are not fast here"));
        }
        self.disk.zero(range, mode).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.disk.keep(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.saw(Seen::Flush);
        self.disk.flush().await
    }
}
