//! Repacking: what is still needed of packs that are mostly dead moves into new packs.
//!
//! ```text
//!  packs, the one with the least to move first ─► a batch: copy, all durable ─► indexed: they are
//!        ▲                                          │ no room                   empty now
//!        └── smaller batches, while that is of use ◄┴─ its new packs are deleted
//! ```
//!
//! The new copies are durable and indexed before the old packs are condemned. What an attempt made
//! before it found no room is deleted: no index ever named it, so nobody can rely on it (whoever
//! indexes packs that no index names has the collector's lease). What was indexed stays, always.
//!
//! Room that is needed to free the emptied packs is held meanwhile ([`super::room`]).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::copy::{To, copy_live};
use super::mark::{Marker, Standing};
use super::room::{Batch, Held, room_to_free, segment_bytes};
use super::sweep::to_rewrite;
use super::{Collector, Room, SMALL_PACKS_MAX, State};
use crate::clock::Timestamp;
use crate::error::{Error, Kind, Result};
use crate::repo::condemned::PackId;
use crate::repo::failure::Failure;
use crate::repo::index::IndexEntry;
use crate::repo::packer::{DurableSink, Packer, Target};
use crate::repo::run::Survey;
use crate::repo::seal::ObjectType;
use crate::repo::store::ObjectName;

/// Entries that become a segment on their own: about 24 MiB.
const SPILL_ENTRIES: usize = 250_000;

/// What repacking concerns.
type Candidates = Vec<(ObjectType, Vec<PackId>)>;

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

/// What became of a batch.
enum Moved {
    /// So many packs are empty.
    Packs(usize),
    /// There was no room; for so many bytes there was.
    Nothing { fit_bytes: u64 },
}

/// A batch on its way.
struct Attempt {
    packer: Arc<Packer>,
    gathered: Arc<Gathered>,
    failure: Failure,
}

impl Collector<'_> {
    /// Empties packs that are mostly dead, and small ones when there are many, as far as there is
    /// room.
    pub(super) async fn repack(
        &self,
        state: &mut State<'_>,
        cutoff: Timestamp,
        survey: &Survey,
    ) -> Result<Room> {
        let candidates = self.candidates(state, cutoff);
        if candidates.is_empty() {
            return Ok(Room::Enough);
        }
        self.control.set_phase("repacking");
        let room_bytes = room_to_rewrite(state, &candidates);
        let store = &*self.blobs.store;
        let Some(held) = Held::take(store, room_bytes).await? else {
            return Ok(Room::Short);
        };
        // While others are at work, what is emptied now goes later: where there is no room, smaller
        // batches would only take the rest of it from them.
        let waits = survey.live().any(|run| run.run != self.lease.run());
        let mut repacker =
            Repacker { collector: self, held: Some(held), room_bytes, batch: Some(Batch::ALL) };
        let mut room = Room::Enough;
        // What does not fit of one type keeps nothing of the other from moving.
        for (object_type, packs) in candidates {
            if repacker.repack(state, object_type, packs, waits).await? == Room::Short {
                room = Room::Short;
            }
        }
        repacker.release().await?;
        Ok(room)
    }

    /// The packs to empty.
    fn candidates(&self, state: &State<'_>, cutoff: Timestamp) -> Candidates {
        let threshold = u64::from(self.options.repack_dead_percent.clamp(1, 100));
        let types: HashMap<PackId, ObjectType> = state
            .marker
            .segments()
            .flat_map(|segment| segment.packs().iter().map(|pack| (pack.id, pack.object_type())))
            .collect();
        let mut all = Vec::new();
        for object_type in [ObjectType::TreePack, ObjectType::DataPack] {
            let mut candidates = Vec::new();
            let mut small = Vec::new();
            for (id, info) in &state.packs {
                let Some(used) = state.marker.use_of(id) else { continue };
                let settled = info.stored < cutoff && !state.condemned.contains(id);
                let whole = state.marker.standing(id) != Standing::Damaged;
                if !whole || !settled || types.get(id) != Some(&object_type) {
                    continue;
                }
                let dead_bytes = info.size_bytes.saturating_sub(used.bytes);
                // A pack's own header and trailer are dead bytes, too, if it is tiny.
                if dead_bytes * 100 >= info.size_bytes * threshold && dead_bytes > 4096 {
                    candidates.push(*id);
                } else if info.size_bytes < self.options.pack_bytes / 8 {
                    small.push(*id);
                }
            }
            if small.len() > SMALL_PACKS_MAX {
                candidates.append(&mut small);
            }
            if !candidates.is_empty() {
                all.push((object_type, candidates));
            }
        }
        all
    }
}

