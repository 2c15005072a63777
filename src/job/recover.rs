//! Recovery: what killed runs left on VMs is undone, on demand.
//!
//! ```text
//!  one VM that is named, or every VM with a journal ─► lock ─► platform.recover without a repository
//!  restores that were killed ─► lock ─► restore::reconcile
//!  the repository is opened ─► the same VMs again: bitmaps and checkpoints
//! ```
//!
//! A guest that stands still waits for no repository: it may be locked, damaged, or behind a mount
//! that does not answer. The same happens at the start of the next backup of a VM; this is for
//! whoever does not want to wait for it. A VM that cannot be reached keeps its journal, one that is
//! gone for good loses it.

use std::error::Error as StdError;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::lock::{Patience, VmLock, Wait};
use super::points::Bases;
use super::restore::reconcile as restore;
use super::source::{self, ImageSpec, SourceSpec};
use super::{Env, Repository, Surroundings};
use crate::error::{Error, Kind, Result, with_causes};
use crate::image::sweep_sockets;
use crate::journal::{Abandoned, Journal, Phase, Place, Recovery};
use crate::platform::{Asked, BackupMode, Platform, Quiesce, RecoverRequest, SnapshotRequest};
use crate::vm::{PointId, Uuid, VmIdentity};

pub use crate::journal::{Action, Item, Mode};

/// In the place of a repository's id where there is none: nothing carries it.
const NO_REPOSITORY: &str = "00000000";

/// What to recover.
#[derive(Clone, Debug)]
pub struct Request {
    /// This VM; every one with a journal if not given.
    pub source: Option<SourceSpec>,
    /// Whether anything is changed.
    pub mode: Mode,
    /// What to do about a VM that another run works on.
    pub wait: Wait,
}

/// What was found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Whether nothing was changed.
    pub dry_run: bool,
    /// Whether a repository could be asked for its points; if not, bitmaps stay.
    pub repository_asked: bool,
    /// The VMs that were looked at.
    pub vms: Vec<VmReport>,
}

/// What was found on a VM.
#[derive(Clone, Debug, Serialize)]
pub struct VmReport {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// What an earlier run had left.
    pub items: Vec<Item>,
    /// Why it could not be recovered.
    pub problem: Option<String>,
}

/// A recovery that has done what needs no repository.
pub struct Begun {
    mode: Mode,
    patience: Patience,
    found: Vec<Looked>,
    restores: Vec<VmReport>,
}

/// Recovers what needs no repository: guests, jobs, files. Not cancel-safe.
///
/// Fails for a VM that was named and cannot be recovered; of all VMs the report says which.
pub async fn begin(request: &Request, surroundings: Surroundings<'_>) -> Result<Begun> {
    let patience = Patience::new(request.wait);
    let job = Recover { mode: request.mode, patience: &patience, surroundings };
    if request.mode == Mode::Undo {
        sweep_sockets();
    }
    let (found, only) = match &request.source {
        Some(source) => {
            let platform = job.platform(source).await?;
            let report = job.first(platform.as_ref(), patience.left()).await?;
            let only = Some(report.uuid);
            (vec![Looked { report, source: Some(source.clone()) }], only)
        }
        None => (job.all().await?, None),
    };
    let restores = job.restores(only).await?;
    Ok(Begun { mode: request.mode, patience, found, restores })
}

impl Begun {
    /// Recovers the rest: bitmaps and checkpoints, which stay without a repository. Not cancel-safe.
    pub async fn finish(
        mut self,
        repository: Option<&Repository>,
        surroundings: Surroundings<'_>,
    ) -> Result<Report> {
        let job = Recover { mode: self.mode, patience: &self.patience, surroundings };
        for looked in &mut self.found {
            job.again(looked, repository).await?;
        }
        let vms = self.found.into_iter().map(|looked| looked.report).chain(self.restores).collect();
        Ok(Report { dry_run: self.mode == Mode::Look, repository_asked: repository.is_some(), vms })
    }
}

