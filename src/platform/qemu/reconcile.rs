//! What dead runs left in and beside a QEMU is taken down before the next one begins, or told.
//!
//! ```text
//!  journal, QEMU ─► a pause ends ─► thaw ─► exports … nodes by name ─► scratch
//!      ─► bitmaps without a point
//! ```
//!
//! Everything temporary carries our names (`names::Temp`). The journal adds what QEMU cannot tell:
//! that the guest may be frozen, where scratch was, and the node a device had before a filter. One
//! that cannot be read may tell of a frozen guest: as long as that is not thawed for certain it
//! stays, and no backup begins ([`check_readable`]), which would write its own in that place.
//!
//! The NBD server has no name: it is ours only if other things of ours are there and nobody else
//! has an NBD export. Bitmaps of other repositories are theirs to judge; ours are removed only if
//! it is known which points exist. Called by `open::open` and `Qemu::recover`.

use std::path::Path;
use std::sync::Arc;

use qmp::Monitor;
use qmp::block::{BitmapRef, Node};

use super::error::failed;
use super::filter::Filter;
use super::names::Temp;
use super::teardown::{OurServer, Things, Watched, remove_bitmap};
use super::work_dir::Question;
use super::{Qemu, pause, quiesce, scratch_base, work_dir};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::image::bitmap::BitmapNames;
use crate::journal::{Action, Item, Journal, Phase, Recovery};
use crate::platform::{Asked, RecoverRequest, remove_noted};
use crate::vm::PointId;

/// Undoes, or looks for, what dead runs left.
pub(super) async fn reconcile(
    qemu: &Qemu,
    journal: &mut Journal,
    request: &RecoverRequest,
    (recovery, control): (&mut Recovery, &Control),
) -> Result<()> {
    let things = leftovers(&qemu.monitor, journal).await;
    // The agent of a paused guest does not answer.
    let goes_on = recovery.changes() && go_on(qemu, journal, things.as_ref().ok(), recovery).await;
    let thawed = thaw(qemu, journal, request.snapshot.guardian.as_deref(), recovery).await;
    if thawed && recovery.changes() && may_be_frozen(journal) {
        // Who freezes it from now on is somebody else.
        journal.undone_earlier(&[Phase::Freeze])?;
    }
    let mut things = things.map_err(|error| {
        if !goes_on {
            return error;
        }
        let vm = &qemu.identity.name;
        error.context(format!(
            "VM '{vm}' goes on, which an earlier backup had paused; what else that left is not known"
        ))
    })?;
    if goes_on {
        things.pause = None;
    }
    let mut found = Recovery::new(recovery.mode());
    if things.tell(&qemu.identity.name, &mut found) && recovery.changes() {
        let taken = async {
            if things.pause.is_none() {
                // It may stay as it is: who wants to stop does not wait.
                control.run(things.write_back(&qemu.monitor, Watched::No)).await?;
            }
            things.take_down(&qemu.monitor).await
        };
        if let Err(error) = taken.await {
            // Not known is which of it is gone.
            let why = error.in_one_line();
            let stays = |Item { what, .. }| recovery.note(Action::Kept, format!("{what}: {why}"));
            found.into_items().into_iter().for_each(stays);
            return Err(error.context("cannot remove what an earlier backup left in QEMU"));
        }
    }
    recovery.add(found);
    let base = scratch_base(&request.snapshot);
    work_dir::check_writes(&base).await?;
    work_dir::sweep(&base, qemu.identity.uuid, recovery).await?;
    let stay = scratch(journal, &base, recovery).await;
    if request.repository == Asked::Yes {
        bitmaps(qemu, request, recovery).await?;
    }
    if !recovery.changes() {
        return Ok(());
    }
    close(journal, request, |point, phase| match phase {
        Phase::Freeze => thawed,
        Phase::Scratch => !stay.contains(&point),
        _ => true,
    })
}

