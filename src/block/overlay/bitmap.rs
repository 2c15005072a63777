//! Which blocks of a disk were written, in memory.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::block::ByteRange;

/// A bit stands for this much: what file systems write at once.
pub(super) const BLOCK_BYTES: u64 = 4096;

/// The bitmap is stored in pages of this many words: 4 KiB.
const PAGE_WORDS: usize = 512;

/// Bits of a word.
const WORD_BITS: u64 = 64;

/// Blocks that a page tells of: 128 MiB of disk.
const PAGE_BLOCKS: u64 = PAGE_WORDS as u64 * WORD_BITS;

/// A page in memory.
type Words = [u64; PAGE_WORDS];

/// A bit per block, and which pages of bits changed since they were stored.
pub(super) struct Bitmap {
    // Held for a few words at a time, never across an await.
    state: Mutex<State>,
}

struct State {
    blocks: u64,
    /// Only pages with a bit in them are in memory: see [`Bitmap::new`].
    pages: Vec<Option<Box<Words>>>,
    changed: BTreeSet<usize>,
}

impl State {
    fn page(&self, index: usize) -> &Words {
        self.pages[index].as_deref().unwrap_or(&[0; PAGE_WORDS])
    }

    fn word(&self, word: usize) -> u64 {
        self.page(word / PAGE_WORDS)[word % PAGE_WORDS]
    }
}

/// A page of the bitmap as it is stored: its index and its bytes.
pub(super) type Page = (usize, Vec<u8>);

impl Bitmap {
    /// Nothing written of a disk of `size_bytes`. Memory is taken for what is written: 4 KiB for
    /// each 128 MiB of disk with anything in them, and 64 KiB per TiB of disk to know which.
    pub(super) fn new(size_bytes: u64) -> Self {
        let blocks = size_bytes.div_ceil(BLOCK_BYTES);
        let state =
            State { blocks, pages: vec![None; pages(size_bytes)], changed: BTreeSet::new() };
        Self { state: Mutex::new(state) }
    }

    /// Takes a page as it was stored. Bits behind the end of the disk are nobody's.
    pub(super) fn load(&self, index: usize, bytes: &[u8]) {
        if bytes.iter().all(|byte| *byte == 0) {
            return;
        }
        let mut state = self.lock();
        let mut page = Box::new([0; PAGE_WORDS]);
        let mut first = index as u64 * PAGE_BLOCKS;
        for (word, stored) in page.iter_mut().zip(bytes.chunks_exact(8)) {
            let stored = u64::from_le_bytes(stored.try_into().expect("eight bytes"));
            *word = match state.blocks.saturating_sub(first) {
                bits @ 0..WORD_BITS => stored & ((1 << bits) - 1),
                _ => stored,
            };
            first += WORD_BITS;
        }
        state.pages[index] = Some(page);
    }

    /// Bytes a stored bitmap takes: whole pages.
    pub(super) fn stored_bytes(size_bytes: u64) -> u64 {
        pages(size_bytes) as u64 * BLOCK_BYTES
    }

