//! What of one stored disk does not restore, as far as that is known or seen without reading all of it:
//! where packs are gone, or damage is recorded of them. For a backup that builds on the disk, which
//! can store anew what its VM still has.
//!
//! Costs the names of the packs where nothing is wrong, else a walk over the disk's tree. A pack that is
//! cut off counts once somebody met it: then it is recorded.

use std::collections::HashSet;
use std::sync::Arc;

use super::Findings;
use super::trees::Walker;
use crate::block::ByteRange;
use crate::control::Control;
use crate::error::Result;
use crate::repo::blobs::Blobs;
use crate::repo::condemned::PackId;
use crate::repo::store::{Folder, for_each, for_each_name, from_hex};
use crate::repo::writer::StoredDisk;

/// The ranges, sorted and merged.
pub(in crate::repo) async fn damage_of(
    blobs: &Arc<Blobs>,
    chunk_levels: u32,
    stored: &StoredDisk,
    control: &Control,
) -> Result<Vec<ByteRange>> {
    if blobs.damaged.count() == 0 && !misses_packs(blobs).await? {
        return Ok(Vec::new());
    }
    let mut findings = Findings::default();
    for_each(&*blobs.store, Folder::Packs.prefix(), |object| {
        if let Some(id) = from_hex::<16>(object.name.last()) {
            findings.packs.insert(id, object.size_bytes);
        }
    })
    .await?;
    findings.doubtful.extend(blobs.damaged.packs());
    let mut walker = Walker::new(blobs, chunk_levels, &findings, control);
    Ok(walker.bad_ranges(stored).await?.map(|(ranges, _)| ranges).unwrap_or_default())
}

/// Whether a segment names a pack that is not there. The collector drops entries before packs.
async fn misses_packs(blobs: &Blobs) -> Result<bool> {
    let segments = blobs.index.segments();
    let mut named: HashSet<PackId> =
        segments.iter().flat_map(|s| s.packs().iter().map(|pack| pack.id)).collect();
    for_each_name(&*blobs.store, Folder::Packs.prefix(), |name| {
        if let Some(id) = from_hex::<16>(name.last()) {
            named.remove(&id);
        }
    })
    .await?;
    Ok(!named.is_empty())
}
