//! The disks of a domain, from its XML: which are protected, which are not, which cannot be read.
//!
//! Pure. A writable `device='disk'` is protected; CD-ROM, floppy and read-only disks are left out
//! and say so; what holds data but cannot be read through a backup job (LUN, pass-through,
//! vhost-user) makes the backup fail unless it is excluded by name: a disk nobody protects must be
//! somebody's decision.
//!
//! Formats are taken from the XML and never probed: a guest can forge an image header.

use std::path::PathBuf;

use super::xml::Element;
use crate::error::{Error, Kind, Result};
use crate::platform::{EXCLUDED_BY_OPTION, nothing_to_read};
use crate::vm::{DiskLayer, ExcludedDisk, FullReason, ImageId};

/// A protected disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Disk {
    /// Target name (`vda`).
    pub(super) name: String,
    /// Image format (`qcow2`).
    pub(super) format: String,
    /// Its images, the active one first, then what lies below as far as the XML tells. The files
    /// are filled in by whoever can look at them.
    pub(super) layers: Vec<ImageId>,
    /// The active image, when it is a file or block device of the host. Of a volume it is filled
    /// in by whoever can ask for it.
    pub(super) path: Option<PathBuf>,
    /// The file of its data, where the XML names one beside the active image.
    pub(super) data_store: Option<String>,
    /// The layers that are volumes of storage pools.
    pub(super) volumes: Vec<VolumeLayer>,
    /// Which layer QEMU shows.
    pub(super) layer: DiskLayer,
    /// Why no bitmap can be kept for it, if so.
    pub(super) untracked: Option<FullReason>,
    /// A block job (copy, commit) runs on it.
    pub(super) mirrored: bool,
}

/// A layer of a disk that is a volume of a storage pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VolumeLayer {
    /// Which of the disk's layers.
    pub(super) layer: usize,
    /// The volume.
    pub(super) name: VolumeName,
    /// Number of the layer in a running domain.
    pub(super) index: Option<u32>,
    /// QEMU reaches it by network, past the host's device (`mode='direct'`).
    pub(super) direct: bool,
}

/// A volume of a storage pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct VolumeName {
    /// The pool.
    pub(super) pool: String,
    /// Its name there.
    pub(super) volume: String,
}

impl VolumeName {
    /// The volume that the `<source>` of a disk or layer names, if it is one.
    pub(super) fn of(element: &Element) -> Option<Self> {
        if element.attr("type") != Some("volume") {
            return None;
        }
        let attr = |key| element.attr_at(&["source"], key).map(str::to_owned);
        Some(Self { pool: attr("pool")?, volume: attr("volume")? })
    }
}

/// All disks of a domain, sorted out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DiskSet {
    /// To be read, in the order of the XML.
    pub(super) protected: Vec<Disk>,
    /// Not part of the point.
    pub(super) excluded: Vec<ExcludedDisk>,
    /// Hold data, cannot be read and were not excluded: name and why.
    pub(super) unreadable: Vec<(String, String)>,
    /// Every target name, protected or not: a checkpoint names each.
    pub(super) all: Vec<String>,
}

impl DiskSet {
    /// Sorts out the disks of a domain XML; `exclude` are names the user left out.
    pub(super) fn from_xml(domain: &Element, exclude: &[String]) -> Result<Self> {
        let mut set = Self::default();
        let empty = Vec::new();
        let devices = domain.child("devices").map_or(&empty, |devices| &devices.children);
        for element in devices.iter().filter(|e| e.name == "disk") {
            let name = element.attr_at(&["target"], "dev").ok_or_else(|| {
                Error::new(Kind::Protocol, "the domain XML has a disk without a target name")
            })?;
            set.all.push(name.to_owned());
            set.sort_in(name, element, exclude);
        }
        let scsi = |e: &&Element| {
            e.name == "hostdev" && matches!(e.attr("type"), Some("scsi" | "scsi_host"))
        };
        for (index, element) in devices.iter().filter(scsi).enumerate() {
            let name = element
                .attr_at(&["alias"], "name")
                .map_or(format!("hostdev{index}"), str::to_owned);
            let why =
                "a SCSI device passed through from the host: its writes bypass QEMU's block layer";
            set.refuse(&name, why, exclude);
        }
        let known = |name: &String| {
            set.all.contains(name) || set.excluded.iter().any(|disk| disk.name == *name)
        };
        if let Some(name) = exclude.iter().find(|name| !known(name)) {
            return Err(Error::new(
                Kind::Usage,
                format!("the domain has no disk '{name}' to exclude"),
            )
            .hint(format!("its disks are: {}", set.all.join(", "))));
        }
        Ok(set)
    }

