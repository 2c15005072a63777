//! The images of a stopped VM, locked.
//!
//! ```text
//!  survey ─► new bitmaps (QEMU's lock guards each call) ─► lock all ─► look again ─► read …
//!                 └──────────── error ─────────┴───────────────┴──► unlock, remove new bitmaps
//! ```
//!
//! The new bitmaps begin before the lock, because qemu-img could not add them under it. A VM that
//! runs in between writes into bitmaps that record: what it wrote is read now and once more by the
//! next incremental, which is right.

use std::sync::Arc;

use async_trait::async_trait;

use crate::block::BlockSource;
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::image::{Layer, LockedImage, layers};
use crate::journal::{Entry, Journal, Phase, Place, Run};
use crate::platform::{Platform, SnapshotDisk, SnapshotRequest, VmSnapshot};
use crate::vm::{Artifact, Consistency, ExcludedDisk, NotCaptured, Quiescence};

use super::checkpoint::{Checkpoints, check_mode, top};
use super::plan::{describe, select};
use super::{ImageDisk, Images};

/// The open snapshot.
pub(super) struct ImageSnapshot {
    disks: Vec<SnapshotDisk>,
    images: Vec<Reading>,
    excluded: Vec<ExcludedDisk>,
    taken: Timestamp,
    quiescence: Quiescence,
    not_captured: Vec<NotCaptured>,
    journal: Option<Journal>,
}

/// One disk of it.
struct Reading {
    image: LockedImage,
    checkpoints: Checkpoints,
    new: New,
}

/// The new bitmap of an image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum New {
    /// Nobody tried to add it.
    No,
    /// It was tried and did not succeed: it may be there all the same.
    Tried,
    /// It is there and records.
    Recording,
}

/// A disk whose new bitmap may have begun, before it is locked.
struct Begun<'a> {
    disk: &'a ImageDisk,
    checkpoints: Checkpoints,
    top: Layer,
    new: New,
}

impl ImageSnapshot {
    pub(super) async fn open(
        images: &Images,
        request: &SnapshotRequest,
        control: &Control,
    ) -> Result<Self> {
        let identity = images.identify().await?;
        let (included, excluded) = select(images, request)?;
        control.set_phase("looking at the images");
        let mut begun = Vec::new();
        let mut reads = Vec::new();
        for disk in included {
            let layers = layers(&disk.source.path, &disk.source.format).await?;
            let checkpoints = Checkpoints::new(request, identity.uuid, &disk.name)?;
            reads.push((disk.name.clone(), checkpoints.read_mode(disk, &layers, request)));
            let top = layers.into_iter().next().expect("an image has a layer");
            begun.push(Begun { disk, checkpoints, top, new: New::No });
        }
        check_mode(&reads, request)?;
        control.set_phase("locking the images");
        let mut journal = images.journal()?;
        if let Some(journal) = &mut journal {
            let paths = begun.iter().map(|begun| &begun.top.path);
            // Whoever looks for them later may be in another directory.
            let place = |disk: &ImageDisk| {
                let path = std::path::absolute(&disk.source.path);
                let failed =
                    |e| Error::io(format!("cannot name {}", disk.source.path.display()), e);
                Ok((path.map_err(failed)?, disk.source.format.clone()))
            };
            let places = images.disks.iter().map(place).collect::<Result<_>>()?;
            let place = Place::Images { images: places };
            journal.begin(Run::new(request.point, &images.name, &request.repository, place));
            journal.note([Entry::files(Phase::Bitmap, paths), Entry::of(Phase::Process)])?;
            journal.before(Phase::Bitmap);
        }
        let locked = match begin_all(&mut begun, control).await {
            Ok(()) => lock_all(&begun, request, control).await,
            Err(error) => Err(error),
        };
        match locked {
            Ok((disks, locked)) => {
                after(journal.as_ref(), Phase::Bitmap);
                let reading = |(begun, image): (Begun<'_>, _)| Reading {
                    image,
                    checkpoints: begun.checkpoints,
                    new: begun.new,
                };
                let images = begun.into_iter().zip(locked).map(reading).collect();
                // Nobody writes from here on.
                let snapshot = Self::new(disks, images, excluded, request.clock.now());
                Ok(Self { journal, ..snapshot })
            }
            Err(error) => {
                let undone = undo_all(&begun, control).await;
                if let Some(journal) = journal.as_mut().filter(|_| undone)
                    && let Err(error) = journal.finish()
                {
                    control.notice(NoticeLevel::Warning, error.in_one_line());
                }
                Err(error)
            }
        }
    }

    fn new(
        disks: Vec<SnapshotDisk>,
        images: Vec<Reading>,
        excluded: Vec<ExcludedDisk>,
        taken: Timestamp,
    ) -> Self {
        let level = Consistency::Stopped;
        Self {
            disks,
            images,
            excluded,
            taken,
            quiescence: Quiescence { level, frozen_ms: None, reason: None },
            not_captured: vec![description()],
            journal: None,
        }
    }
}

