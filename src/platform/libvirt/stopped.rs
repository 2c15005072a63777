//! A snapshot of a stopped domain: its images, read under a lock that keeps the domain from
//! starting.
//!
//! ```text
//!  look ─► add bitmaps ─► lock images ─► look again, choose bases, read XML and NVRAM ─► (reading)
//! ```
//!
//! The new bitmap is added *before* the lock is taken, because the lock keeps every writer out,
//! ourselves included. That is safe: a bitmap that begins before the instant marks what was
//! written in between, and the next incremental reads it once more. Everything else is decided by
//! what is seen *under* the lock: until then the domain may run, lose its bitmaps or get other
//! images. Old bitmaps are removed after the lock is released; if the domain was started at that
//! moment, the next run does it.
//!
//! Nothing is defined in libvirt: the next run on the running domain redefines the checkpoint from
//! the point's id, as it does for its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use super::artifacts;
use super::checkpoint::{SizedDisk, read_mode};
use super::connection::DomainHandle;
use super::lock::DomainLock;
use super::open::TAKE_FULL;
use super::reconcile;
use super::survey::Survey;
use crate::block::BlockSource;
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::image::bitmap::{self, BitmapNames};
use crate::image::{self, Layer, LockedImage, changed_bytes, file_id, layers};
use crate::journal::{Entry, Mode, Phase, Place, Recovery, Run};
use crate::platform::{BackupMode, SnapshotDisk, SnapshotRequest, VmSnapshot, base};
use crate::vm::{
    Artifact, Consistency, DiskLayer, ExcludedDisk, FullReason, ImageId, NotCaptured, PointId,
    Quiescence,
};

/// One disk of a stopped domain.
struct StoppedDisk {
    path: PathBuf,
    /// It, or its data, is a block device.
    on_device: bool,
    format: String,
    /// The point its bitmap begins at, or why it is read in full.
    read: Result<PointId, FullReason>,
    /// It has, or is to get, the new bitmap.
    tracked: bool,
    /// Bitmaps of ours in it, the new one not among them.
    old: Vec<PointId>,
    /// The new bitmap may be in the image.
    added: bool,
    image: Option<LockedImage>,
}

/// The transaction.
pub(super) struct StoppedSnapshot {
    domain: DomainHandle,
    names: BitmapNames,
    repository: String,
    point: PointId,
    parts: Vec<StoppedDisk>,
    disks: Vec<SnapshotDisk>,
    excluded: Vec<ExcludedDisk>,
    taken: Timestamp,
    quiescence: Quiescence,
    artifacts: Vec<Artifact>,
    not_captured: Vec<NotCaptured>,
    lock: DomainLock,
}

/// What would be read of each disk, why, and how much of one that is read since a point, where that can be
/// told. Changes nothing.
pub(super) async fn reads(
    domain: &DomainHandle,
    survey: &Survey,
    request: &SnapshotRequest,
) -> Result<Vec<(Result<PointId, FullReason>, Option<u64>)>> {
    let names = BitmapNames::new(&request.repository, domain.uuid)?;
    let mut reads = Vec::new();
    for part in look(domain, survey, request, &names).await? {
        let changed_bytes = match part.read {
            Ok(base) => {
                let found = layers(&part.path, &part.format).await?;
                changed_bytes(&found, &names.of_point(base)).await
            }
            Err(_) => None,
        };
        reads.push((part.read, changed_bytes));
    }
    Ok(reads)
}

