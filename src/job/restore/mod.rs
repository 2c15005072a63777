//! A restore: the disks of a point become images, devices, or a domain's disks again.
//!
//! ```text
//!  point ► choose disks ► targets ► space? ► copy each to its temporary name ► all complete?
//!                                                       │ error, or stopped        │
//!                                                       └► remove temporaries      ▼
//!                                                  no: keep them beside ◄──────────┤
//!      remove what was replaced ◄ define ◄ NVRAM, TPM, XML ◄ rename all ◄ domain still stopped?
//!                  │                 └──────────┴────────────────┴► error: put back what was replaced
//!                  └► start
//! ```
//!
//! Each step is in a journal before it is taken: when this is killed, whoever comes next to the VM
//! does the same ([`reconcile`]).
//!
//! Nothing existing is replaced before everything new is complete and durable, and what is replaced
//! is kept until libvirt has the definition: a restore that fails leaves the old VM whole. A device
//! is written in place, all of it, zeroes included: what a discarded block reads as is the device's
//! whim.
//!
//! Damaged data ends a restore, unless it is to salvage what can be read ([`salvage`]).

mod artifacts;
#[cfg(feature = "libvirt")]
mod domain;
#[cfg(not(feature = "libvirt"))]
#[path = "no_domain.rs"]
mod domain;
mod outcome;
mod place;
pub mod preview;
mod problems;
pub(super) mod reconcile;
pub mod salvage;
mod target;

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::lock::{Patience, VmLock, Wait};
use super::{Repository, Surroundings, points, recover};
use crate::block::file::Existing;
use crate::control::{Control, NoticeLevel};
use crate::copy;
use crate::error::{Error, Kind, Result};
use crate::journal::{Phase, RestoreJournal, RestoreRun, Step};
use crate::repo::seal::random;
use crate::repo::{Hold, Manifest, ManifestDisk};
use crate::units::MIB;
use crate::vm::{PointId, Uuid, VmIdentity};

use outcome::Outcome;
pub use place::{ImageFormat, Place};
use problems::Problems;
use salvage::{Damaged, DamagedRange, Listing, Salvage, Source};
use target::{Complete, Target};

/// Size of one request: a few neighbouring chunks come with one read of their pack, and go to the
/// disk with one write.
const REQUEST_BYTES: u64 = MIB;

/// What to restore, and where to.
#[derive(Clone, Debug)]
pub struct Request {
    /// The point, as it was named.
    pub point: String,
    /// Only these disks; all when empty.
    pub disks: Vec<String>,
    /// Images go here.
    pub directory: Option<PathBuf>,
    /// Their format, if not what the disk had (with `define`) or raw.
    pub format: Option<ImageFormat>,
    /// These disks go to devices.
    pub devices: Vec<(String, PathBuf)>,
    /// What becomes of files that are in the way.
    pub existing: Existing,
    /// Define a domain with the restored disks.
    pub define: Option<Define>,
    /// What becomes of damaged data.
    pub damaged: Damaged,
    /// What to do while another run works on the VM (with `define`).
    pub wait: Wait,
}

/// The domain to define.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Define {
    /// Connection URI of libvirt.
    pub uri: String,
    /// A new domain of this name; the lost one if not given.
    pub as_name: Option<String>,
    /// What becomes of it then.
    pub power: Power,
}

/// What becomes of a domain that was defined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// It stays off.
    Off,
    /// It is started.
    On,
}

/// What was restored.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The point.
    pub point: PointId,
    /// Its VM.
    pub vm: VmIdentity,
    /// The disks.
    pub disks: Vec<DiskReport>,
    /// Other files that were written.
    #[serde(serialize_with = "crate::job::lossy::list")]
    pub files: Vec<PathBuf>,
    /// The domain that was defined.
    pub domain: Option<Domain>,
    /// What was damaged, if that did not end the restore.
    pub salvage: Option<Salvage>,
    /// The whole run.
    pub elapsed_ms: u64,
}

/// A disk that was restored.
#[derive(Clone, Debug, Serialize)]
pub struct DiskReport {
    /// Its name in the VM.
    pub name: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// Where it is now.
    #[serde(serialize_with = "crate::job::lossy::path")]
    pub path: PathBuf,
    /// Format of the image, or `device`.
    pub format: String,
    /// Bytes written as data; the rest of the disk is zero.
    pub written_bytes: u64,
    /// Bytes that are zero because they are damaged in the repository. With any, the disk does not
    /// have the content root of the point.
    pub damaged_bytes: u64,
    /// Bytes of a larger device behind the disk, which stay as they were: a VM that uses it sees
    /// them.
    pub kept_bytes: u64,
    /// Reading and writing it.
    pub elapsed_ms: u64,
}