    fn sort_in(&mut self, name: &str, element: &Element, exclude: &[String]) {
        if exclude.iter().any(|excluded| excluded == name) {
            return self.leave_out(name, EXCLUDED_BY_OPTION);
        }
        match element.attr("device").unwrap_or("disk") {
            "cdrom" => return self.leave_out(name, "CD-ROM"),
            "floppy" => return self.leave_out(name, "floppy"),
            "lun" => return self.refuse(name, "a LUN passed through to the guest", exclude),
            _ => {}
        }
        if element.child("readonly").is_some() {
            return self.leave_out(name, "read-only");
        }
        match element.attr("type").unwrap_or("file") {
            "vhostuser" => {
                self.refuse(name, "served by a vhost-user process outside QEMU", exclude);
            }
            "vhostvdpa" => self.refuse(name, "a vDPA device: its writes bypass QEMU", exclude),
            "dir" => self.refuse(name, "a directory shown as a FAT disk", exclude),
            kind => self.protected.push(disk(name, kind, element)),
        }
    }

    fn leave_out(&mut self, name: &str, reason: &str) {
        self.excluded.push(ExcludedDisk { name: name.to_owned(), reason: reason.to_owned() });
    }

    fn refuse(&mut self, name: &str, why: &str, exclude: &[String]) {
        if exclude.iter().any(|excluded| excluded == name) {
            self.leave_out(name, EXCLUDED_BY_OPTION);
        } else {
            self.unreadable.push((name.to_owned(), why.to_owned()));
        }
    }

    /// [`Kind::SnapshotLost`] unless these are the disks of `before`, each with the same image or
    /// with new layers above it: an external snapshot in between changes nothing of what is read.
    pub(super) fn check_continues(&self, before: &Self, domain: &str) -> Result<()> {
        let same = |(now, was): (&Disk, &Disk)| {
            now.name == was.name && now.layers.iter().any(|layer| layer.is(was.image()))
        };
        let (now, was) = (&self.protected, &before.protected);
        if now.len() == was.len() && now.iter().zip(was).all(same) {
            return Ok(());
        }
        let message = format!("the disks of domain '{domain}' were changed meanwhile");
        Err(Error::new(Kind::SnapshotLost, message).hint("run the backup again"))
    }

    /// Fails when a disk with data cannot be read, when there is nothing to read, or when LUKS
    /// disks would be stored in the clear.
    pub(super) fn check(&self, domain: &str, repository_has_key: bool) -> Result<()> {
        if let Some((name, why)) = self.unreadable.first() {
            return Err(Error::new(
                Kind::Unsupported,
                format!("disk {name} of domain '{domain}' cannot be backed up: {why}"),
            )
            .hint(format!("leave it out with --exclude-disk {name} and protect it otherwise")));
        }
        if let Some(disk) = self.protected.iter().find(|d| d.layer == DiskLayer::DecryptedLuks)
            && !repository_has_key
        {
            let name = &disk.name;
            return Err(Error::new(
                Kind::Unsupported,
                format!("disk {name} of domain '{domain}' is encrypted, the repository has no key"),
            )
            .hint(format!(
                "the backup would hold it decrypted: add a key with 'vmbackup repo key add', or \
                 leave it out with --exclude-disk {name}"
            )));
        }
        if let Some(disk) = self.protected.iter().find(|disk| disk.mirrored) {
            return Err(Error::new(
                Kind::Busy,
                format!("disk {} of domain '{domain}' is being copied or committed", disk.name),
            )
            .hint(format!("'virsh blockjob {domain} {}' shows the block job", disk.name)));
        }
        if self.protected.is_empty() {
            return Err(nothing_to_read(domain, &self.excluded));
        }
        Ok(())
    }
}

