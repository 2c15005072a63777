//! A snapshot of a running domain: a pull-mode job with one export per disk.
//!
//! The exports are read-only overlays: after the job ended QEMU would serve live data through them
//! without any error, so a read counts only if the job was active *after* it
//! ([`VmSnapshot::still_valid`]).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use virt::domain::Domain;

use super::CheckpointMetadata;
use super::checkpoint::{Check, Checkpoints, Delete, passes};
use super::connection::DomainHandle;
use super::ffi::{self, VirtResult};
use super::job::{self, JobDisk, Server};
use super::lock::DomainLock;
use super::quiesce::Frost;
use super::reach::Reach;
use super::reconcile::drop_stale;
use super::teardown::{STALL, Scratch, remove_left};
use super::watch::{Watch, ended, unplugged};
use crate::block::BlockSource;
use crate::block::layer::pace::PacedSource;
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};
use crate::image::bitmap::BitmapNames;
use crate::journal::Phase;
use crate::nbd::{Client, ClientOptions};
use crate::platform::{KnownPoint, SnapshotDisk, VmSnapshot};
use crate::vm::{Artifact, ExcludedDisk, NotCaptured, PointId, Quiescence};

/// Between two looks at the job: an event reaches libvirt in 20 ms (libvirt 11.3, idle machine).
const SETTLE: Duration = Duration::from_millis(50);

/// Points that are to be dropped, each with the disks that it may have a bitmap on.
type Older = Vec<(PointId, Vec<String>)>;

/// The transaction.
pub(super) struct RunningSnapshot {
    pub(super) domain: DomainHandle,
    pub(super) chain: BitmapNames,
    /// The repository's id.
    pub(super) repository: String,
    pub(super) point: PointId,
    pub(super) metadata: CheckpointMetadata,
    /// All target names of the domain.
    pub(super) all: Vec<String>,
    pub(super) disks: Vec<SnapshotDisk>,
    pub(super) excluded: Vec<ExcludedDisk>,
    pub(super) taken: Timestamp,
    pub(super) quiescence: Quiescence,
    pub(super) artifacts: Vec<Artifact>,
    pub(super) not_captured: Vec<NotCaptured>,
    pub(super) job_disks: Vec<JobDisk>,
    pub(super) server: Server,
    pub(super) scratch: Scratch,
    /// The way to the exports, once one was opened.
    pub(super) reach: Option<Reach>,
    /// Older points whose metadata may be defined.
    pub(super) defined: Vec<PointId>,
    /// Older points with bitmaps in images.
    pub(super) stale: Vec<(PointId, Vec<String>)>,
    pub(super) watch: Option<Watch>,
    /// Whether the guest may still be frozen.
    pub(super) frost: Frost,
    pub(super) lock: DomainLock,
}

