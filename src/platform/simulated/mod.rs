//! A platform that is simulated: a VM with bitmaps, jobs and freezes as QEMU has them, in memory, and
//! a process that may end at every call to it. Tests only; `job::simulation` plays with it.
//!
//! ```text
//!  reconcile ► survey ► scratch ► server ► freeze ► pause ► TRANSACTION ► resume ► thaw ► export
//!      each a call through [`life::Life`], with the guest at work behind it ► reads ► still valid? ► commit | abort
//! ```
//!
//! The journal is the real one, and tells what cannot be seen: that the guest may be frozen,
//! and that it stands still for us.
//!
//! What is simulated is what QEMU promises and what it does not: the bitmap of an instant marks every
//! write that QEMU sees, and no other; a killed QEMU leaves bitmaps inconsistent; a resize does not
//! mark; a job that ended serves live data or nothing; things outlive the process that asked for
//! them. Which base a disk gets is decided by the platforms' own rules ([`super::base`]).
//!
//! Not simulated: how a monitor, libvirt or an agent is spoken to. Tests against the real ones do.

pub(crate) mod guest;
pub(crate) mod image;
pub(crate) mod life;
pub(crate) mod time;

mod checkpoint;
mod snapshot;
mod source;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use super::{Asked, Platform, RecoverRequest, SnapshotPlan, SnapshotRequest, VmSnapshot};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::journal::{Item, Journal, Journals, Phase, Recovery};
use crate::vm::{PointId, VmIdentity};
use guest::Guest;
use image::BitmapName;
use life::{Life, Place};
use time::Time;

/// The VM, which outlives every process that looks at it.
#[derive(Clone)]
pub(crate) struct Shared(Arc<Mutex<Guest>>);