impl Disk {
    /// The active image.
    pub(super) fn image(&self) -> &ImageId {
        self.layers.first().expect("a disk has an active layer")
    }
}

/// Where the `<source>` of a layer is: for people and to know it again, and its path on the host.
fn place(kind: &str, element: &Element) -> (String, Option<PathBuf>) {
    let source = element.child("source");
    let attr = |key| source.and_then(|source| source.attr(key));
    match kind {
        "file" => (attr("file").unwrap_or("?").to_owned(), attr("file").map(PathBuf::from)),
        "block" => (attr("dev").unwrap_or("?").to_owned(), attr("dev").map(PathBuf::from)),
        "network" => {
            let protocol = attr("protocol").unwrap_or("network");
            (format!("{protocol}:{}", attr("name").unwrap_or_default()), None)
        }
        "volume" => {
            let pool = attr("pool").unwrap_or_default();
            (format!("{pool}/{}", attr("volume").unwrap_or_default()), None)
        }
        other => (other.to_owned(), None),
    }
}

fn volume(layer: usize, element: &Element, index: Option<&str>) -> Option<VolumeLayer> {
    Some(VolumeLayer {
        layer,
        name: VolumeName::of(element)?,
        index: index.and_then(|index| index.parse().ok()),
        direct: element.attr_at(&["source"], "mode") == Some("direct"),
    })
}

