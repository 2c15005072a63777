//! A snapshot of a stopped domain: its images, read under a lock that keeps the domain from
//! starting.
//!
//! The new bitmap is added *before* the lock is taken, because the lock keeps every writer out,
//! ourselves included. That is safe: a bitmap that begins before the instant marks what was
//! written in between, and the next incremental reads it once more. Old bitmaps are removed after
//! the lock is released; if the domain was started at that moment, the next run does it.
//!
//! Nothing is defined in libvirt: the next run on the running domain redefines the checkpoint from
//! the point's id, as it does for its own.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;

use super::artifacts;
use super::connection::DomainHandle;
use super::lock::{DomainLock, Record};
use super::survey::Survey;
use crate::block::BlockSource;
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::image::bitmap::{self, BaseCandidate, BitmapNames};
use crate::image::{LockedImage, layers};
use crate::platform::{BackupMode, SnapshotDisk, SnapshotRequest, VmSnapshot};
use crate::vm::{
    Artifact, Consistency, DiskDescription, ExcludedDisk, FullReason, NotCaptured, PointId,
    Quiescence, ReadMode,
};

/// One disk of a stopped domain.
struct StoppedDisk {
    path: PathBuf,
    format: String,
    /// The point its bitmap begins at, or why it is read in full.
    read: Result<PointId, FullReason>,
    /// It gets a bitmap.
    tracked: bool,
    /// Bitmaps of ours in it, the new one not among them.
    old: Vec<PointId>,
    /// The new bitmap is in the image.
    added: bool,
    image: Option<LockedImage>,
}

