//! Points of a repository as jobs use them: lists, manifests, bases of incrementals.

use std::collections::HashSet;

use super::backup::{DiskReport, Report};
use super::select::{self, PointRef};
use super::{Env, Repository, show};
use crate::error::{Error, Kind, Result};
use crate::platform::{KnownPoint, SnapshotDisk};
use crate::repo::{
    Manifest, ManifestArtifact, ManifestDisk, ManifestDraft, PointName, PointsOf, Run, StoredDisk,
    Summary, WriteStats,
};
use crate::vm::{Artifact, ArtifactKind, PointId, ReadMode, Uuid};

/// Newest points of a VM whose bitmaps an incremental may build on. A bitmap of an older point is
/// left over from interrupted runs; reading in full is right then.
const BASES_MAX: usize = 16;

/// What a repository has of a VM, as far as the next backup asks.
#[derive(Clone, Debug, Default)]
pub(super) struct Bases {
    /// The newest points with a readable manifest, newest first.
    points: Vec<Base>,
    /// All points, by their names: a manifest that cannot be read, or is too old to build on, is
    /// no reason to take its point's bitmap for a leftover.
    ids: HashSet<PointId>,
}

/// A point of a VM that a new one may build on.
#[derive(Clone, Debug)]
struct Base {
    manifest: Manifest,
    checkpoint_xml: Option<String>,
}

impl Bases {
    /// What there is of `vm`. A point whose manifest is damaged is none to build on: its disks are
    /// read in full, which heals what can be healed.
    pub(super) async fn read(repository: &Repository, vm: Uuid) -> Result<Self> {
        let names = repository.point_names(Some(vm)).await?;
        let mut points = Vec::new();
        for name in names.iter().rev().take(BASES_MAX) {
            match base(repository, name).await {
                Ok(base) => points.push(base),
                Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound) => {
                    tracing::warn!(point = %name.point, ?error, "a damaged point is no base");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Self { points, ids: names.iter().map(|name| name.point).collect() })
    }

    /// What a platform is told of the points.
    pub(super) fn known_points(&self) -> Vec<KnownPoint> {
        self.points.iter().map(Base::known_point).collect()
    }

    /// Every point there is.
    pub(super) fn point_ids(&self) -> HashSet<PointId> {
        self.ids.clone()
    }

    /// The disks of the newest point, on which the next builds unless its bitmaps are gone.
    pub(super) fn newest(&self) -> impl Iterator<Item = &StoredDisk> {
        let newest = self.points.first();
        newest.into_iter().flat_map(|point| &point.manifest.body.disks).map(|disk| &disk.stored)
    }

    /// The stored disk that `disk` continues: what the bitmap names, for an incremental. A disk
    /// that is read in full has none, so that nothing of it can be kept by mistake; what the
    /// repository holds already is found by its content.
    pub(super) fn of(&self, disk: &SnapshotDisk) -> Result<Option<&StoredDisk>> {
        let (name, size_bytes) = (&disk.description.name, disk.description.size_bytes);
        let ReadMode::Incremental { base } = disk.read else { return Ok(None) };
        let found = self.points.iter().find(|point| point.manifest.point == base);
        let found = found.and_then(|point| point.disk(name, size_bytes));
        let message = format!("{name} builds on point {base}, which does not hold it");
        found.map(Some).ok_or_else(|| Error::new(Kind::Internal, message))
    }
}

impl Base {
    fn known_point(&self) -> KnownPoint {
        let disks = self.manifest.body.disks.iter();
        KnownPoint {
            id: self.manifest.point,
            disks: disks.map(|disk| disk.description.clone()).collect(),
            checkpoint_xml: self.checkpoint_xml.clone(),
        }
    }

