//! Where VMs are: the contract of a platform, and the registry.
//!
//! A [`Platform`] speaks for one VM. It yields a [`VmSnapshot`]: all protected disks at one
//! instant, each as a [`BlockSource`](crate::block::BlockSource). The snapshot is a two-sided transaction: what
//! opens reaches [`VmSnapshot::commit`] (the new checkpoint is kept, bases that are no longer
//! needed are dropped) or [`VmSnapshot::abort`] (nothing of this run remains, the old checkpoints
//! are as they were).
//!
//! ```text
//!  identify ──► plan                              (nothing is changed)
//!     └──────► open_snapshot ──► source(i)… ──► still_valid ──► [manifest durable] ──► commit
//!                   │                 │              │
//!                   └── error         └── error ─────┴──────────────────────────────► abort
//! ```
//!
//! `open_snapshot` cleans up after itself when it fails. `still_valid` is asked after the last
//! read and before the manifest: NBD success alone proves nothing (reference: QEMU keeps serving
//! *live* data from the export of an ended `sync=none` job).
//!
//! A platform never sees the repository: what it needs to know of it is in [`SnapshotRequest`].
//! Sibling folders have the same inner file names where they have the part: `mod.rs` (the
//! platform), `snapshot.rs`, `plan.rs`, `checkpoint.rs`, `restore.rs`.

mod apart;
mod base;
pub mod image;
#[cfg(feature = "libvirt")]
pub mod libvirt;
mod noted;
pub mod qemu;
#[cfg(test)]
pub(crate) mod simulated;
mod space;
mod written;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::block::BlockSource;
use crate::clock::{Clock, Timestamp};
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::journal::{Action, Item, Mode, Recovery};
use crate::vm::{
    Artifact, DiskDescription, ExcludedDisk, NotCaptured, PointId, Quiescence, ReadMode, VmIdentity,
};

pub(crate) use noted::{remove_noted, work_in};
pub(crate) use space::{look, takes_writes};

/// One VM on one platform.
#[async_trait]
pub trait Platform: Send + Sync {
    /// Which VM this is. Changes nothing.
    async fn identify(&self) -> Result<VmIdentity>;

    /// What [`Platform::open_snapshot`] would do, and what is in its way. Changes nothing.
    async fn plan(&self, request: &SnapshotRequest) -> Result<SnapshotPlan>;

    /// Undoes what runs that were killed have left, or looks for it; nothing of anybody else's is
    /// touched. What [`Platform::open_snapshot`] begins with.
    ///
    /// [`Kind::Busy`] when a run is under way. Not cancel-safe.
    async fn recover(&self, request: &RecoverRequest, control: &Control) -> Result<Vec<Item>>;

    /// Takes the point in time of all protected disks.
    ///
    /// Fails with [`Kind::NoBase`](crate::error::Kind::NoBase) for [`BackupMode::Incremental`] when
    /// no disk can be read incrementally. Not cancel-safe: it watches `control` itself and undoes
    /// what it did before it returns.
    async fn open_snapshot(
        &self,
        request: &SnapshotRequest,
        control: &Control,
    ) -> Result<Box<dyn VmSnapshot>>;
}

/// A VM's disks at one instant.
///
/// Not cancel-safe unless said: the caller finishes what it awaits, then aborts.
#[async_trait]
pub trait VmSnapshot: Send {
    /// The disks in the order of the VM's description, with how each is to be read.
    fn disks(&self) -> &[SnapshotDisk];

    /// Disks that are not part of the snapshot.
    fn excluded(&self) -> &[ExcludedDisk];

    /// The instant: read just before the platform was asked for it, so that all that was written
    /// by then is in the snapshot.
    fn taken(&self) -> Timestamp;

    /// What was achieved around the instant.
    fn quiescence(&self) -> &Quiescence;

    /// Domain description, firmware variables and the like, as of the instant.
    fn artifacts(&self) -> &[Artifact];

    /// What should have been captured and could not be.
    fn not_captured(&self) -> &[NotCaptured];

