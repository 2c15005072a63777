//! The index: where each blob lies, without ever holding all of it.
//!
//! It is a set of immutable sorted [`segment`]s in the store, one or more per run, merged as they
//! pile up. In memory are only their directories (an eighth of a byte of first id per entry), their
//! filters (ten bits per entry, past a bound in a file: [`filter_space`]) and a bounded cache of blocks.
//! A look-up for a new chunk ends at the filters;
//! one for a known chunk reads one block of 13 KiB, usually cached. Nothing is cached on a disk of the
//! host: for a store in a directory reading the segment itself is as cheap, and what is cached there
//! could be stale or damaged. A store that is far away may put such a cache below [`ObjectStore`].
//!
//! The set is a snapshot: [`Index::refresh`] takes in what other writers and the collector did. A
//! segment that does not open is left out with a warning, so that what the others know still restores;
//! `check --rebuild-index` puts back what it knew, and until then the collector deletes nothing.

pub mod filter;
pub mod filter_space;
pub mod merge;
pub mod segment;
mod tier;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use filter_space::{FILTER_BYTES_MAX, FilterSpace};
use tokio::time::Instant;

pub use segment::{IndexEntry, Location, PackRef, Segment, SegmentWriter, segment_name};

use super::seal::{BlobId, Keys, random};
use super::store::{Folder, ObjectStore, for_each, from_hex};
use crate::error::{Error, Kind, Result, with_causes};

/// Blocks kept in memory: about 30 MiB.
const CACHED_BLOCKS_MAX: usize = 1500;

/// How old the set may be for [`Index::refresh_now_and_then`].
const REFRESH_EVERY: Duration = Duration::from_secs(2);

/// Accepts a place to read from or to dedup against.
pub type Accept<'a> = &'a (dyn Fn(&Location) -> bool + Sync);

/// Accepts a pack.
pub type AcceptPack<'a> = &'a (dyn Fn(&[u8; 16]) -> bool + Sync);

type Segments = Arc<Vec<Arc<Segment>>>;

/// A segment that does not open.
#[derive(Clone, Debug)]
pub struct DamagedSegment {
    /// Its id.
    pub id: SegmentId,
    /// What is wrong with it.
    pub what: String,
    /// An error of the storage, which may pass, as opposed to proven damage.
    pub is_passing: bool,
}

/// The id of a segment.
pub type SegmentId = [u8; 16];

/// The repository's index.
#[derive(Debug)]
pub struct Index {
    store: Arc<dyn ObjectStore>,
    keys: Arc<Keys>,
    // Locked to clone or swap one pointer, never across an await.
    segments: RwLock<Segments>,
    damaged: Mutex<Vec<DamagedSegment>>,
    // Held by a refresh from its listing to its swap, and by whoever swaps in a segment that was
    // written: otherwise a listing from before would drop what was added meanwhile. Across awaits,
    // which is why it is the runtime's.
    changing: tokio::sync::Mutex<()>,
    /// Segments that are still stored but replaced by others.
    superseded: Mutex<Vec<SegmentId>>,
    blocks: Mutex<BlockCache>,
    /// When [`Index::refresh_now_and_then`] did so last.
    refreshed_then: Mutex<Option<Instant>>,
    filters: Arc<FilterSpace>,
}

impl Index {
    /// Opens every segment of the store.
    pub async fn open(store: Arc<dyn ObjectStore>, keys: Arc<Keys>) -> Result<Self> {
        Self::open_within(store, keys, FILTER_BYTES_MAX).await
    }

    /// The same with another bound for the filters in memory.
    async fn open_within(
        store: Arc<dyn ObjectStore>,
        keys: Arc<Keys>,
        filter_bytes_max: usize,
    ) -> Result<Self> {
        let index = Self {
            store,
            keys,
            segments: RwLock::default(),
            damaged: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            superseded: Mutex::default(),
            blocks: Mutex::default(),
            refreshed_then: Mutex::default(),
            filters: Arc::new(FilterSpace::new(filter_bytes_max)),
        };
        index.refresh().await?;
        Ok(index)
    }