/// Opens a snapshot of a domain that is not running.
pub(super) async fn open(
    domain: &DomainHandle,
    survey: Survey,
    mut lock: DomainLock,
    request: &SnapshotRequest,
    control: &Control,
) -> Result<StoppedSnapshot> {
    let names = BitmapNames::new(&request.repository, domain.uuid)?;
    let parts = look(domain, &survey, request, &names).await?;
    // Bitmaps of runs that never committed go with the old ones, at the commit.
    let place = Place::Libvirt { uri: domain.host.uri().to_owned() };
    lock.journal.begin(Run::new(request.point, &domain.name, &request.repository, place));
    let images = parts.iter().filter(|part| part.tracked).map(|part| &part.path);
    lock.journal.note([Entry::files(Phase::Bitmap, images), Entry::of(Phase::Process)])?;
    let mut snapshot = StoppedSnapshot {
        domain: domain.clone(),
        names,
        repository: request.repository.clone(),
        point: request.point,
        parts,
        disks: Vec::new(),
        excluded: survey.set.excluded.clone(),
        taken: request.clock.now(),
        quiescence: Quiescence { level: Consistency::Stopped, frozen_ms: None, reason: None },
        artifacts: Vec::new(),
        not_captured: Vec::new(),
        lock,
    };
    if let Err(error) = snapshot.take(&survey, request, control).await {
        if let Err(undo) = Box::new(snapshot).abort().await {
            tracing::warn!(error = ?undo, "a bitmap of a failed backup remains");
        }
        return Err(error);
    }
    Ok(snapshot)
}

/// The error about a stopped domain of another host.
pub(super) fn elsewhere(domain: &DomainHandle) -> Error {
    let name = &domain.name;
    start_it(&format!("domain '{name}' is stopped, and its images are on another host"), name)
}

/// The error about images that only a QEMU can read.
pub(super) fn start_it(what: &str, domain: &str) -> Error {
    Error::new(Kind::Unsupported, what).hint(format!(
        "start the domain ('virsh start {domain}', or 'virsh start --paused {domain}') and back it \
         up running"
    ))
}

/// The images with their bitmaps.
async fn look(
    domain: &DomainHandle,
    survey: &Survey,
    request: &SnapshotRequest,
    names: &BitmapNames,
) -> Result<Vec<StoppedDisk>> {
    if !domain.host.is_local() {
        return Err(elsewhere(domain));
    }
    let mut parts = Vec::new();
    for disk in &survey.disks {
        let Some(path) = disk.disk.path.clone() else {
            let target = &disk.disk.name;
            let origin = &disk.disk.image().origin;
            let name = &domain.name;
            let what = format!(
                "disk {target} of the stopped domain '{name}' is no file of this host ({origin})"
            );
            return Err(start_it(&what, name));
        };
        // libvirt gives QEMU the passphrase. Without it a LUKS container would be read as it is,
        // which is not what the guest sees.
        if disk.disk.layer == DiskLayer::DecryptedLuks {
            let target = &disk.disk.name;
            let name = &domain.name;
            let what = format!("disk {target} of the stopped domain '{name}' is encrypted");
            return Err(start_it(&what, name));
        }
        let found = layers(&path, &disk.disk.format).await?;
        let stored_in = found[0].data_file.as_deref();
        if let Some(store) = &disk.disk.data_store
            && stored_in != Some(Path::new(store))
        {
            let (name, image) = (&domain.name, path.display());
            let itself = stored_in.map_or("none".into(), Path::to_string_lossy);
            let what = format!(
                "the description of domain '{name}' has the data of {image} in {store}, and the image \
                 names {itself}"
            );
            return Err(start_it(&what, name));
        }
        parts.push(StoppedDisk {
            on_device: found[0].files().any(image::is_device),
            path,
            format: disk.disk.format.clone(),
            read: base_of(disk, &found, names, request).await,
            tracked: disk.disk.untracked.is_none() && found[0].info.bitmaps.is_some(),
            old: Vec::new(),
            added: false,
            image: None,
        });
    }
    Ok(parts)
}

/// The point `disk` can be read since, by what its images say now; or why there is none.
async fn base_of(
    disk: &SizedDisk,
    found: &[Layer],
    names: &BitmapNames,
    request: &SnapshotRequest,
) -> Result<PointId, FullReason> {
    if request.mode == BackupMode::Full {
        return Err(FullReason::Requested);
    }
    if let Some(reason) = disk.disk.untracked {
        return Err(reason);
    }
    let mut images = Vec::new();
    for layer in found {
        let origin = layer.path.display().to_string();
        images.push(ImageId { origin, file: file_id(&layer.path).await });
    }
    let (name, size_bytes) = (&disk.disk.name, disk.size_bytes);
    let points = base::candidates((name, size_bytes), &request.known_points, |was| {
        images.iter().any(|image| image.is(&was.image()))
    })?;
    bitmap::choose_base(found, names, &points)
}