/// A domain that was defined.
#[derive(Clone, Debug, Serialize)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Whether it was started.
    pub started: bool,
    /// What had to differ from the domain that was backed up.
    pub changes: Vec<String>,
}

/// Restores a point. Watches `control`; when stopped, files in the making are removed, and a device
/// stays half written. Not cancel-safe.
pub async fn run(
    repository: &Repository,
    request: Request,
    surroundings: Surroundings<'_>,
) -> Result<Report> {
    let hold = Hold::begin(repository, surroundings.1).await?;
    let done = Box::pin(restore((repository, &hold), request, surroundings)).await;
    hold.end(done).await
}

async fn restore(
    (repository, hold): (&Repository, &Hold),
    request: Request,
    surroundings: Surroundings<'_>,
) -> Result<Report> {
    let (env, control) = surroundings;
    let started = env.clock.now();
    let manifest = points::manifest(repository, &request.point, env).await?;
    let chosen = points::choose_disks(&manifest, &request.disks)?;
    let vm = &manifest.body.vm;
    let patience = Patience::new(request.wait);
    let lock = || VmLock::acquire_after(patience.left(), &env.state_dir, vm, "restore", control);
    if request.define.as_ref().is_some_and(|define| define.as_name.is_none()) {
        // Whoever is waited for may be killed.
        drop(lock().await?);
        recover::before_restore(vm, repository, surroundings).await?;
    }
    // Nobody backs up or restores it meanwhile.
    let lock = match &request.define {
        Some(_) => Some(lock().await?),
        None => None,
    };
    let of_vm = lock.as_ref().map_or(reconcile::Lock::Take, |_| reconcile::Lock::Held);
    reconcile::before_run(&manifest.body.vm, of_vm, env, control).await;
    let mut problems = Problems::default();
    let Examined { disks, definition } =
        examine(repository, (&manifest, &chosen), &request, &mut problems).await;
    problems.check()?;
    let mut journal = begin_journal(&manifest, &request, surroundings)?;
    let made = target::make_directory(request.directory.as_deref(), &mut journal)?;
    let result = copy_all((&manifest, disks), &request, &mut journal, surroundings);
    let copied = match result.await {
        Ok(Copied { disks, images, damaged }) => {
            control.set_phase("putting everything in place");
            let from = (repository, hold);
            match salvage::list(from, &manifest, &request, damaged, env).await {
                Ok(listing) => {
                    let all = Everything { images, definition: definition.as_ref(), listing };
                    let end = (&mut journal, control);
                    let placed = put_in_place(repository, &manifest, &request, all, end).await;
                    placed.map(|(files, salvage)| (disks, files, salvage))
                }
                Err(error) => Err(target::keep_none(images, error, control)),
            }
        }
        Err(error) => Err(error),
    };
    if copied.is_err() {
        target::remove_directory(made);
    }
    if let Err(error) = journal.close() {
        control.notice(NoticeLevel::Warning, error.in_one_line());
    }
    let (disks, files, salvage) = copied?;
    let domain = match definition {
        None => None,
        Some(definition) => Some(definition.start().await?),
    };
    Ok(Report {
        point: manifest.point,
        vm: manifest.body.vm.clone(),
        disks,
        files,
        domain,
        salvage,
        elapsed_ms: env.elapsed_ms(started),
    })
}

/// The journal. A restore that replaces no domain is not kept from an emergency by a state
/// directory that cannot be written.
fn begin_journal(
    manifest: &Manifest,
    request: &Request,
    (env, control): Surroundings<'_>,
) -> Result<RestoreJournal> {
    let run = RestoreRun::new(manifest.point, manifest.body.vm.clone());
    let id = u64::from_le_bytes(random());
    match env.journals().begin_restore(run.clone(), id) {
        Err(error) if request.define.is_none() => {
            let text = format!(
                "no journal: nobody clears away after this restore if it is killed ({})",
                error.in_one_line()
            );
            control.notice(NoticeLevel::Warning, text);
            Ok(env.journals().unkept_restore(run, id))
        }
        begun => begun,
    }
}

/// What is known before anything is changed.
struct Examined<'m> {
    /// The disks, in order.
    disks: Vec<ExaminedDisk<'m>>,
    /// The domain to be defined, if one is to be and can be.
    definition: Option<domain::Prepared>,
}