impl Shared {
    pub(crate) fn new(guest: Guest) -> Self {
        Self(Arc::new(Mutex::new(guest)))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Guest> {
        // Held for one step of the VM, never across an await.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process's line to one QEMU of the VM.
#[derive(Clone)]
struct Line {
    guest: Shared,
    life: Arc<Life>,
    time: Arc<Time>,
    boot: u64,
}

impl Line {
    /// One command; the guest goes on with its work meanwhile.
    async fn ask<T: Send>(
        &self,
        place: Place,
        effect: impl FnOnce(&mut Guest) -> Result<T> + Send,
    ) -> Result<T> {
        let effect = async {
            let mut guest = self.guest.lock();
            // Where it can be seen that a job ended unseen, it is.
            if guest.dice.once_in(4) || guest.shows_live_data() {
                guest.write();
            }
            if guest.boot != self.boot {
                return Err(Error::new(Kind::Connection, "QEMU is gone"));
            }
            effect(&mut guest)
        };
        self.life.call(place, effect, |why| Error::new(Kind::Connection, why)).await
    }

    /// Removes all of a point's run but its bitmaps; goes on past errors, and tells the first.
    async fn take_down(&self, point: PointId) -> Result<()> {
        let exports = self.ask("guest: remove exports", |guest| {
            guest.open.exports.remove(&point);
            Ok(())
        });
        let mut first = exports.await;
        let job = self.ask("guest: end job", |guest| {
            guest.open.jobs.remove(&point);
            Ok(())
        });
        first = first.and(job.await);
        let server = self.ask("guest: stop server", |guest| {
            guest.open.server = None;
            Ok(())
        });
        first = first.and(server.await);
        // Ours, not QEMU's: goes also when QEMU is gone.
        let remove = async {
            self.guest.lock().open.scratch.remove(&point);
            Ok(())
        };
        let failed = |why| Error::new(Kind::Io, why);
        first.and(self.life.call("guest: remove scratch", remove, failed).await)
    }

    async fn remove_bitmaps(
        &self,
        is_meant: impl Fn(&BitmapName) -> bool + Send + Sync,
    ) -> Result<()> {
        let found = self.ask("guest: list bitmaps", |guest| {
            let names = guest.disks.iter().flat_map(|disk| disk.image.bitmaps.keys());
            let mut names: Vec<_> = names.filter(|name| is_meant(name)).cloned().collect();
            names.dedup();
            Ok(names)
        });
        let mut first = Ok(());
        for name in found.await? {
            let removed = self.ask("guest: remove bitmap", |guest| {
                guest.disks.iter_mut().for_each(|disk| drop(disk.image.bitmaps.remove(&name)));
                Ok(())
            });
            first = first.and(removed.await);
        }
        first
    }
}

/// The platform, for one process.
pub(crate) struct Simulated {
    line: Line,
    vm: VmIdentity,
    journals: Journals,
}

impl Simulated {
    /// Connects to the QEMU that runs now.
    pub(crate) async fn connect(
        guest: &Shared,
        life: &Arc<Life>,
        time: &Arc<Time>,
        journals: Journals,
    ) -> Result<Self> {
        let (boot, vm) = {
            let guest = guest.lock();
            (guest.boot, guest.vm.clone())
        };
        let (guest, life, time) = (guest.clone(), Arc::clone(life), Arc::clone(time));
        let platform = Self { line: Line { guest, life, time, boot }, vm, journals };
        platform.line.ask("guest: connect", |_| Ok(())).await?;
        Ok(platform)
    }

    /// Undoes what runs that were killed have left.
    async fn reconcile(
        &self,
        journal: &mut Journal,
        request: &RecoverRequest,
        recovery: &mut Recovery,
    ) -> Result<()> {
        let mut thawed = true;
        if journal.earlier().any(|run| run.has(Phase::Freeze)) && recovery.undo("a freeze") {
            let thaw = self.line.ask("guest: thaw what was left", |guest| {
                guest.freeze = None;
                Ok(())
            });
            thawed = thaw.await.is_ok();
        }
        let mut resumed = true;
        if journal.earlier().any(|run| run.has(Phase::Pause)) && recovery.undo("a pause") {
            let resume = self.line.ask("guest: resume what was left", |guest| {
                guest.resume();
                Ok(())
            });
            resumed = resume.await.is_ok();
        }
        let left = self.line.ask("guest: look for leftovers", |guest| {
            let open = &guest.open;
            let points = open.jobs.keys().chain(&open.exports).chain(&open.scratch);
            Ok(points.chain(&open.server).copied().collect::<BTreeSet<_>>())
        });
        for point in left.await? {
            if recovery.undo(format!("the run of point {point}")) {
                self.line.take_down(point).await?;
            }
        }
        if !recovery.changes() {
            return Ok(());
        }
        let asked = request.repository == Asked::Yes;
        let snapshot = &request.snapshot;
        if asked {
            let no_point = |name: &BitmapName| {
                name.repository == snapshot.repository && !snapshot.exists(name.point)
            };
            self.line.remove_bitmaps(no_point).await?;
        }
        let judged = |repository: &str| asked && repository == snapshot.repository;
        let runs: Vec<_> =
            journal.earlier().map(|run| (run.point, judged(&run.repository))).collect();
        for (point, judged) in runs {
            let over = Phase::ALL.into_iter().filter(|phase| match phase {
                Phase::Freeze => thawed,
                Phase::Pause => resumed,
                Phase::Bitmap => judged,
                _ => true,
            });
            journal.undone(point, &over.collect::<Vec<_>>())?;
        }
        Ok(())
    }
}

#[async_trait]
impl Platform for Simulated {
    async fn identify(&self) -> Result<VmIdentity> {
        Ok(self.vm.clone())
    }

    async fn plan(&self, _request: &SnapshotRequest) -> Result<SnapshotPlan> {
        Err(Error::new(Kind::Unsupported, "plans are not simulated"))
    }

    async fn recover(&self, request: &RecoverRequest, _control: &Control) -> Result<Vec<Item>> {
        let mut journal = self.journals.open(self.vm.uuid)?;
        let mut recovery = Recovery::new(request.mode);
        self.reconcile(&mut journal, request, &mut recovery).await?;
        Ok(recovery.into_items())
    }

    async fn open_snapshot(
        &self,
        request: &SnapshotRequest,
        control: &Control,
    ) -> Result<Box<dyn VmSnapshot>> {
        snapshot::open(self, request, control).await
    }
}
