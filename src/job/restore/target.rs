//! Where restored disks go: which place each gets, whether there is room, the file in the making.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::artifacts::{exists, no_room};
use super::outcome::Outcome;
use super::{Define, Request};
use crate::block::file::{Existing, FileSink, NewFile};
use crate::block::{BlockSink, BlockSource, ByteRange, ExtentKind};
use crate::control::{Control, NoticeLevel};
use crate::copy::Zeroes;
use crate::error::{Error, Kind, Result};
use crate::image::{ImageLock, NewImage};
use crate::repo::ManifestDisk;
use crate::units::{ByteSize, KIB};
use crate::vm::PointId;

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
    /// A device or a file that is there already, of exactly the size.
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

/// The place of each of `disks`, in order.
pub(super) fn places(disks: &[&ManifestDisk], request: &Request) -> Result<Vec<Place>> {
    let names: Vec<&str> = disks.iter().map(|disk| disk.description.name.as_str()).collect();
    let unknown = request.devices.iter().find(|(name, _)| !names.contains(&name.as_str()));
    if let Some((name, _)) = unknown {
        let message = format!("no disk '{name}' is restored");
        return Err(Error::new(Kind::NotFound, message)
            .hint(format!("disks of this point: {}", names.join(", "))));
    }
    check_devices(&request.devices)?;
    let places: Vec<Place> =
        disks.iter().map(|disk| place(disk, request)).collect::<Result<_>>()?;
    check_images(&places)?;
    Ok(places)
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

/// The image of a domain to be defined: the file the disk was in, or one beside it for a new
/// domain.
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

/// Fails when two images would be one file.
fn check_images(places: &[Place]) -> Result<()> {
    for (at, place) in places.iter().enumerate() {
        if places[..at].iter().any(|other| other.path() == place.path()) {
            let message = format!("two disks would both go to {}", place.path().display());
            return Err(Error::new(Kind::Usage, message).hint("restore them with --to DIR"));
        }
    }
    Ok(())
}

/// Fails when an image to be made is there and must not be replaced. Asked again, race-free, when
/// each gets its name; here so that nobody learns it after hours of copying.
pub(super) fn check_free(places: &[Place], existing: Existing) -> Result<()> {
    let images = places.iter().filter(|place| matches!(place, Place::Image { .. }));
    match images.map(Place::path).find(|path| path.symlink_metadata().is_ok()) {
        Some(path) if existing == Existing::Refuse => Err(exists(path)),
        _ => Ok(()),
    }
}

/// Makes the directory if it is missing, but not the one it is in: a mistyped mount point must not
/// become a directory tree. What was made.
pub(super) fn make_directory(directory: Option<&Path>) -> Result<Option<PathBuf>> {
    let Some(directory) = directory else { return Ok(None) };
    match std::fs::create_dir(directory) {
        Ok(()) => Ok(Some(directory.to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(None),
        Err(error) => {
            let missing = error.kind() == std::io::ErrorKind::NotFound;
            let failed = Error::io(format!("cannot make {}", directory.display()), error);
            Err(match directory.parent() {
                Some(parent) if missing => failed.hint(format!(
                    "{} does not exist: make it ('mkdir -p {0}'), or mount what belongs there",
                    parent.display()
                )),
                _ => no_room(failed),
            })
        }
    }
}

/// Removes the directory again when a restore failed; not when there is something in it.
pub(super) fn remove_directory(made: Option<PathBuf>) {
    if let Some(directory) = made {
        // Not empty: parts of the restore are in place, which the error says.
        let _ = std::fs::remove_dir(directory);
    }
}

/// Fails when the data of the disks will not fit where their images go. Only the free space of
/// now is known: a target may still fill up while it is written.
pub(super) async fn check_space(sources: &[Arc<dyn BlockSource>], places: &[Place]) -> Result<()> {
    let mut needed: BTreeMap<u64, (&Path, u64)> = BTreeMap::new();
    for (source, place) in sources.iter().zip(places) {
        let Place::Image { path, .. } = place else { continue };
        let directory = path.parent().expect("an image is in a directory");
        let failed = |e| Error::io(format!("cannot examine {}", directory.display()), e);
        let file_system = directory.metadata().map_err(failed)?.dev();
        let bytes = data_bytes(source.as_ref()).await?;
        let (_, sum) = needed.entry(file_system).or_insert((directory, 0));
        *sum = sum.saturating_add(bytes);
    }
    for (directory, needed_bytes) in needed.into_values() {
        let space = rustix::fs::statvfs(directory)
            .map_err(|e| Error::io(format!("cannot examine {}", directory.display()), e.into()))?;
        let free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
        if needed_bytes > free_bytes {
            let message = format!(
                "{} has {} free and the disks hold {}",
                directory.display(),
                ByteSize(free_bytes),
                ByteSize(needed_bytes)
            );
            return Err(Error::new(Kind::NoSpace, message)
                .hint("restore to another directory, or single disks with --disk"));
        }
    }
    Ok(())
}

/// Bytes of a disk that are not known to be zero.
async fn data_bytes(source: &dyn BlockSource) -> Result<u64> {
    let range = source.geometry().range();
    let (mut at, mut bytes) = (0, 0);
    while at < range.end() {
        let map = source.extents(ByteRange::between(at, range.end())).await?;
        assert!(map.end() > at, "a map makes progress");
        bytes += map.bytes_of(ExtentKind::Data);
        at = map.end();
    }
    Ok(bytes)
}

/// A disk being written.
pub(super) enum Target {
    /// An image that gets its name when it is complete; with the lock of the one it replaces.
    New(NewImage, Option<ImageLock>),
    /// In place. QEMU opens its disks without `O_EXCL`: only its own locks tell that a VM runs.
    Device { path: PathBuf, sink: Arc<FileSink>, lock: ImageLock },
}

impl Target {
    pub(super) async fn open(place: &Place, size_bytes: u64, existing: Existing) -> Result<Self> {
        match place {
            Place::Device(path) => {
                let sink = Arc::new(FileSink::open(path, size_bytes)?);
                Ok(Self::Device { path: path.clone(), sink, lock: unused(path)? })
            }
            Place::Image { path, format } => {
                let lock = match existing {
                    Existing::Replace if path.exists() => Some(unused(path)?),
                    _ => None,
                };
                let image = NewImage::create(path, format.name(), size_bytes, existing);
                Ok(Self::New(Box::pin(image).await?, lock))
            }
        }
    }

    /// Opens those places that are devices, and locks them: nothing may be written to one before
    /// it is known that all can be.
    pub(super) async fn open_devices(
        places: &[Place],
        sources: &[Arc<dyn BlockSource>],
    ) -> Result<Vec<Option<Self>>> {
        let mut opened = Vec::new();
        for (place, source) in places.iter().zip(sources) {
            let size_bytes = source.geometry().size_bytes;
            opened.push(match place {
                Place::Device(_) => Some(Self::open(place, size_bytes, Existing::Refuse).await?),
                Place::Image { .. } => None,
            });
        }
        Ok(opened)
    }

    pub(super) fn sink(&self) -> Arc<dyn BlockSink> {
        match self {
            Self::New(image, _) => image.sink(),
            Self::Device { sink, .. } => sink.clone(),
        }
    }
}

/// Makes sure that no VM writes what is to be overwritten, nor begins to while it is.
fn unused(path: &Path) -> Result<ImageLock> {
    ImageLock::acquire_to_write(path).map_err(|error| match error.kind() {
        Kind::Busy => error.hint("stop the VM that uses it, or restore to another place"),
        _ => error,
    })
}

/// A disk that is complete and durable.
pub(super) enum Complete {
    /// An image under its temporary name; with the lock of the one it replaces.
    New { file: NewFile, old: Option<ImageLock> },
    /// A device, locked.
    Device { path: PathBuf, lock: ImageLock },
}

/// Completes all disks. When one fails, all are removed.
pub(super) async fn complete_all(targets: Vec<Target>, control: &Control) -> Result<Vec<Complete>> {
    let mut targets = targets.into_iter();
    let mut complete = Vec::new();
    while let Some(target) = targets.next() {
        let (image, old) = match target {
            Target::New(image, old) => (image, old),
            Target::Device { path, lock, .. } => {
                complete.push(Complete::Device { path, lock });
                continue;
            }
        };
        match Box::pin(image.complete()).await {
            Ok(file) => complete.push(Complete::New { file, old }),
            Err(error) => {
                abort_all(targets.collect(), control);
                return Err(no_room(error));
            }
        }
    }
    Ok(complete)
}

/// Keeps domains from being started with the images before they are known to stay.
pub(super) fn lock_all(disks: &[Complete], outcome: &mut Outcome) -> Result<()> {
    for disk in disks {
        if let Complete::New { file, .. } = disk {
            outcome.hold(ImageLock::acquire(file.temporary_path())?);
        }
    }
    Ok(())
}

/// Keeps the disks of a restore that cannot end well now, for hours of copying are in them: images
/// get names of their own beside the ones they were made for. `error`, with where they are and what
/// to do with them.
pub(super) async fn keep_all(disks: Vec<Complete>, point: PointId, error: Error) -> Error {
    let (mut said, mut moves) = (Vec::new(), Vec::new());
    for disk in disks {
        match disk {
            Complete::Device { path, .. } => {
                said.push(format!("{} holds the restored disk", path.display()));
            }
            Complete::New { file, .. } => {
                let image = file.path().display().to_string();
                match file.keep_beside(&format!(".restored-{}", point.short())).await {
                    Ok(copy) => {
                        said.push(format!("the complete copy is kept as {}", copy.display()));
                        moves.push(format!("'mv {} {image}'", copy.display()));
                    }
                    Err(error) => said.push(error.to_string()),
                }
            }
        }
    }
    let again = "restore again; to keep both, restore beside it with --as NAME";
    let hint = if moves.is_empty() {
        format!("stop the domain and {again}")
    } else {
        format!(
            "stop the domain, then put the copies in place ({}; description, firmware variables \
             and TPM stay those it has) or {again}; remove the copies you do not need",
            moves.join(", ")
        )
    };
    error.context(format!("no existing image was replaced; {}", said.join("; "))).hint(hint)
}

/// Gives all images their names.
pub(super) async fn place_all(disks: Vec<Complete>, outcome: &mut Outcome) -> Result<()> {
    let mut images = Vec::new();
    // All devices first: they are written, whatever fails then.
    for disk in disks {
        match disk {
            Complete::New { file, old } => images.push((file, old)),
            Complete::Device { path, lock } => {
                outcome.wrote(path);
                outcome.hold(lock);
            }
        }
    }
    for (file, old) in images {
        if let Some(old) = old {
            outcome.hold(old);
        }
        outcome.add(file.place().await?)?;
    }
    Ok(())
}

/// Removes what was written to files.
pub(super) fn abort_all(targets: Vec<Target>, control: &Control) {
    for target in targets {
        match target {
            Target::New(image, _) => {
                if let Err(error) = image.abort() {
                    let text =
                        format!("a file of this restore was left behind: {}", error.in_one_line());
                    control.notice(NoticeLevel::Warning, text);
                }
            }
            Target::Device { path, .. } => {
                let text = format!(
                    "{} was overwritten, at least in part: what it held is lost",
                    path.display()
                );
                control.notice(NoticeLevel::Warning, text);
            }
        }
    }
}
