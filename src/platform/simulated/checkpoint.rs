//! Which point each disk's incremental can build on: the platforms' own rules, on simulated bitmaps.

use super::guest::{Disk, Guest, Naming};
use super::image::BitmapState;
use crate::error::{Error, Kind, Result};
use crate::platform::base::candidates;
use crate::platform::{BackupMode, SnapshotDisk, SnapshotRequest};
use crate::vm::{DiskDescription, FullReason, PointId, ReadMode};

/// The disks of a snapshot, with how each is read.
pub(super) fn survey(guest: &Guest, request: &SnapshotRequest) -> Result<Vec<SnapshotDisk>> {
    let disk = |disk: &Disk| SnapshotDisk {
        description: guest.describe(disk),
        read: match base(guest, disk, request) {
            Ok(base) => ReadMode::Incremental { base },
            Err(reason) => ReadMode::Full { reason },
        },
    };
    let disks: Vec<_> = guest.disks.iter().map(disk).collect();
    let full = |disk: &SnapshotDisk| matches!(disk.read, ReadMode::Full { .. });
    if request.mode == BackupMode::Incremental && disks.iter().all(full) {
        return Err(Error::new(Kind::NoBase, "no disk can be read incrementally"));
    }
    Ok(disks)
}

fn base(guest: &Guest, disk: &Disk, request: &SnapshotRequest) -> Result<PointId, FullReason> {
    if request.mode == BackupMode::Full {
        return Err(FullReason::Requested);
    }
    let now = guest.describe(disk);
    let was_this = |then: &DiskDescription| match guest.naming {
        Naming::ByName => true,
        Naming::ByFile => now.image().is(&then.image()),
    };
    let wanted = (now.name.as_str(), now.size_bytes);
    let mut why = FullReason::BitmapMissing;
    for point in candidates(wanted, &request.known_points, was_this)? {
        let name = guest.bitmap_name(&request.repository, &disk.name, point);
        let state = disk.image.bitmaps.get(&name).map(|bitmap| bitmap.state);
        let reason = match state {
            Some(BitmapState::Recording) => return Ok(point),
            Some(BitmapState::Stopped) => FullReason::BitmapNotRecording,
            Some(BitmapState::Inconsistent) => FullReason::BitmapInconsistent,
            None if disk.image.bitmaps.keys().any(|name| name.point == point) => {
                FullReason::ImageReplaced
            }
            None => continue,
        };
        if why == FullReason::BitmapMissing {
            why = reason;
        }
    }
    Err(why)
}
