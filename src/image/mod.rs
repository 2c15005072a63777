//! Image files nobody uses: read under a lock, with their bitmaps, and new ones.
//!
//! What stopped VMs of every platform have in common: [`LockedImage`] (an image and its backing
//! chain with writers kept out, as a source), [`bitmap`] (the change tracking inside), [`layers`]
//! (what the headers say), [`NewImage`] (an image being made). Raw images are read directly,
//! everything else through a qemu-nbd on a private socket.
//!
//! Rules: the format is given, never probed. An image is opened for writing only by single short
//! `qemu-img bitmap` calls, which are never interrupted. A lock is held from before the first to
//! after the last read; the VM cannot start meanwhile.

pub mod bitmap;
mod changed;
mod child;
mod command;
mod device;
mod export;
mod identity;
mod info;
mod lock;
mod new;
mod node;
mod padded;
mod private;
mod process;
mod tool;
mod writable;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;

use crate::block::file::{Access, FileSource};
use crate::block::{BlockSource, BlockingRead, Buffer, ByteRange, ExtentMap, Geometry};
use crate::error::{Error, Kind, Result};
use crate::nbd::ClientOptions;

pub use changed::changed_bytes;
#[cfg(feature = "libvirt")]
pub(crate) use child::{OwnChild, Passed};
pub use command::CommandServer;
pub use device::is_device;
pub use export::{Compression, ImageExport};
pub use identity::file_id;
pub use info::{BitmapInfo, ImageInfo, Layer, inspect, layers};
pub use lock::ImageLock;
pub use new::{NewImage, NewImageOptions};
#[cfg(feature = "libvirt")]
pub(crate) use private::PrivateDir;
pub use private::sweep_sockets;
pub use writable::WritableImage;

use padded::PaddedFile;

/// An image and everything below it, locked.
pub struct LockedImage {
    layers: Vec<Layer>,
    locks: Vec<ImageLock>,
    served: Option<Arc<ImageExport>>,
}

impl LockedImage {
    /// Locks all layers of the image. Every file that its headers name is locked under the format
    /// they name. [`Kind::Busy`] if one is being written.
    pub async fn acquire(path: &Path, format: &str) -> Result<Self> {
        // Looked at before the lock to know what to lock, and again under it.
        let before = layers(path, format).await?;
        let locks = before.iter().flat_map(Layer::files).map(ImageLock::acquire);
        let locks = locks.collect::<Result<Vec<_>>>()?;
        let layers = layers(path, format).await?;
        let name = |Layer { path, format, data_file, .. }: &Layer| {
            (path.clone(), format.clone(), data_file.clone())
        };
        let chain = |layers: &[Layer]| layers.iter().map(name).collect::<Vec<_>>();
        if chain(&before) != chain(&layers) {
            let message = format!("the backing chain of {} is being changed", path.display());
            return Err(Error::new(Kind::Busy, message));
        }
        Ok(Self { layers, locks, served: None })
    }

    /// The layers as they are under the lock, the active one first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The disk inside, as a guest sees it. With `changes`, ranges the bitmap of that name calls
    /// clean are Unchanged.
    pub async fn source(&mut self, changes: Option<&str>) -> Result<Arc<dyn BlockSource>> {
        let changes = changes.map(str::to_owned);
        let options = ClientOptions { changes, ..ClientOptions::default() };
        self.source_with(OddEnd::Padded, options).await
    }

    /// The same, read as `options` say where a server is needed.
    async fn source_with(
        &mut self,
        odd_end: OddEnd,
        options: ClientOptions,
    ) -> Result<Arc<dyn BlockSource>> {
        let top = &self.layers[0];
        if top.format == "raw" && options.changes.is_none() {
            let file = self.locks[0].file()?;
            let file = FileSource::from_file(file, &top.path, Access::Once)?;
            if odd_end == OddEnd::Padded && PaddedFile::is_needed(&file) {
                return Ok(Arc::new(PaddedFile::new(file)));
            }
            return Ok(Arc::new(file));
        }
        let served = Arc::new(ImageExport::read(&self.layers, options).await?);
        self.served = Some(Arc::clone(&served));
        Ok(served)
    }

    /// [`Kind::SnapshotLost`] unless every layer is as it was when it was locked.
    pub async fn still_valid(&self) -> Result<()> {
        if let Some(served) = &self.served {
            served.check_alive().await.map_err(|e| {
                let message = format!("{} is no longer served", self.layers[0].path.display());
                Error::new(Kind::SnapshotLost, message).source(e)
            })?;
        }
        self.locks.iter().try_for_each(ImageLock::check_unchanged)
    }

    /// Ends reading and lets writers in again; a source that is still held fails from now on.
    pub async fn release(self) -> Result<()> {
        match &self.served {
            Some(served) => served.stop().await,
            None => Ok(()),
        }
    }
}

/// What a raw file is whose length is no whole number of sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OddEnd {
    /// As long as it is: a file among files.
    Kept,
    /// Zeroes follow up to the end of its last sector: the disk a guest sees.
    Padded,
}

/// Opens an image to read the disk inside: locked, read-only, released when dropped. It ends as
/// `odd_end` says, and is read as `options` say where a server is needed.
pub async fn open_image_as(
    (path, format): (&Path, &str),
    odd_end: OddEnd,
    options: ClientOptions,
) -> Result<OpenImage> {
    let mut image = LockedImage::acquire(path, format).await?;
    let source = image.source_with(odd_end, options).await?;
    Ok(OpenImage { source, image })
}

/// Opens an existing image to be overwritten in place, through a server that takes QEMU's own locks
/// on it; `options` say how it is written.
pub async fn open_to_overwrite(
    path: &Path,
    format: &str,
    options: ClientOptions,
) -> Result<ImageExport> {
    // Headers that name other places are refused, as for reading.
    let layers = layers(path, format).await?;
    if layers.iter().any(|layer| layer.data_file.is_some()) {
        let message = format!("{} keeps its data in another file", path.display());
        return Err(Error::new(Kind::Unsupported, message)
            .hint("choose another target: such images are only read"));
    }
    // The server's own locks do not reach every user of a device.
    ImageLock::probe_to_write(&layers[0].path)?;
    ImageExport::write((&layers[0].path, format, None), Compression::None, options).await
}

/// A source with its lock.
pub struct OpenImage {
    source: Arc<dyn BlockSource>,
    image: LockedImage,
}

impl OpenImage {
    /// [`Kind::SnapshotLost`] unless what was read is what was opened: not everybody heeds locks.
    pub async fn still_valid(&self) -> Result<()> {
        self.image.still_valid().await
    }
}

#[async_trait]
impl BlockSource for OpenImage {
    fn geometry(&self) -> Geometry {
        self.source.geometry()
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.source.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.source.read(offset, buffer).await
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingRead>> {
        self.source.blocking()
    }
}
