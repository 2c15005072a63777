//! Merges segments as they pile up, so that look-ups ask few and opening a repository reads few.
//!
//! Every run adds a segment or more. When eight of about one size are there, they become one; so a
//! segment is rewritten once per factor of eight by which the repository grows. The merge streams:
//! it holds a few blocks per segment, whatever their size, and what it writes supersedes what it
//! read. Superseded segments are ignored by readers and deleted by the collector alone.
//!
//! Invariants: a merge loses nothing, and brings nothing back. A blob that lies in several packs
//! keeps an entry for each of them: the collector may be moving it from one to the other. Segments
//! that speak of a condemned pack are left alone: the collector may be about to drop those entries,
//! or to find that an older run needs them after all. Packs that are condemned later are not deleted
//! while the run that merges holds its lease; should it lose it just then, entries of packs that are
//! gone come back, which no run relies on (`trust`) and the next collection drops.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet, VecDeque};
use std::sync::Arc;

use super::{AcceptPack, Index, IndexEntry, Segment, SegmentWriter};
use crate::error::Result;
use crate::repo::seal::{BlobId, random};
use crate::repo::store::ObjectStore;

/// Segments of one tier that become one of the next.
const FAN_IN: usize = 8;

/// Segments of fewer entries than this are all of the lowest tier.
const TIER_ENTRIES: u64 = 4096;

/// Most entries that one merge rewrites, about 100 MB: a run is not held up for longer than a second
/// or two. Segments that large stay as they are; there is one per 500 GB of new data.
const MERGE_ENTRIES_MAX: u64 = 2_000_000;

/// Blocks that are read ahead of each segment being merged.
const BLOCKS_AHEAD: usize = 16;

/// Which of the segments with these numbers of entries to merge: the smallest tier that is full.
fn choose(entries: &[u64]) -> Option<Vec<usize>> {
    let tier = |entries: u64| (entries / TIER_ENTRIES).max(1).ilog(FAN_IN as u64);
    let highest = entries.iter().map(|n| tier(*n)).max()?;
    (0..=highest).find_map(|wanted| {
        let mut full = Vec::new();
        let mut sum: u64 = 0;
        for (at, count) in entries.iter().enumerate().filter(|(_, n)| tier(**n) == wanted) {
            if sum + count <= MERGE_ENTRIES_MAX {
                full.push(at);
                sum += count;
            }
        }
        (full.len() >= FAN_IN).then_some(full)
    })
}

impl Index {
    /// Merges the segments of a tier that is full, leaving out those that speak of a pack that
    /// `accept` refuses; durable and in use when it returns. Whether there was such a tier.
    /// Cancel-safe: a merge that is given up leaves at most a segment that nobody needs.
    pub async fn merge_tier(&self, accept: AcceptPack<'_>) -> Result<bool> {
        let mut segments = self.segments().as_ref().clone();
        segments.retain(|segment| segment.packs().iter().all(|pack| accept(&pack.id)));
        let entries: Vec<u64> = segments.iter().map(|segment| segment.entries()).collect();
        let Some(chosen) = choose(&entries) else { return Ok(false) };
        let sources: Vec<_> = chosen.iter().map(|at| Arc::clone(&segments[*at])).collect();
        let id = random::<16>();
        let count = chosen.iter().map(|at| entries[*at]).sum();
        let writer = SegmentWriter::create(&*self.store, &self.keys, &id, count).await?;
        merge_into(writer, &*self.store, &sources).await?;
        let merged = Arc::new(Segment::open(&*self.store, &self.keys, &self.filters, id).await?);
        let replaced: HashSet<_> = sources.iter().map(|segment| segment.id).collect();
        self.replace(merged, &replaced).await;
        tracing::debug!(segments = replaced.len(), entries = count, "merged index segments");
        Ok(true)
    }
}

/// The order of a merge: by id, and entries of the same blob side by side.
type Place = (BlobId, [u8; 16], u32);

fn place(entry: &IndexEntry) -> Place {
    (entry.id, entry.location.pack.id, entry.location.counter)
}

