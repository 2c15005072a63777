//! The last part of a collection: what is garbage for sure is deleted, after the index forgot it.
//!
//! [`super`] tells why nothing that goes here is needed, and in which order; everything here may be
//! stopped at any object, and the next collection goes on from there.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::mark::{Marker, Standing};
use super::{Collector, Forgotten, Looked, MERGE_ENTRIES_MAX, SEGMENTS_MAX, State};
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result, with_causes};
use crate::repo::blobs::Blobs;
use crate::repo::condemned::{CondemnedList, PackId};
use crate::repo::damaged;
use crate::repo::forget::tombstone;
use crate::repo::index::merge::Keep;
use crate::repo::index::segment::segment_name;
use crate::repo::index::{IndexEntry, Segment};
use crate::repo::run::{LEASE, Survey};
use crate::repo::store::{ObjectName, StoreError};

/// Segments and their numbers.
type Numbered = Vec<(usize, Arc<Segment>)>;

/// The segments that have to be written anew when packs are `gone`: those that speak of one.
pub(super) fn to_rewrite(marker: &Marker, gone: impl Fn(&PackId) -> bool) -> Numbered {
    choose(marker, |segment| segment.packs().iter().any(|pack| gone(&pack.id)))
}

fn choose(marker: &Marker, wanted: impl Fn(&Segment) -> bool) -> Numbered {
    let segments = marker.segments().enumerate().filter(|(_, segment)| wanted(segment));
    segments.map(|(number, segment)| (number, Arc::clone(segment))).collect()
}

/// Removes what creators that are dead for long left behind; how many there were. Needs no lease: no
/// living run has anything that is older than itself.
pub(super) async fn sweep_leftovers(blobs: &Blobs) -> Result<u64> {
    let survey = Survey::take(&*blobs.store).await?;
    let oldest = survey.live().map(|run| run.started).min();
    Ok(blobs.store.sweep(oldest.map_or(survey.now, |run| run.min(survey.now)) - LEASE).await?)
}

/// What to do where they could not all be removed: that is no reason to free nothing else.
pub(super) fn stays(error: &Error) -> String {
    format!(
        "what killed runs left is not all removed: {}; see what protects it and remove it by hand \
         (no run needs it)",
        with_causes(error)
    )
}

/// How long after its point was forgotten a manifest may appear and still be known as forgotten: a server
/// that was asked to name it may do so when it is back from a repair.
const MANIFEST_LATE_MAX: Duration = Duration::from_secs(24 * 60 * 60);

