//! Disks that were volumes of storage pools: whether their pools are there again, and where.
//!
//! A pool that is not active may be a file system that is not mounted: what is written to its
//! directory then is hidden when it is.

use std::path::PathBuf;

use super::define::Target;
use crate::error::Result;
use crate::platform::libvirt::disks::VolumeName;
use crate::platform::libvirt::error::wrap;
use crate::platform::libvirt::pools::{self, Pool};
use crate::platform::libvirt::xml::Element;

/// A disk of a captured description that was a volume.
#[derive(Clone, Debug)]
pub struct PoolVolume {
    /// Target name of the disk.
    pub disk: String,
    name: VolumeName,
    pool: Pool,
}

impl PoolVolume {
    /// Fails unless its pool is there and active.
    pub fn check(&self, domain: &str) -> Result<()> {
        let what = format!("disk {} of domain '{domain}'", self.disk);
        pools::check(&self.pool, &what, &self.name).map_err(|error| {
            let start = error.hint_text().unwrap_or_default().to_owned();
            error.hint(format!("{start}; or restore to another place with --to DIR"))
        })
    }

    /// The file the volume is, or will be, in the pool as it is here.
    pub fn path(&self) -> Option<PathBuf> {
        match &self.pool {
            Pool::Active(Some(directory)) => Some(directory.join(&self.name.volume)),
            _ => None,
        }
    }
}

impl Target {
    /// The disks of a captured description that were volumes, with their pools as they are here.
    pub async fn volumes(&self, xml: &str) -> Result<Vec<PoolVolume>> {
        let root = Element::parse("the captured domain XML", xml)?;
        let devices = root.child("devices");
        let disks = devices.iter().flat_map(|devices| devices.all("disk"));
        let named: Vec<(String, VolumeName)> = disks
            .filter_map(|disk| {
                Some((disk.attr_at(&["target"], "dev")?.to_owned(), VolumeName::of(disk)?))
            })
            .collect();
        if named.is_empty() {
            return Ok(Vec::new());
        }
        let looked = self.host().raw_call("look at storage pools", move |connection| {
            let look = |(disk, name): (String, VolumeName)| {
                let pool = pools::look(connection, &name.pool)?;
                Ok(PoolVolume { disk, name, pool })
            };
            named.into_iter().map(look).collect()
        });
        looked.await?.map_err(|error| wrap("cannot look at storage pools", error))
    }

    /// Lets a pool find the volumes that were restored to it: a domain with a volume that its pool
    /// does not know is not started. `domain` is defined by then, which an error says.
    pub async fn refresh(&self, pool: &str, domain: &str) -> Result<()> {
        let name = pool.to_owned();
        let what = format!("refresh storage pool '{pool}'");
        let refreshed = self.host().raw_call(&what, move |connection| {
            connection.lookup_storage_pool_by_name(&name)?.refresh(0)
        });
        refreshed.await?.map_err(|error| {
            let message = format!(
                "domain '{domain}' is restored and defined, but storage pool '{pool}' does not know \
                 its disk yet"
            );
            wrap(message, error)
                .hint(format!("'virsh pool-refresh {pool}', then 'virsh start {domain}'"))
        })
    }
}
