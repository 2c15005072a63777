//! Volumes of storage pools (`<disk type='volume'>`): what they are underneath.
//!
//! A domain names pool and volume; libvirt resolves them when it starts the domain, and its XML
//! never shows the result. Of a running domain the block statistics do: what QEMU has open, whatever
//! became of the pool since. Of a stopped one the pool is asked, as a start would ask it.
//!
//! Formats and sizes are not taken from a pool: it probes images, and a guest can forge a header.

use std::path::PathBuf;

use virt::connect::Connect;
use virt::error::ErrorNumber;

use super::connection::{DomainHandle, Host};
use super::disks::{Disk, VolumeName};
use super::error::{code, wrap};
use super::ffi::{self, VirtResult};
use super::stopped::start_it;
use super::xml::Element;
use crate::error::{Error, Kind, Result};

/// A pool, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Pool {
    /// Nobody defined it.
    Missing,
    /// Its storage may not be there: not mounted, not logged in.
    Inactive,
    /// The directory its volumes are files of, if they are.
    Active(Option<PathBuf>),
}

/// A volume, as its pool has it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Volume {
    /// The pool does not have it.
    Missing,
    /// A file or block device of the host.
    Local(PathBuf),
    /// Of this type, which is neither.
    Other(String),
}

/// Types of pools whose volumes are files of a directory (storage.rst, "Directory pool" and the two
/// that mount something first).
const FILE_POOLS: [&str; 3] = ["dir", "fs", "netfs"];

/// Looks at a pool. Blocks.
pub(super) fn look(connection: &Connect, name: &str) -> VirtResult<Pool> {
    let pool = match connection.lookup_storage_pool_by_name(name) {
        Err(error) if code(&error) == Some(ErrorNumber::NoStoragePool) => return Ok(Pool::Missing),
        pool => pool?,
    };
    if !pool.is_active()? {
        return Ok(Pool::Inactive);
    }
    let xml = pool.xml_desc(0)?;
    let Ok(root) = Element::parse("the pool XML", &xml) else { return Ok(Pool::Active(None)) };
    let is_directory = root.attr("type").is_some_and(|kind| FILE_POOLS.contains(&kind));
    let path = root.text_at(&["target", "path"]).filter(|_| is_directory);
    Ok(Pool::Active(path.map(PathBuf::from)))
}

/// The error about a pool that is not active, if it is not: `what` is a volume of it.
pub(super) fn check(pool: &Pool, what: &str, name: &VolumeName) -> Result<()> {
    let VolumeName { pool: pool_name, volume } = name;
    let what = format!("{what} is volume '{volume}' of storage pool '{pool_name}'");
    match pool {
        Pool::Active(_) => Ok(()),
        Pool::Inactive => Err(Error::new(Kind::NotFound, format!("{what}, which is not active"))
            .hint(format!("start the pool: 'virsh pool-start {pool_name}'"))),
        Pool::Missing => Err(Error::new(Kind::NotFound, format!("{what}, which does not exist"))
            .hint(format!(
                "define the pool and start it ('virsh pool-define', 'virsh pool-start {pool_name}')"
            ))),
    }
}

/// Finds the files of a disk's layers that are volumes. Those of a stopped domain must be found, or
/// it is an error; what a running one has open is read through QEMU all the same.
pub(super) async fn locate(domain: &DomainHandle, disk: &mut Disk, running: bool) -> Result<()> {
    let found = if running { opened(domain, disk).await } else { pooled(domain, disk).await? };
    for (layer, path) in found {
        disk.layers[layer].origin = path.display().to_string();
        if layer == 0 {
            disk.path = Some(path);
        }
    }
    Ok(())
}

/// What the QEMU of a running domain has open: layers with their paths.
async fn opened(domain: &DomainHandle, disk: &Disk) -> Vec<(usize, PathBuf)> {
    let paths = match domain.call("find the images of", ffi::layer_paths).await {
        Ok(paths) => paths,
        Err(error) => {
            // Nothing depends on it but that the image is known again.
            tracing::debug!(?error, disk = disk.name, "volumes stay unknown");
            return Vec::new();
        }
    };
    let found = disk.volumes.iter().filter_map(|volume| {
        let (_, path) = paths.iter().find(|(index, _)| Some(*index) == volume.index)?;
        Some((volume.layer, PathBuf::from(path)))
    });
    found.collect()
}

/// What the pools say of the volumes of a stopped domain.
async fn pooled(domain: &DomainHandle, disk: &Disk) -> Result<Vec<(usize, PathBuf)>> {
    let what = format!("disk {} of domain '{}'", disk.name, domain.name);
    let mut found = Vec::new();
    for volume in &disk.volumes {
        match ask(&domain.host, &what, &volume.name).await? {
            Volume::Local(path) if !volume.direct => found.push((volume.layer, path)),
            other => return Err(not_local(&other, &what, &volume.name, &domain.name)),
        }
    }
    Ok(found)
}

fn not_local(volume: &Volume, what: &str, name: &VolumeName, domain: &str) -> Error {
    let VolumeName { pool, volume: volume_name } = name;
    if *volume == Volume::Missing {
        let message =
            format!("storage pool '{pool}' has no volume '{volume_name}', which is {what}");
        return Error::new(Kind::NotFound, message)
            .hint(format!("if it is there, 'virsh pool-refresh {pool}' finds it"));
    }
    let kind = match volume {
        Volume::Other(kind) => kind.as_str(),
        _ => "network",
    };
    let message = format!(
        "{what} is no file or device of the host, but volume '{volume_name}' of storage pool \
         '{pool}', of type {kind}"
    );
    start_it(&message, domain)
}

/// Asks an active pool for a volume, which is `whose`.
async fn ask(host: &Host, whose: &str, name: &VolumeName) -> Result<Volume> {
    let what = format!("look up volume '{}' of storage pool '{}'", name.volume, name.pool);
    let asked = name.clone();
    let found = host.raw_call(&what, move |connection| {
        let pool = look(connection, &asked.pool)?;
        let volume = match pool {
            Pool::Active(_) => Some(volume(connection, &asked)?),
            Pool::Missing | Pool::Inactive => None,
        };
        Ok((pool, volume))
    });
    let found = found.await?.map_err(|error| wrap(format!("cannot {what}"), error));
    let (pool, volume) = found?;
    check(&pool, whose, name)?;
    Ok(volume.expect("an active pool is asked"))
}

fn volume(connection: &Connect, name: &VolumeName) -> VirtResult<Volume> {
    let pool = connection.lookup_storage_pool_by_name(&name.pool)?;
    let volume = match pool.lookup_storage_vol_by_name(&name.volume) {
        Err(error) if code(&error) == Some(ErrorNumber::NoStorageVolume) => {
            return Ok(Volume::Missing);
        }
        volume => volume?,
    };
    let xml = volume.xml_desc(0)?;
    let root = Element::parse("the volume XML", &xml).ok();
    Ok(match root.as_ref().and_then(|root| root.attr("type")) {
        Some("file" | "block") => Volume::Local(volume.path()?.into()),
        other => Volume::Other(other.unwrap_or("unknown").to_owned()),
    })
}
