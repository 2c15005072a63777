//! The undo journal: what a run changes outside the repository is written down before it is
//! changed, so that whoever comes next can undo it for a run that was killed.
//!
//! ```text
//!  state directory/journal/<uuid of the VM>.json
//!    run (point, repository, where the VM is, boot)
//!      entry (phase, names of what is to be undone)      durable ► step ► … ► undone ► entry gone
//! ```
//!
//! - *One file per VM*, replaced as a whole and synced: a crash leaves the one before. Whoever holds
//!   the VM's lock has it to itself. No file means that there is nothing to undo.
//! - *An entry is durable before its step is taken*, and goes when the step is undone or handed over
//!   (a checkpoint whose point exists is no leftover). One that tells of what never happened, or of
//!   what is gone, costs a look.
//! - *What is there decides*, not what is written: reconciliation looks for each thing by the name
//!   the entry has, and touches nothing it does not find or that does not carry a name of ours. A
//!   bitmap or checkpoint is removed only if the repository it names can be asked and does not have
//!   its point; if it cannot, both stay, and the entry with them.
//! - *A freeze and a job may come after our death*: they were asked for, and QEMU or the guest's
//!   agent had not answered. Their entries stay until it is certain that they will not.
//! - *A boot ends* what lives in processes of this machine: frozen guests, jobs, nodes, exports. Files
//!   and bitmaps stay.
//!
//! ```text
//!  phase        libvirt, running    QEMU                stopped, images
//!  checkpoint   metadata redefined
//!  scratch      files of the job    work directory
//!  node                             scratch nodes
//!  socket       of the job          NBD server
//!  freeze       by the guardian     by the guardian
//!  pause                            guest first (*)
//!  bitmap                           in the transaction  qemu-img bitmap
//!  filter                           guest first (*)
//!  job          job, checkpoint     transaction
//!  export       of the job          snapshot nodes,
//!                                   exports
//!  process                                              qemu-nbd
//!  manifest     the point exists    the same            the same
//!  handover     older ones go       the same            the same
//!
//!  (*) instead of the job, with `--guest-first`; several disks at once need the pause
//!
//!               a restore ([`restore`])
//!  temporary    a file or directory gets made, under a name that nothing else has
//!  overwrite    a device is written
//!  place        one that is complete gets its name, what it replaces gets the temporary one
//!  define       the domain
//!  discard      what was replaced goes
//! ```
//!
//! Who undoes what is the platform's business (`reconcile` there), at the start of the next backup and
//! for `vmbackup recover`.
//!
//! The [`Probe`] is how tests stop a run just before or after a step: the list they go through is
//! [`Phase::ALL`], so that none is forgotten.
//!
//! Deliberately not done: undoing by replay in the reverse order (a platform knows the order in which
//! its things let go of each other).

mod any_path;
mod file;
mod recovery;
pub mod restore;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use recovery::{Action, Item, Mode, Recovery};
pub use restore::{Abandoned, Placing, RestoreJournal, RestoreRun, Step};

use crate::error::Result;
use crate::vm::{PointId, Uuid};

/// The steps of a run that change something outside the repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Checkpoints are defined in libvirt. Objects: their names.
    Checkpoint,
    /// Files for what the guest overwrites. Objects: their paths.
    Scratch,
    /// Nodes of QEMU's block graph, named after the point.
    Node,
    /// QEMU listens for NBD. Objects: the socket.
    Socket,
    /// The guest's file systems are frozen. Objects: the agent's socket, for a plain QEMU.
    Freeze,
    /// The guest stands still for a moment.
    Pause,
    /// Bitmaps in images. Objects: the images.
    Bitmap,
    /// Filters between the guest's devices and their nodes. Objects: filter, node and device.
    Filter,
    /// The backup job; with libvirt the job's checkpoint as well. Its name carries the point.
    Job,
    /// Exports, named after the point.
    Export,
    /// A qemu-nbd, which ends with us. What it leaves is told by whether its owner lives.
    Process,
    /// The point becomes one of the repository. Nothing to undo: the repository tells.
    Manifest,
    /// The new checkpoint takes the place of the older ones, which go. Objects: their points, where
    /// they cannot be found without being told.
    Handover,
    /// A restore makes a file or directory that is to get its name later.
    Temporary,
    /// A restore writes a device. There is no undoing that.
    Overwrite,
    /// What is complete gets its name.
    Place,
    /// The domain is defined.
    Define,
    /// What was replaced goes.
    Discard,
}