impl RunningSnapshot {
    fn checkpoints(&self) -> Checkpoints<'_> {
        Checkpoints { domain: &self.domain, chain: &self.chain, all: &self.all }
    }

    /// `Ok` if our job was whole when this was called.
    ///
    /// The order is the proof (libvirt's qemu_backup.c). The statistics leave out every disk whose
    /// job libvirt has begun to end, from the moment it has told QEMU to; they count it again when
    /// libvirt has taken note of the end, but then QEMU's job on the disk is gone for good. So a
    /// sum that is complete, with every job there *afterwards*, is the sum of jobs nobody has ended.
    /// And as libvirt has one backup at a time, all of this was ours if it has ours last.
    ///
    /// That QEMU lists the jobs proves nothing alone: those that have ended are listed until
    /// libvirt comes round to them, and all that time the exports serve live data.
    async fn check_active(&self) -> Result<()> {
        let names: Vec<String> = self.job_disks.iter().map(|disk| disk.name.clone()).collect();
        let what = "ask for the block jobs of";
        let asked = self.domain.raw_call(what, move |domain| {
            let sum = ffi::job_status(domain)?.scratch_bytes_max;
            let jobs = names.iter().map(|name| ffi::block_job_bytes(domain, name));
            Ok((sum, jobs.collect::<VirtResult<Option<Vec<u64>>>>()?))
        });
        let whole = match asked.await? {
            Ok((sum, jobs)) => jobs.is_some_and(|jobs| {
                jobs.iter().all(|bytes| *bytes > 0) && Some(jobs.iter().sum()) == sum
            }),
            Err(error) => {
                let error = self.domain.wrap(what, error);
                if matches!(error.kind(), Kind::Connection | Kind::Timeout | Kind::Busy) {
                    return Err(error);
                }
                // "Backup job data missing", "domain is not running".
                tracing::debug!(?error, "the block jobs cannot be asked for");
                false
            }
        };
        match job::active(&self.domain).await? {
            Some(active) if whole && active.point == Some(self.point) => Ok(()),
            _ => {
                let unplugged = unplugged(&self.domain, &self.job_disks).await;
                Err(unplugged.unwrap_or_else(|| ended(&self.domain, None)))
            }
        }
    }

    /// `Ok` if the job was whole a moment ago.
    async fn check_whole(&self) -> Result<()> {
        // Should a job end by itself, which is not known to happen without a copy in the
        // background, libvirt knows when QEMU's event has reached it: the second look sees that.
        self.check_active().await?;
        tokio::time::sleep(SETTLE).await;
        self.check_active().await
    }

    /// What the new checkpoint takes the place of.
    fn older(&self) -> Older {
        let all: Vec<String> =
            self.disks.iter().map(|disk| disk.description.name.clone()).collect();
        let defined = self.defined.iter().map(|point| (*point, all.clone()));
        let older: BTreeMap<_, _> = self.stale.iter().cloned().chain(defined).collect();
        older.into_iter().filter(|(point, _)| *point != self.point).collect()
    }

    /// Writes down which checkpoints are to go: once their metadata is gone nobody finds a bitmap that QEMU
    /// has not stored yet.
    fn note_handover(&mut self, older: &Older) -> Result<()> {
        let points: Vec<PointId> = older.iter().map(|(point, _)| *point).collect();
        self.lock.journal.hand_over(&self.repository, &points)
    }

    /// Removes what older checkpoints have left, and closes the journal but for those that are the next run's.
    async fn hand_over(&mut self, mut older: Older) -> Result<()> {
        self.lock.journal.before(Phase::Handover);
        let dropped = self.drop_all_anew(&mut older).await;
        self.lock.journal.after(Phase::Handover);
        let noted = self.note_handover(&older);
        dropped.and(noted).and(self.close_journal().await)
    }

    /// [`Self::drop_all`], once more over a new connection if the old one has ended.
    async fn drop_all_anew(&mut self, older: &mut Older) -> Result<()> {
        let dropped = self.drop_all(older).await;
        if dropped.is_ok() || !self.reconnect().await? {
            return dropped;
        }
        // What libvirt still knows of them is not known here.
        self.defined.clear();
        let again = self.drop_all(older).await;
        if dropped.as_ref().is_err_and(passes) { again } else { dropped.and(again) }
    }

    /// Drops `older` points, which leaves those that are yet to be dropped when something failed for a reason
    /// that passes; then libvirt's record of this one.
    async fn drop_all(&self, older: &mut Older) -> Result<()> {
        let mut result = Ok(());
        while let Some((point, disks)) = older.last() {
            match self.drop_older(*point, disks).await {
                Err(error) if passes(&error) => return result.and(Err(error)),
                dropped => result = result.and(dropped),
            }
            older.pop();
        }
        if self.metadata == CheckpointMetadata::Remove {
            let forgotten = self.checkpoints().delete(self.point, Delete::Metadata).await;
            result = result.and(forgotten);
        }
        result
    }

    /// Removes the bitmaps of a point. Where one of them is gone libvirt (11.3) removes none: then each disk's
    /// by itself. One that is not usable is gone, or is found in its image by the next run.
    async fn drop_older(&self, point: PointId, disks: &[String]) -> Result<()> {
        let checkpoints = self.checkpoints();
        if self.defined.contains(&point) {
            match checkpoints.discard(point).await {
                // What an earlier run left may be on disks that this one did not ask for.
                Ok(()) if self.stale.iter().any(|(stale, _)| *stale == point) => {}
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::debug!(%error, %point, "the bitmaps of a checkpoint are not all there");
                    let runs = self.domain.call("ask for the state of", Domain::is_active);
                    if passes(&error) || !runs.await? {
                        return Err(error);
                    }
                }
            }
        }
        let known = KnownPoint { id: point, disks: Vec::new(), checkpoint_xml: None };
        let mut result = Ok(());
        for disk in disks {
            let is_usable = checkpoints.redefine(&known, &[disk], Check::Validate).await?;
            match drop_stale(&checkpoints, point, std::slice::from_ref(disk)).await {
                Err(error) if passes(&error) => return Err(error),
                Err(error) if !is_usable => {
                    tracing::debug!(%error, %point, %disk, "a bitmap that is not usable");
                }
                dropped => result = result.and(dropped),
            }
        }
        result
    }

    /// Closes this run's part of the journal, but for what is handed over to the next one and the freeze where
    /// the guest may still be frozen: then that one thaws.
    async fn close_journal(&mut self) -> Result<()> {
        let mut kept = vec![Phase::Handover];
        if self.frost.is_there().await {
            let name = &self.domain.name;
            tracing::warn!("the guest of domain '{name}' may still be frozen");
            kept.push(Phase::Freeze);
        } else {
            self.lock.journal.undone_earlier(&[Phase::Freeze])?;
        }
        self.lock.journal.undone(self.point, &Phase::all_but(&kept))
    }

    /// The same, over a new connection if the old one has ended.
    async fn check_anew(&mut self) -> Result<()> {
        self.domain = self.domain.revived().await?;
        let active = self.check_whole().await;
        if active.is_err() && self.reconnect().await? {
            return self.check_whole().await;
        }
        active
    }

    /// After a failed call: a new connection if the old one has ended. False when it stands, so
    /// that the failure is the domain's.
    async fn reconnect(&mut self) -> Result<bool> {
        if self.domain.host.is_alive() {
            return Ok(false);
        }
        self.domain = self.domain.revived().await?;
        Ok(true)
    }

    /// Ends the job and removes what QEMU leaves of it. Scratch is watched until it has ended.
    async fn end_job(&mut self) -> Result<()> {
        self.reach = None;
        let ended = self.try_end_job().await;
        self.watch = None;
        if let Err(error) = ended {
            return Err(self.scratch.stays((&self.domain, self.point), error).await);
        }
        if self.domain.host.is_local() {
            if let Server::Unix(socket) = &self.server {
                remove_left(vec![socket.clone()]).await;
            }
            remove_left(self.scratch_files()).await;
        }
        Ok(())
    }

    fn scratch_files(&self) -> Vec<PathBuf> {
        self.job_disks.iter().map(|disk| disk.scratch.clone()).collect()
    }

    async fn try_end_job(&mut self) -> Result<()> {
        let patience = self.watch.as_ref().map_or(STALL, Watch::patience);
        self.domain = self.domain.revived().await?;
        let files = self.scratch_files();
        let mut ended =
            self.scratch.end_job((&self.domain, self.point), files.clone(), patience).await;
        if ended.is_err() && self.reconnect().await? {
            ended = self.scratch.end_job((&self.domain, self.point), files, patience).await;
        }
        self.domain = ended?;
        Ok(())
    }
}

