//! Checkpoints: which bitmap each disk's incremental can build on, and keeping libvirt's records
//! of them out of everybody's way.
//!
//! A checkpoint of ours is a bitmap on each tracked disk, named as in [`super::names`]. libvirt
//! needs *metadata* for a checkpoint to use it, and refuses to undefine a domain that has any; so
//! the metadata is made again before a run (redefine) and removed after it (metadata only). The
//! bitmaps stay in the images, where they belong to the disk.
//!
//! libvirt shows no bitmap flags. Whether a bitmap is there, consistent, recording and in every
//! layer of the chain is asked by redefining its checkpoint with
//! `VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE` (`qemuBlockBitmapChainIsValid`), for each disk
//! by itself when not all pass together.
//!
//! Foreign checkpoints and bitmaps, other repositories' included, are never touched.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use virt::error::ErrorNumber;
use virt::sys;

use super::connection::DomainHandle;
use super::disks::Disk;
use super::error::code;
use super::ffi;
use super::xml::{Element, escaped};
use crate::error::{Error, Kind, Result};
use crate::image::bitmap::BitmapNames;
use crate::platform::{BackupMode, KnownPoint, SnapshotRequest, base};
use crate::vm::{DiskDescription, FullReason, PointId, ReadMode};

/// Known points whose bitmaps are looked for: after each commit only the newest has any, older
/// ones only where dropping them failed or a disk was left out for a while.
const CANDIDATES_MAX: usize = 8;

/// A protected disk with its current size.
#[derive(Clone, Debug)]
pub(super) struct SizedDisk {
    pub(super) disk: Disk,
    pub(super) size_bytes: u64,
    /// Bytes allocated, as far as libvirt can tell.
    pub(super) allocation_bytes: u64,
}

impl SizedDisk {
    /// How manifests describe it.
    pub(super) fn describe(&self) -> DiskDescription {
        DiskDescription {
            name: self.disk.name.clone(),
            size_bytes: self.size_bytes,
            format: self.disk.format.clone(),
            origin: self.disk.image().origin.clone(),
            layer: self.disk.layer,
            file: self.disk.image().file,
        }
    }
}

/// How a read is recorded.
pub(super) fn read_mode(read: Result<PointId, FullReason>) -> ReadMode {
    match read {
        Ok(base) => ReadMode::Incremental { base },
        Err(reason) => ReadMode::Full { reason },
    }
}

/// What was found out about the bases of all disks.
#[derive(Debug, Default)]
pub(super) struct Bases {
    /// By disk: the point to read the changes since, or why there is none.
    pub(super) disks: BTreeMap<String, Result<PointId, FullReason>>,
    /// Points that were looked at: the metadata of those with a bitmap is defined now.
    pub(super) defined: Vec<PointId>,
}

impl Bases {
    /// How `disk` is read in a backup of `mode`.
    pub(super) fn read(&self, disk: &str, mode: BackupMode) -> Result<PointId, FullReason> {
        if mode == BackupMode::Full {
            return Err(FullReason::Requested);
        }
        self.disks.get(disk).copied().unwrap_or(Err(FullReason::BitmapMissing))
    }
}

/// The XML of a checkpoint: every disk of the domain is named, so that nothing is left to
/// defaults. `created` is the creation time in seconds, which a redefinition must state.
pub(super) fn checkpoint_xml(
    name: &str,
    all: &[String],
    tracked: &[&str],
    created: Option<u64>,
) -> String {
    let mut xml = format!("<domaincheckpoint><name>{}</name>", escaped(name));
    if let Some(created) = created {
        write!(xml, "<creationTime>{created}</creationTime>").expect("a string takes text");
    }
    xml.push_str("<disks>");
    for disk in all {
        let disk_name = escaped(disk);
        if tracked.contains(&disk.as_str()) {
            let bitmap = escaped(name);
            write!(xml, "<disk name='{disk_name}' checkpoint='bitmap' bitmap='{bitmap}'/>")
        } else {
            write!(xml, "<disk name='{disk_name}' checkpoint='no'/>")
        }
        .expect("a string takes text");
    }
    xml.push_str("</disks></domaincheckpoint>");
    xml
}

/// The points whose bitmap may serve `disk`, newest first; or why there is none. Pure.
///
/// A point counts whose image is a layer of the disk now: what came above it since (an external
/// snapshot) holds only changes, and libvirt demands the bitmap in each of these layers. That is
/// also what it does itself: it gives the overlay of a snapshot the bitmaps of the layer below.
fn candidates(disk: &SizedDisk, known: &[KnownPoint]) -> Result<Vec<PointId>, FullReason> {
    if let Some(reason) = disk.disk.untracked {
        return Err(reason);
    }
    base::candidates((&disk.disk.name, disk.size_bytes), known, |was| {
        disk.disk.layers.iter().any(|layer| layer.is(&was.image()))
    })
}

