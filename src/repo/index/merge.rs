//! Merging index segments into one, without the entries of packs that are about to go.
//!
//! A k-way merge over sorted segments, a block of each in memory. The last of the new segments
//! names those it replaces: until it is there, the old ones count, and entries that are there twice
//! do no harm.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use super::segment::{BLOCK_ENTRIES, IndexEntry, Segment, SegmentWriter};
use super::{Index, SegmentId};
use crate::error::Result;
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
    expected: u64,
}

impl Output<'_> {
    async fn push(&mut self, entry: &IndexEntry) -> Result<()> {
        if self.entries == MERGED_ENTRIES_MAX
            && let Some(writer) = self.writer.take()
        {
            writer.finish(&[]).await?;
        }
        if self.writer.is_none() {
            let (store, keys) = (&*self.index.store, &self.index.keys);
            let expected = self.expected.clamp(1, MERGED_ENTRIES_MAX);
            self.writer = Some(SegmentWriter::create(store, keys, &random(), expected).await?);
            self.entries = 0;
        }
        if let Some(writer) = &mut self.writer {
            writer.push(entry).await?;
        }
        self.entries += 1;
        self.expected = self.expected.saturating_sub(1);
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
        let mut cursors: Vec<Cursor> = Vec::with_capacity(inputs.len());
        let mut heap: BinaryHeap<Reverse<(BlobId, usize)>> = BinaryHeap::new();
        for (number, segment) in inputs.iter().enumerate() {
            let segment = Arc::clone(segment);
            let mut cursor =
                Cursor { segment, block: Vec::new(), next_block: 0, at: 0, ordinal: 0 };
            if let Some(entry) = cursor.peek(self).await? {
                heap.push(Reverse((entry.id, number)));
            }
            cursors.push(cursor);
        }
        let expected = inputs.iter().map(|segment| segment.entries()).sum();
        let mut output = Output { index: self, writer: None, entries: 0, expected };
        while let Some(Reverse((id, _))) = heap.peek().copied() {
            let mut best: Option<(Keep, IndexEntry)> = None;
            while let Some(Reverse((_, number))) = heap.peek().copied().filter(|top| top.0.0 == id)
            {
                heap.pop();
                let cursor = &mut cursors[number];
                let ordinal = cursor.ordinal;
                if let Some(entry) = cursor.peek(self).await? {
                    let keep = judge(number, ordinal, entry);
                    if keep > best.as_ref().map_or(Keep::No, |(keep, _)| *keep) {
                        best = Some((keep, entry.clone()));
                    }
                }
                cursor.advance();
                if let Some(entry) = cursor.peek(self).await? {
                    heap.push(Reverse((entry.id, number)));
                }
            }
            if let Some((_, entry)) = best {
                output.push(&entry).await?;
            }
        }
        let supersedes: Vec<SegmentId> =
            inputs.iter().map(|segment| segment.id).chain(also.iter().copied()).collect();
        let last = match output.writer {
            Some(writer) => writer,
            // Nothing is left: an empty segment says that the others are gone.
            None => SegmentWriter::create(&*self.store, &self.keys, &random(), 1).await?,
        };
        last.finish(&supersedes).await?;
        self.refresh().await
    }
}

impl Segment {
    /// The number of an entry within the segment.
    pub fn ordinal(&self, block: usize, slot: usize) -> u64 {
        block as u64 * BLOCK_ENTRIES as u64 + slot as u64
    }
}
