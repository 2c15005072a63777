//! Which bitmap each disk's incremental can build on, and what the transaction does with bitmaps.
//! Pure.
//!
//! Each checkpoint is a bitmap of its own that records from its instant on, so a run that fails
//! costs nothing: the base's bitmap was only read (merged into a temporary one). It is believed
//! only on the node the guest writes to, consistent, recording, of the point's disk by name and
//! of the size the point recorded (QEMU does not mark the area a disk grew by as dirty).
//!
//! A bitmap in another layer of the backing chain saw no write since an overlay was put above it:
//! the disk is then read in full, for that reason. A transient bitmap needs no further proof: that
//! it is there means that the process that made it is, too.

use qmp::Action;
use qmp::block::{Bitmap, BitmapRef, BitmapState, BitmapStorage, NewBitmap, Node};

use super::disks::Disk;
use super::names::Temp;
use crate::image::bitmap::BitmapNames;
use crate::platform::{self, BackupMode, SnapshotRequest};
use crate::vm::{FullReason, PointId, ReadMode};

/// The bitmap a disk's incremental builds on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) point: PointId,
    pub(super) bitmap: Bitmap,
}

/// Finds the newest usable base of `disk`. `nodes` are all nodes of the QEMU.
pub(super) fn base(
    disk: &Disk,
    nodes: &[Node],
    names: &BitmapNames,
    request: &SnapshotRequest,
) -> Result<Base, FullReason> {
    if request.mode == BackupMode::Full {
        return Err(FullReason::Requested);
    }
    if disk.shareable && !request.known_points.is_empty() {
        return Err(FullReason::Shareable);
    }
    // The names of these bitmaps carry the disk: which file it is in does not matter.
    let (known, disk_size) = (&request.known_points, (disk.name.as_str(), disk.size_bytes()));
    let points = platform::base::candidates(disk_size, known, |_| true)?;
    let own = names.of_disk(&disk.name);
    let mut why = FullReason::BitmapMissing;
    for point in points {
        let name = own.of_point(point);
        // A filter shows the bitmaps of the node below it, and its file.
        let mut others = nodes.iter().filter(|node| node.file != disk.node.file);
        let elsewhere = others.any(|node| node.bitmap(&name).is_some());
        let reason = match disk.node.bitmap(&name) {
            // What the layers record adds up to the changes; either alone misses some.
            _ if elsewhere => FullReason::BitmapNotInChain,
            Some(bitmap) => match usable(bitmap) {
                Ok(()) => return Ok(Base { point, bitmap: bitmap.clone() }),
                Err(reason) => reason,
            },
            None if is_anothers(disk, names, point) => FullReason::ImageReplaced,
            None => continue,
        };
        // Of several reasons the newest point's is told.
        if why == FullReason::BitmapMissing {
            why = reason;
        }
    }
    Err(why)
}

/// Whether the image has a bitmap that began at `point`, but on another disk of the VM.
fn is_anothers(disk: &Disk, names: &BitmapNames, point: PointId) -> bool {
    let mut bitmaps = disk.node.dirty_bitmaps.iter().filter_map(|bitmap| bitmap.name.as_deref());
    bitmaps.any(|name| names.point_of_any(name) == Some(point))
}

fn usable(bitmap: &Bitmap) -> Result<(), FullReason> {
    if bitmap.inconsistent {
        Err(FullReason::BitmapInconsistent)
    } else if bitmap.recording {
        Ok(())
    } else {
        Err(FullReason::BitmapNotRecording)
    }
}

/// How the manifest says it.
pub(super) fn read_mode(base: &Result<Base, FullReason>) -> ReadMode {
    match base {
        Ok(base) => ReadMode::Incremental { base: base.point },
        Err(reason) => ReadMode::Full { reason: *reason },
    }
}

/// The new checkpoint of a disk; none where its bitmap would miss other writers.
pub(super) fn new_bitmap(disk: &Disk, names: &BitmapNames, point: PointId) -> Option<BitmapRef> {
    let node = disk.node.name().to_owned();
    (!disk.shareable).then(|| BitmapRef { node, name: names.of_disk(&disk.name).of_point(point) })
}

/// The temporary bitmap a disk's changes since its base are merged into.
pub(super) fn changes_bitmap(disk: &Disk, point: PointId, index: usize) -> BitmapRef {
    BitmapRef { node: disk.node.name().to_owned(), name: Temp::Changes.name(point, index) }
}

/// Gathers what changed since the base into a bitmap of its own.
pub(super) fn merge(disk: &Disk, base: &Base, changes: &BitmapRef) -> [Action; 2] {
    let name = base.bitmap.name.clone().expect("a base is found by name");
    let source = BitmapRef { node: disk.node.name().to_owned(), name };
    // Disabled, so that a read-only export may offer it.
    let merged = NewBitmap {
        granularity: u32::try_from(base.bitmap.granularity).ok(),
        state: BitmapState::Disabled,
        storage: BitmapStorage::Transient,
    };
    [Action::bitmap_add(changes, &merged), Action::bitmap_merge(changes, &[source])]
}

