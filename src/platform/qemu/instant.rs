//! Taking the instant: freeze, the moment itself, thaw.
//!
//! ```text
//!  jobs      freeze ► watch ► TRANSACTION (bitmaps, jobs) ► thaw
//!  filters   guardian ► freeze ► watch ► [pause] ► bitmaps ► devices onto filters ► [go on]
//!            ► thaw ► merges
//! ```
//!
//! Scratch is watched (`watch`) before the guest's first write can go there.
//!
//! Everything is noted in the journal before the freeze, and in [`Things`](super::teardown::Things)
//! before QEMU is asked: the guest does not wait for our disk, and what was not answered is taken
//! back as well.

use std::path::Path;

use qmp::{Action, BackupJob, OnTargetFailure};

use super::error::failed;
use super::filter::Filter;
use super::names::Temp;
use super::pause::Pause;
use super::snapshot::{Keeper, OpenDisk, Snapshot};
use super::{Qemu, checkpoint, pause, quiesce};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::freeze::Thaw;
use crate::journal::{Entry, Phase};
use crate::platform::{Quiesce, SnapshotRequest};
use crate::vm::Quiescence;

impl Snapshot {
    /// Freeze, the instant, thaw.
    pub(super) async fn take_instant(
        &mut self,
        qemu: &Qemu,
        request: &SnapshotRequest,
        control: &Control,
    ) -> Result<()> {
        let status = self.monitor.query_status().await;
        let running = status.map_err(failed("cannot ask for the state"))?.running;
        control.set_phase("freezing the guest");
        let agent = qemu.options.agent.as_deref();
        self.note_instant(agent.filter(|_| request.quiesce != Quiesce::Never))?;
        let pause = self.prepare(qemu, request).await?;
        let frozen = match quiesce::freeze(agent, request, running).await {
            Ok(frozen) => frozen,
            Err((error, thaw)) => {
                self.thaw = thaw;
                return Err(error);
            }
        };
        if matches!(frozen, quiesce::Frozen::Yes(_)) {
            self.journal.after(Phase::Freeze);
        }
        control.set_phase("taking the instant");
        let taken = match self.keeper {
            Keeper::Jobs => self.begin_jobs(qemu, request).await,
            Keeper::Filters => self.move_devices(request, pause).await,
        };
        // Before anything else, whatever became of it.
        (self.quiescence, self.thaw) = self.thaw(frozen).await;
        if matches!(self.thaw, Thaw::Done) {
            self.journal.undone(self.point, &[Phase::Freeze])?;
        }
        let vm = &qemu.identity.name;
        taken.map_err(|error| {
            let error = error.context(format!("cannot take the instant of VM '{vm}'"));
            match error.kind() {
                Kind::Busy => error.hint("wait for, or cancel, the job that holds the disk"),
                _ => error,
            }
        })?;
        if self.keeper == Keeper::Filters {
            self.merge_changes().await?;
        }
        Ok(())
    }

    /// Thaws. A guest that is still paused is let go on meanwhile: its agent does not answer before,
    /// which would be waited for instead.
    async fn thaw(&self, frozen: quiesce::Frozen) -> (Quiescence, Thaw) {
        let thaw = frozen.thaw();
        let Some(marker) = &self.things.pause else { return thaw.await };
        tokio::pin!(thaw);
        tokio::select! {
            thawed = &mut thaw => return thawed,
            () = pause::until_it_goes_on(&self.monitor, marker) => {}
        }
        thaw.await
    }

    /// Writes down what the instant takes.
    fn note_instant(&mut self, agent: Option<&Path>) -> Result<()> {
        let freeze = agent.map(|socket| Entry::files(Phase::Freeze, [socket]));
        let way = match self.keeper {
            Keeper::Jobs => vec![Entry::of(Phase::Job)],
            Keeper::Filters => {
                let filters = self.things.filters.iter().map(Filter::to_entry);
                vec![Entry::of(Phase::Pause), Entry::files(Phase::Filter, filters)]
            }
        };
        let others = [Phase::Bitmap, Phase::Export].map(Entry::of);
        self.journal.note(others.into_iter().chain(way).chain(freeze))?;
        if self.keeper == Keeper::Jobs {
            self.journal.before(Phase::Bitmap);
        }
        if agent.is_some() {
            self.journal.before(Phase::Freeze);
        }
        Ok(())
    }

    /// What can be done before the guest stands still in any way; the pause that the instant needs.
    async fn prepare(&mut self, qemu: &Qemu, request: &SnapshotRequest) -> Result<Option<Pause>> {
        if self.keeper == Keeper::Jobs {
            return Ok(None);
        }
        for (index, filter) in self.things.filters.iter().enumerate() {
            filter.add(&self.monitor, &Temp::Scratch.name(self.point, index)).await?;
        }
        // Also of a guest that stands still: somebody may let it go on.
        if self.disks.len() < 2 {
            return Ok(None);
        }
        let marker = Temp::Pause.name(self.point, 0);
        self.things.pause = Some(marker.clone());
        let (socket, program) = (&qemu.options.monitor, request.guardian.as_deref());
        Pause::prepare(&self.monitor, socket, &marker, program).await.map(Some)
    }