/// A disk, and what is known of its restore; what is not is a problem.
struct ExaminedDisk<'m> {
    disk: &'m ManifestDisk,
    place: Option<Place>,
    source: Option<Source>,
    /// Bytes to be read from the repository, before compression.
    data_bytes: Option<u64>,
}

/// Looks at everything a restore needs, so that one of hours does not end in a refusal. Changes
/// nothing.
async fn examine<'m>(
    repository: &Repository,
    (manifest, chosen): (&Manifest, &[&'m ManifestDisk]),
    request: &Request,
    problems: &mut Problems,
) -> Examined<'m> {
    let places = place::choose(chosen, request, problems);
    artifacts::check_free(manifest, request, problems);
    let definition = match &request.define {
        None => None,
        Some(define) => {
            let names = chosen.iter().map(|disk| disk.description.name.clone());
            let disks = names.zip(places.iter().cloned());
            let disks: Vec<_> = disks.filter_map(|(name, place)| Some((name, place?))).collect();
            let of = (repository, manifest);
            domain::prepare(of, &disks, (request, define), problems).await
        }
    };
    let mut disks = Vec::new();
    for (disk, place) in chosen.iter().zip(places) {
        let source = problems.note(salvage::open(repository, disk, request.damaged).await);
        let data_bytes = match &source {
            Some(source) => {
                let bytes = target::data_bytes(source.blocks.as_ref()).await;
                problems.note(bytes.map_err(|error| source.failed(error)))
            }
            None => None,
        };
        disks.push(ExaminedDisk { disk, place, source, data_bytes });
    }
    let known = disks.iter().filter_map(|disk| Some((disk.place.as_ref()?, disk.data_bytes?)));
    target::check_space(&known.collect::<Vec<_>>(), problems);
    if request.existing == Existing::Replace {
        let mut paths = artifacts::paths(manifest, request);
        paths.extend(definition.iter().flat_map(domain::Prepared::paths));
        let images = disks.iter().filter_map(|disk| match &disk.place {
            Some(Place::Image { path, .. }) => Some(path.clone()),
            _ => None,
        });
        paths.extend(images);
        target::check_replaced(&paths, problems);
    }
    Examined { disks, definition }
}

/// What a restore ends with, once all is copied.
struct Everything<'a> {
    images: Vec<Complete>,
    definition: Option<&'a domain::Prepared>,
    listing: Option<Listing>,
}

/// Gives everything its name and defines the domain; the files that were written. When something
/// fails, what was replaced is put back. Not cancel-safe.
async fn put_in_place(
    repository: &Repository,
    manifest: &Manifest,
    request: &Request,
    Everything { images, definition, listing }: Everything<'_>,
    (journal, control): (&mut RestoreJournal, &Control),
) -> Result<(Vec<PathBuf>, Option<Salvage>)> {
    if let Some(definition) = definition {
        // Copying took its time.
        if let Err(error) = definition.check().await {
            return Err(keep_copies(images, listing, manifest.point, error, control).await);
        }
    }
    let mut outcome = Outcome::new(manifest.point);
    // They are written, whatever fails now.
    let images = target::hold_devices(images, &mut outcome);
    let all = async {
        if let Some(listing) = &listing {
            outcome.list(listing.write(journal)?)?;
        }
        if definition.is_some() {
            target::lock_all(&images, &mut outcome)?;
        }
        target::place_all(images, &mut outcome, journal).await?;
        let left_out = listing.iter().flat_map(|listing| listing.salvage.left_out());
        let left_out: Vec<_> = left_out.collect();
        let (from, end) = ((repository, manifest), (&mut outcome, &mut *journal));
        let mut files = artifacts::write(from, request, &left_out, end).await?;
        if let Some(definition) = definition {
            files.extend(definition.define(&mut outcome, journal).await?);
        }
        Ok(files)
    };
    match all.await {
        Ok(files) => {
            // There is no way back from a definition.
            if let Err(error) = journal.note(Step::Discard) {
                control.notice(NoticeLevel::Warning, error.in_one_line());
            }
            outcome.keep(journal, control);
            if let Some(listing) = &listing {
                listing.tell(manifest, control);
            }
            Ok((files, listing.map(|listing| listing.salvage)))
        }
        Err(error) if is_unanswered(journal, &error) => Err(error
            .context("whether the domain was defined is not known, so nothing was put back")
            .hint("run 'vmbackup recover' when libvirt answers")),
        Err(error) => Err(outcome.put_back(error, control)),
    }
}

