//! A backup: one instant of a VM becomes one point of the repository.
//!
//! ```text
//!  lock ► run ► snapshot ► artefacts, disks ► still valid? ► manifest ► commit snapshot ► end run
//!                   │            │                 │            │             └ error: warning, the
//!                   │            └─────────────────┴────────────┘               point is complete
//!                   │                              ▼ error, or stopped
//!                   └ error ► end run        abort snapshot ► end run
//! ```
//!
//! The snapshot ends before the run: it is the guest that must not wait for the repository.
//!
//! A guest that comes first pays for what is not stored yet only ([`release`]).
//!
//! Which disk is read how is the platform's decision; that unchanged chunks are not stored again
//! is the repository's, also for a disk that had to be read in full.

mod audit;
mod disk;
mod heal;
mod release;
mod sample;

use std::sync::{Arc, Mutex};

use serde::Serialize;

pub use audit::SourceCheck;
use release::Releaser;
pub use sample::Sample;

use super::lock::{Patience, VmLock, Wait};
use super::points::{self, Bases};
use super::restore::reconcile as restores;
use super::source::{self, SnapshotOptions, SourceSpec};
use super::{Env, Surroundings};
use crate::clock::Timestamp;
use crate::content::ContentRoot;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::journal::Phase;
use crate::platform::{BackupMode, Platform, SnapshotRequest, VmSnapshot};
use crate::repo::seal::random;
use crate::repo::{BaseDamage, ManifestDraft, Repository, Run};
use crate::vm::{Audit, ExcludedDisk, NotCaptured, PointId, Quiescence, ReadMode, VmIdentity};

/// What to back up, and how.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which VM.
    pub source: SourceSpec,
    /// Full, incremental, or whichever is possible.
    pub mode: BackupMode,
    /// How the point in time is taken.
    pub options: SnapshotOptions,
    /// How much of what dirty bitmaps call clean is looked at.
    pub audit: Sample,
    /// How much of what was stored is read a second time, and held against it.
    pub verify_source: Sample,
    /// What to do while another run works on the VM.
    pub wait: Wait,
}

/// What a backup did.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The new point.
    pub point: PointId,
    /// The VM.
    pub vm: VmIdentity,
    /// The instant of all disks.
    pub time: Timestamp,
    /// What was achieved around the instant.
    pub quiescence: Quiescence,
    /// The disks.
    pub disks: Vec<DiskReport>,
    /// Disks that are not part of the point.
    pub excluded: Vec<ExcludedDisk>,
    /// What should have been captured and could not be.
    pub not_captured: Vec<NotCaptured>,
    /// The whole run.
    pub elapsed_ms: u64,
    /// What had to follow the point and was not done: it may concern the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unfinished: Option<String>,
}

/// What became of a disk.
#[derive(Clone, Debug, Serialize)]
pub struct DiskReport {
    /// Its name in the VM.
    pub name: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// How it was read, and why.
    pub read: ReadMode,
    /// What a look at blocks that the bitmap calls clean found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<Audit>,
    /// What a second read of what was stored looked at; all of it was the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_check: Option<SourceCheck>,
    /// Bytes read from the VM.
    pub read_bytes: u64,
    /// Bytes added to the repository: after deduplication and compression.
    pub stored_bytes: u64,
    /// What the disk holds.
    pub content_root: ContentRoot,
    /// Reading and storing it.
    pub elapsed_ms: u64,
}

/// Makes a point. Watches `control`; when stopped, it aborts and leaves nothing behind. Not
/// cancel-safe.
pub async fn run(
    repository: &Repository,
    request: Request,
    surroundings: Surroundings<'_>,
) -> Result<Report> {
    let (env, control) = surroundings;
    let started = env.clock.now();
    control.set_phase("looking at the VM");
    // The monitor of a plain QEMU serves one client, and another run has it until its end.
    let patience = Patience::new(request.wait);
    let reached = patience.until_free(control, || source::platform(&request.source, env)).await;
    let platform = reached?;
    let request = Request { wait: patience.left(), ..request };
    let mut report = run_on(repository, platform.as_ref(), &request, surroundings).await?;
    report.elapsed_ms = env.elapsed_ms(started);
    Ok(report)
}

