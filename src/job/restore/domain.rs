//! The domain of a restore: everything that can be known beforehand is, so that a restore of hours
//! does not end in a refusal.
//!
//! ```text
//!  prepare: description ► places of NVRAM, kernel, TPM ► rewritten XML ► may it be defined?
//!                                   (images are copied)
//!  check:   may it still be defined?
//!                                   (images get their names)
//!  define:  write NVRAM, kernel, initrd ► TPM state ► define
//!                                   (what was replaced is removed, or put back)
//!  refresh storage pools ► start
//! ```
//!
//! A file that is there already with the right content is not in the way. A kernel or initrd that
//! differs from the stored one is never replaced, not even with `--force`: other domains may boot
//! from it. The stored one then gets a name of its own.

use std::path::{Path, PathBuf};

use super::artifacts::{exists, write_file};
use super::outcome::Outcome;
use super::problems::Problems;
use super::{Define, Domain, Place, Power, Request, preview};
use crate::block::file::Existing;
use crate::error::{Error, Kind, Result};
use crate::job::points;
use crate::journal::{Phase, RestoreJournal, Step};
use crate::platform::libvirt::restore::define::{self, Target};
use crate::platform::libvirt::restore::{
    DiskPlace, Emulator, Identity, PoolVolume, RestoredDisk, RewriteOptions, Rewritten, choose,
    rewrite, tpm,
};
use crate::repo::{Manifest, Repository};
use crate::vm::{ArtifactKind, Uuid};

/// A domain that can be defined once its images are in place.
pub(super) struct Prepared {
    target: Target,
    rewritten: Rewritten,
    files: Vec<NewFile>,
    tpm_state: Option<Vec<u8>>,
    /// Whether there is a domain that is replaced.
    replaces: bool,
    existing: Existing,
    power: Power,
}

/// A file the domain needs besides its disks.
struct NewFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// Everything but copying: finds whatever would make the definition fail, as far as it can be
/// known. Changes nothing. `disks` are those that have a place.
pub(super) async fn prepare(
    (repository, manifest): (&Repository, &Manifest),
    disks: &[(String, Place)],
    (request, define): (&Request, &Define),
    problems: &mut Problems,
) -> Option<Prepared> {
    let (mut changes, mut files) = (Vec::new(), Vec::new());
    let mut boot = Boot { repository, manifest, request, define, files: &mut files };
    let nvram = problems.note(boot.nvram(&mut changes).await).flatten();
    let kernel = problems.note(boot.shared(ArtifactKind::Kernel, "kernel").await).flatten();
    let initrd = problems.note(boot.shared(ArtifactKind::Initrd, "initrd").await).flatten();
    let target = problems.note(open_target(define).await);
    let xml = problems.note(description(repository, manifest).await)?;
    let mut emulator = Emulator::Keep;
    if let Some(target) = &target
        && let Some(survey) = problems.note(target.survey(&xml).await)
    {
        changes.extend(survey.missing);
        emulator = survey.emulator;
    }
    let volumes =
        volumes(target.as_ref(), &xml, (manifest, disks), (request, define), problems).await;
    let restored = disks.iter().map(|(name, place)| restored(name, place, &volumes));
    let restored = restored.collect::<Result<_>>();
    let options = RewriteOptions {
        identity: match &define.as_name {
            None => Identity::Original,
            Some(name) => Identity::New { name: name.clone(), uuid: Uuid::new_v4() },
        },
        disks: problems.note(restored)?,
        nvram,
        kernel,
        initrd,
        emulator,
    };
    let mut rewritten = problems.note(rewrite(&xml, &options))?;
    rewritten.changes.append(&mut changes);
    let tpm_state = tpm_state(repository, manifest, (request, define), &mut rewritten).await;
    let tpm_state = problems.note(tpm_state).flatten();
    let target = target?;
    let existing = in_the_way(request.existing);
    let check = target.check(&rewritten.name, rewritten.uuid, existing).await;
    let check = check.map_err(|error| match (error.kind(), &define.as_name) {
        // Its UUID is new: the name is what clashes.
        (Kind::Busy | Kind::AlreadyExists, Some(_)) => error.hint("choose another name for --as"),
        _ => error,
    });
    let replaces = problems.note(check).unwrap_or_default();
    let (existing, power) = (request.existing, define.power);
    Some(Prepared { target, rewritten, files, tpm_state, replaces, existing, power })
}