impl StoppedSnapshot {
    /// Adds the bitmaps, takes the locks, and decides by what it sees then.
    async fn take(
        &mut self,
        before: &Survey,
        request: &SnapshotRequest,
        control: &Control,
    ) -> Result<()> {
        // Here to change nothing for nothing; what counts is the same question below.
        self.check_base(request)?;
        let name = &self.domain.name;
        let on_device = self.parts.iter().any(|part| part.on_device);
        let text = if on_device {
            format!(
                "do not start domain '{name}' until this is over: block devices cannot be locked \
                 against it, and the backup would be given up"
            )
        } else {
            format!("domain '{name}' cannot start until this is over")
        };
        control.notice(NoticeLevel::Info, text);
        self.lock.journal.before(Phase::Bitmap);
        self.add_bitmaps(before, control).await?;
        self.lock.journal.after(Phase::Bitmap);
        for part in &mut self.parts {
            control.check()?;
            part.image = Some(LockedImage::acquire(&part.path, &part.format).await?);
        }
        // Nobody writes from here on.
        self.taken = request.clock.now();
        let now = Survey::take(&self.domain, request).await?;
        self.check_same(before, &now)?;
        for (part, disk) in self.parts.iter_mut().zip(&now.disks) {
            let found = part.image.as_ref().expect("locked above").layers();
            part.read = base_of(disk, found, &self.names, request).await;
            let bitmaps = found[0].info.bitmaps.iter().flatten();
            let points = bitmaps.filter_map(|bitmap| self.names.point_of(&bitmap.name));
            part.old = points.filter(|point| *point != self.point).collect();
            let (description, read) = (disk.describe(), read_mode(part.read));
            self.disks.push(SnapshotDisk { description, read });
        }
        self.check_base(request)?;
        self.capture(now, request).await
    }

    /// An image in use is an error. One that cannot be changed can be read all the same: the next
    /// backup reads it in full.
    async fn add_bitmaps(&mut self, survey: &Survey, control: &Control) -> Result<()> {
        let name = self.names.of_point(self.point);
        let parts = self.parts.iter_mut().zip(&survey.disks);
        for (part, disk) in parts.filter(|(part, _)| part.tracked) {
            control.check()?;
            // Before the call: a call that fails half way is undone as well.
            part.added = true;
            match bitmap::add(&part.path, &part.format, &name).await {
                Ok(()) => {}
                Err(error) if error.kind() == Kind::Busy => return Err(error),
                Err(error) => {
                    part.tracked = false;
                    let target = &disk.disk.name;
                    let text = format!("the next backup reads {target} in full: {error}");
                    control.notice(NoticeLevel::Warning, text);
                }
            }
        }
        Ok(())
    }

    /// What was looked at before the lock must be what is locked.
    fn check_same(&self, before: &Survey, now: &Survey) -> Result<()> {
        let name = &self.domain.name;
        let lost =
            |what: String| Err(Error::new(Kind::SnapshotLost, what).hint("run the backup again"));
        if now.running {
            return lost(format!("domain '{name}' was started meanwhile"));
        }
        let sizes = |survey: &Survey| survey.disks.iter().map(|d| d.size_bytes).collect::<Vec<_>>();
        if now.set != before.set || sizes(now) != sizes(before) {
            return lost(format!("the disks of domain '{name}' were changed meanwhile"));
        }
        Ok(())
    }

    /// [`Kind::NoBase`] for an incremental of which no disk is one.
    fn check_base(&self, request: &SnapshotRequest) -> Result<()> {
        if request.mode != BackupMode::Incremental || self.parts.iter().any(|p| p.read.is_ok()) {
            return Ok(());
        }
        let reasons = self.parts.iter().filter_map(|part| part.read.err());
        let reasons: Vec<_> = reasons.map(FullReason::describe).collect();
        let (name, reasons) = (&self.domain.name, reasons.join("; "));
        let message = format!("no disk of domain '{name}' has anything to build on ({reasons})");
        Err(Error::new(Kind::NoBase, message).hint(TAKE_FULL))
    }

