//! Opening a snapshot; of a running domain (a stopped one is [`super::stopped`]'s): everything up to
//! the moment the job runs.
//!
//! Order: lock, clear away what a killed run left, look, find the bases, freeze, begin, watch, thaw.
//! What fails is undone here, before the error is returned; what succeeds is handed to
//! [`super::snapshot`], which commits or aborts it. The job is watched all that time.

mod instant;

use std::path::PathBuf;

use super::checkpoint::{Bases, Checkpoints, Delete, read_mode};
use super::connection::DomainHandle;
use super::job::{self, JobDisk, Server};
use super::lock::DomainLock;
use super::names::{scratch_path, socket_path};
use super::quiesce::Frost;
use super::reconcile::{self, drop_stale, image_bitmaps};
use super::scratch::Places;
use super::snapshot::RunningSnapshot;
use super::survey::{Description, Survey};
use super::teardown::{STALL, Scratch, remove_left};
use super::watch::Watch;
use super::{LibvirtOptions, artifacts, reach, stopped};
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::image::bitmap::BitmapNames;
use crate::journal::{Action, Entry, Mode, Phase, Place, Recovery, Run};
use crate::platform::space::{check_writes, no_room, space_of};
use crate::platform::{BackupMode, SnapshotDisk, SnapshotRequest, VmSnapshot, tell};
use crate::vm::{Artifact, ArtifactKind, FullReason, PointId, Quiescence};
use instant::Instant;

/// What to do where an incremental has nothing to build on.
pub(super) const TAKE_FULL: &str =
    "take a full backup first: 'vmbackup full', or use 'vmbackup backup'";

/// Refuses a promise that libvirt cannot keep: its jobs have no way to break before the guest's write
/// fails (libvirt 11.3 sets no `on-cbw-error`), and the watch may be slower than the guest.
pub(super) fn check_guest_first(request: &SnapshotRequest) -> Result<()> {
    if !request.guest_first {
        return Ok(());
    }
    let what = "libvirt cannot let a backup break before a write of the guest (--guest-first)";
    Err(Error::new(Kind::Unsupported, what).hint(
        "leave the option out: scratch is watched, and the backup given up while there is room; a \
         guest that is faster stands still until then and runs on",
    ))
}

/// Opens a snapshot of the domain.
pub(super) async fn open(
    domain: &DomainHandle,
    options: &LibvirtOptions,
    request: &SnapshotRequest,
    control: &Control,
) -> Result<Box<dyn VmSnapshot>> {
    control.set_phase("looking at the domain");
    let mut lock = DomainLock::take(options, domain.uuid, &domain.name)?;
    let mut recovery = Recovery::new(Mode::Undo);
    let domain = &mut domain.clone();
    let frost = reconcile::processes(domain, &mut lock, request, (&mut recovery, control)).await;
    tell(recovery.into_items(), control);
    let frost = frost?;
    let survey = Survey::take(domain, request).await?;
    survey.set.check(&domain.name, request.repository_has_key)?;
    if !survey.running {
        let snapshot = stopped::open(domain, survey, lock, request, control).await?;
        return Ok(Box::new(snapshot));
    }
    check_guest_first(request)?;
    let places = Places::choose(&domain.host, &survey, &domain.name, request, &options.runtime_dir);
    let chain = BitmapNames::new(&request.repository, domain.uuid)?;
    let scratch = Scratch::new(&domain.host, places.scratch.clone());
    let mut opening = Opening {
        domain: domain.clone(),
        request: request.clone(),
        metadata: options.metadata,
        chain,
        survey,
        places,
        scratch,
        lock,
        bases: Bases::default(),
        stale: Vec::new(),
        begun: Begun::No,
        watch: None,
        frost,
    };
    match opening.run(control).await {
        Ok(opened) => Ok(Box::new(opening.into_snapshot(opened))),
        Err(error) => {
            // It may be why.
            let lost = opening.watch.as_ref().and_then(Watch::lost);
            let error = lost.unwrap_or(error);
            match opening.undo(control).await {
                Undone::All => Err(job::instead(&opening.domain, error).await),
                // The domain is busy with that one.
                Undone::AllButTheJob => Err(error),
            }
        }
    }
}