    /// The same for a disk that has grown to `size_bytes`: nothing of what is new was written.
    pub(super) fn grow(&self, size_bytes: u64) {
        let mut state = self.lock();
        state.blocks = state.blocks.max(size_bytes.div_ceil(BLOCK_BYTES));
        let len = pages(size_bytes).max(state.pages.len());
        state.pages.resize(len, None);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the block at `offset` was written.
    pub(super) fn has(&self, offset: u64) -> bool {
        let (word, bit) = place(offset / BLOCK_BYTES);
        self.lock().word(word) & bit != 0
    }

    /// Marks every block that `range` touches.
    pub(super) fn mark(&self, range: ByteRange) {
        let mut state = self.lock();
        let State { pages, changed, .. } = &mut *state;
        let mut block = range.offset() / BLOCK_BYTES;
        let end = range.end().div_ceil(BLOCK_BYTES);
        while block < end {
            let (word, bit) = place(block);
            let whole = block.is_multiple_of(WORD_BITS) && end - block >= WORD_BITS;
            let bits = if whole { u64::MAX } else { bit };
            let index = word / PAGE_WORDS;
            let page = pages[index].get_or_insert_with(|| Box::new([0; PAGE_WORDS]));
            let word = &mut page[word % PAGE_WORDS];
            if *word & bits != bits {
                *word |= bits;
                changed.insert(index);
            }
            block += if whole { WORD_BITS } else { 1 };
        }
    }

    /// The longest start of `range` (not empty) whose blocks are all written or all not, and which.
    pub(super) fn run(&self, range: ByteRange) -> (ByteRange, bool) {
        let state = self.lock();
        let first = range.offset() / BLOCK_BYTES;
        let end = range.end().div_ceil(BLOCK_BYTES);
        let (word, bit) = place(first);
        let written = state.word(word) & bit != 0;
        let same = if written { u64::MAX } else { 0 };
        let mut block = first + 1;
        while block < end {
            let (word, bit) = place(block);
            let absent = state.pages[word / PAGE_WORDS].is_none();
            block += if absent && !written && block.is_multiple_of(PAGE_BLOCKS) {
                PAGE_BLOCKS
            } else if block.is_multiple_of(WORD_BITS) && state.word(word) == same {
                WORD_BITS
            } else if (state.word(word) & bit != 0) == written {
                1
            } else {
                break;
            };
        }
        let end = block.saturating_mul(BLOCK_BYTES).min(range.end());
        (ByteRange::between(range.offset(), end), written)
    }

    /// How many blocks were written.
    pub(super) fn count(&self) -> u64 {
        let state = self.lock();
        let words = state.pages.iter().flatten().flat_map(|page| page.iter());
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// All pages with anything in them, as if all had changed.
    pub(super) fn take_all(&self) -> Vec<Page> {
        let mut state = self.lock();
        let State { pages, changed, .. } = &mut *state;
        let pages = pages.iter().enumerate();
        changed.extend(pages.filter(|(_, page)| page.is_some()).map(|(index, _)| index));
        drop(state);
        self.take_changed()
    }

    /// The pages that changed since they were last taken.
    pub(super) fn take_changed(&self) -> Vec<Page> {
        let mut state = self.lock();
        let changed = std::mem::take(&mut state.changed);
        let bytes = |index| state.page(index).iter().flat_map(|word| word.to_le_bytes()).collect();
        changed.into_iter().map(|index| (index, bytes(index))).collect()
    }

    /// These were not stored after all.
    pub(super) fn give_back_changed(&self, pages: &[Page]) {
        self.lock().changed.extend(pages.iter().map(|(index, _)| *index));
    }
}

/// Pages that tell of all blocks of a disk.
fn pages(size_bytes: u64) -> usize {
    let pages = size_bytes.div_ceil(BLOCK_BYTES).div_ceil(PAGE_BLOCKS);
    usize::try_from(pages).expect("a disk's bitmap fits the address space")
}

/// Word and bit of a block.
fn place(block: u64) -> (usize, u64) {
    let word = usize::try_from(block / WORD_BITS).expect("a disk's bitmap fits the address space");
    (word, 1 << (block % WORD_BITS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_partition_the_disk_as_an_array_of_flags_does(
            marks in prop::collection::vec((0u64..1_000_000, 1u64..300_000), 0..12),
        ) {
            let size = 1_400_000;
            let bitmap = Bitmap::new(size);
            let mut flags = vec![false; 342];
            for (offset, len) in marks {
                bitmap.mark(ByteRange::new(offset, len));
                let blocks = offset / BLOCK_BYTES..(offset + len).div_ceil(BLOCK_BYTES);
                blocks.for_each(|block| flags[usize::try_from(block).unwrap()] = true);
            }
            let stored = Bitmap::new(size);
            for (index, bytes) in bitmap.take_changed() {
                stored.load(index, &bytes);
            }
            for bitmap in [&bitmap, &stored] {
                let mut at = 0;
                let mut last = None;
                while at < size {
                    let (run, written) = bitmap.run(ByteRange::between(at, size));
                    prop_assert_ne!(last, Some(written));
                    for block in run.offset() / BLOCK_BYTES..run.end().div_ceil(BLOCK_BYTES) {
                        prop_assert_eq!(flags[usize::try_from(block).unwrap()], written);
                    }
                    (at, last) = (run.end(), Some(written));
                }
                prop_assert_eq!(bitmap.count(), flags.iter().filter(|flag| **flag).count() as u64);
            }
        }
    }
    #[test]
    fn runs_go_over_pages_that_are_not_in_memory() {
        let page = PAGE_BLOCKS * BLOCK_BYTES;
        let size = 9 * page + 5;
        let bitmap = Bitmap::new(size);
        let run = |from| bitmap.run(ByteRange::between(from, size));
        assert_eq!(run(0), (ByteRange::between(0, size), false));
        bitmap.mark(ByteRange::new(2 * page - 1, 2));
        bitmap.mark(ByteRange::between(9 * page, size));
        let [from, to] = [2 * page - BLOCK_BYTES, 2 * page + BLOCK_BYTES];
        assert_eq!(run(5), (ByteRange::between(5, from), false));
        assert_eq!(run(from), (ByteRange::between(from, to), true));
        assert_eq!(run(to), (ByteRange::between(to, 9 * page), false));
        assert_eq!(run(9 * page), (ByteRange::between(9 * page, size), true));
        assert_eq!(bitmap.count(), 3);
        let indexes: Vec<usize> = bitmap.take_all().iter().map(|(index, _)| *index).collect();
        assert_eq!(indexes, [1, 2, 9]);
    }

    #[test]
    fn only_bits_of_the_disk_are_taken_from_what_is_stored() {
        let bitmap = Bitmap::new(70 * BLOCK_BYTES + 1);
        bitmap.load(0, &[0xff; 4096]);
        assert_eq!(bitmap.count(), 71);
        bitmap.grow(1 << 30);
        let all = ByteRange::between(0, 1 << 30);
        assert_eq!(bitmap.run(all), (ByteRange::between(0, 71 * BLOCK_BYTES), true));
    }
}
