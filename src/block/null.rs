//! A sink that keeps nothing: how fast is a source, can all of it be read?

use std::sync::Arc;

use async_trait::async_trait;

use super::{BlockSink, BlockingWrite, Buffer, ByteRange, Geometry, ZeroMode};
use crate::error::{Error, Kind, Result};

/// Takes everything and drops it.
#[derive(Clone, Copy, Debug)]
pub struct NullSink {
    size_bytes: u64,
}

impl NullSink {
    /// A sink for `size_bytes`.
    pub fn new(size_bytes: u64) -> Self {
        Self { size_bytes }
    }
}

#[async_trait]
impl BlockSink for NullSink {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            align_bytes: 1,
            preferred_bytes: 4096,
            request_bytes_max: 32 << 20,
            in_flight: 1,
        }
    }

    fn starts_zero(&self) -> bool {
        true
    }

    async fn write(&self, _offset: u64, _buffer: Buffer) -> Result<()> {
        Ok(())
    }

    async fn zero(&self, _range: ByteRange, _mode: ZeroMode) -> Result<()> {
        Ok(())
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        Err(Error::new(Kind::Unsupported, format!("nothing has no base to keep {range} from")))
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    fn blocking_sink(&self) -> Option<Arc<dyn BlockingWrite>> {
        Some(Arc::new(*self))
    }
}

impl BlockingWrite for NullSink {
    fn write_at(&self, _offset: u64, _bytes: &[u8]) -> Result<()> {
        Ok(())
    }

    fn zero_at(&self, _range: ByteRange, _mode: ZeroMode) -> Result<()> {
        Ok(())
    }
}