/// Recovers a VM that is reached already.
#[cfg(test)]
pub(super) async fn run_on(
    repository: &Repository,
    platform: &dyn Platform,
    surroundings: Surroundings<'_>,
) -> Result<VmReport> {
    let patience = Patience::new(Wait::No);
    let job = Recover { mode: Mode::Undo, patience: &patience, surroundings };
    let mut report = job.first(platform, Wait::No).await?;
    report.items.extend(job.one(platform, Some(repository)).await?.items);
    Ok(report)
}

/// A VM, and the way to it where it is there.
struct Looked {
    report: VmReport,
    source: Option<SourceSpec>,
}

struct Recover<'a> {
    mode: Mode,
    /// For all VMs together.
    patience: &'a Patience,
    surroundings: Surroundings<'a>,
}

impl Recover<'_> {
    /// What needs no repository, of every VM with a journal.
    async fn all(&self) -> Result<Vec<Looked>> {
        let (env, control) = self.surroundings;
        let mut found = Vec::new();
        for uuid in env.journals().vms()? {
            control.check()?;
            match env.journals().open(uuid) {
                Ok(journal) => self.by_journal(uuid, &journal, &mut found).await,
                Err(error) => {
                    let report = failed(uuid, &uuid.to_string(), &error);
                    found.push(Looked { report, source: None });
                }
            }
        }
        Ok(found)
    }

    async fn by_journal(&self, uuid: Uuid, journal: &Journal, found: &mut Vec<Looked>) {
        let (env, _) = self.surroundings;
        let Some(run) = journal.earlier().last().cloned() else {
            let problem = journal.is_unreadable().then(|| {
                let path = journal.path().display();
                format!(
                    "journal {path} cannot be read; name the VM (--domain, --qmp), or remove it if the VM \
                     was backed up by its images"
                )
            });
            let report = VmReport { name: uuid.to_string(), uuid, items: Vec::new(), problem };
            found.push(Looked { report, source: None });
            return;
        };
        let way = place(&run.place, &run.name, uuid);
        let mut source = None;
        let recovered = match source::platform(&way, env).await {
            Err(error) if is_gone(&run.place, &error) => self.gone(uuid, &run.name),
            Err(error) => Err(error),
            Ok(_) if are_gone(&run.place) => self.gone(uuid, &run.name),
            Ok(platform) => {
                source = Some(way.clone());
                self.first(platform.as_ref(), Wait::No).await
            }
        };
        if recovered.as_ref().is_err_and(|error| error.kind() == Kind::Busy) {
            // The next VM's guest may stand still: this one is waited for afterwards.
            let report = VmReport { name: run.name, uuid, items: Vec::new(), problem: None };
            found.push(Looked { report, source: Some(way) });
            return;
        }
        let report = match recovered {
            // Another VM has its monitor now.
            Ok(other) if other.uuid != uuid => {
                found.push(Looked { report: other, source: source.take() });
                self.gone(uuid, &run.name)
            }
            other => other,
        };
        let report = report.unwrap_or_else(|error| {
            source = None;
            failed(uuid, &run.name, &error)
        });
        found.push(Looked { report, source });
    }

    /// The way to a VM; a monitor that another run has is waited for.
    async fn platform(&self, source: &SourceSpec) -> Result<Box<dyn Platform>> {
        let (env, control) = self.surroundings;
        self.patience.until_free(control, || source::platform(source, env)).await
    }

    /// What needs no repository. Nothing where things are only looked at: the second time tells all.
    async fn first(&self, platform: &dyn Platform, wait: Wait) -> Result<VmReport> {
        if self.mode == Mode::Undo {
            let none = (Bases::default(), NO_REPOSITORY.to_owned());
            return self.ask(platform, none, (Asked::Later, wait)).await;
        }
        let VmIdentity { name, uuid, .. } = platform.identify().await?;
        Ok(VmReport { name, uuid, items: Vec::new(), problem: None })
    }

    /// The same VM again, now with the repository, if there is one.
    async fn again(&self, looked: &mut Looked, repository: Option<&Repository>) -> Result<()> {
        let (_, control) = self.surroundings;
        control.check()?;
        let Some(source) = looked.source.take() else { return Ok(()) };
        let second = match self.platform(&source).await {
            Ok(platform) => self.one(platform.as_ref(), repository).await,
            Err(error) => Err(error),
        };
        let report = &mut looked.report;
        let second = second.unwrap_or_else(|error| failed(report.uuid, &report.name, &error));
        for item in second.items {
            // What was kept the first time was looked at again.
            if !report.items.contains(&item) {
                report.items.push(item);
            }
        }
        report.problem = second.problem;
        Ok(())
    }

    /// All of a VM. A repository that cannot be read is none.
    async fn one(
        &self,
        platform: &dyn Platform,
        repository: Option<&Repository>,
    ) -> Result<VmReport> {
        let none = || (Bases::default(), NO_REPOSITORY.to_owned());
        let wait = self.patience.left();
        let Some(repository) = repository else {
            return self.ask(platform, none(), (Asked::No, wait)).await;
        };
        let uuid = platform.identify().await?.uuid;
        match Bases::read(repository, uuid).await {
            Ok(bases) => self.ask(platform, (bases, repository.id()), (Asked::Yes, wait)).await,
            Err(error) => {
                let mut report = self.ask(platform, none(), (Asked::No, wait)).await?;
                report.problem = Some(with_causes(&error));
                Ok(report)
            }
        }
    }

    async fn ask(
        &self,
        platform: &dyn Platform,
        (bases, id): (Bases, String),
        (repository, wait): (Asked, Wait),
    ) -> Result<VmReport> {
        let (env, control) = self.surroundings;
        let vm = platform.identify().await?;
        let lock = VmLock::acquire_after(wait, &env.state_dir, &vm, "recovery", control);
        let _lock = lock.await?;
        let snapshot = snapshot_request(&bases, id, env);
        let request = RecoverRequest { snapshot, repository, mode: self.mode };
        let items = platform.recover(&request, control).await?;
        Ok(VmReport { name: vm.name, uuid: vm.uuid, items, problem: None })
    }

    /// Restores that were killed: of points of one VM, or of all.
    async fn restores(&self, only: Option<Uuid>) -> Result<Vec<VmReport>> {
        let (env, control) = self.surroundings;
        let mut reports = Vec::new();
        let found = match env.journals().abandoned_restores() {
            Ok(found) => found,
            Err(error) => {
                reports.push(failed(Uuid::nil(), "a restore", &error));
                return Ok(reports);
            }
        };
        for abandoned in found {
            control.check()?;
            let journal = match abandoned {
                Abandoned::Restore(journal) => journal,
                Abandoned::Unreadable(path) => {
                    let problem = format!(
                        "journal {} cannot be read: look for '.part' files of a killed restore, then \
                         remove it",
                        path.display()
                    );
                    let (name, problem) = ("a restore".to_owned(), Some(problem));
                    reports.push(VmReport { name, uuid: Uuid::nil(), items: Vec::new(), problem });
                    continue;
                }
            };
            let VmIdentity { uuid, name, .. } = journal.run().vm.clone();
            if only.is_some_and(|only| only != uuid) {
                continue;
            }
            let mut recovery = Recovery::new(self.mode);
            let result = restore::one(journal, restore::Lock::Take, env, &mut recovery).await;
            let problem = result.err().map(|error| with_causes(&error));
            reports.push(VmReport { name, uuid, items: recovery.into_items(), problem });
        }
        Ok(reports)
    }

    /// What is left of a VM that is gone: files of this machine.
    fn gone(&self, uuid: Uuid, name: &str) -> Result<VmReport> {
        let (env, _) = self.surroundings;
        let (host, platform) = (String::new(), String::new());
        let vm = VmIdentity { uuid, name: name.to_owned(), host, platform };
        let _lock = VmLock::acquire(&env.state_dir, &vm, "recovery")?;
        let mut journal = env.journals().open(uuid)?;
        let mut recovery = Recovery::new(self.mode);
        recovery.undo(format!("journal of VM '{name}', which is gone"));
        let files = [Phase::Scratch, Phase::Socket];
        let stay = journal.remove_files(&files, &mut recovery);
        if recovery.changes() {
            let runs: Vec<PointId> = journal.earlier().map(|run| run.point).collect();
            for point in runs {
                let stays = |phase: &Phase| files.contains(phase) && stay.contains(&point);
                let over: Vec<Phase> = Phase::ALL.into_iter().filter(|p| !stays(p)).collect();
                journal.undone(point, &over)?;
            }
        }
        let items = recovery.into_items();
        Ok(VmReport { name: name.to_owned(), uuid, items, problem: None })
    }
}

