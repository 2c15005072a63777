//! What a backup would do to each disk, what it would read, and what is in its way.
//!
//! Leaves everything as it was: checkpoint metadata that is defined to ask QEMU about a bitmap is
//! removed again.

use std::collections::BTreeMap;
use std::path::Path;

use super::checkpoint::{Bases, Checkpoints, Delete, SizedDisk, read_mode};
use super::connection::DomainHandle;
use super::lock::DomainLock;
use super::scratch::Places;
use super::survey::Survey;
use super::{LibvirtOptions, artifacts, job, open, quiesce, stopped};
use crate::error::{Kind, Result};
use crate::image::bitmap::BitmapNames;
use crate::platform::space::{no_room, on_network, space_of};
use crate::platform::{
    BackupMode, PlannedDisk, Problem, Quiesce, ScratchPlan, SnapshotPlan, SnapshotRequest,
};
use crate::vm::{DiskLayer, ReadMode, VmIdentity};

/// Plans a backup of the domain.
pub(super) async fn plan(
    domain: &DomainHandle,
    options: &LibvirtOptions,
    identity: VmIdentity,
    request: &SnapshotRequest,
) -> Result<SnapshotPlan> {
    job::check_arrived(domain).await?;
    let survey = Survey::take(domain, request).await?;
    let mut problems = Vec::new();
    if let Err(error) = survey.set.check(&domain.name, request.repository_has_key) {
        problems.push(Problem::fatal(&error));
    }
    let mut bases = Bases::default();
    let found = look(domain, options, (&survey, request), &mut bases, &mut problems).await?;
    let planned = |disk: &SizedDisk| {
        let name = &disk.disk.name;
        let read = found.as_ref().map(|_| bases.read(name, request.mode));
        PlannedDisk {
            description: disk.describe(),
            expected_bytes: match read {
                Some(Ok(_)) => found.as_ref().and_then(|changed| changed.get(name).copied()),
                Some(Err(_)) => Some(disk.allocation_bytes.min(disk.size_bytes)),
                None => None,
            },
            read: read.map(read_mode),
        }
    };
    let disks: Vec<PlannedDisk> = survey.disks.iter().map(planned).collect();
    let is_full = |disk: &PlannedDisk| matches!(disk.read, Some(ReadMode::Full { .. }));
    if request.mode == BackupMode::Incremental && disks.iter().all(is_full) {
        problems.push(Problem {
            fatal: Some(Kind::NoBase),
            what: "no disk has anything to build on".into(),
            fix: "take a full backup first: 'vmbackup full'".into(),
        });
    }
    if survey.running
        && let Err(error) = open::check_guest_first(request)
    {
        problems.push(Problem::fatal(&error));
    }
    let scratch = if survey.running {
        Some(scratch(domain, options, request, &survey, &mut problems).await)
    } else {
        None
    };
    quiesce_problem(&survey, request, &mut problems);
    // Read as a backup would, and thrown away: nothing else knows what can be read.
    let has_key = request.repository_has_key;
    let (_, not_captured) =
        artifacts::capture(domain, &survey.live, survey.inactive, has_key).await?;
    let (running, excluded) = (survey.running, survey.set.excluded);
    Ok(SnapshotPlan { identity, running, disks, excluded, not_captured, scratch, problems })
}