/// A snapshot being opened: what there is to undo.
struct Opening {
    domain: DomainHandle,
    request: SnapshotRequest,
    metadata: super::CheckpointMetadata,
    chain: BitmapNames,
    survey: Survey,
    places: Places,
    scratch: Scratch,
    lock: DomainLock,
    bases: Bases,
    /// Known points with a bitmap in some image that is no base: dropped at commit.
    stale: Vec<(PointId, Vec<String>)>,
    begun: Begun,
    /// From the moment the job runs.
    watch: Option<Watch>,
    /// Whether the guest may be frozen, by this run or an earlier one.
    frost: Frost,
}

/// Whether a job was asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Begun {
    /// It was not.
    No,
    /// It and its checkpoint may exist.
    Asked,
    /// It was not answered: it may exist now or at any time, and is undone when it does.
    Unanswered,
    /// The way to libvirt ended meanwhile: as before, but nobody here undoes it then.
    CutOff,
}

/// What a job brings with it.
const OF_THE_JOB: [Phase; 4] = [Phase::Job, Phase::Scratch, Phase::Socket, Phase::Checkpoint];

/// What of a failed opening is undone.
enum Undone {
    /// All that could be told.
    All,
    /// Its job runs on.
    AllButTheJob,
}

/// What opening yields.
struct Opened {
    taken: Timestamp,
    quiescence: Quiescence,
    artifacts: Vec<Artifact>,
    not_captured: Vec<crate::vm::NotCaptured>,
    job_disks: Vec<JobDisk>,
    server: Server,
}

