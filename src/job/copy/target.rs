//! The target of a copy: opened for writing, committed or aborted.

use std::sync::Arc;

use super::{Copying, OnExisting, Target};
use crate::block::file::{Durability, Existing, FileSink, NewFile, PipeSink, refuse_special};
use crate::block::null::NullSink;
use crate::block::{BlockSink, BlockSource};
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::image::{
    CommandServer, Compression, ImageExport, ImageLock, NewImage, NewImageOptions,
    open_to_overwrite,
};
use crate::job::source::ImageSpec;
use crate::nbd::{
    Access, Client, ClientOptions, InitialContent, ReconnectingTarget, Timeouts, wire,
};

/// Size of a sink for a source that does not tell its own.
const UNKNOWN_BYTES: u64 = i64::MAX.cast_unsigned();

/// What the sizes of images other than raw ones are multiples of.
const SECTOR_BYTES: u64 = 512;

/// A target being written.
pub(super) enum Opened {
    /// An image that gets its name when it is complete; with the lock of the one it replaces.
    New(NewImage, Option<ImageLock>),
    /// A raw file that grows as it is written.
    Growing(NewFile, Option<ImageLock>),
    /// A raw file or device in place. QEMU opens its disks without `O_EXCL`: only its own locks
    /// tell that a VM runs.
    InPlace {
        sink: Arc<FileSink>,
        _lock: ImageLock,
    },
    /// An image of another format in place.
    Served(Arc<ImageExport>),
    /// An NBD export, perhaps of a server of ours.
    Nbd(Arc<Client>, Option<Arc<CommandServer>>),
    /// An NBD export that is opened again when it is lost.
    Reconnecting(Arc<ReconnectingTarget>),
    Null(Arc<NullSink>),
    Pipe(Arc<PipeSink>),
}

impl Opened {
    /// Opens or makes the target; what is made gets `size_bytes`.
    pub(super) async fn open(
        target: Target,
        size_bytes: Option<u64>,
        copying: &Copying<'_>,
    ) -> Result<Self> {
        let access = Access::Write(InitialContent::Unknown);
        let client = ClientOptions { access, ..copying.client() };
        match target {
            Target::Image { image, existing, compression } => {
                let place = (&image, existing, compression);
                Box::pin(Self::open_image(place, size_bytes, client)).await
            }
            Target::Nbd(uri) if copying.options.retries.attempts > 0 => {
                let control = copying.surroundings.1.clone();
                let on_lost = Box::new(move |text| control.notice(NoticeLevel::Warning, text));
                let opening =
                    ReconnectingTarget::open(uri, client, copying.options.retries, on_lost);
                Ok(Self::Reconnecting(Arc::new(Box::pin(opening).await?)))
            }
            Target::Nbd(uri) => {
                Ok(Self::Nbd(Arc::new(Box::pin(Client::open_uri(&uri, client)).await?), None))
            }
            Target::Command(line) => {
                let server = CommandServer::start(&line).await?;
                Ok(Self::Nbd(Arc::new(server.open(client).await?), Some(server)))
            }
            Target::Null => {
                Ok(Self::Null(Arc::new(NullSink::new(size_bytes.unwrap_or(UNKNOWN_BYTES)))))
            }
            Target::Pipe(file) => {
                let name = copying.names.1.clone();
                let size_bytes = size_bytes.unwrap_or(UNKNOWN_BYTES);
                Ok(Self::Pipe(Arc::new(PipeSink::new(file, name, size_bytes))))
            }
        }
    }

    async fn open_image(
        (image, existing, compression): (&ImageSpec, OnExisting, Compression),
        size_bytes: Option<u64>,
        client: ClientOptions,
    ) -> Result<Self> {
        let ImageSpec { path, format } = image;
        if !crate::image::is_device(path) {
            refuse_special(path)?;
        }
        if existing == OnExisting::WriteInPlace || crate::image::is_device(path) {
            if compression != Compression::None {
                let message = format!("{} is written in place", path.display());
                return Err(Error::new(Kind::Usage, message).hint("compress a new image only"));
            }
            return match format.as_str() {
                "raw" => {
                    let sink = Arc::new(FileSink::open_any(path)?);
                    Ok(Self::InPlace { sink, _lock: ImageLock::acquire_to_write(path)? })
                }
                _ => Ok(Self::Served(Arc::new(open_to_overwrite(path, format, client).await?))),
            };
        }
        let lock = match existing {
            OnExisting::Replace if path.exists() => Some(ImageLock::acquire_to_write(path)?),
            _ => None,
        };
        let existing = match existing {
            OnExisting::Replace => Existing::Replace,
            OnExisting::Refuse | OnExisting::WriteInPlace => Existing::Refuse,
        };
        let Some(size_bytes) = size_bytes else {
            if format != "raw" {
                let message = format!("the size of {} has to be known to make it", path.display());
                return Err(Error::new(Kind::Usage, message).hint("give it with --target-size"));
            }
            return Ok(Self::Growing(NewFile::create_unsized(path, existing)?, lock));
        };
        let size_bytes = match format.as_str() {
            "raw" => size_bytes,
            // QEMU knows disks of whole sectors only, and rounds up as well.
            _ => size_bytes.next_multiple_of(SECTOR_BYTES),
        };
        let options = NewImageOptions { existing, compression, temporary: None, client };
        Ok(Self::New(NewImage::create_with(path, format, size_bytes, options).await?, lock))
    }

