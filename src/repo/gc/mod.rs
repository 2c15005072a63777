//! The collector: frees what no point needs, beside running backups, without a global lock.
//!
//! ```text
//!  lease (one collector at a time) ─► lists published earlier ─► survey of runs
//!    ─► mark what the points need ─► spare what forgotten points need that are still relied on
//!    ─► repack mostly dead packs ─► publish a new condemned list ─► drop forgotten manifests
//!    ─► survey again; mark points that appeared since
//!    ─► for every list that is ripe: index without the dead packs ─► delete packs, segments, list
//! ```
//!
//! Why a committed point never misses a chunk. A list is *ripe* when no live run began before it was
//! visible. A run that began later read the list and dedups against none of its packs. A run that
//! began earlier may have, but it is over when the list is ripe, its manifest is seen by the marking
//! that follows, and what that needs is not deleted; if it lost its lease instead, it does not
//! commit. What a run keeps from a base, the base's own manifest keeps alive: a run checks at its
//! commit that the base is still a point. The base may rest on a pack that was condemned before the
//! run began (an older run needed it after all), and may be forgotten after that check; so may a
//! point that is being read. What such a point needs is condemned anew, and a pack on several lists
//! goes when all of them are ripe. Packs younger than the oldest live run are not condemned
//! at all, they may be its own. Damage anywhere (a node, a manifest, an index segment) stops the
//! collector: what is not known to be garbage stays.
//!
//! A pack that is known to be damaged ([`super::damaged`]) counts as a place for what has no other
//! copy, so it stays as long as something live may be readable from it, is not repacked, and goes
//! with its record once all that is live in it was stored anew. Damage that is found on the way may
//! have been taken for the copy to keep: the collector then starts over before it deletes anything.
//!
//! Repacking takes room before it makes any. Where there is none, the collector starts over with packs
//! of which next to nothing is needed, and then leaves it out: packs that nothing needs go, for which a
//! list and an index are enough.
//!
//! *Deletion*: this is the only place that deletes objects of points, packs and index.

mod mark;
mod repack;
#[cfg(test)]
pub(super) mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use serde::Serialize;

use super::blobs::Blobs;
use super::catalog;
use super::condemned::{self, CondemnedList, LIST_PACKS_MAX, PackId};
use super::damaged;
use super::forget::tombstone;
use super::index::merge::Keep;
use super::index::segment::segment_name;
use super::pack::PACK_BYTES;
use super::points::{self, PointName};
use super::run::{LEASE, LEASE_OF_WRITER, Lease, RunKind, Survey};
use super::seal::ObjectType;
use super::store::{Folder, ObjectName, StoreError, for_each, for_each_name, from_hex};
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::vm::PointId;
use mark::{Marker, Standing};

/// Manifests read at a time.
const MANIFESTS_AT_ONCE: usize = 64;

/// More segments than this are merged even if nothing is deleted.
const SEGMENTS_MAX: usize = 8;

/// Segments with more entries are merged only to drop some.
const MERGE_ENTRIES_MAX: u64 = 5_000_000;

/// Of a pack that is nearly dead at least this share is.
const NEARLY_DEAD_PERCENT: u8 = 90;

/// Packs smaller than this, once there are many, are repacked into full ones.
const SMALL_PACK_BYTES: u64 = PACK_BYTES / 8;

/// How many small packs of a type are many.
const SMALL_PACKS_MAX: usize = 32;

/// How to collect.
#[derive(Clone, Copy, Debug)]
pub struct CollectOptions {
    /// A pack of which at least this share is dead is repacked. 1 to 100.
    pub repack_dead_percent: u8,
}

impl Default for CollectOptions {
    fn default() -> Self {
        Self { repack_dead_percent: 40 }
    }
}

/// What a collection did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CollectReport {
    /// Points that were there and marked.
    pub points: usize,
    /// Forgotten points whose manifests were deleted.
    pub forgotten: usize,
    /// Packs deleted.
    pub packs_deleted: usize,
    /// Bytes they took.
    pub bytes_freed: u64,
    /// Packs that go once the runs in `waiting_for` are over.
    pub packs_waiting: usize,
    /// Bytes they take.
    pub bytes_waiting: u64,
    /// Bytes moved out of mostly dead packs.
    pub bytes_repacked: u64,
    /// Live runs that began before what waits was condemned.
    pub waiting_for: Vec<String>,
}

