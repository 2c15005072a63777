//! The instant once it is open: reading it, proving that it held, ending it.
//!
//! ```text
//!  (`open`) ► exports ► (reading) ► still valid? ► commit | abort
//! ```
//!
//! The guest's writes cost nothing more once the snapshot has ended; where scratch or QEMU is too slow
//! for that it is tried again, and what stays is left where `recover` finds it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use qmp::block::BitmapRef;
use qmp::export::ExportAccess;
use qmp::{Event, Monitor, Received, Subscription, jobs};
use tokio::time::Instant;

use super::disks::Disk;
use super::error::failed;
use super::migration::Settled;
use super::names::Temp;
use super::teardown::{AGAIN, First, Things, Watched, remove_bitmap};
use super::watch::Watch;
use super::work_dir::WorkDir;
use super::{Qemu, Survey, checkpoint, old_access, pause, reclaim, work_dir};
use crate::block::layer::pace::PacedSource;
use crate::block::{BlockSource, Buffer};
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::freeze::Thaw;
use crate::image::bitmap::BitmapNames;
use crate::journal::{Journal, Phase};
use crate::nbd::{Client, ClientOptions, NbdUri, Timeouts};
use crate::platform::space::Space;
use crate::platform::{SnapshotDisk, SnapshotRequest, VmSnapshot};
use crate::vm::{Artifact, Consistency, ExcludedDisk, NotCaptured, PointId, Quiescence, ReadMode};

/// How long the end is tried where scratch or QEMU is too slow for it. Writeback holds up scratch
/// for some ten seconds on a busy host; what stays is watched by nobody.
const END_JOBS: Duration = Duration::from_secs(75);
/// The same with filters, which never hold up the guest for longer.
const END_FILTERS: Duration = Duration::from_secs(30);

/// What a point of a QEMU lacks.
pub(super) fn definition(vm: &str) -> NotCaptured {
    NotCaptured {
        what: format!("definition of VM '{vm}'"),
        reason:
            "a QEMU without libvirt does not tell how it was started: keep its command line or \
                 start script beside the backups"
                .into(),
    }
}

pub(super) struct Snapshot {
    pub(super) monitor: Monitor,
    /// Its socket.
    socket: PathBuf,
    /// The VM's name.
    vm: String,
    /// Of before the instant.
    migration: Settled,
    events: Subscription,
    pub(super) point: PointId,
    pub(super) names: BitmapNames,
    pub(super) work_dir: WorkDir,
    pub(super) journal: Journal,
    /// What keeps what the guest overwrites.
    pub(super) keeper: Keeper,
    /// What clients of the exports may do.
    pub(super) access: ExportAccess,
    /// Who is told that scratch is not given back, if that was asked for.
    pub(super) wants_scratch_back: Option<Control>,
    /// Whether jobs give the instant up without a word where scratch fails.
    breaks: bool,
    /// Whether the guest is thawed for certain.
    pub(super) thaw: Thaw,
    /// Whether QEMU has ended.
    gone: bool,
    pub(super) disks: Vec<OpenDisk>,
    described: Vec<SnapshotDisk>,
    excluded: Vec<ExcludedDisk>,
    pub(super) taken: Timestamp,
    pub(super) quiescence: Quiescence,
    not_captured: Vec<NotCaptured>,
    pub(super) things: Things,
    /// From before the instant until its jobs have ended.
    watch: Option<Watch>,
    /// Checkpoints the transaction made, or may have made.
    pub(super) checkpoints: Vec<BitmapRef>,
}

/// A disk of the snapshot and the base it is read against.
pub(super) struct OpenDisk {
    pub(super) disk: Disk,
    pub(super) base: Option<checkpoint::Base>,
}

/// What keeps what the guest overwrites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keeper {
    /// Backup jobs, and the filters they bring.
    Jobs,
    /// Filters of our own.
    Filters,
}

impl Keeper {
    /// Filters where the guest comes first and jobs cannot let it.
    pub(super) fn of(qemu: &Qemu, request: &SnapshotRequest) -> Self {
        let by_job = qemu.features.backup_on_cbw_error;
        if request.guest_first && !by_job { Self::Filters } else { Self::Jobs }
    }
}