/// What the index takes when it forgets all that may go.
fn room_to_rewrite(state: &State<'_>, candidates: &Candidates) -> u64 {
    let marker = &state.marker;
    let going: BTreeSet<&PackId> = candidates.iter().flat_map(|(_, packs)| packs).collect();
    let may_go = |id: &PackId| going.contains(id) || marker.use_of(id).is_none();
    let entries = to_rewrite(marker, may_go).iter().map(|(_, segment)| segment.entries()).sum();
    room_to_free(entries)
}

struct Repacker<'a> {
    collector: &'a Collector<'a>,
    held: Option<Held>,
    room_bytes: u64,
    /// What is tried next; nothing when there is no room left.
    batch: Option<Batch>,
}

impl Repacker<'_> {
    /// Moves what is needed of `packs` (which are of one type) into new packs. The marker knows the
    /// new copies afterwards, and needs nothing of packs that were emptied.
    async fn repack(
        &mut self,
        state: &mut State<'_>,
        object_type: ObjectType,
        mut packs: Vec<PackId>,
        waits: bool,
    ) -> Result<Room> {
        let live_bytes = |state: &State<'_>, id: &PackId| state.marker.use_of(id).map(|u| u.bytes);
        packs.sort_by_key(|id| live_bytes(state, id));
        let mut rest = &packs[..];
        while !rest.is_empty() {
            let Some(batch) = self.batch else { return Ok(Room::Short) };
            let first = live_bytes(state, &rest[0]).unwrap_or(0);
            if first > batch.bytes_max {
                return Ok(Room::Short);
            }
            match self.attempt(state, object_type, rest, batch).await? {
                Moved::Packs(count) => rest = &rest[count..],
                Moved::Nothing { .. } if waits => self.batch = None,
                Moved::Nothing { fit_bytes } => {
                    let pack_bytes = self.collector.options.pack_bytes;
                    self.batch = batch.less(fit_bytes, pack_bytes);
                }
            }
        }
        Ok(Room::Enough)
    }

    /// Moves as many of `packs`, from the first on, as a batch holds: all of them, or none.
    async fn attempt(
        &mut self,
        state: &mut State<'_>,
        object_type: ObjectType,
        packs: &[PackId],
        batch: Batch,
    ) -> Result<Moved> {
        let attempt = self.begin(object_type);
        let copied = self.copy(&attempt, &state.marker, packs, batch).await;
        if matches!(&copied, Err(error) if error.kind() == Kind::Cancelled) {
            attempt.packer.abort().await;
        }
        // All that can become durable does, and nobody writes any more.
        let flushed = attempt.packer.flush().await;
        let result = copied.and_then(|copied| flushed.map(|()| copied));
        let entries = std::mem::take(&mut *attempt.gathered.lock());
        match result {
            Ok(copied) => {
                state.report.bytes_repacked += copied.bytes;
                self.settle(&mut state.marker, entries, &packs[..copied.packs]).await?;
                Ok(Moved::Packs(copied.packs))
            }
            Err(error) if error.kind() == Kind::NoSpace => {
                tracing::debug!(%error, "no room for a batch of what is repacked");
                let fit_bytes = self.discard(entries).await?;
                Ok(Moved::Nothing { fit_bytes })
            }
            Err(error) => {
                if let Err(left) = self.discard(entries).await {
                    tracing::debug!(error = %left, "new packs stay for a later collection");
                }
                Err(error)
            }
        }
    }

    fn begin(&self, object_type: ObjectType) -> Attempt {
        let Collector { blobs, options, .. } = self.collector;
        let gathered = Arc::new(Gathered::default());
        let failure = Failure::default();
        let target = Target {
            store: Arc::clone(&blobs.store),
            keys: Arc::clone(&blobs.keys),
            sink: Arc::clone(&gathered) as Arc<dyn DurableSink>,
            failure: failure.clone(),
        };
        let packer = Packer::new(target, object_type, 256 << 10).of_pack_bytes(options.pack_bytes);
        Attempt { packer: Arc::new(packer), gathered, failure }
    }

    async fn copy(
        &self,
        attempt: &Attempt,
        marker: &Marker,
        packs: &[PackId],
        batch: Batch,
    ) -> Result<Copied> {
        let Collector { blobs, control, .. } = self.collector;
        let mut copied = Copied { packs: 0, bytes: 0 };
        let mut damage: Option<Error> = None;
        for id in packs {
            control.check()?;
            attempt.failure.check()?;
            let live_bytes = marker.use_of(id).map_or(0, |used| used.bytes);
            let full = copied.bytes.saturating_add(live_bytes) > batch.bytes_max
                || attempt.gathered.lock().len() >= SPILL_ENTRIES;
            if copied.packs > 0 && full && damage.is_none() {
                break;
            }
            let to = if damage.is_none() { To::Packs(&attempt.packer) } else { To::Nowhere };
            match copy_live(blobs, marker, to, id).await {
                Ok(bytes) => copied.bytes += bytes,
                // Known to be damaged, it is left as it is when the collector starts over. It looks
                // at the others first: once for all of them.
                Err(error) if error.kind() == Kind::Corrupt => {
                    blobs.damaged.report(id, &error).await;
                    damage.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
            copied.packs += 1;
        }
        damage.map_or(Ok(copied), Err)
    }

    /// Indexes what is durable, and lets go of the packs it came from. An error leaves the new packs
    /// where they are: others may know of them.
    async fn settle(
        &mut self,
        marker: &mut Marker,
        entries: Vec<IndexEntry>,
        done: &[PackId],
    ) -> Result<()> {
        self.release().await?;
        for entry in &entries {
            marker.take_in(entry.location.pack.id);
        }
        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        for pack in done {
            marker.moved_away(pack);
            // So that the new copies are the ones that count.
            marker.condemn(*pack);
        }
        let taken_bytes = segment_bytes(entries.len() as u64);
        if let Some(segment) = self.collector.blobs.index.add(entries).await? {
            marker.add_segment(&segment);
            marker.mark_ids(ids).await?;
        }
        self.room_bytes = self.room_bytes.saturating_sub(taken_bytes);
        self.hold().await
    }

    /// Deletes packs that no index names; their bytes.
    async fn discard(&mut self, entries: Vec<IndexEntry>) -> Result<u64> {
        // A renewal of the lease takes room.
        self.release().await?;
        let mut packs: BTreeMap<PackId, u64> = BTreeMap::new();
        for entry in &entries {
            *packs.entry(entry.location.pack.id).or_default() +=
                u64::from(entry.location.stored_bytes);
        }
        // Without it somebody else may have rebuilt the index.
        self.collector.lease.check().await?;
        for id in packs.keys() {
            self.collector.delete(&ObjectName::pack(id)).await?;
        }
        self.hold().await?;
        Ok(packs.values().sum())
    }

    /// Holds what is needed to free packs; if that is gone, nothing more is moved.
    async fn hold(&mut self) -> Result<()> {
        self.held = Held::take(&*self.collector.blobs.store, self.room_bytes).await?;
        if self.held.is_none() {
            self.batch = None;
        }
        Ok(())
    }

    async fn release(&mut self) -> Result<()> {
        match self.held.take() {
            Some(held) => held.release().await,
            None => Ok(()),
        }
    }
}

/// What was copied.
struct Copied {
    packs: usize,
    bytes: u64,
}
