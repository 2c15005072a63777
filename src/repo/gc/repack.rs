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
//! Room that is needed to free the emptied packs is held meanwhile ([`super::room`]). It is given
//! back for the moment in which the batch is indexed; where others were faster then, no segment is
//! there, and the batch is taken back like one that found no room.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::copy::{To, copy_live};
use super::mark::{Marker, Standing};
use super::room::{Batch, Held, room_beside_others, room_to_free, segment_bytes};
use super::rounds::Room;
use super::sweep::to_rewrite;
use super::{Collector, Looked, SMALL_PACKS_MAX, State};
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

/// After so many packs' worth has moved, it is asked whether others are at work by now.
const LOOK_PACKS: u64 = 4;

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
    /// So many packs are empty, of which so many bytes were needed.
    Packs { count: usize, bytes: u64 },
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
    /// room: `first` is tried first.
    pub(super) async fn repack(
        &self,
        state: &mut State<'_>,
        looked: &Looked,
        first: Batch,
    ) -> Result<Room> {
        let candidates = self.candidates(state, looked.cutoff);
        if candidates.is_empty() {
            return Ok(Room::Enough);
        }
        self.control.set_phase("repacking");
        let room_bytes = room_to_rewrite(state, &candidates);
        let packs = candidates.iter().flat_map(|(_, packs)| packs);
        let left_bytes = packs.map(|id| live_bytes(state, id)).sum();
        let others = self.others(&looked.survey).next().is_some();
        let batch = if others { first.min(Batch::BESIDE_OTHERS) } else { first };
        let mut repacker = Repacker {
            collector: self,
            held: None,
            room_bytes,
            left_bytes,
            others,
            unlooked_bytes: 0,
            batch: Some(batch),
            is_refused: false,
        };
        if !repacker.leaves_room().await? {
            return Ok(Room::LeftToOthers);
        }
        repacker.hold().await?;
        let mut room = Room::Enough;
        // What does not fit of one type keeps nothing of the other from moving.
        for (object_type, packs) in candidates {
            room = room.and(repacker.repack(state, object_type, packs).await?);
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

/// What is needed of a pack.
fn live_bytes(state: &State<'_>, id: &PackId) -> u64 {
    state.marker.use_of(id).map_or(0, |used| used.bytes)
}

struct Repacker<'a> {
    collector: &'a Collector<'a>,
    held: Option<Held>,
    /// What is held.
    room_bytes: u64,
    /// What is still to be moved.
    left_bytes: u64,
    /// Others are at work: what is emptied now goes later, and they need room, too.
    others: bool,
    /// What has moved since it was asked whether others are at work.
    unlooked_bytes: u64,
    /// What is tried next; nothing when there is no room left.
    batch: Option<Batch>,
    /// There was no room for something already: batches only shrink.
    is_refused: bool,
}

impl Repacker<'_> {
    /// Moves what is needed of `packs` (which are of one type) into new packs. The marker knows the
    /// new copies afterwards, and needs nothing of packs that were emptied.
    async fn repack(
        &mut self,
        state: &mut State<'_>,
        object_type: ObjectType,
        mut packs: Vec<PackId>,
    ) -> Result<Room> {
        packs.sort_by_key(|id| live_bytes(state, id));
        let mut rest = &packs[..];
        while !rest.is_empty() {
            self.look_between_batches().await?;
            let Some(batch) = self.batch else { return Ok(self.short()) };
            let first_bytes = live_bytes(state, &rest[0]);
            if first_bytes > batch.bytes_max {
                if self.is_refused {
                    return Ok(self.short());
                }
                self.batch = Some(Batch::of(first_bytes));
                continue;
            }
            if !self.leaves_room().await? {
                return Ok(Room::LeftToOthers);
            }
            match self.attempt(state, object_type, rest, batch).await? {
                Moved::Packs { count, bytes } => {
                    self.left_bytes = self.left_bytes.saturating_sub(bytes);
                    rest = &rest[count..];
                    if !self.is_refused && !self.others {
                        self.batch = self.batch.map(Batch::more);
                    }
                }
                // Smaller ones would only take the rest of the room from them.
                Moved::Nothing { .. } if self.others => self.batch = None,
                Moved::Nothing { fit_bytes } => {
                    self.is_refused = true;
                    let pack_bytes = self.collector.options.pack_bytes;
                    self.batch = self.batch.and(batch.less(fit_bytes, pack_bytes));
                }
            }
        }
        Ok(Room::Enough)
    }

    /// Whether enough stays for others at work, as far as the store tells, when all that is left is
    /// moved.
    async fn leaves_room(&self) -> Result<bool> {
        if !self.others {
            return Ok(true);
        }
        let Some(free) = self.collector.blobs.store.room_bytes().await? else { return Ok(true) };
        let held_bytes = if self.held.is_some() { 0 } else { self.room_bytes };
        let needed = held_bytes.saturating_add(room_beside_others(self.left_bytes));
        if free < needed {
            tracing::debug!(free, needed, "what room there is stays for the runs at work");
        }
        Ok(free >= needed)
    }

    /// What it means that there is no room.
    fn short(&self) -> Room {
        if self.others { Room::LeftToOthers } else { Room::Short }
    }

    /// Whether it is to be asked by now whether others are at work.
    fn is_to_look(&self) -> bool {
        !self.others && self.unlooked_bytes >= LOOK_PACKS * self.collector.options.pack_bytes
    }

    /// Looks at others while nothing is on its way: without what is held, for a question takes room,
    /// too.
    async fn look_between_batches(&mut self) -> Result<()> {
        if self.is_to_look() {
            self.release().await?;
            self.look_at_others().await?;
            self.hold().await?;
        }
        Ok(())
    }

    /// Whether others came to be at work since it was asked, which is asked now and then: from now on
    /// they are heeded. In the middle of a batch no room for the question is no room for the batch,
    /// and it is asked again before the next.
    async fn look_at_others(&mut self) -> Result<bool> {
        if !self.is_to_look() {
            return Ok(false);
        }
        let survey = Survey::take(&*self.collector.blobs.store).await?;
        self.unlooked_bytes = 0;
        self.others = self.collector.others(&survey).next().is_some();
        if self.others {
            self.batch = self.batch.map(|batch| batch.min(Batch::BESIDE_OTHERS));
        }
        Ok(self.others)
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
                let done = &packs[..copied.packs];
                if let Some(fit_bytes) = self.settle(&mut state.marker, entries, done).await? {
                    return Ok(Moved::Nothing { fit_bytes });
                }
                state.report.bytes_repacked += copied.bytes;
                Ok(Moved::Packs { count: copied.packs, bytes: copied.bytes })
            }
            Err(error) if error.kind() == Kind::NoSpace => {
                tracing::debug!(%error, "no room for a batch of what is repacked");
                let fit_bytes = self.discard(packs_of(&entries)).await?;
                Ok(Moved::Nothing { fit_bytes })
            }
            Err(error) => {
                if let Err(left) = self.discard(packs_of(&entries)).await {
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

    /// Copies as many of `packs` as a batch holds; fewer where others come to be at work.
    async fn copy(
        &mut self,
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
            if copied.packs > 0 && damage.is_none() && self.look_at_others().await? {
                break;
            }
            let to = if damage.is_none() { To::Packs(&attempt.packer) } else { To::Nowhere };
            match copy_live(blobs, marker, to, id).await {
                Ok(bytes) => {
                    copied.bytes += bytes;
                    self.unlooked_bytes += bytes;
                }
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

    /// Indexes what is durable, and lets go of the packs it came from. When there was no room for
    /// that, the new packs are deleted: their bytes. An error leaves them where they are: others may
    /// know of them.
    async fn settle(
        &mut self,
        marker: &mut Marker,
        entries: Vec<IndexEntry>,
        done: &[PackId],
    ) -> Result<Option<u64>> {
        self.release().await?;
        let ids: Vec<_> = entries.iter().map(|entry| entry.id).collect();
        let new = packs_of(&entries);
        let taken_bytes = segment_bytes(entries.len() as u64);
        let segment = if entries.is_empty() {
            None
        } else {
            let Some(segment) = self.collector.blobs.index.add_if_room(entries).await? else {
                tracing::debug!("others took the room for the index of what was moved");
                return self.discard(new).await.map(Some);
            };
            Some(segment)
        };
        for pack in new.keys() {
            marker.take_in(*pack);
        }
        for pack in done {
            marker.moved_away(pack);
            // So that the new copies are the ones that count.
            marker.condemn(*pack);
        }
        if let Some(segment) = segment {
            marker.add_segment(&segment);
            marker.mark_ids(ids).await?;
        }
        self.room_bytes = self.room_bytes.saturating_sub(taken_bytes);
        self.hold().await?;
        Ok(None)
    }

    /// Deletes packs that no index names; their bytes.
    async fn discard(&mut self, packs: BTreeMap<PackId, u64>) -> Result<u64> {
        // A renewal of the lease takes room.
        self.release().await?;
        // Without it somebody else may have rebuilt the index.
        self.collector.check_lease().await?;
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

/// The packs that `entries` speak of, and what they take.
fn packs_of(entries: &[IndexEntry]) -> BTreeMap<PackId, u64> {
    let mut packs: BTreeMap<PackId, u64> = BTreeMap::new();
    for entry in entries {
        *packs.entry(entry.location.pack.id).or_default() += u64::from(entry.location.stored_bytes);
    }
    packs
}

/// What was copied.
struct Copied {
    packs: usize,
    bytes: u64,
}
