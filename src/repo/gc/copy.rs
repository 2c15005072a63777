//! Copying what is needed of a pack into new packs.
//!
//! Blobs are opened and sealed again (every pack has its own key) but not decoded: their encoding
//! stays.

use std::sync::Arc;

use super::mark::Marker;
use crate::error::Result;
use crate::repo::blobs::Blobs;
use crate::repo::condemned::PackId;
use crate::repo::pack::{self, PackContents, PackedBlob};
use crate::repo::packer::{EncodedBlob, Packer};
use crate::repo::store::{ObjectName, ReadRange};

/// Neighbouring blobs are read together up to this many bytes.
const READ_BYTES: u64 = 4 << 20;

/// What becomes of the blobs of a pack that are needed.
#[derive(Clone, Copy)]
pub(super) enum To<'a> {
    Packs(&'a Arc<Packer>),
    /// They are only opened, to see whether they do.
    Nowhere,
}

/// Copies what is marked in a pack; its bytes.
pub(super) async fn copy_live(
    blobs: &Arc<Blobs>,
    marker: &Marker,
    to: To<'_>,
    id: &PackId,
) -> Result<u64> {
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
