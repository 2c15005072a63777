//! What a killed run left on a domain, undone before anything else is done to it.
//!
//! ```text
//!  journal ─► thaw ─► end the job ─► remove its files ─► checkpoints and bitmaps whose point is not
//!                                                        in the repository
//! ```
//!
//! The same for the start of every backup and for `recover`. The guest comes first: it is thawed
//! before anything is asked that might wait. A job is ended only if the journal has its point. Bitmaps
//! are told by name, so those of runs on other machines are found as well; those of other repositories
//! are theirs to judge.

use std::path::Path;
use std::time::Duration;

use virt::domain::Domain;

use super::checkpoint::{Check, Checkpoints, Delete, passes};
use super::connection::DomainHandle;
use super::lock::DomainLock;
use super::quiesce::{self, Frost};
use super::survey::Survey;
use super::teardown::Scratch;
use super::{LibvirtOptions, job};
use crate::control::Control;
use crate::error::{Kind, Result, with_causes};
use crate::image::bitmap::{self, BitmapNames};
use crate::journal::{Action, Item, Journal, Phase, Recovery, Run};
use crate::platform::{Asked, KnownPoint, RecoverRequest, SnapshotRequest, remove_noted, told};
use crate::vm::PointId;

/// Marks a job that libvirt has answered for: when it is gone, it is gone for good.
pub(super) const BEGUN: &str = "begun";

/// Steps that bitmaps and checkpoints are left by.
const MARKS: [Phase; 2] = [Phase::Checkpoint, Phase::Bitmap];

/// Undoes, or looks for, what killed runs left: `vmbackup recover`.
pub(super) async fn recover(
    domain: &DomainHandle,
    options: &LibvirtOptions,
    request: &RecoverRequest,
    control: &Control,
) -> Result<Vec<Item>> {
    control.set_phase("looking at the domain");
    let mut lock = DomainLock::take(options, domain.uuid, &domain.name)?;
    let mut recovery = Recovery::new(request.mode);
    let done = reconcile(domain.clone(), &mut lock, request, (&mut recovery, control)).await;
    told(done, recovery, control)
}

