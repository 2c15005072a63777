//! Bitmaps inside images: names of ours, adding, removing, and which one to build on.

use std::ffi::OsStr;
use std::path::Path;

use super::info::{BitmapInfo, Layer};
use super::tool::qemu_img;
use crate::error::Result;
use crate::vm::{FullReason, PointId, Uuid};

/// What the bitmaps of one domain in one repository have in common, and how one is named.
///
/// `vmb-<repository, 8 hex>-<domain uuid>-<point, 32 hex>`, followed by `-<disk>` where nothing
/// but the name of the bitmap ties an image to a disk.
#[derive(Clone, Debug)]
pub struct BitmapNames {
    prefix: String,
    suffix: String,
}

impl BitmapNames {
    /// Names of the domain's bitmaps; `repository` is its id, of which eight digits are used.
    pub fn new(repository: &str, domain: Uuid) -> Self {
        let repository: String = repository.chars().take(8).collect();
        Self { prefix: format!("vmb-{repository}-{domain}-"), suffix: String::new() }
    }

    /// The same for one disk of a VM whose images are not bound to disks by anything else.
    #[must_use]
    pub fn of_disk(mut self, disk: &str) -> Self {
        self.suffix = format!("-{disk}");
        self
    }

    /// The name of the bitmap that begins at `point`.
    pub fn of_point(&self, point: PointId) -> String {
        format!("{}{point}{}", self.prefix, self.suffix)
    }

    /// The point a bitmap of ours begins at; `None` for everybody else's.
    pub fn point_of(&self, bitmap: &str) -> Option<PointId> {
        bitmap.strip_prefix(&self.prefix)?.strip_suffix(&self.suffix)?.parse().ok()
    }
}

/// Adds a recording bitmap. The caller makes sure that no one has the image open; QEMU's own lock
/// does so, too, and the error is then [`Kind::Busy`](crate::error::Kind::Busy).
pub async fn add(image: &Path, format: &str, name: &str) -> Result<()> {
    change("--add", image, format, name).await
}

/// Removes a bitmap.
pub async fn remove(image: &Path, format: &str, name: &str) -> Result<()> {
    change("--remove", image, format, name).await
}

async fn change(action: &str, image: &Path, format: &str, name: &str) -> Result<()> {
    let verb = action.trim_start_matches('-');
    let what = format!("{verb} bitmap {name} in {}", image.display());
    let args = ["bitmap", action, "-f", format].map(OsStr::new);
    let mut args: Vec<&OsStr> = args.into();
    args.extend([image.as_os_str(), OsStr::new(name)]);
    qemu_img(args, &what).await.map(|_| ())
}

/// A point a bitmap may begin at, and the size the disk had then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseCandidate {
    /// The point.
    pub point: PointId,
    /// Virtual size of this disk at it; `None` if the point has no such disk.
    pub size_bytes: Option<u64>,
}

/// The newest point the disk can be read incrementally from, or why there is none.
///
/// `candidates` are the points of the domain that the repository holds, newest first. Only a
/// bitmap of the active layer counts: what a lower layer recorded ended when the overlay was made.
pub fn choose_base(
    layers: &[Layer],
    names: &BitmapNames,
    candidates: &[BaseCandidate],
) -> std::result::Result<PointId, FullReason> {
    let top = layers.first().ok_or(FullReason::NoChangeTracking)?;
    if candidates.is_empty() {
        return Err(FullReason::FirstBackup);
    }
    let sizes: Vec<_> = candidates.iter().filter_map(|c| Some((c.point, c.size_bytes?))).collect();
    let Some((_, newest_size)) = sizes.first() else { return Err(FullReason::NewDisk) };
    let Some(bitmaps) = &top.info.bitmaps else { return Err(FullReason::FormatWithoutBitmaps) };
    if *newest_size != top.info.size_bytes {
        return Err(FullReason::Resized);
    }
    let mut reason = missing(&layers[1..], names, candidates);
    for (point, size_bytes) in sizes {
        let name = names.of_point(point);
        let Some(bitmap) = bitmaps.iter().find(|bitmap| bitmap.name == name) else { continue };
        match unusable(bitmap) {
            Some(why) => reason = why,
            None if size_bytes != top.info.size_bytes => reason = FullReason::Resized,
            None => return Ok(point),
        }
    }
    Err(reason)
}

fn unusable(bitmap: &BitmapInfo) -> Option<FullReason> {
    if bitmap.inconsistent {
        Some(FullReason::BitmapInconsistent)
    } else if bitmap.recording {
        None
    } else {
        Some(FullReason::BitmapNotRecording)
    }
}

/// Why there is no bitmap in the active layer.
fn missing(lower: &[Layer], names: &BitmapNames, candidates: &[BaseCandidate]) -> FullReason {
    let below = |name: String| {
        let mut bitmaps = lower.iter().filter_map(|layer| layer.info.bitmaps.as_ref()).flatten();
        bitmaps.any(|bitmap| bitmap.name == name)
    };
    if candidates.iter().any(|candidate| below(names.of_point(candidate.point))) {
        FullReason::BitmapNotInChain
    } else {
        FullReason::BitmapMissing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_repository_domain_and_disk_are_ours() {
        let domain = Uuid::from_u128(7);
        let names = BitmapNames::new("0123456789abcdef", domain).of_disk("a-b");
        let point = PointId([0xab; 16]);
        let name = names.of_point(point);
        assert!(name.starts_with("vmb-01234567-00000000-"), "{name}");
        assert_eq!(names.point_of(&name), Some(point));
        for other in [
            BitmapNames::new("1123456789abcdef", domain).of_disk("a-b"),
            BitmapNames::new("0123456789abcdef", Uuid::from_u128(8)).of_disk("a-b"),
            BitmapNames::new("0123456789abcdef", domain).of_disk("b"),
            BitmapNames::new("0123456789abcdef", domain),
        ] {
            assert_eq!(other.point_of(&name), None);
        }
        assert_eq!(names.point_of("b0"), None);
    }
}
