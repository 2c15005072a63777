//! What a VM and its restore points are called and described by, whatever the platform.
//!
//! Plain data: everything here goes into manifests (sealed) and `--json`, so names are the field's
//! and every variant has a stable serialised name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
pub use uuid::Uuid;

use crate::error::{Error, Kind};

/// Identifies a restore point: 128 random bits, written as 32 hex digits, named by any prefix.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PointId(pub [u8; 16]);

impl PointId {
    /// The first eight hex digits, as lists show it.
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl fmt::Display for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PointId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::new(Kind::Usage, format!("'{text}' is not a point id (32 hex digits)"));
        if text.len() != 32 || !text.is_ascii() {
            return Err(bad());
        }
        let mut id = [0; 16];
        for (byte, pair) in id.iter_mut().zip(text.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
        }
        Ok(Self(id))
    }
}

impl Serialize for PointId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PointId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        text.parse().map_err(|_| serde::de::Error::custom("a point id is 32 hex digits"))
    }
}

/// Which VM: its UUID is its identity, name and host are what it was seen as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmIdentity {
    /// The domain's UUID; for a VM known by images only, derived from the name it was given.
    pub uuid: Uuid,
    /// The domain's name at the time.
    pub name: String,
    /// The host it was seen on.
    pub host: String,
    /// Which platform yielded it (`libvirt`, `qemu`, `image`): a registry name.
    pub platform: String,
}

/// How consistent the disks of a point are with each other and with the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Consistency {
    /// The guest agent froze every file system around the instant, within the budget.
    Filesystem,
    /// One instant for all disks, as after a power cut.
    Crash,
    /// The VM was stopped; its images were read under a lock.
    Stopped,
}

/// What was achieved around the instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quiescence {
    /// The level.
    pub level: Consistency,
    /// How long guest file systems were frozen, if they were.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub frozen_ms: Option<u64>,
    /// Why the level is lower than asked for, if it is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}

/// How a disk was read for a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "kebab-case")]
pub enum ReadMode {
    /// Only what changed since `base`, by dirty bitmap.
    Incremental {
        /// The point the bitmap began at.
        base: PointId,
    },
    /// Everything, for `reason`.
    Full {
        /// Why.
        reason: FullReason,
    },
}

/// Why a disk had to be read in full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FullReason {
    /// The user asked for a full backup.
    Requested,
    /// No point of this domain is in this repository.
    FirstBackup,
    /// No point of this domain holds this disk.
    NewDisk,
    /// The disk's size differs from the base's.
    Resized,
    /// The disk's image is not the one the base was read from, so its bitmaps say nothing of the
    /// base: another file is in its place, or it changed places with another disk.
    ImageReplaced,
    /// No bitmap of ours that names a point of this repository is on the disk.
    BitmapMissing,
    /// The bitmap was not closed properly (crash, power cut).
    BitmapInconsistent,
    /// The bitmap was disabled at some time: writes may be missing from it.
    BitmapNotRecording,
    /// The bitmap is not in every layer of the backing chain since the base.
    BitmapNotInChain,
    /// The image format cannot hold bitmaps (raw under libvirt, qcow2 v2).
    FormatWithoutBitmaps,
    /// The disk is shared with another writer that the bitmap does not see.
    Shareable,
    /// The bitmap was found to miss changes.
    BitmapDistrusted,
    /// The base is damaged in the repository: what did not change cannot be taken from it.
    BaseDamaged,
    /// The platform has no change tracking for this disk.
    NoChangeTracking,
}

impl FullReason {
    /// The reason as a person reads it in a list.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Requested => "asked for",
            Self::FirstBackup => "first backup of this domain here",
            Self::NewDisk => "new disk",
            Self::Resized => "size changed",
            Self::ImageReplaced => "another image than at the last point",
            Self::BitmapMissing => "no bitmap of a point in this repository",
            Self::BitmapInconsistent => "bitmap inconsistent (not closed properly)",
            Self::BitmapNotRecording => "bitmap was not recording",
            Self::BitmapNotInChain => "bitmap missing in a layer of the chain",
            Self::FormatWithoutBitmaps => "image format cannot hold bitmaps",
            Self::Shareable => "shared disk",
            Self::BitmapDistrusted => "bitmap missed changes",
            Self::BaseDamaged => "base damaged in the repository",
            Self::NoChangeTracking => "no change tracking for this disk",
        }
    }
}