/// Keeps the copies of a restore that cannot end well now, and beside them the list of what they
/// lack, without which they are given up. `error`, with where they are.
async fn keep_copies(
    images: Vec<Complete>,
    listing: Option<Listing>,
    point: PointId,
    error: Error,
    control: &Control,
) -> Error {
    let list = listing.map(|listing| listing.keep_beside(point)).transpose();
    match list.map(Option::flatten) {
        Ok(None) => target::keep_all(images, point, error).await,
        Ok(Some(list)) => {
            let error = target::keep_all(images, point, error).await;
            error.context(format!("what is damaged in the copies is in {}", list.display()))
        }
        Err(unlisted) => {
            let error = error.context(format!(
                "the copies lack what is damaged and no list of it can be written, so they were \
                 given up ({})",
                unlisted.in_one_line()
            ));
            target::keep_none(images, error, control)
        }
    }
}

/// Whether libvirt was asked to define the domain and has not said what became of it.
fn is_unanswered(journal: &RestoreJournal, error: &Error) -> bool {
    let asked = journal.steps().iter().any(|step| matches!(step, Step::Define { .. }));
    asked && matches!(error.kind(), Kind::Timeout | Kind::Connection)
}

/// The disks under their temporary names.
struct Copied {
    disks: Vec<DiskReport>,
    images: Vec<Complete>,
    damaged: Vec<DamagedRange>,
}

/// Copies all disks, each to its temporary name.
async fn copy_all(
    (manifest, examined): (&Manifest, Vec<ExaminedDisk<'_>>),
    request: &Request,
    journal: &mut RestoreJournal,
    surroundings: Surroundings<'_>,
) -> Result<Copied> {
    let control = surroundings.1;
    let (mut chosen, mut places, mut sources) = (Vec::new(), Vec::new(), Vec::new());
    for ExaminedDisk { disk, place, source, .. } in examined {
        chosen.push(disk);
        places.push(place.expect("a disk without a place is a problem"));
        sources.push(source.expect("a disk that cannot be opened is a problem"));
    }
    let devices = Target::open_devices(&places, &chosen, (journal, surroundings.1)).await?;
    let (mut targets, mut disks, mut damaged) = (Vec::new(), Vec::new(), Vec::new());
    for (((disk, source), place), device) in chosen.iter().zip(sources).zip(&places).zip(devices) {
        let opened = if let Some(device) = device {
            Ok(device)
        } else {
            let size_bytes = disk.description.size_bytes;
            Target::open(place, size_bytes, request.existing, journal).await
        };
        let restored = match opened {
            Ok(target) => restore_disk((disk, source, target), place, surroundings).await,
            Err(error) => Err(error),
        };
        match restored {
            Ok((target, report, lost)) => {
                if matches!(target, Target::Device { .. }) {
                    journal.after(Phase::Overwrite);
                }
                targets.push(target);
                disks.push(report);
                damaged.extend(lost);
            }
            Err(error) => {
                target::abort_all(targets, control);
                return Err(artifacts::no_room(error).context(format!(
                    "{} of point {} was not restored",
                    disk.description.name,
                    manifest.point.short()
                )));
            }
        }
    }
    control.set_phase("making the images durable");
    Ok(Copied { disks, images: target::complete_all(targets, control).await?, damaged })
}

/// Copies a disk to its place, under a temporary name where it is a file.
async fn restore_disk(
    (disk, source, target): (&ManifestDisk, Source, Target),
    place: &Place,
    (env, control): Surroundings<'_>,
) -> Result<(Target, DiskReport, Vec<DamagedRange>)> {
    let started = env.clock.now();
    let (name, size_bytes) = (&disk.description.name, disk.description.size_bytes);
    control.set_phase(format!("restoring {name}"));
    let progress = control.add_disk(name, size_bytes);
    let options = copy::Options {
        zeroes: place.zeroes(),
        request_bytes: Some(REQUEST_BYTES),
        ..copy::Options::new(
            format!("{name} in the repository"),
            place.path().display().to_string(),
        )
    };
    let kept_bytes = target.kept_bytes()?;
    source.begin();
    let blocks = Arc::clone(&source.blocks);
    match copy::copy(blocks, target.sink(), &options, control, &progress).await {
        Ok(copied) => {
            let lost = source.lost(name);
            let report = DiskReport {
                name: name.clone(),
                size_bytes,
                path: place.path().to_owned(),
                format: place.format_name().to_owned(),
                written_bytes: copied.written_bytes,
                damaged_bytes: lost.iter().map(|range| range.bytes).sum(),
                kept_bytes,
                elapsed_ms: env.elapsed_ms(started),
            };
            Ok((target, report, lost))
        }
        Err(error) => {
            target::abort_all(vec![target], control);
            Err(source.failed(error))
        }
    }
}
