//! Recovery: what killed runs left on VMs is undone, on demand.
//!
//! ```text
//!  one VM that is named, or every VM with a journal ─► lock ─► platform.recover without a repository
//!  restores that were killed ─► lock ─► restore::reconcile
//!  the repository is opened ─► the same VMs again: bitmaps and checkpoints
//!                          ─► images; VMs another run was at work on, waited for: all of the above
//!                          ─► VMs that are gone: their files
//! ```
//!
//! A guest that stands still waits for no repository: it may be locked, damaged, or behind a mount
//! that does not answer. The same happens at the start of the next backup of a VM; this is for
//! whoever does not want to wait for it. A VM that cannot be reached keeps its journal, one that is
//! gone for good loses it.

mod gone;
mod way;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use serde::Serialize;

use super::directories::Directories;
use super::lock::{self, Patience, VmLock, Wait};
use super::points::Bases;
use super::restore::reconcile as restore;
use super::source::{self, SourceSpec};
use super::{Env, Repository, Surroundings};
use crate::control::NoticeLevel;
use crate::error::{Error, Kind, Result};
use crate::image::sweep_sockets;
use crate::journal::{Abandoned, Journal, Place, Recovery};
use crate::platform::{
    Asked, BackupMode, Platform, Quiesce, RecoverRequest, SnapshotRequest, tell,
};
use crate::vm::{PointId, Uuid, VmIdentity};
use way::{Hosts, are_gone, is_gone, way_to};

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
    let job = Recover::new(request.mode, &patience, surroundings);
    if request.mode == Mode::Undo {
        sweep_sockets();
    }
    let (found, only) = match &request.source {
        Some(source) => {
            let platform = job.platform(source, &patience).await?;
            let report = job.first(platform.as_ref(), patience.left()).await?;
            let only = Some(report.uuid);
            (vec![Looked { report, next: Next::Repository(source.clone()) }], only)
        }
        None => (job.all().await?, None),
    };
    let restores = job.restores(only).await?;
    Ok(Begun { mode: request.mode, patience, found, restores })
}

impl Begun {
    /// Recovers the rest: bitmaps and checkpoints, which stay without a repository; then images and
    /// VMs that were busy; then what is left of VMs that are gone. Not cancel-safe.
    pub async fn finish(
        self,
        repository: Option<&Repository>,
        surroundings: Surroundings<'_>,
    ) -> Result<Report> {
        let job = Recover::new(self.mode, &self.patience, surroundings);
        let mut vms = Vec::new();
        let rest = job.settle(self.found, repository, &mut vms).await?;
        let (mut gone, busy): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|looked| matches!(looked.next, Next::Gone(_)));
        for looked in busy {
            let found = job.once_free(looked).await?;
            gone.extend(job.settle(found, repository, &mut vms).await?);
        }
        for Looked { report, next } in gone {
            if let Next::Gone(last) = next {
                vms.push(job.gone(report, last).await?);
            }
        }
        vms.extend(self.restores);
        Ok(Report { dry_run: self.mode == Mode::Look, repository_asked: repository.is_some(), vms })
    }
}

/// Recovers what killed backups left on a VM whose place a restore is about to take. Told, and in no way
/// of the restore.
pub(super) async fn before_restore(
    vm: &VmIdentity,
    repository: &Repository,
    surroundings: Surroundings<'_>,
) -> Result<()> {
    let patience = Patience::new(Wait::No);
    let job = Recover::new(Mode::Undo, &patience, surroundings);
    let mut vms = Vec::new();
    let found = job.by_journal(vm.uuid, &vm.name, Turn::Last).await;
    for Looked { report, next } in job.settle(found, Some(repository), &mut vms).await? {
        if let Next::Gone(last) = next {
            vms.push(job.gone(report, last).await?);
        }
    }
    for VmReport { items, problem, .. } in vms {
        tell(items, surroundings.1);
        if let Some(problem) = problem {
            let text = format!("what killed backups left stays: {problem}");
            surroundings.1.notice(NoticeLevel::Warning, text);
        }
    }
    Ok(())
}