    pub(super) fn sink(&self) -> Arc<dyn BlockSink> {
        match self {
            Self::New(image, _) => image.sink(),
            Self::Growing(file, _) => file.sink(),
            Self::InPlace { sink, .. } => sink.clone(),
            Self::Served(export) => export.clone(),
            Self::Nbd(client, _) => client.clone(),
            Self::Reconnecting(target) => target.clone(),
            Self::Null(sink) => sink.clone(),
            Self::Pipe(sink) => sink.clone(),
        }
    }

    /// What was written, read back.
    pub(super) fn reader(&self) -> Result<Arc<dyn BlockSource>> {
        Ok(match self {
            Self::New(image, _) => image.reader()?,
            Self::Growing(file, _) => Arc::new(file.sink().reader()?),
            Self::InPlace { sink, .. } => Arc::new(sink.reader()?),
            Self::Served(export) => export.clone(),
            Self::Nbd(client, _) => client.clone(),
            Self::Reconnecting(target) => target.clone(),
            Self::Null(_) | Self::Pipe(_) => {
                return Err(Error::new(Kind::Internal, "this target cannot be read back"));
            }
        })
    }

    /// Whether what is written to it can be made durable.
    pub(super) fn can_flush(&self) -> bool {
        match self {
            Self::Nbd(client, _) => client.export().has(wire::export::SEND_FLUSH),
            Self::Reconnecting(target) => target.can_flush(),
            // Nothing of ours is there to be lost.
            _ => true,
        }
    }

    /// Gives a target that grew its length.
    pub(super) fn set_len(&self, size_bytes: u64) -> Result<()> {
        match self {
            Self::Growing(file, _) => file.set_len(size_bytes),
            _ => Ok(()),
        }
    }

    /// Puts a new file in place and ends what was started; whether all is durable.
    pub(super) async fn commit(self, durability: Durability, control: &Control) -> Result<bool> {
        control.set_phase("finishing");
        let synced = durability == Durability::Synced;
        let durable = synced && self.can_flush();
        match self {
            // The lock of the replaced image lasts until the new one has its name.
            Self::New(image, _replaced) => {
                let file = control.run(Box::pin(image.close(durability))).await?;
                file.publish(durability).await?;
            }
            Self::Growing(file, _replaced) => file.publish(durability).await?,
            Self::Served(export) => {
                let export = Arc::into_inner(export).ok_or_else(|| {
                    Error::new(Kind::Internal, "a finished image is still written")
                })?;
                control.run(export.close()).await.inspect_err(|error| in_part(error, control))?;
            }
            Self::Nbd(client, server) => {
                drop(client);
                if let Some(server) = server {
                    // It may have as much left to write as a flush.
                    let end = control.run(server.stop(Timeouts::default().slow)).await;
                    end.inspect_err(|error| in_part(error, control))?;
                }
            }
            Self::Null(_) | Self::Pipe(_) => return Ok(false),
            Self::InPlace { .. } | Self::Reconnecting(_) => {}
        }
        Ok(durable)
    }

    /// Removes a new file; says so where something may have been overwritten in part. Gives the
    /// error back that made it necessary.
    pub(super) fn abort(self, error: Error, control: &Control) -> Error {
        let removed = match self {
            Self::New(image, _) => image.abort(),
            Self::Growing(file, _) => file.abort(),
            Self::Null(_) | Self::Pipe(_) => Ok(()),
            Self::InPlace { .. } | Self::Served(_) | Self::Nbd(..) | Self::Reconnecting(_) => {
                in_part(&error, control);
                Ok(())
            }
        };
        if let Err(error) = removed {
            control.notice(
                NoticeLevel::Warning,
                format!("a file was left behind: {}", error.in_one_line()),
            );
        }
        error
    }
}

/// Says what a target is that was written in place when `error` ended that.
fn in_part(error: &Error, control: &Control) {
    // A usage error comes before the first write.
    if error.kind() != Kind::Usage {
        let text = "the target may be written in part: its content is neither the old nor the new";
        control.notice(NoticeLevel::Warning, text);
    }
}