/// Checkpoints of one chain on one running domain.
pub(super) struct Checkpoints<'a> {
    pub(super) domain: &'a DomainHandle,
    pub(super) chain: &'a BitmapNames,
    /// All target names of the domain.
    pub(super) all: &'a [String],
}

impl Checkpoints<'_> {
    /// Finds the base of every disk. Leaves the metadata of the points in [`Bases::defined`]
    /// defined; whoever calls removes it, also after an error.
    ///
    /// A disk that libvirt copied into another image, on this host or to it, has the bitmap there, too,
    /// though nowhere but in the memory of QEMU. It is no base: a bitmap of that name in an image which
    /// was an overlay began with the overlay, later than the point. But it is looked for, so that it goes with
    /// the point's metadata.
    pub(super) async fn find_bases(
        &self,
        disks: &[SizedDisk],
        request: &SnapshotRequest,
        bases: &mut Bases,
    ) -> Result<()> {
        let mut wanted = BTreeMap::new();
        let mut copied = Vec::new();
        for disk in disks {
            let name = disk.disk.name.as_str();
            match candidates(disk, &request.known_points) {
                Ok(points) => drop(wanted.insert(name, points)),
                Err(reason) => {
                    if reason == FullReason::ImageReplaced {
                        copied.push(name);
                    }
                    bases.disks.insert(name.to_owned(), Err(reason));
                }
            }
        }
        for point in request.known_points.iter().take(CANDIDATES_MAX) {
            let open = wanted.iter().filter(|(_, points)| points.contains(&point.id));
            let asked: Vec<&str> = open.map(|(name, _)| *name).chain(copied.clone()).collect();
            if asked.is_empty() {
                continue;
            }
            for name in self.validate(point, &asked, bases).await? {
                if wanted.remove(name).is_some() {
                    bases.disks.insert(name.to_owned(), Ok(point.id));
                }
                copied.retain(|other| *other != name);
            }
        }
        for (name, _) in wanted {
            bases.disks.insert(name.to_owned(), Err(FullReason::BitmapMissing));
        }
        Ok(())
    }

    /// Which of `disks` have a usable bitmap of `point`; its metadata is left defined for those.
    async fn validate<'d>(
        &self,
        point: &KnownPoint,
        disks: &[&'d str],
        bases: &mut Bases,
    ) -> Result<Vec<&'d str>> {
        // Before the first attempt: whatever happens from here on is then cleaned up.
        bases.defined.push(point.id);
        if self.redefine(point, disks, Check::Validate).await? {
            return Ok(disks.to_vec());
        }
        if disks.len() == 1 {
            return Ok(Vec::new());
        }
        let mut valid = Vec::new();
        for disk in disks {
            if self.redefine(point, &[*disk], Check::Validate).await? {
                valid.push(*disk);
            }
        }
        if !valid.is_empty() {
            // The last redefinition named one disk only.
            self.redefine(point, &valid, Check::Trust).await?;
        }
        Ok(valid)
    }

    /// Defines the metadata of `point` for `disks`; `false` when libvirt says that they do not fit.
    pub(super) async fn redefine(
        &self,
        point: &KnownPoint,
        disks: &[&str],
        check: Check,
    ) -> Result<bool> {
        let name = self.chain.of_point(point.id);
        let created = point.checkpoint_xml.as_deref().and_then(creation_time).unwrap_or(1);
        let xml = checkpoint_xml(&name, self.all, disks, Some(created));
        let mut flags = sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE;
        if check == Check::Validate {
            flags |= sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE;
        }
        let what = "redefine a checkpoint of";
        let outcome = self
            .domain
            .raw_call(what, move |domain| ffi::Checkpoint::create(domain, &xml, flags).map(drop))
            .await?;
        match outcome {
            Ok(()) => Ok(true),
            Err(error) => {
                let wrapped = self.domain.wrap(what, error);
                if passes(&wrapped) {
                    return Err(wrapped);
                }
                tracing::debug!(error = ?wrapped, name, ?disks, "no usable bitmap");
                Ok(false)
            }
        }
    }

    /// Checkpoints of this chain that libvirt has metadata of.
    pub(super) async fn listed(&self) -> Result<Vec<PointId>> {
        let names = self.domain.call("list the checkpoints of", ffi::Checkpoint::names).await?;
        Ok(names.iter().filter_map(|name| self.chain.point_of(name)).collect())
    }

    /// Estimated bytes changed since `point`, by disk (running domains only).
    pub(super) async fn changed_bytes(&self, point: PointId) -> Result<BTreeMap<String, u64>> {
        let name = self.chain.of_point(point);
        let xml = self
            .domain
            .call("estimate the changes of", move |domain| {
                let checkpoint = ffi::Checkpoint::lookup(domain, &name)?;
                checkpoint.xml(
                    sys::VIR_DOMAIN_CHECKPOINT_XML_SIZE | sys::VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN,
                )
            })
            .await?;
        let root = Element::parse("the checkpoint XML", &xml)?;
        let Some(disks) = root.child("disks") else { return Ok(BTreeMap::new()) };
        Ok(disks
            .all("disk")
            .filter_map(|disk| {
                Some((disk.attr("name")?.to_owned(), disk.attr("size")?.parse().ok()?))
            })
            .collect())
    }

    /// The XML libvirt has of a checkpoint, without the domain.
    pub(super) async fn xml(&self, point: PointId) -> Result<String> {
        let name = self.chain.of_point(point);
        self.domain
            .call("read the checkpoint of", move |domain| {
                ffi::Checkpoint::lookup(domain, &name)?
                    .xml(sys::VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN)
            })
            .await
    }

    /// Deletes a checkpoint; none of that name is success.
    pub(super) async fn delete(&self, point: PointId, what: Delete) -> Result<()> {
        let name = self.chain.of_point(point);
        let flags = match what {
            Delete::Bitmaps => 0,
            Delete::Metadata => sys::VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY,
        };
        self.domain
            .call("delete a checkpoint of", move |domain| {
                match ffi::Checkpoint::lookup(domain, &name) {
                    Ok(checkpoint) => checkpoint.delete(flags),
                    Err(error) if code(&error) == Some(ErrorNumber::NoDomainCheckpoint) => Ok(()),
                    Err(error) => Err(error),
                }
            })
            .await
    }

    /// Deletes a checkpoint with its bitmaps; where that fails for good (a broken bitmap, a stopped domain)
    /// at least its metadata goes, and the error is returned. Until then its metadata is what a bitmap that
    /// QEMU has not stored is found by.
    pub(super) async fn discard(&self, point: PointId) -> Result<()> {
        let deleted = self.delete(point, Delete::Bitmaps).await;
        if deleted.as_ref().is_err_and(|error| !passes(error)) {
            self.delete(point, Delete::Metadata).await?;
        }
        deleted
    }
}