/// The libvirt of this host.
async fn open_target(define: &Define) -> Result<Target> {
    let target = Target::open(Some(&define.uri)).await?;
    if target.is_local() {
        return Ok(target);
    }
    let message = format!("{} is another host: it cannot use images of this one", define.uri);
    Err(Error::new(Kind::Unsupported, message)
        .hint("run vmbackup there, with the repository mounted or copied"))
}

impl Prepared {
    /// Fails when the domain was started or made meanwhile: asked right before the first thing of
    /// it is replaced. libvirt has no way to keep others from starting it.
    pub(super) async fn check(&self) -> Result<()> {
        let existing = in_the_way(self.existing);
        self.target.check(&self.rewritten.name, self.rewritten.uuid, existing).await.map(drop)
    }

    /// What would be defined.
    pub(super) fn preview(&self, define: &Define) -> preview::Domain {
        preview::Domain {
            name: self.rewritten.name.clone(),
            // A new one is made for each run.
            uuid: define.as_name.is_none().then_some(self.rewritten.uuid),
            start: self.power == Power::On,
            replaces: self.replaces,
            changes: self.rewritten.changes.clone(),
        }
    }

    /// The files that would be written.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        let tpm = self.rewritten.tpm_dir.iter().filter(|_| self.tpm_state.is_some());
        self.files.iter().map(|file| &file.path).chain(tpm).cloned().collect()
    }

    /// Writes what is left to write and defines the domain; the files. What was replaced is in
    /// `outcome`, also on an error. Not cancel-safe.
    pub(super) async fn define(
        &self,
        outcome: &mut Outcome,
        journal: &mut RestoreJournal,
    ) -> Result<Vec<PathBuf>> {
        let mut written = Vec::new();
        for file in &self.files {
            outcome.add(write_file(&file.path, &file.bytes, self.existing, journal)?)?;
            written.push(file.path.clone());
        }
        if let (Some(directory), Some(state)) = (&self.rewritten.tpm_dir, &self.tpm_state) {
            outcome.add(tpm::put(directory, state, journal)?)?;
            written.push(directory.clone());
        }
        let (uri, uuid) = (self.target.uri().to_owned(), self.rewritten.uuid);
        let before = self.target.description_hash(uuid).await?;
        journal.note(Step::Define { uri, uuid, before })?;
        journal.before(Phase::Define);
        self.target.define(&self.rewritten, in_the_way(self.existing)).await?;
        journal.after(Phase::Define);
        Ok(written)
    }

    /// Lets the pools of its disks know them, and starts the domain if that was asked for; what it
    /// is now.
    pub(super) async fn start(self) -> Result<Domain> {
        for pool in &self.rewritten.pools {
            self.target.refresh(pool, &self.rewritten.name).await?;
        }
        if self.power == Power::On {
            self.target.start(&self.rewritten).await?;
        }
        let Rewritten { name, uuid, changes, .. } = self.rewritten;
        Ok(Domain { name, uuid, started: self.power == Power::On, changes })
    }
}

/// A hash of the description that a domain has, if there is such a domain.
pub(super) async fn definition(uri: &str, uuid: Uuid) -> Result<Option<String>> {
    Target::open(Some(uri)).await?.description_hash(uuid).await
}

fn in_the_way(existing: Existing) -> define::Existing {
    match existing {
        Existing::Refuse => define::Existing::Refuse,
        Existing::Replace => define::Existing::Replace,
    }
}

