//! Everything known of one point.

use serde::Serialize;

use super::{Env, Repository, points};
use crate::clock::Timestamp;
use crate::content::ContentRoot;
use crate::error::Result;
use crate::vm::{
    ArtifactKind, Audit, DiskLayer, ExcludedDisk, NotCaptured, PointId, Quiescence, ReadMode,
    VmIdentity,
};

/// A point.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// Its id.
    pub id: PointId,
    /// Its VM.
    pub vm: VmIdentity,
    /// The instant.
    pub time: Timestamp,
    /// What was achieved around the instant.
    pub quiescence: Quiescence,
    /// Its disks.
    pub disks: Vec<Disk>,
    /// Disks that are not part of it.
    pub excluded: Vec<ExcludedDisk>,
    /// What else it holds.
    pub artifacts: Vec<Artifact>,
    /// What should have been captured and could not be.
    pub not_captured: Vec<NotCaptured>,
}

/// A disk of a point.
#[derive(Clone, Debug, Serialize)]
pub struct Disk {
    /// Its name in the VM.
    pub name: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// Format of its image.
    pub format: String,
    /// Where it was.
    pub origin: String,
    /// Which layer was read.
    pub layer: DiskLayer,
    /// How it was read, and why.
    pub read: ReadMode,
    /// The audit of its dirty bitmap, if one was used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<Audit>,
    /// Bytes read from the VM.
    pub read_bytes: u64,
    /// Bytes it added to the repository.
    pub stored_bytes: u64,
    /// What it holds.
    pub content_root: ContentRoot,
}

/// Something a point holds besides disks.
#[derive(Clone, Debug, Serialize)]
pub struct Artifact {
    /// What it is.
    pub kind: ArtifactKind,
    /// The path it was read from.
    pub origin: Option<String>,
    /// Its size.
    pub size_bytes: u64,
}

impl Artifact {
    /// What a person calls it.
    pub fn name(&self) -> &'static str {
        match self.kind {
            ArtifactKind::DomainXmlLive => "domain XML (live)",
            ArtifactKind::DomainXmlInactive => "domain XML (persistent)",
            ArtifactKind::Nvram => "UEFI variables",
            ArtifactKind::TpmState => "TPM state",
            ArtifactKind::Kernel => "kernel",
            ArtifactKind::Initrd => "initial RAM disk",
            ArtifactKind::CheckpointXml => "checkpoint XML",
        }
    }
}

/// The point that `name` names.
pub async fn run(repository: &Repository, name: &str, env: &Env) -> Result<Point> {
    let manifest = points::manifest(repository, name, env).await?;
    Ok(points::point(&manifest))
}