/// Whether what failed may succeed another time. Other errors are of the checkpoint: its bitmap is not
/// there or broken, as when QEMU was killed before it had stored it, or its domain does not run.
pub(super) fn passes(error: &Error) -> bool {
    matches!(error.kind(), Kind::Busy | Kind::Timeout | Kind::Connection | Kind::Permission)
}

/// Whether a redefinition asks QEMU for the bitmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    /// Fails unless every bitmap is usable.
    Validate,
    /// Takes our word.
    Trust,
}

/// What of a checkpoint is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delete {
    /// Bitmaps and metadata.
    Bitmaps,
    /// libvirt's record only.
    Metadata,
}

fn creation_time(xml: &str) -> Option<u64> {
    let root = Element::parse("a recorded checkpoint", xml).ok()?;
    root.text_at(&["creationTime"])?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::libvirt::disks::DiskSet;

    fn disk(format: &str, size_bytes: u64) -> SizedDisk {
        let xml = format!(
            "<domain><devices><disk><driver type='{format}'/><source file='/i/a'/>\
             <backingStore type='file'><source file='/i/below'/></backingStore>\
             <target dev='vda'/></disk></devices></domain>"
        );
        let set = DiskSet::from_xml(&Element::parse("test", &xml).unwrap(), &[]).unwrap();
        SizedDisk { disk: set.protected[0].clone(), size_bytes, allocation_bytes: 0 }
    }

    #[test]
    fn the_image_of_the_base_must_be_a_layer_of_the_disk() {
        let was = |origin: &str| {
            let description =
                DiskDescription { origin: origin.into(), ..disk("qcow2", 10).describe() };
            [KnownPoint { id: PointId([1; 16]), disks: vec![description], checkpoint_xml: None }]
        };
        let ask = |disk: &SizedDisk, origin: &str| candidates(disk, &was(origin)).map(|p| p.len());
        let now = disk("qcow2", 10);
        assert_eq!(ask(&now, "/i/b"), Err(FullReason::ImageReplaced));
        assert_eq!(ask(&now, "/i/a"), Ok(1));
        assert_eq!(ask(&now, "/i/below"), Ok(1));
        assert_eq!(ask(&disk("raw", 10), "/i/a"), Err(FullReason::FormatWithoutBitmaps));
    }

    #[test]
    fn a_checkpoint_names_every_disk() {
        let all = ["vda".to_owned(), "sd<".to_owned()];
        assert_eq!(
            checkpoint_xml("n", &all, &["vda"], Some(5)),
            "<domaincheckpoint><name>n</name><creationTime>5</creationTime><disks>\
             <disk name='vda' checkpoint='bitmap' bitmap='n'/><disk name='sd&lt;' checkpoint='no'/>\
             </disks></domaincheckpoint>"
        );
    }
}