    fn disk(&self, name: &str, size_bytes: u64) -> Option<&StoredDisk> {
        let mut disks = self.manifest.body.disks.iter();
        let same = |disk: &&ManifestDisk| {
            disk.description.name == name && disk.description.size_bytes == size_bytes
        };
        disks.find(same).map(|disk| &disk.stored)
    }
}

async fn base(repository: &Repository, name: &PointName) -> Result<Base> {
    let manifest = repository.manifest(name).await?;
    let checkpoint_xml = checkpoint_xml(repository, &manifest).await?;
    Ok(Base { manifest, checkpoint_xml })
}

async fn checkpoint_xml(repository: &Repository, manifest: &Manifest) -> Result<Option<String>> {
    let Some(artifact) = artifact(manifest, ArtifactKind::CheckpointXml) else { return Ok(None) };
    let bytes = repository.read_bytes(&artifact.stored).await?;
    String::from_utf8(bytes).map(Some).map_err(|e| {
        let point = manifest.point.short();
        let message = format!("the checkpoint XML of point {point} is no text");
        Error::new(Kind::Corrupt, message).source(e)
    })
}

/// The VM that `name` names. However many points there are, few are held.
pub(super) async fn vm(repository: &Repository, name: &str) -> Result<Uuid> {
    let choose = |points: &[PointRef]| select::vm(points, name).map(|(uuid, _)| uuid);
    match choose(&names_of_vms(repository, PointsOf::Called(name)).await?) {
        // Its error says what names there are.
        Err(error) if error.kind() == Kind::NotFound => {
            choose(&names_of_vms(repository, PointsOf::All).await?)
        }
        // Its error counts their points.
        Err(error) if error.kind() == Kind::Ambiguous => {
            choose_among(repository, name, choose).await.map(|(_, uuid)| uuid)
        }
        chosen => chosen,
    }
}

/// A point for every name that a VM had.
async fn names_of_vms(repository: &Repository, of: PointsOf<'_>) -> Result<Vec<PointRef>> {
    let mut pages = repository.summary_pages(of).await?;
    let (mut seen, mut names) = (HashSet::new(), Vec::new());
    while let Some(page) = pages.next().await? {
        for point in page {
            if seen.insert((point.vm.uuid, point.vm.name.clone())) {
                names.push(reference(&point));
            }
        }
    }
    Ok(names)
}

/// The point that `name` names. Only the points that can be meant are looked at, unless none is.
pub(super) async fn find(repository: &Repository, name: &str, env: &Env) -> Result<Summary> {
    let choose = |points: &[PointRef]| select::point(points, name, &env.zone).map(|point| point.id);
    let (points, id) = match name.rsplit_once('@') {
        Some((vm, _)) => choose_among(repository, vm, choose).await?,
        None => match only_with_prefix(repository, name).await? {
            Some(name) => return Ok(Summary::of(&repository.manifest(&name).await?)),
            None => choose_among_all(repository, choose).await?,
        },
    };
    let found = points.into_iter().find(|point| point.point == id);
    Ok(found.expect("the point was chosen among these"))
}

/// The manifest of the point that `name` names.
pub(super) async fn manifest(repository: &Repository, name: &str, env: &Env) -> Result<Manifest> {
    repository.manifest(&find(repository, name, env).await?.name()).await
}

/// The one point whose id begins with `prefix`; its name tells, no manifest is read.
async fn only_with_prefix(repository: &Repository, prefix: &str) -> Result<Option<PointName>> {
    let prefix = prefix.to_ascii_lowercase();
    let names = repository.point_names(None).await?;
    let mut found = names.into_iter().filter(|name| name.point.to_string().starts_with(&prefix));
    Ok(found.next().filter(|_| found.next().is_none() && !prefix.is_empty()))
}

/// What `choose` takes of the points of VMs called `vm`, and these. Where it finds nothing it sees
/// all points: its error says what there is.
async fn choose_among<T>(
    repository: &Repository,
    vm: &str,
    choose: impl Fn(&[PointRef]) -> Result<T>,
) -> Result<(Vec<Summary>, T)> {
    let points = repository.summaries(PointsOf::Called(vm)).await?;
    let references: Vec<_> = points.iter().map(reference).collect();
    match choose(&references) {
        Err(error) if error.kind() == Kind::NotFound => choose_among_all(repository, choose).await,
        chosen => Ok((points, chosen?)),
    }
}

async fn choose_among_all<T>(
    repository: &Repository,
    choose: impl Fn(&[PointRef]) -> Result<T>,
) -> Result<(Vec<Summary>, T)> {
    let points = repository.summaries(PointsOf::All).await?;
    let references: Vec<_> = points.iter().map(reference).collect();
    let chosen = choose(&references)?;
    Ok((points, chosen))
}

fn reference(point: &Summary) -> PointRef {
    PointRef { id: point.point, vm: point.vm.uuid, name: point.vm.name.clone(), time: point.taken }
}

/// The disks of a point that `names` name; all when it is empty.
pub(super) fn choose_disks<'a>(
    manifest: &'a Manifest,
    names: &[String],
) -> Result<Vec<&'a ManifestDisk>> {
    let has = |name: &str| manifest.body.disks.iter().any(|disk| disk.description.name == name);
    if let Some(unknown) = names.iter().find(|name| !has(name)) {
        let known: Vec<&str> =
            manifest.body.disks.iter().map(|disk| disk.description.name.as_str()).collect();
        let message = format!("point {} has no disk '{unknown}'", manifest.point.short());
        return Err(
            Error::new(Kind::NotFound, message).hint(format!("its disks: {}", known.join(", ")))
        );
    }
    let wanted = |disk: &&ManifestDisk| names.is_empty() || names.contains(&disk.description.name);
    Ok(manifest.body.disks.iter().filter(wanted).collect())
}

