//! What of a stored disk is lost: the list of a reader that salvages.
//!
//! ```text
//!  a blob cannot be read ─► proven damage of the data? ── yes ─► its range is noted, and reads as zeroes
//!                                    └ no (error of the store, of the index) ─► the read fails
//! ```
//!
//! Invariant: a range is noted only if every copy of its blob that there is was read and is not what it
//! should be, or there is none. An error of the store may pass. An index that is damaged is none of the
//! data's: the packs know what it lost, so nothing counts as lost before it was rebuilt; nor does a
//! blob that lies in a pack which no segment lists.
//!
//! Made by `Repository::open_disk_salvaging`; whether the hold held and the point is still there is for
//! the caller to find out: what was collected is missing as well.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use super::blobs::Blobs;
use super::condemned::PackId;
use super::pack;
use super::seal::BlobId;
use super::store::{Folder, ObjectName, for_each_name, from_hex};
use crate::block::ByteRange;
use crate::error::{Error, Kind, Result, with_causes};

/// Blobs in packs that no segment lists: 64 MiB of ids. With more of them the index is beyond doubt
/// not whole.
const UNLISTED_MAX: usize = 1 << 21;

/// Ranges that are kept apart whatever the reasons: some 100 MiB. Past it, neighbours share one.
const RANGES_MAX: usize = 1 << 20;

/// A range of a disk that is lost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Where.
    pub range: ByteRange,
    /// Why, in words.
    pub reason: Arc<str>,
}

/// What a reader could not read.
#[derive(Debug)]
pub struct Losses {
    blobs: Arc<Blobs>,
    // Locked to push or take, never across an await.
    noted: Mutex<Vec<Loss>>,
    /// Blobs in packs that no segment of the index lists, once somebody asked.
    unlisted: OnceCell<HashSet<BlobId>>,
}

impl Losses {
    pub(super) fn new(blobs: Arc<Blobs>) -> Self {
        Self { blobs, noted: Mutex::default(), unlisted: OnceCell::new() }
    }

    /// What was noted since it was taken last: sorted, no two overlap, neighbours differ in their
    /// reasons.
    pub fn take(&self) -> Vec<Loss> {
        sorted(std::mem::take(&mut *self.lock()))
    }

    /// Takes note that `range` is lost.
    pub(super) fn note(&self, range: ByteRange, reason: String) {
        tracing::warn!(%range, reason, "a part of a stored disk is lost");
        append(&mut self.lock(), Loss { range, reason: reason.into() });
    }

    /// Why blob `id`, which failed to be read with `error`, is lost; the error when that is not
    /// proven.
    pub(super) async fn admit(&self, id: &BlobId, error: Error) -> Result<String> {
        if error.kind() != Kind::Corrupt {
            return Err(error);
        }
        let index = &self.blobs.index;
        // Fails where a part of the index that may know the blob does not open.
        index.copies(id).await.map_err(index_first)?;
        if let Some(segment) = index.damaged().first() {
            return Err(index_first(Error::new(Kind::Corrupt, segment.what.clone())));
        }
        let unlisted = self.unlisted.get_or_try_init(|| unlisted(&self.blobs)).await?;
        if unlisted.contains(id) {
            return Err(index_first(error));
        }
        Ok(with_causes(&error))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Loss>> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds a range behind the others, to the last of them where it continues that.
fn append(list: &mut Vec<Loss>, loss: Loss) {
    let full = list.len() >= RANGES_MAX;
    match list.last_mut() {
        Some(before)
            if before.range.end() == loss.range.offset()
                && (full || before.reason == loss.reason) =>
        {
            before.range = ByteRange::between(before.range.offset(), loss.range.end());
        }
        _ => list.push(loss),
    }
}

fn sorted(mut noted: Vec<Loss>) -> Vec<Loss> {
    noted.sort_by_key(|loss| loss.range.offset());
    let mut out: Vec<Loss> = Vec::new();
    for Loss { range, reason } in noted {
        let from = out.last().map_or(0, |last| last.range.end()).max(range.offset());
        if from < range.end() {
            append(&mut out, Loss { range: ByteRange::between(from, range.end()), reason });
        }
    }
    out
}

/// The blobs in packs that no segment lists: of runs that were given up, or of segments that are gone.
async fn unlisted(blobs: &Blobs) -> Result<HashSet<BlobId>> {
    blobs.index.refresh().await?;
    let segments = blobs.index.segments();
    let named: HashSet<PackId> =
        segments.iter().flat_map(|s| s.packs().iter().map(|pack| pack.id)).collect();
    let mut packs: Vec<PackId> = Vec::new();
    for_each_name(&*blobs.store, Folder::Packs.prefix(), |name| {
        packs.extend(from_hex::<16>(name.last()).filter(|id| !named.contains(id)));
    })
    .await?;
    let mut ids = HashSet::new();
    for pack in packs {
        match pack::read_contents(&*blobs.store, &blobs.keys, &ObjectName::pack(&pack)).await {
            Ok(contents) => ids.extend(contents.blobs.iter().map(|blob| blob.id)),
            // Not whole, so of no use; or collected meanwhile.
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::NotFound) => {}
            Err(error) => return Err(error),
        }
        if ids.len() > UNLISTED_MAX {
            let message = format!("{} blobs are in no segment of the index", ids.len());
            return Err(index_first(Error::new(Kind::Corrupt, message)));
        }
    }
    Ok(ids)
}

fn index_first(error: Error) -> Error {
    match error.kind() {
        Kind::Corrupt => error
            .context("the index is damaged, so it is not known whether the data is, too")
            .hint("run 'check --rebuild-index' first: the packs know what the index lost"),
        _ => error,
    }
}

#[cfg(test)]
mod tests;