/// The same for a VM that is reached already.
pub(super) async fn run_on(
    repository: &Repository,
    platform: &dyn Platform,
    request: &Request,
    (env, control): Surroundings<'_>,
) -> Result<Report> {
    let vm = platform.identify().await?;
    let what = format!("backup into repository {}", repository.id());
    let _lock = VmLock::acquire_after(request.wait, &env.state_dir, &vm, &what, control).await?;
    restores::before_run(&vm, restores::Lock::Held, env, control).await;
    let bases = Bases::read(repository, vm.uuid).await?;
    let run = repository.begin_run().await?;
    let point = PointId(random());
    let samples = (request.audit, request.verify_source);
    let releasers = Mutex::default();
    let backup = Backup { run, point, vm, bases, damage: None, samples, releasers, env, control };
    let result = backup.with_snapshot(repository, platform, request).await;
    result.map_err(|error| error.context("the backup was not made"))
}

/// A backup whose run is open.
struct Backup<'a> {
    run: Run,
    point: PointId,
    vm: VmIdentity,
    bases: Bases,
    /// What of the bases is damaged, if one may be built on.
    damage: Option<BaseDamage>,
    /// How much is audited, and how much verified.
    samples: (Sample, Sample),
    /// What gives up parts of the disks that are stored.
    releasers: Mutex<Vec<Arc<Releaser>>>,
    env: &'a Env,
    control: &'a Control,
}

