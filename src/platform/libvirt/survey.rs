//! What a domain is right now: its XML, its state, its disks with their sizes. Changes nothing.

use std::path::Path;

use virt::domain::DomainState;
use virt::enumutil::Enum;
use virt::error::ErrorNumber;
use virt::sys;

use super::checkpoint::SizedDisk;
use super::connection::DomainHandle;
use super::disks::{Disk, DiskSet};
use super::error::code;
use super::xml::Element;
use super::{pools, stopped};
use crate::error::Result;
use crate::image::{ImageInfo, file_id, inspect};
use crate::platform::SnapshotRequest;
use crate::vm::FullReason;

/// What QEMU cuts disks into.
const SECTOR_BYTES: u64 = 512;

/// A domain as it was found.
pub(super) struct Survey {
    /// XML of the running domain (of the defined one, if it is stopped), with secrets.
    pub(super) live: String,
    /// Persistent XML with secrets; none for a transient domain.
    pub(super) inactive: Option<String>,
    /// `live`, parsed.
    pub(super) root: Element,
    /// It has a QEMU process now.
    pub(super) running: bool,
    /// It has one and its CPUs stand still.
    pub(super) paused: bool,
    /// Number of the running domain, part of its state directory's name.
    pub(super) id: Option<u32>,
    /// Its disks, sorted out.
    pub(super) set: DiskSet,
    /// The protected ones with sizes.
    pub(super) disks: Vec<SizedDisk>,
    /// Headers of local qcow2 images, in the order of `disks`, where they could be read.
    pub(super) images: Vec<Option<ImageInfo>>,
}

/// What a domain says of itself: the part of a survey that costs next to nothing.
pub(super) struct Description {
    /// As libvirt has it.
    pub(super) raw: Raw,
    /// The XML, parsed.
    root: Element,
    /// Its disks, with the files they are in.
    pub(super) set: DiskSet,
}

/// The XML and the state, of one moment.
pub(super) struct Raw {
    pub(super) live: String,
    pub(super) inactive: Option<String>,
    running: bool,
    paused: bool,
    id: Option<u32>,
}

impl Description {
    /// Asks for the description; disks are sorted out by the request's exclusions.
    pub(super) async fn read(domain: &DomainHandle, request: &SnapshotRequest) -> Result<Self> {
        let raw = domain.call("read the description of", read).await?;
        let root = Element::parse("the domain XML", &raw.live)?;
        let mut set = DiskSet::from_xml(&root, &request.exclude_disks)?;
        for disk in set.protected.iter_mut().filter(|disk| !disk.volumes.is_empty()) {
            pools::locate(domain, disk, raw.running).await?;
        }
        let layers = set.protected.iter_mut().flat_map(|disk| &mut disk.layers);
        for layer in layers.filter(|layer| layer.origin.starts_with('/')) {
            if domain.host.is_local() {
                layer.file = file_id(Path::new(&layer.origin)).await;
            }
        }
        Ok(Self { raw, root, set })
    }
}

impl Survey {
    /// Looks at the domain; disks are sorted out by the request's exclusions.
    pub(super) async fn take(domain: &DomainHandle, request: &SnapshotRequest) -> Result<Self> {
        let Description { raw, root, mut set } = Description::read(domain, request).await?;
        let mut images = Vec::new();
        for disk in &mut set.protected {
            let path = disk.path.as_deref().filter(|_| domain.host.is_local());
            let Some(path) = path.filter(|_| disk.format == "qcow2") else {
                images.push(None);
                continue;
            };
            let info = inspect(path, "qcow2").await;
            if let Err(error) = &info {
                tracing::debug!(?error, "image header not read");
            }
            let info = info.ok();
            if info.as_ref().is_some_and(|info| info.bitmaps.is_none()) {
                disk.untracked.get_or_insert(FullReason::FormatWithoutBitmaps);
            }
            images.push(info);
        }
        let mut disks = Vec::new();
        for disk in &set.protected {
            disks.push(size(domain, disk, raw.running).await?);
        }
        let Raw { live, inactive, running, paused, id } = raw;
        Ok(Self { live, inactive, root, running, paused, id, set, disks, images })
    }
}

/// The disk with its size.
async fn size(domain: &DomainHandle, disk: &Disk, running: bool) -> Result<SizedDisk> {
    let is_volume = disk.volumes.iter().any(|volume| volume.layer == 0);
    let (size_bytes, allocation_bytes) = match &disk.path {
        // libvirt asks the pool only when it starts the domain, and knows no size before.
        Some(path) if is_volume && !running && domain.host.is_local() => {
            let info = inspect(path, &disk.format).await?;
            (info.size_bytes, info.allocated_bytes.unwrap_or(info.size_bytes))
        }
        _ if is_volume && !running => return Err(stopped::elsewhere(domain)),
        _ => {
            let name = disk.name.clone();
            let read = move |domain: &virt::domain::Domain| domain.block_info(&name, 0);
            let info = domain.call(&format!("read the size of {} of", disk.name), read).await?;
            (info.capacity, info.allocation)
        }
    };
    Ok(SizedDisk {
        disk: disk.clone(),
        // Of a raw file of a stopped domain libvirt tells the length, of a running one the whole
        // sectors that QEMU makes of it.
        size_bytes: size_bytes.next_multiple_of(SECTOR_BYTES),
        allocation_bytes,
    })
}

fn read(domain: &virt::domain::Domain) -> super::ffi::VirtResult<Raw> {
    let running = domain.is_active()?;
    let (state, _) = domain.state()?;
    let persistent = domain.is_persistent()?;
    // A read-only connection or an access driver may keep the secrets: the XML without them is
    // worth having, and that they are missing shows in it.
    let xml = |flags| match domain.xml_desc(flags | sys::VIR_DOMAIN_XML_SECURE) {
        Err(error) if code(&error) == Some(ErrorNumber::OperationDenied) => domain.xml_desc(flags),
        other => other,
    };
    Ok(Raw {
        live: xml(0)?,
        inactive: if persistent { Some(xml(sys::VIR_DOMAIN_XML_INACTIVE)?) } else { None },
        running,
        paused: state == Enum::Known(DomainState::Paused),
        id: domain.id(),
    })
}
