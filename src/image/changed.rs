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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::image::layers;

    #[tokio::test]
    async fn who_looks_keeps_nobody_from_writing_and_who_reads_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.qcow2");
        let does = |program: &str, arguments: &[&str]| {
            let done = Command::new(program).args(arguments).arg(&path).output();
            done.unwrap().status.success()
        };
        assert!(does("qemu-img", &["create", "-q", "-o", "size=1M", "-f", "qcow2"]));
        let write = || does("qemu-io", &["-f", "qcow2", "-c", "write -q 0 64k"]);
        let found = layers(&path, "qcow2").await.unwrap();
        let look = ImageExport::look(&found, ClientOptions::default()).await.unwrap();
        assert!(write());
        look.stop().await.unwrap();
        let read = ImageExport::read(&found, ClientOptions::default()).await.unwrap();
        assert!(!write());
        read.stop().await.unwrap();
    }
}
