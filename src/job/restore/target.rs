//! Disks being restored: the directory they go to, whether there is room, the file in the making.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::artifacts::no_room;
use super::outcome::Outcome;
use super::place::{Place, nearest_directory};
use super::problems::Problems;
use crate::block::file::{Existing, FileSink, NewFile, check_take_over, followed};
use crate::block::{BlockSink, BlockSource, ByteRange, ExtentKind};
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::image::{Compression, ImageLock, NewImage, NewImageOptions};
use crate::journal::{Phase, RestoreJournal, Step};
use crate::nbd::ClientOptions;
use crate::repo::ManifestDisk;
use crate::units::ByteSize;
use crate::vm::PointId;

/// Makes the directory if it is missing, but not the one it is in: a mistyped mount point must not
/// become a directory tree. What was made.
pub(super) fn make_directory(
    directory: Option<&Path>,
    journal: &mut RestoreJournal,
) -> Result<Option<PathBuf>> {
    let Some(directory) = directory else { return Ok(None) };
    if !directory.exists() {
        let path = std::path::absolute(directory).map_err(|e| not_made(directory, e))?;
        journal.note(Step::Directory { path })?;
    }
    match std::fs::create_dir(directory) {
        Ok(()) => Ok(Some(directory.to_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(None),
        Err(error) => Err(not_made(directory, error)),
    }
}

/// Fails where [`make_directory`] would, as far as can be seen without making it.
pub(super) fn check_directory(directory: &Path) -> Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    if directory.symlink_metadata().is_ok() {
        let message = format!("{} is no directory", directory.display());
        return Err(Error::new(Kind::AlreadyExists, message).hint("choose another with --to DIR"));
    }
    let absolute = std::path::absolute(directory).map_err(|e| not_made(directory, e))?;
    if absolute.parent().is_some_and(Path::is_dir) {
        return Ok(());
    }
    Err(not_made(directory, std::io::ErrorKind::NotFound.into()))
}

fn not_made(directory: &Path, error: std::io::Error) -> Error {
    let missing = error.kind() == std::io::ErrorKind::NotFound;
    let failed = Error::io(format!("cannot make {}", directory.display()), error);
    match directory.parent() {
        Some(parent) if missing => failed.hint(format!(
            "{} does not exist: make it ('mkdir -p {0}'), or mount what belongs there",
            parent.display()
        )),
        _ => no_room(failed),
    }
}

/// Removes the directory again when a restore failed; not when there is something in it.
pub(super) fn remove_directory(made: Option<PathBuf>) {
    if let Some(directory) = made {
        // Not empty: parts of the restore are in place, which the error says.
        let _ = std::fs::remove_dir(directory);
    }
}

/// Finds files that cannot be replaced as they are to be: links of others, and owners that what is new
/// cannot get.
pub(super) fn check_replaced(paths: &[PathBuf], problems: &mut Problems) {
    // The state of a TPM is a directory.
    for path in paths.iter().filter(|path| !path.is_dir()) {
        problems.note(followed(path).and_then(|path| check_take_over(&path)));
    }
}

/// Fails when the data of the disks, in bytes, will not fit where their images go, whose directory
/// may not have been made yet. Only the free space of now is known: a target may still fill up
/// while it is written.
pub(super) fn check_space(disks: &[(&Place, u64)], problems: &mut Problems) {
    let mut needed: BTreeMap<u64, (PathBuf, u64)> = BTreeMap::new();
    for (place, bytes) in disks {
        let Place::Image { path, .. } = place else { continue };
        // What cannot be followed is told of by `check_replaced`.
        let path = followed(path).unwrap_or_else(|_| path.clone());
        let file_system = path.parent().map_or_else(|| Ok(PathBuf::from("/")), nearest_directory);
        let file_system = file_system.and_then(|directory| {
            let data = directory.metadata();
            let failed = |e| Error::io(format!("cannot examine {}", directory.display()), e);
            data.map_err(failed).map(|data| (data.dev(), directory))
        });
        let Some((device, directory)) = problems.note(file_system) else { continue };
        let (_, sum) = needed.entry(device).or_insert((directory, 0));
        *sum = sum.saturating_add(*bytes);
    }
    for (directory, needed_bytes) in needed.into_values() {
        problems.note(has_room(&directory, needed_bytes));
    }
}

fn has_room(directory: &Path, needed_bytes: u64) -> Result<()> {
    let space = rustix::fs::statvfs(directory)
        .map_err(|e| Error::io(format!("cannot examine {}", directory.display()), e.into()))?;
    let free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
    if needed_bytes <= free_bytes {
        return Ok(());
    }
    let message = format!(
        "{} has {} free and the disks hold {}",
        directory.display(),
        ByteSize(free_bytes),
        ByteSize(needed_bytes)
    );
    let hint = "restore to another directory, or single disks with --disk";
    Err(Error::new(Kind::NoSpace, message).hint(hint))
}

/// Bytes of a disk that are not known to be zero.
pub(super) async fn data_bytes(source: &dyn BlockSource) -> Result<u64> {
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
    pub(super) async fn open(
        place: &Place,
        size_bytes: u64,
        existing: Existing,
        journal: &mut RestoreJournal,
    ) -> Result<Self> {
        match place {
            Place::Device(path) => {
                let sink = Arc::new(FileSink::open(path, size_bytes)?);
                Ok(Self::Device {
                    path: path.clone(),
                    sink,
                    lock: ImageLock::acquire_to_write(path)?,
                })
            }
            Place::Image { path, format } => {
                let path = &match existing {
                    Existing::Refuse => path.clone(),
                    Existing::Replace => followed(path)?,
                };
                let lock = match existing {
                    Existing::Replace if path.exists() => Some(ImageLock::acquire_to_write(path)?),
                    _ => None,
                };
                let options = NewImageOptions {
                    existing,
                    compression: Compression::None,
                    temporary: Some(journal.temporary(path)?),
                    client: ClientOptions::default(),
                };
                journal.before(Phase::Temporary);
                let image = NewImage::create_with(path, format.name(), size_bytes, options);
                let image = Box::pin(image).await?;
                journal.after(Phase::Temporary);
                Ok(Self::New(image, lock))
            }
        }
    }

    /// Opens those places that are devices, and locks them: nothing may be written to one before
    /// it is known that all can be.
    pub(super) async fn open_devices(
        places: &[Place],
        disks: &[&ManifestDisk],
        (journal, control): (&mut RestoreJournal, &Control),
    ) -> Result<Vec<Option<Self>>> {
        let mut opened = Vec::new();
        for (place, disk) in places.iter().zip(disks) {
            let size_bytes = disk.stored.size_bytes;
            opened.push(match place {
                Place::Device(_) => {
                    Some(Self::open(place, size_bytes, Existing::Refuse, journal).await?)
                }
                Place::Image { .. } => None,
            });
        }
        for target in opened.iter().flatten() {
            target.tell_of_rest(control)?;
        }
        // Nothing is written yet: that one of them cannot be opened leaves all as they are.
        for place in places {
            if let Place::Device(path) = place {
                let failed = |e| Error::io(format!("cannot name {}", path.display()), e);
                let path = std::path::absolute(path).map_err(failed)?;
                journal.note(Step::Overwrite { path })?;
                journal.before(Phase::Overwrite);
            }
        }
        Ok(opened)
    }

    /// Bytes of a larger device behind the disk, which are not written.
    pub(super) fn kept_bytes(&self) -> Result<u64> {
        match self {
            Self::New(..) => Ok(0),
            Self::Device { sink, .. } => {
                Ok(sink.whole_bytes()?.saturating_sub(sink.geometry().size_bytes))
            }
        }
    }

    /// Says that a device is larger than its disk: the guest finds a larger one, with what was there.
    fn tell_of_rest(&self, control: &Control) -> Result<()> {
        let Self::Device { path, sink, .. } = self else { return Ok(()) };
        let kept = self.kept_bytes()?;
        if kept > 0 {
            let whole = sink.whole_bytes()?;
            let text = format!(
                "{} has {whole} bytes and is larger than the disk: its last {kept} bytes stay as \
                 they are, and a VM that uses it sees them",
                path.display()
            );
            control.notice(NoticeLevel::Warning, text);
        }
        Ok(())
    }

    async fn complete(self) -> Result<Complete> {
        match self {
            Self::New(image, old) => Ok(Complete::New { file: image.complete().await?, old }),
            Self::Device { path, lock, .. } => {
                lock.check_alone().map_err(|error| {
                    error.context("something began to write a device while it was restored")
                })?;
                Ok(Complete::Device { path, lock })
            }
        }
    }

    pub(super) fn sink(&self) -> Arc<dyn BlockSink> {
        match self {
            Self::New(image, _) => image.sink(),
            Self::Device { sink, .. } => sink.clone(),
        }
    }
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
        match Box::pin(target.complete()).await {
            Ok(disk) => complete.push(disk),
            Err(error) => {
                for disk in &complete {
                    if let Complete::Device { path, .. } = disk {
                        tell_overwritten(path, control);
                    }
                }
                abort_all(targets.collect(), control);
                return Err(no_room(error));
            }
        }
    }
    Ok(complete)
}

