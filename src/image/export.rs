//! An image file of any format as a disk, through a qemu-nbd of its own.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Mutex;

use super::process::{QemuNbd, Serve, ServeMode, connect};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode};
use crate::error::{Error, Result};
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
}

impl ImageExport {
    /// Serves the image read-only, read as `options` say; ranges that their bitmap calls clean are
    /// Unchanged.
    pub(super) async fn read(path: &Path, format: &str, options: ClientOptions) -> Result<Self> {
        let bitmaps: Vec<_> = options.changes.iter().cloned().collect();
        let serve = Serve { path, format, open: None, mode: ServeMode::Read, bitmaps: &bitmaps };
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
        Self::start(Serve { path, format, open, mode, bitmaps: &[] }, options).await
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
        Ok(Self { client, process: Mutex::new(process) })
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
        let Self { client, process } = self;
        drop(client);
        process.into_inner().ended_well().await
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
        self.client.write(offset, buffer).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.client.zero(range, mode).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.client.keep(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.client.flush().await
    }
}
