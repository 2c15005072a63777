//! Repacking: what is still needed of packs that are mostly dead moves into new packs.
//!
//! Blobs are opened and sealed again (every pack has its own key) but not decoded: their encoding
//! stays. The new copies are durable and indexed before the old packs are condemned.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::mark::Marker;
use crate::control::Control;
use crate::error::{Kind, Result};
use crate::repo::blobs::Blobs;
use crate::repo::condemned::PackId;
use crate::repo::failure::Failure;
use crate::repo::index::IndexEntry;
use crate::repo::pack::{self, PackContents, PackedBlob};
use crate::repo::packer::{DurableSink, EncodedBlob, Packer, Target};
use crate::repo::seal::ObjectType;
use crate::repo::store::{ObjectName, ReadRange};

/// Neighbouring blobs are read together up to this many bytes.
const READ_BYTES: u64 = 4 << 20;

/// Entries that become a segment on their own: about 24 MiB.
const SPILL_ENTRIES: usize = 250_000;

/// Gathers the entries of packs that became durable.
#[derive(Default)]
struct Gathered {
    // Locked for list operations, never across an await.
    entries: Mutex<Vec<IndexEntry>>,
}

impl Gathered {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<IndexEntry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl DurableSink for Gathered {
    async fn durable(&self, entries: Vec<IndexEntry>) -> Result<()> {
        self.lock().extend(entries);
        Ok(())
    }
}

/// Moves what is needed of `packs` (which are of one type) into new packs; the bytes moved. The
/// marker knows the new copies afterwards, and needs nothing of the old packs.
pub(super) async fn repack(
    blobs: &Arc<Blobs>,
    marker: &mut Marker,
    object_type: ObjectType,
    packs: &[PackId],
    control: &Control,
) -> Result<u64> {
    let gathered = Arc::new(Gathered::default());
    let failure = Failure::default();
    let target = Target {
        store: Arc::clone(&blobs.store),
        keys: Arc::clone(&blobs.keys),
        sink: Arc::clone(&gathered) as Arc<dyn DurableSink>,
        failure: failure.clone(),
    };
    let packer = Arc::new(Packer::new(target, object_type, 256 << 10));
    let mut moved_bytes = 0;
    let mut done = Vec::new();
    let mut damage = None;
    for id in packs {
        control.check()?;
        let to = if damage.is_none() { To::Packs(&packer) } else { To::Nowhere };
        match copy_live(blobs, marker, to, id).await {
            Ok(bytes) => moved_bytes += bytes,
            // Known to be damaged, it is left as it is when the collector starts over. It looks at
            // the others first: once for all of them.
            Err(error) if error.kind() == Kind::Corrupt => {
                blobs.damaged.report(id, &error).await;
                damage.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
        if damage.is_some() {
            continue;
        }
        done.push(*id);
        if gathered.lock().len() >= SPILL_ENTRIES {
            packer.flush().await?;
            settle(blobs, marker, &gathered, &mut done).await?;
        }
    }
    if let Some(error) = damage {
        packer.abort().await;
        return Err(error);
    }
    packer.flush().await?;
    failure.check()?;
    settle(blobs, marker, &gathered, &mut done).await?;
    Ok(moved_bytes)
}

/// What becomes of the blobs of a pack that are needed.
#[derive(Clone, Copy)]
enum To<'a> {
    Packs(&'a Arc<Packer>),
    /// They are only opened, to see whether they do.
    Nowhere,
}

/// Indexes what is durable, and lets go of the packs it came from.
async fn settle(
    blobs: &Arc<Blobs>,
    marker: &mut Marker,
    gathered: &Gathered,
    done: &mut Vec<PackId>,
) -> Result<()> {
    let entries = std::mem::take(&mut *gathered.lock());
    for entry in &entries {
        marker.take_in(entry.location.pack.id);
    }
    let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
    for pack in done.drain(..) {
        marker.moved_away(&pack);
        // So that the new copies are the ones that count.
        marker.condemn(pack);
    }
    if let Some(segment) = blobs.index.add(entries).await? {
        marker.add_segment(&segment);
        marker.mark_ids(ids).await?;
    }
    Ok(())
}

async fn copy_live(blobs: &Arc<Blobs>, marker: &Marker, to: To<'_>, id: &PackId) -> Result<u64> {
    let name = ObjectName::pack(id);
    let contents = pack::read_contents(&*blobs.store, &blobs.keys, &name).await?;
    let mut live = Vec::new();
    for blob in &contents.blobs {
        let place = marker.place(&blob.id).await?;
        if place.is_some_and(|place| place.pack.id == *id && marker.is_marked(&place)) {
            live.push(*blob);
        }
    }
    let mut rest = &live[..];
    while !rest.is_empty() {
        let (run, after) = rest.split_at(run_len(rest));
        copy_run(blobs, to, &name, &contents, run.to_vec()).await?;
        rest = after;
    }
    Ok(live.iter().map(|blob| u64::from(blob.stored_bytes)).sum())
}

/// How many of `blobs`, from the first on, lie side by side and are read together.
fn run_len(blobs: &[PackedBlob]) -> usize {
    let start = u64::from(blobs[0].offset);
    let mut end = start;
    blobs
        .iter()
        .take_while(|blob| {
            let fits = u64::from(blob.offset) == end && end - start < READ_BYTES;
            end = u64::from(blob.offset) + u64::from(blob.stored_bytes);
            fits
        })
        .count()
        .max(1)
}

async fn copy_run(
    blobs: &Arc<Blobs>,
    to: To<'_>,
    name: &ObjectName,
    contents: &PackContents,
    run: Vec<PackedBlob>,
) -> Result<()> {
    let len = run.iter().map(|blob| u64::from(blob.stored_bytes)).sum();
    let range = ReadRange::Exact { offset: u64::from(run[0].offset), len };
    let mut sealed = blobs.store.read(name, range).await?;
    let opener = blobs.keys.opener(contents.object_type, name, &contents.header)?;
    let packer = match to {
        To::Packs(packer) => Some(Arc::clone(packer)),
        To::Nowhere => None,
    };
    let sealing = packer.clone();
    let work = move || -> Result<Vec<_>> {
        let mut rest = &mut sealed[..];
        let mut out = Vec::with_capacity(run.len());
        for blob in run {
            let (part, after) = rest.split_at_mut(blob.stored_bytes as usize);
            rest = after;
            let encoded = opener.open_in_place(u64::from(blob.counter), part)?;
            let Some(sealing) = &sealing else { continue };
            let PackedBlob { id, kind, encoding, plain_bytes, .. } = blob;
            let bytes = encoded.to_vec().into();
            out.push(sealing.seal(EncodedBlob { id, kind, encoding, plain_bytes, bytes }));
        }
        Ok(out)
    };
    let sealed = blobs.workers.run(work).await??;
    if let Some(packer) = packer {
        for sealed in sealed {
            packer.send(sealed).await?;
        }
    }
    Ok(())
}