    /// Opens disk `index` of [`VmSnapshot::disks`]. Its extents say Unchanged only when the disk
    /// is read incrementally.
    async fn source(&mut self, index: usize) -> Result<Arc<dyn BlockSource>>;

    /// `Ok` only if the instant held until now; [`Kind::SnapshotLost`](crate::error::Kind::SnapshotLost)
    /// otherwise. Called after the last read. Cancel-safe.
    async fn still_valid(&mut self) -> Result<()>;

    /// Ends the snapshot and keeps its checkpoint as the base of the next incremental; drops
    /// checkpoints of ours (same repository, same domain) that are older. The manifest is durable
    /// when this is called; an error here costs at most a full read next time and is reported so.
    async fn commit(self: Box<Self>) -> Result<()>;

    /// Ends the snapshot and removes its checkpoint; the base's is untouched.
    async fn abort(self: Box<Self>) -> Result<()>;
}

/// What a backup asks of a platform.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    /// Full, incremental, or whichever is possible.
    pub mode: BackupMode,
    /// The point being made; its id is in the name of the new checkpoint.
    pub point: PointId,
    /// The repository's id: eight hex digits of it are in the name of every checkpoint.
    pub repository: String,
    /// The newest points of this domain in the repository, newest first: what an incremental may
    /// build on.
    pub known_points: Vec<KnownPoint>,
    /// Ids of all its points there, older ones and those with an unreadable manifest included: the
    /// bitmap of a point that exists is not a leftover, even if nothing can be built on it now.
    pub point_ids: HashSet<PointId>,
    /// Whether the repository has a key: without one, TPM state and LUKS disks are refused.
    pub repository_has_key: bool,
    /// Freeze guest file systems?
    pub quiesce: Quiesce,
    /// Longest time guest file systems stay frozen; thawed then whatever happened.
    pub freeze_budget: Duration,
    /// Where scratch files go; the platform's own choice if not given. Local, writable by QEMU.
    pub scratch_dir: Option<PathBuf>,
    /// Disks left out by name. A name the VM does not have is an error.
    pub exclude_disks: Vec<String>,
    /// Allow a plaintext TCP export of the disks where nothing else reaches the host.
    pub insecure_tcp: bool,
    /// Whether the snapshot has to break before a write of the guest fails, or waits for long,
    /// because scratch is full. A platform that cannot promise it refuses.
    pub guest_first: bool,
    /// The program that becomes a freeze guardian when started as `PROGRAM guardian`; without one
    /// the guardian is a thread and ends with this process.
    pub guardian: Option<PathBuf>,
    /// What [`VmSnapshot::taken`] is read from.
    pub clock: Arc<dyn Clock>,
}

impl SnapshotRequest {
    /// Whether the repository has this point of the domain.
    pub fn exists(&self, point: PointId) -> bool {
        self.point_ids.contains(&point) || self.known_points.iter().any(|known| known.id == point)
    }
}

/// What is asked of [`Platform::recover`].
#[derive(Clone, Debug)]
pub struct RecoverRequest {
    /// The repository and what a snapshot would be asked for with.
    pub snapshot: SnapshotRequest,
    /// Whether the repository could be asked for its points. If not, bitmaps and checkpoints stay.
    pub repository: Asked,
    /// Whether anything is changed.
    pub mode: Mode,
}

/// Whether the repository could be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Its points are in the request.
    Yes,
    /// Not yet: what has nothing to do with it comes first, and the same is asked again.
    Later,
    /// Nothing is known of its points.
    No,
}

/// Tells the person who watches what a reconciliation did.
pub(crate) fn tell(items: Vec<Item>, control: &Control) {
    for Item { action, what } in items {
        let (level, text) = match action {
            Action::Undone => {
                (NoticeLevel::Info, format!("undone, an earlier run had left it: {what}"))
            }
            Action::Adopted => {
                (NoticeLevel::Info, format!("taken over from an earlier run: {what}"))
            }
            Action::Kept => (NoticeLevel::Warning, format!("left by an earlier run: {what}")),
        };
        control.notice(level, text);
    }
}

