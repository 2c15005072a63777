//! The instant of a simulated VM: the steps of a real one, each of which may fail, be the last thing
//! its process does, or take effect without anybody learning of it.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;

use super::guest::{Freeze, Guest, Instant, Job, JobState, Pace};
use super::source::{Export, Releasing};
use super::{Line, Simulated, checkpoint};
use crate::block::BlockSource;
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::journal::{Entry, Journal, Mode, Phase, Place, Recovery, Run};
use crate::platform::{
    Asked, Quiesce, RecoverRequest, SnapshotDisk, SnapshotRequest, VmSnapshot, tell,
};
use crate::vm::{
    Artifact, ArtifactKind, Consistency, ExcludedDisk, NotCaptured, PointId, Quiescence, ReadMode,
};

/// How often a thaw is tried before it is left to the guardian.
const THAWS: usize = 3;

pub(super) struct Snapshot {
    line: Line,
    journal: Journal,
    /// Whether the guest is thawed for certain.
    is_thawed: bool,
    /// Whether it runs for certain, if we had it stand still.
    is_resumed: bool,
    point: PointId,
    repository: String,
    guest_first: bool,
    disks: Vec<SnapshotDisk>,
    artifacts: Vec<Artifact>,
    taken: Timestamp,
    quiescence: Quiescence,
}

/// Takes the instant; undoes what it did when it fails.
pub(super) async fn open(
    platform: &Simulated,
    request: &SnapshotRequest,
    control: &Control,
) -> Result<Box<dyn VmSnapshot>> {
    let mut journal = platform.journals.open(platform.vm.uuid)?;
    let mut recovery = Recovery::new(Mode::Undo);
    let wanted =
        RecoverRequest { snapshot: request.clone(), repository: Asked::Yes, mode: Mode::Undo };
    let reconciled = platform.reconcile(&mut journal, &wanted, &mut recovery).await;
    tell(recovery.into_items(), control);
    reconciled?;
    let line = platform.line.clone();
    let disks = line.ask("guest: survey", |guest| checkpoint::survey(guest, request)).await?;
    control.check()?;
    let place = Place::Images { images: Vec::new() };
    journal.begin(Run::new(request.point, &platform.vm.name, &request.repository, place));
    journal.note([Phase::Scratch, Phase::Socket].map(Entry::of))?;
    let definition =
        Artifact { kind: ArtifactKind::DomainXmlLive, origin: None, bytes: b"<domain/>".to_vec() };
    let mut snapshot = Snapshot {
        line,
        journal,
        is_thawed: true,
        is_resumed: true,
        point: request.point,
        repository: request.repository.clone(),
        guest_first: request.guest_first,
        disks,
        artifacts: vec![definition],
        taken: request.clock.now(),
        quiescence: Quiescence { level: Consistency::Crash, frozen_ms: None, reason: None },
    };
    match snapshot.set_up(request, control).await {
        Ok(()) => Ok(Box::new(snapshot)),
        Err(error) => {
            if let Err(undo) = snapshot.undo().await {
                control.notice(NoticeLevel::Warning, undo.in_one_line());
            }
            Err(error)
        }
    }
}

impl Snapshot {
    async fn set_up(&mut self, request: &SnapshotRequest, control: &Control) -> Result<()> {
        let point = self.point;
        let scratch = |guest: &mut Guest| {
            guest.open.scratch.insert(point);
            Ok(())
        };
        self.line.ask("guest: scratch", scratch).await?;
        let server = |guest: &mut Guest| {
            guest.open.server = Some(point);
            Ok(())
        };
        self.line.ask("guest: server", server).await?;
        control.check()?;
        let phases = [Phase::Bitmap, Phase::Job, Phase::Export, Phase::Freeze];
        self.journal.note(phases.map(Entry::of))?;
        let frozen = self.freeze(request).await?;
        self.taken = request.clock.now();
        let taken = self.take(request).await;
        if frozen {
            self.quiescence = self.thaw().await;
        }
        if self.is_thawed {
            self.journal.undone(point, &[Phase::Freeze])?;
        }
        taken?;
        control.check()?;
        let export = |guest: &mut Guest| {
            guest.open.exports.insert(point);
            Ok(())
        };
        self.line.ask("guest: export", export).await
    }

