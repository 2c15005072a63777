//! A backup: one instant of a VM becomes one point of the repository.
//!
//! ```text
//!  lock ► run ► snapshot ► artefacts, disks ► still valid? ► manifest ► commit snapshot
//!                   │            │                 │            │             └ error: warning, the
//!                   │            └─────────────────┴────────────┘               point is complete
//!                   │                              ▼ error, or stopped
//!                   └ error ► abort run      abort snapshot ► abort run
//! ```
//!
//! Which disk is read how is the platform's decision; that unchanged chunks are not stored again
//! is the repository's, also for a disk that had to be read in full.

mod audit;
mod heal;
mod sample;

use std::sync::Arc;

use serde::Serialize;

use audit::Sampled;
pub use audit::SourceCheck;
use heal::Reread;
pub use sample::Sample;

use super::lock::{Patience, VmLock, Wait};
use super::points::{self, Bases};
use super::restore::reconcile as restores;
use super::source::{self, SnapshotOptions, SourceSpec};
use super::{Env, Surroundings};
use crate::block::{BlockSink, BlockSource, ByteRange};
use crate::clock::Timestamp;
use crate::content::ContentRoot;
use crate::control::{Control, DiskProgress, NoticeLevel};
use crate::copy;
use crate::error::{Error, Kind, Result};
use crate::journal::Phase;
use crate::platform::{BackupMode, Platform, SnapshotRequest, VmSnapshot};
use crate::repo::seal::random;
use crate::repo::{
    BaseDamage, DiskWriter, ManifestDisk, ManifestDraft, Repository, Run, RunOptions, StoredDisk,
    WriteStats,
};
use crate::units::ByteSize;
use crate::vm::{
    Audit, ExcludedDisk, FullReason, NotCaptured, PointId, Quiescence, ReadMode, VmIdentity,
};

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
    let run = repository.begin_run(RunOptions::default()).await?;
    let point = PointId(random());
    let samples = (request.audit, request.verify_source);
    let backup = Backup { run, point, vm, bases, damage: None, samples, env, control };
    let result = backup.with_snapshot(repository, platform, request).await;
    result.map_err(|error| error.context("the backup was not made"))
}

/// A disk that was stored, and what became of its chunks.
type Stored = (StoredDisk, WriteStats);

