//! Rebuilding the index: the trailers of the packs know all that it knew.
//!
//! What sound segments hold stays as it is. Every blob that none of them lists for its pack gets an
//! entry in a new segment; the last of them supersedes the segments that are damaged, so that nobody
//! asks those again and the collector deletes them. A segment of which only a part is damaged stays
//! in use while there is a pack whose own trailer is damaged: it may be the last to know its blobs.
//!
//! Nothing is overwritten or deleted. Backups may run meanwhile: an entry for a pack that is there
//! is never wrong. Runs under the collector's lease, so that nobody drops entries at the same time.

use std::sync::Arc;

use super::{CheckReport, Fault, is_finding, read_segment};
use crate::control::Control;
use crate::error::{Kind, Result};
use crate::repo::blobs::Blobs;
use crate::repo::condemned::PackId;
use crate::repo::gc;
use crate::repo::index::{IndexEntry, Location, PackRef, Segment};
use crate::repo::pack::{self, PackContents};
use crate::repo::run::Lease;
use crate::repo::store::{Folder, ObjectName, for_each, from_hex};

/// Entries that become a segment: about 24 MiB.
const SPILL_ENTRIES: usize = 250_000;

pub(super) async fn rebuild(
    blobs: &Arc<Blobs>,
    report: &mut CheckReport,
    control: &Control,
) -> Result<()> {
    let lease = gc::exclusive_lease(blobs).await?;
    let result = rebuild_under_lease(blobs, &lease, report, control).await;
    if let Err(error) = lease.end().await {
        tracing::warn!(%error, "cannot end the lease of the rebuild");
    }
    result
}

async fn rebuild_under_lease(
    blobs: &Arc<Blobs>,
    lease: &Lease,
    report: &mut CheckReport,
    control: &Control,
) -> Result<()> {
    blobs.index.refresh().await?;
    // One that could not be read may be whole: treated as one that is damaged in part.
    let (passing, damaged): (Vec<_>, Vec<_>) =
        blobs.index.damaged().into_iter().partition(|segment| segment.is_passing);
    let mut damaged: Vec<_> = damaged.into_iter().map(|segment| segment.id).collect();
    let mut partly: Vec<_> = passing.into_iter().map(|segment| segment.id).collect();
    let mut sound = Vec::new();
    for segment in blobs.index.segments().iter() {
        match read_segment(blobs, segment, control, &mut |_| {}).await {
            Ok(()) => sound.push(Arc::clone(segment)),
            Err(error) if error.kind() == Kind::Corrupt => partly.push(segment.id),
            Err(error) => return Err(error),
        }
    }
    let mut packs: Vec<PackId> = Vec::new();
    for_each(&*blobs.store, Folder::Packs.prefix(), |object| {
        packs.extend(from_hex::<16>(object.name.last()));
    })
    .await?;
    let mut entries = Vec::new();
    for id in packs {
        control.check()?;
        let name = ObjectName::pack(&id);
        match pack::read_contents(&*blobs.store, &blobs.keys, &name).await {
            Ok(contents) => lost(blobs, &sound, id, &contents, &mut entries).await?,
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) if is_finding(&error) => {
                report.fault(&name, Fault::of(&error));
                partly.clear();
            }
            Err(error) => return Err(error),
        }
        if entries.len() >= SPILL_ENTRIES {
            report.entries_rebuilt += entries.len() as u64;
            blobs.index.add(std::mem::take(&mut entries)).await?;
        }
    }
    report.entries_rebuilt += entries.len() as u64;
    damaged.append(&mut partly);
    lease.check().await?;
    if !entries.is_empty() || !damaged.is_empty() {
        blobs.index.add_superseding(entries, &damaged).await?;
    }
    blobs.index.refresh().await
}

/// The blobs of a pack that no sound segment lists.
async fn lost(
    blobs: &Blobs,
    sound: &[Arc<Segment>],
    id: PackId,
    contents: &PackContents,
    entries: &mut Vec<IndexEntry>,
) -> Result<()> {
    let pack = Arc::new(PackRef { id, header: contents.header });
    for blob in &contents.blobs {
        let mut listed = false;
        for segment in sound.iter().filter(|segment| segment.may_contain(&blob.id)) {
            let known = blobs.index.entries_of(segment, &blob.id).await?;
            listed |= known.iter().any(|(_, location)| location.pack.id == id);
        }
        if !listed {
            let location = Location {
                pack: Arc::clone(&pack),
                counter: blob.counter,
                offset: blob.offset,
                stored_bytes: blob.stored_bytes,
                plain_bytes: blob.plain_bytes,
                encoding: blob.encoding,
            };
            entries.push(IndexEntry { id: blob.id, location });
        }
    }
    Ok(())
}
