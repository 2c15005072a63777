//! The watch over a running job: it gives the backup up before the guest suffers.
//!
//! While a pull job runs, QEMU copies what the guest is about to overwrite into scratch files. A
//! full scratch file system does not break the snapshot: it fails the *guest's* write, and the
//! default `werror=enospc` stops the guest (seen on libvirt 11.3, QEMU 10.0). libvirt has no way to
//! break the snapshot instead, so the watch ends the job while there is room left. A guest that
//! writes faster than a job ends stands still until it has ended, and then runs on ([`job::end`]).
//!
//! ```text
//!  watching ──► job ended by somebody ──────────────────────────► lost
//!     │ ▲  ├──► room is short, or cannot be told ──► end the job ──► lost
//!     ▼ │  └──► connection ended ──► connect anew ──► watching, or lost after a minute
//!  threshold: look at the room, set the next one
//! ```
//!
//! Two eyes: a threshold on each scratch image makes QEMU say at once when it grows (works for
//! scratch images as `vda[INDEX]`, seen on libvirt 11.3), and a look at the file system four times
//! a second, which also sees what others write there and needs no threshold. Scratch on another
//! host cannot be looked at: there only the job is watched.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::connection::DomainHandle;
use super::ffi::{DomainEvent, Events};
use super::job::{self, JobDisk};
use crate::error::{Error, Kind, Result};
use crate::platform::space::{self, ANSWER, POLL, Space};
use crate::vm::PointId;

/// Least distance of a threshold: below it every write would be an event.
const STEP_BYTES_MIN: u64 = 256 << 10;
/// Attempts to connect anew, with a pause before each: a daemon that is restarted takes seconds.
const RECONNECTS_MAX: u32 = 30;
const RECONNECT_PAUSE: Duration = Duration::from_secs(2);

/// Looks after a job until dropped.
pub(super) struct Watch {
    lost: Arc<Mutex<Option<Error>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// Watches `job`, whose events are `events`.
    pub(super) fn start(job: Watched, events: Events) -> Self {
        let lost = Arc::new(Mutex::new(None));
        let task = tokio::spawn(watch(job, events, Arc::clone(&lost)));
        Self { lost, task }
    }

    /// Why the job was lost, if it was; said once.
    pub(super) fn take_lost(&self) -> Option<Error> {
        self.lost.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The job that is watched.
pub(super) struct Watched {
    /// Its domain.
    pub(super) domain: DomainHandle,
    /// Its point.
    pub(super) point: PointId,
    /// The scratch directory and what is in it, if they are on this machine.
    pub(super) scratch: Option<(PathBuf, Vec<JobDisk>)>,
}

async fn watch(mut watched: Watched, mut events: Events, lost: Arc<Mutex<Option<Error>>>) {
    let mut tick = tokio::time::interval(POLL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    watched.set_thresholds().await;
    let error = loop {
        let seen = tokio::select! {
            event = events.receiver.recv() => match event {
                Some(DomainEvent::JobCompleted(status)) => watched.check_job(status.error).await,
                Some(DomainEvent::BeyondThreshold) => {
                    let room = watched.check_room().await;
                    if room.is_ok() {
                        watched.set_thresholds().await;
                    }
                    room
                }
                None => watched.reconnect(&mut events).await,
            },
            _ = tick.tick() => if watched.domain.host.is_alive() {
                watched.check_room().await
            } else {
                watched.reconnect(&mut events).await
            },
        };
        if let Err(error) = seen {
            break error;
        }
    };
    let gone = error.kind() == Kind::SnapshotLost;
    *lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    if !gone {
        watched.end().await;
    }
}

impl Watched {
    /// An error if libvirt does not have the job any more.
    async fn check_job(&self, reason: Option<String>) -> Result<()> {
        // An event may be of the end of a job before ours.
        match job::active(&self.domain).await {
            Ok(Some(active)) if active.point == Some(self.point) => Ok(()),
            Ok(_) => Err(ended(&self.domain, reason)),
            Err(error) => {
                // Asked again before the end, and on a new connection if this one has ended.
                tracing::debug!(?error, "the job cannot be asked for");
                Ok(())
            }
        }
    }

    /// An error if scratch is short, or if nobody can tell.
    async fn check_room(&self) -> Result<()> {
        let Some((directory, _)) = &self.scratch else { return Ok(()) };
        space::check_aside(directory, ANSWER).await
    }

    /// Has QEMU speak up when one of the scratch images has grown by its share of the room. Where
    /// that fails the look at the file system is left.
    async fn set_thresholds(&self) {
        let Some((directory, disks)) = &self.scratch else { return };
        let Ok(Some(active)) = job::active(&self.domain).await else { return };
        let (directory, files) = (directory.clone(), disks.clone());
        let asked = tokio::task::spawn_blocking(move || {
            let usable = Space::of(&directory).ok().and_then(Space::usable_bytes).unwrap_or(0);
            let len = |disk: &JobDisk| std::fs::metadata(&disk.scratch).ok().map(|data| data.len());
            (usable, files.iter().map(len).collect::<Vec<_>>())
        });
        let Ok(Ok((usable, sizes))) = tokio::time::timeout(ANSWER, asked).await else { return };
        let share = u64::try_from(disks.len()).map_or(0, |count| usable / count.max(1));
        for (disk, len) in disks.iter().zip(sizes) {
            let index = active.scratch.iter().find(|(name, _)| *name == disk.name);
            let (Some((name, Some(index))), Some(len)) = (index, len) else { continue };
            let threshold = len.saturating_add(share.max(STEP_BYTES_MIN));
            let device = format!("{name}[{index}]");
            let set = self.domain.call("set a threshold on the scratch of", move |domain| {
                domain.set_block_threshold(&device, threshold, 0)
            });
            if let Err(error) = set.await {
                tracing::debug!(?error, "no threshold on this scratch image");
            }
        }
    }

    /// Connects anew and goes on watching, if the job is still there.
    async fn reconnect(&mut self, events: &mut Events) -> Result<()> {
        let name = self.domain.name.clone();
        let lost = |error: Error| {
            let what = format!("nobody watches the backup job of domain '{name}' any more");
            Error::new(Kind::Connection, what).source(error)
        };
        let mut result = self.try_reconnect(events).await;
        for _ in 1..RECONNECTS_MAX {
            if result.is_ok() {
                break;
            }
            self.check_room().await?;
            tokio::time::sleep(RECONNECT_PAUSE).await;
            result = self.try_reconnect(events).await;
        }
        result.map_err(lost)?;
        tracing::info!("connected to libvirt anew");
        self.check_job(None).await?;
        self.set_thresholds().await;
        Ok(())
    }

    async fn try_reconnect(&mut self, events: &mut Events) -> Result<()> {
        let domain = self.domain.revived().await?;
        *events = domain.subscribe("watch the jobs of").await?;
        self.domain = domain;
        Ok(())
    }

    /// Ends the job, for the guest's sake; tries until it has ended or nobody holds the watch.
    async fn end(&mut self) {
        loop {
            let error = match self.domain.revived().await {
                Ok(domain) => match job::end(&domain).await {
                    Ok(()) => return,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            tracing::error!(?error, "the backup is given up and its job does not end");
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }
}

/// The error of a job that ended before we ended it.
pub(super) fn ended(domain: &DomainHandle, reason: Option<String>) -> Error {
    let name = &domain.name;
    let why = reason.unwrap_or_else(|| "the domain stopped, or somebody ended the job".into());
    Error::new(Kind::SnapshotLost, format!("the backup job of domain '{name}' ended early: {why}"))
        .hint("nothing of it is kept; start the backup again")
}