/// Streams `sources` into `writer` and ends it.
async fn merge_into(
    mut writer: SegmentWriter,
    store: &dyn ObjectStore,
    sources: &[Arc<Segment>],
) -> Result<()> {
    let mut cursors: Vec<Cursor> = sources.iter().map(|s| Cursor::new(Arc::clone(s))).collect();
    let mut heads = BinaryHeap::new();
    for (number, cursor) in cursors.iter_mut().enumerate() {
        if let Some(entry) = cursor.peek(store).await? {
            heads.push(Reverse((place(entry), number)));
        }
    }
    let mut last: Option<Place> = None;
    while let Some(Reverse((at, number))) = heads.pop() {
        let cursor = &mut cursors[number];
        let entry = cursor.pop();
        if last != Some(at) {
            writer.push(&entry).await?;
            last = Some(at);
        }
        if let Some(next) = cursor.peek(store).await? {
            heads.push(Reverse((place(next), number)));
        }
    }
    let supersedes: Vec<_> = sources.iter().map(|segment| segment.id).collect();
    writer.finish(&supersedes).await
}

/// Reads a segment from its first entry to its last.
struct Cursor {
    segment: Arc<Segment>,
    next_block: usize,
    ahead: VecDeque<IndexEntry>,
}

impl Cursor {
    fn new(segment: Arc<Segment>) -> Self {
        Self { segment, next_block: 0, ahead: VecDeque::new() }
    }

    /// The next entry, read if need be.
    async fn peek(&mut self, store: &dyn ObjectStore) -> Result<Option<&IndexEntry>> {
        if self.ahead.is_empty() && self.next_block < self.segment.blocks() {
            let end = (self.next_block + BLOCKS_AHEAD).min(self.segment.blocks());
            self.ahead = self.segment.read_blocks(store, self.next_block..end).await?.into();
            self.next_block = end;
        }
        Ok(self.ahead.front())
    }

    fn pop(&mut self) -> IndexEntry {
        self.ahead.pop_front().expect("it was peeked at")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::sync::atomic::{AtomicU32, Ordering};

    use proptest::prelude::*;

    use super::*;
    use crate::clock::SystemClock;
    use crate::repo::index::{Location, PackRef};
    use crate::repo::pack::Encoding;
    use crate::repo::seal::{HEADER_BYTES, Keys, MasterKey};
    use crate::repo::store::memory::{MemoryStore, Operation};

    pub(in crate::repo::index) fn entry(id: u32, pack: u8, counter: u32) -> IndexEntry {
        let pack = Arc::new(PackRef { id: [pack; 16], header: [pack; HEADER_BYTES] });
        let location = Location {
            pack,
            counter,
            offset: 40 + counter,
            stored_bytes: 100,
            plain_bytes: 200,
            encoding: Encoding::Zstd,
        };
        IndexEntry { id: BlobId(*blake3::hash(&id.to_le_bytes()).as_bytes()), location }
    }

    async fn empty() -> (Arc<dyn ObjectStore>, Arc<Keys>, Index) {
        let store: Arc<dyn ObjectStore> = Arc::new(MemoryStore::new(Arc::new(SystemClock)));
        let keys = Arc::new(Keys::new(&MasterKey::from_bytes([5; 32])));
        let index = Index::open(Arc::clone(&store), Arc::clone(&keys)).await.unwrap();
        (store, keys, index)
    }

    /// A refresh that had listed the store before a segment was added put the set of before in the
    /// place of the one with it.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn what_is_added_during_a_refresh_stays() {
        for merges in [false, true] {
            let store = Arc::new(MemoryStore::new(Arc::new(SystemClock)));
            let keys = Arc::new(Keys::new(&MasterKey::from_bytes([5; 32])));
            let as_store = Arc::clone(&store) as Arc<dyn ObjectStore>;
            let index = Arc::new(Index::open(as_store, keys).await.unwrap());
            for n in 0..8 {
                index.add(vec![entry(n, 1, 0)]).await.unwrap();
            }
            // The second page is asked for when the first was taken: it waits for the change, or
            // half a second where the change waits for the refresh.
            let (listed, is_listed) = std::sync::mpsc::channel();
            let (changed, is_changed) = std::sync::mpsc::channel::<()>();
            let (is_changed, pages) = (std::sync::Mutex::new(is_changed), AtomicU32::new(0));
            store.set_fault_hook(move |call| {
                let page = matches!(call, Operation::List(prefix) if prefix == "index/");
                if page && pages.fetch_add(1, Ordering::Relaxed) == 1 {
                    listed.send(()).unwrap();
                    let wait = std::time::Duration::from_millis(500);
                    let _ = is_changed.lock().unwrap().recv_timeout(wait);
                }
                None
            });
            let refreshing = Arc::clone(&index);
            let refresh = tokio::spawn(async move { refreshing.refresh().await });
            tokio::task::spawn_blocking(move || is_listed.recv().unwrap()).await.unwrap();
            if merges {
                assert!(index.merge_tier(&|_| true).await.unwrap());
            } else {
                index.add(vec![entry(9, 1, 0)]).await.unwrap();
            }
            let _ = changed.send(());
            refresh.await.unwrap().unwrap();
            store.clear_fault_hook();
            assert_eq!(index.segments().len(), if merges { 1 } else { 9 }, "merges: {merges}");
        }
    }