fn tell_overwritten(device: &Path, control: &Control) {
    let text =
        format!("{} was overwritten, at least in part: what it held is lost", device.display());
    control.notice(NoticeLevel::Warning, text);
}

/// An image that is complete, with the lock of the one it replaces.
pub(super) type Image = (NewFile, Option<ImageLock>);

/// Remembers the devices, which are written whatever comes; the images.
pub(super) fn hold_devices(disks: Vec<Complete>, outcome: &mut Outcome) -> Vec<Image> {
    let mut images = Vec::new();
    for disk in disks {
        match disk {
            Complete::New { file, old } => images.push((file, old)),
            Complete::Device { path, lock } => {
                outcome.wrote(path);
                outcome.hold(lock);
            }
        }
    }
    images
}

/// Keeps domains from being started with the images before they are known to stay.
pub(super) fn lock_all(images: &[Image], outcome: &mut Outcome) -> Result<()> {
    for (file, _) in images {
        outcome.hold(ImageLock::acquire(file.temporary_path())?);
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

/// Gives up disks that are complete, before any image got its name. `error`.
pub(super) fn keep_none(disks: Vec<Complete>, error: Error, control: &Control) -> Error {
    for disk in disks {
        // A new file vanishes with its guard.
        if let Complete::Device { path, .. } = disk {
            tell_overwritten(&path, control);
        }
    }
    error
}

/// Gives all images their names.
pub(super) async fn place_all(
    images: Vec<Image>,
    outcome: &mut Outcome,
    journal: &mut RestoreJournal,
) -> Result<()> {
    for (file, _) in &images {
        journal.place(file.temporary_path(), file.path())?;
    }
    for (file, old) in images {
        if let Some(old) = old {
            outcome.hold(old);
        }
        journal.before(Phase::Place);
        outcome.add(file.place().await?)?;
        journal.after(Phase::Place);
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
                tell_overwritten(&path, control);
            }
        }
    }
}