/// The description to begin with.
async fn description(repository: &Repository, manifest: &Manifest) -> Result<String> {
    let live = text(repository, manifest, ArtifactKind::DomainXmlLive).await?;
    let inactive = text(repository, manifest, ArtifactKind::DomainXmlInactive).await?;
    match (live, inactive) {
        (Some(live), inactive) => choose(&live, inactive.as_deref()).map(str::to_owned),
        (None, Some(inactive)) => Ok(inactive),
        (None, None) => {
            let message = format!(
                "point {} of {} holds no domain description: it was taken without libvirt",
                manifest.point.short(),
                manifest.body.vm.name
            );
            Err(Error::new(Kind::Unsupported, message)
                .hint("restore the images with --to DIR and define the domain by hand"))
        }
    }
}

async fn text(
    repository: &Repository,
    manifest: &Manifest,
    kind: ArtifactKind,
) -> Result<Option<String>> {
    let Some(artifact) = points::artifact(manifest, kind) else { return Ok(None) };
    let bytes = repository.read_bytes(&artifact.stored).await?;
    // The text is not quoted: it may hold passwords.
    let error = Error::new(Kind::Corrupt, "the stored domain description is no text");
    String::from_utf8(bytes).map(Some).map_err(|_| error)
}

/// The disks that were volumes of storage pools. Those that go where they were need their pools.
async fn volumes(
    target: Option<&Target>,
    xml: &str,
    (manifest, disks): (&Manifest, &[(String, Place)]),
    (request, define): (&Request, &Define),
    problems: &mut Problems,
) -> Vec<PoolVolume> {
    let Some(target) = target else { return Vec::new() };
    let volumes = problems.note(target.volumes(xml).await).unwrap_or_default();
    let is_image = |volume: &&PoolVolume| {
        disks
            .iter()
            .any(|(name, place)| *name == volume.disk && matches!(place, Place::Image { .. }))
    };
    if request.directory.is_none() && define.as_name.is_none() {
        for volume in volumes.iter().filter(is_image) {
            problems.note(volume.check(&manifest.body.vm.name));
        }
    }
    volumes
}

fn restored(name: &str, place: &Place, volumes: &[PoolVolume]) -> Result<RestoredDisk> {
    let path = absolute(place.path())?;
    let volume = volumes.iter().find(|volume| volume.disk == name).and_then(PoolVolume::path);
    let place = match place {
        Place::Image { format, .. } if volume.as_ref() == Some(&path) => {
            DiskPlace::Volume { path, format: format.name().to_owned() }
        }
        Place::Image { format, .. } => DiskPlace::File { path, format: format.name().to_owned() },
        Place::Device(_) if path.is_file() => DiskPlace::File { path, format: "raw".to_owned() },
        Place::Device(_) => DiskPlace::Device { path },
    };
    Ok(RestoredDisk { name: name.to_owned(), place })
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|e| Error::io(format!("cannot make {} absolute", path.display()), e))
}

/// The TPM state, if it is to be restored; what becomes of the TPM otherwise is said.
async fn tpm_state(
    repository: &Repository,
    manifest: &Manifest,
    (request, define): (&Request, &Define),
    rewritten: &mut Rewritten,
) -> Result<Option<Vec<u8>>> {
    let Some(directory) = &rewritten.tpm_dir else { return Ok(None) };
    let Some(artifact) = points::artifact(manifest, ArtifactKind::TpmState) else {
        let become_of_it = match define.as_name {
            Some(_) => "the TPM begins fresh".to_owned(),
            None => format!("{} must exist, or the TPM begins fresh", directory.display()),
        };
        rewritten.changes.push(format!("TPM state was not captured: {become_of_it}"));
        return Ok(None);
    };
    if directory.symlink_metadata().is_ok() {
        if request.existing == Existing::Refuse {
            return Err(exists(directory));
        }
        rewritten.changes.push(format!("TPM state {} is replaced", directory.display()));
    }
    repository.read_bytes(&artifact.stored).await.map(Some)
}