/// Ends the pause of an earlier run. Where QEMU does not tell what there is, because of a broken
/// image of somebody else, the journal knows what its mark would be called. Whether there was one.
async fn go_on(
    qemu: &Qemu,
    journal: &Journal,
    things: Option<&Things>,
    recovery: &mut Recovery,
) -> bool {
    let mut goes_on = false;
    let vm = &qemu.identity.name;
    let markers: Vec<_> = match things {
        Some(things) => things.pause.iter().cloned().collect(),
        None => journal.earlier().map(|run| Temp::Pause.name(run.point, 0)).collect(),
    };
    for marker in markers {
        match pause::go_on_after_all(&qemu.monitor, &marker).await {
            Ok(true) => {
                recovery.undo(format!("pause of VM '{vm}': it goes on"));
                goes_on = true;
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "the guest may still be paused"),
        }
    }
    goes_on
}

/// Removes the scratch that earlier runs noted, also elsewhere than below `base`, which has answered;
/// the points of which it stays.
async fn scratch(journal: &Journal, base: &Path, recovery: &mut Recovery) -> Vec<PointId> {
    let removed = async {
        for other in journal.scratch_directories() {
            if other != base {
                work_dir::answers(other).await?;
            }
        }
        remove_noted(journal, &[Phase::Scratch], recovery).await
    };
    match removed.await {
        Ok(stay) => stay,
        Err(hangs) => {
            recovery.note(Action::Kept, format!("scratch of an earlier backup: {hangs}"));
            journal.earlier().map(|run| run.point).collect()
        }
    }
}

/// Fails while there is a journal that cannot be read: the guest may be frozen, and what a backup
/// writes down would take the place of the only hint at that.
pub(super) fn check_readable(journal: &Journal, vm: &str) -> Result<()> {
    if !journal.is_unreadable() {
        return Ok(());
    }
    let path = journal.path().display();
    let what = format!("the guest of VM '{vm}' may be frozen: nobody can read journal {path}");
    Err(Error::new(Kind::Busy, what).hint(
        "name its agent (--agent), so that it is thawed first; if it is not frozen, remove the \
         journal",
    ))
}

/// Thaws the guest if an earlier run may have left it frozen; whether it is thawed for certain.
async fn thaw(
    qemu: &Qemu,
    journal: &Journal,
    guardian: Option<&Path>,
    recovery: &mut Recovery,
) -> bool {
    let name = &qemu.identity.name;
    if journal.is_unreadable() {
        let path = journal.path().display();
        let then = match qemu.options.agent {
            Some(_) => "and gets the ending '.unreadable' once its guest is thawed",
            None => {
                "and may tell of a frozen guest: name its agent (--agent) to have it thawed, or \
                 remove the journal if the guest is not frozen; no backup begins before"
            }
        };
        let text = format!("journal {path} of VM '{name}', which cannot be read {then}");
        recovery.note(Action::Kept, text);
    }
    let mut frozen = journal.earlier().filter(|run| run.has(Phase::Freeze));
    let run = frozen.find(|run| !run.is_before_boot());
    if run.is_none() && !journal.is_unreadable() {
        return true;
    }
    let noted = run.and_then(|run| run.objects(Phase::Freeze).next());
    let Some(socket) = qemu.options.agent.as_deref().or(noted) else {
        return !journal.is_unreadable();
    };
    if !recovery.undo(format!("file systems of VM '{name}', which may be frozen: thawed")) {
        return false;
    }
    match quiesce::thaw_left(socket, guardian).await {
        Ok(()) => true,
        Err(reason) => {
            recovery.stays(reason);
            false
        }
    }
}

/// Whether the guest may be frozen, as far as the journal tells.
fn may_be_frozen(journal: &Journal) -> bool {
    journal.is_unreadable() || journal.earlier().any(|run| run.has(Phase::Freeze))
}

/// Removes bitmaps of this repository whose point does not exist.
async fn bitmaps(qemu: &Qemu, request: &RecoverRequest, recovery: &mut Recovery) -> Result<()> {
    let names = BitmapNames::new(&request.snapshot.repository, qemu.identity.uuid)?;
    let nodes = qemu.monitor.query_named_block_nodes().await;
    let nodes = nodes.map_err(failed("cannot ask for the bitmaps"))?;
    for node in &nodes {
        for name in node.dirty_bitmaps.iter().filter_map(|bitmap| bitmap.name.as_deref()) {
            let Some(point) = names.point_of_any(name) else { continue };
            let what = || {
                let vm = &qemu.identity.name;
                format!("bitmap of VM '{vm}' for point {}, which does not exist", point.short())
            };
            if request.snapshot.exists(point) || !recovery.undo(what()) {
                continue;
            }
            let bitmap = BitmapRef { node: node.name().to_owned(), name: name.to_owned() };
            if let Err(error) = remove_bitmap(&qemu.monitor, &bitmap).await {
                // It only costs, and a read-only layer keeps it.
                recovery.stays(error);
            }
        }
    }
    Ok(())
}

