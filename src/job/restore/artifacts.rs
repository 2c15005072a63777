//! What a point holds besides disks, written beside the images: domain XML, UEFI variables, ….
//!
//! All of it may hold secrets, so only the owner may read the files; where one takes the place of
//! another (`--force`), whoever might read that one ([`take_over`]).

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::Request;
use super::outcome::Outcome;
use super::problems::Problems;
use super::salvage::{self, DamagedArtifact};
use crate::block;
use crate::block::file::{Existing, Placed, followed, take_over};
use crate::error::{Error, Kind, Result};
use crate::job::points;
use crate::journal::{Phase, RestoreJournal};
use crate::repo::{ARTIFACT_BYTES_MAX, Manifest, Repository};
use crate::vm::ArtifactKind;

/// The files, by what they hold. A checkpoint is of no use to anybody but the next backup.
const FILES: [(ArtifactKind, &str); 6] = [
    (ArtifactKind::DomainXmlInactive, "domain.xml"),
    (ArtifactKind::DomainXmlLive, "domain-live.xml"),
    (ArtifactKind::Nvram, "nvram.fd"),
    (ArtifactKind::TpmState, "tpm-state"),
    (ArtifactKind::Kernel, "kernel"),
    (ArtifactKind::Initrd, "initrd"),
];

/// Writes what the point holds into the directory of the request, if it has one, less what is left
/// out; the files made.
pub(super) async fn write(
    (repository, manifest): (&Repository, &Manifest),
    request: &Request,
    left_out: &[ArtifactKind],
    (outcome, journal): (&mut Outcome, &mut RestoreJournal),
) -> Result<Vec<PathBuf>> {
    let Some(directory) = &request.directory else { return Ok(Vec::new()) };
    let mut written = Vec::new();
    for (kind, name) in FILES.into_iter().filter(|(kind, _)| !left_out.contains(kind)) {
        let Some(artifact) = points::artifact(manifest, kind) else { continue };
        let bytes = repository.read_bytes(&artifact.stored).await.map_err(salvage::advise)?;
        let path = directory.join(name);
        outcome.add(write_file(&path, &bytes, request.existing, journal)?)?;
        written.push(path);
    }
    Ok(written)
}

/// The files that [`write()`] would write.
pub(super) fn paths(manifest: &Manifest, request: &Request) -> Vec<PathBuf> {
    let Some(directory) = &request.directory else { return Vec::new() };
    let wanted = FILES.iter().filter(|(kind, _)| points::artifact(manifest, *kind).is_some());
    let list = salvage::path_beside_images(request);
    list.into_iter().chain(wanted.map(|(_, name)| directory.join(name))).collect()
}

/// What [`write()`] would write that is damaged.
pub(super) async fn damaged(
    repository: &Repository,
    manifest: &Manifest,
    request: &Request,
) -> Result<Vec<DamagedArtifact>> {
    let mut damaged = Vec::new();
    for (kind, _) in FILES.iter().filter(|_| request.directory.is_some()) {
        let Some(artifact) = points::artifact(manifest, *kind) else { continue };
        let (reader, losses) = repository.open_disk_salvaging(&artifact.stored).await?;
        block::read_all(&reader, ARTIFACT_BYTES_MAX).await?;
        if let Some(loss) = losses.take().first() {
            damaged.push(DamagedArtifact { kind: *kind, reason: loss.reason.to_string() });
        }
    }
    Ok(damaged)
}

/// Finds the files to be written that are there and must not be replaced.
pub(super) fn check_free(manifest: &Manifest, request: &Request, problems: &mut Problems) {
    if request.existing == Existing::Refuse {
        let there = |path: &PathBuf| path.symlink_metadata().is_ok();
        paths(manifest, request).iter().filter(|path| there(path)).for_each(|path| {
            problems.add(exists(path));
        });
    }
}

/// Writes a file whole and durable, readable by its owner only, or as the one it replaces; its name is
/// not synced yet.
pub(super) fn write_file(
    path: &Path,
    bytes: &[u8],
    existing: Existing,
    journal: &mut RestoreJournal,
) -> Result<Placed> {
    let fail = |e| no_room(Error::io(format!("cannot write {}", path.display()), e));
    let path = &match existing {
        Existing::Refuse => path.to_owned(),
        Existing::Replace => followed(path)?,
    };
    let temporary = journal.temporary(path)?;
    let directory = temporary.parent().expect("a file is in a directory");
    journal.before(Phase::Temporary);
    let mut file = tempfile::Builder::new()
        .prefix(temporary.file_name().expect("it has one"))
        .rand_bytes(0)
        .permissions(std::fs::Permissions::from_mode(0o600))
        .tempfile_in(directory)
        .map_err(fail)?;
    if existing == Existing::Replace {
        take_over(path, file.as_file())?;
    }
    file.write_all(bytes).and_then(|()| file.as_file().sync_all()).map_err(fail)?;
    journal.after(Phase::Temporary);
    journal.place(&temporary, path)?;
    journal.before(Phase::Place);
    let placed = Placed::place(&temporary, path, existing)?;
    journal.after(Phase::Place);
    // Under the temporary name is nothing now, or what must not be lost.
    let _ = file.into_temp_path().keep();
    Ok(placed)
}

/// Says what to do when a target is full.
pub(super) fn no_room(error: Error) -> Error {
    match error.kind() {
        Kind::NoSpace => error.hint(
            "make room there, restore to another directory with --to DIR, or single disks with \
             --disk",
        ),
        _ => error,
    }
}

/// The error about a file that is in the way.
pub(super) fn exists(path: &Path) -> Error {
    Error::new(Kind::AlreadyExists, format!("{} exists", path.display()))
        .hint("choose another directory, or --force to replace it")
}
