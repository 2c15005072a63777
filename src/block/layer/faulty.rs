//! A disk that fails on purpose: for tests and simulation, never in the way of real data.
//!
//! A fault sits at a byte of the disk. Any request that touches it fails with [`Kind::Io`]; a
//! *torn* write stores the bytes before it first, as a power cut does.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode};
use crate::error::{Error, Kind, Result};

/// What goes wrong, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Reads of this byte fail.
    pub read_at: Option<u64>,
    /// Questions about the extents of this byte fail.
    pub extents_at: Option<u64>,
    /// Writes, zeroes and keeps of this byte fail.
    pub write_at: Option<u64>,
    /// Writes over this byte store what lies before it, then fail.
    pub torn_at: Option<u64>,
    /// Flushes fail.
    pub flush: bool,
    /// Every request takes this much longer.
    pub delay: Duration,
}

impl Faults {
    async fn check(&self, fault: Option<u64>, range: ByteRange, what: &str) -> Result<()> {
        if !self.delay.is_zero() {
            tokio::time::sleep(self.delay).await;
        }
        match fault.filter(|at| range.contains(ByteRange::new(*at, 1))) {
            Some(at) => Err(Error::new(Kind::Io, format!("{what} fails at byte {at} on purpose"))),
            None => Ok(()),
        }
    }
}

/// A source with faults.
pub struct FaultySource {
    inner: Arc<dyn BlockSource>,
    faults: Faults,
}

impl FaultySource {
    /// Adds `faults` to `inner`.
    pub fn new(inner: Arc<dyn BlockSource>, faults: Faults) -> Self {
        Self { inner, faults }
    }
}

#[async_trait]
impl BlockSource for FaultySource {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let map = self.inner.extents(range).await?;
        self.faults.check(self.faults.extents_at, map.range(), "extents").await?;
        Ok(map)
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.faults.check(self.faults.read_at, range, "read").await?;
        self.inner.read(offset, buffer).await
    }
}

/// A sink with faults.
pub struct FaultySink {
    inner: Arc<dyn BlockSink>,
    faults: Faults,
}

impl FaultySink {
    /// Adds `faults` to `inner`.
    pub fn new(inner: Arc<dyn BlockSink>, faults: Faults) -> Self {
        Self { inner, faults }
    }
}

#[async_trait]
impl BlockSink for FaultySink {
    fn geometry(&self) -> Geometry {
        self.inner.geometry()
    }

    fn starts_zero(&self) -> bool {
        self.inner.starts_zero()
    }

    fn can_zero(&self) -> bool {
        self.inner.can_zero()
    }

    async fn existing(&self, range: ByteRange) -> Result<ExtentMap> {
        self.inner.existing(range).await
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.faults.check(self.faults.write_at, range, "write").await?;
        let torn = self.faults.check(self.faults.torn_at, range, "write").await;
        let (Err(error), Some(at)) = (torn, self.faults.torn_at) else {
            return self.inner.write(offset, buffer).await;
        };
        let before = usize::try_from(at - offset).unwrap_or(0);
        self.inner.write(offset, Buffer::unbudgeted(buffer[..before].to_vec())).await?;
        Err(error)
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.faults.check(self.faults.write_at, range, "zero").await?;
        self.inner.zero(range, mode).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.faults.check(self.faults.write_at, range, "keep").await?;
        self.inner.keep(range).await
    }

    async fn flush(&self) -> Result<()> {
        if self.faults.flush {
            return Err(Error::new(Kind::Io, "flush fails on purpose"));
        }
        self.inner.flush().await
    }
}
