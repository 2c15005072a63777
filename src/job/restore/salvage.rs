//! Restoring a point that is damaged in part: what can be read is restored, zeroes are written where
//! the data is proven to be damaged, and a list says where that is.
//!
//! ```text
//!  index whole? ► copy (losses noted) ► hold held, point still there? ► list durable ► images get names
//! ```
//!
//! The list is there before the first image takes its name: a disk with holes must never look like a
//! sound one. It is part of what the restore puts in place, and stays as long as a disk of it does
//! ([`super::outcome`]). Errors of the store, of the index and of the target end a restore as ever
//! ([`crate::repo::losses`]). A disk of which a part is lost cannot have the content root of its
//! point, so nothing proves it; what was read of it is proven chunk by chunk.
//!
//! What a point holds besides disks is left out where it is damaged; a domain that needs it is not
//! defined. Without its manifest nothing of a point can be found.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::Request;
use super::artifacts::{self, no_room, write_file};
use crate::block::BlockSource;
use crate::block::file::{Existing, Placed};
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::job::Env;
use crate::journal::RestoreJournal;
use crate::repo::{Hold, Losses, Manifest, ManifestDisk, Repository, is_of_index};
use crate::units::ByteSize;
use crate::vm::{ArtifactKind, PointId, VmIdentity};

/// Name of the list beside images.
const LIST: &str = "damaged.json";

/// Version of the list's format: raised when a field is removed or changes its meaning.
const LIST_VERSION: u32 = 1;

/// Names tried for a list that is kept beside the one it was made for.
const BESIDE_MAX: u32 = 100;

/// What becomes of data that is damaged in the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damaged {
    /// The restore fails.
    Fails,
    /// It is zero, and on a list.
    Zeroes,
}

/// What a restore could not bring back.
#[derive(Clone, Debug, Serialize)]
pub struct Salvage {
    /// The file with this list.
    #[serde(serialize_with = "crate::job::lossy::path")]
    pub list: PathBuf,
    /// Bytes of disks that are zero because they are damaged.
    pub damaged_bytes: u64,
    /// Where they are.
    pub ranges: Vec<DamagedRange>,
    /// What else was left out.
    pub artifacts: Vec<DamagedArtifact>,
}

impl Salvage {
    /// Whether nothing was damaged after all.
    pub fn is_whole(&self) -> bool {
        self.ranges.is_empty() && self.artifacts.is_empty()
    }

    /// What is not restored at all.
    pub(super) fn left_out(&self) -> impl Iterator<Item = ArtifactKind> {
        self.artifacts.iter().map(|artifact| artifact.kind)
    }
}

/// A range of a disk that is zero because it is damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DamagedRange {
    /// The disk's name in the VM.
    pub disk: String,
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub bytes: u64,
    /// What is wrong with the data.
    pub reason: String,
}

/// Something besides disks that is damaged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DamagedArtifact {
    /// What it is.
    pub kind: ArtifactKind,
    /// What is wrong with it.
    pub reason: String,
}

/// The list as its file holds it.
#[derive(Serialize)]
struct List<'a> {
    document: &'static str,
    version: u32,
    point: PointId,
    vm: &'a VmIdentity,
    made: Timestamp,
    ranges: &'a [DamagedRange],
    artifacts: &'a [DamagedArtifact],
}

/// A disk of the repository that is being restored.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) blocks: Arc<dyn BlockSource>,
    /// What of it is lost, if that does not end the restore.
    pub(super) losses: Option<Arc<Losses>>,
}

/// Opens a disk.
pub(super) async fn open(
    repository: &Repository,
    disk: &ManifestDisk,
    damaged: Damaged,
) -> Result<Source> {
    Ok(match damaged {
        Damaged::Fails => {
            let reader = repository.open_disk(&disk.stored).await.map_err(advise)?;
            Source { blocks: Arc::new(reader), losses: None }
        }
        Damaged::Zeroes => {
            let (reader, losses) = repository.open_disk_salvaging(&disk.stored).await?;
            Source { blocks: Arc::new(reader), losses: Some(losses) }
        }
    })
}