    #[test]
    fn the_smallest_full_tier_is_merged_and_large_segments_never() {
        assert_eq!(choose(&[]), None);
        assert_eq!(choose(&[10; 7]), None);
        assert_eq!(choose(&[10; 9]), Some((0..9).collect()));
        let mut mixed = vec![1_000_000; 3];
        mixed.extend([40_000; 8]);
        mixed.extend([10; 3]);
        assert_eq!(choose(&mixed), Some((3..11).collect()));
        assert_eq!(choose(&[1_000_000; 50]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        /// The model: a map from blob to the packs it lies in.
        #[test]
        fn merged_segments_know_what_the_segments_knew(
            runs in prop::collection::vec(prop::collection::vec((0_u32..3000, 0_u8..6), 0..700), 8..12),
            condemned in 5_u8..8,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let (store, keys, index) = empty().await;
                let mut model: BTreeMap<u32, HashSet<u8>> = BTreeMap::new();
                for run in &runs {
                    let mut entries = BTreeMap::new();
                    for (id, pack) in run {
                        entries.insert(*id, entry(*id, *pack, *id));
                    }
                    for (id, entry) in &entries {
                        model.entry(*id).or_default().insert(entry.location.pack.id[0]);
                    }
                    index.add(entries.into_values().collect()).await.unwrap();
                }
                let accept = |pack: &[u8; 16]| pack[0] != condemned;
                let before = index.segments();
                let free = |s: &&Arc<Segment>| s.packs().iter().all(|pack| accept(&pack.id));
                let expected = before.iter().filter(free).count();
                let merged = index.merge_tier(&accept).await.unwrap();
                prop_assert_eq!(merged, expected >= FAN_IN);
                let after = if merged { before.len() - expected + 1 } else { before.len() };
                let reopened = Index::open(Arc::clone(&store), Arc::clone(&keys)).await.unwrap();
                // Filters of which none fits memory.
                let spilled = Index::open_within(store, keys, 0).await.unwrap();
                prop_assert_eq!(spilled.filters.used_bytes(), 0);
                for index in [&index, &reopened, &spilled] {
                    prop_assert_eq!(index.segments().len(), after);
                    for id in 0..3000 {
                        for pack in 0..6_u8 {
                            let wanted = entry(id, pack, id);
                            let only = |found: &Location| found.pack.id[0] == pack;
                            let found = index.lookup(&wanted.id, &only).await.unwrap();
                            let there = model.get(&id).is_some_and(|packs| packs.contains(&pack));
                            prop_assert_eq!(found, there.then_some(wanted.location));
                        }
                    }
                }
                Ok(())
            })?;
        }
    }
}