/// A pack in the store.
#[derive(Clone, Copy, Debug)]
struct PackInfo {
    size_bytes: u64,
    stored: Timestamp,
}

/// Collects garbage. Fails with [`Kind::Busy`] while another collector is at work.
///
/// Not cancel-safe in the sense that dropping it leaves its lease to lapse; `control` stops it
/// between objects. Whenever it stops, the next collection goes on from there.
pub async fn collect(
    blobs: &Arc<Blobs>,
    chunk_levels: u32,
    options: CollectOptions,
    control: &Control,
) -> Result<CollectReport> {
    let lease = exclusive_lease(blobs).await?;
    let collector = Collector { blobs, chunk_levels, options, control, lease: &lease };
    let result = collector.run_until_settled().await;
    if let Err(error) = lease.end().await {
        tracing::warn!(%error, "cannot end the collector's lease");
    }
    result
}

/// A lease that only one can hold: two at once would each write an index without the other's
/// changes. Fails with [`Kind::Busy`] while another is held (of two that begin at the same moment,
/// one or both).
pub(super) async fn exclusive_lease(blobs: &Blobs) -> Result<Lease> {
    let lease = Lease::begin(&blobs.store, &blobs.keys, RunKind::Collect).await?;
    let survey = Survey::take(&*blobs.store).await?;
    let other = survey.live().find(|run| run.kind == RunKind::Collect && run.run != lease.run());
    let Some(other) = other else { return Ok(lease) };
    let message = format!("a collection or an index rebuild is at work since {}", other.started);
    lease.end().await?;
    Err(Error::new(Kind::Busy, message)
        .hint("wait for it; one that was killed counts for 30 minutes"))
}

/// Which packs are repacked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repacking {
    /// Those that are dead to the share asked for, and small ones.
    All,
    /// There is little room: those that give it back tenfold.
    NearlyDead,
    /// There is none.
    None,
}

impl Repacking {
    /// What to do where there was no room for this.
    fn less(self) -> Self {
        match self {
            Self::All => Self::NearlyDead,
            Self::NearlyDead | Self::None => Self::None,
        }
    }
}

struct Collector<'a> {
    blobs: &'a Arc<Blobs>,
    chunk_levels: u32,
    options: CollectOptions,
    control: &'a Control,
    lease: &'a Lease,
}

/// A point that was forgotten.
#[derive(Clone, Copy, Debug)]
struct Forgotten {
    point: PointId,
    /// When, by the store's clock.
    since: Timestamp,
    /// Its manifest, if that is still there.
    name: Option<PointName>,
}

/// What was found and decided so far.
struct State {
    marker: Marker,
    packs: BTreeMap<PackId, PackInfo>,
    condemned: HashSet<PackId>,
    marked: HashSet<PointId>,
    /// Packs known to be damaged when it began.
    damaged: usize,
    report: CollectReport,
}

