//! The watch over a running job: it gives the backup up before the guest suffers.
//!
//! While a pull job runs, QEMU copies what the guest is about to overwrite into scratch files. A
//! full scratch file system does not break the snapshot: it fails the *guest's* write, and the
//! default `werror=enospc` stops the guest (seen on libvirt 11.3, QEMU 10.0). libvirt has no way to
//! break the snapshot instead, so the watch ends the job while there is room left. A guest that
//! writes faster than a job ends stands still until it has ended, and then runs on ([`job::end`]).
//!
//! ```text
//!  the job:   watching ──► somebody has ended it ─────────────────────────────────────► lost
//!               │  └─────► connection ended ──► connect anew ──► watching, or unknown
//!               ├────────► threshold: look at the room, set the next one
//!               └────────► one of its disks was unplugged: as unknown
//!
//!  the room:  watching ──► short ─────────────────────────────────► end the job ──────► lost
//!                  └─────► cannot be told, or no answer: unknown
//!
//!  unknown:   wait until scratch answers, however long that is ──► end the job; lost from the start
//! ```
//!
//! Two eyes, neither of which waits for the other: the room is looked at four times a second, which
//! also sees what others write there; and libvirt says what becomes of the job. A threshold on each
//! scratch image makes QEMU say at once when it grows (works for scratch images as `vda[INDEX]`, seen
//! on libvirt 11.3). Scratch on another host cannot be looked at: there only the job is watched.
//!
//! A file system that does not answer for a while costs nothing but the writes of the guest that wait
//! for it. To end the job meanwhile would stop the whole guest ([`super::teardown`]).

use std::future::pending;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Interval, MissedTickBehavior, interval};

use super::connection::DomainHandle;
use super::ffi::{DomainEvent, Events};
use super::job::{self, JobDisk};
use super::teardown::{STALL, Scratch};
use super::xml::Element;
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
    told: Arc<Told>,
    task: tokio::task::JoinHandle<()>,
}

/// What a watch has to say.
#[derive(Default)]
struct Told {
    /// Why the job is lost.
    lost: Mutex<Option<Error>>,
    /// Whether scratch has not answered for so long that nobody waits for it any more.
    hangs: AtomicBool,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Watch {
    /// Watches `job`, whose events are `events`.
    pub(super) fn start(job: Watched, events: Events) -> Self {
        let told = Arc::<Told>::default();
        let task = tokio::spawn(watch(job, events, Arc::clone(&told)));
        Self { told, task }
    }

    /// Why the job was lost, if it was. Said whenever it is asked for: without it, a job that the
    /// watch has ended looks like one that somebody else has.
    pub(super) fn lost(&self) -> Option<Error> {
        self.told.lost.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Error::again)
    }

    /// How long scratch is to be waited for now, where the job is to end.
    pub(super) fn patience(&self) -> Duration {
        if self.told.hangs.load(Ordering::Acquire) { Duration::ZERO } else { STALL }
    }
}

/// The job that is watched.
pub(super) struct Watched {
    /// Its domain.
    pub(super) domain: DomainHandle,
    /// Its point.
    pub(super) point: PointId,
    /// Where its scratch is.
    pub(super) scratch: Scratch,
    /// What is in it.
    pub(super) disks: Vec<JobDisk>,
}

/// What is known of the room when a job is ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Room {
    Short,
    Unknown,
}

/// Why a watch is over.
enum Over {
    /// The job has ended.
    Ended(Error),
    /// Scratch is almost full.
    Short(Error),
    /// Nobody knows what becomes of job or room, or what is read is of no use.
    Unknown(Error),
}

async fn watch(mut watched: Watched, mut events: Events, told: Arc<Told>) {
    let scratch = watched.scratch.clone();
    let look = Notify::new();
    let over = tokio::select! {
        over = until_short(scratch.local(), &look, &told) => over,
        over = watched.until_ended(&mut events, &look) => over,
    };
    let tell = |error| {
        *told.lost.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
    };
    match over {
        Over::Ended(error) => tell(error),
        Over::Short(error) => {
            tell(error);
            watched.end(Room::Short).await;
        }
        Over::Unknown(error) => {
            tell(error);
            scratch.until_it_answers().await;
            watched.end(Room::Unknown).await;
        }
    }
}

