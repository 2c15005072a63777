//! Merging index segments into one, without the entries of packs that are about to go.
//!
//! A k-way merge over sorted segments, a block of each in memory. The last of the new segments
//! names those it replaces: until it is there, the old ones count, and entries that are there twice
//! do no harm.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::segment::{BLOCK_ENTRIES, IndexEntry, Segment, SegmentWriter, segment_name};
use super::{Index, SegmentId};
use crate::error::{Kind, Result};
use crate::repo::seal::{BlobId, random};

/// Most entries of a merged segment: a filter of 24 MiB.
const MERGED_ENTRIES_MAX: u64 = 20_000_000;

/// What to do with an entry: the highest of those for one id stays, [`Keep::No`] never.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keep {
    /// Its pack is gone or about to go.
    No,
    /// Only if there is no other at all.
    IfAlone,
    /// Only if there is no better one.
    Reluctantly,
    /// Unless a marked one is there.
    Yes,
    /// This one.
    Surely,
}

/// Judges entry `ordinal` of input segment `input`.
pub type Judge<'a> = &'a (dyn Fn(usize, u64, &IndexEntry) -> Keep + Sync);

struct Cursor {
    segment: Arc<Segment>,
    block: Vec<IndexEntry>,
    next_block: usize,
    at: usize,
    ordinal: u64,
}

impl Cursor {
    /// The current entry; reads the next block when it must.
    async fn peek(&mut self, index: &Index) -> Result<Option<&IndexEntry>> {
        if self.at == self.block.len() && self.next_block < self.segment.blocks() {
            self.block = self.segment.read_block(&*index.store, self.next_block).await?;
            self.next_block += 1;
            self.at = 0;
        }
        Ok(self.block.get(self.at))
    }

    fn advance(&mut self) {
        self.at += 1;
        self.ordinal += 1;
    }
}

/// Writes segments one after the other.
struct Output<'a> {
    index: &'a Index,
    writer: Option<SegmentWriter>,
    entries: u64,
    entries_max: u64,
    expected: u64,
    /// All of them, the one being written included.
    ids: Vec<SegmentId>,
}

impl Output<'_> {
    async fn push(&mut self, entry: &IndexEntry) -> Result<()> {
        if self.entries == self.entries_max
            && let Some(writer) = self.writer.take()
        {
            writer.finish(&[]).await?;
        }
        if self.writer.is_none() {
            self.writer = Some(self.begin().await?);
            self.entries = 0;
        }
        if let Some(writer) = &mut self.writer {
            writer.push(entry).await?;
        }
        self.entries += 1;
        self.expected = self.expected.saturating_sub(1);
        Ok(())
    }

    async fn begin(&mut self) -> Result<SegmentWriter> {
        let (store, keys) = (&*self.index.store, &self.index.keys);
        let (id, expected) = (random(), self.expected.clamp(1, self.entries_max));
        self.ids.push(id);
        SegmentWriter::create(store, keys, &id, expected).await
    }

    /// Ends the last one, which replaces what `supersedes` names.
    async fn finish(&mut self, supersedes: &[SegmentId]) -> Result<()> {
        let last = match self.writer.take() {
            Some(writer) => writer,
            // Nothing is left: an empty segment says that the others are gone.
            None => self.begin().await?,
        };
        last.finish(supersedes).await
    }

    /// Deletes what was written before there was no room for the rest: it would take ever more of it
    /// with each attempt. Only what certainly replaces nothing; the inputs have all that is in it.
    async fn take_back(self) -> Result<()> {
        let Some((last, whole)) = self.ids.split_last() else { return Ok(()) };
        if !self.index.is_certainly_absent(last).await {
            return Ok(());
        }
        for id in whole {
            self.index.store.delete(&segment_name(id)).await?;
        }
        Ok(())
    }
}

impl Index {
    /// Replaces `inputs` by merged segments that hold what `judge` keeps; `also` are segments that
    /// were superseded before and must not come back. The inputs' objects are the caller's to
    /// delete, once this returned.
    pub async fn merge(
        &self,
        inputs: &[Arc<Segment>],
        also: &[SegmentId],
        judge: Judge<'_>,
    ) -> Result<()> {
        self.merge_into_many(MERGED_ENTRIES_MAX, inputs, also, judge).await
    }

    /// The same into segments of at most so many entries.
    async fn merge_into_many(
        &self,
        entries_max: u64,
        inputs: &[Arc<Segment>],
        also: &[SegmentId],
        judge: Judge<'_>,
    ) -> Result<()> {
        let expected = inputs.iter().map(|segment| segment.entries()).sum();
        let (index, ids) = (self, Vec::new());
        let mut output = Output { index, writer: None, entries: 0, entries_max, expected, ids };
        let mut written = output.take_all(inputs, judge).await;
        if written.is_ok() {
            let replaced = inputs.iter().map(|segment| segment.id);
            let supersedes: Vec<SegmentId> = replaced.chain(also.iter().copied()).collect();
            written = output.finish(&supersedes).await;
        }
        match written {
            Err(error) if error.kind() == Kind::NoSpace => {
                drop(output.writer.take());
                if let Err(left) = output.take_back().await {
                    tracing::debug!(error = %left, "a part of a merged index stays");
                }
                Err(error)
            }
            Err(error) => Err(error),
            Ok(()) => self.refresh().await,
        }
    }
}

