//! Handing a rewritten description to libvirt. A running domain is never touched; an existing one
//! only when that was asked for.

use std::path::Path;

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt::sys;

use super::super::connection::Host;
use super::super::error::{code, wrap};
use super::super::ffi::VirtResult;
use super::super::xml::Element;
use super::{Emulator, Rewritten};
use crate::error::{Error, Kind, Result};
use crate::vm::Uuid;

/// A libvirt daemon domains are defined at.
pub struct Target {
    host: Host,
}

/// What may happen to a domain of that name or UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and the restore fails.
    Refuse,
    /// Its description is replaced if it is stopped.
    Replace,
}

/// A domain that is there already.
struct Found {
    name: String,
    uuid: String,
    active: bool,
    saved: bool,
}

/// How a host differs from what a description needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// The QEMU program to name.
    pub emulator: Emulator,
    /// What is missing and does not keep the domain from being defined, one sentence each.
    pub missing: Vec<String>,
}

impl Target {
    /// Connects to a daemon (`qemu:///system` if no URI is given).
    pub async fn open(uri: Option<&str>) -> Result<Self> {
        Ok(Self { host: Host::open(uri).await? })
    }

    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    /// Whether the daemon runs on this machine: only then are the restored images its images.
    pub fn is_local(&self) -> bool {
        self.host.is_local()
    }

    /// The URI of the daemon.
    pub fn uri(&self) -> &str {
        self.host.uri()
    }

    /// A hash of the description that a domain has, without its secrets; `None` if there is no such
    /// domain. It tells whether the domain was defined anew since.
    pub async fn description_hash(&self, uuid: Uuid) -> Result<Option<String>> {
        let what = format!("read the description of domain {uuid}");
        let described = self
            .host
            .raw_call(&what, move |connection| {
                match connection.lookup_domain_by_uuid_string(&uuid.to_string()) {
                    Ok(domain) => domain.xml_desc(sys::VIR_DOMAIN_XML_INACTIVE).map(Some),
                    Err(error) if code(&error) == Some(ErrorNumber::NoDomain) => Ok(None),
                    Err(error) => Err(error),
                }
            })
            .await?
            .map_err(|error| wrap(format!("cannot {what}"), error))?;
        Ok(described.map(|xml| blake3::hash(xml.as_bytes()).to_hex().to_string()))
    }

    /// Fails unless a domain of this name and UUID can be defined; whether that replaces one. Asked
    /// before anything is copied, before anything is replaced, and again by [`Target::define`].
    pub async fn check(&self, name: &str, uuid: Uuid, existing: Existing) -> Result<bool> {
        let (by_name, by_uuid) = (name.to_owned(), uuid.to_string());
        let found = self
            .host
            .raw_call("look for existing domains", move |connection| {
                Ok([
                    found(connection.lookup_domain_by_name(&by_name))?,
                    found(connection.lookup_domain_by_uuid_string(&by_uuid))?,
                ])
            })
            .await?
            .map_err(|error| wrap("cannot look for existing domains", error))?;
        let uuid = uuid.to_string();
        let replaces = found.iter().any(Option::is_some);
        for found in found.into_iter().flatten() {
            let (old, is) = (&found.name, &found.uuid);
            if found.active {
                return Err(Error::new(
                    Kind::Busy,
                    format!("domain '{old}' ({is}) is running; a running domain is never replaced"),
                )
                .hint("restore beside it with --as NAME, or stop it first"));
            }
            if found.uuid != uuid || found.name != name {
                return Err(Error::new(
                    Kind::AlreadyExists,
                    format!("name and UUID of '{name}' ({uuid}) clash with domain '{old}' ({is})"),
                )
                .hint("restore beside it with --as NAME"));
            }
            if found.saved {
                // It would resume with memory that belongs to the disks that are replaced.
                return Err(Error::new(
                    Kind::AlreadyExists,
                    format!("domain '{old}' has a saved state, which does not fit other disks"),
                )
                .hint(format!(
                    "drop it with 'virsh managedsave-remove {old}', or restore with --as NAME"
                )));
            }
            if existing == Existing::Refuse {
                return Err(Error::new(
                    Kind::AlreadyExists,
                    format!("domain '{name}' exists already"),
                )
                .hint("replace it with --force, or restore beside it with --as NAME"));
            }
        }
        Ok(replaces)
    }

