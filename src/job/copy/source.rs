//! The source of a copy, open.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::{OnExisting, Source, Surroundings, Target};
use crate::block::{BlockSource, Buffer, ByteRange, ExtentMap, Geometry};
use crate::control::NoticeLevel;
use crate::error::{Error, Kind, Result};
use crate::image::{CommandServer, OddEnd, OpenImage, is_device, open_image_as};
use crate::job::points;
use crate::job::source::{DiskSpec, ImageSpec};
use crate::nbd::{Client, ClientOptions, ReconnectingClient, Retries};

/// Longest wait for the end of a server that was only read.
const END: Duration = Duration::from_secs(60);

/// A source that can be read.
pub(super) struct OpenedSource {
    pub(super) disk: Arc<dyn BlockSource>,
    /// The file it is in, if it is one.
    image: Option<(PathBuf, Arc<OpenImage>)>,
    server: Option<Arc<CommandServer>>,
}

impl OpenedSource {
    /// Fails when a file was written, resized or replaced since it was opened: what was read of it is
    /// no state that it ever had.
    pub(super) async fn still_valid(&self) -> Result<()> {
        match &self.image {
            Some((_, image)) => image.still_valid().await,
            None => Ok(()),
        }
    }

    /// Ends what was started for it.
    pub(super) async fn close(self) -> Result<()> {
        drop((self.disk, self.image));
        match self.server {
            Some(server) => server.stop(END).await,
            None => Ok(()),
        }
    }
}

/// What a raw file of an odd size is to be for `target`: existing images of other formats, whose
/// sizes are whole sectors, are written in whole sectors. A new one is made as large as it has to be.
pub(super) fn odd_end(target: &Target) -> OddEnd {
    match target {
        Target::Image { image, existing, .. }
            if image.format != "raw"
                && (*existing == OnExisting::WriteInPlace || is_device(&image.path)) =>
        {
            OddEnd::Padded
        }
        _ => OddEnd::Kept,
    }
}

/// Opens a source; a pipe has no disk.
pub(super) async fn open(
    (source, odd_end): (Source, OddEnd),
    (client, retries): (ClientOptions, Retries),
    (env, control): Surroundings<'_>,
) -> Result<OpenedSource> {
    let only = |disk| OpenedSource { disk, image: None, server: None };
    match source {
        Source::Disk(DiskSpec::Nbd(uri)) if retries.attempts > 0 => {
            let control = control.clone();
            let on_lost = Box::new(move |text| control.notice(NoticeLevel::Warning, text));
            let disk = ReconnectingClient::open(uri, client, retries, on_lost).await?;
            Ok(only(Arc::new(disk)))
        }
        Source::Disk(DiskSpec::Nbd(uri)) => {
            Ok(only(Arc::new(Box::pin(Client::open_uri(&uri, client)).await?)))
        }
        Source::Disk(DiskSpec::Image(image)) => {
            let ImageSpec { path, format } = image;
            let opening = open_image_as((&path, &format), odd_end, client);
            let image = Arc::new(Box::pin(opening).await?);
            let disk = Arc::clone(&image) as Arc<dyn BlockSource>;
            Ok(OpenedSource { image: Some((path, image)), ..only(disk) })
        }
        Source::Command(line) => {
            let server = CommandServer::start(&line).await?;
            let disk = Arc::new(server.open(client).await?);
            Ok(OpenedSource { server: Some(server), ..only(disk) })
        }
        Source::Point { repository, point, disk } => {
            let manifest = points::manifest(&repository, &point, env).await?;
            let disks = points::choose_disks(&manifest, disk.as_slice())?;
            let [disk] = disks[..] else {
                let names: Vec<&str> =
                    disks.iter().map(|disk| disk.description.name.as_str()).collect();
                let message = format!("the point has {} disks: {}", names.len(), names.join(", "));
                return Err(Error::new(Kind::Usage, message).hint("write point:POINT/DISK"));
            };
            Ok(only(Arc::new(repository.open_disk(&disk.stored).await?)))
        }
        Source::Pipe(_) => Err(Error::new(Kind::Internal, "a pipe was opened as a disk")),
    }
}

/// Fails when the target is the file the source is read from: it would be overwritten unread.
pub(super) fn refuse_itself(source: &OpenedSource, target: &Target) -> Result<()> {
    let (Some((from, _)), Target::Image { image, .. }) = (&source.image, target) else {
        return Ok(());
    };
    let id = |path: &Path| {
        use std::os::unix::fs::MetadataExt;
        path.metadata().ok().map(|data| (data.dev(), data.ino(), data.rdev()))
    };
    let same = id(from).is_some_and(|from| Some(from) == id(&image.path));
    if same {
        let message = format!("{} would be copied to itself", image.path.display());
        return Err(Error::new(Kind::Usage, message).hint("name another target"));
    }
    Ok(())
}

/// The first `size_bytes` of a disk, which may be longer.
pub(super) fn front(disk: Arc<dyn BlockSource>, size_bytes: u64) -> Arc<dyn BlockSource> {
    if disk.geometry().size_bytes == size_bytes {
        return disk;
    }
    Arc::new(Front { disk, size_bytes })
}

struct Front {
    disk: Arc<dyn BlockSource>,
    size_bytes: u64,
}

#[async_trait]
impl BlockSource for Front {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: self.size_bytes, ..self.disk.geometry() }
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let Geometry { align_bytes, size_bytes, .. } = self.disk.geometry();
        let told = self.disk.extents(range.widen(align_bytes, size_bytes)).await?;
        let mut map = ExtentMap::starting_at(range.offset());
        for extent in told.iter() {
            let part = extent.range.intersect(range);
            if !part.is_empty() {
                map.push(part.len(), extent.kind);
            }
        }
        Ok(map)
    }

    async fn read(&self, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        let Geometry { align_bytes, size_bytes, .. } = self.disk.geometry();
        let range = ByteRange::new(offset, buffer.len() as u64);
        let whole = range.widen(align_bytes, size_bytes);
        if whole == range || range.end() != self.size_bytes {
            return self.disk.read(offset, buffer).await;
        }
        // The disk goes on in the block in which this one ends.
        let len = usize::try_from(whole.len()).expect("a request is a few MiB");
        let read = self.disk.read(whole.offset(), Buffer::unbudgeted(vec![0; len])).await?;
        let start = usize::try_from(offset - whole.offset()).expect("less than a block");
        let wanted = start..start + buffer.len();
        buffer.copy_from_slice(&read[wanted]);
        Ok(buffer)
    }
}