impl Backup<'_> {
    /// Opens the snapshot, copies it, and brings both transactions to their end.
    async fn with_snapshot(
        mut self,
        repository: &Repository,
        platform: &dyn Platform,
        request: &Request,
    ) -> Result<Report> {
        let request = SnapshotRequest {
            mode: request.mode,
            point: self.point,
            repository: repository.id(),
            known_points: self.bases.known_points(),
            point_ids: self.bases.point_ids(),
            repository_has_key: repository.has_key(),
            quiesce: request.options.quiesce,
            freeze_budget: request.options.freeze_budget,
            scratch_dir: request.options.scratch_dir.clone(),
            exclude_disks: request.options.exclude_disks.clone(),
            insecure_tcp: request.options.insecure_tcp,
            guest_first: request.options.guest_first,
            guardian: self.env.guardian.clone(),
            clock: Arc::clone(&self.env.clock),
        };
        if let Err(error) = self.look_for_damage(request.mode).await {
            end_run(self.run, self.control).await;
            return Err(error);
        }
        self.control.set_phase("taking the snapshot");
        let opened = platform.open_snapshot(&request, self.control).await;
        let mut snapshot = match opened {
            Ok(snapshot) => snapshot,
            Err(error) => {
                end_run(self.run, self.control).await;
                return Err(error);
            }
        };
        let copied = self.copy(repository, snapshot.as_mut()).await;
        self.end_release().await;
        match copied {
            Ok((draft, report)) => self.commit(snapshot, draft, report).await,
            Err(error) => {
                let error = self.cause(snapshot.as_mut(), error).await;
                abort_snapshot(snapshot, self.control).await;
                end_run(self.run, self.control).await;
                Err(error)
            }
        }
    }

    /// Finds out what of the likely bases is damaged, before there is a snapshot: where anything is, a
    /// disk's whole tree has to be walked, and a guest must not pay for that.
    async fn look_for_damage(&mut self, mode: BackupMode) -> Result<()> {
        if mode == BackupMode::Full {
            return Ok(());
        }
        self.control.set_phase("looking for damage of the last point");
        let mut disks = self.bases.newest().peekable();
        if disks.peek().is_none() {
            return Ok(());
        }
        let damage = self.run.base_damage().await?;
        for disk in disks {
            match damage.of(disk, self.control).await {
                // A tree that cannot be walked is met again, and its disk read in full then.
                Err(error) if error.kind() != Kind::Corrupt => return Err(error),
                _ => {}
            }
        }
        self.damage = Some(damage);
        Ok(())
    }

    /// Why the copy failed: reads of a snapshot that was given up fail with whatever the platform's
    /// transport says, and the platform knows better.
    async fn cause(&self, snapshot: &mut dyn VmSnapshot, error: Error) -> Error {
        if self.control.is_cancelled() {
            return error;
        }
        match snapshot.still_valid().await {
            Err(lost) if lost.kind() != error.kind() => {
                tracing::info!(?error, "the copy failed because the snapshot was lost");
                lost
            }
            _ => error,
        }
    }

    /// Copies everything the snapshot holds into the run; the snapshot held until the last read
    /// when this is `Ok`.
    async fn copy(
        &mut self,
        repository: &Repository,
        snapshot: &mut dyn VmSnapshot,
    ) -> Result<(ManifestDraft, Report)> {
        let mut artifacts = Vec::new();
        for artifact in snapshot.artifacts() {
            artifacts.push(points::store_artifact(&self.run, artifact).await?);
        }
        let (mut disks, mut reports) = (Vec::new(), Vec::new());
        for index in 0..snapshot.disks().len() {
            let (disk, report) = self.copy_disk(repository, snapshot, index).await?;
            disks.push(disk);
            reports.push(report);
        }
        self.control.set_phase("checking the snapshot");
        self.control.check()?;
        // The platform waits for news of the job, the repository for its store. A snapshot that is lost does
        // not wait for a store that hangs, nor does who wants to stop.
        let durable = self.control.run(self.run.flush());
        tokio::try_join!(snapshot.still_valid(), durable)?;
        let report = Report {
            point: self.point,
            vm: self.vm.clone(),
            time: snapshot.taken(),
            quiescence: snapshot.quiescence().clone(),
            disks: reports,
            excluded: snapshot.excluded().to_vec(),
            not_captured: snapshot.not_captured().to_vec(),
            elapsed_ms: 0,
            unfinished: None,
        };
        let draft = points::draft(&report, disks, artifacts);
        Ok((draft, report))
    }

    /// The commit point, and what follows it. From here on a stop is not heeded: what is left takes
    /// a moment (minutes where scratch is written back slowly or a hanging QEMU is tried again), and
    /// leaving it out would cost the next incremental, and the guest if its writes still go to scratch.
    async fn commit(
        self,
        snapshot: Box<dyn VmSnapshot>,
        draft: ManifestDraft,
        mut report: Report,
    ) -> Result<Report> {
        let Self { mut run, point, control, env, .. } = self;
        control.set_phase("storing the point");
        let draft = ManifestDraft { finished: env.clock.now(), ..draft };
        let journals = env.journals();
        journals.before(Phase::Manifest);
        if let Err(error) = run.make_point(point, draft).await {
            abort_snapshot(snapshot, control).await;
            end_run(run, control).await;
            return Err(error);
        }
        journals.after(Phase::Manifest);
        control.set_phase("keeping the checkpoint");
        if let Err(error) = snapshot.commit().await {
            report.unfinished = Some(error.in_one_line());
        }
        control.set_phase("ending the run");
        if let Err(error) = run.end().await {
            // It lapses, and the point is there.
            tracing::warn!(%error, "cannot end the run");
        }
        Ok(report)
    }
}

/// Ends a run that made no point.
async fn end_run(run: Run, control: &Control) {
    if let Err(error) = run.end().await {
        let text = format!("gc has to remove what this run stored: {}", error.in_one_line());
        control.notice(NoticeLevel::Warning, text);
    }
}

async fn abort_snapshot(snapshot: Box<dyn VmSnapshot>, control: &Control) {
    control.set_phase("removing the snapshot");
    if let Err(error) = snapshot.abort().await {
        let text = format!("the snapshot was not removed entirely: {}", error.in_one_line());
        control.notice(NoticeLevel::Warning, text);
    }
}