impl Collector<'_> {
    /// Deletes the manifests of forgotten points, then their tombstones. One without a manifest stays for
    /// a while: of a run to which the store did not answer, whose manifest may yet appear.
    pub(super) async fn drop_forgotten(
        &self,
        forgotten: &[Forgotten],
        now: Timestamp,
    ) -> Result<usize> {
        let manifests = forgotten.iter().filter_map(|point| point.name);
        for name in manifests.clone() {
            self.delete(&name.object()).await?;
        }
        if !forgotten.is_empty() {
            // Else a power cut might bring a manifest back without its tombstone.
            self.blobs.store.settle_deletions().await?;
        }
        for Forgotten { point, since, name } in forgotten {
            if name.is_some() || now.duration_since(*since).unsigned_abs() > MANIFEST_LATE_MAX {
                self.delete(&tombstone(*point)).await?;
            }
        }
        Ok(manifests.count())
    }

    /// Deletes the packs of ripe lists that are dead, after the index forgot them.
    pub(super) async fn carry_out(
        &self,
        state: &mut State<'_>,
        lists: &[CondemnedList],
        ripe: &HashSet<ObjectName>,
    ) -> Result<()> {
        let (mut doomed, mut waiting) = (BTreeSet::new(), BTreeSet::new());
        for list in lists {
            let to = if ripe.contains(&list.name) { &mut doomed } else { &mut waiting };
            let is_dead =
                |id: &&PackId| state.packs.contains_key(*id) && state.marker.use_of(id).is_none();
            to.extend(list.packs.iter().filter(is_dead).copied());
        }
        // One that is on several lists waits for all of them.
        doomed.retain(|id| !waiting.contains(id));
        state.report.packs_waiting = waiting.len();
        state.report.bytes_waiting = waiting.iter().map(|id| state.packs[id].size_bytes).sum();
        self.rewrite_index(state, &doomed).await?;
        for (count, id) in doomed.iter().enumerate() {
            if count % 1000 == 999 {
                self.check_lease().await?;
            }
            self.delete(&ObjectName::pack(id)).await?;
            state.report.packs_deleted += 1;
            state.report.bytes_freed += state.packs[id].size_bytes;
        }
        self.drop_records().await?;
        self.drop_superseded().await?;
        for list in lists.iter().filter(|list| ripe.contains(&list.name)) {
            self.delete(&list.name).await?;
        }
        Ok(())
    }

    /// Deletes segments that others have replaced.
    async fn drop_superseded(&self) -> Result<()> {
        for segment in self.blobs.index.superseded() {
            self.delete(&segment_name(&segment)).await?;
        }
        Ok(())
    }

    /// Deletes the records about packs that are gone.
    async fn drop_records(&self) -> Result<()> {
        let Blobs { store, damaged, .. } = &**self.blobs;
        damaged.load().await?;
        for id in damaged.packs() {
            match store.stat(&ObjectName::pack(&id)).await {
                Ok(_) => {}
                Err(error) if error.is_not_found() => {
                    self.delete(&damaged::record_name(&id)).await?;
                    damaged.forget(&id);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Merges segments that speak of doomed or missing packs, and small ones when there are many.
    async fn rewrite_index(&self, state: &State<'_>, doomed: &BTreeSet<PackId>) -> Result<()> {
        let marker = &state.marker;
        let gone = &|id: &PackId| doomed.contains(id) || marker.standing(id) == Standing::Missing;
        let needed = to_rewrite(marker, gone);
        if marker.segments().count() > SEGMENTS_MAX {
            let names: HashSet<usize> = needed.iter().map(|(number, _)| *number).collect();
            let small = choose(marker, |segment| segment.entries() <= MERGE_ENTRIES_MAX);
            let more = small.into_iter().filter(|(number, _)| !names.contains(number));
            let all: Numbered = needed.iter().cloned().chain(more).collect();
            let is_more = all.len() > needed.len();
            match self.merge(marker, all, gone).await {
                // Room is held for what must be.
                Err(error) if error.kind() == Kind::NoSpace && is_more => {
                    tracing::debug!(%error, "no room to merge small segments");
                }
                merged => return merged,
            }
        }
        self.merge(marker, needed, gone).await
    }

    async fn merge(
        &self,
        marker: &Marker,
        segments: Numbered,
        gone: impl Fn(&PackId) -> bool + Sync,
    ) -> Result<()> {
        if segments.is_empty() {
            return Ok(());
        }
        let (numbers, inputs): (Vec<_>, Vec<_>) = segments.into_iter().unzip();
        let judge = |input: usize, ordinal: u64, entry: &IndexEntry| {
            let pack = &entry.location.pack.id;
            match marker.standing(pack) {
                _ if gone(pack) => Keep::No,
                Standing::Fine if marker.is_entry_marked(numbers[input], ordinal) => Keep::Surely,
                Standing::Fine => Keep::Yes,
                Standing::Damaged => Keep::IfAlone,
                Standing::Condemned | Standing::Missing => Keep::Reluctantly,
            }
        };
        self.blobs.index.merge(&inputs, &self.blobs.index.superseded(), &judge).await
    }

    /// Removes the leases of runs that are over.
    pub(super) async fn clean_up(&self, survey: &Survey) -> Result<()> {
        for run in survey.over() {
            for object in &run.objects {
                self.delete(object).await?;
            }
        }
        Ok(())
    }

    /// After there was no room for something: removes what can go without writing anything.
    pub(super) async fn make_what_room_there_is(&self, looked: &Looked) {
        // Others have replaced them durably, whatever becomes of this round.
        if let Err(error) = self.drop_superseded().await {
            tracing::debug!(%error, "segments that were replaced are not all removed");
        }
        if let Err(error) = self.clean_up(&looked.survey).await {
            tracing::debug!(%error, "leases of runs that are over are not all removed");
        }
    }

    /// Deletes an object; one that is gone already is fine: an earlier collection stopped there.
    pub(super) async fn delete(&self, name: &ObjectName) -> Result<()> {
        self.control.check()?;
        match self.blobs.store.delete(name).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
