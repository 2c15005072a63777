//! An image file of any format as a disk, through a qemu-nbd of its own.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Mutex;

use super::info::Layer;
use super::node;
use super::process::{QemuNbd, Serve, ServeMode, connect};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode};
use crate::error::{Error, Kind, Result};
use crate::nbd::{Client, ClientOptions, Connector, Stream};

/// Whether a format that can do it compresses what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// No.
    None,
    /// Every cluster; each must be written whole and once.
    Clusters,
}

/// A served image. Ends its process when dropped; [`ImageExport::close`] tells whether that went
/// well, which matters after writing.
pub struct ImageExport {
    client: Client,
    process: Mutex<QemuNbd>,
    /// Where what is written goes.
    place: Option<Place>,
}

impl ImageExport {
    /// Serves the image of these layers read-only, read as `options` say; ranges that their bitmap
    /// calls clean are Unchanged.
    pub(super) async fn read(layers: &[Layer], options: ClientOptions) -> Result<Self> {
        Self::read_nodes(layers, node::options(layers), options).await
    }

    /// The same without locks.
    pub(super) async fn look(layers: &[Layer], options: ClientOptions) -> Result<Self> {
        Self::read_nodes(layers, Some(node::without_locks(layers)), options).await
    }

    async fn read_nodes(
        layers: &[Layer],
        node: Option<OsString>,
        options: ClientOptions,
    ) -> Result<Self> {
        let bitmaps: Vec<_> = options.changes.iter().cloned().collect();
        let Layer { path, format, .. } = layers.first().expect("an image has a layer");
        let (mode, bitmaps) = (ServeMode::Read, &bitmaps[..]);
        let serve = Serve { path, format, open: None, node, mode, bitmaps };
        Self::start(serve, options).await
    }

    /// Serves an image for writing, the open one if there is one; `options` say how, and what it
    /// holds.
    pub(super) async fn write(
        (path, format, open): (&Path, &str, Option<OwnedFd>),
        compression: Compression,
        options: ClientOptions,
    ) -> Result<Self> {
        let mode = match compression {
            Compression::None => ServeMode::Write,
            Compression::Clusters => ServeMode::WriteCompressed,
        };
        let place = Place::of(path, open.as_ref())?;
        let serve = Serve { path, format, open, node: None, mode, bitmaps: &[] };
        Ok(Self { place: Some(place), ..Self::start(serve, options).await? })
    }

    async fn start(serve: Serve<'_>, options: ClientOptions) -> Result<Self> {
        let name = serve.path.display().to_string();
        let mut process = QemuNbd::start(serve).await?;
        let connector = Private { socket: process.socket(), name: name.clone() };
        // Boxed: a handshake is a large future, and every caller would carry it.
        let client = match Box::pin(Client::open(&connector, "", options)).await {
            Ok(client) => client,
            // What the process said is better than "connection lost".
            Err(error) => {
                process.settle().await?;
                return Err(error.context(format!("cannot open {name}")));
            }
        };
        Ok(Self { client, process: Mutex::new(process), place: None })
    }

    /// `Err` with what qemu-nbd said if it has ended.
    pub async fn check_alive(&self) -> Result<()> {
        self.process.lock().await.check_alive().await
    }

    /// Ends an export that is only read, whoever still holds it: reads fail from now on.
    pub(super) async fn stop(&self) -> Result<()> {
        self.process.lock().await.kill().await
    }

    /// Closes the image and waits until that is done.
    pub async fn close(self) -> Result<()> {
        let Self { client, process, place } = self;
        drop(client);
        process.into_inner().ended_well().await.map_err(|e| Place::explain(place.as_ref(), e))
    }

    fn explain(&self, error: Error) -> Error {
        Place::explain(self.place.as_ref(), error)
    }
}

/// Less free space than this is none: the formats take it in pieces of up to 1 MiB.
const SPACE_BYTES_MIN: u64 = 1 << 20;

/// The file that an image is written to.
struct Place {
    file: File,
    name: PathBuf,
}

impl Place {
    fn of(path: &Path, open: Option<&OwnedFd>) -> Result<Self> {
        let file = match open {
            Some(open) => open.try_clone().map(File::from),
            None => File::open(path),
        };
        let file = file.map_err(|e| Error::io(format!("cannot open {}", path.display()), e))?;
        Ok(Self { file, name: path.to_owned() })
    }

    /// What a failed write means where there is no room. The formats do not all say so: what VMDK
    /// cannot grow ends in EINVAL, and the protocol makes that of every error it has no number for
    /// (QEMU 10.0, `system_errno_to_nbd_errno`).
    fn explain(place: Option<&Self>, error: Error) -> Error {
        let Some(place) = place.filter(|_| error.kind() == Kind::Io) else { return error };
        let Some(free_bytes) = place.free_bytes().filter(|free| *free < SPACE_BYTES_MIN) else {
            return error;
        };
        let name = place.name.display();
        let message = format!("no space left for {name}: {free_bytes} bytes are free there");
        Error::new(Kind::NoSpace, message)
            .source(error)
            .hint("free space there, or choose another place")
    }

    /// Room in the file system; `None` where the file is a device.
    fn free_bytes(&self) -> Option<u64> {
        self.file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        let space = rustix::fs::fstatvfs(&self.file).ok()?;
        // What is kept for root is there for root.
        let root = rustix::process::geteuid().is_root();
        let blocks = if root { space.f_bfree } else { space.f_bavail };
        blocks.checked_mul(space.f_frsize)
    }
}

/// Reaches the socket of a process of ours.
struct Private {
    socket: std::path::PathBuf,
    name: String,
}

#[async_trait]
impl Connector for Private {
    fn peer(&self) -> Arc<str> {
        format!("qemu-nbd of {}", self.name).into()
    }

    async fn connect(&self) -> Result<Box<dyn Stream>> {
        let failed = |e| Error::io(format!("cannot connect to {}", self.peer()), e);
        Ok(Box::new(connect(&self.socket).await.map_err(failed)?))
    }
}

#[async_trait]
impl BlockSource for ImageExport {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&self.client)
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.client.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.client.read(offset, buffer).await
    }
}

#[async_trait]
impl BlockSink for ImageExport {
    fn geometry(&self) -> Geometry {
        BlockSink::geometry(&self.client)
    }

    fn starts_zero(&self) -> bool {
        self.client.starts_zero()
    }

    fn can_zero(&self) -> bool {
        self.client.can_zero()
    }

    async fn existing(&self, range: ByteRange) -> Result<ExtentMap> {
        self.client.existing(range).await
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.client.write(offset, buffer).await.map_err(|e| self.explain(e))
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let done = match mode {
            // What QEMU does for NO_HOLE takes no space where nothing is allocated yet: QCOW2 and QED mark
            // the clusters in their tables, Parallels leaves them out (QEMU 10.0,
            // `qcow2_subcluster_zeroize`, `bdrv_qed_co_pwrite_zeroes`, `parallels_co_pwrite_zeroes`).
            ZeroMode::Allocated => self.client.write_literal_zeroes(range).await,
            ZeroMode::Sparse | ZeroMode::FastOnly => self.client.zero(range, mode).await,
        };
        done.map_err(|e| self.explain(e))
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.client.keep(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.client.flush().await.map_err(|e| self.explain(e))
    }
}
