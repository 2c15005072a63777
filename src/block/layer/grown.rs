//! A source that is longer than it is: zeroes follow its end.

use std::sync::Arc;

use async_trait::async_trait;

use crate::block::{BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry};
use crate::error::Result;

/// A source with zeroes behind its end.
pub struct GrownSource {
    inner: Arc<dyn BlockSource>,
    size_bytes: u64,
}

impl GrownSource {
    /// `inner`, grown to `size_bytes`, which must not be less than it has.
    pub fn new(inner: Arc<dyn BlockSource>, size_bytes: u64) -> Self {
        assert!(size_bytes >= inner.geometry().size_bytes, "a source only grows");
        Self { inner, size_bytes }
    }
}

#[async_trait]
impl BlockSource for GrownSource {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: self.size_bytes, ..self.inner.geometry() }
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let front = range.intersect(self.inner.geometry().range());
        if front.is_empty() {
            return Ok(ExtentMap::uniform(range, ExtentKind::Zero));
        }
        self.inner.extents(front).await
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        let front = range.intersect(self.inner.geometry().range());
        if front == range {
            return self.inner.read(offset, buffer).await;
        }
        let len = usize::try_from(front.len()).expect("a request is a few MiB");
        if len > 0 {
            let part = self.inner.read(offset, Buffer::unbudgeted(vec![0; len])).await?;
            buffer[..len].copy_from_slice(&part);
        }
        buffer[len..].fill(0);
        Ok(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::conformance;
    use crate::block::memory::MemoryDisk;

    #[tokio::test]
    async fn zeroes_follow_the_end() {
        let mut content = conformance::pattern((1 << 20) + 777);
        let disk = Arc::new(MemoryDisk::with_content(content.clone()));
        content.resize((2 << 20) + 5, 0);
        conformance::source(&GrownSource::new(disk, content.len() as u64), &content).await;
    }
}
