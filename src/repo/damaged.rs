//! Packs in which damage was found, for everybody who comes after.
//!
//! Whoever finds a blob that does not open, or a pack that is cut off, records its pack under
//! `damaged/<pack id>`. From then on no run dedups against that pack: the next backup that reads the
//! content (a full one reads all) stores it anew, which heals every point that needs it. Readers take the copy in another
//! pack if there is one, and otherwise what of the damaged pack still opens. The collector prefers
//! other copies, too, and removes the record together with the pack.
//!
//! Only what is certain is recorded: bytes that were read and do not prove themselves, or an object
//! that ends too early. Never an error of the store (an input or output error may pass), and
//! not a pack that is missing: every run sees that for itself, and whoever reads through a stale
//! index takes one that was collected for missing. A record in error costs the space of one pack.
//!
//! The name says it all; the sealed content is for people. Held here: the packs recorded when the
//! repository was opened or the last run began, and those that were found since.

#[cfg(test)]
pub(super) mod tests;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use super::condemned::PackId;
use super::seal::{Keys, ObjectType};
use super::store::{
    Folder, ObjectName, ObjectStore, StoreError, StoreResult, for_each_name, from_hex, hex,
};
use crate::error::{Error, Kind, Result};

/// The packs known to be damaged.
#[derive(Debug)]
pub struct Damaged {
    store: Arc<dyn ObjectStore>,
    keys: Arc<Keys>,
    // Locked for set operations, never across an await.
    packs: Mutex<HashSet<PackId>>,
    /// Found here, with the words for people, and not recorded yet: the store did not take it.
    unrecorded: Mutex<HashMap<PackId, String>>,
}

/// The record about a pack.
pub fn record_name(pack: &PackId) -> ObjectName {
    ObjectName::new(Folder::Damaged, &hex(pack))
}

impl Damaged {
    /// Knows of none yet.
    pub fn new(store: Arc<dyn ObjectStore>, keys: Arc<Keys>) -> Self {
        Self { store, keys, packs: Mutex::default(), unrecorded: Mutex::default() }
    }

    /// Takes in what others recorded.
    pub async fn load(&self) -> Result<()> {
        let mut found = Vec::new();
        for_each_name(&*self.store, Folder::Damaged.prefix(), |name| {
            found.extend(from_hex::<16>(name.last()));
        })
        .await?;
        self.lock().extend(found);
        Ok(())
    }

    /// Whether damage is known of the pack.
    pub fn contains(&self, pack: &PackId) -> bool {
        self.lock().contains(pack)
    }

    /// How many packs damage is known of.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// Every pack damage is known of.
    pub fn packs(&self) -> Vec<PackId> {
        self.lock().iter().copied().collect()
    }

    /// Records that `pack` is damaged if that is what `error` tells. A store that does not take the
    /// record (it may be read-only) is no reason to fail here: this process knows.
    pub async fn report(&self, pack: &PackId, error: &Error) {
        if error.kind() != Kind::Corrupt || !self.lock().insert(*pack) {
            return;
        }
        tracing::warn!(pack = %ObjectName::pack(pack), %error, "a pack is damaged");
        let what = error.to_string();
        if let Err(error) = self.record(pack, &what).await {
            tracing::warn!(%error, "cannot record that a pack is damaged");
            lock(&self.unrecorded).insert(*pack, what);
        }
    }

    /// Records what could not be recorded when it was found. To be called before anything relies
    /// on a second copy: a collector that knows of no damage keeps one of two, perhaps the wrong one.
    pub async fn record_all(&self) -> Result<()> {
        let left: Vec<_> = lock(&self.unrecorded).clone().into_iter().collect();
        for (pack, what) in left {
            self.record(&pack, &what).await.map_err(|error| {
                let pack = ObjectName::pack(&pack);
                Error::from(error).context(format!("cannot record that {pack} is damaged"))
            })?;
            lock(&self.unrecorded).remove(&pack);
        }
        Ok(())
    }

    async fn record(&self, pack: &PackId, what: &str) -> StoreResult<()> {
        let name = record_name(pack);
        let json = serde_json::json!({"pack": hex(pack), "what": what}).to_string();
        let object = self.keys.seal_object(ObjectType::Damaged, &name, json.as_bytes());
        match self.store.put(&name, object).await {
            Ok(_) | Err(StoreError::AlreadyExists { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Takes in that the pack and its record are gone.
    pub fn forget(&self, pack: &PackId) {
        self.lock().remove(pack);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<PackId>> {
        lock(&self.packs)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