async fn reconcile(
    mut domain: DomainHandle,
    lock: &mut DomainLock,
    request: &RecoverRequest,
    (recovery, control): (&mut Recovery, &Control),
) -> Result<()> {
    match processes(&mut domain, lock, &request.snapshot, (recovery, control)).await {
        Ok(_) => {}
        // Somebody else's job, or a migration: nobody can ask for bitmaps now.
        Err(error) if error.kind() == Kind::Busy => {
            recovery.note(Action::Kept, format!("whatever there is besides: {error}"));
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    if request.repository == Asked::Yes {
        let survey = Survey::take(&domain, &request.snapshot).await?;
        marks(&domain, &survey, &request.snapshot, (&mut lock.journal, recovery)).await?;
    }
    if request.repository != Asked::Later {
        let asked = request.repository == Asked::Yes;
        let repository = asked.then_some(&request.snapshot.repository);
        close(&mut lock.journal, repository, recovery)?;
    }
    Ok(())
}

/// Undoes what does not concern the repository, before anything else is asked of the domain. Whether
/// the guest may still be frozen. [`Kind::Busy`] when there is a job of anybody else. It may take minutes: the
/// handle is for what follows.
pub(super) async fn processes(
    domain: &mut DomainHandle,
    lock: &mut DomainLock,
    request: &SnapshotRequest,
    (recovery, control): (&mut Recovery, &Control),
) -> Result<Frost> {
    let running = domain.call("ask for the state of", Domain::is_active).await?;
    let (journal, guardian) = (&mut lock.journal, request.guardian.as_deref());
    let mut left =
        Leftovers { domain, journal, guardian, running, active: None, recovery, control };
    let frost = left.guest().await?;
    if running {
        left.job().await?;
    } else if left.recovery.changes() {
        // It ended with QEMU.
        left.journal.undone_earlier(&[Phase::Job])?;
    }
    left.files().await?;
    Ok(frost)
}

/// What is left of killed runs.
struct Leftovers<'a> {
    domain: &'a mut DomainHandle,
    journal: &'a mut Journal,
    /// The program that becomes a guardian.
    guardian: Option<&'a Path>,
    /// Whether the domain has a QEMU.
    running: bool,
    /// The point of the job of ours that was there.
    active: Option<PointId>,
    recovery: &'a mut Recovery,
    control: &'a Control,
}

impl Leftovers<'_> {
    /// Thaws the guest if an earlier run may have left it frozen.
    async fn guest(&mut self) -> Result<Frost> {
        let name = &self.domain.name;
        if self.journal.is_unreadable() {
            let path = self.journal.path().display();
            let text = format!(
                "journal {path}, which cannot be read and gets the ending '.unreadable': a job of that \
                 run on domain '{name}' has to be ended by hand ('virsh domjobabort {name}')"
            );
            self.recovery.note(Action::Kept, text);
        }
        // A boot of the machine that runs us says nothing of a domain elsewhere.
        let local = self.domain.host.is_local();
        let frozen = self
            .journal
            .earlier()
            .any(|run| run.has(Phase::Freeze) && self.running && !(local && run.is_before_boot()));
        let mut frost = Frost::default();
        if frozen || (self.running && self.journal.is_unreadable()) {
            let text = format!("file systems of domain '{name}', which may be frozen: thawed");
            if !self.recovery.undo(text) {
                return Ok(frost);
            }
            frost = quiesce::thaw_left(self.domain, self.guardian).await;
            if frost.is_there().await {
                self.recovery.stays("the guest's agent does not answer; thawing goes on");
                return Ok(frost);
            }
        }
        if self.recovery.changes() {
            self.journal.undone_earlier(&[Phase::Freeze])?;
            self.journal.set_aside()?;
        }
        Ok(frost)
    }

    /// Ends the job of a killed run; [`Kind::Busy`] when there is one of anybody else.
    /// It is not touched while its scratch hangs.
    async fn job(&mut self) -> Result<()> {
        let name = self.domain.name.clone();
        self.active = job::check_idle(self.domain, self.journal).await?;
        if let Some(point) = self.active {
            if !self.recovery.undo(format!("backup job of domain '{name}'")) {
                return Ok(());
            }
            if let Err(error) = self.end_job(point).await {
                let what = format!("cannot end the job an earlier backup left on domain '{name}'");
                self.recovery.stays(error.in_one_line());
                return Err(error.context(what));
            }
            // Answered or not: it has begun, and a run asks for one at a time.
            self.journal.undone(point, &[Phase::Job])?;
            job::check_idle(self.domain, self.journal).await?;
        }
        if !self.recovery.changes() {
            return Ok(());
        }
        // One that was not answered may still begin, and is ended then.
        let over = |run: &&Run| run.objects(Phase::Job).any(|o| o == Path::new(BEGUN));
        let over: Vec<PointId> = self.journal.earlier().filter(over).map(|run| run.point).collect();
        over.into_iter().try_for_each(|point| self.journal.undone(point, &[Phase::Job]))
    }

    /// Not while its scratch hangs.
    async fn end_job(&mut self, point: PointId) -> Result<()> {
        let runs = self.journal.earlier().filter(|run| run.point == point);
        let files = runs.flat_map(|run| run.objects(Phase::Scratch)).map(Path::to_owned);
        let files: Vec<_> = files.collect();
        let Some(directory) = files.first().and_then(|file| file.parent()).map(Path::to_owned)
        else {
            return job::end(self.domain, point).await;
        };
        let scratch = Scratch::new(&self.domain.host, directory);
        // It may stay as it is: who wants to stop does not wait.
        let written = scratch.written((self.domain, point), files, Duration::ZERO);
        let held = self.control.run(written).await?;
        *self.domain = Scratch::end_written((self.domain, point), held).await?;
        Ok(())
    }

    /// Removes the files of jobs that are gone: QEMU never unlinks its socket, and after a crash
    /// nobody removes scratch.
    async fn files(&mut self) -> Result<()> {
        let phases = [Phase::Scratch, Phase::Socket];
        if !self.domain.host.is_local() {
            return self.files_elsewhere(&phases);
        }
        let stay = match self.remove(&phases).await {
            Ok(stay) => stay,
            Err(hangs) => {
                let text = format!("scratch of an earlier backup: {}", hangs.in_one_line());
                self.recovery.note(Action::Kept, text);
                return Ok(());
            }
        };
        if !self.recovery.changes() {
            return Ok(());
        }
        let waits = |run: &&Run| !run.has(Phase::Job) && !stay.contains(&run.point);
        let over: Vec<PointId> = self.journal.earlier().filter(waits).map(|r| r.point).collect();
        over.into_iter().try_for_each(|point| self.journal.undone(point, &phases))
    }

    /// Those on another host cannot be looked for from here. libvirt and QEMU take them along with the
    /// job, also when QEMU dies, unless the host went down with both: then the person is told, once.
    fn files_elsewhere(&mut self, phases: &[Phase]) -> Result<()> {
        let over = self.journal.earlier().filter(|run| !run.has(Phase::Job));
        let over: Vec<Run> = over.cloned().collect();
        let (name, host) = (&self.domain.name, self.domain.host.hostname());
        for run in over {
            let scratch = run.objects(Phase::Scratch).map(|path| path.display().to_string());
            let scratch: Vec<String> = scratch.collect();
            // A job that was there until now has taken its files along.
            if !scratch.is_empty() && self.active != Some(run.point) {
                let files = scratch.join(", ");
                let text =
                    format!("{files} of domain '{name}', if host {host} went down meanwhile");
                self.recovery.note(Action::Kept, text);
            }
            if self.recovery.changes() {
                self.journal.undone(run.point, phases)?;
            }
        }
        Ok(())
    }

    async fn remove(&mut self, phases: &[Phase]) -> Result<Vec<PointId>> {
        if self.recovery.changes() {
            self.scratch_answers().await?;
        }
        remove_noted(self.journal, phases, self.recovery).await
    }

    /// [`Kind::Timeout`] if a directory in which earlier runs noted scratch takes no writes.
    async fn scratch_answers(&self) -> Result<()> {
        for directory in self.journal.scratch_directories() {
            Scratch::new(&self.domain.host, directory.to_owned()).answers().await?;
        }
        Ok(())
    }
}