/// What is known of a VM that could not be recovered. One that is at work now is none: its run sees
/// to it.
fn failed(uuid: Uuid, name: &str, error: &Error) -> VmReport {
    let (mut items, mut problem) = (Vec::new(), None);
    if error.kind() == Kind::Busy {
        items.push(Item { action: Action::Kept, what: format!("journal of VM '{name}': {error}") });
    } else {
        problem = Some(with_causes(error));
    }
    VmReport { name: name.to_owned(), uuid, items, problem }
}

/// Whether an error of looking for the VM means that it is not there any more. A QEMU by itself is
/// gone when nobody listens on its monitor; a libvirt that does not answer says nothing, nor does a
/// path that means another file in each directory.
fn is_gone(place: &Place, error: &Error) -> bool {
    match place {
        Place::Qemu { monitor, .. } if monitor.is_absolute() => {
            let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
            while let Some(error) = cause {
                if let Some(qmp::Error::Connect { source, .. }) = error.downcast_ref() {
                    let kind = source.kind();
                    return matches!(kind, ErrorKind::NotFound | ErrorKind::ConnectionRefused);
                }
                cause = error.source();
            }
            false
        }
        Place::Libvirt { .. } => error.kind() == Kind::NotFound,
        Place::Qemu { .. } | Place::Images { .. } => false,
    }
}