/// What the domain's state allows: bases, and what changed since; `None` where that cannot be asked
/// for now.
async fn look(
    domain: &DomainHandle,
    options: &LibvirtOptions,
    (survey, request): (&Survey, &SnapshotRequest),
    bases: &mut Bases,
    problems: &mut Vec<Problem>,
) -> Result<Option<BTreeMap<String, u64>>> {
    let name = &domain.name;
    // The lock keeps a backup from starting while its checkpoints are looked at.
    let lock = match DomainLock::take(options, domain.uuid, name) {
        Ok(lock) => lock,
        Err(error) if error.kind() == Kind::Busy => {
            problems.push(Problem::fatal(&error));
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    if survey.running {
        return match job::check_idle(domain, &lock.journal).await {
            Ok(None) => ask_bases(domain, survey, request, bases).await.map(Some),
            Ok(Some(_)) => {
                problems.push(Problem {
                    fatal: None,
                    what: format!("a backup job of an earlier run of domain '{name}' is active"),
                    fix: "the backup ends it before it begins".into(),
                });
                Ok(None)
            }
            Err(error) if error.kind() == Kind::Busy => {
                problems.push(Problem::fatal(&error));
                Ok(None)
            }
            Err(error) => Err(error),
        };
    }
    problems.push(Problem {
        fatal: None,
        what: format!("domain '{name}' cannot start while its images are read"),
        fix: "start it first ('virsh start --paused' will do), or back it up at a quiet time"
            .into(),
    });
    match stopped::reads(domain, survey, request).await {
        Ok(reads) => {
            let mut changed = BTreeMap::new();
            for (disk, (read, changed_bytes)) in survey.disks.iter().zip(reads) {
                let name = &disk.disk.name;
                changed.extend(changed_bytes.map(|bytes| (name.clone(), bytes)));
                bases.disks.insert(name.clone(), read);
            }
            Ok(Some(changed))
        }
        Err(error) => {
            problems.push(Problem::fatal(&error));
            Ok(None)
        }
    }
}

/// Finds the bases and what changed since, and removes the metadata that takes.
async fn ask_bases(
    domain: &DomainHandle,
    survey: &Survey,
    request: &SnapshotRequest,
    bases: &mut Bases,
) -> Result<BTreeMap<String, u64>> {
    let chain = BitmapNames::new(&request.repository, domain.uuid)?;
    let checkpoints = Checkpoints { domain, chain: &chain, all: &survey.set.all };
    let before = checkpoints.listed().await?;
    let mut changed = BTreeMap::new();
    let mut found = checkpoints.find_bases(&survey.disks, request, bases).await;
    for point in &bases.defined {
        let of_point: Vec<_> =
            bases.disks.iter().filter(|(_, base)| **base == Ok(*point)).map(|(d, _)| d).collect();
        if !of_point.is_empty() && found.is_ok() {
            match checkpoints.changed_bytes(*point).await {
                Ok(bytes) => {
                    changed.extend(bytes.into_iter().filter(|(disk, _)| of_point.contains(&disk)));
                }
                Err(error) => tracing::debug!(?error, "no estimate"),
            }
        }
        if !before.contains(point) {
            found = found.and(checkpoints.delete(*point, Delete::Metadata).await);
        }
    }
    found.map(|()| changed)
}

async fn scratch(
    domain: &DomainHandle,
    options: &LibvirtOptions,
    request: &SnapshotRequest,
    survey: &Survey,
    problems: &mut Vec<Problem>,
) -> ScratchPlan {
    let places = Places::choose(&domain.host, survey, &domain.name, request, &options.runtime_dir);
    let directory = places.scratch;
    let bytes_max = survey.disks.iter().map(|disk| disk.size_bytes).sum();
    let mut bytes_free = None;
    let luks = survey.set.protected.iter().find(|disk| disk.layer == DiskLayer::DecryptedLuks);
    if let Some(disk) = luks {
        problems.push(Problem {
            fatal: None,
            what: format!(
                "disk {} is encrypted; while it is read, what the guest overwrites lies in scratch \
                 ({}) in the clear",
                disk.name,
                directory.display()
            ),
            fix: "name a directory on an encrypted file system with --scratch-dir".into(),
        });
    }
    if domain.host.is_local() {
        bytes_free = look_at(&directory, problems).await;
    } else {
        problems.push(Problem {
            fatal: None,
            what: format!(
                "free space in {} on the host cannot be watched from here",
                directory.display()
            ),
            fix: "run vmbackup on the host, or leave ample space there".into(),
        });
    }
    ScratchPlan { directory, bytes_max, bytes_free }
}

/// The free bytes in a scratch directory of this machine, and what speaks against it. Whether it takes
/// writes is not asked: that would change it.
async fn look_at(directory: &Path, problems: &mut Vec<Problem>) -> Option<u64> {
    let space = match space_of(directory).await {
        Ok(space) => space,
        Err(error) => {
            problems.push(Problem::fatal(&error));
            return None;
        }
    };
    if space.is_low() {
        problems.push(Problem::fatal(&no_room(directory)));
    }
    problems.extend(on_network(directory).await);
    Some(space.free_bytes)
}

fn quiesce_problem(survey: &Survey, request: &SnapshotRequest, problems: &mut Vec<Problem>) {
    if !survey.running || request.quiesce == Quiesce::Never {
        return;
    }
    if let Some(reason) = quiesce::agent_problem(&survey.root, survey.paused) {
        problems.push(Problem {
            fatal: (request.quiesce == Quiesce::Require).then_some(Kind::Unsupported),
            what: format!("the backup would be crash consistent: {reason}"),
            fix: "install qemu-guest-agent in the guest and give the domain a channel \
                  'org.qemu.guest_agent.0'"
                .into(),
        });
    }
}
