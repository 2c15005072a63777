//! Opening a snapshot; of a running domain (a stopped one is [`super::stopped`]'s): everything up to the moment the job runs.
//!
//! Order: lock, clear away what a killed run left, look, find the bases, freeze, begin, thaw. What
//! fails is undone here, before the error is returned; what succeeds is handed to
//! [`super::snapshot`], which commits or aborts it.

use std::time::Duration;

use virt::domain::Domain;
use virt::error::ErrorNumber;

use super::checkpoint::{Bases, Checkpoints, Delete, checkpoint_xml, read_mode};
use super::connection::DomainHandle;
use super::error::code;
use super::ffi::{self, VirtResult};
use super::job::{self, JobDisk, Server};
use super::lock::DomainLock;
use super::names::{scratch_path, socket_path};
use super::quiesce::{self, Frost, Frozen, Wish};
use super::reconcile::{self, BEGUN, drop_stale, image_bitmaps};
use super::scratch::{self, Places};
use super::snapshot::{RunningSnapshot, remove_left};
use super::survey::{Description, Survey};
use super::watch::{Watch, Watched};
use super::{LibvirtOptions, artifacts, reach, stopped};
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result, with_causes};
use crate::image::bitmap::BitmapNames;
use crate::journal::{Action, Entry, Mode, Phase, Place, Recovery, Run};
use crate::platform::space::{Space, no_room};
use crate::platform::{BackupMode, Quiesce, SnapshotDisk, SnapshotRequest, VmSnapshot, tell};
use crate::vm::{Artifact, ArtifactKind, FullReason, PointId, Quiescence};

