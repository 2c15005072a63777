//! Bitmaps inside images: names of ours, adding, removing, and which one to build on.

use std::ffi::OsStr;
use std::path::Path;

use super::info::{BitmapInfo, Layer, layers};
use super::lock::ImageLock;
use super::node;
use super::tool::qemu_img;
use crate::error::{Error, Kind, Result};
use crate::vm::{FullReason, PointId, Uuid};

/// Length of a point id in a name.
const POINT_DIGITS: usize = 32;
/// Longest name of a persistent bitmap (`BDRV_BITMAP_MAX_NAME_SIZE`).
const NAME_BYTES_MAX: usize = 1023;

/// What the bitmaps of one domain in one repository have in common, and how one is named.
///
/// `vmb-<repository, 8 hex>-<domain uuid>-<point, 32 hex>`, followed by `-<disk>` where the
/// platform is free to choose the name (libvirt wants one for all disks of a checkpoint).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapNames {
    prefix: String,
    suffix: String,
}

impl BitmapNames {
    /// Names of the domain's bitmaps; `repository` is its id in hex, of which eight digits are used.
    pub fn new(repository: &str, domain: Uuid) -> Result<Self> {
        let short = repository.get(..8).filter(|s| s.bytes().all(|b| b.is_ascii_hexdigit()));
        let short = short.ok_or_else(|| {
            Error::new(Kind::Internal, format!("repository id '{repository}' is not hexadecimal"))
        })?;
        let prefix = format!("vmb-{}-{domain}-", short.to_ascii_lowercase());
        Ok(Self { prefix, suffix: String::new() })
    }

    /// The same for one disk.
    #[must_use]
    pub fn of_disk(&self, disk: &str) -> Self {
        let room = NAME_BYTES_MAX - self.prefix.len() - POINT_DIGITS;
        let mut suffix = format!("-{disk}");
        while suffix.len() > room {
            suffix.pop();
        }
        Self { prefix: self.prefix.clone(), suffix }
    }

    /// The name of the bitmap that begins at `point`.
    pub fn of_point(&self, point: PointId) -> String {
        format!("{}{point}{}", self.prefix, self.suffix)
    }

    /// The point a bitmap of ours begins at; `None` for everybody else's and other disks'.
    pub fn point_of(&self, bitmap: &str) -> Option<PointId> {
        bitmap.strip_prefix(&self.prefix)?.strip_suffix(&self.suffix)?.parse().ok()
    }

    /// The same whichever disk of the domain it began on.
    pub fn point_of_any(&self, bitmap: &str) -> Option<PointId> {
        let (point, rest) = bitmap.strip_prefix(&self.prefix)?.split_at_checked(POINT_DIGITS)?;
        (rest.is_empty() || rest.starts_with('-')).then(|| point.parse().ok()).flatten()
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
    // qemu-img's own locks do not reach every user of a device.
    let layers = layers(image, format).await?;
    layers.iter().take(1).flat_map(Layer::files).try_for_each(ImageLock::probe_to_write)?;
    let node = node::options(&layers);
    let mut args: Vec<&OsStr> = ["bitmap", action].map(OsStr::new).into();
    match &node {
        Some(node) => args.extend([OsStr::new("--image-opts"), node]),
        None => args.extend(["-f".as_ref(), format.as_ref(), image.as_os_str()]),
    }
    args.push(OsStr::new(name));
    qemu_img(args, &what).await.map(|_| ())
}

/// The newest point the disk can be read incrementally from, or why there is none.
///
/// `candidates` are the points that held this disk as it is now, newest first. Only bitmaps of the
/// active layer can be read by: what a lower one recorded ended when the overlay was made, and an
/// overlay that libvirt gave a bitmap of the same name goes on where the lower one ended. Either
/// alone misses changes.
pub fn choose_base(
    layers: &[Layer],
    names: &BitmapNames,
    candidates: &[PointId],
) -> std::result::Result<PointId, FullReason> {
    let (top, lower) = layers.split_first().ok_or(FullReason::NoChangeTracking)?;
    let Some(bitmaps) = &top.info.bitmaps else { return Err(FullReason::FormatWithoutBitmaps) };
    let mut reason = FullReason::BitmapMissing;
    for point in candidates {
        let name = names.of_point(*point);
        let fits = |bitmap: &&BitmapInfo| bitmap.name == name;
        let below = lower.iter().filter_map(|layer| layer.info.bitmaps.as_ref()).flatten();
        let why = match bitmaps.iter().find(fits).map(unusable) {
            _ if below.into_iter().any(|bitmap| fits(&bitmap)) => FullReason::BitmapNotInChain,
            Some(None) => return Ok(*point),
            Some(Some(why)) => why,
            None if bitmaps.iter().any(|b| names.point_of_any(&b.name) == Some(*point)) => {
                FullReason::ImageReplaced
            }
            None => continue,
        };
        // Of several reasons the newest point's is told.
        if reason == FullReason::BitmapMissing {
            reason = why;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_repository_domain_and_disk_are_ours() {
        let domain = Uuid::from_u128(7);
        let all = BitmapNames::new("0123456789ABCDEF", domain).unwrap();
        let names = all.of_disk("a-b");
        let point = PointId([0xab; 16]);
        let name = names.of_point(point);
        assert!(name.starts_with("vmb-01234567-00000000-"), "{name}");
        assert_eq!(names.point_of(&name), Some(point));
        for other in [
            BitmapNames::new("1123456789abcdef", domain).unwrap().of_disk("a-b"),
            BitmapNames::new("0123456789abcdef", Uuid::from_u128(8)).unwrap().of_disk("a-b"),
            all.of_disk("b"),
            all.clone(),
        ] {
            assert_eq!(other.point_of(&name), None);
        }
        assert_eq!(all.of_disk("b").point_of_any(&name), Some(point));
        assert_eq!(all.point_of_any(&all.of_point(point)), Some(point));
        for foreign in ["b0", "virtnbdbackup.0", &name[..60], &name.replace("-a-b", "a-b")] {
            assert_eq!((names.point_of(foreign), all.point_of_any(foreign)), (None, None));
        }
        assert!(BitmapNames::new("abc", domain).is_err());
        // The name of a clone's disk is as long as it likes; that of a bitmap is not.
        assert_eq!(all.of_disk(&"ä".repeat(600)).of_point(point).len(), NAME_BYTES_MAX);
    }
}
