//! Where restored disks go: which place each gets, and what is wrong with it. Changes nothing.

use std::path::{Path, PathBuf};

use super::artifacts::exists;
use super::problems::Problems;
use super::{Define, Request};
use crate::block::file::{Existing, followed, refuse_special};
use crate::copy::Zeroes;
use crate::error::{Error, Kind, Result};
use crate::repo::ManifestDisk;
use crate::units::KIB;

/// Shortest run of zeroes that becomes a hole: the block of most file systems.
const HOLE_BYTES: u64 = 4 * KIB;

/// Format of a restored image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// A sparse file.
    Raw,
    /// qcow2, version 3.
    Qcow2,
}

impl ImageFormat {
    /// Its name, which is the extension of the file as well.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Where a disk goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A new image.
    Image {
        /// Its name when it is complete.
        path: PathBuf,
        /// Its format.
        format: ImageFormat,
    },
    /// A device or a file that is there already, at least as large as the disk.
    Device(PathBuf),
}

impl Place {
    /// The path.
    pub fn path(&self) -> &Path {
        match self {
            Self::Image { path, .. } | Self::Device(path) => path,
        }
    }

    pub(super) fn format_name(&self) -> &'static str {
        match self {
            Self::Image { format, .. } => format.name(),
            Self::Device(_) => "device",
        }
    }

    /// An image gets holes, also where a stored chunk is zero in part; on a device every zero is
    /// written.
    pub(super) fn zeroes(&self) -> Zeroes {
        match self {
            Self::Image { .. } => Zeroes::Sparse { detect_bytes: Some(HOLE_BYTES) },
            Self::Device(_) => Zeroes::Allocated,
        }
    }
}

/// The place of each of `disks`, in order, where it can have one.
pub(super) fn choose(
    disks: &[&ManifestDisk],
    request: &Request,
    problems: &mut Problems,
) -> Vec<Option<Place>> {
    let names: Vec<&str> = disks.iter().map(|disk| disk.description.name.as_str()).collect();
    for (name, _) in request.devices.iter().filter(|(name, _)| !names.contains(&name.as_str())) {
        let error = Error::new(Kind::NotFound, format!("no disk '{name}' is restored"));
        problems.add(error.hint(format!("disks of this point: {}", names.join(", "))));
    }
    problems.note(check_devices(&request.devices));
    let places = disks.iter().map(|disk| problems.note(place(disk, request)));
    let places: Vec<Option<Place>> = places.collect();
    check_images(&places, request.existing, problems);
    places
}

/// The directory itself, or the nearest above it that exists.
pub(super) fn nearest_directory(directory: &Path) -> Result<PathBuf> {
    let failed = |e| Error::io(format!("cannot examine {}", directory.display()), e);
    let absolute = std::path::absolute(directory).map_err(failed)?;
    let found = absolute.ancestors().find(|above| above.is_dir());
    found.map(Path::to_owned).ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))
}

/// Fails when a disk is sent to two devices, or two disks to one, by whatever path: the second
/// would overwrite the first, and the report would call both restored.
fn check_devices(devices: &[(String, PathBuf)]) -> Result<()> {
    // A path that does not exist fails when it is opened, and says so better.
    let real = |path: &PathBuf| path.canonicalize().unwrap_or_else(|_| path.clone());
    for (at, (name, path)) in devices.iter().enumerate() {
        for (other, other_path) in &devices[..at] {
            if name == other {
                let message = format!("--to-device is given twice for disk {name}");
                return Err(Error::new(Kind::Usage, message).hint("give it once per disk"));
            }
            if real(path) == real(other_path) {
                let message = format!("{other} and {name} would both go to {}", path.display());
                return Err(Error::new(Kind::Usage, message).hint("give each disk its own device"));
            }
        }
    }
    Ok(())
}

fn place(disk: &ManifestDisk, request: &Request) -> Result<Place> {
    let name = disk.description.name.as_str();
    if let Some((_, device)) = request.devices.iter().find(|(disk, _)| disk == name) {
        return Ok(Place::Device(device.clone()));
    }
    // A domain gets what it had; what QEMU cannot write in place becomes raw.
    let had = match (&request.define, disk.description.format.as_str()) {
        (Some(_), "qcow2") => ImageFormat::Qcow2,
        _ => ImageFormat::Raw,
    };
    let format = request.format.unwrap_or(had);
    let path = match (&request.directory, &request.define) {
        (Some(directory), _) => {
            // Names come from the VM's description, which somebody else may have written.
            if name.is_empty() || name.starts_with('.') || name.contains('/') {
                let message = format!("'{name}' cannot be a file name");
                return Err(Error::new(Kind::Unsupported, message)
                    .hint("restore this disk with --to-device"));
            }
            directory.join(format!("{name}.{}", format.name()))
        }
        (None, Some(define)) => where_it_was(disk, define, format)?,
        (None, None) => {
            let message = format!("it is not said where {name} goes");
            return Err(Error::new(Kind::Usage, message).hint(format!(
                "add --to-device {name}=DEVICE or --to DIR, or leave it out with --disk"
            )));
        }
    };
    Ok(Place::Image { path, format })
}

/// The image of a domain to be defined: the file the disk was in (also as a volume of a storage
/// pool), or one beside it for a new domain.
fn where_it_was(disk: &ManifestDisk, define: &Define, format: ImageFormat) -> Result<PathBuf> {
    let (name, origin) = (&disk.description.name, Path::new(&disk.description.origin));
    let directory = origin.parent().filter(|_| origin.is_absolute() && !origin.starts_with("/dev"));
    let Some(directory) = directory else {
        let message = format!("{name} was no image file, but {}", origin.display());
        return Err(Error::new(Kind::Usage, message).hint(format!(
            "say where it goes: --to-device {name}=DEVICE, or --to DIR for all disks"
        )));
    };
    if !directory.is_dir() {
        let message = format!("{}, where {name} was, does not exist", directory.display());
        return Err(Error::new(Kind::NotFound, message)
            .hint("make it (or mount it), or restore somewhere else with --to DIR"));
    }
    Ok(match &define.as_name {
        Some(new) => directory.join(format!("{new}-{name}.{}", format.name())),
        None if disk.description.format == format.name() => origin.to_owned(),
        // Another format under the old name would lie.
        None => origin.with_extension(format.name()),
    })
}

/// Two images cannot be one file, and one that is there must not be replaced unasked. The latter is
/// asked again, race-free, when each gets its name; here so that nobody learns it after hours of
/// copying.
fn check_images(places: &[Option<Place>], existing: Existing, problems: &mut Problems) {
    // What cannot be followed is told of where the target is looked at.
    let end = |path: &Path| followed(path).unwrap_or_else(|_| path.to_owned());
    for (at, place) in places.iter().enumerate() {
        let Some(Place::Image { path, .. }) = place else { continue };
        let is_same = |other: &Place| end(other.path()) == end(path);
        if places.iter().take(at).flatten().any(is_same) {
            let message = format!("two disks would both go to {}", path.display());
            problems.add(Error::new(Kind::Usage, message).hint("restore them with --to DIR"));
        }
        if let Err(error) = refuse_special(path) {
            problems.add(error);
        } else if existing == Existing::Refuse && path.symlink_metadata().is_ok() {
            problems.add(exists(path));
        }
    }
}