/// Removes checkpoints and bitmaps of this repository's chain whose point does not exist, and the
/// metadata of those whose point does.
async fn marks(
    domain: &DomainHandle,
    survey: &Survey,
    request: &SnapshotRequest,
    (journal, recovery): (&mut Journal, &mut Recovery),
) -> Result<()> {
    let chain = BitmapNames::new(&request.repository, domain.uuid)?;
    let checkpoints = Checkpoints { domain, chain: &chain, all: &survey.set.all };
    let name = &domain.name;
    let listed = checkpoints.listed().await?;
    let existing: Vec<_> = listed.iter().copied().filter(|point| request.exists(*point)).collect();
    // A run was killed between its commit and the handover. Which of them is the base, and of which disk,
    // the next backup finds out; the others it finds by nothing but their metadata, which goes now, as
    // long as QEMU has not stored their bitmaps.
    if existing.len() > 1 && recovery.changes() {
        let before = journal.handed_over(&request.repository);
        journal.hand_over(&request.repository, &[before, existing].concat())?;
    }
    for point in listed {
        if request.exists(point) {
            let text = format!("checkpoint of point {} of domain '{name}'", point.short());
            recovery.note(Action::Adopted, text);
            if recovery.changes() {
                checkpoints.delete(point, Delete::Metadata).await?;
            }
        } else if recovery.undo(unknown("checkpoint", point, name)) {
            if survey.running {
                discard(&checkpoints, point, recovery).await?;
            } else {
                checkpoints.delete(point, Delete::Metadata).await?;
            }
        }
    }
    for (point, disks) in image_bitmaps(survey, &chain) {
        if request.exists(point) || !recovery.undo(unknown("bitmap", point, name)) {
            continue;
        }
        if survey.running {
            if let Err(error) = drop_stale(&checkpoints, point, &disks).await {
                recovery.stays(error);
            }
            continue;
        }
        let bitmap = chain.of_point(point);
        for disk in survey.disks.iter().filter(|disk| disks.contains(&disk.disk.name)) {
            if let Some(path) = &disk.disk.path {
                bitmap::remove(path, &disk.disk.format, &bitmap).await?;
            }
        }
    }
    Ok(())
}

