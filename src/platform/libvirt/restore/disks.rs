//! The disks of a rewritten description: restored images take the place of whatever was there.

use super::{DiskPlace, RestoredDisk, Rewriter};
use crate::error::{Error, Kind, Result};
use crate::platform::libvirt::disks::VolumeName;
use crate::platform::libvirt::xml::{Element, escaped};

/// What belongs to the old storage: flattened, decrypted and local, the restored image has none.
const STORAGE_CHILDREN: [&str; 4] = ["backingStore", "mirror", "encryption", "auth"];

/// Attributes of a disk that only pass-through devices may have.
const PASSTHROUGH_ATTRIBUTES: [&str; 2] = ["rawio", "sgio"];

impl<'a> Rewriter<'a> {
    /// Rewrites every disk.
    pub(super) fn disks(&mut self) -> Result<()> {
        let root: &'a Element = self.root;
        let disks: Vec<&Element> =
            root.child("devices").iter().flat_map(|devices| devices.all("disk")).collect();
        let target = |disk: &'a Element| disk.attr_at(&["target"], "dev").unwrap_or_default();
        for restored in &self.options.disks {
            if !disks.iter().any(|disk| target(disk) == restored.name) {
                let names: Vec<_> = disks.iter().map(|disk| target(disk)).collect();
                return Err(Error::new(
                    Kind::Usage,
                    format!("the domain has no disk '{}'", restored.name),
                )
                .hint(format!("its disks are: {}", names.join(", "))));
            }
        }
        for disk in disks {
            let restored = self.options.disks.iter().find(|r| r.name == target(disk));
            match restored {
                Some(restored) => self.restored(disk, restored),
                None => self.not_restored(disk, target(disk)),
            }
        }
        Ok(())
    }

    /// Points a disk at its restored image.
    fn restored(&mut self, disk: &Element, restored: &RestoredDisk) {
        if let DiskPlace::Volume { format, .. } = &restored.place
            && self.keep_volume(disk, format)
        {
            return;
        }
        let (kind, attribute, path, format) = match &restored.place {
            DiskPlace::File { path, format } | DiskPlace::Volume { path, format } => {
                ("file", "file", path, format.as_str())
            }
            DiskPlace::Device { path } => ("block", "dev", path, "raw"),
        };
        let path = path.to_string_lossy();
        let name = &restored.name;
        let was = describe(disk);
        let now = format!("{path} ({format})");
        if was != now {
            self.say(format!("disk {name}: {now} (was {was})"));
        }
        if disk.attr("type") != Some(kind) {
            self.set_attr(disk, "type", kind);
        }
        for attribute in PASSTHROUGH_ATTRIBUTES {
            self.remove_attr(disk, attribute);
        }
        if let Some(driver) = disk.child("driver") {
            if driver.attr("type") != Some(format) {
                self.set_attr(driver, "type", format);
            }
            // A qcow2 matter: libvirt refuses it with any other format.
            if let Some(cache) = driver.child("metadata_cache").filter(|_| format != "qcow2") {
                self.remove(cache);
            }
        }
        let source = format!("<source {attribute}='{}'/>", escaped(&path));
        let driver = format!("<driver name='qemu' type='{format}'/>");
        match (disk.child("source"), disk.child("driver")) {
            (Some(old), Some(_)) => {
                // Only if something differs: a source that is right already stays as it is.
                let keeps = old.attr(attribute) == Some(&*path) && old.children.is_empty();
                if keeps {
                    self.remove_attr(old, "index");
                } else {
                    self.edits.replace(old, source);
                }
            }
            (Some(old), None) => self.edits.replace(old, driver + &source),
            (None, Some(_)) => self.edits.insert_first(self.xml, disk, &source),
            (None, None) => self.edits.insert_first(self.xml, disk, &(driver + &source)),
        }
        self.remove_storage(disk);
        if disk.child("encryption").is_some() || disk.at(&["source", "encryption"]).is_some() {
            self.say(format!("disk {name}: no longer encrypted; it was read decrypted"));
        }
    }

    /// Leaves a disk the volume it was, if nothing of its source speaks of other content.
    fn keep_volume(&mut self, disk: &Element, format: &str) -> bool {
        let (Some(name), Some(source)) = (VolumeName::of(disk), disk.child("source")) else {
            return false;
        };
        let encrypted = disk.child("encryption").is_some();
        if encrypted || !source.children.is_empty() || format_of(disk) != format {
            return false;
        }
        self.remove_attr(source, "index");
        self.remove_storage(disk);
        self.pools.retain(|pool| *pool != name.pool);
        self.pools.push(name.pool);
        true
    }

    /// Removes what belongs to the old storage.
    fn remove_storage(&mut self, disk: &Element) {
        for child in disk.children.iter().filter(|c| STORAGE_CHILDREN.contains(&c.name.as_str())) {
            self.remove(child);
        }
    }

    /// A disk that is not in the point, or was not asked for.
    fn not_restored(&mut self, disk: &Element, name: &str) {
        let was = describe(disk);
        if let Some(source) = disk.child("source") {
            self.remove_attr(source, "index");
        }
        if matches!(disk.attr("device"), Some("cdrom" | "floppy")) {
            let source = disk.child("source").filter(|source| source.attr("file").is_some());
            if let Some(source) = source.filter(|s| s.attr("startupPolicy") != Some("optional")) {
                self.set_attr(source, "startupPolicy", "optional");
                self.say(format!("medium in {name} is used if it exists: {was}"));
            }
            return;
        }
        let private = disk.child("readonly").is_none() && disk.child("shareable").is_none();
        if self.new_name().is_some() && private {
            self.say(format!("disk {name} is left out: {was} belongs to the original"));
            self.remove(disk);
        } else {
            self.say(format!("disk {name} was not restored and must exist: {was}"));
        }
    }
}

fn format_of(disk: &Element) -> &str {
    disk.attr_at(&["driver"], "type").unwrap_or("raw")
}

/// Where a disk was, and in which format.
fn describe(disk: &Element) -> String {
    let format = format_of(disk);
    let Some(source) = disk.child("source") else { return "nothing".to_owned() };
    let attr = |name| source.attr(name);
    let place = if let Some(path) = attr("file").or(attr("dev")).or(attr("dir")) {
        path.to_owned()
    } else if let (Some(pool), Some(volume)) = (attr("pool"), attr("volume")) {
        format!("volume {volume} of pool {pool}")
    } else if let Some(protocol) = attr("protocol") {
        format!("{protocol}:{}", attr("name").unwrap_or_default())
    } else {
        format!("a source of type {}", disk.attr("type").unwrap_or("file"))
    };
    format!("{place} ({format})")
}