/// Closes the books on what was looked for, and is over.
fn close(
    journal: &mut Journal,
    request: &RecoverRequest,
    is_over: impl Fn(PointId, Phase) -> bool,
) -> Result<()> {
    let asked = request.repository == Asked::Yes;
    let judged = |repository: &str| asked && repository == request.snapshot.repository;
    let runs: Vec<_> = journal.earlier().map(|run| (run.point, judged(&run.repository))).collect();
    for (point, judged) in runs {
        let over = Phase::ALL.into_iter().filter(|phase| match phase {
            Phase::Bitmap => judged,
            phase => is_over(point, *phase),
        });
        journal.undone(point, &over.collect::<Vec<_>>())?;
    }
    Ok(())
}

async fn leftovers(monitor: &Monitor, journal: &Journal) -> Result<Things> {
    let exports = monitor.query_block_exports().await.map_err(failed("cannot ask for exports"))?;
    let jobs = monitor.query_jobs().await.map_err(failed("cannot ask for jobs"))?;
    let nodes = monitor.query_named_block_nodes().await.map_err(failed("cannot ask for nodes"))?;
    let devices = monitor.query_block().await.map_err(failed("cannot ask for the disks"))?;
    let node_names = |kind: Temp| {
        let of_kind = nodes.iter().map(Node::name).filter(move |name| kind.is(name));
        of_kind.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut changes = Vec::new();
    for node in &nodes {
        for name in node.dirty_bitmaps.iter().filter_map(|bitmap| bitmap.name.as_deref()) {
            // A filter shows the bitmaps of the node below it, too: the second removal finds none.
            if Temp::Changes.is(name) {
                changes.push(BitmapRef { node: node.name().to_owned(), name: name.to_owned() });
            }
        }
    }
    let foreign = exports.iter().any(|export| export.sort == "nbd" && !Temp::Export.is(&export.id));
    let guards = node_names(Temp::Guard);
    let filters = guards.iter().map(|name| {
        let noted = journal.earlier().flat_map(|run| run.objects(Phase::Filter));
        let noted = noted.filter_map(Path::to_str);
        Filter::found(name, &devices, noted)
    });
    let scratch = nodes.iter().filter(|node| Temp::Scratch.is(node.name()));
    let directories = scratch.filter_map(|node| Path::new(&node.file).parent());
    let mut directories: Vec<_> = directories.map(Path::to_owned).collect();
    directories.dedup();
    let mut noted = journal.earlier().flat_map(|run| run.objects(Phase::Scratch));
    let noted = noted.find(|noted| directories.iter().any(|directory| directory == noted));
    let scratch = node_names(Temp::Scratch);
    let disks = scratch.iter().filter_map(|name| name.rsplit('-').next()?.parse().ok());
    let files = noted.map(|noted| disks.map(|disk| work_dir::scratch_file(noted, disk)).collect());
    let directories = directories.into_iter().map(Question::new).collect();
    let mut things = Things {
        directories,
        exports: exports.into_iter().map(|e| e.id).filter(|id| Temp::Export.is(id)).collect(),
        server: None,
        pause: node_names(Temp::Pause).pop(),
        snapshots: node_names(Temp::Snapshot),
        filters: filters.collect(),
        moving: Arc::default(),
        jobs: jobs.into_iter().map(|job| job.id).filter(|id| Temp::Job.is(id)).collect(),
        scratch,
        files: files.unwrap_or_default(),
        changes,
    };
    let any = !(things.exports.is_empty() && things.scratch.is_empty() && things.jobs.is_empty());
    things.server = (any && !foreign).then_some(OurServer);
    Ok(things)
}
