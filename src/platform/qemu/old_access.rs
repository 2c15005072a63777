//! The instant of a QEMU that is only right about one cluster of it at a time.
//!
//! Before 8.0, `snapshot-access` takes a range of which the beginning was copied to scratch, and
//! the rest was not, for one of the live disk altogether: what the guest wrote since would be read
//! as the instant, and a range that it zeroed be told to be zero ("hbitmap: fix hbitmap_status()
//! return value for first dirty bit case", a4d5224c2c; seen with 7.2.22, which Debian 12 has). A
//! range within one cluster is copied as a whole or not at all, and right. So reads end at the
//! borders of clusters, and nothing is believed to be zero.

use std::sync::Arc;

use async_trait::async_trait;
use qmp::Monitor;

use crate::block::{BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry};
use crate::error::Result;

/// Smallest cluster of a backup job and of `copy-before-write` (`BLOCK_COPY_CLUSTER_SIZE_DEFAULT`,
/// block/block-copy.c); larger ones are multiples of it.
pub(super) const CLUSTER_BYTES: u64 = 64 << 10;

/// The first version that tells the two apart.
const RIGHT_SINCE: (u64, u64) = (8, 0);

/// The instant, as it can be read from this QEMU.
pub(super) fn readable(monitor: &Monitor, instant: Arc<dyn BlockSource>) -> Arc<dyn BlockSource> {
    let right = is_right(monitor.greeting().version.number);
    if right { instant } else { Arc::new(Careful { instant }) }
}

/// Whether a QEMU of this version is right about any range.
fn is_right((major, minor, _): (u64, u64, u64)) -> bool {
    (major, minor) >= RIGHT_SINCE
}

struct Careful {
    instant: Arc<dyn BlockSource>,
}

#[async_trait]
impl BlockSource for Careful {
    fn geometry(&self) -> Geometry {
        let told = self.instant.geometry();
        Geometry { request_bytes_max: told.request_bytes_max.min(CLUSTER_BYTES), ..told }
    }

    /// Which ranges are Unchanged is told by a bitmap of QEMU's, not by the instant.
    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let told = self.instant.extents(range).await?;
        let mut map = ExtentMap::starting_at(told.start());
        for extent in told.iter() {
            let kind = match extent.kind {
                ExtentKind::Zero | ExtentKind::Data => ExtentKind::Data,
                ExtentKind::Unchanged => ExtentKind::Unchanged,
            };
            map.push(extent.range.len(), kind);
        }
        Ok(map)
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        if range.pieces(CLUSTER_BYTES).nth(1).is_none() {
            return self.instant.read(offset, buffer).await;
        }
        let mut at = 0;
        for part in range.pieces(CLUSTER_BYTES) {
            let len = usize::try_from(part.len()).expect("a cluster fits memory");
            let piece = Buffer::unbudgeted(vec![0; len]);
            let piece = self.instant.read(part.offset(), piece).await?;
            buffer[at..at + len].copy_from_slice(&piece);
            at += len;
        }
        Ok(buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::block::conformance;
    use crate::block::memory::MemoryDisk;

    /// Notes what is read.
    struct Noting {
        disk: MemoryDisk,
        reads: Mutex<Vec<ByteRange>>,
    }

    #[async_trait]
    impl BlockSource for Noting {
        fn geometry(&self) -> Geometry {
            self.disk.geometry()
        }

        async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
            self.disk.extents(range).await
        }

        async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
            self.reads.lock().unwrap().push(ByteRange::new(offset, buffer.len() as u64));
            self.disk.read(offset, buffer).await
        }
    }

    #[test]
    fn every_version_before_8_0_is_read_by_clusters() {
        let wrong = [(7, 0, 0), (7, 2, 22), (7, 2, 92)];
        let right = [(8, 0, 0), (8, 2, 1), (10, 0, 2)];
        assert!(!wrong.into_iter().any(is_right) && right.into_iter().all(is_right));
    }

    #[tokio::test]
    async fn no_read_crosses_a_cluster_and_nothing_is_believed_to_be_zero() {
        let mut content = conformance::pattern(1_000_448);
        content[131_072..524_288].fill(0);
        let changed = vec![ByteRange::new(0, 655_360)];
        let disk = MemoryDisk::changed_since_base(content.clone(), changed);
        let noting = Arc::new(Noting { disk, reads: Mutex::default() });
        let careful = Careful { instant: Arc::clone(&noting) as Arc<dyn BlockSource> };
        conformance::source(&careful, &content).await;
        let map = conformance::all_extents(&careful).await;
        assert_eq!(map.bytes_of(ExtentKind::Data), 655_360);
        assert_eq!(map.bytes_of(ExtentKind::Zero), 0);
        let buffer = Buffer::unbudgeted(vec![0; 300_000]);
        let read = careful.read(100_000, buffer).await.unwrap();
        assert!(read[..] == content[100_000..400_000]);
        let reads = noting.reads.lock().unwrap();
        assert!(reads.iter().all(|read| read.pieces(CLUSTER_BYTES).count() == 1), "{reads:?}");
    }
}
