//! Which packs a run may dedup against.
//!
//! Invariant: a pack that was found to be there after the run's lease began, and that was not
//! condemned when it began, stays until the run is over. So each pack is looked for once per run
//! before the first blob in it counts as known: whatever a stale index says, no manifest comes to
//! rely on a pack that is gone.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use super::condemned::PackId;
use super::store::{ObjectName, ObjectStore};
use crate::error::Result;

/// The packs of a run, as far as it asked for them.
#[derive(Debug)]
pub struct Trust {
    store: Arc<dyn ObjectStore>,
    // Locked for set operations, never across an await.
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    present: HashSet<PackId>,
    refused: HashSet<PackId>,
}

impl Trust {
    /// Refuses `condemned`, asks the store for everything else.
    pub fn new(store: Arc<dyn ObjectStore>, condemned: HashSet<PackId>) -> Self {
        Self { store, known: Mutex::new(Known { present: HashSet::new(), refused: condemned }) }
    }

    /// Whether the pack is neither condemned nor known to be gone. No read.
    pub fn may_rely_on(&self, pack: &PackId) -> bool {
        !self.lock().refused.contains(pack)
    }

    /// Whether the pack is there; then it stays while the run holds its lease.
    pub async fn is_there(&self, pack: &PackId) -> Result<bool> {
        if self.lock().present.contains(pack) {
            return Ok(true);
        }
        let there = match self.store.stat(&ObjectName::pack(pack)).await {
            Ok(_) => true,
            Err(error) if error.is_not_found() => false,
            Err(error) => return Err(error.into()),
        };
        let mut known = self.lock();
        if there {
            known.present.insert(*pack);
        } else {
            known.refused.insert(*pack);
        }
        Ok(there)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
