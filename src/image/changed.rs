//! How much of a disk a bitmap in its image marks.

use super::export::ImageExport;
use super::info::Layer;
use crate::block::{BlockSource, ByteRange, ExtentKind};
use crate::error::Result;
use crate::nbd::ClientOptions;

/// Bytes of the disk that the bitmap of that name marks and that are not zero: what an incremental reads.
/// `None` where that cannot be told, as while somebody writes to the image. Takes no lock, and keeps nobody
/// from using the image.
pub async fn changed_bytes(layers: &[Layer], bitmap: &str) -> Option<u64> {
    let counted = count(layers, bitmap).await;
    counted.inspect_err(|error| tracing::debug!(?error, bitmap, "no estimate")).ok()
}

async fn count(layers: &[Layer], bitmap: &str) -> Result<u64> {
    let options = ClientOptions { changes: Some(bitmap.to_owned()), ..ClientOptions::default() };
    let image = ImageExport::look(layers, options).await?;
    let size_bytes = BlockSource::geometry(&image).size_bytes;
    let (mut at, mut changed_bytes) = (0, 0);
    while at < size_bytes {
        let map = image.extents(ByteRange::between(at, size_bytes)).await?;
        let changed = map.iter().filter(|extent| extent.kind == ExtentKind::Data);
        changed_bytes += changed.map(|extent| extent.range.len()).sum::<u64>();
        at = map.end();
    }
    image.stop().await?;
    Ok(changed_bytes)
}