impl Phase {
    /// All of them, in the order of a run.
    pub const ALL: [Self; 18] = [
        Self::Checkpoint,
        Self::Scratch,
        Self::Node,
        Self::Socket,
        Self::Freeze,
        Self::Pause,
        Self::Bitmap,
        Self::Filter,
        Self::Job,
        Self::Export,
        Self::Process,
        Self::Manifest,
        Self::Handover,
        Self::Temporary,
        Self::Overwrite,
        Self::Place,
        Self::Define,
        Self::Discard,
    ];

    /// All but some of them.
    pub fn all_but(kept: &[Self]) -> Vec<Self> {
        Self::ALL.into_iter().filter(|phase| !kept.contains(phase)).collect()
    }

    /// Its name, as in the file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Scratch => "scratch",
            Self::Node => "node",
            Self::Socket => "socket",
            Self::Freeze => "freeze",
            Self::Pause => "pause",
            Self::Bitmap => "bitmap",
            Self::Filter => "filter",
            Self::Job => "job",
            Self::Export => "export",
            Self::Process => "process",
            Self::Manifest => "manifest",
            Self::Handover => "handover",
            Self::Temporary => "temporary",
            Self::Overwrite => "overwrite",
            Self::Place => "place",
            Self::Define => "define",
            Self::Discard => "discard",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A side of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Its entry is durable and it is not taken.
    Before,
    /// It was taken.
    After,
}

/// Called at each step. Tests stop the process in it; nothing else uses it.
pub type Probe = Arc<dyn Fn(Phase, Moment) + Send + Sync>;

/// Something that was, or may have been, done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The step.
    pub phase: Phase,
    /// Names or paths of what it made, as the phase says.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "any_path::list")]
    pub objects: Vec<PathBuf>,
}

impl Entry {
    /// A step whose objects are found by the point alone.
    pub fn of(phase: Phase) -> Self {
        Self { phase, objects: Vec::new() }
    }

    /// A step that makes these files.
    pub fn files<P: AsRef<Path>>(phase: Phase, paths: impl IntoIterator<Item = P>) -> Self {
        Self { phase, objects: paths.into_iter().map(|path| path.as_ref().to_owned()).collect() }
    }
}

/// Where the VM of a run is, to reach it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "platform", rename_all = "kebab-case")]
pub enum Place {
    /// A domain of libvirt.
    Libvirt {
        /// Connection URI.
        uri: String,
    },
    /// A QEMU by itself.
    Qemu {
        /// Its monitor socket. Absolute: whoever looks for it later may be in another directory.
        #[serde(with = "any_path")]
        monitor: PathBuf,
        /// Its guest agent's socket; absolute.
        #[serde(with = "any_path::option")]
        agent: Option<PathBuf>,
        /// The name it was given.
        name: Option<String>,
    },
    /// Image files.
    Images {
        /// Path, absolute, and format of each.
        #[serde(with = "any_path::images")]
        images: Vec<(PathBuf, String)>,
    },
}

/// A run and what it has to undo.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The point it makes.
    pub point: PointId,
    /// The VM's name.
    pub name: String,
    /// The repository's id.
    pub repository: String,
    /// Where the VM is.
    pub place: Place,
    /// The boot of this machine it ran in; empty where the system does not tell.
    pub boot: String,
    /// What it did, or was about to.
    pub entries: Vec<Entry>,
}

impl Run {
    /// A run that has done nothing yet.
    pub fn new(point: PointId, name: &str, repository: &str, place: Place) -> Self {
        let (name, repository) = (name.to_owned(), repository.to_owned());
        Self { point, name, repository, place, boot: file::boot_id(), entries: Vec::new() }
    }

    /// Whether it has an entry of this phase.
    pub fn has(&self, phase: Phase) -> bool {
        self.entries.iter().any(|entry| entry.phase == phase)
    }

    /// The objects of a phase.
    pub fn objects(&self, phase: Phase) -> impl Iterator<Item = &Path> {
        let entries = self.entries.iter().filter(move |entry| entry.phase == phase);
        entries.flat_map(|entry| &entry.objects).map(PathBuf::as_path)
    }

    /// Whether this machine was booted since: its processes are gone.
    pub fn is_before_boot(&self) -> bool {
        let now = file::boot_id();
        !now.is_empty() && !self.boot.is_empty() && now != self.boot
    }

