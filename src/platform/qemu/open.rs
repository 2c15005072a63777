//! Opening the instant.
//!
//! ```text
//!  reconcile ► check, survey ► scratch nodes ► NBD server ► watch ► the instant (`instant`)
//!      ► snapshot nodes ► exports ► (`snapshot`)
//! ```
//!
//! Each thing is noted in [`Things`](super::teardown::Things) *before* QEMU is asked for it, so that
//! a command that was not answered is taken back as well. The scratch nodes come first: they mark the
//! NBD server as ours for a later `reconcile`. The server comes before the freeze, so that one that
//! is taken costs the guest nothing.

use std::path::PathBuf;

use qmp::export::{ExportAccess, NewExport};
use serde_json::json;

use super::error::failed;
use super::names::Temp;
use super::snapshot::{Keeper, OpenDisk, Snapshot, export_name};
use super::teardown::OurServer;
use super::work_dir::{Question, WorkDir};
use super::{Qemu, QemuOptions, checkpoint, filter, reconcile, scratch_base, work_dir};
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::journal::{Entry, Mode, Phase, Place, Recovery, Run};
use crate::platform::space::no_room;
use crate::platform::{Asked, RecoverRequest, SnapshotRequest, VmSnapshot, tell};

/// Connections QEMU lets in per disk: those of our client, and two to spare.
const CONNECTIONS_PER_DISK: u32 = 6;

/// Takes the instant. What it did is undone when it fails.
pub(super) async fn open(
    qemu: &Qemu,
    request: &SnapshotRequest,
    control: &Control,
) -> Result<Box<dyn VmSnapshot>> {
    let base = scratch_base(request);
    let mut journal = qemu.options.journals.open(qemu.identity.uuid)?;
    let mut recovery = Recovery::new(Mode::Undo);
    let wanted =
        RecoverRequest { snapshot: request.clone(), repository: Asked::Yes, mode: Mode::Undo };
    let reconciled =
        reconcile::reconcile(qemu, &mut journal, &wanted, (&mut recovery, control)).await;
    tell(recovery.into_items(), control);
    reconciled?;
    reconcile::check_readable(&journal, &qemu.identity.name)?;
    let migration = qemu.check_state().await?;
    let survey = qemu.survey(request).await?;
    survey.check_mode(request.mode)?;
    if work_dir::space_of(&base).await?.is_low() {
        return Err(no_room(&base));
    }
    let filters = match Keeper::of(qemu, request) {
        Keeper::Jobs => Vec::new(),
        Keeper::Filters => {
            filter::plan(qemu, &survey, |index| Temp::Guard.name(request.point, index)).await?
        }
    };
    control.check()?;
    let QemuOptions { monitor, agent, name, .. } = qemu.options.clone();
    let failed = |e| Error::io(format!("cannot find {}", monitor.display()), e);
    let monitor = std::path::absolute(&monitor).map_err(failed)?;
    let place = Place::Qemu { monitor, agent, name };
    let vm = &qemu.identity;
    journal.begin(Run::new(request.point, &vm.name, &request.repository, place));
    let directory = WorkDir::path(&base, vm.uuid, request.point);
    journal.note([
        Entry::files(Phase::Scratch, [directory]),
        Entry::of(Phase::Node),
        Entry::of(Phase::Socket),
    ])?;
    journal.before(Phase::Scratch);
    let made = WorkDir::create(&base, &qemu.options.monitor, vm.uuid, request.point).await;
    let work_dir = match made {
        Ok(work_dir) => work_dir,
        // It may come yet: the next run looks for it.
        Err(error) if error.kind() == Kind::Timeout => return Err(error),
        Err(error) => {
            journal.finish()?;
            return Err(error);
        }
    };
    journal.after(Phase::Scratch);
    let mut snapshot = Snapshot::new(qemu, request, (survey, migration), (work_dir, journal));
    snapshot.wants_scratch_back = request.guest_first.then(|| control.clone());
    snapshot.things.filters = filters;
    snapshot.things.directories.push(Question::new(snapshot.work_dir.scratch_dir().to_owned()));
    let set_up = snapshot.set_up(qemu, request, control).await;
    // The watch first: it may be why.
    match snapshot.check_watch().and(set_up) {
        Ok(()) => Ok(Box::new(snapshot)),
        Err(error) => {
            if let Err(undo) = snapshot.undo().await {
                let text = format!("what the failed snapshot left is not all removed: {undo}");
                control.notice(NoticeLevel::Warning, text);
            }
            Err(error)
        }
    }
}

