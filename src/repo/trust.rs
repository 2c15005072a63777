//! Which packs a run may dedup against.
//!
//! Invariant: a pack that was found to be there after the run's lease began, and that was not
//! condemned when it began, stays until the run is over. So each pack is looked for once per run
//! before the first blob in it counts as known: whatever a stale index says, no manifest comes to
//! rely on a pack that is gone.
//!
//! Nor on one that is known to be damaged, or that is shorter than the index says: what such a pack
//! held is stored anew, which heals older points too ([`super::damaged`]).

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use super::blobs::Blobs;
use super::condemned::{Condemned, PackId};
use super::index::Location;
use super::store::{ObjectName, StoreError};
use crate::error::Result;

/// The packs of a run, as far as it asked for them.
#[derive(Debug)]
pub struct Trust {
    blobs: Arc<Blobs>,
    condemned: Condemned,
    // Locked for map operations, never across an await.
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// Packs that are there, and their sizes.
    present: HashMap<PackId, u64>,
    gone: HashSet<PackId>,
}

impl Trust {
    /// Refuses `condemned` and what is known to be damaged, asks the store for everything else.
    pub fn new(blobs: Arc<Blobs>, condemned: Condemned) -> Self {
        Self { blobs, condemned, known: Mutex::default() }
    }

    /// Whether the pack is on no condemned list that the run read, and not known to be gone.
    pub fn may_stay(&self, pack: &PackId) -> bool {
        !self.condemned.contains(pack) && !self.lock().gone.contains(pack)
    }

    /// Whether nothing is known against the pack. No read.
    pub fn may_rely_on(&self, pack: &PackId) -> bool {
        self.may_stay(pack) && !self.blobs.damaged.contains(pack)
    }

    /// Whether the blob's pack is there, and long enough; then it stays while the run holds its
    /// lease. If not, [`Trust::may_rely_on`] refuses the pack from now on.
    pub async fn is_there(&self, location: &Location) -> Result<bool> {
        let pack = &location.pack.id;
        let known = self.lock().present.get(pack).copied();
        let size_bytes = match known {
            Some(size_bytes) => size_bytes,
            None => match self.blobs.store.stat(&ObjectName::pack(pack)).await {
                Ok(info) => info.size_bytes,
                Err(error) if error.is_not_found() => {
                    self.lock().gone.insert(*pack);
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            },
        };
        self.lock().present.insert(*pack, size_bytes);
        let end = u64::from(location.offset) + u64::from(location.stored_bytes);
        if end <= size_bytes {
            return Ok(true);
        }
        let error = StoreError::Short { name: ObjectName::pack(pack), size_bytes, end };
        self.blobs.damaged.report(pack, &error.into()).await;
        Ok(false)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