/// What a copy onto a base came to.
struct Onto {
    copied: copy::Report,
    /// None where the bitmap lied.
    stored: Option<Stored>,
    audit: Option<Audit>,
    source_check: Option<SourceCheck>,
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
            self.abort_run().await;
            return Err(error);
        }
        self.control.set_phase("taking the snapshot");
        let opened = platform.open_snapshot(&request, self.control).await;
        let mut snapshot = match opened {
            Ok(snapshot) => snapshot,
            Err(error) => {
                self.abort_run().await;
                return Err(error);
            }
        };
        match self.copy(repository, snapshot.as_mut()).await {
            Ok((draft, report)) => self.commit(snapshot, draft, report).await,
            Err(error) => {
                let error = self.cause(snapshot.as_mut(), error).await;
                // The snapshot first: it is the guest that must not wait for the repository.
                self.abort_snapshot(snapshot).await;
                self.abort_run().await;
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
        snapshot.still_valid().await?;
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

    async fn copy_disk(
        &self,
        repository: &Repository,
        snapshot: &mut dyn VmSnapshot,
        index: usize,
    ) -> Result<(ManifestDisk, DiskReport)> {
        let started = self.env.clock.now();
        let mut disk = snapshot.disks()[index].clone();
        let (name, size_bytes) = (disk.description.name.clone(), disk.description.size_bytes);
        self.tell_why(&name, &disk.read);
        let source = snapshot.source(index).await?;
        self.control.set_phase(format!("copying {name}"));
        let progress = self.control.add_disk(&name, size_bytes);
        let base = self.bases.of(&disk)?;
        let (mut copied, mut stored) = (copy::Report::default(), None);
        let (mut audit, mut source_check) = (None, None);
        if let Some(base) = base {
            match self.copy_onto(repository, base, &source, &progress).await {
                Ok(done) => Onto { copied, stored, audit, source_check } = done,
                // Only the repository is ever damaged; what is read in full stores it anew.
                Err(error) if error.kind() == Kind::Corrupt => {
                    self.tell_of_damaged_base(&name, &error);
                    disk.read = ReadMode::Full { reason: FullReason::BaseDamaged };
                }
                Err(error) => return Err(error),
            }
            if let Some(offset) = audit.and_then(|audit| audit.differs_at) {
                self.tell_of_lie(&name, offset);
                disk.read = ReadMode::Full { reason: FullReason::BitmapDistrusted };
            }
        }
        let stored = if let Some(stored) = stored {
            stored
        } else {
            let progress = match base {
                Some(_) => self.control.add_disk(&format!("{name}, all of it"), size_bytes),
                None => progress,
            };
            let whole = self.copy_all(&name, source, &progress).await?;
            copied.read_bytes += whole.0.read_bytes;
            source_check = whole.2;
            whole.1
        };
        let report = DiskReport {
            name,
            size_bytes,
            read: disk.read.clone(),
            audit,
            source_check,
            read_bytes: copied.read_bytes,
            stored_bytes: stored.1.stored_bytes,
            content_root: stored.0.root,
            elapsed_ms: self.env.elapsed_ms(started),
        };
        Ok((points::point_disk(disk, stored, &report), report))
    }

    /// Copies the disk, whatever a bitmap says.
    async fn copy_all(
        &self,
        name: &str,
        source: Arc<dyn BlockSource>,
        progress: &Arc<DiskProgress>,
    ) -> Result<(copy::Report, Stored, Option<SourceCheck>)> {
        let writer = self.run.disk_writer(source.geometry().size_bytes, None);
        let options = copy::Options { unchanged: copy::Unchanged::Read, ..self.options(name) };
        let sampled = self.sampled(&writer, &source);
        let sink = Arc::clone(&sampled) as Arc<dyn BlockSink>;
        let copied = copy::copy(source, sink, &options, self.control, progress).await?;
        let check = self.recheck(name, &sampled).await?;
        Ok((copied, writer.finish().await?, check))
    }

    fn sampled(&self, writer: &Arc<DiskWriter>, source: &Arc<dyn BlockSource>) -> Arc<Sampled> {
        let (writer, source) = (Arc::clone(writer), Arc::clone(source));
        let seed = u32::from_le_bytes(random());
        Arc::new(Sampled::new(writer, source, self.samples, seed, self.control.clone()))
    }

    /// Reads a sample of what was stored a second time. A difference fails the backup: what the
    /// rest of the point holds nobody knows then.
    async fn recheck(&self, disk: &str, sampled: &Sampled) -> Result<Option<SourceCheck>> {
        if self.samples.1 != Sample::None {
            self.control.set_phase(format!("reading a sample of {disk} again"));
        }
        let Some(recheck) = sampled.recheck().await? else { return Ok(None) };
        recheck.into_result(disk, &self.vm.name).map(Some)
    }

    /// Copies what a bitmap calls changed, and what the base has lost, onto `base`, and looks at a
    /// sample of the rest; nothing is stored where the bitmap lied.
    async fn copy_onto(
        &self,
        repository: &Repository,
        base: &StoredDisk,
        source: &Arc<dyn BlockSource>,
        progress: &Arc<DiskProgress>,
    ) -> Result<Onto> {
        let (name, control) = (&progress.name, self.control);
        let lost = match &self.damage {
            Some(damage) => damage.of(base, control).await?,
            None => self.run.base_damage().await?.of(base, control).await?,
        };
        let source: Arc<dyn BlockSource> = if lost.is_empty() {
            Arc::clone(source)
        } else {
            self.tell_of_healing(name, &lost);
            Arc::new(Reread::new(Arc::clone(source), lost))
        };
        let options = self.options(name);
        let writer = self.run.disk_writer(base.size_bytes, Some(base));
        // Opened before hours of copying: it may be damaged.
        let base = match self.samples.0 {
            Sample::None => None,
            Sample::Share(_) => Some(Arc::new(repository.open_disk(base).await?)),
        };
        let sampled = self.sampled(&writer, &source);
        let sink = Arc::clone(&sampled) as Arc<dyn BlockSink>;
        let copied = copy::copy(source, sink, &options, control, progress).await?;
        let mut audit = None;
        if let Some(base) = base {
            control.set_phase(format!("auditing the dirty bitmap of {name}"));
            audit = sampled.audit(&base).await?;
        }
        if audit.is_some_and(|audit| audit.differs_at.is_some()) {
            return Ok(Onto { copied, stored: None, audit, source_check: None });
        }
        let source_check = self.recheck(name, &sampled).await?;
        Ok(Onto { copied, stored: Some(writer.finish().await?), audit, source_check })
    }

    fn options(&self, disk: &str) -> copy::Options {
        copy::Options {
            flush: copy::Flush::Never,
            zeroes: copy::Zeroes::Sparse { detect_bytes: None },
            ..copy::Options::new(format!("{disk} of {}", self.vm.name), "the repository")
        }
    }

    fn tell_of_damaged_base(&self, disk: &str, error: &Error) {
        let text = format!(
            "the point that {disk} builds on is damaged; all of {disk} is read now: {}",
            error.in_one_line()
        );
        self.control.notice(NoticeLevel::Warning, text);
    }

    fn tell_of_lie(&self, disk: &str, offset: u64) {
        let text = format!(
            "the dirty bitmap of {disk} is wrong: it calls the block at offset {offset} unchanged, \
             and it is not as at the last point. All of {disk} is read now. Find out who wrote to \
             the image without QEMU; 'vmbackup show' of earlier points tells which were incremental"
        );
        self.control.notice(NoticeLevel::Warning, text);
    }

    fn tell_of_healing(&self, disk: &str, lost: &[ByteRange]) {
        let bytes = lost.iter().map(|range| range.len()).sum();
        let text = format!(
            "{} that {disk} shares with its base are damaged in the repository: they are read from \
             the VM again and stored anew",
            ByteSize(bytes)
        );
        self.control.notice(NoticeLevel::Warning, text);
    }

    /// A disk read in full although the VM has points here is worth a word: it costs time.
    fn tell_why(&self, disk: &str, read: &ReadMode) {
        let ReadMode::Full { reason } = read else { return };
        if !matches!(reason, FullReason::Requested | FullReason::FirstBackup) {
            let text = format!("{disk} is read in full: {}", reason.describe());
            self.control.notice(NoticeLevel::Info, text);
        }
    }

    /// The commit point, and what follows it. From here on a stop is not heeded: what is left takes
    /// a moment (minutes where a hanging QEMU is tried again), and leaving it out would cost the next
    /// incremental, and the guest if its writes still go to scratch.
    async fn commit(
        self,
        snapshot: Box<dyn VmSnapshot>,
        draft: ManifestDraft,
        mut report: Report,
    ) -> Result<Report> {
        let Self { run, point, control, env, .. } = self;
        control.set_phase("storing the point");
        let draft = ManifestDraft { finished: env.clock.now(), ..draft };
        let journals = env.journals();
        journals.before(Phase::Manifest);
        if let Err(error) = run.commit(point, draft).await {
            abort_snapshot(snapshot, control).await;
            return Err(error);
        }
        journals.after(Phase::Manifest);
        control.set_phase("keeping the checkpoint");
        if let Err(error) = snapshot.commit().await {
            report.unfinished = Some(error.in_one_line());
        }
        Ok(report)
    }

    async fn abort_snapshot(&self, snapshot: Box<dyn VmSnapshot>) {
        abort_snapshot(snapshot, self.control).await;
    }

    async fn abort_run(self) {
        if let Err(error) = self.run.abort().await {
            let text = format!("gc has to remove what this run stored: {}", error.in_one_line());
            self.control.notice(NoticeLevel::Warning, text);
        }
    }
}

async fn abort_snapshot(snapshot: Box<dyn VmSnapshot>, control: &Control) {
    control.set_phase("removing the snapshot");
    if let Err(error) = snapshot.abort().await {
        let text = format!("the snapshot was not removed entirely: {}", error.in_one_line());
        control.notice(NoticeLevel::Warning, text);
    }
}