impl Snapshot {
    pub(super) fn new(
        qemu: &Qemu,
        request: &SnapshotRequest,
        (survey, migration): (Survey, Settled),
        (work_dir, journal): (WorkDir, Journal),
    ) -> Self {
        let Survey { disks, names, bases } = survey;
        let described = disks.protected.iter().zip(&bases).map(|(disk, base)| SnapshotDisk {
            description: disk.description(),
            read: checkpoint::read_mode(base),
        });
        let described = described.collect();
        let open = disks.protected.into_iter().zip(bases);
        Self {
            monitor: qemu.monitor.clone(),
            socket: qemu.options.monitor.clone(),
            vm: qemu.identity.name.clone(),
            migration,
            events: qemu.monitor.subscribe(),
            point: request.point,
            names,
            work_dir,
            journal,
            keeper: Keeper::of(qemu, request),
            access: reclaim::access(qemu, request),
            wants_scratch_back: None,
            breaks: qemu.features.backup_on_cbw_error,
            thaw: Thaw::Done,
            gone: false,
            disks: open.map(|(disk, base)| OpenDisk { disk, base: base.ok() }).collect(),
            described,
            excluded: disks.excluded,
            taken: request.clock.now(),
            quiescence: Quiescence { level: Consistency::Crash, frozen_ms: None, reason: None },
            not_captured: vec![definition(&qemu.identity.name)],
            things: Things::default(),
            watch: None,
            checkpoints: Vec::new(),
        }
    }

    /// Has scratch watched from here on.
    pub(super) fn watch_scratch(&mut self) {
        let directory = self.work_dir.scratch_dir().to_owned();
        self.watch = Some(Watch::start(directory, &self.things, self.monitor.clone()));
    }

    /// Shows the watch what there is now.
    pub(super) fn show_watch(&self) {
        if let Some(watch) = &self.watch {
            watch.see(&self.things);
        }
    }

    /// An error if the watch has given the backup up.
    pub(super) fn check_watch(&self) -> Result<()> {
        self.watch.as_ref().map_or(Ok(()), Watch::check)
    }

    /// Closes this run's part of the journal, but for what may not be over.
    async fn close_journal(&mut self, undone: bool) -> Result<()> {
        let thawed = match &mut self.thaw {
            _ if self.gone => true,
            Thaw::Done => true,
            Thaw::Pending(pending) => pending.is_done().await,
        };
        match (undone, thawed) {
            // What remains is found by name.
            (false, _) => Ok(()),
            (true, true) => self.journal.finish(),
            (true, false) => self.journal.undone(self.point, &Phase::all_but(&[Phase::Freeze])),
        }
    }

    /// Ends the snapshot; the checkpoints stay.
    async fn end(&mut self) -> Result<()> {
        if let Err(error) = self.take_down().await {
            // Our connection ended and nobody listens where it was: all there was went with QEMU.
            let closed = error.kind() == Kind::Connection;
            self.gone = closed && pause::is_gone(&self.socket).await;
            if !self.gone {
                // Scratch that is still written stays where it is seen.
                return Err(self.stays(error).await);
            }
            tracing::warn!(%error, "QEMU has ended: there is nothing to take down");
        }
        self.watch = None;
        self.work_dir.remove().await
    }

    /// Takes all of it down, in several attempts where it takes too long; it is watched meanwhile.
    /// In one where no instant was asked for: nothing of it costs the guest anything.
    async fn take_down(&self) -> Result<()> {
        let patience = match self.keeper {
            _ if self.watch.is_none() => Duration::ZERO,
            Keeper::Jobs => END_JOBS,
            Keeper::Filters => END_FILTERS,
        };
        // A pause ends first.
        let mut due = self.watch.is_some() && self.things.pause.is_none();
        let mut until = Instant::now() + patience;
        loop {
            let was_due = due;
            let tried = self.try_take_down(&mut due).await;
            if was_due && !due {
                // Write-back may have taken minutes, and is over once.
                until = Instant::now() + patience;
            }
            match tried {
                Err(error) if error.kind() == Kind::Timeout && Instant::now() < until => {
                    tracing::warn!(%error, "the snapshot cannot be ended yet; tried again");
                    tokio::time::sleep(AGAIN).await;
                }
                result => return result,
            }
        }
    }

    /// Takes it down once scratch is written back, where that is `due`.
    async fn try_take_down(&self, due: &mut bool) -> Result<()> {
        if *due {
            // It asks QEMU first: nobody waits for one that is gone.
            self.things.write_back(&self.monitor, Watched::Yes).await?;
            *due = false;
        }
        self.things.take_down(&self.monitor).await
    }

    /// What it means that the snapshot was not ended.
    async fn stays(&self, error: Error) -> Error {
        if !self.things.take_writes(&self.monitor).await {
            return error;
        }
        let directory = self.work_dir.scratch_dir().display();
        let what = match self.keeper {
            Keeper::Jobs => format!(
                "the guest's writes still go to scratch directory {directory}, of which nobody \
                 watches the room any more"
            ),
            // Full, it disturbs no write of the guest.
            Keeper::Filters => format!(
                "the guest's writes still go through the filters of this backup, to scratch \
                 directory {directory} as well"
            ),
        };
        error.context(what).hint(
            "run 'vmbackup recover' as soon as the directory can be written to and QEMU answers",
        )
    }

