//! Reading again what a base has lost: the VM may still have it.
//!
//! What a bitmap calls unchanged is as at the base, so where the base is damaged in the repository the
//! snapshot has the very content that is missing. Read like a change, it is stored anew, which heals
//! every point that needs it.

use std::sync::Arc;

use async_trait::async_trait;

use crate::block::{BlockSource, Buffer, ByteRange, Extent, ExtentKind, ExtentMap, Geometry};
use crate::error::Result;

/// A source of which some ranges are data, whatever its bitmap says.
pub(super) struct Reread {
    source: Arc<dyn BlockSource>,
    /// Sorted; no two touch.
    ranges: Vec<ByteRange>,
}

impl Reread {
    /// `source`, with `ranges` (sorted) to be read.
    pub(super) fn new(source: Arc<dyn BlockSource>, ranges: Vec<ByteRange>) -> Self {
        Self { source, ranges }
    }
}

/// What is unchanged and in one of `ranges` becomes data.
fn with_data(map: &ExtentMap, ranges: &[ByteRange]) -> ExtentMap {
    let mut out = ExtentMap::starting_at(map.start());
    for Extent { range, kind } in map.iter() {
        if kind != ExtentKind::Unchanged {
            out.push(range.len(), kind);
            continue;
        }
        let first = ranges.partition_point(|lost| lost.end() <= range.offset());
        for lost in ranges[first..].iter().take_while(|lost| lost.offset() < range.end()) {
            let lost = lost.intersect(range);
            out.push(lost.offset() - out.end(), ExtentKind::Unchanged);
            out.push(lost.len(), ExtentKind::Data);
        }
        out.push(range.end() - out.end(), ExtentKind::Unchanged);
    }
    out
}

#[async_trait]
impl BlockSource for Reread {
    fn geometry(&self) -> Geometry {
        self.source.geometry()
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        Ok(with_data(&self.source.extents(range).await?, &self.ranges))
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.source.read(offset, buffer).await
    }
}

#[cfg(test)]
mod tests {
    use super::ExtentKind::{Data, Unchanged, Zero};
    use super::*;

    #[test]
    fn only_what_is_unchanged_and_lost_becomes_data() {
        let mut map = ExtentMap::starting_at(100);
        map.push(100, ExtentKind::Unchanged);
        map.push(50, ExtentKind::Zero);
        map.push(50, ExtentKind::Data);
        map.push(100, ExtentKind::Unchanged);
        let lost = [(0, 10), (90, 20), (150, 10), (190, 20), (290, 20), (390, 100)];
        let lost = lost.map(|(offset, len)| ByteRange::new(offset, len));
        let with = with_data(&map, &lost);
        let kinds: Vec<_> =
            with.iter().map(|e| (e.range.offset(), e.range.end(), e.kind)).collect();
        assert_eq!(
            kinds,
            [
                (100, 110, Data),
                (110, 150, Unchanged),
                (150, 160, Data),
                (160, 190, Unchanged),
                (190, 200, Data),
                (200, 250, Zero),
                (250, 310, Data),
                (310, 390, Unchanged),
                (390, 400, Data),
            ]
        );
        assert_eq!(with_data(&map, &[]).iter().collect::<Vec<_>>(), map.iter().collect::<Vec<_>>());
    }
}