/// A look at blocks that a dirty bitmap called clean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Decides, with the disk, which chunks were looked at.
    pub seed: u32,
    /// How many.
    pub chunks: u64,
    /// Offset of the first that was not as in the base: the bitmap was wrong.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub differs_at: Option<u64>,
}

/// Which layer of an encrypted disk the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskLayer {
    /// What the guest sees.
    Plain,
    /// What the guest sees, decrypted by QEMU from a LUKS image: the repository must have a key.
    DecryptedLuks,
}

/// A disk of a VM at a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskDescription {
    /// Target name in the VM (`vda`); unique per VM.
    pub name: String,
    /// Virtual size.
    pub size_bytes: u64,
    /// Format of its image (`qcow2`, `raw`), never probed.
    pub format: String,
    /// Where it was (`/var/lib/libvirt/images/a.qcow2`, `rbd:pool/image`): the active layer.
    pub origin: String,
    /// Which layer was read.
    pub layer: DiskLayer,
    /// The file behind `origin`, if it is a regular file of the host and its bitmaps do not carry
    /// the disk's name: what tells whether a bitmap in it began with this disk's base.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub file: Option<FileId>,
}

/// Which file a path leads to, for as long as the file lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Number of its file system (`st_dev`).
    pub device: u64,
    /// Its number there (`st_ino`).
    pub inode: u64,
    /// When it was created, in nanoseconds since 1970, where the file system tells.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub created_ns: Option<u64>,
}

/// A layer of a disk, as far as it can be recognised again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageId {
    /// Where it is.
    pub origin: String,
    /// The file there, if that is known.
    pub file: Option<FileId>,
}

impl DiskDescription {
    /// The active layer.
    pub fn image(&self) -> ImageId {
        ImageId { origin: self.origin.clone(), file: self.file }
    }
}

impl ImageId {
    /// Whether this is the image `other` was, so that a bitmap that began in `other` is this one's.
    ///
    /// - The inode must be the same: a copy, a restore or a migration makes another file.
    /// - The time of creation must be, too: ext4 gives the inode of a removed file to the next one
    ///   (`rm a; cp b a`). Where it is not told, place or file system have to be the same.
    /// - The number of the file system need not be: device mapper, btrfs and NFS hand out new ones at
    ///   a boot or mount, and reading everything after each boot would be the wrong price for a
    ///   number that says nothing about the file.
    /// - The path need not be either: a file that was moved is still the file.
    ///
    /// Where one side has no file (points of earlier versions, other hosts, block devices, whose
    /// nodes are made anew at each boot), the place alone is compared.
    pub fn is(&self, other: &Self) -> bool {
        let same_place = self.origin == other.origin;
        let (Some(file), Some(was)) = (self.file, other.file) else { return same_place };
        let same_birth = match (file.created_ns, was.created_ns) {
            (Some(now), Some(then)) => now == then,
            _ => same_place || file.device == was.device,
        };
        file.inode == was.inode && same_birth
    }
}

/// A disk of the VM that is not part of the point, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExcludedDisk {
    /// Target name (`sda`).
    pub name: String,
    /// Why, in a few words ("CD-ROM", "excluded by option").
    pub reason: String,
}

/// What else of the VM a point holds besides disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ArtifactKind {
    /// Domain XML of the running domain, with secrets.
    DomainXmlLive,
    /// Persistent domain XML, with secrets.
    DomainXmlInactive,
    /// UEFI variable store.
    Nvram,
    /// TPM state (only stored in a repository with a key).
    TpmState,
    /// Kernel of a direct boot.
    Kernel,
    /// Initial RAM disk of a direct boot.
    Initrd,
    /// Checkpoint XML of this point, to redefine it before the next run.
    CheckpointXml,
}

impl fmt::Display for ArtifactKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DomainXmlLive => "description of the running domain",
            Self::DomainXmlInactive => "description of the domain",
            Self::Nvram => "NVRAM",
            Self::TpmState => "TPM state",
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
            Self::CheckpointXml => "description of the checkpoint",
        })
    }
}

/// An artefact and its bytes, as a platform yields it.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// What it is.
    pub kind: ArtifactKind,
    /// The path it was read from, if it was a file.
    pub origin: Option<String>,
    /// The content; bounded by the platform that read it.
    pub bytes: Vec<u8>,
}

/// What could not be captured, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotCaptured {
    /// The thing ("NVRAM /var/lib/libvirt/qemu/nvram/foo_VARS.fd").
    pub what: String,
    /// Why and the next step.
    pub reason: String,
}