/// What a point of images lacks.
pub(super) fn description() -> NotCaptured {
    NotCaptured {
        what: "description of the VM".to_owned(),
        reason: "only its images were given; keep its configuration elsewhere".to_owned(),
    }
}

/// Begins the new bitmaps. An image in use is an error; one that merely cannot be changed is read
/// in full next time.
async fn begin_all(disks: &mut [Begun<'_>], control: &Control) -> Result<()> {
    for disk in disks {
        control.check()?;
        if disk.top.info.bitmaps.is_none() {
            continue;
        }
        // Before the call: one that fails half way is undone as well.
        disk.new = New::Tried;
        match disk.checkpoints.begin(&disk.top).await {
            Ok(()) => disk.new = New::Recording,
            Err(error) if error.kind() == Kind::Busy => return Err(error),
            Err(error) => control.notice(
                NoticeLevel::Warning,
                format!("the next backup reads {} in full: {error}", disk.disk.name),
            ),
        }
    }
    Ok(())
}

/// Locks all images and looks at them again: only what is seen under the lock counts.
async fn lock_all(
    disks: &[Begun<'_>],
    request: &SnapshotRequest,
    control: &Control,
) -> Result<(Vec<SnapshotDisk>, Vec<LockedImage>)> {
    let (mut described, mut locked) = (Vec::new(), Vec::new());
    let mut reads = Vec::new();
    for Begun { disk, checkpoints, .. } in disks {
        control.check()?;
        let image = LockedImage::acquire(&disk.source.path, &disk.source.format).await?;
        let read = checkpoints.read_mode(disk, image.layers(), request);
        reads.push((disk.name.clone(), read.clone()));
        described.push(SnapshotDisk { description: describe(disk, image.layers()), read });
        locked.push(image);
    }
    check_mode(&reads, request)?;
    Ok((described, locked))
}

/// Removes the bitmaps that were begun; the locks are gone when this is called. Whether none is left.
async fn undo_all(disks: &[Begun<'_>], control: &Control) -> bool {
    let mut undone = true;
    for disk in disks.iter().filter(|disk| disk.new != New::No) {
        if let Err(error) = disk.checkpoints.undo(&disk.top).await {
            control.notice(NoticeLevel::Warning, error.in_one_line());
            undone = false;
        }
    }
    undone
}

#[async_trait]
impl VmSnapshot for ImageSnapshot {
    fn disks(&self) -> &[SnapshotDisk] {
        &self.disks
    }

    fn excluded(&self) -> &[ExcludedDisk] {
        &self.excluded
    }

    fn taken(&self) -> Timestamp {
        self.taken
    }

    fn quiescence(&self) -> &Quiescence {
        &self.quiescence
    }

    fn artifacts(&self) -> &[Artifact] {
        &[]
    }

    fn not_captured(&self) -> &[NotCaptured] {
        &self.not_captured
    }

    async fn source(&mut self, index: usize) -> Result<Arc<dyn BlockSource>> {
        let Reading { image, checkpoints, .. } = &mut self.images[index];
        let changes = checkpoints.base_of(&self.disks[index].read);
        before(self.journal.as_ref(), Phase::Process);
        let source = image.source(changes.as_deref()).await?;
        after(self.journal.as_ref(), Phase::Process);
        Ok(source)
    }

    async fn still_valid(&mut self) -> Result<()> {
        for Reading { image, .. } in &self.images {
            image.still_valid().await?;
        }
        Ok(())
    }

    async fn commit(mut self: Box<Self>) -> Result<()> {
        let mut result = Ok(());
        before(self.journal.as_ref(), Phase::Handover);
        for Reading { image, checkpoints, new } in self.images {
            let top = top(&image).clone();
            result = result.and(image.release().await);
            // Without a new bitmap the old one is still the best there is.
            if new == New::Recording {
                result = result.and(checkpoints.drop_older(&top).await);
            }
        }
        after(self.journal.as_ref(), Phase::Handover);
        if let Some(journal) = self.journal.as_mut().filter(|_| result.is_ok()) {
            // Bitmaps of runs that never committed are among those removed.
            journal.undone_for_repository(&Phase::ALL)?;
            journal.finish()?;
        }
        result
    }

    async fn abort(mut self: Box<Self>) -> Result<()> {
        let mut result = Ok(());
        for Reading { image, checkpoints, new } in self.images {
            let top = top(&image).clone();
            result = result.and(image.release().await);
            if new != New::No {
                result = result.and(checkpoints.undo(&top).await);
            }
        }
        match &mut self.journal {
            Some(journal) if result.is_ok() => journal.finish(),
            _ => result,
        }
    }
}

fn before(journal: Option<&Journal>, phase: Phase) {
    if let Some(journal) = journal {
        journal.before(phase);
    }
}

fn after(journal: Option<&Journal>, phase: Phase) {
    if let Some(journal) = journal {
        journal.after(phase);
    }
}