impl Source {
    /// An error of reading it, with what to do.
    pub(super) fn failed(&self, error: Error) -> Error {
        if self.losses.is_none() { advise(error) } else { error }
    }

    /// Forgets what was noted: looking at a disk is not restoring it.
    pub(super) fn begin(&self) {
        if let Some(losses) = &self.losses {
            losses.take();
        }
    }

    /// What was noted since.
    pub(super) fn lost(&self, disk: &str) -> Vec<DamagedRange> {
        let lost = self.losses.iter().flat_map(|losses| losses.take());
        lost.map(|loss| DamagedRange {
            disk: disk.to_owned(),
            offset: loss.range.offset(),
            bytes: loss.range.len(),
            reason: loss.reason.to_string(),
        })
        .collect()
    }
}

/// The list that is written beside images; it is elsewhere if none go to a directory.
pub(super) fn path_beside_images(request: &Request) -> Option<PathBuf> {
    let beside = |directory: &PathBuf| directory.join(LIST);
    request.directory.as_ref().filter(|_| request.damaged == Damaged::Zeroes).map(beside)
}

/// Whether `path` is that of a list beside images.
pub(super) fn is_list(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == LIST)
}

/// What a restore could not bring back, and the list of it, which is not written yet.
pub(super) struct Listing {
    pub(super) salvage: Salvage,
    json: Vec<u8>,
    existing: Existing,
}

impl Listing {
    /// Writes the list and gives it its name, which is not synced yet.
    pub(super) fn write(&self, journal: &mut RestoreJournal) -> Result<Placed> {
        if let Some(directory) = self.salvage.list.parent().filter(|_| !is_list(&self.salvage.list))
        {
            let fail = |e| Error::io(format!("cannot make {}", directory.display()), e);
            std::fs::create_dir_all(directory).map_err(|e| no_room(fail(e)))?;
        }
        write_file(&self.salvage.list, &self.json, self.existing, journal)
    }

    /// Writes the list beside the name it was made for, for copies that are kept in the same way;
    /// where it is. None if nothing is on it.
    pub(super) fn keep_beside(&self, point: PointId) -> Result<Option<PathBuf>> {
        if self.salvage.is_whole() {
            return Ok(None);
        }
        keep_beside(&self.salvage.list, &self.json, point).map(Some)
    }

    /// Says what is damaged.
    pub(super) fn tell(&self, manifest: &Manifest, control: &Control) {
        tell(&self.salvage, manifest, control);
    }
}

/// Writes a list durably under the name of `list` and a suffix, as copies get it; the name.
pub(super) fn keep_beside(list: &Path, json: &[u8], point: PointId) -> Result<PathBuf> {
    let directory = list.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let fail = |e| no_room(Error::io(format!("cannot make {}", directory.display()), e));
    // That of a list that is not beside images may not be there yet.
    std::fs::create_dir_all(directory).map_err(fail)?;
    for number in 1..=BESIDE_MAX {
        let mut name = list.as_os_str().to_owned();
        name.push(format!(".restored-{}", point.short()));
        if number > 1 {
            name.push(format!("-{number}"));
        }
        let beside = PathBuf::from(name);
        let fail = |e| no_room(Error::io(format!("cannot write {}", beside.display()), e));
        let options = std::fs::File::options().write(true).create_new(true).mode(0o600).to_owned();
        let mut file = match options.open(&beside) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
            file => file.map_err(fail)?,
        };
        let sync = || std::fs::File::open(directory)?.sync_all();
        file.write_all(json).and_then(|()| file.sync_all()).and_then(|()| sync()).map_err(fail)?;
        return Ok(beside);
    }
    Err(artifacts::exists(list))
}

