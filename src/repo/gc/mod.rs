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
//! Why a committed point never misses a chunk. A list is *ripe* when no live run began before it
//! was visible. A run that began later read the list and dedups against none of its packs. A run
//! that began earlier may have, but it is over when the list is ripe, its manifest is seen by the
//! marking that follows, and what that needs is not deleted; if it lost its lease instead, it does
//! not commit. What a run keeps from a base, the base's own manifest keeps alive: a run checks at its
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
//! Repacking takes room before it makes any. Where that ends, what was moved until then is carried
//! through to the deletion of the packs that it emptied, and the collector starts over with the
//! room that this made (rounds.rs). It ends when a round frees nothing: then there is no room even
//! for the smallest step, or what was emptied waits for runs that are at work. Packs that nothing
//! needs go in any case, for which a list and an index are enough. What killed runs left behind goes
//! before anything is written, and when there was no room for something.
//!
//! *Deletion*: this is the only place that deletes objects of points, packs and index.

mod copy;
mod mark;
mod repack;
mod room;
mod rounds;
mod sweep;
#[cfg(test)]
pub(super) mod tests;
#[cfg(test)]
mod tight;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use serde::Serialize;

use super::blobs::Blobs;
use super::catalog;
use super::condemned::{self, CondemnedList, LIST_PACKS_MAX, PackId};
use super::pack::PACK_BYTES;
use super::points::{self, PointName};
use super::run::{LEASE_OF_WRITER, Lease, RunKind, RunRecord, Survey};
use super::store::{Folder, ObjectName, for_each, for_each_name, from_hex};
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result};
use crate::vm::PointId;
use mark::{Marker, Standing};
use rounds::{Repacking, Room};

/// Manifests read at a time.
const MANIFESTS_AT_ONCE: usize = 64;

/// More segments than this are merged even if nothing is deleted.
const SEGMENTS_MAX: usize = 8;

/// Segments with more entries are merged only to drop some.
const MERGE_ENTRIES_MAX: u64 = 5_000_000;

/// How many small packs of a type, under an eighth of a full one, are many: they are repacked.
const SMALL_PACKS_MAX: usize = 32;

/// How to collect.
#[derive(Clone, Copy, Debug)]
pub struct CollectOptions {
    /// A pack of which at least this share is dead is repacked. 1 to 100.
    pub repack_dead_percent: u8,
    /// A new pack is full at so many bytes.
    pub pack_bytes: u64,
}

impl Default for CollectOptions {
    fn default() -> Self {
        Self { repack_dead_percent: 40, pack_bytes: PACK_BYTES }
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
    let lease = lease_with_room(blobs).await?;
    // Before any room is needed; what cannot be removed is told of at the end.
    let swept = sweep::sweep_leftovers(blobs).await;
    let collector = Collector { blobs, chunk_levels, options, control, lease: &lease };
    let result = collector.run_until_settled().await;
    if let Err(error) = swept {
        control.notice(NoticeLevel::Warning, sweep::stays(&error));
    }
    if let Err(error) = lease.end().await {
        tracing::warn!(%error, "cannot end the collector's lease");
    }
    result
}

/// The collector's lease. Where there is no room even for that, what killed runs left goes first.
async fn lease_with_room(blobs: &Blobs) -> Result<Lease> {
    match exclusive_lease(blobs).await {
        Err(error) if error.kind() == Kind::NoSpace => match sweep::sweep_leftovers(blobs).await {
            Ok(0) => Err(error),
            // One that stays keeps none of the others from being removed.
            _ => exclusive_lease(blobs).await,
        },
        lease => lease,
    }
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

struct Collector<'a> {
    blobs: &'a Arc<Blobs>,
    chunk_levels: u32,
    options: CollectOptions,
    control: &'a Control,
    lease: &'a Lease,
}

/// What a round begins with.
struct Looked {
    survey: Survey,
    /// What was stored later may belong to a run that is at work.
    cutoff: Timestamp,
    repacking: Repacking,
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
struct State<'r> {
    marker: Marker,
    packs: BTreeMap<PackId, PackInfo>,
    condemned: HashSet<PackId>,
    marked: HashSet<PointId>,
    /// Packs known to be damaged when it began.
    damaged: usize,
    report: &'r mut CollectReport,
}

impl Collector<'_> {
    /// Fails when damage was found since the marking began: what is marked may be a damaged copy.
    async fn check_damage(&self, state: &State<'_>) -> Result<()> {
        // Others find damage, too.
        self.blobs.damaged.load().await?;
        if self.blobs.damaged.count() == state.damaged {
            return Ok(());
        }
        Err(Error::new(Kind::Corrupt, "damage was found in a pack: nothing is deleted")
            .hint("run 'check --read-data' to see which points are affected"))
    }

