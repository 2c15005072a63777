//! Which bitmap a disk is read by, and the life of the new one.

use crate::error::{Error, Kind, Result};
use crate::image::bitmap::{self, BitmapNames};
use crate::image::{Layer, LockedImage, inspect};
use crate::platform::{BackupMode, SnapshotRequest, base};
use crate::vm::{FullReason, ReadMode, Uuid};

use super::ImageDisk;

/// The bitmaps of one disk in one repository.
#[derive(Clone, Debug)]
pub(super) struct Checkpoints {
    names: BitmapNames,
    /// Name of the bitmap of the point being made.
    pub(super) new: String,
}

impl Checkpoints {
    pub(super) fn new(request: &SnapshotRequest, domain: Uuid, disk: &str) -> Result<Self> {
        let names = BitmapNames::new(&request.repository, domain)?.of_disk(disk);
        let new = names.of_point(request.point);
        Ok(Self { names, new })
    }

    /// How the disk is to be read.
    pub(super) fn read_mode(
        &self,
        disk: &ImageDisk,
        layers: &[Layer],
        request: &SnapshotRequest,
    ) -> ReadMode {
        if request.mode == BackupMode::Full {
            return ReadMode::Full { reason: FullReason::Requested };
        }
        let size_bytes = layers.first().expect("an image has a layer").info.size_bytes;
        // The names of these bitmaps carry the disk: which file it is in does not matter.
        let points = base::candidates((&disk.name, size_bytes), &request.known_points, |_| true);
        match points.and_then(|points| bitmap::choose_base(layers, &self.names, &points)) {
            Ok(base) => ReadMode::Incremental { base },
            Err(reason) => ReadMode::Full { reason },
        }
    }

    /// The bitmap an incremental read goes by.
    pub(super) fn base_of(&self, read: &ReadMode) -> Option<String> {
        match read {
            ReadMode::Incremental { base } => Some(self.names.of_point(*base)),
            ReadMode::Full { .. } => None,
        }
    }

    /// Begins the new bitmap in an image that can hold one. It may be there also after an error.
    pub(super) async fn begin(&self, top: &Layer) -> Result<()> {
        bitmap::add(&top.path, &top.format, &self.new).await
    }

    /// Removes the new bitmap again, if it is there.
    pub(super) async fn undo(&self, top: &Layer) -> Result<()> {
        let now = inspect(&top.path, &top.format).await?;
        if !now.bitmaps.iter().flatten().any(|bitmap| bitmap.name == self.new) {
            return Ok(());
        }
        bitmap::remove(&top.path, &top.format, &self.new).await.map_err(|e| {
            e.context(format!("bitmap {} was left behind", self.new))
                .hint("it does no harm; the next backup of this VM removes it")
        })
    }

    /// Removes all bitmaps of ours but the new one; the first error after all were tried.
    pub(super) async fn drop_older(&self, top: &Layer) -> Result<()> {
        let mut result = Ok(());
        for old in top.info.bitmaps.iter().flatten() {
            if old.name == self.new || self.names.point_of(&old.name).is_none() {
                continue;
            }
            if let Err(error) = bitmap::remove(&top.path, &top.format, &old.name).await {
                let message = format!("old bitmap {} was left behind", old.name);
                result = result.and(Err(error.context(message)));
            }
        }
        result
    }
}

/// For [`BackupMode::Incremental`]: an error unless a disk can be read incrementally.
pub(super) fn check_mode(reads: &[(String, ReadMode)], request: &SnapshotRequest) -> Result<()> {
    let full = |read: &ReadMode| match read {
        ReadMode::Incremental { .. } => None,
        ReadMode::Full { reason } => Some(reason.describe()),
    };
    let reasons: Option<Vec<_>> =
        reads.iter().map(|(name, read)| Some(format!("{name}: {}", full(read)?))).collect();
    match reasons {
        Some(reasons) if request.mode == BackupMode::Incremental => Err(Error::new(
            Kind::NoBase,
            format!("no disk can be read incrementally ({})", reasons.join("; ")),
        )
        .hint("take a full backup, or let 'backup' choose")),
        _ => Ok(()),
    }
}

/// The active layer of a locked image.
pub(super) fn top(image: &LockedImage) -> &Layer {
    image.layers().first().expect("an image has a layer")
}
