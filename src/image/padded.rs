//! A raw file whose length is no whole number of sectors, as the disk a guest sees.
//!
//! QEMU rounds such a file up to 512 bytes and reads zeroes past its end (`block/file-posix.c`;
//! `qemu-img info` tells the rounded size). A stopped VM's disk has to have the
//! size and the content root of the running one's. Used by [`LockedImage`](super::LockedImage) for
//! these files only: it gives up reading on the caller's thread, which ordinary files keep.

use async_trait::async_trait;

use super::info::SECTOR_BYTES;
use crate::block::file::FileSource;
use crate::block::{BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry};
use crate::error::Result;

/// The file and zeroes up to the end of its last sector.
pub(super) struct PaddedFile {
    file: FileSource,
}

impl PaddedFile {
    /// Whether `file` needs this.
    pub(super) fn is_needed(file: &FileSource) -> bool {
        !file.geometry().size_bytes.is_multiple_of(SECTOR_BYTES)
    }

    pub(super) fn new(file: FileSource) -> Self {
        Self { file }
    }

    /// Where the file ends and the zeroes begin.
    fn file_end(&self) -> u64 {
        self.file.geometry().size_bytes
    }
}

#[async_trait]
impl BlockSource for PaddedFile {
    fn geometry(&self) -> Geometry {
        let geometry = self.file.geometry();
        Geometry { size_bytes: geometry.size_bytes.next_multiple_of(SECTOR_BYTES), ..geometry }
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        if range.offset() >= self.file_end() {
            return Ok(ExtentMap::uniform(range, ExtentKind::Zero));
        }
        // A prefix is an answer: whoever asks comes back for the rest.
        let inside = ByteRange::between(range.offset(), range.end().min(self.file_end()));
        self.file.extents(inside).await
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let inside = self.file_end().saturating_sub(offset);
        let inside = usize::try_from(inside).map_or(buffer.len(), |len| len.min(buffer.len()));
        if inside == buffer.len() {
            return self.file.read(offset, buffer).await;
        }
        buffer[inside..].fill(0);
        if inside > 0 {
            let head = self.file.read(offset, Buffer::unbudgeted(vec![0; inside])).await?;
            buffer[..inside].copy_from_slice(&head);
        }
        Ok(buffer)
    }
}