/// The list of what was lost, once all is copied. None where damage ends a restore.
pub(super) async fn list(
    (repository, hold): (&Repository, &Hold),
    manifest: &Manifest,
    request: &Request,
    ranges: Vec<DamagedRange>,
    env: &Env,
) -> Result<Option<Listing>> {
    if request.damaged == Damaged::Fails {
        return Ok(None);
    }
    let artifacts = artifacts::damaged(repository, manifest, request).await?;
    if !(ranges.is_empty() && artifacts.is_empty()) {
        hold.check().await?;
        check_point(repository, manifest).await?;
    }
    let made = env.clock.now();
    let list = List {
        document: "damaged",
        version: LIST_VERSION,
        point: manifest.point,
        vm: &manifest.body.vm,
        made,
        ranges: &ranges,
        artifacts: &artifacts,
    };
    let json = serde_json::to_vec_pretty(&list).map_err(|e| crate::job::internal("a list", e))?;
    let (path, existing) = match path_beside_images(request) {
        Some(path) => (path, request.existing),
        None => (path_in(&env.state_dir, manifest.point, made), Existing::Refuse),
    };
    let damaged_bytes = ranges.iter().map(|range| range.bytes).sum();
    let salvage = Salvage { list: path, damaged_bytes, ranges, artifacts };
    Ok(Some(Listing { salvage, json, existing }))
}

/// What was collected is missing too, and that is no damage.
async fn check_point(repository: &Repository, manifest: &Manifest) -> Result<()> {
    let names = repository.point_names(Some(manifest.body.vm.uuid)).await?;
    if names.iter().any(|name| name.point == manifest.point) {
        return Ok(());
    }
    let point = manifest.point.short();
    let message = format!(
        "point {point} was forgotten while it was restored: what is missing may have been removed \
         by 'gc', and need not be damaged"
    );
    Err(Error::new(Kind::NotFound, message).hint("restore another point"))
}

/// The place of a list where there is no directory of images: this host's state.
fn path_in(state_dir: &Path, point: PointId, made: Timestamp) -> PathBuf {
    let name = format!("{}-{}.json", point.short(), made.as_microsecond());
    state_dir.join("damaged").join(name)
}

fn tell(salvage: &Salvage, manifest: &Manifest, control: &Control) {
    if salvage.is_whole() {
        return;
    }
    let (mut what, mut left_out) = (Vec::new(), Vec::new());
    for disk in &manifest.body.disks {
        let name = disk.description.name.as_str();
        let bytes = salvage.ranges.iter().filter(|range| range.disk == name).map(|r| r.bytes).sum();
        if bytes > 0 {
            what.push(format!("{} of {name} are damaged and restored as zeroes", ByteSize(bytes)));
        }
    }
    left_out.extend(salvage.artifacts.iter().map(|lost| format!("{} is left out", lost.kind)));
    let text = format!(
        "of point {} {}: this is not what the VM held, and nothing proves it. Where and why is in {}",
        manifest.point.short(),
        [what, left_out].concat().join(", "),
        salvage.list.display()
    );
    control.notice(NoticeLevel::Warning, text);
}

/// Says what to do where stored data is damaged.
pub(super) fn advise(error: Error) -> Error {
    match error.kind() {
        Kind::Corrupt if !is_of_index(&error) => error.hint(
            "'check --read-data' names what is damaged; 'full' stores again what the VM still has; \
             'restore --salvage' restores the rest, with zeroes where data is damaged",
        ),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_kept_beside_also_where_its_directory_is_not_there_yet() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("damaged/00c0ffee.json");
        for name in ["00c0ffee.json.restored-01010101", "00c0ffee.json.restored-01010101-2"] {
            let kept = keep_beside(&list, b"{}", PointId([1; 16])).unwrap();
            assert_eq!(kept, list.with_file_name(name));
            assert_eq!(std::fs::read(kept).unwrap(), b"{}");
        }
    }
}
