//! Which VM or disk a job reads, as data; and the one place that opens the platform for it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::Env;
use crate::block::BlockSource;
use crate::error::{Error, Result};
use crate::image::{OddEnd, OpenImage, open_image_as};
use crate::nbd::{Client, ClientOptions, NbdUri};
use crate::platform::image::{ImageSource, Images};
use crate::platform::qemu::{Qemu, QemuOptions};
use crate::platform::{Platform, Quiesce};

/// A VM to back up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSpec {
    /// A domain of libvirt.
    Libvirt {
        /// Connection URI.
        uri: String,
        /// Name or UUID.
        domain: String,
    },
    /// A QEMU without libvirt.
    Qemu {
        /// Monitor socket.
        qmp: PathBuf,
        /// Guest agent socket.
        agent: Option<PathBuf>,
        /// What to call it, if not by its own `-name`.
        name: Option<String>,
    },
    /// Images of a stopped VM.
    Images {
        /// What to call it.
        name: String,
        /// The images, in the order of the disks.
        images: Vec<ImageSpec>,
    },
}

/// How a point in time is taken.
#[derive(Clone, Debug)]
pub struct SnapshotOptions {
    /// Freeze guest file systems?
    pub quiesce: Quiesce,
    /// Longest time they stay frozen.
    pub freeze_budget: Duration,
    /// Where scratch files go, if not where the platform puts them.
    pub scratch_dir: Option<PathBuf>,
    /// Disks left out by name.
    pub exclude_disks: Vec<String>,
    /// Allow a plaintext TCP export of the disks.
    pub insecure_tcp: bool,
    /// The snapshot breaks before a write of the guest fails for want of scratch.
    pub guest_first: bool,
}

/// A disk image and its format, which is given and never probed: a guest can forge the header of
/// a raw image into one that names files of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSpec {
    /// The file or block device.
    pub path: PathBuf,
    /// `raw`, `qcow2`, or any other format QEMU reads.
    pub format: String,
}

/// A single disk to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSpec {
    /// The disk inside an image.
    Image(ImageSpec),
    /// An NBD export.
    Nbd(NbdUri),
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Image(image) => write!(f, "{}", image.path.display()),
            Self::Nbd(uri) => write!(f, "{uri}"),
        }
    }
}

/// The platform that speaks for `spec`.
pub(super) async fn platform(spec: &SourceSpec, env: &Env) -> Result<Box<dyn Platform>> {
    match spec {
        #[cfg(feature = "libvirt")]
        SourceSpec::Libvirt { uri, domain } => {
            use crate::platform::libvirt::{CheckpointMetadata, Libvirt, LibvirtOptions};
            let options = LibvirtOptions {
                uri: Some(uri.clone()),
                domain: domain.clone(),
                runtime_dir: env.runtime_dir.clone(),
                journals: env.journals(),
                metadata: CheckpointMetadata::Remove,
            };
            Ok(Box::new(Libvirt::open(options).await?))
        }
        #[cfg(not(feature = "libvirt"))]
        SourceSpec::Libvirt { .. } => {
            use crate::error::Kind;
            Err(Error::new(Kind::Unsupported, "this program was built without libvirt")
                .hint("build it with the cargo feature 'libvirt', or use --qmp or --image"))
        }
        SourceSpec::Qemu { qmp, agent, name } => {
            let (monitor, name) = (qmp.clone(), name.clone());
            // Its user may be another process, in another directory.
            let agent = agent.as_deref().map(absolute).transpose()?;
            let journals = env.journals();
            Ok(Box::new(Qemu::connect(QemuOptions { monitor, agent, name, journals }).await?))
        }
        SourceSpec::Images { name, images } => {
            let source = |image: &ImageSpec| ImageSource {
                path: image.path.clone(),
                format: image.format.clone(),
            };
            let images = Images::new(name, images.iter().map(source).collect())?;
            Ok(Box::new(images.journaled(env.journals())))
        }
    }
}

/// The host that is connected to for `spec`, if that is not this one.
pub(super) fn remote_host(spec: &SourceSpec) -> Option<&str> {
    match spec {
        #[cfg(feature = "libvirt")]
        SourceSpec::Libvirt { uri, .. } => crate::platform::libvirt::remote_host(uri),
        _ => None,
    }
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path)
        .map_err(|error| Error::io(format!("cannot find {}", path.display()), error))
}

/// A single disk that is read.
pub(super) struct OpenDisk {
    pub(super) source: Arc<dyn BlockSource>,
    image: Option<Arc<OpenImage>>,
}

impl OpenDisk {
    /// Fails when an image was written, resized or replaced since it was opened: what was read of it is
    /// no state that it ever had.
    pub(super) async fn still_valid(&self) -> Result<()> {
        match &self.image {
            Some(image) => image.still_valid().await,
            None => Ok(()),
        }
    }
}

/// Opens a single disk for reading.
pub(super) async fn open_disk(spec: &DiskSpec, odd_end: OddEnd) -> Result<OpenDisk> {
    let options = ClientOptions::default();
    Ok(match spec {
        DiskSpec::Nbd(uri) => {
            OpenDisk { source: Arc::new(Client::open_uri(uri, options).await?), image: None }
        }
        DiskSpec::Image(ImageSpec { path, format }) => {
            let image = Arc::new(open_image_as((path, format), odd_end, options).await?);
            OpenDisk { source: image.clone(), image: Some(image) }
        }
    })
}
