//! What a restore would do, and everything that keeps it from being possible. Changes nothing: makes
//! no file and no directory, leaves no lock, defines no domain.
//!
//! What the restore itself finds out before it begins is found out by the same code
//! ([`super::examine`]). What it learns only while it acts (whether it may write to a directory,
//! whether a device has the size, whether a VM uses what is to be replaced) is looked at here.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};
use serde::Serialize;

use super::place::{Place, nearest_directory};
use super::problems::Problems;
use super::{Examined, ExaminedDisk, Request, artifacts, examine, target};
use crate::block::file::FileSink;
use crate::error::{Error, Result, with_causes};
use crate::image::ImageLock;
use crate::job::plan::Problem;
use crate::job::{Repository, Surroundings, lock, points};
use crate::vm::{PointId, Uuid, VmIdentity};

/// What would happen.
#[derive(Clone, Debug, Serialize)]
pub struct Preview {
    /// The point.
    pub point: PointId,
    /// Its VM.
    pub vm: VmIdentity,
    /// The disks that would be restored.
    pub disks: Vec<Disk>,
    /// Other files that would be written.
    pub files: Vec<File>,
    /// The domain that would be defined; also `None` where a problem keeps it from being known.
    pub domain: Option<Domain>,
    /// What is in the way.
    pub problems: Vec<Problem>,
}

/// A disk that would be restored.
#[derive(Clone, Debug, Serialize)]
pub struct Disk {
    /// Its name in the VM.
    pub name: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// Where it would go; `None` where that is not known (a problem says why).
    #[serde(serialize_with = "crate::job::lossy::optional")]
    pub path: Option<PathBuf>,
    /// Format of the image, or `device`.
    pub format: Option<&'static str>,
    /// Bytes that would be read from the repository, before compression; the rest is zero.
    pub expected_bytes: Option<u64>,
    /// Whether something is there already, which is lost.
    pub replaces: bool,
}

/// Another file that would be written.
#[derive(Clone, Debug, Serialize)]
pub struct File {
    /// Its path.
    #[serde(serialize_with = "crate::job::lossy::path")]
    pub path: PathBuf,
    /// Whether one is there already, which is lost.
    pub replaces: bool,
}

/// A domain that would be defined.
#[derive(Clone, Debug, Serialize)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID; a new domain gets one when it is made.
    pub uuid: Option<Uuid>,
    /// Whether it would be started.
    pub start: bool,
    /// Whether a domain is there already whose definition is lost.
    pub replaces: bool,
    /// What has to differ from the domain that was backed up.
    pub changes: Vec<String>,
}

/// Looks at what the restore needs. An error is what keeps from looking: an unknown point, a disk it
/// does not have.
pub async fn run(
    repository: &Repository,
    request: Request,
    (env, control): Surroundings<'_>,
) -> Result<Preview> {
    control.set_phase("looking at the point and its places");
    let manifest = points::manifest(repository, &request.point, env).await?;
    let chosen = points::choose_disks(&manifest, &request.disks)?;
    let mut problems = Problems::default();
    if request.define.is_some() {
        let vm = &manifest.body.vm;
        problems.note(lock::probe(&env.state_dir, (vm.uuid, &vm.name)));
    }
    let examine = examine(repository, (&manifest, &chosen), &request, &mut problems);
    let Examined { disks, definition } = control.run(async { Ok(examine.await) }).await?;
    let mut files = artifacts::paths(&manifest, &request);
    files.extend(definition.iter().flat_map(super::domain::Prepared::paths));
    check_places(&disks, &files, &request, &mut problems);
    // Of a disk without a place the changes would say that it was left out.
    let definition = definition.filter(|_| disks.iter().all(|disk| disk.place.is_some()));
    let asked = definition.as_ref().zip(request.define.as_ref());
    Ok(Preview {
        point: manifest.point,
        vm: manifest.body.vm.clone(),
        domain: asked.map(|(definition, define)| definition.preview(define)),
        disks: disks.iter().map(disk).collect(),
        files: files.into_iter().map(|path| File { replaces: is_there(&path), path }).collect(),
        problems: problems.into_vec().iter().map(problem).collect(),
    })
}

fn disk(examined: &ExaminedDisk<'_>) -> Disk {
    let ExaminedDisk { disk, place, data_bytes, .. } = examined;
    Disk {
        name: disk.description.name.clone(),
        size_bytes: disk.description.size_bytes,
        path: place.as_ref().map(|place| place.path().to_owned()),
        format: place.as_ref().map(Place::format_name),
        expected_bytes: *data_bytes,
        replaces: place.as_ref().is_some_and(|place| is_there(place.path())),
    }
}

fn problem(error: &Error) -> Problem {
    let fix = error.hint_text().unwrap_or("see the message").to_owned();
    Problem { fatal: true, kind: Some(error.kind()), what: with_causes(error), fix }
}

fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Finds what the restore would only learn by acting.
fn check_places(
    disks: &[ExaminedDisk<'_>],
    files: &[PathBuf],
    request: &Request,
    problems: &mut Problems,
) {
    let mut directories = BTreeSet::new();
    if let Some(directory) = &request.directory {
        problems.note(target::check_directory(directory));
        directories.insert(directory.clone());
    }
    for ExaminedDisk { disk, place, .. } in disks {
        match place {
            None => {}
            Some(Place::Device(path)) => {
                let fits = FileSink::probe(path, disk.description.size_bytes);
                problems.note(fits.and_then(|()| ImageLock::probe_to_write(path)));
            }
            Some(Place::Image { path, .. }) => {
                // One that is there without --force is a problem already.
                if request.existing == super::Existing::Replace && path.exists() {
                    problems.note(ImageLock::probe_to_write(path));
                }
                directories.extend(path.parent().map(Path::to_owned));
            }
        }
    }
    directories.extend(files.iter().filter_map(|path| path.parent()).map(Path::to_owned));
    for directory in directories {
        problems.note(check_writable(&directory));
    }
}

/// Fails when files cannot be made in a directory, or it cannot be made itself.
fn check_writable(directory: &Path) -> Result<()> {
    let nearest = nearest_directory(directory)?;
    access(&nearest, Access::WRITE_OK | Access::EXEC_OK).map_err(|errno| {
        Error::io(format!("cannot write to {}", nearest.display()), errno.into())
            .hint("run as root or as a user who may, or restore to another directory with --to DIR")
    })
}
