//! Making an image file of a format QEMU writes: it appears under its name when it is complete.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;

use super::export::ImageExport;
use super::info::check_format;
use super::tool::{absolute, qemu_img};
use crate::block::BlockSink;
use crate::block::file::{Existing, NewFile};
use crate::error::{Error, Kind, Result};

/// An image in the making. Dropped, nothing of it remains.
pub struct NewImage {
    file: NewFile,
    sink: NewImageSink,
}

/// Raw files are written directly, anything else through qemu-nbd.
enum NewImageSink {
    Raw,
    Served(Arc<ImageExport>),
}

impl NewImage {
    /// Begins an image of `size_bytes` in `format` that will be `path`. Not cancel-safe.
    pub async fn create(
        path: &Path,
        format: &str,
        size_bytes: u64,
        existing: Existing,
    ) -> Result<Self> {
        check_format(format)?;
        let path = absolute(path)?;
        if format == "raw" {
            let file = NewFile::create(&path, size_bytes, existing)?;
            return Ok(Self { file, sink: NewImageSink::Raw });
        }
        let file = NewFile::create(&path, 0, existing)?;
        let temporary = file.temporary_path().to_owned();
        let what = format!("create {} as {format}", path.display());
        let size = size_bytes.to_string();
        let mut args: Vec<&OsStr> = ["create", "-q", "-f", format].map(OsStr::new).into();
        args.extend([temporary.as_os_str(), OsStr::new(&size)]);
        qemu_img(args, &what).await?;
        let export = ImageExport::write_new(&temporary, format).await?;
        let made_bytes = BlockSink::geometry(&export).size_bytes;
        if made_bytes != size_bytes {
            // Some formats round up (vpc to cylinders): the guest would see another disk.
            let message = format!("cannot {what}: {size_bytes} bytes become {made_bytes}");
            return Err(Error::new(Kind::Unsupported, message).hint("choose qcow2 or raw"));
        }
        Ok(Self { file, sink: NewImageSink::Served(Arc::new(export)) })
    }

    /// Where the bytes go; let go of it before the commit.
    pub fn sink(&self) -> Arc<dyn BlockSink> {
        match &self.sink {
            NewImageSink::Raw => self.file.sink(),
            NewImageSink::Served(export) => Arc::<ImageExport>::clone(export),
        }
    }

    /// Makes the image durable and gives it its name. A sink of it that is still held is an
    /// [`Kind::Internal`] error: what it wrote last might be missing. Not cancel-safe.
    pub async fn commit(self) -> Result<()> {
        if let NewImageSink::Served(export) = self.sink {
            export.flush().await?;
            let export = Arc::into_inner(export)
                .ok_or_else(|| Error::new(Kind::Internal, "a finished image is still written"))?;
            // Closing writes what is left of the format's own tables.
            export.close().await?;
        }
        self.file.commit().await
    }

    /// Removes what was written.
    pub fn abort(self) -> Result<()> {
        drop(self.sink);
        self.file.abort()
    }
}