    /// Ends the snapshot and removes its checkpoints.
    pub(super) async fn undo(&mut self) -> Result<()> {
        let mut first = First::default();
        first.note(self.end().await);
        if !self.gone {
            for bitmap in &self.checkpoints {
                first.note(remove_bitmap(&self.monitor, bitmap).await);
            }
        }
        let undone = first.is_clean();
        first.note(self.close_journal(undone).await);
        first.into()
    }

    /// The checkpoints of this chain on the snapshot's disks that are older than this one.
    async fn older(&self) -> Result<Vec<BitmapRef>> {
        if self.gone {
            // The next run asks the images.
            return Ok(Vec::new());
        }
        let nodes = self.monitor.query_named_block_nodes().await;
        let nodes = nodes.map_err(failed("cannot ask for the bitmaps"))?;
        let ours = |node: &&qmp::block::Node| {
            self.disks.iter().any(|open| open.disk.node.name() == node.name())
        };
        let mut older = Vec::new();
        for node in nodes.iter().filter(ours) {
            for name in node.dirty_bitmaps.iter().filter_map(|bitmap| bitmap.name.as_deref()) {
                if self.names.point_of_any(name).is_some_and(|point| point != self.point) {
                    older.push(BitmapRef { node: node.name().to_owned(), name: name.to_owned() });
                }
            }
        }
        Ok(older)
    }

    /// Reads the events that have come; an error if one of them ended the instant.
    fn check_events(&mut self) -> Result<()> {
        loop {
            let received = self.events.try_recv();
            match received.map_err(failed("the connection to QEMU is lost"))? {
                None => return Ok(()),
                // The jobs and exports are asked for anyway: a gap hides nothing.
                Some(Received::Lagged(lost)) => tracing::debug!(lost, "events were lost"),
                Some(Received::Event(event)) => self.check_event(&event)?,
            }
        }
    }

    fn check_event(&self, event: &Event) -> Result<()> {
        let ends = ["BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED", "BLOCK_JOB_ERROR"];
        let job = event.text("device").filter(|id| self.things.jobs.iter().any(|job| job == id));
        let export = event.text("id").filter(|id| self.things.exports.iter().any(|e| e == id));
        match (event.name.as_str(), job, export) {
            (name, Some(id), _) if ends.contains(&name) => Err(lost(&format!("job {id}: {name}"))),
            ("BLOCK_EXPORT_DELETED", _, Some(id)) => Err(lost(&format!("export {id} was removed"))),
            _ => Ok(()),
        }
    }

    async fn check_now(&mut self) -> Result<()> {
        let settled = self.migration.check(&self.monitor, &self.vm).await;
        settled.map_err(|error| match error.kind() {
            Kind::Busy => lost(&error.to_string()),
            _ => error,
        })?;
        self.check_events()?;
        let found = self.monitor.query_jobs().await.map_err(failed("cannot ask for the jobs"))?;
        for id in &self.things.jobs {
            let job = found.iter().find(|job| job.id == *id);
            let status = job.map_or("gone", |job| job.status.as_str());
            // Every change of the block graph pauses every job for a moment.
            if ![jobs::status::RUNNING, jobs::status::PAUSED].contains(&status) {
                let error = job.and_then(|job| job.error.as_deref()).unwrap_or("no error given");
                return Err(lost(&format!("job {id} is {status} ({error})")));
            }
        }
        let exports = self.monitor.query_block_exports().await;
        let exports = exports.map_err(failed("cannot ask for the exports"))?;
        for id in &self.things.exports {
            if !exports.iter().any(|export| export.id == *id && !export.shutting_down) {
                return Err(lost(&format!("export {id} is gone")));
            }
        }
        let devices = self.monitor.query_block().await;
        let devices = devices.map_err(failed("cannot ask for the disks"))?;
        if let Some(filter) = self.things.filters.iter().find(|f| !f.is_attached(&devices)) {
            return Err(lost(&format!("{} has left its filter", filter.device)));
        }
        if self.keeper == Keeper::Jobs && !self.breaks {
            return Ok(());
        }
        for index in 0..self.disks.len() {
            self.check_read(index).await?;
        }
        Ok(())
    }