/// Where NVRAM and boot files go.
struct Boot<'a> {
    repository: &'a Repository,
    manifest: &'a Manifest,
    request: &'a Request,
    define: &'a Define,
    files: &'a mut Vec<NewFile>,
}

impl Boot<'_> {
    /// The NVRAM: where it was, beside it for a new domain, or in the directory of the request,
    /// where it is written with everything else.
    async fn nvram(&mut self, changes: &mut Vec<String>) -> Result<Option<PathBuf>> {
        let Some((origin, bytes)) = self.stored(ArtifactKind::Nvram).await? else {
            return Ok(None);
        };
        if let Some(directory) = &self.request.directory {
            return absolute(&directory.join("nvram.fd")).map(Some);
        }
        let path = match &self.define.as_name {
            None => origin,
            // As libvirt itself would name it.
            Some(name) => origin.with_file_name(format!("{name}_VARS.fd")),
        };
        parent_of("NVRAM", &path)?;
        if is_same(&path, &bytes)? {
            return Ok(Some(path));
        }
        if path.symlink_metadata().is_ok() {
            if self.request.existing == Existing::Refuse {
                return Err(exists(&path));
            }
            changes.push(format!("NVRAM {} is replaced", path.display()));
        }
        self.files.push(NewFile { path: path.clone(), bytes });
        Ok(Some(path))
    }

    /// A file several domains may boot from: used where it is if it is still the same, else written
    /// under a free name.
    async fn shared(&mut self, kind: ArtifactKind, name: &str) -> Result<Option<PathBuf>> {
        let Some((origin, bytes)) = self.stored(kind).await? else { return Ok(None) };
        if let Some(directory) = &self.request.directory {
            return absolute(&directory.join(name)).map(Some);
        }
        parent_of(name, &origin)?;
        let mut beside = origin.clone().into_os_string();
        beside.push(format!("-{}", self.manifest.point.short()));
        for path in [origin, beside.into()] {
            if is_same(&path, &bytes)? {
                return Ok(Some(path));
            }
            if path.symlink_metadata().is_err() {
                self.files.push(NewFile { path: path.clone(), bytes });
                return Ok(Some(path));
            }
        }
        let message = format!("there is no free name for the {name} of this point");
        Err(Error::new(Kind::AlreadyExists, message).hint("restore to a directory with --to DIR"))
    }

    async fn stored(&self, kind: ArtifactKind) -> Result<Option<(PathBuf, Vec<u8>)>> {
        let Some(artifact) = points::artifact(self.manifest, kind) else { return Ok(None) };
        let Some(origin) = &artifact.origin else { return Ok(None) };
        let bytes = self.repository.read_bytes(&artifact.stored).await?;
        Ok(Some((origin.into(), bytes)))
    }
}

/// Fails when there is no place for a file.
fn parent_of(what: &str, path: &Path) -> Result<()> {
    if path.parent().is_some_and(|directory| directory.is_absolute() && directory.is_dir()) {
        return Ok(());
    }
    let message = format!("the directory of {what} {} does not exist", path.display());
    Err(Error::new(Kind::NotFound, message)
        .hint("make it, or restore everything to a directory with --to DIR"))
}

/// Whether a file holds just these bytes; not when there is none.
fn is_same(path: &Path, bytes: &[u8]) -> Result<bool> {
    match path.metadata() {
        Ok(data) if data.is_file() && data.len() == bytes.len() as u64 => {
            let there = std::fs::read(path);
            let there =
                there.map_err(|e| Error::io(format!("cannot read {}", path.display()), e))?;
            Ok(there == bytes)
        }
        Ok(_) => Ok(false),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io(format!("cannot examine {}", path.display()), error)),
    }
}
