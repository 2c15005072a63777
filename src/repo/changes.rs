//! What changed between two stored disks, found in their trees.
//!
//! The trees are walked side by side; where two subtrees have the same hash they hold the same
//! bytes, and nothing below them is looked at. The cost follows the changes, not the disks, and
//! neither disk need have been backed up from the other: content is compared, not history.
//!
//! What lies past the end of the older disk counts as changed, also where it is zero: whoever
//! applies the changes to a copy of it has to write there.

use std::sync::Arc;

use async_trait::async_trait;

use super::reader::DiskReader;
use super::tree::Shape;
use crate::block::{BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry};
use crate::error::{Error, Kind, Result};

/// Subtrees that one answer compares.
const COMPARED_MAX: usize = 16 << 10;

/// A disk of a point, opened against that of another: what both hold is Unchanged.
pub struct ChangedDisk {
    disk: Arc<DiskReader>,
    base: Arc<DiskReader>,
}

impl ChangedDisk {
    /// `disk` against `base`, of the same repository.
    pub fn new(disk: Arc<DiskReader>, base: Arc<DiskReader>) -> Result<Self> {
        if disk.shape().chunk_bytes() != base.shape().chunk_bytes() {
            let message = "two stored disks have chunks of different sizes";
            return Err(Error::new(Kind::Unsupported, message));
        }
        Ok(Self { disk, base })
    }

    /// Compares at `chunk`, which both have: what there is, and the first chunk it may not hold for.
    async fn compare(&self, chunk: u64) -> Result<(ExtentKind, u64)> {
        let mut height = self.disk.shape().height().min(self.base.shape().height());
        let mut ours = self.disk.subtree(height, chunk).await?;
        let mut theirs = self.base.subtree(height, chunk).await?;
        loop {
            let below = Shape::chunks_below(height);
            let end = (chunk / below + 1).saturating_mul(below);
            if ours == theirs {
                return Ok((ExtentKind::Unchanged, end));
            }
            if height == 0 {
                let zero = ours.is_zero();
                return Ok((if zero { ExtentKind::Zero } else { ExtentKind::Data }, end));
            }
            ours = self.disk.child(height, &ours, chunk).await?;
            theirs = self.base.child(height, &theirs, chunk).await?;
            height -= 1;
        }
    }
}

#[async_trait]
impl BlockSource for ChangedDisk {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let chunk_bytes = self.disk.shape().chunk_bytes();
        let base_end = self.base.shape().size_bytes();
        let mut map = ExtentMap::starting_at(range.offset());
        for _ in 0..COMPARED_MAX {
            let at = map.end();
            if at >= range.end() {
                break;
            }
            if at >= base_end {
                let rest = self.disk.extents(ByteRange::between(at, range.end())).await?;
                rest.iter().for_each(|extent| map.push(extent.range.len(), extent.kind));
                break;
            }
            let (kind, end) = self.compare(at / chunk_bytes).await?;
            let end = end.saturating_mul(chunk_bytes).min(base_end).min(range.end());
            map.push(end - at, kind);
        }
        Ok(map)
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.disk.read(offset, buffer).await
    }
}
