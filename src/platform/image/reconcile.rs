//! What a killed run left in images: bitmaps of points that never came to be.
//!
//! Everything else of such a run ended with it: its locks, and the servers it read through. At the
//! start of a backup nothing is removed: a bitmap that is of no use only costs, and goes with the old
//! ones at the commit.

use super::{ImageDisk, Images};
use crate::error::Result;
use crate::image::bitmap::{self, BitmapNames};
use crate::image::layers;
use crate::journal::{Action, Phase, Recovery};
use crate::platform::{Asked, RecoverRequest};

/// Undoes, or looks for, what killed runs left.
pub(super) async fn reconcile(
    images: &Images,
    request: &RecoverRequest,
    recovery: &mut Recovery,
) -> Result<()> {
    let journal = images.journal()?;
    if request.repository == Asked::Yes {
        for disk in &images.disks {
            bitmaps(images, disk, request, recovery).await?;
        }
    }
    let Some(mut journal) = journal else { return Ok(()) };
    if journal.is_unreadable() {
        let path = journal.path().display();
        let text =
            format!("journal {path}, which cannot be read and gets the ending '.unreadable'");
        recovery.note(Action::Kept, text);
        if recovery.changes() {
            journal.set_aside()?;
        }
    }
    let runs: Vec<_> = journal.earlier().cloned().collect();
    for run in runs {
        let judged =
            request.repository == Asked::Yes && run.repository == request.snapshot.repository;
        if !judged && run.has(Phase::Bitmap) {
            if request.repository != Asked::Later {
                let text =
                    format!("bitmaps of VM '{}', whose repository was not asked", images.name);
                recovery.note(Action::Kept, text);
            }
        } else if recovery.changes() {
            journal.undone(run.point, &Phase::ALL)?;
        }
    }
    Ok(())
}

async fn bitmaps(
    images: &Images,
    disk: &ImageDisk,
    request: &RecoverRequest,
    recovery: &mut Recovery,
) -> Result<()> {
    let names = BitmapNames::new(&request.snapshot.repository, images.uuid())?.of_disk(&disk.name);
    let found = layers(&disk.source.path, &disk.source.format).await?;
    let top = found.first().expect("an image has a layer");
    for bitmap in top.info.bitmaps.iter().flatten() {
        let Some(point) = names.point_of(&bitmap.name) else { continue };
        let path = top.path.display();
        let what = format!("bitmap in {path} for point {}, which does not exist", point.short());
        if !request.snapshot.exists(point) && recovery.undo(what) {
            bitmap::remove(&top.path, &top.format, &bitmap.name).await?;
        }
    }
    Ok(())
}
