//! Which points a disk's bitmaps may name: what every platform demands before it looks for them.
//! Pure.
//!
//! A bitmap inside an image says what was written to that image since it began, however often the
//! image was copied or rolled back as a whole since (bitmap and content go together). So the base
//! is right if the image *was this disk* at the point the bitmap names. Where the bitmap's name
//! carries the disk, that is proven. libvirt gives the bitmaps of all disks of a checkpoint one
//! name: there the image has to be the one the point was read from ([`ImageId::is`]).
//!
//! [`ImageId::is`]: crate::vm::ImageId::is

use super::KnownPoint;
use crate::vm::{DiskDescription, FullReason, PointId};

/// The points whose bitmaps may serve the disk called `name`, newest first; or why there is none.
///
/// `was_this` decides whether the image now there is the one that a point describes.
pub(super) fn candidates(
    (name, size_bytes): (&str, u64),
    known: &[KnownPoint],
    was_this: impl Fn(&DiskDescription) -> bool,
) -> Result<Vec<PointId>, FullReason> {
    if known.is_empty() {
        return Err(FullReason::FirstBackup);
    }
    let held = known.iter().filter_map(|point| {
        let disk = point.disks.iter().find(|disk| disk.name == name)?;
        Some((point.id, disk))
    });
    let mut points = Vec::new();
    let mut end = FullReason::NewDisk;
    for (id, disk) in held {
        // A disk that was resized and back again has lost what it held beyond, and an image that
        // was replaced in between is not the one before: nothing older counts.
        if disk.size_bytes != size_bytes {
            end = FullReason::Resized;
            break;
        }
        if !was_this(disk) {
            end = FullReason::ImageReplaced;
            break;
        }
        points.push(id);
    }
    if points.is_empty() { Err(end) } else { Ok(points) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::DiskLayer;

    fn point(id: u8, disks: &[(&str, u64, &str)]) -> KnownPoint {
        let disk = |(name, size_bytes, origin): &(&str, u64, &str)| DiskDescription {
            name: (*name).to_owned(),
            size_bytes: *size_bytes,
            format: "qcow2".to_owned(),
            origin: (*origin).to_owned(),
            layer: DiskLayer::Plain,
            file: None,
        };
        let disks = disks.iter().map(disk).collect();
        KnownPoint { id: PointId([id; 16]), disks, checkpoint_xml: None }
    }

    fn ids(name: &str, size_bytes: u64, known: &[KnownPoint]) -> Result<Vec<u8>, FullReason> {
        let found = candidates((name, size_bytes), known, |disk| disk.origin == "/i/a")?;
        Ok(found.iter().map(|point| point.0[0]).collect())
    }

    #[test]
    fn each_disk_gets_the_points_that_fit_it_or_the_reason() {
        let known = [
            point(4, &[("vda", 10, "/i/a")]),
            point(3, &[("vdb", 1, "/i/b")]),
            point(2, &[("vda", 10, "/i/a")]),
            point(1, &[("vda", 9, "/i/a")]),
        ];
        assert_eq!(ids("vda", 10, &known), Ok(vec![4, 2]));
        assert_eq!(ids("vda", 9, &known), Err(FullReason::Resized));
        assert_eq!(ids("vda", 10, &[]), Err(FullReason::FirstBackup));
        assert_eq!(ids("vda", 10, &known[1..2]), Err(FullReason::NewDisk));
        assert_eq!(ids("vdb", 1, &known), Err(FullReason::ImageReplaced));
    }

    #[test]
    fn nothing_older_than_a_change_of_size_or_image_counts() {
        let known = [point(3, &[("vda", 10, "/i/a")]), point(1, &[("vda", 10, "/i/a")])];
        for between in [("vda", 12, "/i/a"), ("vda", 10, "/i/b")] {
            let known = [known[0].clone(), point(2, &[between]), known[1].clone()];
            assert_eq!(ids("vda", 10, &known), Ok(vec![3]));
            assert!(ids("vda", 10, &known[1..]).is_err());
        }
    }
}