    /// The description and what it names: as the domain cannot start, all of it is of one instant.
    async fn capture(&mut self, now: Survey, request: &SnapshotRequest) -> Result<()> {
        let has_key = request.repository_has_key;
        let captured = artifacts::capture(&self.domain, &now.live, now.inactive, has_key).await?;
        (self.artifacts, self.not_captured) = captured;
        let saved =
            self.domain.call("look for a saved state of", |d| d.has_managed_save(0)).await?;
        if saved {
            self.not_captured.push(NotCaptured {
                what: "memory of the saved domain".into(),
                reason: "the disks are as they were when it was saved; start it and back it up \
                         running"
                    .into(),
            });
        }
        Ok(())
    }

    async fn check_stopped(&self) -> Result<()> {
        let active =
            self.domain.call("ask for the state of", virt::domain::Domain::is_active).await?;
        if !active {
            return Ok(());
        }
        let message = format!("domain '{}' was started meanwhile", self.domain.name);
        Err(Error::new(Kind::SnapshotLost, message).hint("run the backup again"))
    }

    async fn release(&mut self) -> Result<()> {
        let mut result = Ok(());
        for part in &mut self.parts {
            if let Some(image) = part.image.take() {
                result = result.and(image.release().await);
            }
        }
        result
    }
}

#[async_trait]
impl VmSnapshot for StoppedSnapshot {
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
        &self.artifacts
    }

    fn not_captured(&self) -> &[NotCaptured] {
        &self.not_captured
    }

    async fn source(&mut self, index: usize) -> Result<Arc<dyn BlockSource>> {
        let part = &mut self.parts[index];
        let changes = part.read.ok().map(|base| self.names.of_point(base));
        let image = part.image.as_mut().expect("locked when the snapshot was opened");
        self.lock.journal.before(Phase::Process);
        let source = image.source(changes.as_deref()).await?;
        self.lock.journal.after(Phase::Process);
        Ok(source)
    }

    async fn still_valid(&mut self) -> Result<()> {
        for image in self.parts.iter().filter_map(|part| part.image.as_ref()) {
            image.still_valid().await?;
        }
        self.check_stopped().await
    }

    async fn commit(mut self: Box<Self>) -> Result<()> {
        let mut result = self.release().await;
        self.lock.journal.before(Phase::Handover);
        for part in self.parts.iter().filter(|part| part.tracked) {
            for old in &part.old {
                let name = self.names.of_point(*old);
                result = result.and(bitmap::remove(&part.path, &part.format, &name).await);
            }
        }
        self.lock.journal.after(Phase::Handover);
        if result.is_ok() {
            // Bitmaps of runs that never committed are among those removed, and those that were handed over:
            // what was in the memory of a QEMU alone has ended with it.
            let mut quiet = Recovery::new(Mode::Undo);
            let (journal, repository) = (&mut self.lock.journal, &self.repository);
            result = reconcile::close(journal, Some(repository), &mut quiet)
                .and_then(|()| journal.hand_over(repository, &[]))
                .and_then(|()| journal.finish());
        }
        result.map_err(|error| {
            error.context(format!(
                "the backup of domain '{}' is complete, but an old bitmap was not removed",
                self.domain.name
            ))
        })
    }

    async fn abort(mut self: Box<Self>) -> Result<()> {
        let mut result = self.release().await;
        let name = self.names.of_point(self.point);
        for part in self.parts.iter().filter(|part| part.added) {
            let found = layers(&part.path, &part.format).await;
            let is_there = found.is_ok_and(|layers| {
                let bitmaps = layers[0].info.bitmaps.iter().flatten();
                bitmaps.into_iter().any(|bitmap| bitmap.name == name)
            });
            if is_there {
                result = result.and(bitmap::remove(&part.path, &part.format, &name).await);
            }
        }
        // A bitmap that stays is found by the journal.
        result.and_then(|()| self.lock.journal.finish())
    }
}
