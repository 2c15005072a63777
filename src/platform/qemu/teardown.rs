//! Taking down what a run put into a QEMU, in the reverse order, whatever of it is there.
//!
//! Every step is tried even if one before it failed; what is gone already is no error. The first
//! error is returned. Used by the end of a run, by a run that fails while it opens, and for what
//! a dead run left (`reconcile`).
//!
//! Only a pause is ended while the file system of scratch does not answer: QEMU waits for requests
//! that hang in it before it lets go of anything else, and its guest with it (seen on 10.0:
//! `block-export-del` does not return). Not asked is a scratch that has just told that it is almost
//! full: its jobs end at once ([`Things::give_up`] with [`Scratch::Answers`]), because the guest's
//! next write may fail.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use qmp::block::{BitmapRef, is_missing};
use qmp::export::ExportEnd;
use qmp::{Monitor, jobs};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::error::failed;
use super::filter::Filter;
use super::pause;
use super::work_dir::Question;
use crate::error::{Error, Kind, Result};
use crate::journal::Recovery;
use crate::platform::written::Held;

/// Longest wait for QEMU to let go of an export or end a job: requests in flight end first.
const LET_GO: Duration = Duration::from_secs(30);
/// How often it is asked meanwhile. Asking is cheap, and an event that was lost costs nothing.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// Pause between attempts to take down what does not go.
pub(super) const AGAIN: Duration = Duration::from_secs(2);
/// Longest wait for QEMU to tell what was not taken down.
const TELL: Duration = Duration::from_secs(5);
/// The state of a guest that stands still because a disk failed a write (qapi/run-state.json).
const IO_ERROR: &str = "io-error";
/// The state of that disk if it was for want of space (qapi/block-core.json, BlockDeviceIoStatus).
const NO_SPACE: &str = "nospace";

/// Temporary things in a QEMU, by name.
#[derive(Clone, Debug, Default)]
pub(super) struct Things {
    /// Where scratch is.
    pub(super) directories: Vec<Question>,
    /// Exports.
    pub(super) exports: Vec<String>,
    /// Whether the NBD server is ours.
    pub(super) server: Option<OurServer>,
    /// The node that marks our pause of the guest.
    pub(super) pause: Option<String>,
    /// snapshot-access nodes.
    pub(super) snapshots: Vec<String>,
    /// Jobs.
    pub(super) jobs: Vec<String>,
    /// Filters that take the place of jobs.
    pub(super) filters: Vec<Filter>,
    /// Held by whoever moves devices onto or off them: QEMU dies of a device that is set to the node it is
    /// on (10.0: `bdrv_replace_child_noperm: Assertion old_bs != new_bs`), so that nobody may do it
    /// between another's look and move. Clones share it.
    pub(super) moving: Arc<Mutex<()>>,
    /// Scratch nodes.
    pub(super) scratch: Vec<String>,
    /// Their files, all in one directory, as we noted them: not what QEMU says.
    pub(super) files: Vec<PathBuf>,
    /// Merged bitmaps.
    pub(super) changes: Vec<BitmapRef>,
}

/// What is known of the file system of scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scratch {
    /// It has answered a moment ago.
    Answers,
    /// Nobody knows whether it would.
    Unknown,
}

/// Whether somebody else ends the jobs where scratch runs short of room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watched {
    /// The watch of the run does.
    Yes,
    /// The run is dead.
    No,
}

/// The NBD server was started by us.
#[derive(Clone, Copy, Debug)]
pub(super) struct OurServer;

impl Things {
    /// Notes each of them; whether there are any.
    pub(super) fn tell(&self, vm: &str, recovery: &mut Recovery) -> bool {
        let changes = self.changes.iter().map(|bitmap| &bitmap.name);
        let filters = self.filters.iter().map(|filter| &filter.name);
        let kinds = [
            ("export", self.exports.iter().collect::<Vec<_>>()),
            ("job", self.jobs.iter().collect()),
            ("node", self.snapshots.iter().chain(&self.scratch).collect()),
            ("filter", filters.collect()),
            ("bitmap", changes.collect()),
        ];
        let mut any = self.pause.is_some();
        if any {
            recovery.undo(format!("pause of VM '{vm}': it goes on"));
        }
        for (kind, names) in kinds {
            for name in names {
                any = true;
                recovery.undo(format!("{kind} {name} of VM '{vm}'"));
            }
        }
        any
    }

