//! What a backup of this VM would do, and what is in its way. Changes nothing.

use std::path::Path;

use super::disks::Disk;
use super::error::failed;
use super::names::Temp;
use super::snapshot::definition;
use super::{Qemu, checkpoint, filter, scratch_base, work_dir};
use crate::error::{Kind, Result};
use crate::platform::space::{Space, no_room, on_network};
use crate::platform::{PlannedDisk, Problem, Quiesce, ScratchPlan, SnapshotPlan, SnapshotRequest};

/// Plans; fails only where there is nothing to plan.
pub(super) async fn plan(qemu: &Qemu, request: &SnapshotRequest) -> Result<SnapshotPlan> {
    let status = qemu.monitor.query_status().await.map_err(failed("cannot ask for the state"))?;
    let mut problems = Vec::new();
    if let Err(error) = qemu.check_state().await {
        if !matches!(error.kind(), Kind::Busy | Kind::Unsupported) {
            return Err(error);
        }
        problems.push(Problem::fatal(&error));
    }
    let survey = qemu.survey(request).await?;
    if let Err(error) = survey.check_mode(request.mode) {
        problems.push(Problem::fatal(&error));
    }
    problems.extend(others(qemu).await?);
    problems.extend(survey.disks.protected.iter().filter_map(untracked));
    if request.guest_first
        && !qemu.features.backup_on_cbw_error
        && let Err(error) = filter::plan(qemu, &survey, |_| String::new()).await
    {
        problems.push(Problem::fatal(&error));
    }
    if request.quiesce == Quiesce::Require && qemu.options.agent.is_none() {
        let what = "freezing is required and no guest agent socket is given".into();
        let fix = "give --agent SOCKET".into();
        problems.push(Problem { fatal: Some(Kind::Unsupported), what, fix });
    }
    let directory = scratch_base(request);
    let space = work_dir::space_of(&directory).await;
    let bytes_max = survey.disks.protected.iter().map(Disk::size_bytes).sum();
    problems.extend(narrow(&directory, &space, bytes_max));
    if !request.guest_first {
        problems.extend(on_network(&directory).await);
    }
    let bytes_free = space.ok().map(|space| space.free_bytes);
    let scratch = ScratchPlan { directory, bytes_max, bytes_free };
    let disks = survey.disks.protected.iter().zip(&survey.bases).map(|(disk, base)| PlannedDisk {
        description: disk.description(),
        read: Some(checkpoint::read_mode(base)),
        expected_bytes: match base {
            Ok(base) => Some(base.bitmap.count),
            Err(_) => disk.node.image.actual_size.map(|bytes| bytes.min(disk.size_bytes())),
        },
    });
    Ok(SnapshotPlan {
        identity: qemu.identity.clone(),
        running: status.running,
        disks: disks.collect(),
        excluded: survey.disks.excluded,
        not_captured: vec![definition(&qemu.identity.name)],
        scratch: Some(scratch),
        problems,
    })
}

/// What somebody else does with this QEMU.
async fn others(qemu: &Qemu) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    let exports = qemu.monitor.query_block_exports().await;
    let exports = exports.map_err(failed("cannot ask for the exports"))?;
    if let Some(export) = exports.iter().find(|e| e.sort == "nbd" && !Temp::Export.is(&e.id)) {
        problems.push(Problem {
            fatal: Some(Kind::Busy),
            what: format!("QEMU's one NBD server is used by the export '{}'", export.id),
            fix: "remove it (block-export-del) and stop the server (nbd-server-stop)".into(),
        });
    }
    let jobs = qemu.monitor.query_jobs().await.map_err(failed("cannot ask for the jobs"))?;
    for job in jobs.iter().filter(|job| !Temp::Job.is(&job.id)) {
        problems.push(Problem {
            fatal: None,
            what: format!("a {} job '{}' runs; its disk cannot be backed up", job.sort, job.id),
            fix: "wait for it, or cancel it (job-cancel)".into(),
        });
    }
    Ok(problems)
}

/// A disk whose changes are forgotten when QEMU ends.
fn untracked(disk: &Disk) -> Option<Problem> {
    (!disk.keeps_bitmaps()).then(|| Problem {
        fatal: None,
        what: format!(
            "disk {} ({}) cannot hold bitmaps: after QEMU ends it is read in full once",
            disk.name, disk.node.drv
        ),
        fix: "use qcow2 (version 3), or qcow2 with an external raw data file".into(),
    })
}

/// A backup is given up where a guest overwrites more than fits.
fn narrow(directory: &Path, space: &Result<Space>, bytes_max: u64) -> Option<Problem> {
    let space = match space {
        Ok(space) if space.is_low() => return Some(Problem::fatal(&no_room(directory))),
        Ok(space) => space,
        Err(error) => return Some(Problem::fatal(error)),
    };
    (space.usable_bytes() < Some(bytes_max)).then(|| Problem {
        fatal: None,
        what: format!(
            "{} has less room than the guest could overwrite during the backup; the backup is \
             given up before it is full",
            directory.display()
        ),
        fix: "give a larger directory (--scratch-dir)".into(),
    })
}
