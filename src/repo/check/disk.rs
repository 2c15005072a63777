//! What of stored disks does not restore, as far as that is known or seen without reading all of it:
//! where packs are gone, or damage is recorded of them. For a backup that builds on the disks, which
//! can store anew what its VM still has.
//!
//! Costs the names of the packs once where nothing is wrong, else a walk over each disk's tree: that
//! belongs before a snapshot is opened, which is why what was found is kept. Trees share most of their
//! nodes, and none is walked twice. A pack that is cut off counts once somebody met it: then it is
//! recorded.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::sync::Mutex;

use super::Findings;
use super::trees::{Walker, Whole};
use crate::block::ByteRange;
use crate::content::ContentHash;
use crate::control::Control;
use crate::error::Result;
use crate::repo::blobs::Blobs;
use crate::repo::condemned::PackId;
use crate::repo::store::{Folder, for_each, for_each_name, from_hex};
use crate::repo::writer::StoredDisk;

/// What is damaged, by what was known when this was made.
pub struct BaseDamage {
    blobs: Arc<Blobs>,
    chunk_levels: u32,
    /// None where nothing is wrong.
    suspected: Option<Findings>,
    // Held while a tree is walked: there is no use in walking two at once.
    walked: Mutex<Walked>,
}

#[derive(Default)]
struct Walked {
    whole: Whole,
    /// Damaged ranges by top node and size of a disk.
    disks: HashMap<(ContentHash, u64), Vec<ByteRange>>,
}

impl BaseDamage {
    /// Looks which packs are there, and damaged.
    pub(in crate::repo) async fn look(blobs: &Arc<Blobs>, chunk_levels: u32) -> Result<Self> {
        let is_suspect = blobs.damaged.count() > 0 || misses_packs(blobs).await?;
        let suspected = if is_suspect { Some(findings(blobs).await?) } else { None };
        let walked = Mutex::default();
        Ok(Self { blobs: Arc::clone(blobs), chunk_levels, suspected, walked })
    }

    /// The damaged ranges of a disk, sorted and merged. Asked again, it knows.
    pub async fn of(&self, stored: &StoredDisk, control: &Control) -> Result<Vec<ByteRange>> {
        let Some(findings) = &self.suspected else { return Ok(Vec::new()) };
        let mut walked = self.walked.lock().await;
        let key = (stored.top, stored.size_bytes);
        if let Some(ranges) = walked.disks.get(&key) {
            return Ok(ranges.clone());
        }
        let whole = std::mem::take(&mut walked.whole);
        let mut walk = Walker::new(&self.blobs, self.chunk_levels, findings, control);
        walk.begin_with(whole);
        let bad = walk.bad_ranges(stored).await;
        walked.whole = walk.into_whole();
        let ranges = bad?.map(|(ranges, _)| ranges).unwrap_or_default();
        walked.disks.insert(key, ranges.clone());
        Ok(ranges)
    }
}

/// The packs, and which of them are damaged.
async fn findings(blobs: &Blobs) -> Result<Findings> {
    let mut findings = Findings::default();
    for_each(&*blobs.store, Folder::Packs.prefix(), |object| {
        if let Some(id) = from_hex::<16>(object.name.last()) {
            findings.packs.insert(id, object.size_bytes);
        }
    })
    .await?;
    findings.doubtful.extend(blobs.damaged.packs());
    Ok(findings)
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