/// Whether the VM was images and none of them is there any more.
fn are_gone(place: &Place) -> bool {
    let is_gone = |path: &Path| {
        path.symlink_metadata().is_err_and(|error| error.kind() == ErrorKind::NotFound)
    };
    matches!(place, Place::Images { images } if images.iter().all(|(path, _)| is_gone(path)))
}

/// How the VM of a journal is reached.
fn place(place: &Place, name: &str, uuid: Uuid) -> SourceSpec {
    match place {
        Place::Libvirt { uri } => {
            SourceSpec::Libvirt { uri: uri.clone(), domain: uuid.to_string() }
        }
        Place::Qemu { monitor, agent, name } => {
            let (qmp, agent, name) = (monitor.clone(), agent.clone(), name.clone());
            SourceSpec::Qemu { qmp, agent, name }
        }
        Place::Images { images } => {
            let image = |(path, format): &(PathBuf, String)| ImageSpec {
                path: path.clone(),
                format: format.clone(),
            };
            let images = images.iter().map(image).collect();
            SourceSpec::Images { name: name.to_owned(), images }
        }
    }
}

/// What a platform wants to know besides; nothing is read with it.
fn snapshot_request(bases: &Bases, repository: String, env: &Env) -> SnapshotRequest {
    SnapshotRequest {
        mode: BackupMode::Auto,
        point: PointId([0; 16]),
        repository,
        known_points: bases.known_points(),
        point_ids: bases.point_ids(),
        repository_has_key: true,
        quiesce: Quiesce::Never,
        freeze_budget: Duration::ZERO,
        scratch_dir: None,
        exclude_disks: Vec::new(),
        insecure_tcp: false,
        guest_first: false,
        guardian: env.guardian.clone(),
        clock: Arc::clone(&env.clock),
    }
}

impl Report {
    /// An error that says that not all was recovered, if that is so.
    pub fn problem(&self) -> Option<Error> {
        let failed = self.vms.iter().filter(|vm| vm.problem.is_some());
        let failed: Vec<&str> = failed.map(|vm| vm.name.as_str()).collect();
        let first = self.vms.iter().find_map(|vm| vm.problem.as_deref())?;
        let message = format!("not recovered: {} ({first})", failed.join(", "));
        Some(Error::new(Kind::Connection, message).hint("run it again when the VM can be reached"))
    }
}