impl Collector<'_> {
    /// Starts over while damage comes to light, and with less to repack if there is no room for it.
    /// Ends: each time there is a pack more to know of, or less to do.
    async fn run_until_settled(&self) -> Result<CollectReport> {
        let damaged = &self.blobs.damaged;
        damaged.load().await?;
        let mut repacking = Repacking::All;
        loop {
            let known = damaged.count();
            match self.run(repacking).await {
                Err(error) if error.kind() == Kind::Corrupt && damaged.count() > known => {}
                Err(error) if error.kind() == Kind::NoSpace && repacking != Repacking::None => {
                    // From the start: what was half moved may be nowhere yet.
                    if repacking == Repacking::All {
                        let text = "there is no room to repack all that is mostly garbage: run gc \
                                    again to free the rest";
                        self.control.notice(NoticeLevel::Warning, text);
                    }
                    tracing::debug!(%error, "starting over with less to repack");
                    repacking = repacking.less();
                }
                result => return result,
            }
        }
    }

    /// Fails when damage was found since the marking began: what is marked may be a damaged copy.
    async fn check_damage(&self, state: &State) -> Result<()> {
        // Others find damage, too.
        self.blobs.damaged.load().await?;
        if self.blobs.damaged.count() == state.damaged {
            return Ok(());
        }
        Err(Error::new(Kind::Corrupt, "damage was found in a pack: nothing is deleted")
            .hint("run 'check --read-data' to see which points are affected"))
    }

    async fn run(&self, repacking: Repacking) -> Result<CollectReport> {
        let Blobs { store, keys, .. } = &**self.blobs;
        // In this order: what is ripe by a survey was visible before it, and manifests are listed
        // after it.
        let mut lists = condemned::lists(&**store, keys).await?;
        let survey = Survey::take(&**store).await?;
        let mut ripe: HashSet<ObjectName> = self.ripe(&lists, &survey);

        let mut state = self.load(&lists).await?;
        let (names, forgotten) = self.points().await?;
        // After the tombstones were listed: who is not in it has seen them.
        let readers = Survey::take(&**store).await?;
        self.control.set_phase("marking what the points need");
        self.mark(&mut state, &names).await?;
        state.report.points = names.len();
        drop(names);
        self.check_damage(&state).await?;
        self.spare(&mut state, &forgotten, &readers).await?;

        let oldest = survey.live().map(|run| run.started).min();
        let cutoff = oldest.map_or(self.lease.started(), |o| o.min(self.lease.started()));
        if repacking != Repacking::None {
            self.repack(&mut state, cutoff, repacking).await?;
        }
        let new = self.condemn(&mut state, cutoff).await?;
        lists.extend(new.iter().cloned());
        state.report.forgotten = self.drop_forgotten(&forgotten).await?;

        let survey = Survey::take(&**store).await?;
        ripe.extend(self.ripe(&new, &survey));
        let (mut names, _) = self.points().await?;
        names.sort_unstable();
        self.mark(&mut state, &names).await?;
        self.control.set_phase("deleting");
        self.lease.check().await?;
        self.check_damage(&state).await?;
        self.carry_out(&mut state, &lists, &ripe).await?;
        self.clean_up(&survey, cutoff).await?;
        match catalog::tidy(self.blobs, &names, (cutoff, self.control)).await {
            Err(error) if error.kind() != Kind::Cancelled => {
                tracing::warn!(%error, "cannot put the catalog right: listing may be slow");
            }
            tidied => tidied?,
        }
        state.report.waiting_for = self.waited_for(&lists, &ripe, &survey);
        Ok(state.report)
    }

    /// The lists that no live run can have missed. The margin covers the time between a list's
    /// stamp and the moment it is visible.
    fn ripe(&self, lists: &[CondemnedList], survey: &Survey) -> HashSet<ObjectName> {
        let missed = |list: &CondemnedList| {
            survey.live().any(|run| {
                run.run != self.lease.run() && run.started <= list.stored + LEASE_OF_WRITER
            })
        };
        lists.iter().filter(|list| !missed(list)).map(|list| list.name.clone()).collect()
    }

    fn waited_for(
        &self,
        lists: &[CondemnedList],
        ripe: &HashSet<ObjectName>,
        survey: &Survey,
    ) -> Vec<String> {
        if lists.iter().all(|list| ripe.contains(&list.name)) {
            return Vec::new();
        }
        let others = survey.live().filter(|run| run.run != self.lease.run());
        others.map(|run| format!("{} (since {})", run.run, run.started)).collect()
    }

    /// The index, then the packs: an entry whose pack is not among them is void.
    async fn load(&self, lists: &[CondemnedList]) -> Result<State> {
        let index = &self.blobs.index;
        index.refresh().await?;
        if let Some(damaged) = index.damaged().first() {
            let message = format!("an index segment does not open: {}", damaged.what);
            return Err(Error::new(Kind::Corrupt, message)
                .hint("run 'check --rebuild-index' first: nothing is deleted until then"));
        }
        let segments = index.segments();
        let mut packs = BTreeMap::new();
        for_each(&*self.blobs.store, Folder::Packs.prefix(), |object| {
            if let Some(id) = from_hex::<16>(object.name.last()) {
                let info = PackInfo { size_bytes: object.size_bytes, stored: object.stored };
                packs.insert(id, info);
            }
        })
        .await?;
        let condemned: HashSet<PackId> =
            lists.iter().flat_map(|list| list.packs.iter().copied()).collect();
        let damaged = self.blobs.damaged.count();
        let standing = |id: &PackId| match () {
            () if self.blobs.damaged.contains(id) => Standing::Damaged,
            () if condemned.contains(id) => Standing::Condemned,
            () => Standing::Fine,
        };
        let standings = packs.keys().map(|id| (*id, standing(id))).collect();
        let marker = Marker::new(self.blobs, self.chunk_levels, &segments, standings);
        let report = CollectReport::default();
        Ok(State { marker, packs, condemned, marked: HashSet::new(), damaged, report })
    }

    /// Points that count, and those that were forgotten.
    async fn points(&self) -> Result<(Vec<PointName>, Vec<Forgotten>)> {
        let store = &*self.blobs.store;
        let mut forgotten: BTreeMap<PointId, Forgotten> = BTreeMap::new();
        for_each(store, Folder::Tombstones.prefix(), |object| {
            if let Ok(point) = object.name.last().parse::<PointId>() {
                forgotten.insert(point, Forgotten { point, since: object.stored, name: None });
            }
        })
        .await?;
        let mut names = Vec::new();
        for_each_name(store, Folder::Points.prefix(), |name| {
            let Some(name) = PointName::parse(&name) else { return };
            match forgotten.get_mut(&name.point) {
                Some(hidden) => hidden.name = Some(name),
                None => names.push(name),
            }
        })
        .await?;
        Ok((names, forgotten.into_values().collect()))
    }

    /// Takes what is needed by points that a live run may have seen before they were forgotten off
    /// the lists of the condemned: it is condemned anew, and waits for that run.
    async fn spare(
        &self,
        state: &mut State,
        forgotten: &[Forgotten],
        readers: &Survey,
    ) -> Result<()> {
        let relied_on = |point: &&Forgotten| {
            readers.live().any(|run| {
                run.run != self.lease.run() && run.started <= point.since + LEASE_OF_WRITER
            })
        };
        let names = forgotten.iter().filter(relied_on).filter_map(|point| point.name);
        let names: Vec<PointName> = names.collect();
        if names.is_empty() || state.condemned.is_empty() {
            return Ok(());
        }
        let mut marker = state.marker.unmarked();
        match self.mark_forgotten(&mut marker, &names).await {
            Ok(()) => state.condemned.retain(|id| marker.use_of(id).is_none()),
            // What a damaged one needs is not known: everything waits. It is forgotten, and must not
            // stop the collector.
            Err(error) if error.kind() == Kind::Corrupt => {
                tracing::warn!(%error, "a forgotten point is damaged");
                state.condemned.clear();
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn mark_forgotten(&self, marker: &mut Marker, names: &[PointName]) -> Result<()> {
        let Blobs { store, keys, .. } = &**self.blobs;
        for some in names.chunks(MANIFESTS_AT_ONCE) {
            for manifest in points::manifests(store, keys, some).await? {
                marker.mark(&manifest, self.control).await?;
            }
        }
        marker.finish().await
    }

    /// Marks what those of `names` need that were not marked yet.
    async fn mark(&self, state: &mut State, names: &[PointName]) -> Result<()> {
        let Blobs { store, keys, .. } = &**self.blobs;
        let new: Vec<PointName> =
            names.iter().filter(|name| !state.marked.contains(&name.point)).copied().collect();
        // What a listed manifest needs was indexed before the manifest was there.
        self.blobs.index.refresh().await?;
        state.marker.take_in_new(&self.blobs.index.segments()).await?;
        for some in new.chunks(MANIFESTS_AT_ONCE) {
            for manifest in points::manifests(store, keys, some).await? {
                state.marker.mark(&manifest, self.control).await?;
            }
            state.marked.extend(some.iter().map(|name| name.point));
        }
        state.marker.finish().await
    }

    /// Deletes the manifests of forgotten points, then their tombstones.
    async fn drop_forgotten(&self, forgotten: &[Forgotten]) -> Result<usize> {
        let manifests = forgotten.iter().filter_map(|point| point.name);
        for name in manifests.clone() {
            self.delete(&name.object()).await?;
        }
        if !forgotten.is_empty() {
            // Else a power cut might bring a manifest back without its tombstone.
            self.blobs.store.settle_deletions().await?;
        }
        for Forgotten { point, .. } in forgotten {
            self.delete(&tombstone(*point)).await?;
        }
        Ok(manifests.count())
    }

    /// Empties packs that are mostly dead, and small ones when there are many.
    async fn repack(&self, state: &mut State, cutoff: Timestamp, which: Repacking) -> Result<()> {
        let asked = self.options.repack_dead_percent.clamp(1, 100);
        let threshold = match which {
            Repacking::NearlyDead => asked.max(NEARLY_DEAD_PERCENT),
            Repacking::All | Repacking::None => asked,
        };
        self.control.set_phase("repacking");
        let types: HashMap<PackId, ObjectType> = state
            .marker
            .segments()
            .flat_map(|segment| segment.packs().iter().map(|pack| (pack.id, pack.object_type())))
            .collect();
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
                if dead_bytes * 100 >= info.size_bytes * u64::from(threshold) && dead_bytes > 4096 {
                    candidates.push(*id);
                } else if info.size_bytes < SMALL_PACK_BYTES {
                    small.push(*id);
                }
            }
            if small.len() > SMALL_PACKS_MAX && which == Repacking::All {
                candidates.append(&mut small);
            }
            if !candidates.is_empty() {
                state.report.bytes_repacked += repack::repack(
                    self.blobs,
                    &mut state.marker,
                    object_type,
                    &candidates,
                    self.control,
                )
                .await?;
            }
        }
        Ok(())
    }

    /// Publishes what is dead and not condemned yet.
    async fn condemn(&self, state: &mut State, cutoff: Timestamp) -> Result<Vec<CondemnedList>> {
        let Blobs { store, keys, .. } = &**self.blobs;
        let mut dead: Vec<PackId> = state
            .packs
            .iter()
            .filter(|(id, info)| {
                let unused = state.marker.use_of(id).is_none();
                unused && info.stored < cutoff && !state.condemned.contains(*id)
            })
            .map(|(id, _)| *id)
            .collect();
        dead.sort_unstable();
        let mut lists = Vec::new();
        for some in dead.chunks(LIST_PACKS_MAX) {
            lists.push(condemned::publish(&**store, keys, some.to_vec()).await?);
            for id in some {
                state.condemned.insert(*id);
                state.marker.condemn(*id);
            }
        }
        Ok(lists)
    }

    /// Deletes the packs of ripe lists that are dead, after the index forgot them.
    async fn carry_out(
        &self,
        state: &mut State,
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
                self.lease.check().await?;
            }
            self.delete(&ObjectName::pack(id)).await?;
            state.report.packs_deleted += 1;
            state.report.bytes_freed += state.packs[id].size_bytes;
        }
        self.drop_records().await?;
        for segment in self.blobs.index.superseded() {
            self.delete(&segment_name(&segment)).await?;
        }
        for list in lists.iter().filter(|list| ripe.contains(&list.name)) {
            self.delete(&list.name).await?;
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
    async fn rewrite_index(&self, state: &State, doomed: &BTreeSet<PackId>) -> Result<()> {
        let marker = &state.marker;
        let gone = |id: &PackId| doomed.contains(id) || marker.standing(id) == Standing::Missing;
        let many = marker.segments().count() > SEGMENTS_MAX;
        let (mut numbers, mut inputs) = (Vec::new(), Vec::new());
        for (number, segment) in marker.segments().enumerate() {
            let small = many && segment.entries() <= MERGE_ENTRIES_MAX;
            if small || segment.packs().iter().any(|pack| gone(&pack.id)) {
                numbers.push(number);
                inputs.push(Arc::clone(segment));
            }
        }
        if inputs.is_empty() {
            return Ok(());
        }
        let judge = |input: usize, ordinal: u64, entry: &super::index::IndexEntry| {
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

    /// Removes what runs that are over left behind.
    async fn clean_up(&self, survey: &Survey, cutoff: Timestamp) -> Result<()> {
        for run in survey.over() {
            for object in &run.objects {
                self.delete(object).await?;
            }
        }
        self.blobs.store.sweep(cutoff - LEASE).await?;
        Ok(())
    }

    /// Deletes an object; one that is gone already is fine: an earlier collection stopped there.
    async fn delete(&self, name: &ObjectName) -> Result<()> {
        self.control.check()?;
        match self.blobs.store.delete(name).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
