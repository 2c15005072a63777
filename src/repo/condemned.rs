//! Condemned lists: packs that the collector is about to delete, published beforehand.
//!
//! One sealed part; its plaintext is the ids of the packs, 16 bytes each. A run reads the lists when
//! it begins, after its own lease is visible, and never dedups against what they name. `gc` explains
//! when a list may be carried out.

use std::collections::HashSet;

use super::seal::{Keys, ObjectType, random};
use super::store::{Folder, ObjectInfo, ObjectName, ObjectStore, ReadRange, for_each, hex};
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};

/// Most packs of one list; the collector publishes several if it must.
pub const LIST_PACKS_MAX: usize = 1_000_000;

/// Largest list that is read.
const LIST_BYTES_MAX: u64 = (LIST_PACKS_MAX as u64 + 64) * 16;

/// The id of a pack.
pub type PackId = [u8; 16];

/// A list that was published.
#[derive(Clone, Debug)]
pub struct CondemnedList {
    /// The object.
    pub name: ObjectName,
    /// When it was published, by the store's clock.
    pub stored: Timestamp,
    /// What it condemns.
    pub packs: Vec<PackId>,
}

/// What a run must not dedup against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condemned {
    packs: HashSet<PackId>,
    /// A list does not open: it may name any pack.
    any: bool,
}

impl Condemned {
    /// Whether the pack is condemned, or may be.
    pub fn contains(&self, pack: &PackId) -> bool {
        self.any || self.packs.contains(pack)
    }
}

/// Every list there is. One that is damaged counts as empty: nothing is deleted on its account, what
/// is dead of it is condemned anew, and once no run can have missed it, it goes.
pub async fn lists(store: &dyn ObjectStore, keys: &Keys) -> Result<Vec<CondemnedList>> {
    Ok(read_lists(store, keys).await?.0)
}

/// The lists, and whether one of them is damaged.
async fn read_lists(store: &dyn ObjectStore, keys: &Keys) -> Result<(Vec<CondemnedList>, bool)> {
    let mut damaged = false;
    let mut objects: Vec<ObjectInfo> = Vec::new();
    for_each(store, Folder::Condemned.prefix(), |object| objects.push(object)).await?;
    let mut lists = Vec::with_capacity(objects.len());
    for ObjectInfo { name, stored, .. } in objects {
        let range = ReadRange::Whole { bytes_max: LIST_BYTES_MAX };
        let read = store.read(&name, range).await.map_err(Error::from);
        let packs = match read.and_then(|bytes| parse(keys, &name, bytes)) {
            Ok(packs) => packs,
            // Carried out since the listing: its packs are gone, and so are their index entries.
            Err(error) if error.kind() == Kind::NotFound => continue,
            Err(error) if error.kind() == Kind::Corrupt => {
                tracing::warn!(%error, "a list of the collector is damaged: run gc");
                damaged = true;
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        lists.push(CondemnedList { name, stored, packs });
    }
    Ok((lists, damaged))
}

fn parse(keys: &Keys, name: &ObjectName, bytes: Vec<u8>) -> Result<Vec<PackId>> {
    let bytes = keys.open_object(ObjectType::Condemned, name, bytes)?;
    let (packs, rest) = bytes.as_chunks::<16>();
    if rest.is_empty() {
        return Ok(packs.to_vec());
    }
    Err(Error::new(Kind::Corrupt, format!("object {name} is not a list of packs")))
}

/// What all lists together condemn.
pub async fn packs(store: &dyn ObjectStore, keys: &Keys) -> Result<Condemned> {
    let (lists, any) = read_lists(store, keys).await?;
    Ok(Condemned { packs: lists.into_iter().flat_map(|list| list.packs).collect(), any })
}

/// Publishes a list of at most [`LIST_PACKS_MAX`] packs.
pub async fn publish(
    store: &dyn ObjectStore,
    keys: &Keys,
    packs: Vec<PackId>,
) -> Result<CondemnedList> {
    let name = ObjectName::new(Folder::Condemned, &hex(&random::<16>()));
    let object = keys.seal_object(ObjectType::Condemned, &name, packs.as_flattened());
    let stored = store.put(&name, object).await?.stored;
    Ok(CondemnedList { name, stored, packs })
}
