//! A raw file or device in use: read and written again and again, by whoever it is served to.

use std::fs::File;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use rustix::fs::OFlags;

use super::{Access, FileSink, FileSource};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode};
use crate::error::{Error, Result};

/// Source and sink on one file. What is written is read at once, through the page cache; it is
/// durable after a flush.
#[derive(Debug)]
pub struct FileDisk {
    source: FileSource,
    sink: FileSink,
    file: File,
    path: PathBuf,
}

impl FileDisk {
    /// Opens an existing raw file or device in place. Keeping others out is the caller's business.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, ..) =
            super::open(path, File::options().read(true).write(true), OFlags::empty())?;
        Self::from_file(file, path)
    }

    /// Uses a file that is open for reading and writing; `path` names it in errors.
    pub fn from_file(file: File, path: &Path) -> Result<Self> {
        let failed = |e| Error::io(format!("cannot open {}", path.display()), e);
        let clone = || file.try_clone().map_err(failed);
        Ok(Self {
            source: FileSource::from_file(clone()?, path, Access::Repeated)?,
            sink: FileSink::repeated(clone()?, path)?,
            file,
            path: path.to_owned(),
        })
    }

    /// The same file or device, as large as it is now, if that is more than `size_bytes`. This one
    /// goes on with the size it has. Blocks.
    pub fn grown(&self, size_bytes: u64) -> Result<Option<Self>> {
        if super::examine(&self.file, &self.path)?.1 <= size_bytes {
            return Ok(None);
        }
        let failed = |e| Error::io(format!("cannot open {}", self.path.display()), e);
        Self::from_file(self.file.try_clone().map_err(failed)?, &self.path).map(Some)
    }
}

#[async_trait]
impl BlockSource for FileDisk {
    fn geometry(&self) -> Geometry {
        self.source.geometry()
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.source.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.source.read(offset, buffer).await
    }
}

#[async_trait]
impl BlockSink for FileDisk {
    fn geometry(&self) -> Geometry {
        self.sink.geometry()
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.sink.write(offset, buffer).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.sink.zero(range, mode).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.sink.keep(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.sink.flush().await
    }
}