    fn add(&mut self, entry: Entry) {
        match self.entries.iter_mut().find(|old| old.phase == entry.phase) {
            Some(old) => {
                let new = entry.objects.into_iter();
                let new: Vec<_> = new.filter(|object| !old.objects.contains(object)).collect();
                old.objects.extend(new);
            }
            None => self.entries.push(entry),
        }
    }

    fn remove(&mut self, phases: &[Phase]) {
        self.entries.retain(|entry| !phases.contains(&entry.phase));
    }
}

/// The place of all journals, and the probe.
#[derive(Clone)]
pub struct Journals {
    directory: PathBuf,
    probe: Option<Probe>,
}

impl fmt::Debug for Journals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journals").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Journals {
    /// Journals in `directory`, which is made when there is something to write.
    pub fn new(directory: PathBuf, probe: Option<Probe>) -> Self {
        Self { directory, probe }
    }

    /// The journal of `vm`, whose lock the caller holds.
    pub fn open(&self, vm: Uuid) -> Result<Journal> {
        let path = self.path(vm);
        let (runs, unreadable) = file::read(&path)?;
        Ok(Journal { path, probe: self.probe.clone(), runs, current: None, unreadable })
    }

    /// The VMs that have one.
    pub fn vms(&self) -> Result<Vec<Uuid>> {
        file::list(&self.directory)
    }

    /// Where the journal of `vm` is.
    pub fn path(&self, vm: Uuid) -> PathBuf {
        self.directory.join(format!("{vm}.json"))
    }

    /// Says that a step that needs no entry is about to be taken.
    pub fn before(&self, phase: Phase) {
        call(self.probe.as_ref(), phase, Moment::Before);
    }

    /// Says that it was.
    pub fn after(&self, phase: Phase) {
        call(self.probe.as_ref(), phase, Moment::After);
    }
}

fn call(probe: Option<&Probe>, phase: Phase, moment: Moment) {
    if let Some(probe) = probe {
        probe(phase, moment);
    }
}

/// A file or directory that a run noted, and that is called after its point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotedFile {
    path: PathBuf,
    /// Of which point it is.
    pub point: PointId,
}

impl NotedFile {
    /// Removes it, if it is there; whether it stays, or cannot be looked for. For files of this
    /// machine.
    pub fn remove(&self, recovery: &mut Recovery) -> bool {
        let result = match self.path.symlink_metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => return false,
            _ if !recovery.undo(format!("{}", self.path.display())) => return false,
            Err(error) => Err(error),
            Ok(data) => file::remove(&self.path, &data),
        };
        if let Err(error) = &result {
            recovery.stays(error);
        }
        result.is_err()
    }
}

/// The journal of one VM. All writes block as long as a sync takes.
pub struct Journal {
    path: PathBuf,
    probe: Option<Probe>,
    /// Oldest first; the current one, if there is one, is the last.
    runs: Vec<Run>,
    current: Option<PointId>,
    unreadable: bool,
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Journal");
        shown.field("path", &self.path).field("runs", &self.runs).finish_non_exhaustive()
    }
}

impl Journal {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is one that makes no sense: nobody knows what is to be undone.
    pub fn is_unreadable(&self) -> bool {
        self.unreadable
    }

    /// Gives one that makes no sense another name, under which nobody looks for it but people.
    pub fn set_aside(&mut self) -> Result<()> {
        if self.unreadable {
            file::set_aside(&self.path)?;
            self.unreadable = false;
        }
        Ok(())
    }

    /// The runs that ended without undoing everything, oldest first.
    pub fn earlier(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(|run| Some(run.point) != self.current)
    }

    /// Whether a job that carries `point` was begun from here.
    pub fn owns(&self, point: PointId) -> bool {
        self.runs.iter().any(|run| run.point == point)
    }

    /// Begins a run; nothing is written before there is something to undo.
    pub fn begin(&mut self, run: Run) {
        self.current = Some(run.point);
        self.runs.push(run);
        let surplus = self.runs.len().saturating_sub(file::RUNS_MAX);
        self.runs.drain(..surplus);
    }

    /// Writes down, for good, what the current run is about to do.
    pub fn note(&mut self, entries: impl IntoIterator<Item = Entry>) -> Result<()> {
        self.amend(&[], entries)
    }

