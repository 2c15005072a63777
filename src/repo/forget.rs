//! Forgetting points: a tombstone hides a point at once, the collector frees its space later.

use super::seal::{Keys, ObjectType};
use super::store::{Folder, ObjectName, ObjectStore, StoreError};
use crate::error::Result;
use crate::vm::PointId;

/// The tombstone of a point.
pub fn tombstone(point: PointId) -> ObjectName {
    ObjectName::new(Folder::Tombstones, &point.to_string())
}

/// Forgets `point`: from now on it is not listed. Forgetting it again changes nothing.
pub async fn forget(store: &dyn ObjectStore, keys: &Keys, point: PointId) -> Result<()> {
    let name = tombstone(point);
    match store.put(&name, keys.seal_object(ObjectType::Tombstone, &name, b"{}")).await {
        Ok(_) | Err(StoreError::AlreadyExists { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