    /// Takes all of it down. Not cancel-safe: what was not reached stays for `reconcile`.
    pub(super) async fn take_down(&self, monitor: &Monitor) -> Result<()> {
        let mut first = First::default();
        if let Some(marker) = &self.pause {
            first.note(pause::go_on(monitor, marker).await.map(drop));
        }
        if let Err(hangs) = self.scratch_answers().await {
            first.note(Err(hangs));
            return first.into();
        }
        first.note(self.end_exports(monitor).await);
        if self.server.is_some() {
            first.note(stop_server(monitor).await);
        }
        for node in &self.snapshots {
            first.note(del_node(monitor, node).await);
        }
        for id in &self.jobs {
            first.note(end_job(monitor, id).await);
        }
        first.note(self.run_on(monitor).await);
        {
            let _alone = self.moving.lock().await;
            for filter in &self.filters {
                first.note(filter.remove(monitor).await);
            }
        }
        for node in &self.scratch {
            first.note(del_node(monitor, node).await);
        }
        for bitmap in &self.changes {
            first.note(remove_bitmap(monitor, bitmap).await);
        }
        first.into()
    }

    /// Fails with [`Kind::Timeout`] if scratch takes no writes now. Cancel-safe.
    pub(super) async fn scratch_answers(&self) -> Result<()> {
        for directory in &self.directories {
            directory.answers().await?;
        }
        Ok(())
    }

    /// Has scratch on disk before QEMU, and its guest with it, waits for that ([`Held`]): before
    /// [`Things::take_down`]. Not where the guest stands still already because a write failed. Fails with
    /// [`Kind::Timeout`] if scratch takes no writes now, or its disk hangs. Cancel-safe.
    pub(super) async fn write_back(&self, monitor: &Monitor, watched: Watched) -> Result<()> {
        let status = monitor.query_status().await.map_err(failed("cannot ask for the state"))?;
        let Some(directory) = self.files.first().and_then(|file| file.parent()) else {
            return Ok(());
        };
        if status.status == IO_ERROR {
            return Ok(());
        }
        self.scratch_answers().await?;
        let files = self.files.clone();
        // A full scratch disturbs no write that goes through a filter.
        let unwatched = watched == Watched::No && !self.jobs.is_empty();
        let held = if unwatched && self.take_writes(monitor).await {
            Held::written_with_room(directory, files).await?
        } else {
            Some(Held::written(directory, files).await?)
        };
        if let Some(held) = held {
            // It is we who unlink them, later.
            held.let_go().await;
        }
        Ok(())
    }

    /// Ends the exports and waits until nobody can read through them.
    async fn end_exports(&self, monitor: &Monitor) -> Result<()> {
        let mut first = First::default();
        for id in &self.exports {
            first.note(missing_is_fine(monitor.export_del(id, ExportEnd::Hard).await, || {
                format!("cannot remove the export {id}")
            }));
        }
        first.note(self.exports_gone(monitor).await);
        first.into()
    }

    /// Ends what costs the guest's writes anything, at once; reads of the instant fail from then
    /// on. The rest is left to [`Things::take_down`]. Cancel-safe.
    pub(super) async fn give_up(&self, monitor: &Monitor, scratch: Scratch) -> Result<()> {
        // No time for a question where the guest's writes fail next. Filters let them pass.
        if scratch == Scratch::Unknown || !self.filters.is_empty() {
            self.scratch_answers().await?;
        }
        let mut first = First::default();
        // All of them before the wait for any: a write may be held by each.
        for id in &self.jobs {
            if let Err(error) = monitor.job_cancel(id).await {
                tracing::debug!(%error, id, "job not cancelled");
            }
        }
        for id in &self.jobs {
            first.note(cancel_job(monitor, id).await);
        }
        if !self.filters.is_empty() {
            // Nobody may read the instant any more: past its filter the guest changes it. QEMU lets
            // a device leave only then, too ("Permission conflict").
            first.note(self.end_exports(monitor).await);
            for node in &self.snapshots {
                first.note(del_node(monitor, node).await);
            }
            if !first.is_clean() {
                return first.into();
            }
        }
        {
            let _alone = self.moving.lock().await;
            for filter in &self.filters {
                first.note(filter.detach(monitor).await);
            }
        }
        first.note(self.run_on(monitor).await);
        first.into()
    }

    /// Lets the guest run on if it stood still for want of scratch: QEMU tries its write again, and
    /// no job is in its way any more.
    async fn run_on(&self, monitor: &Monitor) -> Result<()> {
        if self.jobs.is_empty() {
            return Ok(());
        }
        let status = monitor.query_status().await.map_err(failed("cannot ask for the state"))?;
        if status.status != IO_ERROR {
            return Ok(());
        }
        let devices = monitor.query_block().await.map_err(failed("cannot ask for the disks"))?;
        if !devices.iter().any(|device| device.io_status.as_deref() == Some(NO_SPACE)) {
            return Ok(());
        }
        tracing::warn!("the guest stood still for want of space; it runs on");
        monitor.cont().await.map_err(failed("cannot let the guest run on"))
    }