/// Deletes a checkpoint. One whose bitmap is broken (QEMU was killed) loses its metadata only: it
/// must not be in the way of anything for that.
pub(super) async fn discard(
    checkpoints: &Checkpoints<'_>,
    point: PointId,
    recovery: &mut Recovery,
) -> Result<()> {
    match checkpoints.discard(point).await {
        Err(error) if !passes(&error) => {
            let name = &checkpoints.domain.name;
            let text = format!(
                "bitmap of domain '{name}' for point {}: {}",
                point.short(),
                with_causes(&error)
            );
            recovery.note(Action::Kept, text);
            Ok(())
        }
        result => result,
    }
}

fn unknown(what: &str, point: PointId, name: &str) -> String {
    format!("{what} of domain '{name}' for point {}, which does not exist", point.short())
}

/// Points of a chain that the images name, with the disks. Bitmaps that a running QEMU has not
/// stored yet are not in them.
pub(super) fn image_bitmaps(survey: &Survey, chain: &BitmapNames) -> Vec<(PointId, Vec<String>)> {
    let mut found = std::collections::BTreeMap::<PointId, Vec<String>>::new();
    for (disk, image) in survey.disks.iter().zip(&survey.images) {
        let bitmaps = image.iter().filter_map(|image| image.bitmaps.as_ref()).flatten();
        for bitmap in bitmaps {
            if let Some(point) = chain.point_of(&bitmap.name) {
                found.entry(point).or_default().push(disk.disk.name.clone());
            }
        }
    }
    found.into_iter().collect()
}

/// Removes the bitmaps of `point` from `disks` of a running domain: defines them for libvirt first.
/// A bitmap that is broken beyond this is found again by the next run, and the first error is returned;
/// at once is one that passes.
pub(super) async fn drop_stale(
    checkpoints: &Checkpoints<'_>,
    point: PointId,
    disks: &[String],
) -> Result<()> {
    let known = KnownPoint { id: point, disks: Vec::new(), checkpoint_xml: None };
    let mut result = Ok(());
    for disk in disks {
        if !checkpoints.redefine(&known, &[disk], Check::Trust).await? {
            continue;
        }
        match checkpoints.discard(point).await {
            Err(error) if passes(&error) => return Err(error),
            dropped => result = result.and(dropped),
        }
    }
    result
}

/// Closes the books on bitmaps and checkpoints: those of `repository` were judged, those of others
/// are not ours to.
pub(super) fn close(
    journal: &mut Journal,
    repository: Option<&String>,
    recovery: &mut Recovery,
) -> Result<()> {
    let judged = |run: &Run| Some(&run.repository) == repository;
    let open = journal.earlier().filter(|run| MARKS.iter().any(|phase| run.has(*phase)));
    let (judged, kept): (Vec<_>, Vec<_>) = open.cloned().partition(judged);
    for run in kept {
        let text = format!(
            "bitmaps and checkpoints of point {} of '{}', whose repository was not asked",
            run.point.short(),
            run.name
        );
        recovery.note(Action::Kept, text);
    }
    if !recovery.changes() {
        return Ok(());
    }
    judged.into_iter().try_for_each(|run| journal.undone(run.point, &[&MARKS[..], &REST].concat()))
}

/// Steps that leave nothing by themselves.
const REST: [Phase; 2] = [Phase::Process, Phase::Manifest];
