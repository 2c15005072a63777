//! Proof that a point holds what its VM held: from the repository alone, or beside another disk.
//!
//! Without a partner all data is read back and its content root computed anew, from the data and
//! nothing else; it must equal the root recorded when the point was made. With a partner (an image,
//! an NBD export) the two disks are compared byte for byte.

use std::sync::Arc;

use serde::Serialize;

use super::source::{self, DiskSpec};
use super::{Repository, Surroundings, points};
use crate::content::ContentRoot;
use crate::control::Control;
use crate::copy;
use crate::error::{Error, Kind, Result};
use crate::image::OddEnd;
use crate::repo::{Manifest, ManifestDisk};
use crate::vm::{PointId, VmIdentity};

/// What to verify.
#[derive(Clone, Debug)]
pub struct Request {
    /// The point, as it was named.
    pub point: String,
    /// Only this disk.
    pub disk: Option<String>,
    /// Compare with this.
    pub against: Option<DiskSpec>,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The point.
    pub point: PointId,
    /// Its VM.
    pub vm: VmIdentity,
    /// The disk it was compared with, if one was named.
    pub against: Option<String>,
    /// Its disks.
    pub disks: Vec<DiskReport>,
}

/// What was found of a disk.
#[derive(Clone, Debug, Serialize)]
pub struct DiskReport {
    /// Its name in the VM.
    pub name: String,
    /// Its virtual size.
    pub size_bytes: u64,
    /// Whether it is what it should be.
    pub equal: bool,
    /// The root recorded with the point.
    pub expected_root: ContentRoot,
    /// The root computed now from the data of the repository; of the partner where one was named
    /// and it is equal.
    pub found_root: Option<ContentRoot>,
    /// Size of the partner, where one was named.
    pub against_size_bytes: Option<u64>,
    /// Where it differs from the partner; the first of them when there are many. Not looked for where
    /// the sizes differ.
    pub differences: Vec<Difference>,
}

/// A range that differs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Difference {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
}

/// Verifies a point, or one disk of it.
pub async fn run(
    repository: &Repository,
    request: Request,
    surroundings: Surroundings<'_>,
) -> Result<Report> {
    let work = Box::pin(verify(repository, request, surroundings));
    repository.while_held(surroundings.1, work).await
}

async fn verify(
    repository: &Repository,
    request: Request,
    surroundings: Surroundings<'_>,
) -> Result<Report> {
    let manifest = points::manifest(repository, &request.point, surroundings.0).await?;
    let chosen = points::choose_disks(&manifest, request.disk.as_slice())?;
    if request.against.is_some() && chosen.len() > 1 {
        let names: Vec<&str> = chosen.iter().map(|disk| disk.description.name.as_str()).collect();
        let message = format!("the point has {} disks: {}", names.len(), names.join(", "));
        return Err(Error::new(Kind::Usage, message).hint("say which one with --disk"));
    }
    let mut disks = Vec::new();
    for disk in chosen {
        disks.push(match &request.against {
            None => recompute(repository, &manifest, disk, surroundings).await?,
            Some(other) => compare(repository, disk, other, surroundings.1).await?,
        });
    }
    let against = request.against.as_ref().map(ToString::to_string);
    Ok(Report { point: manifest.point, vm: manifest.body.vm.clone(), against, disks })
}

async fn recompute(
    repository: &Repository,
    manifest: &Manifest,
    disk: &ManifestDisk,
    (env, control): Surroundings<'_>,
) -> Result<DiskReport> {
    let (name, size_bytes) = (&disk.description.name, disk.description.size_bytes);
    let reader = Arc::new(repository.open_disk(&disk.stored).await?);
    control.set_phase(format!("reading {name}"));
    let progress = control.add_disk(name, size_bytes);
    let options = copy::Options::new(
        format!("{name} of point {}", manifest.point.short()),
        "its content root",
    );
    let found = copy::content_root(reader, &options, &env.workers, control, &progress).await?;
    let expected_root = disk.stored.root;
    Ok(DiskReport {
        name: name.clone(),
        size_bytes,
        equal: found == expected_root,
        expected_root,
        found_root: Some(found),
        against_size_bytes: None,
        differences: Vec::new(),
    })
}

async fn compare(
    repository: &Repository,
    disk: &ManifestDisk,
    other: &DiskSpec,
    control: &Control,
) -> Result<DiskReport> {
    let (name, size_bytes) = (&disk.description.name, disk.description.size_bytes);
    let reader = Arc::new(repository.open_disk(&disk.stored).await?);
    let opened = source::open_disk(other, OddEnd::Padded).await?;
    let other_source = Arc::clone(&opened.source);
    let (expected_root, other_bytes) = (disk.stored.root, other_source.geometry().size_bytes);
    let different = DiskReport {
        name: name.clone(),
        size_bytes,
        equal: false,
        expected_root,
        found_root: None,
        against_size_bytes: Some(other_bytes),
        differences: Vec::new(),
    };
    if other_bytes != size_bytes {
        return Ok(different);
    }
    control.set_phase(format!("comparing {name}"));
    let progress = control.add_disk(name, size_bytes);
    let options = copy::Options::new(name.clone(), other.to_string());
    let compared = copy::compare(reader, other_source, &options, control, &progress).await?;
    opened.still_valid().await?;
    let differences = compared.differences.iter();
    Ok(DiskReport {
        equal: compared.is_equal(),
        found_root: compared.is_equal().then_some(expected_root),
        differences: differences
            .map(|range| Difference { offset: range.offset(), bytes: range.len() })
            .collect(),
        ..different
    })
}
