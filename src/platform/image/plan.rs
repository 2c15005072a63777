//! What a backup of the images would do. Changes nothing, takes no lock.

use crate::error::{Error, Kind, Result};
use crate::image::{ImageLock, Layer, changed_bytes, layers};
use crate::platform::{
    EXCLUDED_BY_OPTION, PlannedDisk, Platform, Problem, SnapshotPlan, SnapshotRequest,
    nothing_to_read,
};
use crate::vm::{DiskDescription, DiskLayer, ExcludedDisk};

use super::checkpoint::Checkpoints;
use super::snapshot::description;
use super::{ImageDisk, Images};

/// The plan.
pub(super) async fn plan(images: &Images, request: &SnapshotRequest) -> Result<SnapshotPlan> {
    let identity = images.identify().await?;
    let (included, excluded) = select(images, request)?;
    let mut disks = Vec::new();
    let mut problems = vec![Problem {
        fatal: None,
        what: "the VM cannot start while its images are read".to_owned(),
        fix: "stop the backup (Ctrl-C) if the VM must start before it has ended".to_owned(),
    }];
    for disk in included {
        let layers = match layers(&disk.source.path, &disk.source.format).await {
            Ok(layers) => layers,
            Err(error) => {
                problems.push(Problem::fatal(&error));
                continue;
            }
        };
        let used = layers.iter().flat_map(Layer::files).filter_map(|f| ImageLock::probe(f).err());
        problems.extend(used.map(|error| Problem::fatal(&error)));
        let checkpoints = Checkpoints::new(request, identity.uuid, &disk.name)?;
        let read = checkpoints.read_mode(disk, &layers, request);
        let expected_bytes = match checkpoints.base_of(&read) {
            Some(bitmap) => changed_bytes(&layers, &bitmap).await,
            None => allocated_bytes(&layers),
        };
        let description = describe(disk, &layers);
        disks.push(PlannedDisk { description, read: Some(read), expected_bytes });
    }
    let not_captured = vec![description()];
    let (running, scratch) = (false, None);
    Ok(SnapshotPlan { identity, running, disks, excluded, not_captured, scratch, problems })
}

/// The disks that are read and those that are left out. An unknown name is an error.
pub(super) fn select<'a>(
    images: &'a Images,
    request: &SnapshotRequest,
) -> Result<(Vec<&'a ImageDisk>, Vec<ExcludedDisk>)> {
    let disks = &images.disks;
    let is_excluded = |disk: &ImageDisk| request.exclude_disks.contains(&disk.name);
    let unknown = request.exclude_disks.iter().find(|name| disks.iter().all(|d| d.name != **name));
    if let Some(name) = unknown {
        let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
        return Err(Error::new(Kind::NotFound, format!("no image is disk '{name}'"))
            .hint(format!("the disks are {}", names.join(", "))));
    }
    let excluded = |disk: &ImageDisk| ExcludedDisk {
        name: disk.name.clone(),
        reason: EXCLUDED_BY_OPTION.to_owned(),
    };
    let included: Vec<_> = disks.iter().filter(|disk| !is_excluded(disk)).collect();
    let excluded: Vec<_> = disks.iter().filter(|disk| is_excluded(disk)).map(excluded).collect();
    if included.is_empty() {
        return Err(nothing_to_read(&images.name, &excluded));
    }
    Ok((included, excluded))
}

/// The disk as manifests describe it.
pub(super) fn describe(disk: &ImageDisk, layers: &[Layer]) -> DiskDescription {
    let top = layers.first().expect("an image has a layer");
    DiskDescription {
        name: disk.name.clone(),
        size_bytes: top.info.size_bytes,
        format: top.format.clone(),
        origin: top.path.display().to_string(),
        layer: DiskLayer::Plain,
        file: None,
    }
}

/// Most that can be read: what the files of all layers take, and not more than the disk.
fn allocated_bytes(layers: &[Layer]) -> Option<u64> {
    let sum = layers.iter().map(|layer| layer.info.allocated_bytes).sum::<Option<u64>>()?;
    Some(sum.min(layers.first()?.info.size_bytes))
}