/// Begins the new checkpoint of a disk.
pub(super) fn begin(disk: &Disk, new: &BitmapRef) -> Action {
    let storage =
        if disk.keeps_bitmaps() { BitmapStorage::Persistent } else { BitmapStorage::Transient };
    Action::bitmap_add(new, &NewBitmap { storage, ..NewBitmap::default() })
}

#[cfg(test)]
mod tests {
    use super::super::disks::tests::{device, request};
    use super::super::disks::{self};
    use super::*;
    use crate::platform::KnownPoint;
    use crate::vm::DiskDescription;
    use serde_json::{Value, json};

    const OLD: PointId = PointId([1; 16]);
    const NEW: PointId = PointId([2; 16]);

    fn names(disk: &str) -> BitmapNames {
        let all = BitmapNames::new("0123456789abcdef", crate::vm::Uuid::from_u128(7)).unwrap();
        if disk.is_empty() { all } else { all.of_disk(disk) }
    }

    fn bitmap(point: PointId, disk: &str, more: Value) -> Value {
        let mut bitmap = json!({
            "name": names(disk).of_point(point), "count": 0, "granularity": 65536,
            "recording": true, "busy": false, "persistent": true,
        });
        let Value::Object(more) = more else { panic!("members") };
        for (key, value) in more {
            bitmap[key.as_str()] = value;
        }
        bitmap
    }

    fn known(id: PointId, disk: &str, size: u64) -> KnownPoint {
        let device = device(disk, "na", json!({}));
        let described =
            disks::sort("vm", vec![device], &request()).unwrap().protected[0].description();
        let disk = DiskDescription { size_bytes: size, ..described };
        KnownPoint { id, disks: vec![disk], checkpoint_xml: None }
    }

    /// What becomes of a disk `a` with these bitmaps, when the repository has these points.
    fn found(bitmaps: &Value, points: Vec<KnownPoint>) -> Result<PointId, FullReason> {
        let devices = vec![device("a", "na", json!({ "dirty-bitmaps": bitmaps }))];
        let request = SnapshotRequest { known_points: points, ..request() };
        let disks = disks::sort("vm", devices, &request).unwrap();
        let backing: Node = serde_json::from_value(json!({
            "node-name": "backing", "drv": "qcow2", "ro": true, "file": "b",
            "image": { "filename": "b", "format": "qcow2", "virtual-size": 1 },
            "dirty-bitmaps": [bitmap(PointId([3; 16]), "a", json!({}))],
        }))
        .unwrap();
        let nodes = [disks.protected[0].node.clone(), backing];
        base(&disks.protected[0], &nodes, &names(""), &request).map(|base| base.point)
    }

    #[test]
    fn the_newest_point_with_a_good_bitmap_is_the_base() {
        let size = 1_048_576;
        let points = || vec![known(NEW, "a", size), known(OLD, "a", size)];
        let both = json!([bitmap(OLD, "a", json!({})), bitmap(NEW, "a", json!({}))]);
        assert_eq!(found(&both, points()), Ok(NEW));
        let broken = bitmap(NEW, "a", json!({ "inconsistent": true, "recording": false }));
        assert_eq!(found(&json!([broken, bitmap(OLD, "a", json!({}))]), points()), Ok(OLD));
        assert_eq!(found(&json!([broken]), points()), Err(FullReason::BitmapInconsistent));
    }

    #[test]
    fn each_broken_trust_has_its_reason() {
        let size = 1_048_576;
        let point = |disk, size| vec![known(NEW, disk, size)];
        let good = || json!([bitmap(NEW, "a", json!({}))]);
        assert_eq!(found(&good(), vec![]), Err(FullReason::FirstBackup));
        assert_eq!(found(&good(), point("b", size)), Err(FullReason::NewDisk));
        assert_eq!(found(&good(), point("a", 7)), Err(FullReason::Resized));
        assert_eq!(found(&json!([]), point("a", size)), Err(FullReason::BitmapMissing));
        let stopped = json!([bitmap(NEW, "a", json!({ "recording": false }))]);
        assert_eq!(found(&stopped, point("a", size)), Err(FullReason::BitmapNotRecording));
        // The image of another disk of this VM was put in this disk's place.
        let swapped = json!([bitmap(NEW, "b", json!({}))]);
        assert_eq!(found(&swapped, point("a", size)), Err(FullReason::ImageReplaced));
        let below = || vec![known(PointId([3; 16]), "a", size)];
        assert_eq!(found(&json!([]), below()), Err(FullReason::BitmapNotInChain));
        // The overlay has a bitmap of that name too: each records a part of the changes.
        let both = json!([bitmap(PointId([3; 16]), "a", json!({}))]);
        assert_eq!(found(&both, below()), Err(FullReason::BitmapNotInChain));
    }
}
