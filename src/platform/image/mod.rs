//! Images of a stopped VM: `vmbackup full --image a.qcow2,format=qcow2 --name foo`.
//!
//! Nobody but the user says that these images are one VM, so its identity is derived from the name
//! it is given: the same name is the same VM. A disk is called as its file (without extension).
//! The instant is the moment all images are locked: from then until the end nobody can begin to
//! write them, and no VM that has them can start.
//!
//! Change tracking is a bitmap inside each qcow2 image, named after repository, VM, point and
//! disk; QEMU keeps it up to date whenever the VM runs. Images of other formats are read in full.
//! What the images have in common with stopped VMs of other platforms is in [`crate::image`].

mod checkpoint;
mod plan;
mod reconcile;
mod snapshot;

use std::path::PathBuf;

use async_trait::async_trait;

use super::{Platform, RecoverRequest, SnapshotPlan, SnapshotRequest, VmSnapshot};
use crate::control::Control;
use crate::error::{Error, Kind, Result};
use crate::journal::{Item, Journal, Journals, Recovery};
use crate::vm::{Uuid, VmIdentity};

/// The platform's name in the registry and in identities.
pub const NAME: &str = "image";

/// Derives the identity of a VM from its name (never change it: it would orphan every point).
const IDENTITY_CONTEXT: &str = "vmbackup 2026-11-21 identity of a VM known by images v1";
/// Where Linux tells the name of the host.
const HOSTNAME_FILE: &str = "/proc/sys/kernel/hostname";
/// Longest name of a disk: it is part of the bitmap's (1023 bytes) and of file names (255).
const DISK_NAME_MAX: usize = 200;

/// An image of the VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSource {
    /// The file.
    pub path: PathBuf,
    /// Its format, never probed.
    pub format: String,
}

/// A VM known by its images.
pub struct Images {
    name: String,
    disks: Vec<ImageDisk>,
    journals: Option<Journals>,
}

/// An image with the name of its disk.
#[derive(Clone, Debug)]
struct ImageDisk {
    name: String,
    source: ImageSource,
}

impl Images {
    /// The VM `name` with these images. Reads nothing.
    pub fn new(name: &str, images: Vec<ImageSource>) -> Result<Self> {
        if name.is_empty() || images.is_empty() {
            return Err(Error::new(Kind::Usage, "a VM known by images needs a name and an image"));
        }
        let mut disks: Vec<ImageDisk> = Vec::new();
        for source in images {
            let name = disk_name(&source)?;
            let named = |disk: &&ImageDisk| disk.name == name;
            if let Some(first) = disks.iter().find(named) {
                let (first, second) = (first.source.path.display(), source.path.display());
                let message = format!("{first} and {second} would both be called disk '{name}'");
                return Err(Error::new(Kind::Usage, message)
                    .hint("disks are called as their files without extension: rename one, or give a link to it that has another name"));
            }
            disks.push(ImageDisk { name, source });
        }
        Ok(Self { name: name.to_owned(), disks, journals: None })
    }

    /// The same, with a place where it is written down what a run has to undo.
    #[must_use]
    pub fn journaled(self, journals: Journals) -> Self {
        Self { journals: Some(journals), ..self }
    }

    /// Its journal, if there is a place for it.
    fn journal(&self) -> Result<Option<Journal>> {
        self.journals.as_ref().map(|journals| journals.open(self.uuid())).transpose()
    }

    fn uuid(&self) -> Uuid {
        let hash = blake3::derive_key(IDENTITY_CONTEXT, self.name.as_bytes());
        let bytes: [u8; 16] = hash[..16].try_into().expect("half of a hash");
        uuid::Builder::from_custom_bytes(bytes).into_uuid()
    }
}

/// The file's name without its extension.
fn disk_name(source: &ImageSource) -> Result<String> {
    let stem = source.path.file_stem().and_then(|stem| stem.to_str());
    let usable = |stem: &&str| {
        !stem.starts_with('.') && stem.len() <= DISK_NAME_MAX && !stem.contains(char::is_control)
    };
    stem.filter(usable).map(str::to_owned).ok_or_else(|| {
        let message = format!("no disk can be called as {}", source.path.display());
        Error::new(Kind::Usage, message).hint("give the file a plain name, or a link with one")
    })
}

#[async_trait]
impl Platform for Images {
    async fn identify(&self) -> Result<VmIdentity> {
        let host = std::fs::read_to_string(HOSTNAME_FILE)
            .map_err(|e| Error::io("cannot read the name of this host", e))?;
        Ok(VmIdentity {
            uuid: self.uuid(),
            name: self.name.clone(),
            host: host.trim().to_owned(),
            platform: NAME.to_owned(),
        })
    }

    async fn plan(&self, request: &SnapshotRequest) -> Result<SnapshotPlan> {
        plan::plan(self, request).await
    }

    async fn recover(&self, request: &RecoverRequest, control: &Control) -> Result<Vec<Item>> {
        control.set_phase("looking at the images");
        let mut recovery = Recovery::new(request.mode);
        reconcile::reconcile(self, request, &mut recovery).await?;
        Ok(recovery.into_items())
    }

    async fn open_snapshot(
        &self,
        request: &SnapshotRequest,
        control: &Control,
    ) -> Result<Box<dyn VmSnapshot>> {
        Ok(Box::new(snapshot::ImageSnapshot::open(self, request, control).await?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn images(name: &str, paths: &[&str]) -> Result<Images> {
        let source =
            |path: &&str| ImageSource { path: PathBuf::from(path), format: "qcow2".to_owned() };
        Images::new(name, paths.iter().map(source).collect())
    }

    #[test]
    fn the_same_name_is_the_same_vm() {
        let uuid = |name| images(name, &["a.qcow2"]).unwrap().uuid();
        assert_eq!(uuid("foo"), uuid("foo"));
        assert_ne!(uuid("foo"), uuid("bar"));
        // Golden: it is in manifests and in bitmap names.
        assert_eq!(uuid("foo").to_string(), GOLDEN_FOO);
    }

    const GOLDEN_FOO: &str = "ffec1480-721e-8f40-a928-3f57f5d39f73";

    #[test]
    fn two_disks_of_one_name_are_refused() {
        let error = images("foo", &["/a/disk.qcow2", "/b/disk.raw"]).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(images("foo", &["/a/disk.qcow2", "/b/data.raw"]).is_ok());
        assert!(images("", &["/a"]).is_err() && images("foo", &[]).is_err());
    }
}
