//! What a backup would do, asked of the platform; nothing is changed.

use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use super::points::Bases;
use super::source::{self, SnapshotOptions, SourceSpec};
use super::{Repository, Surroundings};
use crate::error::{Kind, Result};
use crate::platform::{BackupMode, SnapshotRequest};
use crate::vm::{ExcludedDisk, NotCaptured, PointId, ReadMode, VmIdentity};

/// The backup to plan.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which VM.
    pub source: SourceSpec,
    /// How the point in time would be taken.
    pub options: SnapshotOptions,
}

/// What would happen.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The VM.
    pub vm: VmIdentity,
    /// Whether it runs now.
    pub running: bool,
    /// The disks that would be read.
    pub disks: Vec<Disk>,
    /// The disks that would not.
    pub excluded: Vec<ExcludedDisk>,
    /// What else of the VM would not be in the point.
    pub not_captured: Vec<NotCaptured>,
    /// Scratch space, for a running VM.
    pub scratch: Option<Scratch>,
    /// What is in the way or weaker than it could be.
    pub problems: Vec<Problem>,
}

/// A disk that would be read.
#[derive(Clone, Debug, Serialize)]
pub struct Disk {
    /// Its name in the VM.
    pub name: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// How it would be read, and why; `None` where that cannot be known now (a problem says why).
    pub read: Option<ReadMode>,
    /// Bytes that would be read, where that can be known without reading.
    pub expected_bytes: Option<u64>,
}

/// Scratch space.
#[derive(Clone, Debug, Serialize)]
pub struct Scratch {
    /// Where.
    #[serde(serialize_with = "crate::job::lossy::path")]
    pub directory: PathBuf,
    /// Most that can be needed.
    pub bytes_max: u64,
    /// Free now.
    pub bytes_free: Option<u64>,
}

/// Something in the way.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// Whether a backup would fail because of it.
    pub fatal: bool,
    /// What it would fail with.
    #[serde(skip)]
    pub kind: Option<Kind>,
    /// What is wrong.
    pub what: String,
    /// The exact next step.
    pub fix: String,
}

/// Plans a backup into `repository`, which may not have been made yet.
pub async fn run(
    repository: Option<&Repository>,
    request: Request,
    (env, control): Surroundings<'_>,
) -> Result<Plan> {
    control.set_phase("looking at the VM");
    let platform = source::platform(&request.source, env).await?;
    let vm = platform.identify().await?;
    let (bases, id, has_key) = match repository {
        Some(repository) => {
            let bases = Bases::read(repository, vm.uuid).await?;
            (bases, repository.id(), repository.has_key())
        }
        None => (Bases::default(), "00000000".to_owned(), false),
    };
    let request = SnapshotRequest {
        mode: BackupMode::Auto,
        point: PointId([0; 16]),
        repository: id,
        known_points: bases.known_points(),
        point_ids: bases.point_ids(),
        repository_has_key: has_key,
        quiesce: request.options.quiesce,
        freeze_budget: request.options.freeze_budget,
        scratch_dir: request.options.scratch_dir,
        exclude_disks: request.options.exclude_disks,
        insecure_tcp: request.options.insecure_tcp,
        guest_first: request.options.guest_first,
        guardian: env.guardian.clone(),
        clock: Arc::clone(&env.clock),
    };
    let plan = control.run(platform.plan(&request)).await?;
    Ok(Plan {
        vm: plan.identity,
        running: plan.running,
        disks: plan
            .disks
            .into_iter()
            .map(|disk| Disk {
                name: disk.description.name,
                size_bytes: disk.description.size_bytes,
                read: disk.read,
                expected_bytes: disk.expected_bytes,
            })
            .collect(),
        excluded: plan.excluded,
        not_captured: plan.not_captured,
        scratch: plan.scratch.map(|scratch| Scratch {
            directory: scratch.directory,
            bytes_max: scratch.bytes_max,
            bytes_free: scratch.bytes_free,
        }),
        problems: plan
            .problems
            .into_iter()
            .map(|p| Problem { fatal: p.fatal.is_some(), kind: p.fatal, what: p.what, fix: p.fix })
            .collect(),
    })
}