    /// What this host lacks for a captured description. An error when it has no such machine: then
    /// libvirt would refuse the domain, and that is better known before anything is copied.
    pub async fn survey(&self, xml: &str) -> Result<Survey> {
        let root = Element::parse("the captured domain XML", xml)?;
        let owned = |text: Option<&str>| text.map(str::to_owned);
        let named = root.text_at(&["devices", "emulator"]).filter(|path| !path.is_empty());
        let there = named.filter(|path| Path::new(path).exists());
        let emulator = if named == there { Emulator::Keep } else { Emulator::HostDefault };
        let machine = owned(root.attr_at(&["os", "type"], "machine"));
        let arch = owned(root.attr_at(&["os", "type"], "arch"));
        let (kind, program) = (owned(root.attr("type")), owned(there));
        let mut networks: Vec<String> = Vec::new();
        let devices = root.child("devices");
        for card in devices.iter().flat_map(|devices| devices.all("interface")) {
            networks.extend(owned(card.attr_at(&["source"], "network")));
        }
        let wanted = format!(
            "machine {} of type {}",
            machine.as_deref().unwrap_or("default"),
            kind.as_deref().unwrap_or("default")
        );
        let (capable, missing) = self
            .host
            .raw_call("ask what this host can run", move |connection| {
                let (program, arch) = (program.as_deref(), arch.as_deref());
                let (machine, kind) = (machine.as_deref(), kind.as_deref());
                let capable =
                    connection.domain_capabilities(program, arch, machine, kind, 0).map(drop);
                networks.retain(|name| connection.lookup_network_by_name(name).is_err());
                Ok((capable, networks))
            })
            .await?
            .map_err(|error| wrap("cannot ask what this host can run", error))?;
        match capable {
            Err(error)
                if matches!(
                    code(&error),
                    Some(ErrorNumber::InvalidArg | ErrorNumber::ConfigUnsupported)
                ) =>
            {
                let error = wrap(format!("this host has no {wanted}"), error);
                return Err(error.hint(
                    "restore the images with --to and define the domain by hand with a machine of \
                     this host ('virsh domcapabilities' lists them)",
                ));
            }
            // Defining it will tell.
            Err(error) => tracing::debug!(%error, "the host does not tell its capabilities"),
            Ok(()) => {}
        }
        let sentence =
            |name| format!("network '{name}' does not exist here: make it before a start");
        Ok(Survey { emulator, missing: missing.into_iter().map(sentence).collect() })
    }

    /// Defines the domain.
    pub async fn define(&self, rewritten: &Rewritten, existing: Existing) -> Result<()> {
        let name = &rewritten.name;
        self.check(name, rewritten.uuid, existing).await?;
        let xml = rewritten.xml.clone();
        let defined = self
            .host
            .raw_call(&format!("define domain '{name}'"), move |connection: &Connect| {
                connection.define_domain_xml(&xml)
            })
            .await?;
        defined.map(drop).map_err(|error| {
            wrap(format!("cannot define domain '{name}'"), error)
                .hint("mend the cause (machine type, network, …), or restore with --to DIR alone")
        })
    }

    /// Starts a domain that was defined. When that fails, it stays defined and the error says so.
    pub async fn start(&self, rewritten: &Rewritten) -> Result<()> {
        let (name, uuid) = (&rewritten.name, rewritten.uuid.to_string());
        self.host
            .raw_call(&format!("start domain '{name}'"), move |connection: &Connect| {
                connection.lookup_domain_by_uuid_string(&uuid)?.create()
            })
            .await?
            .map(drop)
            .map_err(|error| {
                wrap(format!("domain '{name}' is restored and defined, but does not start"), error)
                    .hint(format!(
                        "see /var/log/libvirt/qemu/{name}.log; 'virsh start {name}' tries again"
                    ))
            })
    }
}

fn found(lookup: VirtResult<Domain>) -> VirtResult<Option<Found>> {
    match lookup {
        Ok(domain) => Ok(Some(Found {
            name: domain.name()?,
            uuid: domain.uuid_string()?,
            active: domain.is_active()?,
            saved: domain.has_managed_save(0)?,
        })),
        Err(error) if code(&error) == Some(ErrorNumber::NoDomain) => Ok(None),
        Err(error) => Err(error),
    }
}