impl Snapshot {
    async fn set_up(
        &mut self,
        qemu: &Qemu,
        request: &SnapshotRequest,
        control: &Control,
    ) -> Result<()> {
        self.journal.before(Phase::Node);
        self.add_scratch().await?;
        self.journal.after(Phase::Node);
        self.journal.before(Phase::Socket);
        let socket = self.start_server().await?;
        self.journal.after(Phase::Socket);
        control.check()?;
        self.take_instant(qemu, request, control).await?;
        control.check()?;
        self.journal.before(Phase::Export);
        for index in 0..self.disks.len() {
            self.export(qemu, index).await?;
        }
        self.journal.after(Phase::Export);
        tracing::debug!(socket = %socket.display(), "the instant is exported");
        Ok(())
    }

    async fn add_scratch(&mut self) -> Result<()> {
        for (index, open) in self.disks.iter().enumerate() {
            let file = self.work_dir.create_scratch(index, open.disk.size_bytes()).await?;
            let node = Temp::Scratch.name(self.point, index);
            self.things.scratch.push(node.clone());
            self.things.files.push(file.clone());
            let what = format!("QEMU cannot open the scratch file {}", file.display());
            let file = json!({ "driver": "file", "filename": file, "discard": "unmap" });
            let options = json!({
                "driver": "raw", "node-name": node, "file": file, "discard": "unmap",
            });
            let added = self.monitor.blockdev_add(options).await;
            added.map_err(|error| {
                failed(what)(error).hint("give a directory QEMU may use (--scratch-dir)")
            })?;
        }
        Ok(())
    }

    async fn start_server(&mut self) -> Result<PathBuf> {
        let socket = self.work_dir.socket()?;
        let disks = u32::try_from(self.disks.len()).unwrap_or(u32::MAX);
        let connections = disks.saturating_mul(CONNECTIONS_PER_DISK);
        match self.monitor.nbd_server_start(&socket, connections).await {
            Ok(()) => self.things.server = Some(OurServer),
            Err(error) => {
                // A refusal means that there is one, of somebody else; no answer may mean ours.
                if error.refusal().is_none() {
                    self.things.server = Some(OurServer);
                }
                let what = "cannot start QEMU's NBD server, of which it can have only one";
                return Err(failed(what)(error).hint(
                    "if nobody uses the one that runs, stop it (monitor command nbd_server_stop)",
                ));
            }
        }
        Ok(socket)
    }

    async fn export(&mut self, qemu: &Qemu, index: usize) -> Result<()> {
        let OpenDisk { disk, base } = &self.disks[index];
        let node = Temp::Snapshot.name(self.point, index);
        let export = NewExport {
            id: Temp::Export.name(self.point, index),
            node: node.clone(),
            name: export_name(index),
            bitmap: base.as_ref().map(|_| checkpoint::changes_bitmap(disk, self.point, index)),
            access: self.access,
        };
        let what = format!("cannot export the instant of disk {}", disk.name);
        self.things.snapshots.push(node.clone());
        self.things.exports.push(export.id.clone());
        self.show_watch();
        let filter = match self.keeper {
            Keeper::Jobs => Temp::Filter.name(self.point, index),
            Keeper::Filters => Temp::Guard.name(self.point, index),
        };
        let options = json!({
            "driver": "snapshot-access", "node-name": node, "file": filter, "discard": "unmap",
        });
        self.monitor.blockdev_add(options).await.map_err(failed(what.clone()))?;
        let added = match self.monitor.export_add(&export, &qemu.features).await {
            Err(error) if export.access == ExportAccess::Writable && error.refusal().is_some() => {
                tracing::debug!(%error, "scratch is not given back: only a read-only export");
                let export = NewExport { access: ExportAccess::ReadOnly, ..export };
                self.monitor.export_add(&export, &qemu.features).await
            }
            added => added,
        };
        added.map_err(failed(what))
    }
}