    /// Whether writes of the guest still go to scratch; taken to be so where QEMU does not tell.
    pub(super) async fn take_writes(&self, monitor: &Monitor) -> bool {
        let asked = async {
            let runs = |job: &jobs::Job| {
                job.status != jobs::status::CONCLUDED && self.jobs.contains(&job.id)
            };
            if !self.jobs.is_empty() && monitor.query_jobs().await?.iter().any(runs) {
                return Ok::<_, qmp::Error>(true);
            }
            if self.filters.is_empty() {
                return Ok(false);
            }
            let devices = monitor.query_block().await?;
            Ok(self.filters.iter().any(|filter| filter.is_attached(&devices)))
        };
        !matches!(tokio::time::timeout(TELL, asked).await, Ok(Ok(false)))
    }

    async fn exports_gone(&self, monitor: &Monitor) -> Result<()> {
        if self.exports.is_empty() {
            return Ok(());
        }
        let patience = Patience::new();
        loop {
            let exports = monitor.query_block_exports().await;
            let exports = exports.map_err(failed("cannot ask for the exports"))?;
            if !exports.iter().any(|export| self.exports.contains(&export.id)) {
                return Ok(());
            }
            patience.wait("exports to end").await?;
        }
    }
}

/// Stops the NBD server unless somebody exports through it: stopping it ends all exports.
async fn stop_server(monitor: &Monitor) -> Result<()> {
    let exports = monitor.query_block_exports().await;
    let exports = exports.map_err(failed("cannot ask for the exports"))?;
    if exports.iter().any(|export| export.sort == "nbd") {
        tracing::warn!("somebody else exports through our NBD server: it is left running");
        return Ok(());
    }
    match monitor.nbd_server_stop().await {
        // "NBD server not running" (blockdev-nbd.c): the goal.
        Err(error) if error.refusal().is_some_and(|text| text.contains("not running")) => Ok(()),
        result => result.map_err(failed("cannot stop the NBD server")),
    }
}

/// Removes a node; one that is not there is no error.
pub(super) async fn del_node(monitor: &Monitor, node: &str) -> Result<()> {
    let what = || format!("cannot remove the block node {node}");
    missing_is_fine(monitor.blockdev_del(node).await, what)
}

/// Removes a bitmap; one that is not there is no error.
pub(super) async fn remove_bitmap(monitor: &Monitor, bitmap: &BitmapRef) -> Result<()> {
    let what = || format!("cannot remove the bitmap {} of node {}", bitmap.name, bitmap.node);
    missing_is_fine(monitor.bitmap_remove(bitmap).await, what)
}

/// Ends a job, waits until it has, and dismisses it.
async fn end_job(monitor: &Monitor, id: &str) -> Result<()> {
    cancel_job(monitor, id).await?;
    missing_is_fine(monitor.job_dismiss(id).await, || format!("cannot dismiss the job {id}"))
}

/// Ends a job and waits until it has.
async fn cancel_job(monitor: &Monitor, id: &str) -> Result<()> {
    // A job that ended by itself cannot be cancelled any more: the wait tells.
    if let Err(error) = monitor.job_cancel(id).await {
        tracing::debug!(%error, id, "job not cancelled");
    }
    let patience = Patience::new();
    loop {
        let found = monitor.query_jobs().await.map_err(failed("cannot ask for the jobs"))?;
        match found.iter().find(|job| job.id == id) {
            None => return Ok(()),
            Some(job) if job.status == jobs::status::CONCLUDED => return Ok(()),
            Some(_) => patience.wait("a job to end").await?,
        }
    }
}

/// A wait for QEMU that ends.
struct Patience(Instant);

impl Patience {
    fn new() -> Self {
        Self(Instant::now() + LET_GO)
    }

    /// Waits a little, or fails when it is enough.
    async fn wait(&self, what: &str) -> Result<()> {
        if Instant::now() >= self.0 {
            return Err(Error::new(Kind::Timeout, format!("waited {LET_GO:?} for {what}")));
        }
        tokio::time::sleep(ASK_EVERY).await;
        Ok(())
    }
}

fn missing_is_fine(result: qmp::Result<()>, what: impl FnOnce() -> String) -> Result<()> {
    match result {
        Err(error) if is_missing(&error) => Ok(()),
        Err(error) => Err(failed(what())(error)),
        Ok(()) => Ok(()),
    }
}

/// Keeps the first error of several steps and logs the others.
#[derive(Default)]
pub(super) struct First(Option<Error>);

impl First {
    /// Whether nothing failed so far.
    pub(super) fn is_clean(&self) -> bool {
        self.0.is_none()
    }

    pub(super) fn note(&mut self, result: Result<()>) {
        match result {
            Err(error) if self.0.is_some() => {
                tracing::warn!(?error, "a further step of the clean-up failed");
            }
            Err(error) => self.0 = Some(error),
            Ok(()) => {}
        }
    }
}

impl From<First> for Result<()> {
    fn from(first: First) -> Self {
        first.0.map_or(Ok(()), Err)
    }
}