/// The transaction.
pub(super) struct StoppedSnapshot {
    domain: DomainHandle,
    names: BitmapNames,
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

/// What would be read of each disk, and why. Changes nothing.
pub(super) async fn reads(
    domain: &DomainHandle,
    survey: &Survey,
    request: &SnapshotRequest,
) -> Result<Vec<Result<PointId, FullReason>>> {
    let names = BitmapNames::new(&request.repository, domain.uuid);
    let parts = look(domain, survey, request, &names).await?;
    Ok(parts.into_iter().map(|part| part.read).collect())
}

/// Opens a snapshot of a domain that is not running.
pub(super) async fn open(
    domain: &DomainHandle,
    survey: Survey,
    mut lock: DomainLock,
    request: &SnapshotRequest,
    control: &Control,
) -> Result<StoppedSnapshot> {
    let names = BitmapNames::new(&request.repository, domain.uuid);
    let parts = look(domain, &survey, request, &names).await?;
    if request.mode == BackupMode::Incremental && parts.iter().all(|part| part.read.is_err()) {
        let message = format!("no disk of domain '{}' has anything to build on", domain.name);
        return Err(Error::new(Kind::NoBase, message)
            .hint("take a full backup first: 'vmbackup full', or use 'vmbackup backup'"));
    }
    let (artifacts, mut not_captured) = artifacts::capture(
        domain,
        &survey.live,
        survey.inactive.clone(),
        request.repository_has_key,
    )
    .await?;
    if domain.call("look for a saved state of", |domain| domain.has_managed_save(0)).await? {
        not_captured.push(NotCaptured {
            what: "memory of the saved domain".into(),
            reason: "the disks are as they were when it was saved; start it and back it up running"
                .into(),
        });
    }
    lock.record(&Record { point: request.point, frozen: false })?;
    let disks = describe(&survey, &parts);
    let mut snapshot = StoppedSnapshot {
        domain: domain.clone(),
        names,
        point: request.point,
        parts,
        disks,
        excluded: survey.set.excluded,
        taken: request.clock.now(),
        quiescence: Quiescence { level: Consistency::Stopped, frozen_ms: None, reason: None },
        artifacts,
        not_captured,
        lock,
    };
    let name = &domain.name;
    control.notice(NoticeLevel::Info, format!("domain '{name}' cannot start until this is over"));
    if let Err(error) = snapshot.take(control).await {
        if let Err(undo) = Box::new(snapshot).abort().await {
            tracing::warn!(error = ?undo, "a bitmap of a failed backup remains");
        }
        return Err(error);
    }
    // Nobody writes from here on.
    snapshot.taken = request.clock.now();
    Ok(snapshot)
}

/// The images with their bitmaps.
async fn look(
    domain: &DomainHandle,
    survey: &Survey,
    request: &SnapshotRequest,
    names: &BitmapNames,
) -> Result<Vec<StoppedDisk>> {
    let name = &domain.name;
    let start = |what: String| {
        Error::new(Kind::Unsupported, what).hint(format!(
            "start the domain ('virsh start {name}', or 'virsh start --paused {name}') and back it up running"
        ))
    };
    if !domain.host.is_local() {
        return Err(start(format!(
            "domain '{name}' is stopped, and its images are on another host"
        )));
    }
    let mut parts = Vec::new();
    for disk in &survey.disks {
        let Some(path) = disk.disk.path.clone() else {
            let target = &disk.disk.name;
            let origin = &disk.disk.origin;
            return Err(start(format!(
                "disk {target} of the stopped domain '{name}' is no file of this host ({origin})"
            )));
        };
        let found = layers(&path, &disk.disk.format).await?;
        let candidates: Vec<_> = request
            .known_points
            .iter()
            .map(|point| BaseCandidate {
                point: point.id,
                size_bytes: point.disks.iter().find(|d| d.0 == disk.disk.name).map(|d| d.1),
            })
            .collect();
        let read = match disk.disk.untracked {
            _ if request.mode == BackupMode::Full => Err(FullReason::Requested),
            Some(reason) => Err(reason),
            None => bitmap::choose_base(&found, names, &candidates),
        };
        let bitmaps = found[0].info.bitmaps.as_ref();
        let old = bitmaps.iter().flat_map(|list| list.iter());
        parts.push(StoppedDisk {
            path,
            format: disk.disk.format.clone(),
            read,
            tracked: disk.disk.untracked.is_none() && bitmaps.is_some(),
            old: old.filter_map(|bitmap| names.point_of(&bitmap.name)).collect(),
            added: false,
            image: None,
        });
    }
    Ok(parts)
}

fn describe(survey: &Survey, parts: &[StoppedDisk]) -> Vec<SnapshotDisk> {
    let disks = survey.disks.iter().zip(parts);
    disks
        .map(|(disk, part)| SnapshotDisk {
            description: DiskDescription {
                name: disk.disk.name.clone(),
                size_bytes: disk.size_bytes,
                format: disk.disk.format.clone(),
                origin: disk.disk.origin.clone(),
                layer: disk.disk.layer,
            },
            read: match part.read {
                Ok(base) => ReadMode::Incremental { base },
                Err(reason) => ReadMode::Full { reason },
            },
        })
        .collect()
}

impl StoppedSnapshot {
    /// Adds the bitmaps, takes the locks, and looks again whether the domain is still stopped.
    async fn take(&mut self, control: &Control) -> Result<()> {
        let name = self.names.of_point(self.point);
        for part in self.parts.iter_mut().filter(|part| part.tracked) {
            control.check()?;
            // Before the call: a call that fails half way is undone as well.
            part.added = true;
            bitmap::add(&part.path, &part.format, &name).await?;
        }
        for part in &mut self.parts {
            control.check()?;
            part.image = Some(LockedImage::acquire(&part.path, &part.format).await?);
        }
        self.check_stopped().await
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
        image.source(changes.as_deref()).await
    }

    async fn still_valid(&mut self) -> Result<()> {
        for image in self.parts.iter().filter_map(|part| part.image.as_ref()) {
            image.still_valid().await?;
        }
        self.check_stopped().await
    }

    async fn commit(mut self: Box<Self>) -> Result<()> {
        let mut result = self.release().await;
        for part in self.parts.iter().filter(|part| part.tracked) {
            for old in &part.old {
                let name = self.names.of_point(*old);
                result = result.and(bitmap::remove(&part.path, &part.format, &name).await);
            }
        }
        result.and(self.lock.clear()).map_err(|error| {
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
        result.and(self.lock.clear())
    }
}