    /// One round; what it did is added to `report`, also if it fails.
    async fn run(&self, repacking: Repacking, report: &mut CollectReport) -> Result<Room> {
        let Blobs { store, keys, .. } = &**self.blobs;
        // In this order: what is ripe by a survey was visible before it, and manifests are listed
        // after it.
        let lists = condemned::lists(&**store, keys).await?;
        let survey = Survey::take(&**store).await?;
        let oldest = survey.live().map(|run| run.started).min();
        let cutoff = oldest.map_or(self.lease.started(), |o| o.min(self.lease.started()));
        let looked = Looked { survey, cutoff, repacking };
        match self.collect(lists, &looked, report).await {
            Err(error) if error.kind() == Kind::NoSpace => {
                self.make_what_room_there_is(&looked).await;
                Err(error)
            }
            collected => collected,
        }
    }

    async fn collect(
        &self,
        mut lists: Vec<CondemnedList>,
        looked: &Looked,
        report: &mut CollectReport,
    ) -> Result<Room> {
        let store = &*self.blobs.store;
        let Looked { survey, cutoff, repacking } = looked;
        let mut ripe: HashSet<ObjectName> = self.ripe(&lists, survey);
        let mut state = self.load(&lists, report).await?;
        let (names, forgotten) = self.points().await?;
        // After the tombstones were listed: who is not in it has seen them.
        let readers = Survey::take(store).await?;
        self.control.set_phase("marking what the points need");
        self.mark(&mut state, &names).await?;
        state.report.points = names.len();
        drop(names);
        self.check_damage(&state).await?;
        self.spare(&mut state, &forgotten, &readers).await?;

        let room = match repacking {
            Repacking::From(batch) => self.repack(&mut state, looked, *batch).await?,
            Repacking::No => Room::Short,
        };
        let new = self.condemn(&mut state, *cutoff).await?;
        lists.extend(new.iter().cloned());
        state.report.forgotten += self.drop_forgotten(&forgotten, readers.now).await?;

        let survey = Survey::take(store).await?;
        ripe.extend(self.ripe(&new, &survey));
        let (mut names, _) = self.points().await?;
        names.sort_unstable();
        self.mark(&mut state, &names).await?;
        self.control.set_phase("deleting");
        self.check_lease().await?;
        self.check_damage(&state).await?;
        self.carry_out(&mut state, &lists, &ripe).await?;
        self.clean_up(&survey).await?;
        match catalog::tidy(self.blobs, &names, (*cutoff, self.control)).await {
            Err(error) if error.kind() != Kind::Cancelled => {
                tracing::warn!(%error, "cannot put the catalog right: listing may be slow");
            }
            tidied => tidied?,
        }
        state.report.waiting_for = self.waited_for(&lists, &ripe, &survey);
        Ok(room)
    }

    /// Fails once the lease was lost. It is renewed; without room for that, it is enough that
    /// it still counts.
    async fn check_lease(&self) -> Result<()> {
        match self.lease.check().await {
            Err(error) if error.kind() == Kind::NoSpace => self.lease.look().await,
            checked => checked.map(drop),
        }
    }

    /// The lists that no live run can have missed. The margin covers the time between a list's
    /// stamp and the moment it is visible.
    fn ripe(&self, lists: &[CondemnedList], survey: &Survey) -> HashSet<ObjectName> {
        let missed = |list: &CondemnedList| {
            self.others(survey).any(|run| run.started <= list.stored + LEASE_OF_WRITER)
        };
        lists.iter().filter(|list| !missed(list)).map(|list| list.name.clone()).collect()
    }

    /// The live runs of others.
    fn others<'s>(&self, survey: &'s Survey) -> impl Iterator<Item = &'s RunRecord> {
        survey.live().filter(|run| run.run != self.lease.run())
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
        self.others(survey).map(|run| format!("{} (since {})", run.run, run.started)).collect()
    }

    /// The index, then the packs: an entry whose pack is not among them is void.
    async fn load<'r>(
        &self,
        lists: &[CondemnedList],
        report: &'r mut CollectReport,
    ) -> Result<State<'r>> {
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
        state: &mut State<'_>,
        forgotten: &[Forgotten],
        readers: &Survey,
    ) -> Result<()> {
        let relied_on = |point: &&Forgotten| {
            self.others(readers).any(|run| run.started <= point.since + LEASE_OF_WRITER)
        };
        let names = forgotten.iter().filter(relied_on).filter_map(|point| point.name);
        let names: Vec<PointName> = names.collect();
        if names.is_empty() || state.condemned.is_empty() {
            return Ok(());
        }
        let mut marker = state.marker.unmarked();
        match self.mark_forgotten(&mut marker, &names).await {
            Ok(()) => state.condemned.retain(|id| marker.use_of(id).is_none()),
            // What a damaged one needs is not known: everything waits. It is forgotten, and must
            // not stop the collector.
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
    async fn mark(&self, state: &mut State<'_>, names: &[PointName]) -> Result<()> {
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

    /// Publishes what is dead and not condemned yet.
    async fn condemn(
        &self,
        state: &mut State<'_>,
        cutoff: Timestamp,
    ) -> Result<Vec<CondemnedList>> {
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
}