impl Output<'_> {
    /// Writes what `judge` keeps of `inputs`.
    async fn take_all(&mut self, inputs: &[Arc<Segment>], judge: Judge<'_>) -> Result<()> {
        let index = self.index;
        let mut cursors: Vec<Cursor> = Vec::with_capacity(inputs.len());
        let mut heap: BinaryHeap<Reverse<(BlobId, usize)>> = BinaryHeap::new();
        for (number, segment) in inputs.iter().enumerate() {
            let segment = Arc::clone(segment);
            let mut cursor =
                Cursor { segment, block: Vec::new(), next_block: 0, at: 0, ordinal: 0 };
            if let Some(entry) = cursor.peek(index).await? {
                heap.push(Reverse((entry.id, number)));
            }
            cursors.push(cursor);
        }
        while let Some(Reverse((id, _))) = heap.peek().copied() {
            let mut best: Option<(Keep, IndexEntry)> = None;
            while let Some(Reverse((_, number))) = heap.peek().copied().filter(|top| top.0.0 == id)
            {
                heap.pop();
                let cursor = &mut cursors[number];
                let ordinal = cursor.ordinal;
                if let Some(entry) = cursor.peek(index).await? {
                    let keep = judge(number, ordinal, entry);
                    if keep > best.as_ref().map_or(Keep::No, |(keep, _)| *keep) {
                        best = Some((keep, entry.clone()));
                    }
                }
                cursor.advance();
                if let Some(entry) = cursor.peek(index).await? {
                    heap.push(Reverse((entry.id, number)));
                }
            }
            if let Some((_, entry)) = best {
                self.push(&entry).await?;
            }
        }
        Ok(())
    }
}

impl Segment {
    /// The number of an entry within the segment.
    pub fn ordinal(&self, block: usize, slot: usize) -> u64 {
        block as u64 * BLOCK_ENTRIES as u64 + slot as u64
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::tier::tests::entry;
    use super::*;
    use crate::clock::SystemClock;
    use crate::repo::seal::{Keys, MasterKey};
    use crate::repo::store::memory::{Fault, MemoryStore, Operation};

    /// Entries of a merged segment: of 200, the seventh is the last.
    const ENTRIES_MAX: u64 = 30;

    async fn two_segments() -> (Arc<MemoryStore>, Index) {
        let store = Arc::new(MemoryStore::new(Arc::new(SystemClock)));
        let keys = Arc::new(Keys::new(&MasterKey::from_bytes([5; 32])));
        let index = Index::open(Arc::clone(&store) as Arc<_>, keys).await.unwrap();
        for ids in [0..100, 100..200] {
            index.add(ids.map(|n| entry(n, 1, n)).collect()).await.unwrap();
        }
        (store, index)
    }

    async fn merge(index: &Index) -> Result<()> {
        let inputs = index.segments();
        index.merge_into_many(ENTRIES_MAX, &inputs, &[], &|_, _, _| Keep::Yes).await
    }

    async fn assert_knows_all(index: &Index) {
        index.refresh().await.unwrap();
        for n in 0..200 {
            let found = index.lookup(&entry(n, 1, n).id, &|_| true).await.unwrap();
            assert!(found.is_some(), "entry {n} is lost");
        }
    }

    /// Makes finishing the `nth` segment, from 1 on, fail so.
    fn fail(store: &MemoryStore, nth: usize, fault: Fault) {
        let count = AtomicUsize::new(0);
        store.set_fault_hook(move |call| {
            let is_it = matches!(call, Operation::Finish(_))
                && count.fetch_add(1, Ordering::Relaxed) + 1 == nth;
            is_it.then_some(fault)
        });
    }

    /// The segments that were whole by then stayed, and left less room with each collection.
    #[tokio::test]
    async fn a_merge_that_finds_no_room_midway_leaves_nothing() {
        let (store, index) = two_segments().await;
        let before = store.names();
        for nth in 1..=7 {
            fail(&store, nth, Fault::Full);
            assert_eq!(merge(&index).await.unwrap_err().kind(), Kind::NoSpace);
            assert_eq!(store.names(), before, "segment {nth}");
            assert_knows_all(&index).await;
        }
        store.clear_fault_hook();
        merge(&index).await.unwrap();
        assert_eq!(index.segments().len(), 7);
        assert_knows_all(&index).await;
    }

    /// What replaced the inputs is then all there is.
    #[tokio::test]
    async fn a_merge_takes_nothing_back_where_the_last_segment_may_be_there() {
        let (store, index) = two_segments().await;
        fail(&store, 7, Fault::LoseAnswer);
        merge(&index).await.unwrap_err();
        store.clear_fault_hook();
        assert_knows_all(&index).await;
        assert_eq!(index.segments().len(), 7);
        let (store, index) = two_segments().await;
        let count = AtomicUsize::new(0);
        store.set_fault_hook(move |call| match call {
            Operation::Finish(_) if count.fetch_add(1, Ordering::Relaxed) == 6 => Some(Fault::Full),
            Operation::Stat(_) => Some(Fault::Fail),
            _ => None,
        });
        let before = store.names().len();
        merge(&index).await.unwrap_err();
        store.clear_fault_hook();
        assert_eq!(store.names().len(), before + 6);
        assert_knows_all(&index).await;
    }
}
