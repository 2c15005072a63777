//! What a copy onto a base would keep, found out before the copy: by the same walk and plan.

use std::sync::Arc;

use super::plan::{Planner, Step};
use super::walk::Walk;
use super::{REQUEST_BYTES_MAX, Shape};
use crate::block::{BlockSource, ByteRange};
use crate::control::Control;
use crate::error::Result;

/// Tells `each`, in the order of the disk, which ranges a copy of `source` (which errors call `name`)
/// to a sink of chunks of `chunk_bytes` hands to [`BlockSink::keep`](crate::block::BlockSink::keep).
/// Nothing is read; the source is asked for all its extents. Cancel-safe.
pub async fn kept(
    source: Arc<dyn BlockSource>,
    chunk_bytes: u64,
    name: &str,
    control: &Control,
    mut each: impl FnMut(ByteRange),
) -> Result<()> {
    let geometry = source.geometry();
    let cell_bytes = chunk_bytes.max(geometry.align_bytes);
    let request_bytes = REQUEST_BYTES_MAX - REQUEST_BYTES_MAX % cell_bytes;
    let shape = Shape {
        size_bytes: geometry.size_bytes,
        cell_bytes,
        request_bytes: request_bytes.max(cell_bytes),
        write_bytes: request_bytes.max(cell_bytes),
        requests: 1,
    };
    let mut walk = Walk::start(source, shape.range(), name.to_owned());
    let mut planner = Planner::new(shape);
    while let Some(map) = control.run(async { Ok(walk.next().await) }).await? {
        for extent in map?.iter() {
            planner.push(extent);
            while let Some(step) = planner.pop() {
                if let Step::Keep(range) = step {
                    each(range);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::memory::MemoryDisk;

    #[tokio::test]
    async fn only_chunks_without_any_change_are_kept() {
        let content = vec![7; 10 * 65536 + 512];
        let changed = [(65536, 1), (4 * 65536 - 512, 1024), (8 * 65536, 65536)];
        let changed = changed.map(|(offset, len)| ByteRange::new(offset, len)).to_vec();
        let disk: Arc<dyn BlockSource> = Arc::new(MemoryDisk::changed_since_base(content, changed));
        let mut found = Vec::new();
        let each = |range: ByteRange| found.push((range.offset() / 65536, range.end()));
        kept(disk, 65536, "vda", &Control::new(), each).await.unwrap();
        let size = 10 * 65536 + 512;
        assert_eq!(found, [(0, 65536), (2, 3 * 65536), (5, 8 * 65536), (9, size)]);
    }
}