fn disk(name: &str, kind: &str, element: &Element) -> Disk {
    let format = element.attr_at(&["driver"], "type").unwrap_or("raw").to_owned();
    let (origin, path) = place(kind, element);
    let mut layers = vec![ImageId { origin, file: None }];
    // The number of the active layer is in its source, of those below in the element itself.
    let mut volumes = Vec::from_iter(volume(0, element, element.attr_at(&["source"], "index")));
    let mut below = element.child("backingStore");
    while let Some(layer) = below {
        let Some(kind) = layer.attr("type") else { break };
        volumes.extend(volume(layers.len(), layer, layer.attr("index")));
        layers.push(ImageId { origin: place(kind, layer).0, file: None });
        below = layer.child("backingStore");
    }
    let untracked = if element.child("shareable").is_some() {
        Some(FullReason::Shareable)
    } else if format != "qcow2" {
        Some(FullReason::FormatWithoutBitmaps)
    } else if element.child("transient").is_some() {
        Some(FullReason::NoChangeTracking)
    } else {
        None
    };
    let mut encrypted = false;
    // Layers below count as well: what is read is decrypted wherever it comes from.
    element.walk(&mut |inner| encrypted |= inner.name == "encryption");
    let store = element.at(&["source", "dataStore"]);
    let data_store = store.map(|store| place(store.attr("type").unwrap_or("file"), store).0);
    Disk {
        name: name.to_owned(),
        format,
        layers,
        path,
        volumes,
        layer: if encrypted { DiskLayer::DecryptedLuks } else { DiskLayer::Plain },
        untracked,
        mirrored: element.child("mirror").is_some(),
        data_store,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(disks: &str, exclude: &[&str]) -> Result<DiskSet> {
        let xml = format!("<domain><devices>{disks}</devices></domain>");
        let exclude: Vec<_> = exclude.iter().map(ToString::to_string).collect();
        DiskSet::from_xml(&Element::parse("test", &xml).unwrap(), &exclude)
    }

    const VDA: &str = "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
        <source file='/i/a.qcow2' index='2'/><backingStore type='file'><format type='raw'/>\
        <source file='/i/base'/></backingStore><target dev='vda'/></disk>";
    const LUN: &str = "<disk type='block' device='lun'><source dev='/dev/sdb'/>\
        <target dev='sda'/></disk>";

    #[test]
    fn writable_disks_are_protected_and_the_rest_says_why_not() {
        let cdrom = "<disk type='file' device='cdrom'><target dev='sdb'/><readonly/></disk>";
        let readonly = "<disk type='file'><source file='/x'/><target dev='vdb'/><readonly/></disk>";
        let rbd = "<disk type='network' device='disk'><driver type='raw'/>\
            <source protocol='rbd' name='pool/img'/><target dev='vdc'/></disk>";
        let set = set(&format!("{VDA}{cdrom}{readonly}{rbd}"), &[]).unwrap();
        let names: Vec<_> = set.protected.iter().map(|d| (&*d.name, &*d.format)).collect();
        assert_eq!(names, [("vda", "qcow2"), ("vdc", "raw")]);
        assert_eq!(set.protected[0].path, Some("/i/a.qcow2".into()));
        assert_eq!(set.protected[0].untracked, None);
        assert_eq!(set.protected[1].image().origin, "rbd:pool/img");
        assert_eq!(set.protected[1].untracked, Some(FullReason::FormatWithoutBitmaps));
        let out: Vec<_> = set.excluded.iter().map(|d| (&*d.name, &*d.reason)).collect();
        assert_eq!(out, [("sdb", "CD-ROM"), ("vdb", "read-only")]);
        set.check("foo", false).unwrap();
    }

    #[test]
    fn what_cannot_be_read_fails_until_it_is_excluded_by_name() {
        let hostdev = "<hostdev mode='subsystem' type='scsi'><alias name='hostdev7'/></hostdev>";
        let both = format!("{VDA}{LUN}{hostdev}");
        let error = set(&both, &["sda"]).unwrap().check("foo", false).unwrap_err();
        assert!(error.to_string().contains("hostdev7"), "{error}");
        set(&both, &["sda", "hostdev7"]).unwrap().check("foo", false).unwrap();
        let vhost = VDA.replace("type='file' device", "type='vhostuser' device");
        assert!(set(&vhost, &[]).unwrap().check("foo", false).is_err());
    }

    #[test]
    fn volumes_are_found_in_every_layer() {
        let xml = "<disk type='volume'><driver type='qcow2'/><source pool='p' volume='a' index='3'/>\
            <backingStore type='file' index='2'><source file='/i/b'/><backingStore type='volume' \
            index='1'><source pool='q' volume='c' mode='direct'/></backingStore></backingStore>\
            <target dev='vda'/></disk>";
        let set = set(xml, &[]).unwrap();
        let disk = &set.protected[0];
        let found: Vec<_> = disk.volumes.iter().map(|v| (v.layer, v.index, v.direct)).collect();
        assert_eq!(found, [(0, Some(3), false), (2, Some(1), true)]);
        assert_eq!((&*disk.volumes[1].name.pool, &*disk.volumes[1].name.volume), ("q", "c"));
        let origins: Vec<_> = disk.layers.iter().map(|layer| &*layer.origin).collect();
        assert_eq!((origins, &disk.path), (vec!["p/a", "/i/b", "q/c"], &None));
    }

    #[test]
    fn an_excluded_name_must_exist() {
        let error = set(VDA, &["vdx"]).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.hint_text().unwrap().contains("vda"));
    }

    #[test]
    fn encrypted_disks_need_a_repository_with_a_key() {
        let luks = VDA.replace("index='2'/>", "index='2'><encryption format='luks'/></source>");
        let set = set(&luks, &[]).unwrap();
        assert_eq!(set.protected[0].layer, DiskLayer::DecryptedLuks);
        assert_eq!(set.check("foo", false).unwrap_err().kind(), Kind::Unsupported);
        set.check("foo", true).unwrap();
    }
}