/// Recovers a VM that is reached already.
#[cfg(test)]
pub(super) async fn run_on(
    repository: &Repository,
    platform: &dyn Platform,
    surroundings: Surroundings<'_>,
) -> Result<VmReport> {
    let patience = Patience::new(Wait::No);
    let job = Recover::new(Mode::Undo, &patience, surroundings);
    let mut report = job.first(platform, Wait::No).await?;
    report.items.extend(job.one(platform, Some(repository)).await?.items);
    Ok(report)
}

/// A VM that was looked at.
struct Looked {
    report: VmReport,
    next: Next,
}

/// What is left to do about a VM.
enum Next {
    /// Nothing, or nothing that can be done.
    Nothing,
    /// What needs the repository, by this way.
    Repository(SourceSpec),
    /// All, where no guest waits for us: another run was at work on it, or it is images, whose file
    /// system may not answer.
    All,
    /// Only its files, after all others: it was gone when its journal had this newest run.
    Gone(PointId),
}

/// VMs that are recovered at a time: nearly all of most hosts, for each that hangs keeps back those
/// that are not among the first. Each takes up to half a dozen descriptors, of which a process has
/// 1024 (`DefaultLimitNOFILE`, systemd-system.conf(5)), and a thread or two of the runtime's 512.
const AT_ONCE: usize = 128;

/// How long a run may have the monitor of a VM before it holds the VM: it asks who it is in between,
/// and a busy QEMU takes its time to answer.
const BEGINNING: Duration = Duration::from_secs(5);
/// Time between two attempts meanwhile.
const AGAIN: Duration = Duration::from_millis(500);

/// Whether a VM that another run works on is waited for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// No: the next VM's guest may stand still.
    First,
    /// Yes.
    Last,
}

/// Why a VM was not recovered.
enum Stopped {
    /// Another run is at work on it: that one sees to it.
    AtWork(Error),
    /// Something failed. A job of anybody else that makes the VM busy is such a thing: nobody sees
    /// to what is left.
    Failed(Error),
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Stopped> for Error {
    fn from(stopped: Stopped) -> Self {
        match stopped {
            Stopped::AtWork(error) | Stopped::Failed(error) => error,
        }
    }
}

/// An error of taking what only one run can have.
fn taken(error: Error) -> Stopped {
    match error.kind() {
        Kind::Busy => Stopped::AtWork(error),
        _ => Stopped::Failed(error),
    }
}

struct Recover<'a> {
    mode: Mode,
    /// For all VMs together.
    patience: &'a Patience,
    surroundings: Surroundings<'a>,
    hosts: Hosts,
    directories: Directories,
}