/// What of kind `kind` a point holds besides disks.
pub(super) fn artifact(manifest: &Manifest, kind: ArtifactKind) -> Option<&ManifestArtifact> {
    manifest.body.artifacts.iter().find(|artifact| artifact.kind == kind)
}

/// A point as `show` has it.
pub(super) fn point(manifest: &Manifest) -> show::Point {
    let disk = |disk: &ManifestDisk| show::Disk {
        name: disk.description.name.clone(),
        size_bytes: disk.description.size_bytes,
        format: disk.description.format.clone(),
        origin: disk.description.origin.clone(),
        layer: disk.description.layer,
        read: disk.read.clone(),
        audit: disk.audit,
        read_bytes: disk.read_bytes,
        stored_bytes: disk.stats.stored_bytes,
        content_root: disk.stored.root,
    };
    let artifact = |artifact: &ManifestArtifact| show::Artifact {
        kind: artifact.kind,
        origin: artifact.origin.clone(),
        size_bytes: artifact.stored.size_bytes,
    };
    let body = &manifest.body;
    show::Point {
        id: manifest.point,
        vm: body.vm.clone(),
        time: body.taken,
        quiescence: body.quiescence.clone(),
        disks: body.disks.iter().map(disk).collect(),
        excluded: body.excluded.clone(),
        artifacts: body.artifacts.iter().map(artifact).collect(),
        not_captured: body.not_captured.clone(),
    }
}

/// Stores what a VM has besides disks.
pub(super) async fn store_artifact(run: &Run, artifact: &Artifact) -> Result<ManifestArtifact> {
    let stored = run.store_bytes(&artifact.bytes).await?;
    Ok(ManifestArtifact { kind: artifact.kind, origin: artifact.origin.clone(), stored })
}

/// A disk as the manifest records it.
pub(super) fn point_disk(
    disk: SnapshotDisk,
    (stored, stats): (StoredDisk, WriteStats),
    report: &DiskReport,
) -> ManifestDisk {
    ManifestDisk {
        description: disk.description,
        read: disk.read,
        audit: report.audit,
        stored,
        read_bytes: report.read_bytes,
        stats,
    }
}

/// The manifest of a backup.
pub(super) fn draft(
    report: &Report,
    disks: Vec<ManifestDisk>,
    artifacts: Vec<ManifestArtifact>,
) -> ManifestDraft {
    ManifestDraft {
        vm: report.vm.clone(),
        taken: report.time,
        finished: report.time,
        quiescence: report.quiescence.clone(),
        disks,
        excluded: report.excluded.clone(),
        not_captured: report.not_captured.clone(),
        artifacts,
        program: concat!("vmbackup ", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

#[cfg(test)]
mod tests;
