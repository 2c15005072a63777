//! Manifests: what a restore point is.
//!
//! A manifest is JSON, sealed as one object under `points/<domain>/<sequence>-<point>`. It holds
//! everything a restore needs but the content itself, of which it names the trees.

use serde::{Deserialize, Serialize};

use super::writer::{StoredDisk, WriteStats};
use crate::clock::Timestamp;
use crate::vm::{
    ArtifactKind, Audit, DiskDescription, ExcludedDisk, NotCaptured, PointId, Quiescence, ReadMode,
    VmIdentity,
};

/// A restore point, complete in itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its id, which the checkpoint carries too.
    pub point: PointId,
    /// Its place among the points of its domain: they are ordered by this, not by clocks.
    pub sequence: u64,
    /// Everything else.
    #[serde(flatten)]
    pub body: ManifestDraft,
}

/// What a backup knows when it is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestDraft {
    /// Which VM.
    pub vm: VmIdentity,
    /// When the point in time was taken (UTC, by the controller's clock).
    pub taken: Timestamp,
    /// When the backup was complete.
    pub finished: Timestamp,
    /// Consistency achieved.
    pub quiescence: Quiescence,
    /// The disks.
    pub disks: Vec<ManifestDisk>,
    /// Disks of the VM that are not in the point.
    pub excluded: Vec<ExcludedDisk>,
    /// What could not be captured.
    pub not_captured: Vec<NotCaptured>,
    /// Domain description, firmware variables and the like.
    pub artifacts: Vec<ManifestArtifact>,
    /// The program that made it.
    pub program: String,
}

/// A disk of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestDisk {
    /// What it was.
    pub description: DiskDescription,
    /// How it was read, and why.
    pub read: ReadMode,
    /// The audit of its dirty bitmap, if one was used.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub audit: Option<Audit>,
    /// Its content.
    pub stored: StoredDisk,
    /// Bytes read from the source.
    pub read_bytes: u64,
    /// What became of them.
    pub stats: WriteStats,
}

/// An artefact of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestArtifact {
    /// What it is.
    pub kind: ArtifactKind,
    /// The path it was read from.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub origin: Option<String>,
    /// Its content.
    pub stored: StoredDisk,
}
