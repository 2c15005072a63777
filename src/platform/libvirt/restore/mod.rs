//! A captured domain description made fit to be defined again: as the lost VM, or as a new one
//! beside it.
//!
//! [`rewrite`] is a pure function over XML text. It edits spans of the original and leaves every
//! byte it has no reason to touch, so machine type, firmware, block sizes, serials, tuning and
//! elements of libvirt versions we do not know come back exactly. Every change is listed, in words
//! a person can check.
//!
//! | | as the lost VM | as a new one |
//! |---|---|---|
//! | name, UUID, MACs | kept | new (libvirt makes MACs, generation id) |
//! | restored disks | their new images, flat | the same |
//! | those in their storage pool again | its volumes, as before | does not occur |
//! | writable disks not restored | kept, listed | removed: they are the original's |
//! | CD-ROM, floppy | kept, optional at start | the same |
//! | host devices | kept, listed | removed: they are the original's |
//! | sockets, log files, fixed ports | kept | own ones |
//! | runtime leftovers | removed | removed |
//!
//! Writing images and NVRAM is the job's business; [`Rewritten`] says where they belong. [`tpm`]
//! unpacks TPM state; [`define`] holds the calls that hand the result to libvirt.

pub mod define;
mod devices;
mod disks;
pub mod tpm;
mod volumes;

use std::path::PathBuf;

pub use self::volumes::PoolVolume;
use super::xml::{Edits, Element};
use crate::error::{Error, Kind, Result};
use crate::vm::Uuid;

/// How a captured description is to come back.
#[derive(Clone, Debug)]
pub struct RewriteOptions {
    /// As whom.
    pub identity: Identity,
    /// Where each restored disk is now, by target name.
    pub disks: Vec<RestoredDisk>,
    /// Where the NVRAM artefact is written; `None` when there is none to restore.
    pub nvram: Option<PathBuf>,
    /// Where the kernel of a direct boot was restored to; `None` keeps the path.
    pub kernel: Option<PathBuf>,
    /// Where its initial RAM disk was restored to; `None` keeps the path.
    pub initrd: Option<PathBuf>,
    /// Which QEMU program.
    pub emulator: Emulator,
}

/// As whom a VM comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// As itself.
    Original,
    /// As a new domain beside the original.
    New {
        /// Its name.
        name: String,
        /// Its UUID.
        uuid: Uuid,
    },
}

/// Which QEMU program a description names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulator {
    /// The one it named.
    Keep,
    /// The host's default: for a host where the other is not installed.
    HostDefault,
}

/// A restored disk and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RestoredDisk {
    /// Target name (`vda`).
    pub name: String,
    /// Its place.
    pub place: DiskPlace,
}

/// Where a restored disk is. Restored images have no backing file and are not encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskPlace {
    /// An image file.
    File {
        /// Absolute path on the host that will run the domain.
        path: PathBuf,
        /// `qcow2` or `raw`.
        format: String,
    },
    /// The file that the volume is which the description names: the pool is here and active.
    Volume {
        /// Absolute path on the host that will run the domain.
        path: PathBuf,
        /// `qcow2` or `raw`.
        format: String,
    },
    /// A raw block device.
    Device {
        /// Absolute path on the host that will run the domain.
        path: PathBuf,
    },
}

/// A description that can be defined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// The domain XML.
    pub xml: String,
    /// What had to change or needs attention, one sentence each.
    pub changes: Vec<String>,
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Storage pools that are to find restored volumes.
    pub pools: Vec<String>,
    /// Directory its TPM state is unpacked into, if it has an emulated TPM.
    pub tpm_dir: Option<PathBuf>,
}

/// The description to restore from: the persistent one, unless the running domain had other disks
/// (hot-plugged, moved to a new image): then the live one, which is what was backed up.
pub fn choose<'x>(live: &'x str, inactive: Option<&'x str>) -> Result<&'x str> {
    let Some(inactive) = inactive else { return Ok(live) };
    let targets = |what: &str, xml: &str| -> Result<Vec<String>> {
        let root = Element::parse(what, xml)?;
        let devices = root.child("devices");
        let disks = devices.iter().flat_map(|devices| devices.all("disk"));
        let mut names: Vec<String> =
            disks.filter_map(|disk| disk.attr_at(&["target"], "dev").map(str::to_owned)).collect();
        names.sort();
        Ok(names)
    };
    let same = targets("the live XML", live)? == targets("the persistent XML", inactive)?;
    Ok(if same { inactive } else { live })
}