/// What a recovery found, or its error: what it has done by then is told.
pub(crate) fn told(done: Result<()>, found: Recovery, control: &Control) -> Result<Vec<Item>> {
    if let Err(error) = done {
        if found.changes() {
            tell(found.into_items(), control);
        }
        return Err(error);
    }
    Ok(found.into_items())
}

/// How a backup was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupMode {
    /// Read every disk in full.
    Full,
    /// Fail when there is nothing to build on.
    Incremental,
    /// Incremental where possible, each disk for itself.
    Auto,
}

/// Whether guest file systems are frozen around the instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quiesce {
    /// Where an agent answers; else crash consistent, with the reason recorded.
    Auto,
    /// Fail without it.
    Require,
    /// Crash consistent.
    Never,
}

/// A point of the domain that is in the repository.
#[derive(Clone, Debug)]
pub struct KnownPoint {
    /// Its id, as bitmap names carry it.
    pub id: PointId,
    /// Its disks as they were then.
    pub disks: Vec<DiskDescription>,
    /// The checkpoint XML recorded with it, to redefine it with.
    pub checkpoint_xml: Option<String>,
}

/// A disk of a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotDisk {
    /// What it is.
    pub description: DiskDescription,
    /// How it is to be read, and why.
    pub read: ReadMode,
}

/// Why a disk is not part of a point that was left out by name.
const EXCLUDED_BY_OPTION: &str = "excluded by option";

/// The error of a VM of which no disk is left to back up.
fn nothing_to_read(vm: &str, excluded: &[ExcludedDisk]) -> Error {
    if excluded.iter().any(|disk| disk.reason == EXCLUDED_BY_OPTION) {
        let names: Vec<&str> = excluded.iter().map(|disk| disk.name.as_str()).collect();
        let message = format!("every disk of VM '{vm}' is left out: {}", names.join(", "));
        return Error::new(Kind::Usage, message)
            .hint("give --exclude-disk for those only that are not to be in the point");
    }
    Error::new(Kind::Unsupported, format!("VM '{vm}' has no disk to back up"))
        .hint("CD-ROMs, floppies and read-only disks are not backed up; attach a disk first")
}

/// What would happen, disk by disk.
#[derive(Clone, Debug)]
pub struct SnapshotPlan {
    /// The VM.
    pub identity: VmIdentity,
    /// Whether it runs now.
    pub running: bool,
    /// The disks that would be read.
    pub disks: Vec<PlannedDisk>,
    /// The disks that would not.
    pub excluded: Vec<ExcludedDisk>,
    /// What else of the VM would not be in the point, as of now.
    pub not_captured: Vec<NotCaptured>,
    /// Where scratch would go and what it needs at most, for a running VM.
    pub scratch: Option<ScratchPlan>,
    /// What is in the way or weaker than it could be, each with the exact fix.
    pub problems: Vec<Problem>,
}

/// A disk in a plan.
#[derive(Clone, Debug)]
pub struct PlannedDisk {
    /// What it is.
    pub description: DiskDescription,
    /// How it would be read, and why; `None` where that cannot be known now (a problem says why).
    pub read: Option<ReadMode>,
    /// Bytes that would be read, as far as it can be known without reading.
    pub expected_bytes: Option<u64>,
}

/// Scratch space of a plan.
#[derive(Clone, Debug)]
pub struct ScratchPlan {
    /// The directory.
    pub directory: PathBuf,
    /// Most that can be needed: everything the guest can overwrite.
    pub bytes_max: u64,
    /// Free now.
    pub bytes_free: Option<u64>,
}

/// Something a plan found.
#[derive(Clone, Debug)]
pub struct Problem {
    /// What a backup would fail with because of it; `None` for a weakness.
    pub fatal: Option<Kind>,
    /// What is wrong.
    pub what: String,
    /// The exact next step.
    pub fix: String,
}

impl Problem {
    /// What makes a backup fail with `error`.
    fn fatal(error: &Error) -> Self {
        let fix = error.hint_text().unwrap_or("see the message").to_owned();
        Self { fatal: Some(error.kind()), what: error.to_string(), fix }
    }
}
