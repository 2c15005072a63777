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

/// A bit per block, and which pages of bits changed since they were stored.
pub(super) struct Bitmap {
    // Held for a few words at a time, never across an await.
    state: Mutex<State>,
}

struct State {
    words: Vec<u64>,
    changed: BTreeSet<usize>,
}

/// A page of the bitmap as it is stored: its index and its bytes.
pub(super) type Page = (usize, Vec<u8>);

impl Bitmap {
    /// Nothing written of a disk of `size_bytes`. A zeroed vector takes memory only where bits are
    /// set: 32 KiB per GiB written at most.
    pub(super) fn new(size_bytes: u64) -> Self {
        Self::from_words(vec![0; words(size_bytes)])
    }

    fn from_words(words: Vec<u64>) -> Self {
        Self { state: Mutex::new(State { words, changed: BTreeSet::new() }) }
    }

    /// The bitmap as it was stored.
    pub(super) fn from_bytes(bytes: &[u8], size_bytes: u64) -> Self {
        let word = |eight: &[u8]| u64::from_le_bytes(eight.try_into().expect("eight bytes"));
        let mut words: Vec<u64> = bytes.chunks_exact(8).map(word).collect();
        words.truncate(self::words(size_bytes));
        Self::from_words(words)
    }

    /// Bytes a stored bitmap takes: whole pages.
    pub(super) fn stored_bytes(size_bytes: u64) -> u64 {
        (words(size_bytes).next_multiple_of(PAGE_WORDS) * 8) as u64
    }

    /// The same for a disk that has grown to `size_bytes`: nothing of what is new was written.
    pub(super) fn grow(&self, size_bytes: u64) {
        let mut state = self.lock();
        let len = words(size_bytes);
        if len > state.words.len() {
            // Only what was written is touched: see `new`.
            let mut grown = vec![0; len];
            for (new, old) in grown.iter_mut().zip(&state.words).filter(|(_, old)| **old != 0) {
                *new = *old;
            }
            state.words = grown;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the block at `offset` was written.
    pub(super) fn has(&self, offset: u64) -> bool {
        let (word, bit) = place(offset / BLOCK_BYTES);
        self.lock().words[word] & bit != 0
    }

    /// Marks every block that `range` touches.
    pub(super) fn mark(&self, range: ByteRange) {
        let mut state = self.lock();
        let State { words, changed } = &mut *state;
        let mut block = range.offset() / BLOCK_BYTES;
        let end = range.end().div_ceil(BLOCK_BYTES);
        while block < end {
            let (word, bit) = place(block);
            let whole = block.is_multiple_of(WORD_BITS) && end - block >= WORD_BITS;
            let bits = if whole { u64::MAX } else { bit };
            if words[word] & bits != bits {
                words[word] |= bits;
                changed.insert(word / PAGE_WORDS);
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
        let written = state.words[word] & bit != 0;
        let same = if written { u64::MAX } else { 0 };
        let mut block = first + 1;
        while block < end {
            let (word, bit) = place(block);
            if block.is_multiple_of(WORD_BITS) && state.words[word] == same {
                block += WORD_BITS;
            } else if (state.words[word] & bit != 0) == written {
                block += 1;
            } else {
                break;
            }
        }
        let end = block.saturating_mul(BLOCK_BYTES).min(range.end());
        (ByteRange::between(range.offset(), end), written)
    }

    /// How many blocks were written.
    pub(super) fn count(&self) -> u64 {
        self.lock().words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// All pages with anything in them, as if all had changed.
    pub(super) fn take_all(&self) -> Vec<Page> {
        let mut state = self.lock();
        let State { words, changed } = &mut *state;
        let pages = words.chunks(PAGE_WORDS).enumerate();
        changed
            .extend(pages.filter(|(_, page)| page.iter().any(|word| *word != 0)).map(|(at, _)| at));
        drop(state);
        self.take_changed()
    }

    /// The pages that changed since they were last taken.
    pub(super) fn take_changed(&self) -> Vec<Page> {
        let mut state = self.lock();
        let changed = std::mem::take(&mut state.changed);
        let page = |index: usize| {
            let words = state.words.iter().skip(index * PAGE_WORDS).take(PAGE_WORDS);
            (index, words.flat_map(|word| word.to_le_bytes()).collect())
        };
        changed.into_iter().map(page).collect()
    }

    /// These were not stored after all.
    pub(super) fn give_back_changed(&self, pages: &[Page]) {
        self.lock().changed.extend(pages.iter().map(|(index, _)| *index));
    }
}

fn words(size_bytes: u64) -> usize {
    let words = size_bytes.div_ceil(BLOCK_BYTES).div_ceil(WORD_BITS);
    usize::try_from(words).expect("a disk's bitmap fits the address space")
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
            let mut pages = vec![0; 4096];
            for (_, bytes) in bitmap.take_changed() {
                pages[..bytes.len()].copy_from_slice(&bytes);
            }
            let stored = Bitmap::from_bytes(&pages, size);
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
}