    /// One transaction: bitmaps and jobs.
    async fn begin_jobs(&mut self, qemu: &Qemu, request: &SnapshotRequest) -> Result<()> {
        let mut actions = self.note_merges();
        actions.extend(self.note_checkpoints());
        actions.extend(self.note_jobs(qemu));
        self.journal.before(Phase::Job);
        self.watch_scratch();
        self.taken = request.clock.now();
        let begun = self.monitor.transaction(&actions).await;
        self.show_watch();
        begun.map_err(failed("QEMU refuses"))?;
        self.journal.after(Phase::Job);
        self.journal.after(Phase::Bitmap);
        Ok(())
    }

    /// The devices move onto their filters, all at one instant of the guest.
    async fn move_devices(
        &mut self,
        request: &SnapshotRequest,
        mut pause: Option<Pause>,
    ) -> Result<()> {
        let actions = self.note_checkpoints();
        self.watch_scratch();
        self.journal.before(Phase::Pause);
        self.taken = request.clock.now();
        let stopped = match &mut pause {
            Some(pause) => pause.stop().await,
            None => Ok(()),
        };
        let moved = match stopped {
            Ok(()) => {
                self.journal.after(Phase::Pause);
                self.attach(&actions).await
            }
            Err(error) => Err(error),
        };
        let went_on = match pause {
            Some(pause) => pause.end().await,
            None => Ok(()),
        };
        match &went_on {
            Ok(()) => self.things.pause = None,
            Err(error) => {
                tracing::error!(%error, "the guest is paused; it goes on when this is undone");
            }
        }
        moved.and(went_on)
    }

    async fn attach(&self, actions: &[Action]) -> Result<()> {
        self.journal.before(Phase::Bitmap);
        if !actions.is_empty() {
            self.monitor.transaction(actions).await.map_err(failed("cannot add bitmaps"))?;
        }
        self.journal.after(Phase::Bitmap);
        self.journal.before(Phase::Filter);
        let attached = self.attach_all().await;
        self.show_watch();
        attached?;
        self.journal.after(Phase::Filter);
        let status = self.monitor.query_status().await;
        if status.map_err(failed("cannot ask for the state"))?.running && self.disks.len() > 1 {
            let what = "somebody let the guest go on between the instants of its disks";
            return Err(Error::new(Kind::SnapshotLost, what).hint("run it again"));
        }
        Ok(())
    }

    async fn attach_all(&self) -> Result<()> {
        let _alone = self.things.moving.lock().await;
        Filter::check(&self.things.filters, &self.monitor).await?;
        for filter in &self.things.filters {
            filter.attach(&self.monitor).await?;
        }
        Ok(())
    }

    /// What changed since the bases, of which the instant is over: what was written since is in it
    /// as well, and costs a read.
    async fn merge_changes(&mut self) -> Result<()> {
        let actions = self.note_merges();
        if actions.is_empty() {
            return Ok(());
        }
        let merged = self.monitor.transaction(&actions).await;
        merged.map_err(failed("cannot tell what changed since the base"))
    }

    fn note_merges(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        for (index, OpenDisk { disk, base }) in self.disks.iter().enumerate() {
            let Some(base) = base else { continue };
            let changes = checkpoint::changes_bitmap(disk, self.point, index);
            actions.extend(checkpoint::merge(disk, base, &changes));
            self.things.changes.push(changes);
        }
        actions
    }

    fn note_checkpoints(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        for OpenDisk { disk, .. } in &self.disks {
            let new = checkpoint::new_bitmap(disk, &self.names, self.point);
            actions.extend(new.as_ref().map(|new| checkpoint::begin(disk, new)));
            self.checkpoints.extend(new);
        }
        actions
    }

    fn note_jobs(&mut self, qemu: &Qemu) -> Vec<Action> {
        let on_target_failure = if qemu.features.backup_on_cbw_error {
            OnTargetFailure::BreakSnapshot
        } else {
            OnTargetFailure::BreakGuestWrite
        };
        let mut actions = Vec::new();
        for (index, OpenDisk { disk, .. }) in self.disks.iter().enumerate() {
            let job = BackupJob {
                id: Temp::Job.name(self.point, index),
                device: disk.node.name().to_owned(),
                target: Temp::Scratch.name(self.point, index),
                filter: Temp::Filter.name(self.point, index),
                on_target_failure,
            };
            actions.push(Action::backup(&job));
            self.things.jobs.push(job.id);
        }
        actions
    }
}