#[async_trait]
impl VmSnapshot for RunningSnapshot {
    fn disks(&self) -> &[SnapshotDisk] {
        &self.disks
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
        &self.artifacts
    }

    fn not_captured(&self) -> &[NotCaptured] {
        &self.not_captured
    }

    async fn source(&mut self, index: usize) -> Result<Arc<dyn BlockSource>> {
        let disk = &self.job_disks[index];
        let reach = match &mut self.reach {
            Some(reach) => reach,
            none => none.insert(Reach::open(&self.domain.host, &self.server).await?),
        };
        let uri = reach.uri(&disk.name);
        let options = ClientOptions { changes: disk.bitmap(), ..ClientOptions::default() };
        let name = &self.domain.name;
        let client = Client::open_uri(&uri, options)
            .await
            .map_err(|e| e.context(format!("cannot read disk {} of domain '{name}'", disk.name)))?;
        let expected = self.disks[index].description.size_bytes;
        let size = client.geometry().size_bytes;
        if size != expected {
            return Err(Error::new(
                Kind::SnapshotLost,
                format!("disk {} of domain '{name}' was {expected} bytes and is {size}", disk.name),
            )
            .hint("it was resized while the snapshot was taken; start the backup again"));
        }
        Ok(Arc::new(PacedSource::new(Arc::new(client))))
    }

    async fn still_valid(&mut self) -> Result<()> {
        let active = self.check_anew().await;
        // The watch says why before it ends a job: what it says is there when the job is not.
        match self.watch.as_ref().and_then(Watch::lost) {
            Some(lost) => Err(lost),
            None => active,
        }
    }

    async fn commit(mut self: Box<Self>) -> Result<()> {
        let older = self.older();
        // Before what may take minutes, in which we may be killed.
        let noted = self.note_handover(&older);
        let ended = self.end_job().await;
        // A job that may still run stays in the journal: the next run knows it for ours and ends it.
        // The hand-over is left to that one, too: before it touches bitmaps QEMU waits for what hangs
        // in scratch (`bdrv_drain_all` in `qmp_transaction`).
        let result = match ended {
            Ok(()) => noted.and(self.hand_over(older).await),
            Err(error) => {
                if let Err(error) = noted {
                    tracing::warn!(?error, "what is to be handed over is not written down");
                }
                Err(error)
            }
        };
        result.map_err(|error| {
            let name = &self.domain.name;
            // A migration may have waited for the end of the job.
            let what = if error.kind() == Kind::NotFound {
                "the domain is not here any more: bitmaps of older points go with its next backup, \
                 wherever it is"
            } else {
                "something of it was not cleaned up"
            };
            error.context(format!("the backup of domain '{name}' is complete, but {what}"))
        })
    }

    async fn abort(mut self: Box<Self>) -> Result<()> {
        self.end_job().await?;
        let checkpoints = self.checkpoints();
        let mut result = checkpoints.discard(self.point).await;
        for point in self.defined.iter().filter(|point| **point != self.point) {
            let forgotten = checkpoints.delete(*point, Delete::Metadata).await;
            result = result.and(forgotten);
        }
        // What remains is found by what the journal has.
        result?;
        self.close_journal().await
    }
}