    /// The instant; of a guest that is put first, while it stands still.
    async fn take(&mut self, request: &SnapshotRequest) -> Result<()> {
        let paused = request.guest_first && self.pause().await?;
        let (point, repository, disks) = (self.point, &self.repository, &self.disks);
        let taken = self.line.ask("guest: transaction", |guest| {
            guest.take(point, repository, disks);
            Ok(())
        });
        let taken = taken.await;
        if paused {
            self.resume().await;
        }
        taken
    }

    /// Whether it stands still for us, and not for somebody else.
    async fn pause(&mut self) -> Result<bool> {
        if self.line.ask("guest: does it run", |guest| Ok(guest.pace)).await? != Pace::Runs {
            return Ok(false);
        }
        self.journal.note([Entry::of(Phase::Pause)])?;
        let paused = self.line.ask("guest: pause", |guest| {
            guest.pace = Pace::PausedByUs;
            Ok(())
        });
        let paused = paused.await;
        if paused.is_err() {
            // It may have happened all the same.
            self.resume().await;
        }
        paused.map(|()| true)
    }

    async fn resume(&mut self) {
        self.is_resumed = false;
        for _ in 0..THAWS {
            let resumed = self.line.ask("guest: resume", |guest| {
                guest.resume();
                Ok(())
            });
            if resumed.await.is_ok() {
                self.is_resumed = true;
                return;
            }
        }
    }

    /// Whether a thaw is owed.
    async fn freeze(&mut self, request: &SnapshotRequest) -> Result<bool> {
        if request.quiesce == Quiesce::Never {
            return Ok(false);
        }
        let (now_ms, budget) = (self.line.time.now_ms(), request.freeze_budget.as_millis());
        let until_ms = now_ms + i64::try_from(budget).expect("seconds");
        let frozen = self.line.ask("guest: freeze", |guest| {
            if !guest.has_agent {
                return Err(Error::new(Kind::Unsupported, "there is no guest agent"));
            }
            guest.freeze = Some(Freeze { since_ms: now_ms, until_ms, guarded: true });
            Ok(())
        });
        match frozen.await {
            Ok(()) => Ok(true),
            Err(error) => {
                // It may have happened all the same.
                self.thaw().await;
                if request.quiesce == Quiesce::Require { Err(error) } else { Ok(false) }
            }
        }
    }

    async fn thaw(&mut self) -> Quiescence {
        self.is_thawed = false;
        let mut reason = "the thaw failed".to_owned();
        for _ in 0..THAWS {
            let now_ms = self.line.time.now_ms();
            let thawed = self.line.ask("guest: thaw", |guest| Ok(guest.freeze.take()));
            let thawed = thawed.await;
            self.is_thawed = thawed.is_ok();
            match thawed {
                Ok(Some(freeze)) if now_ms < freeze.until_ms => {
                    let frozen_ms = u64::try_from(now_ms - freeze.since_ms).ok();
                    let level = Consistency::Filesystem;
                    return Quiescence { level, frozen_ms, reason: None };
                }
                Ok(_) => {
                    reason = "thawed before the end".to_owned();
                    break;
                }
                Err(error) => reason = error.to_string(),
            }
        }
        Quiescence { level: Consistency::Crash, frozen_ms: None, reason: Some(reason) }
    }

    /// Ends the snapshot and removes its bitmaps.
    async fn undo(&mut self) -> Result<()> {
        let ended = self.line.take_down(self.point).await;
        let (repository, point) = (self.repository.clone(), self.point);
        let removed = self
            .line
            .remove_bitmaps(move |name| name.repository == repository && name.point == point);
        let undone = ended.and(removed.await);
        self.close_journal(undone)
    }