    /// The segments in use.
    pub fn segments(&self) -> Segments {
        Arc::clone(&self.segments.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The segments that are left out because they do not open.
    pub fn damaged(&self) -> Vec<DamagedSegment> {
        lock(&self.damaged).clone()
    }

    /// The segments that are still stored but replaced by others: the collector's to delete.
    pub fn superseded(&self) -> Vec<SegmentId> {
        lock(&self.superseded).clone()
    }

    /// Takes in segments that appeared and lets go of those that are gone or superseded.
    pub async fn refresh(&self) -> Result<()> {
        let _changing = self.changing.lock().await;
        let mut listed = Vec::new();
        for_each(&*self.store, Folder::Index.prefix(), |object| {
            if let Some(id) = from_hex::<16>(object.name.last()) {
                listed.push(id);
            }
        })
        .await?;
        let known: HashMap<_, _> =
            self.segments().iter().map(|segment| (segment.id, Arc::clone(segment))).collect();
        let mut segments = Vec::with_capacity(listed.len());
        let mut damaged = Vec::new();
        for id in listed.iter().copied() {
            match known.get(&id) {
                Some(segment) => segments.push(Arc::clone(segment)),
                None => match Segment::open(&*self.store, &self.keys, &self.filters, id).await {
                    Ok(segment) => segments.push(Arc::new(segment)),
                    // Merged away between the listing and now: what superseded it was listed too,
                    // or will be by the next refresh.
                    Err(error) if error.kind() == Kind::NotFound => {}
                    // The repository is of a version we know: a header of a newer one is damage.
                    Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Io) => {
                        tracing::warn!(%error, "an index segment does not open and is left out");
                        let is_passing = error.kind() == Kind::Io;
                        damaged.push(DamagedSegment { id, what: with_causes(&error), is_passing });
                    }
                    Err(error) => return Err(error),
                },
            }
        }
        let superseded: HashSet<_> =
            segments.iter().flat_map(|s| s.supersedes.iter().copied()).collect();
        let replaced = |id: &SegmentId| superseded.contains(id);
        *lock(&self.superseded) = listed.iter().copied().filter(replaced).collect();
        segments.retain(|segment| !replaced(&segment.id));
        damaged.retain(|segment: &DamagedSegment| !replaced(&segment.id));
        *lock(&self.damaged) = damaged;
        *self.segments.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(segments);
        Ok(())
    }

    /// The same, unless this was asked a moment ago: for who comes once for every blob of a pack.
    pub async fn refresh_now_and_then(&self) -> Result<()> {
        let recent = |at: Instant| at.elapsed() < REFRESH_EVERY;
        if lock(&self.refreshed_then).is_some_and(recent) {
            return Ok(());
        }
        self.refresh().await?;
        *lock(&self.refreshed_then) = Some(Instant::now());
        Ok(())
    }

    /// Whether the blob may be known: no read, about one in a hundred new ones per segment passes.
    pub fn may_contain(&self, id: &BlobId) -> bool {
        self.segments().iter().any(|segment| segment.may_contain(id))
    }

    /// Where the blob lies, in a place that `accept` agrees to. Cancel-safe.
    pub async fn lookup(&self, id: &BlobId, accept: Accept<'_>) -> Result<Option<Location>> {
        match self.lookup_once(id, accept).await {
            // The collector merged a segment away under us.
            Err(error) if error.kind() == Kind::NotFound => {
                self.refresh().await?;
                self.lookup_once(id, accept).await
            }
            found => found,
        }
    }

    async fn lookup_once(&self, id: &BlobId, accept: Accept<'_>) -> Result<Option<Location>> {
        for segment in self.segments().iter().filter(|segment| segment.may_contain(id)) {
            if let Some(found) = self.lookup_in(segment, id, accept).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Every place the blob lies in, each once. Cancel-safe.
    pub async fn copies(&self, id: &BlobId) -> Result<Vec<Location>> {
        match self.copies_once(id).await {
            Err(error) if error.kind() == Kind::NotFound => {
                self.refresh().await?;
                self.copies_once(id).await
            }
            found => found,
        }
    }

    async fn copies_once(&self, id: &BlobId) -> Result<Vec<Location>> {
        let mut copies: Vec<Location> = Vec::new();
        for segment in self.segments().iter().filter(|segment| segment.may_contain(id)) {
            for (_, location) in self.entries_of(segment, id).await? {
                if !copies.contains(&location) {
                    copies.push(location);
                }
            }
        }
        Ok(copies)
    }

    async fn lookup_in(
        &self,
        segment: &Segment,
        id: &BlobId,
        accept: Accept<'_>,
    ) -> Result<Option<Location>> {
        let found = self.entries_of(segment, id).await?;
        let found = found.into_iter().find(|(_, location)| accept(location));
        Ok(found.map(|(_, location)| location))
    }

    /// The entries of a blob in `segment`, with their numbers: a blob that lies in several packs
    /// has one for each.
    pub async fn entries_of(&self, segment: &Segment, id: &BlobId) -> Result<Vec<(u64, Location)>> {
        let mut found = Vec::new();
        let Some(mut number) = segment.block_of(id) else { return Ok(found) };
        loop {
            let block = self.block(segment, number).await?;
            let first = block.partition_point(|entry| entry.id < *id);
            for (slot, entry) in block.iter().enumerate().skip(first) {
                if entry.id != *id {
                    break;
                }
                found.push((segment.ordinal(number, slot), entry.location.clone()));
            }
            // They may begin a block before.
            if first > 0 || number == 0 {
                return Ok(found);
            }
            number -= 1;
        }
    }

    /// Block `number` of `segment`, cached.
    async fn block(&self, segment: &Segment, number: usize) -> Result<Arc<Vec<IndexEntry>>> {
        let key = (segment.id, number);
        if let Some(block) = lock(&self.blocks).get(&key) {
            return Ok(block);
        }
        let block =
            segment.read_block(&*self.store, number).await.map_err(|error| match error.kind() {
                Kind::Corrupt => error.hint(REBUILD),
                _ => error,
            });
        let block = Arc::new(block?);
        lock(&self.blocks).insert(key, Arc::clone(&block));
        Ok(block)
    }

    /// Stores `entries` as a new segment, durable and in use when it returns.
    pub async fn add(&self, entries: Vec<IndexEntry>) -> Result<Option<Arc<Segment>>> {
        if entries.is_empty() {
            return Ok(None);
        }
        Ok(Some(self.add_superseding(entries, &[]).await?))
    }

    /// The same where it can be taken back what the entries name: nothing if there was no room, and
    /// certainly no segment is there.
    pub async fn add_if_room(&self, entries: Vec<IndexEntry>) -> Result<Option<Arc<Segment>>> {
        let id = random::<16>();
        match self.add_as(id, entries, &[]).await {
            Err(error) if error.kind() == Kind::NoSpace => {
                if self.is_certainly_absent(&id).await {
                    Ok(None)
                } else {
                    Err(error)
                }
            }
            added => added.map(Some),
        }
    }

    /// Whether no such segment is there, asked after there was no room for it. An answer that got lost
    /// is no refusal; but a segment may have got its name, or be durable, before there was no room for
    /// something else.
    async fn is_certainly_absent(&self, id: &SegmentId) -> bool {
        let asked = self.store.stat(&segment_name(id)).await;
        matches!(asked, Err(absent) if absent.is_not_found())
    }

    /// The same, in the place of other segments, which nobody asks once they have refreshed.
    pub async fn add_superseding(
        &self,
        entries: Vec<IndexEntry>,
        superseded: &[SegmentId],
    ) -> Result<Arc<Segment>> {
        self.add_as(random::<16>(), entries, superseded).await
    }

    async fn add_as(
        &self,
        id: SegmentId,
        mut entries: Vec<IndexEntry>,
        superseded: &[SegmentId],
    ) -> Result<Arc<Segment>> {
        let place = |entry: &IndexEntry| (entry.id, entry.location.pack.id);
        entries.sort_unstable_by_key(place);
        entries.dedup_by_key(|entry| place(entry));
        let count = entries.len() as u64;
        let mut writer = SegmentWriter::create(&*self.store, &self.keys, &id, count).await?;
        for entry in &entries {
            writer.push(entry).await?;
        }
        writer.finish(superseded).await?;
        let segment = Arc::new(Segment::open(&*self.store, &self.keys, &self.filters, id).await?);
        self.replace(Arc::clone(&segment), &HashSet::new()).await;
        Ok(segment)
    }

    /// Takes `segment`, which is durable, into use in the place of `replaced`. A refresh may have
    /// done so already.
    async fn replace(&self, segment: Arc<Segment>, replaced: &HashSet<SegmentId>) {
        let _changing = self.changing.lock().await;
        let mut segments = self.segments.write().unwrap_or_else(PoisonError::into_inner);
        let mut list = segments.as_ref().clone();
        list.retain(|known| !replaced.contains(&known.id) && known.id != segment.id);
        list.push(segment);
        *segments = Arc::new(list);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type BlockKey = ([u8; 16], usize);

/// Blocks by recency of use.
#[derive(Debug, Default)]
struct BlockCache {
    blocks: HashMap<BlockKey, (u64, Arc<Vec<IndexEntry>>)>,
    clock: u64,
}

impl BlockCache {
    fn get(&mut self, key: &BlockKey) -> Option<Arc<Vec<IndexEntry>>> {
        self.clock += 1;
        let (used, block) = self.blocks.get_mut(key)?;
        *used = self.clock;
        Some(Arc::clone(block))
    }

    fn insert(&mut self, key: BlockKey, block: Arc<Vec<IndexEntry>>) {
        if self.blocks.len() >= CACHED_BLOCKS_MAX {
            // The older half goes at once: cheap on average, and no list to keep.
            let mut used: Vec<u64> = self.blocks.values().map(|(used, _)| *used).collect();
            let (_, median, _) = used.select_nth_unstable(CACHED_BLOCKS_MAX / 2);
            let median = *median;
            self.blocks.retain(|_, (used, _)| *used > median);
        }
        self.clock += 1;
        self.blocks.insert(key, (self.clock, block));
    }
}

/// What to do where the index may not know what the packs hold.
const REBUILD: &str = "run 'vmbackup check --rebuild-index': it puts back what the index lost of the packs that are \
     there; what does not restore after it is damaged";

/// Whether `error` is one of the index, which has advice of its own: what it lost may all be there.
pub fn is_of_index(error: &Error) -> bool {
    error.hint_text() == Some(REBUILD)
}

/// The error for a blob that no segment knows.
pub fn missing(id: &BlobId) -> Error {
    Error::new(Kind::Corrupt, format!("blob {id} is not in the index")).hint(REBUILD)
}