    /// Reads a little of a disk's instant, where it is never given up ([`reclaim`]): QEMU does not
    /// tell of one that broke.
    async fn check_read(&self, index: usize) -> Result<()> {
        let name = &self.disks[index].disk.name;
        let uri = NbdUri::unix(self.work_dir.socket()?, export_name(index));
        let options = ClientOptions { connections: 1, ..ClientOptions::default() };
        let read = async {
            let client = Client::open_uri(&uri, options).await?;
            let geometry = client.geometry();
            let len = geometry.size_bytes.min(geometry.align_bytes.max(512));
            let len = usize::try_from(len).expect("a block fits memory");
            client.read(0, Buffer::unbudgeted(vec![0; len])).await.map(drop)
        };
        let Err(error) = read.await else { return Ok(()) };
        let directory = self.work_dir.scratch_dir();
        if let Err(hangs) = self.things.scratch_answers().await {
            return Err(lost(&format!("that of disk {name} broke: {hangs}")).source(error));
        }
        if work_dir::space_of(directory).await.is_ok_and(Space::is_low) {
            return Err(broke(name, directory).source(error));
        }
        Err(lost(&format!("that of disk {name} cannot be read any more")).source(error))
    }
}

/// The instant gave way where the guest's write would have failed.
fn broke(disk: &str, directory: &Path) -> Error {
    let directory = directory.display();
    let what = format!(
        "scratch directory {directory} ran full and the instant of disk {disk} broke; the guest \
         was not disturbed"
    );
    Error::new(Kind::NoSpace, what)
        .hint("free space there, or name a larger local directory with --scratch-dir")
}

fn lost(why: &str) -> Error {
    Error::new(Kind::SnapshotLost, format!("the instant ended before the last read: {why}"))
        .hint("look at QEMU's log and the space for scratch, then run the backup again")
}

/// Under which the instant of a disk is exported.
pub(super) fn export_name(index: usize) -> String {
    format!("disk{index}")
}

#[async_trait]
impl VmSnapshot for Snapshot {
    fn disks(&self) -> &[SnapshotDisk] {
        &self.described
    }

    fn excluded(&self) -> &[ExcludedDisk] {
        &self.excluded
    }

    fn taken(&self) -> Timestamp {
        self.taken
    }

    fn quiescence(&self) -> &Quiescence {
        &self.quiescence
    }

    fn artifacts(&self) -> &[Artifact] {
        &[]
    }

    fn not_captured(&self) -> &[NotCaptured] {
        &self.not_captured
    }

    async fn source(&mut self, index: usize) -> Result<Arc<dyn BlockSource>> {
        let SnapshotDisk { description, read } = &self.described[index];
        let changes = matches!(read, ReadMode::Incremental { .. })
            .then(|| Temp::Changes.name(self.point, index));
        let uri = NbdUri::unix(self.work_dir.socket()?, export_name(index));
        // Scratch is given back by trims that nobody waits for: reads are not to wait longer for them.
        let timeouts = Timeouts::default();
        let timeouts = Timeouts { slow: timeouts.stall, ..timeouts };
        let options = ClientOptions { changes, timeouts, ..ClientOptions::default() };
        let client = Client::open_uri(&uri, options);
        let client = client.await.map_err(|error| {
            error.context(format!("cannot open the instant of disk {}", description.name))
        })?;
        let size_bytes = client.export().size_bytes;
        if size_bytes != description.size_bytes {
            let what = format!(
                "disk {} has {} bytes and its instant {size_bytes}",
                description.name, description.size_bytes
            );
            return Err(Error::new(Kind::SnapshotLost, what));
        }
        let source = reclaim::releasing(client);
        if let (Some(control), None) = (&self.wants_scratch_back, source.release()) {
            let (disk, why) = (&description.name, reclaim::unavailable(self.access));
            let text = format!("no scratch is given back for {disk} of {}: {why}", self.vm);
            control.notice(NoticeLevel::Info, text);
        }
        Ok(Arc::new(PacedSource::new(old_access::readable(&self.monitor, source))))
    }

    async fn still_valid(&mut self) -> Result<()> {
        let now = self.check_now().await.map_err(|error| match error.kind() {
            Kind::SnapshotLost | Kind::NoSpace => error,
            _ => lost("QEMU cannot be asked").source(error),
        });
        // The watch says why before it ends a job: what it says is there when the job is not.
        self.check_watch().and(now)
    }

    async fn commit(mut self: Box<Self>) -> Result<()> {
        let mut first = First::default();
        // The guest first: from here on its writes cost nothing more.
        first.note(self.end().await);
        let ended = first.is_clean();
        self.journal.before(Phase::Handover);
        match self.older().await {
            Ok(older) => {
                for bitmap in older {
                    first.note(remove_bitmap(&self.monitor, &bitmap).await);
                }
            }
            Err(error) => first.note(Err(error)),
        }
        self.journal.after(Phase::Handover);
        first.note(self.close_journal(ended).await);
        first.into()
    }

    async fn abort(mut self: Box<Self>) -> Result<()> {
        self.undo().await
    }
}