    /// Closes this run's part of the journal, but for what may not be over.
    fn close_journal(&mut self, undone: Result<()>) -> Result<()> {
        undone?;
        let is_over = |phase: &Phase| match phase {
            Phase::Freeze => self.is_thawed,
            Phase::Pause => self.is_resumed,
            _ => true,
        };
        let over: Vec<_> = Phase::ALL.into_iter().filter(is_over).collect();
        if over.len() == Phase::ALL.len() {
            self.journal.finish()
        } else {
            self.journal.undone(self.point, &over)
        }
    }
}

impl Guest {
    /// The transaction: all of it at once.
    fn take(&mut self, point: PointId, repository: &str, disks: &[SnapshotDisk]) {
        let given_up = BTreeSet::new();
        let mut job = Job { state: JobState::Holds, disks: Vec::new(), given_up };
        for disk in disks {
            let name = &disk.description.name;
            let changed = match disk.read {
                ReadMode::Incremental { base } => Some(self.bitmap_name(repository, name, base)),
                ReadMode::Full { .. } => None,
            };
            let new = self.bitmap_name(repository, name, point);
            let found = self.disks.iter_mut().find(|found| found.name == *name);
            let image = &mut found.expect("nobody unplugs a disk meanwhile").image;
            let changed = changed.map(|base| image.bitmaps[&base].dirty.clone());
            image.add_bitmap(new);
            job.disks.push((name.clone(), image.content.clone(), changed));
        }
        let oracle = job.disks.iter().map(|(name, content, _)| (name.clone(), content.clone()));
        let instant = Instant { repository: repository.to_owned(), disks: oracle.collect() };
        self.instants.insert(point, instant);
        self.open.jobs.insert(point, job);
    }
}

#[async_trait]
impl VmSnapshot for Snapshot {
    fn disks(&self) -> &[SnapshotDisk] {
        &self.disks
    }

    fn excluded(&self) -> &[ExcludedDisk] {
        &[]
    }

    fn taken(&self) -> Timestamp {
        self.taken
    }

    fn quiescence(&self) -> &Quiescence {
        &self.quiescence
    }

    fn artifacts(&self) -> &[Artifact] {
        &self.artifacts
    }

    fn not_captured(&self) -> &[NotCaptured] {
        &[]
    }

    async fn source(&mut self, index: usize) -> Result<Arc<dyn BlockSource>> {
        let point = self.point;
        let opened = self.line.ask("guest: open export", |guest| {
            let is_there = guest.open.exports.contains(&point);
            is_there.then_some(()).ok_or_else(|| Error::new(Kind::Connection, "no such export"))
        });
        opened.await?;
        let size_bytes = self.disks[index].description.size_bytes;
        let export = Export { line: self.line.clone(), point, index, size_bytes };
        Ok(if self.guest_first { Arc::new(Releasing(Arc::new(export))) } else { Arc::new(export) })
    }

    async fn still_valid(&mut self) -> Result<()> {
        let point = self.point;
        let lost = || Error::new(Kind::SnapshotLost, "the job ended before the last read");
        let asked = self.line.ask("guest: still valid", |guest| {
            let job = guest.open.jobs.get(&point);
            let holds = job.is_some_and(|job| job.state == JobState::Holds);
            if holds { Ok(()) } else { Err(lost()) }
        });
        asked.await.map_err(|error| match error.kind() {
            Kind::SnapshotLost => error,
            _ => lost().source(error),
        })
    }

    async fn commit(mut self: Box<Self>) -> Result<()> {
        let ended = self.line.take_down(self.point).await;
        let (repository, point) = (self.repository.clone(), self.point);
        let older = self
            .line
            .remove_bitmaps(move |name| name.repository == repository && name.point != point);
        let done = ended.and(older.await);
        self.close_journal(done)
    }

    async fn abort(mut self: Box<Self>) -> Result<()> {
        self.undo().await
    }
}