/// Longest wait for a job to begin: 40 ms measured on an idle machine; libvirt itself waits 30 s for
/// the domain's job lock.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(60);

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
    let frost = reconcile::processes(domain, &mut lock, request, &mut recovery).await;
    tell(recovery, control);
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
    let mut opening = Opening {
        domain: domain.clone(),
        request: request.clone(),
        metadata: options.metadata,
        chain,
        survey,
        places,
        lock,
        bases: Bases::default(),
        stale: Vec::new(),
        begun: Begun::No,
        frost,
    };
    match opening.run(control).await {
        Ok(opened) => Ok(Box::new(opening.into_snapshot(opened))),
        Err(error) => {
            opening.undo().await;
            Err(job::instead(&opening.domain, error).await)
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
    lock: DomainLock,
    bases: Bases,
    /// Known points with a bitmap in some image that is no base: dropped at commit.
    stale: Vec<(PointId, Vec<String>)>,
    begun: Begun,
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
}

/// The point in time.
struct Instant {
    taken: Timestamp,
    quiescence: Quiescence,
    job_disks: Vec<JobDisk>,
}

/// What opening yields.
struct Opened {
    taken: Timestamp,
    quiescence: Quiescence,
    artifacts: Vec<Artifact>,
    not_captured: Vec<crate::vm::NotCaptured>,
    job_disks: Vec<JobDisk>,
    server: Server,
    watch: Watch,
}

impl Opening {
    fn checkpoints(&self) -> Checkpoints<'_> {
        Checkpoints { domain: &self.domain, chain: &self.chain, all: &self.survey.set.all }
    }

    async fn run(&mut self, control: &Control) -> Result<Opened> {
        let mut recovery = Recovery::new(Mode::Undo);
        let reconciled = self.reconcile(&mut recovery).await;
        tell(recovery, control);
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
        let local = self.domain.host.is_local();
        if local && Space::of(&self.places.scratch)?.is_low() {
            return Err(no_room(&self.places.scratch));
        }
        let server = reach::server(
            &self.domain.host,
            &self.places.socket,
            self.request.point,
            self.request.insecure_tcp,
        )?;
        let events = self.domain.subscribe("watch the jobs of").await?;
        control.set_phase("taking the snapshot");
        let Instant { taken, quiescence, job_disks } = self.take_instant(&server, control).await?;
        let scratch = local.then(|| (self.places.scratch.clone(), job_disks.clone()));
        let (domain, point) = (self.domain.clone(), self.request.point);
        let watch = Watch::start(Watched { domain, point, scratch }, events);
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
        Ok(Opened { taken, quiescence, artifacts, not_captured, job_disks, server, watch })
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
        .hint("take a full backup first: 'vmbackup full', or use 'vmbackup backup'"))
    }

    /// Freezes, begins the job, thaws. Thaws on every path.
    async fn take_instant(&mut self, server: &Server, control: &Control) -> Result<Instant> {
        let problem = quiesce::agent_problem(&self.survey.root, self.survey.paused);
        // Before the freeze: the guest does not wait for our disk, and the next run thaws and ends
        // the job whenever we die from here on.
        let asked = self.request.quiesce != Quiesce::Never && problem.is_none();
        self.note_instant(server, asked)?;
        let wish = Wish {
            quiesce: self.request.quiesce,
            budget: self.request.freeze_budget,
            guardian: self.request.guardian.as_deref(),
        };
        let frost = std::mem::take(&mut self.frost);
        let (frozen, frost) = quiesce::freeze(&self.domain, &wish, problem, frost).await;
        self.frost = frost;
        let frozen = frozen?;
        if matches!(frozen, Frozen::Yes(_)) {
            self.lock.journal.after(Phase::Freeze);
        }
        if let Frozen::No(Some(reason)) = &frozen {
            control.notice(NoticeLevel::Warning, format!("crash consistent only: {reason}"));
        }
        let begun = self.begin(server, control).await;
        let (quiescence, frost) = quiesce::thaw(frozen, std::mem::take(&mut self.frost)).await;
        self.frost = frost;
        let frozen = self.frost.is_there().await;
        if frozen {
            let name = &self.domain.name;
            let text = format!("the guest of domain '{name}' may be frozen; thawing it goes on");
            control.notice(NoticeLevel::Warning, text);
        }
        let thawed: &[Phase] = if frozen { &[] } else { &[Phase::Freeze] };
        let begun = begun?;
        // One job at a time: those asked for before have failed, or this one would have.
        let answered = Entry { phase: Phase::Job, objects: vec![BEGUN.into()] };
        let over = [&[Phase::Job, Phase::Scratch, Phase::Socket][..], thawed].concat();
        self.lock.journal.undone_earlier(&over)?;
        self.lock.journal.amend(thawed, [answered])?;
        let (taken, job_disks) = begun;
        Ok(Instant { taken, quiescence, job_disks })
    }

    /// Writes down all that the instant takes.
    fn note_instant(&mut self, server: &Server, freezes: bool) -> Result<()> {
        let scratch = self.job_disks().into_iter().map(|disk| disk.scratch);
        let mut entries = vec![Entry::files(Phase::Scratch, scratch), Entry::of(Phase::Job)];
        if let Server::Unix(socket) = server {
            entries.push(Entry::files(Phase::Socket, [socket]));
        }
        if freezes {
            entries.push(Entry::of(Phase::Freeze));
        }
        self.lock.journal.note(entries)?;
        // libvirt does all the others in one call: the moment before it is the job's.
        if freezes {
            self.lock.journal.before(Phase::Freeze);
        }
        Ok(())
    }

    /// Removes what a job that is gone left on this host: QEMU never unlinks its socket, and libvirt
    /// removes it with the domain's directory only.
    fn remove_files(&self, point: PointId) {
        if !self.domain.host.is_local() {
            return;
        }
        if let Ok(socket) = socket_path(&self.places.socket, point) {
            remove_left(&socket);
        }
        for disk in &self.survey.disks {
            remove_left(&scratch_path(&self.places.scratch, point, &disk.disk.name));
        }
    }

    /// Begins the job; once more with every disk in full when a bitmap breaks in the last moment.
    async fn begin(
        &mut self,
        server: &Server,
        control: &Control,
    ) -> Result<(Timestamp, Vec<JobDisk>)> {
        control.check()?;
        let disks = self.job_disks();
        let what = "begin a backup of";
        self.begun = Begun::Asked;
        self.lock.journal.before(Phase::Job);
        let taken = self.request.clock.now();
        let error = match self.try_begin(server, &disks).await? {
            Ok(()) => {
                self.lock.journal.after(Phase::Job);
                return Ok((taken, disks));
            }
            Err(error) => error,
        };
        let retry = code(&error) == Some(ErrorNumber::CheckpointInconsistent)
            && self.request.mode != BackupMode::Incremental;
        if !retry {
            return Err(self.explain(self.domain.wrap(what, error)));
        }
        for read in self.bases.disks.values_mut().filter(|read| read.is_ok()) {
            *read = Err(FullReason::BitmapInconsistent);
        }
        let disks = self.job_disks();
        let taken = self.request.clock.now();
        let again = self.try_begin(server, &disks).await?;
        again.map_err(|error| self.explain(self.domain.wrap(what, error)))?;
        Ok((taken, disks))
    }

    fn job_disks(&self) -> Vec<JobDisk> {
        let disks = self.survey.disks.iter();
        disks
            .map(|disk| {
                let name = &disk.disk.name;
                let base = self.bases.read(name, self.request.mode).ok();
                JobDisk {
                    name: name.clone(),
                    base: base.map(|point| self.chain.of_point(point)),
                    scratch: scratch_path(&self.places.scratch, self.request.point, name),
                }
            })
            .collect()
    }

    async fn try_begin(&mut self, server: &Server, disks: &[JobDisk]) -> Result<VirtResult<()>> {
        let backup = job::backup_xml(server, disks);
        let tracked: Vec<&str> = self.tracked().collect();
        let name = self.chain.of_point(self.request.point);
        let checkpoint = (!tracked.is_empty())
            .then(|| checkpoint_xml(&name, &self.survey.set.all, &tracked, None));
        tracing::debug!(backup, ?checkpoint, "backup begin");
        let begin =
            move |domain: &Domain| ffi::backup_begin(domain, &backup, checkpoint.as_deref());
        let undo = move |domain: &Domain, begun: &VirtResult<()>| {
            // Of a job that failed only the checkpoint can be there; another's job is not ours.
            let ended = begun.is_ok().then(|| ffi::abort_job(domain));
            let deleted = ffi::Checkpoint::lookup(domain, &name).and_then(|c| c.delete(0));
            tracing::warn!(?ended, ?deleted, "a backup job began too late and was ended");
        };
        let answer = self.domain.call_or_undo(BEGIN_TIMEOUT, begin, undo).await;
        answer.ok_or_else(|| {
            self.begun = Begun::Unanswered;
            Error::new(
                Kind::Timeout,
                format!(
                    "the backup of domain '{}' did not begin in {BEGIN_TIMEOUT:?}",
                    self.domain.name
                ),
            )
            .hint("see the libvirt log; QEMU may hang on slow storage. Should it begin yet, the next backup ends it")
        })
    }

    /// Adds the directories to an error they may be the cause of.
    fn explain(&self, error: Error) -> Error {
        match error.kind() {
            Kind::Permission => {
                let owner = self.domain.host.qemu_dir().as_deref().and_then(scratch::owner);
                error.hint(self.places.access_hint(owner.as_deref()))
            }
            Kind::Io if self.is_unseen(&error) => {
                let message = format!(
                    "QEMU of domain '{}' does not find scratch directory {}",
                    self.domain.name,
                    self.places.scratch.display()
                );
                Error::new(Kind::NotFound, message).source(error).hint(
                    "a file system that was mounted after the domain was started is not there for \
                     its QEMU (libvirt gives each a mount namespace of its own): name a directory \
                     that was mounted before with --scratch-dir, or restart the domain",
                )
            }
            Kind::NoSpace => error.hint(format!(
                "free space in {} or name another directory with --scratch-dir",
                self.places.scratch.display()
            )),
            _ => error,
        }
    }

    /// Whether QEMU failed to find a scratch file that libvirt had just made. The text is the system's,
    /// after the path QEMU was told (block/file-posix.c).
    fn is_unseen(&self, error: &Error) -> bool {
        let text = with_causes(error);
        text.contains("No such file or directory")
            && text.contains(&*self.places.scratch.to_string_lossy())
    }

    /// Undoes what was done, as far as it can be; what cannot be is logged, stays in the journal and
    /// is found by the next run.
    async fn undo(&mut self) {
        let mut stays = Vec::new();
        // The connection may be what failed, and the job live on.
        match self.domain.revived().await {
            Ok(domain) => self.domain = domain,
            Err(error) => tracing::warn!(?error, "what a failed backup left cannot be looked for"),
        }
        if self.begun == Begun::Asked {
            match self.undo_job().await {
                Err(error) => {
                    tracing::warn!(?error, "the job of a failed backup remains");
                    stays.extend([Phase::Job, Phase::Scratch, Phase::Socket, Phase::Checkpoint]);
                }
                // libvirt creates the checkpoint before the export: it can exist without the job.
                Ok(()) => {
                    if let Err(error) = self.checkpoints().discard(self.request.point).await {
                        tracing::warn!(?error, "the checkpoint of a failed backup remains");
                        stays.push(Phase::Checkpoint);
                    }
                }
            }
        }
        if self.begun == Begun::Unanswered {
            stays.extend([Phase::Job, Phase::Scratch, Phase::Socket, Phase::Checkpoint]);
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
    }

    /// Ends the job if it is there, and removes what it leaves.
    async fn undo_job(&self) -> Result<()> {
        let point = self.request.point;
        if job::active(&self.domain).await?.is_some_and(|job| job.point == Some(point)) {
            job::end(&self.domain).await?;
        }
        self.remove_files(point);
        Ok(())
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
            reach: None,
            defined: self.bases.defined,
            stale: self.stale,
            watch: Some(opened.watch),
            frost: self.frost,
            lock: self.lock,
        }
    }
}