/// Looks at the room in `directory`, at once when told to, until it is short or cannot be told.
async fn until_short(directory: Option<&Path>, look: &Notify, told: &Told) -> Over {
    let Some(directory) = directory else { return pending().await };
    let mut tick = ticks();
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = look.notified() => {}
        }
        let Err(error) = space::check_aside(directory, STALL).await else { continue };
        return match error.kind() {
            Kind::NoSpace => Over::Short(error),
            Kind::Timeout => {
                told.hangs.store(true, Ordering::Release);
                let what = "the room for scratch is not known any more; the guest comes first";
                let lost = Error::new(Kind::SnapshotLost, what);
                Over::Unknown(match error.hint_text() {
                    Some(hint) => lost.hint(hint).source(error),
                    None => lost.source(error),
                })
            }
            _ => Over::Unknown(error),
        };
    }
}

fn ticks() -> Interval {
    let mut tick = interval(POLL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick
}

impl Watched {
    /// Follows the job until it has ended or nobody tells of it. Has `look` taken when scratch grows.
    async fn until_ended(&mut self, events: &mut Events, look: &Notify) -> Over {
        let mut tick = ticks();
        // Beside all else: libvirt may take a minute for each of its calls.
        let mut thresholds = self.thresholds();
        let error = loop {
            // What was seen may mean that a disk is gone.
            let mut unplugged_since = false;
            let seen = tokio::select! {
                () = &mut thresholds => {
                    thresholds = Box::pin(pending());
                    Ok(())
                }
                event = events.receiver.recv() => match event {
                    Some(DomainEvent::JobCompleted(status)) => self.check_job(status.error).await,
                    Some(DomainEvent::BeyondThreshold) => {
                        look.notify_one();
                        thresholds = self.thresholds();
                        Ok(())
                    }
                    Some(DomainEvent::DeviceRemoved) => {
                        unplugged_since = true;
                        Ok(())
                    }
                    None => {
                        unplugged_since = true;
                        self.reconnect(events, &mut thresholds).await
                    }
                },
                _ = tick.tick() => if self.domain.host.is_alive() {
                    Ok(())
                } else {
                    unplugged_since = true;
                    self.reconnect(events, &mut thresholds).await
                },
            };
            if let Err(error) = seen {
                break error;
            }
            if unplugged_since && let Some(error) = unplugged(&self.domain, &self.disks).await {
                return Over::Unknown(error);
            }
        };
        match error.kind() {
            Kind::SnapshotLost => Over::Ended(error),
            _ => Over::Unknown(error),
        }
    }

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

    fn thresholds(&self) -> Thresholds {
        let Some(directory) = self.scratch.local() else { return Box::pin(pending()) };
        let (domain, disks) = (self.domain.clone(), self.disks.clone());
        Box::pin(set_thresholds(domain, directory.to_owned(), disks))
    }

    /// Connects anew and goes on watching, if the job is still there.
    async fn reconnect(&mut self, events: &mut Events, thresholds: &mut Thresholds) -> Result<()> {
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
            tokio::time::sleep(RECONNECT_PAUSE).await;
            result = self.try_reconnect(events).await;
        }
        result.map_err(lost)?;
        tracing::info!("connected to libvirt anew");
        *thresholds = self.thresholds();
        self.check_job(None).await
    }

    async fn try_reconnect(&mut self, events: &mut Events) -> Result<()> {
        let domain = self.domain.revived().await?;
        *events = domain.subscribe("watch the jobs of").await?;
        self.domain = domain;
        Ok(())
    }

    /// Ends the job, for the guest's sake; tries until it has ended or nobody holds the watch.
    async fn end(&mut self, room: Room) {
        loop {
            let error = match self.try_end(room).await {
                Ok(()) => return,
                Err(error) => error,
            };
            tracing::error!(?error, "the backup is given up and its job does not end");
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    async fn try_end(&self, room: Room) -> Result<()> {
        let domain = self.domain.revived().await?;
        if room == Room::Short {
            return job::end(&domain, self.point).await;
        }
        let files = self.disks.iter().map(|disk| disk.scratch.clone()).collect();
        self.scratch.end_job((&domain, self.point), files, Duration::ZERO).await.map(drop)
    }
}

/// Thresholds that are being set.
type Thresholds = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Has QEMU speak up when one of the scratch images has grown by its share of the room. Where that
/// fails the look at the file system is left.
async fn set_thresholds(domain: DomainHandle, directory: PathBuf, disks: Vec<JobDisk>) {
    let Ok(Some(active)) = job::active(&domain).await else { return };
    let (at, files) = (directory.clone(), disks.clone());
    let asked = space::aside(&directory, ANSWER, move || {
        let usable = Space::of(&at).ok().and_then(Space::usable_bytes).unwrap_or(0);
        let len = |disk: &JobDisk| std::fs::metadata(&disk.scratch).ok().map(|data| data.len());
        (usable, files.iter().map(len).collect::<Vec<_>>())
    });
    let Ok((usable, sizes)) = asked.await else { return };
    let share = u64::try_from(disks.len()).map_or(0, |count| usable / count.max(1));
    for (disk, len) in disks.iter().zip(sizes) {
        let index = active.scratch.iter().find(|(name, _)| *name == disk.name);
        let (Some((name, Some(index))), Some(len)) = (index, len) else { continue };
        let threshold = len.saturating_add(share.max(STEP_BYTES_MIN));
        let device = format!("{name}[{index}]");
        let set = domain.call("set a threshold on the scratch of", move |domain| {
            domain.set_block_threshold(&device, threshold, 0)
        });
        if let Err(error) = set.await {
            tracing::debug!(?error, "no threshold on this scratch image");
        }
    }
}

/// The error of a job of which a disk is not the domain's any more: QEMU keeps it open for its job on it,
/// and libvirt does not know that. None where that is not so, or cannot be told, as of a domain that has
/// stopped.
pub(super) async fn unplugged(domain: &DomainHandle, disks: &[JobDisk]) -> Option<Error> {
    let asked = domain.call("read the description of", |domain| {
        if domain.is_active()? { domain.xml_desc(0).map(Some) } else { Ok(None) }
    });
    let root = Element::parse("the domain XML", &asked.await.ok()??).ok()?;
    let there: Vec<_> = root.child("devices")?.all("disk").collect();
    let is_there = |disk: &&JobDisk| {
        there.iter().any(|one| one.attr_at(&["target"], "dev") == Some(&disk.name))
    };
    let gone = disks.iter().find(|disk| !is_there(disk))?;
    let (name, disk) = (&domain.name, &gone.name);
    let what = format!("the disks of domain '{name}' were changed meanwhile: {disk} was unplugged");
    Some(Error::new(Kind::SnapshotLost, what).hint("run the backup again"))
}

/// The error of a job that ended before we ended it.
pub(super) fn ended(domain: &DomainHandle, reason: Option<String>) -> Error {
    let name = &domain.name;
    let why = reason.unwrap_or_else(|| "the domain stopped, or somebody ended the job".into());
    Error::new(Kind::SnapshotLost, format!("the backup job of domain '{name}' ended early: {why}"))
        .hint("nothing of it is kept; start the backup again")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The second to ask was told that somebody had ended the job, and that became the error of a
    /// backup whose scratch had run full.
    #[tokio::test]
    async fn why_a_job_was_lost_is_told_as_often_as_it_is_asked() {
        let full = space::no_room(Path::new("/scratch")).source("a cause".to_owned());
        let all = full.in_one_line();
        let told = Told { lost: Mutex::new(Some(full)), hangs: AtomicBool::new(false) };
        let watch = Watch { told: Arc::new(told), task: tokio::spawn(pending()) };
        for _ in 0..3 {
            let lost = watch.lost().expect("it is lost");
            assert_eq!((lost.kind(), lost.in_one_line()), (Kind::NoSpace, all.clone()));
        }
    }
}