    /// Writes down what the current run has undone and what it is about to do.
    pub fn amend(
        &mut self,
        undone: &[Phase],
        entries: impl IntoIterator<Item = Entry>,
    ) -> Result<()> {
        let run = self.runs.last_mut().filter(|run| Some(run.point) == self.current);
        let run = run.expect("a run was begun");
        run.remove(undone);
        entries.into_iter().for_each(|entry| run.add(entry));
        self.write()
    }

    /// [`Journals::before`].
    pub fn before(&self, phase: Phase) {
        call(self.probe.as_ref(), phase, Moment::Before);
    }

    /// [`Journals::after`].
    pub fn after(&self, phase: Phase) {
        call(self.probe.as_ref(), phase, Moment::After);
    }

    /// The directories in which earlier runs noted scratch.
    pub fn scratch_directories(&self) -> BTreeSet<&Path> {
        self.earlier()
            .flat_map(|run| run.objects(Phase::Scratch))
            .filter_map(Path::parent)
            .collect()
    }

    /// The files and directories that earlier runs noted for `phases`, by the directory they are in,
    /// as far as they carry the run's point in their names.
    pub fn noted_files(&self, phases: &[Phase]) -> BTreeMap<PathBuf, Vec<NotedFile>> {
        let mut noted = BTreeMap::<_, Vec<_>>::new();
        for run in self.earlier() {
            let paths = phases.iter().flat_map(|phase| run.objects(*phase));
            for path in paths.filter(|path| file::is_of(path, run.point)) {
                let directory = path.parent().unwrap_or(path).to_owned();
                let file = NotedFile { path: path.to_owned(), point: run.point };
                noted.entry(directory).or_default().push(file);
            }
        }
        noted
    }

    /// Says that these steps of a run are undone, or handed over.
    pub fn undone(&mut self, point: PointId, phases: &[Phase]) -> Result<()> {
        for run in self.runs.iter_mut().filter(|run| run.point == point) {
            run.remove(phases);
        }
        self.write()
    }

    /// The same of every earlier run.
    pub fn undone_earlier(&mut self, phases: &[Phase]) -> Result<()> {
        let current = self.current;
        for run in self.runs.iter_mut().filter(|run| Some(run.point) != current) {
            run.remove(phases);
        }
        self.write()
    }

    /// The same of every earlier run for the repository of the current one.
    pub fn undone_for_repository(&mut self, phases: &[Phase]) -> Result<()> {
        let current = self.current;
        let of_current = self.runs.iter().find(|run| Some(run.point) == current);
        let Some(repository) = of_current.map(|run| run.repository.clone()) else {
            return Ok(());
        };
        let earlier = |run: &&mut Run| Some(run.point) != current && run.repository == repository;
        self.runs.iter_mut().filter(earlier).for_each(|run| run.remove(phases));
        self.write()
    }

    /// Writes down, at the last run for `repository`, whose checkpoints are to be dropped: by that run, or else
    /// by the next one. Takes the place of what all of them had for it; nothing if there was no run.
    pub fn hand_over(&mut self, repository: &str, points: &[PointId]) -> Result<()> {
        let mut last = None;
        for run in self.runs.iter_mut().filter(|run| run.repository == repository) {
            run.remove(&[Phase::Handover]);
            last = Some(run);
        }
        if let (Some(run), [_, ..]) = (last, points) {
            let objects = points.iter().map(|point| point.to_string().into()).collect();
            run.add(Entry { phase: Phase::Handover, objects });
        }
        self.write()
    }

    /// Points whose checkpoints earlier runs for `repository` were about to drop.
    pub fn handed_over(&self, repository: &str) -> Vec<PointId> {
        let runs = self.earlier().filter(|run| run.repository == repository);
        let objects = runs.flat_map(|run| run.objects(Phase::Handover));
        objects.filter_map(|point| point.to_str()?.parse().ok()).collect()
    }

    /// Says that nothing of the current run is left to undo.
    pub fn finish(&mut self) -> Result<()> {
        self.runs.retain(|run| Some(run.point) != self.current);
        self.write()
    }

    fn write(&mut self) -> Result<()> {
        self.set_aside()?;
        let current = self.current;
        let open: Vec<&Run> = self.runs.iter().filter(|run| !run.entries.is_empty()).collect();
        file::write(&self.path, &open)?;
        self.runs.retain(|run| !run.entries.is_empty() || Some(run.point) == current);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