/// Does all of it at the same time, on this task. The results are in order.
async fn at_once<T>(work: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut work: Vec<_> = work.map(|work| (Box::pin(work), None)).collect();
    poll_fn(|context| {
        for (work, done) in work.iter_mut().filter(|(_, done)| done.is_none()) {
            if let Poll::Ready(output) = work.as_mut().poll(context) {
                *done = Some(output);
            }
        }
        let all_done = work.iter().all(|(_, done)| done.is_some());
        if all_done { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    work.into_iter().filter_map(|(_, done)| done).collect()
}

impl<'a> Recover<'a> {
    fn new(mode: Mode, patience: &'a Patience, surroundings: Surroundings<'a>) -> Self {
        let (hosts, directories) = (Hosts::default(), Directories::default());
        Self { mode, patience, surroundings, hosts, directories }
    }

    /// What needs no repository, of every VM with a journal. Many at a time: a guest that stands
    /// still does not wait for another VM, whose scratch may hang.
    async fn all(&self) -> Result<Vec<Looked>> {
        let (env, control) = self.surroundings;
        let mut found = Vec::new();
        for some in env.journals().vms()?.chunks(AT_ONCE) {
            control.check()?;
            let names: Vec<_> = some.iter().map(|uuid| (uuid, uuid.to_string())).collect();
            let work = names.iter().map(|(uuid, name)| self.by_journal(**uuid, name, Turn::First));
            found.extend(at_once(work).await.into_iter().flatten());
        }
        Ok(found)
    }

    /// The same for a VM that was busy then. What its run has finished is not left.
    async fn once_free(&self, looked: Looked) -> Result<Vec<Looked>> {
        let (_, control) = self.surroundings;
        control.check()?;
        let VmReport { uuid, name, .. } = looked.report;
        let looked = self.by_journal(uuid, &name, Turn::Last).await;
        control.check()?;
        Ok(looked)
    }

    /// What needs no repository, of the VM of a journal; and of the one that has its monitor now.
    async fn by_journal(&self, uuid: Uuid, name: &str, turn: Turn) -> Vec<Looked> {
        let (env, _) = self.surroundings;
        let only = |report| vec![Looked { report, next: Next::Nothing }];
        let journal = match env.journals().open(uuid) {
            Ok(journal) => journal,
            Err(error) => return only(failed(uuid, name, &error.into())),
        };
        let Some(run) = journal.earlier().last() else {
            return only(no_run(uuid, name, &journal));
        };
        let later = |next| {
            let name = run.name.clone();
            Looked { report: VmReport { name, uuid, items: Vec::new(), problem: None }, next }
        };
        if turn == Turn::First && matches!(run.place, Place::Images { .. }) {
            return vec![later(Next::All)];
        }
        let way = way_to(&run.place, &run.name, uuid);
        let recovered = match self.there(&way, &run.place, (turn, uuid)).await {
            Ok(None) => return vec![later(Next::Gone(run.point))],
            Ok(Some((platform, wait))) => self.first(platform.as_ref(), wait).await,
            Err(stopped) => Err(stopped),
        };
        match recovered {
            Ok(report) => {
                let is_other = report.uuid != uuid;
                let looked = Looked { report, next: Next::Repository(way) };
                // Another VM has its monitor now.
                let gone = is_other.then(|| later(Next::Gone(run.point)));
                [looked].into_iter().chain(gone).collect()
            }
            Err(Stopped::AtWork(_)) if turn == Turn::First => vec![later(Next::All)],
            Err(stopped) => only(failed(uuid, &run.name, &stopped)),
        }
    }

    /// The VM of a journal, and how long it may be waited for yet; none if it is gone.
    async fn there(
        &self,
        way: &SourceSpec,
        place: &Place,
        (turn, uuid): (Turn, Uuid),
    ) -> Result<Option<(Box<dyn Platform>, Wait)>, Stopped> {
        let (_, control) = self.surroundings;
        let patience = Patience::new(match turn {
            Turn::First => Wait::No,
            Turn::Last => self.patience.left(),
        });
        if control.run(are_gone(place, &self.directories)).await? {
            return Ok(None);
        }
        match self.reach(way, &patience, (turn, uuid)).await {
            Ok(platform) => Ok(Some((platform, patience.left()))),
            Err(Stopped::Failed(error)) if is_gone(place, &error) => Ok(None),
            Err(stopped) => Err(stopped),
        }
    }

    /// The way to a VM; a monitor that another run has is waited for.
    async fn platform(
        &self,
        source: &SourceSpec,
        patience: &Patience,
    ) -> Result<Box<dyn Platform>, Stopped> {
        let (env, control) = self.surroundings;
        let _permit = self.hosts.permit(source).await;
        patience.until_free(control, || source::platform(source, env)).await.map_err(taken)
    }

    /// The same. Whoever keeps us from the VM at last is a run of ours, which sees to it, or nobody
    /// who does: a client of the monitor that knows nothing of us.
    async fn reach(
        &self,
        way: &SourceSpec,
        patience: &Patience,
        (turn, uuid): (Turn, Uuid),
    ) -> Result<Box<dyn Platform>, Stopped> {
        let (env, control) = self.surroundings;
        let is_free = || lock::probe(&env.state_dir, (uuid, "")).is_ok();
        let mut reached = self.platform(way, patience).await;
        let until = tokio::time::Instant::now() + BEGINNING;
        while turn == Turn::Last && matches!(reached, Err(Stopped::AtWork(_))) && is_free() {
            if tokio::time::Instant::now() >= until {
                return reached.map_err(|stopped| Stopped::Failed(stopped.into()));
            }
            // A run that begins has the monitor a moment before it has the VM; others leave it.
            let pause = async {
                tokio::time::sleep(AGAIN).await;
                Ok(())
            };
            control.run(pause).await?;
            reached = self.platform(way, &Patience::new(Wait::No)).await;
        }
        reached
    }

    /// What needs no repository. Nothing where things are only looked at: the second time tells all.
    async fn first(&self, platform: &dyn Platform, wait: Wait) -> Result<VmReport, Stopped> {
        if self.mode == Mode::Undo {
            let none = (Bases::default(), NO_REPOSITORY.to_owned());
            return self.ask(platform, none, (Asked::Later, wait)).await;
        }
        let VmIdentity { name, uuid, .. } = platform.identify().await?;
        Ok(VmReport { name, uuid, items: Vec::new(), problem: None })
    }

    /// Brings those to their end that need nothing but the repository; the others.
    async fn settle(
        &self,
        found: Vec<Looked>,
        repository: Option<&Repository>,
        vms: &mut Vec<VmReport>,
    ) -> Result<Vec<Looked>> {
        let mut others = Vec::new();
        for mut looked in found {
            if matches!(looked.next, Next::All | Next::Gone(_)) {
                others.push(looked);
            } else {
                self.again(&mut looked, repository).await?;
                vms.push(looked.report);
            }
        }
        Ok(others)
    }

    /// The same VM again, now with the repository, if there is one.
    async fn again(&self, looked: &mut Looked, repository: Option<&Repository>) -> Result<()> {
        let (_, control) = self.surroundings;
        control.check()?;
        let Next::Repository(source) = &looked.next else { return Ok(()) };
        let turn = (Turn::Last, looked.report.uuid);
        let second = match self.reach(source, self.patience, turn).await {
            Ok(platform) => self.one(platform.as_ref(), repository).await,
            Err(stopped) => Err(stopped),
        };
        let report = &mut looked.report;
        let second = second.unwrap_or_else(|stopped| failed(report.uuid, &report.name, &stopped));
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
    ) -> Result<VmReport, Stopped> {
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
                report.problem = Some(error.in_one_line());
                Ok(report)
            }
        }
    }

    async fn ask(
        &self,
        platform: &dyn Platform,
        (bases, id): (Bases, String),
        (repository, wait): (Asked, Wait),
    ) -> Result<VmReport, Stopped> {
        let (env, control) = self.surroundings;
        let vm = platform.identify().await?;
        let lock = VmLock::acquire_after(wait, &env.state_dir, &vm, "recovery", control);
        let _lock = lock.await.map_err(taken)?;
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
                reports.push(failed(Uuid::nil(), "a restore", &error.into()));
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
            let of = (env, control, &self.directories);
            let result = restore::one(journal, restore::Lock::Take, of, &mut recovery).await;
            control.check()?;
            let problem = result.err().map(|error| error.in_one_line());
            reports.push(VmReport { name, uuid, items: recovery.into_items(), problem });
        }
        Ok(reports)
    }
}

/// What is known of a VM whose journal names no run: nothing, or that nobody can tell.
fn no_run(uuid: Uuid, name: &str, journal: &Journal) -> VmReport {
    let problem = journal.is_unreadable().then(|| {
        let path = journal.path().display();
        format!(
            "journal {path} cannot be read; name the VM (--domain, --qmp), or remove it if the VM \
             was backed up by its images"
        )
    });
    VmReport { name: name.to_owned(), uuid, items: Vec::new(), problem }
}

/// What is known of a VM that could not be recovered.
fn failed(uuid: Uuid, name: &str, stopped: &Stopped) -> VmReport {
    let (mut items, mut problem) = (Vec::new(), None);
    match stopped {
        Stopped::AtWork(error) => {
            let what = format!("journal of VM '{name}': {}", error.in_one_line());
            items.push(Item { action: Action::Kept, what });
        }
        Stopped::Failed(error) => problem = Some(error.in_one_line()),
    }
    VmReport { name: name.to_owned(), uuid, items, problem }
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
        Some(
            Error::new(Kind::Connection, message)
                .hint("run it again when that is no longer in the way"),
        )
    }
}