/// Rewrites a captured domain XML. Pure.
///
/// Fails when the XML is not a domain's, or when a restored disk is not in it.
pub fn rewrite(xml: &str, options: &RewriteOptions) -> Result<Rewritten> {
    let root = Element::parse("the captured domain XML", xml)?;
    let uuid = root.text_at(&["uuid"]).and_then(|text| Uuid::try_parse(text).ok());
    let name = root.text_at(&["name"]);
    let (Some(old_uuid), Some(old_name), "domain") = (uuid, name, root.name.as_str()) else {
        return Err(Error::new(Kind::Corrupt, "the captured XML is not that of a domain"));
    };
    let (name, uuid) = match &options.identity {
        Identity::Original => (old_name.to_owned(), old_uuid),
        Identity::New { name, uuid } => (name.clone(), *uuid),
    };
    let mut rewriter = Rewriter {
        xml,
        root: &root,
        options,
        edits: Edits::default(),
        changes: Vec::new(),
        pools: Vec::new(),
        tpm_dir: None,
    };
    rewriter.identity(&name, uuid);
    rewriter.boot();
    rewriter.disks()?;
    rewriter.devices(uuid);
    let Rewriter { edits, changes, pools, tpm_dir, .. } = rewriter;
    Ok(Rewritten { xml: edits.apply(xml), changes, name, uuid, pools, tpm_dir })
}

/// A rewriting in progress.
struct Rewriter<'a> {
    xml: &'a str,
    root: &'a Element,
    options: &'a RewriteOptions,
    edits: Edits,
    changes: Vec<String>,
    pools: Vec<String>,
    tpm_dir: Option<PathBuf>,
}

impl<'a> Rewriter<'a> {
    /// The new domain's name, when it is a new one.
    fn new_name(&self) -> Option<&'a str> {
        match &self.options.identity {
            Identity::Original => None,
            Identity::New { name, .. } => Some(name),
        }
    }

    fn say(&mut self, change: impl Into<String>) {
        self.changes.push(change.into());
    }

    fn set_attr(&mut self, element: &Element, name: &str, value: &str) {
        self.edits.set_attr(self.xml, element, name, value);
    }

    fn remove_attr(&mut self, element: &Element, name: &str) {
        self.edits.remove_attr(self.xml, element, name);
    }

    fn remove(&mut self, element: &Element) {
        self.edits.remove(self.xml, element);
    }

    fn set_text(&mut self, element: &Element, text: &str) {
        self.edits.set_text(self.xml, element, text);
    }

    /// Name, UUID and everything that repeats them.
    fn identity(&mut self, name: &str, uuid: Uuid) {
        let root = self.root;
        // The number of the running domain.
        self.remove_attr(root, "id");
        if let Some(genid) = root.child("genid") {
            // The guest is told that it is not where it was: that is what the id is for.
            self.edits.set_content(self.xml, genid, String::new());
            self.say("the VM generation id is made anew");
        }
        if self.new_name().is_none() {
            return;
        }
        let old = root.text_at(&["name"]).unwrap_or_default();
        self.say(format!("name: {name} (was {old})"));
        let old = root.text_at(&["uuid"]).unwrap_or_default();
        self.say(format!("UUID: a new one (was {old})"));
        if let Some(element) = root.child("name") {
            self.set_text(element, name);
        }
        if let Some(element) = root.child("uuid") {
            self.set_text(element, &uuid.to_string());
        }
        // libvirt refuses a SMBIOS UUID that differs from the domain's.
        let system = root.at(&["sysinfo", "system"]);
        for entry in system.iter().flat_map(|system| system.all("entry")) {
            if entry.attr("name") == Some("uuid") {
                self.set_text(entry, &uuid.to_string());
            }
        }
    }

    /// Firmware variables and direct-boot files.
    fn boot(&mut self) {
        let Some(os) = self.root.child("os") else { return };
        for (name, path) in [("kernel", &self.options.kernel), ("initrd", &self.options.initrd)] {
            let Some(element) = os.child(name) else { continue };
            let Some(path) = path else {
                self.say(format!("{name} {} was not captured and must exist", element.text));
                continue;
            };
            let path = path.to_string_lossy();
            if element.text != path {
                self.say(format!("{name}: {path} (was {})", element.text));
                self.set_text(element, &path);
            }
        }
        let Some(nvram) = os.child("nvram") else { return };
        let old = nvram.attr_at(&["source"], "file").unwrap_or(&nvram.text).to_owned();
        match &self.options.nvram {
            Some(path) => {
                let path = path.to_string_lossy();
                if old != path {
                    self.say(format!("NVRAM: {path} (was {old})"));
                    if nvram.attr("type").is_none() {
                        self.set_text(nvram, &path);
                    } else {
                        let source = format!("<source file='{}'/>", super::xml::escaped(&path));
                        self.set_attr(nvram, "type", "file");
                        self.edits.set_content(self.xml, nvram, source);
                    }
                }
            }
            None if self.new_name().is_some() => {
                // The path is the original's; libvirt makes one for the new name.
                self.say(format!("NVRAM: begins fresh from its template (was {old})"));
                if nvram.attr("template").is_some() && nvram.attr("type").is_none() {
                    self.edits.set_content(self.xml, nvram, String::new());
                } else {
                    self.remove(nvram);
                }
            }
            None => {
                self.say(format!("NVRAM {old} was not captured: it must exist, or begins fresh"));
            }
        }
    }
}

#[cfg(test)]
mod tests;