impl Opening {
    fn checkpoints(&self) -> Checkpoints<'_> {
        Checkpoints { domain: &self.domain, chain: &self.chain, all: &self.survey.set.all }
    }

    async fn run(&mut self, control: &Control) -> Result<Opened> {
        let mut recovery = Recovery::new(Mode::Undo);
        let reconciled = self.reconcile(&mut recovery).await;
        tell(recovery.into_items(), control);
        reconciled?;
        control.check()?;
        control.set_phase("finding what changed since when");
        let mut bases = std::mem::take(&mut self.bases);
        self.lock.journal.before(Phase::Checkpoint);
        let found =
            self.checkpoints().find_bases(&self.survey.disks, &self.request, &mut bases).await;
        self.bases = bases;
        found?;
        self.lock.journal.after(Phase::Checkpoint);
        self.refine_reasons();
        self.check_base()?;
        control.check()?;
        control.set_phase("looking at the scratch directory");
        control.run(self.check_scratch()).await?;
        let server = reach::server(
            self.domain.host.uri(),
            &self.places.socket,
            self.request.point,
            self.request.insecure_tcp,
        )?;
        let events = self.domain.subscribe("watch the jobs of").await?;
        control.set_phase("taking the snapshot");
        let Instant { taken, quiescence, job_disks } =
            self.take_instant((&server, events), control).await?;
        let mut described = self.describe().await;
        // The daemon may have been restarted since. The watch of the job connects anew for itself.
        if described.is_err() && !self.domain.host.is_alive() {
            self.domain = self.domain.revived().await?;
            described = self.describe().await;
        }
        let (artifacts, not_captured) = described?;
        Ok(Opened { taken, quiescence, artifacts, not_captured, job_disks, server })
    }

    /// What the point holds beside the disks, which must still be those that were looked at. Changes
    /// nothing.
    async fn describe(&self) -> Result<(Vec<Artifact>, Vec<crate::vm::NotCaptured>)> {
        let Description { raw, set, .. } = Description::read(&self.domain, &self.request).await?;
        // What was found out about the bases was found out about these images.
        set.check_continues(&self.survey.set, &self.domain.name)?;
        let has_key = self.request.repository_has_key;
        let (mut artifacts, not_captured) =
            artifacts::capture(&self.domain, &raw.live, raw.inactive, has_key).await?;
        if self.tracked().next().is_some() {
            let xml = self.checkpoints().xml(self.request.point).await?;
            let kind = ArtifactKind::CheckpointXml;
            artifacts.push(Artifact { kind, origin: None, bytes: xml.into_bytes() });
        }
        Ok((artifacts, not_captured))
    }

    /// Fails unless scratch takes writes and has room, as far as that can be told from here. Before
    /// anything of the guest waits. Cancel-safe.
    async fn check_scratch(&self) -> Result<()> {
        let Some(directory) = self.scratch.local() else { return Ok(()) };
        check_writes(directory).await?;
        if space_of(directory).await?.is_low() { Err(no_room(directory)) } else { Ok(()) }
    }

    /// Names of the disks that get a bitmap.
    fn tracked(&self) -> impl Iterator<Item = &str> {
        let disks = self.survey.disks.iter().filter(|disk| disk.disk.untracked.is_none());
        disks.map(|disk| disk.disk.name.as_str())
    }

    /// Removes checkpoints that killed runs left, and begins this one's part of the journal.
    async fn reconcile(&mut self, recovery: &mut Recovery) -> Result<()> {
        self.reconcile_checkpoints(recovery).await?;
        let repository = &self.request.repository;
        // Older than a point that exists, and in the memory of QEMU perhaps, where nobody sees them.
        let dropped: Vec<String> = self.tracked().map(str::to_owned).collect();
        for point in self.lock.journal.handed_over(repository) {
            self.stale.push((point, dropped.clone()));
        }
        // Other repositories' bitmaps are told of by `recover` only.
        let mut quiet = Recovery::new(Mode::Undo);
        reconcile::close(&mut self.lock.journal, Some(repository), &mut quiet)?;
        let place = Place::Libvirt { uri: self.domain.host.uri().to_owned() };
        let run = Run::new(self.request.point, &self.domain.name, repository, place);
        self.lock.journal.begin(run);
        self.lock.journal.note([Entry::of(Phase::Checkpoint)])
    }

    /// Checkpoints of this chain whose point is not in the repository are from runs that never
    /// committed, or of points that are forgotten: their bitmaps only cost. Those that are known
    /// are left for the commit to drop.
    async fn reconcile_checkpoints(&mut self, recovery: &mut Recovery) -> Result<()> {
        let listed = self.checkpoints().listed().await?;
        for point in listed {
            if self.request.exists(point) {
                let name = &self.domain.name;
                let text = format!("checkpoint of point {} of domain '{name}'", point.short());
                recovery.note(Action::Adopted, text);
                self.bases.defined.push(point);
            } else {
                recovery.undo(format!("checkpoint {point}, which no restore point names"));
                reconcile::discard(&self.checkpoints(), point, recovery).await?;
            }
        }
        for (point, disks) in image_bitmaps(&self.survey, &self.chain) {
            if self.request.exists(point) {
                self.stale.push((point, disks));
            } else if let Err(error) = drop_stale(&self.checkpoints(), point, &disks).await {
                tracing::debug!(%error, %point, "a stale bitmap remains");
            }
        }
        Ok(())
    }

    /// "No usable bitmap" more exactly, where the image tells.
    fn refine_reasons(&mut self) {
        for (disk, image) in self.survey.disks.iter().zip(&self.survey.images) {
            let Some(Err(reason @ FullReason::BitmapMissing)) =
                self.bases.disks.get_mut(&disk.disk.name)
            else {
                continue;
            };
            let newest = self.request.known_points.iter().find_map(|point| {
                let name = self.chain.of_point(point.id);
                image.as_ref()?.bitmaps.iter().flatten().find(|bitmap| bitmap.name == name)
            });
            if let Some(bitmap) = newest {
                *reason = if bitmap.recording {
                    FullReason::BitmapInconsistent
                } else {
                    FullReason::BitmapNotRecording
                };
            }
        }
    }

    /// An incremental needs at least one disk with a base.
    fn check_base(&self) -> Result<()> {
        if self.request.mode != BackupMode::Incremental
            || self.bases.disks.values().any(Result::is_ok)
        {
            return Ok(());
        }
        let reasons: Vec<String> = self
            .survey
            .disks
            .iter()
            .filter_map(|disk| {
                let reason = self.bases.disks.get(&disk.disk.name)?.err()?;
                Some(format!("{}: {}", disk.disk.name, reason.describe()))
            })
            .collect();
        Err(Error::new(
            Kind::NoBase,
            format!(
                "no disk of domain '{}' has anything to build on ({})",
                self.domain.name,
                reasons.join("; ")
            ),
        )
        .hint(TAKE_FULL))
    }

    /// Removes what a job that is gone left on this host: QEMU never unlinks its socket, and libvirt
    /// removes it with the domain's directory only.
    async fn remove_files(&self, point: PointId) {
        if !self.domain.host.is_local() {
            return;
        }
        if let Ok(socket) = socket_path(&self.places.socket, point) {
            remove_left(vec![socket]).await;
        }
        remove_left(self.scratch_files(point)).await;
    }

    fn scratch_files(&self, point: PointId) -> Vec<PathBuf> {
        let disks = self.survey.disks.iter().map(|disk| &disk.disk.name);
        disks.map(|disk| scratch_path(&self.places.scratch, point, disk)).collect()
    }

    /// Undoes what was done, as far as it can be; what cannot be is logged, stays in the journal and
    /// is found by the next run. Of a job that runs on the person is told: it costs the guest.
    async fn undo(&mut self, control: &Control) -> Undone {
        let mut undone = Undone::All;
        let mut stays = Vec::new();
        // The connection may be what failed, and the job live on.
        match self.domain.revived().await {
            Ok(domain) => self.domain = domain,
            Err(error) => tracing::warn!(?error, "what a failed backup left cannot be looked for"),
        }
        if matches!(self.begun, Begun::Asked | Begun::CutOff) {
            match self.undo_job().await {
                Err(error) => {
                    let error = self
                        .scratch
                        .stays((&self.domain, self.request.point), error)
                        .await
                        .in_one_line();
                    let text = format!("what the failed snapshot left is not all removed: {error}");
                    control.notice(NoticeLevel::Warning, text);
                    undone = Undone::AllButTheJob;
                    stays.extend(OF_THE_JOB);
                }
                // libvirt creates the checkpoint before the export: it can exist without the job.
                Ok(was_there) => {
                    // The journal has it for the next run.
                    if self.begun == Begun::CutOff && !was_there {
                        stays.extend(OF_THE_JOB);
                    }
                    if let Err(error) = self.checkpoints().discard(self.request.point).await {
                        tracing::warn!(?error, "the checkpoint of a failed backup remains");
                        stays.push(Phase::Checkpoint);
                    }
                }
            }
        }
        if self.begun == Begun::Unanswered {
            stays.extend(OF_THE_JOB);
        }
        for base in &self.bases.defined {
            if let Err(error) = self.checkpoints().delete(*base, Delete::Metadata).await {
                tracing::warn!(?error, "checkpoint metadata remains");
                stays.push(Phase::Checkpoint);
            }
        }
        if self.frost.is_there().await {
            stays.push(Phase::Freeze);
        }
        let point = self.request.point;
        let journal = &mut self.lock.journal;
        let over: Vec<_> = Phase::ALL.into_iter().filter(|phase| !stays.contains(phase)).collect();
        let recorded = if !journal.owns(point) {
            Ok(())
        } else if stays.is_empty() {
            journal.finish()
        } else {
            journal.undone(point, &over)
        };
        if let Err(error) = recorded {
            tracing::warn!(?error, "the journal of a failed backup remains");
        }
        undone
    }

    /// Ends the job if it is there, and removes what it leaves; whether it was.
    async fn undo_job(&mut self) -> Result<bool> {
        let point = self.request.point;
        let was_there =
            job::active(&self.domain).await?.is_some_and(|job| job.point == Some(point));
        if was_there {
            let patience = self.watch.as_ref().map_or(STALL, Watch::patience);
            let files = self.scratch_files(point);
            self.domain = self.scratch.end_job((&self.domain, point), files, patience).await?;
        }
        self.remove_files(point).await;
        Ok(was_there)
    }

    fn into_snapshot(self, opened: Opened) -> RunningSnapshot {
        let mode = self.request.mode;
        let disks = self
            .survey
            .disks
            .iter()
            .map(|disk| SnapshotDisk {
                description: disk.describe(),
                read: read_mode(self.bases.read(&disk.disk.name, mode)),
            })
            .collect();
        RunningSnapshot {
            domain: self.domain,
            chain: self.chain,
            repository: self.request.repository,
            point: self.request.point,
            metadata: self.metadata,
            all: self.survey.set.all,
            disks,
            excluded: self.survey.set.excluded,
            taken: opened.taken,
            quiescence: opened.quiescence,
            artifacts: opened.artifacts,
            not_captured: opened.not_captured,
            job_disks: opened.job_disks,
            server: opened.server,
            scratch: self.scratch,
            reach: None,
            defined: self.bases.defined,
            stale: self.stale,
            watch: self.watch,
            frost: self.frost,
            lock: self.lock,
        }
    }
}
