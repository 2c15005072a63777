//! Recovery: what killed runs left on VMs is undone, on demand.
//!
//! ```text
//!  one VM that is named, or every VM with a journal ─► lock ─► platform.recover
//!  restores that were killed ─► lock ─► restore::reconcile
//! ```
//!
//! The same happens at the start of the next backup of a VM; this is for whoever does not want to
//! wait for it. A VM that cannot be reached keeps its journal, one that is gone for good loses it.

use std::error::Error as StdError;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::lock::{VmLock, Wait};
use super::points::Bases;
use super::restore::reconcile as restore;
use super::source::{self, ImageSpec, SourceSpec};
use super::{Env, Repository, Surroundings};
use crate::error::{Error, Kind, Result, with_causes};
use crate::image::sweep_sockets;
use crate::journal::{Abandoned, Phase, Place, Recovery};
use crate::platform::{Asked, BackupMode, Platform, Quiesce, RecoverRequest, SnapshotRequest};
use crate::vm::{PointId, Uuid, VmIdentity};

pub use crate::journal::{Action, Item, Mode};

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

/// Recovers. Without a repository bitmaps and checkpoints stay. Not cancel-safe.
///
/// Fails for a VM that was named and cannot be recovered; of all VMs the report says which.
pub async fn run(
    repository: Option<&Repository>,
    request: Request,
    surroundings: Surroundings<'_>,
) -> Result<Report> {
    let job = Recover { repository, mode: request.mode, wait: request.wait, surroundings };
    if request.mode == Mode::Undo {
        sweep_sockets();
    }
    let vms = match &request.source {
        Some(source) => {
            let platform = source::platform(source, surroundings.0).await?;
            let report = job.one(platform.as_ref()).await?;
            let restores = job.restores(Some(report.uuid)).await?;
            std::iter::once(report).chain(restores).collect()
        }
        None => [job.restores(None).await?, job.all().await?].concat(),
    };
    Ok(Report { dry_run: request.mode == Mode::Look, repository_asked: repository.is_some(), vms })
}

/// Recovers a VM that is reached already.
#[cfg(test)]
pub(super) async fn run_on(
    repository: &Repository,
    platform: &dyn Platform,
    surroundings: Surroundings<'_>,
) -> Result<VmReport> {
    let (mode, wait) = (Mode::Undo, Wait::No);
    let job = Recover { repository: Some(repository), mode, wait, surroundings };
    job.one(platform).await
}

struct Recover<'a> {
    repository: Option<&'a Repository>,
    mode: Mode,
    wait: Wait,
    surroundings: Surroundings<'a>,
}

impl Recover<'_> {
    /// Every VM with a journal.
    async fn all(&self) -> Result<Vec<VmReport>> {
        let (env, control) = self.surroundings;
        let mut reports = Vec::new();
        for uuid in env.journals().vms()? {
            control.check()?;
            let journal = env.journals().open(uuid)?;
            let Some(run) = journal.earlier().last().cloned() else {
                let problem = journal.is_unreadable().then(|| {
                    let path = journal.path().display();
                    format!("journal {path} cannot be read; name the VM (--domain, --qmp)")
                });
                let name = uuid.to_string();
                reports.push(VmReport { name, uuid, items: Vec::new(), problem });
                continue;
            };
            let found = source::platform(&place(&run.place, &run.name, uuid), env).await;
            let recovered = match found {
                Err(error) if is_gone(&run.place, &error) => self.gone(uuid, &run.name),
                Err(error) => Err(error),
                Ok(_) if are_gone(&run.place) => self.gone(uuid, &run.name),
                Ok(platform) => self.one(platform.as_ref()).await,
            };
            let report = match recovered {
                // Another VM has its monitor now.
                Ok(other) if other.uuid != uuid => {
                    reports.push(other);
                    self.gone(uuid, &run.name)
                }
                other => other,
            };
            reports.push(report.unwrap_or_else(|error| failed(uuid, &run.name, &error)));
        }
        Ok(reports)
    }

    async fn one(&self, platform: &dyn Platform) -> Result<VmReport> {
        let (env, control) = self.surroundings;
        let vm = platform.identify().await?;
        let lock = VmLock::acquire_after(self.wait, &env.state_dir, &vm, "recovery", control);
        let _lock = lock.await?;
        let (bases, repository) = match self.repository {
            Some(repository) => (Bases::read(repository, vm.uuid).await?, Asked::Yes),
            None => (Bases::default(), Asked::No),
        };
        let id = self.repository.map_or_else(|| "00000000".to_owned(), Repository::id);
        let snapshot = snapshot_request(&bases, id, env);
        let request = RecoverRequest { snapshot, repository, mode: self.mode };
        let items = platform.recover(&request, control).await?;
        Ok(VmReport { name: vm.name, uuid: vm.uuid, items, problem: None })
    }

    /// Restores that were killed: of points of one VM, or of all.
    async fn restores(&self, only: Option<Uuid>) -> Result<Vec<VmReport>> {
        let (env, control) = self.surroundings;
        let mut reports = Vec::new();
        for abandoned in env.journals().abandoned_restores()? {
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
        journal.remove_files(&[Phase::Scratch, Phase::Socket], &mut recovery);
        if recovery.changes() {
            journal.undone_earlier(&Phase::ALL)?;
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
/// gone when nobody listens on its monitor; a libvirt that does not answer says nothing.
fn is_gone(place: &Place, error: &Error) -> bool {
    match place {
        Place::Qemu { .. } => {
            let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
            while let Some(error) = cause {
                if let Some(io) = error.downcast_ref::<io::Error>() {
                    return matches!(io.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
                }
                cause = error.source();
            }
            false
        }
        Place::Libvirt { .. } => error.kind() == Kind::NotFound,
        Place::Images { .. } => false,
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
