//! Disk images of a simulated VM: content that costs next to nothing, and the bitmaps in them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::vm::PointId;

/// What guests write and bitmaps count in.
pub(crate) const BLOCK_BYTES: u64 = 64 << 10;

/// What a disk holds: a number per block, 0 for zeroes. Clones share it until one is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Content {
    size_bytes: u64,
    blocks: Arc<Vec<u32>>,
}

impl Content {
    pub(crate) fn zeroes(size_bytes: u64) -> Self {
        Self { size_bytes, blocks: Arc::new(vec![0; blocks_of(size_bytes)]) }
    }

    pub(crate) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(super) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    pub(super) fn set(&mut self, block: usize, value: u32) {
        Arc::make_mut(&mut self.blocks)[block] = value;
    }

    /// What it grows by is zero.
    pub(super) fn resize(&mut self, size_bytes: u64) {
        self.size_bytes = size_bytes;
        Arc::make_mut(&mut self.blocks).resize(blocks_of(size_bytes), 0);
    }

    /// Fills `bytes` with what is there from `offset` on: each block begins with its number, four
    /// times, and is zero otherwise.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) {
        let index = |n: u64| usize::try_from(n).expect("a small disk");
        let end = offset + bytes.len() as u64;
        assert!(end <= self.size_bytes, "a read past the end");
        bytes.fill(0);
        for block in offset.div_ceil(BLOCK_BYTES)..end.div_ceil(BLOCK_BYTES) {
            let at = index(block * BLOCK_BYTES - offset);
            let value = self.blocks[index(block)].to_le_bytes();
            for n in 0..4 {
                bytes[at + 4 * n..at + 4 * n + 4].copy_from_slice(&value);
            }
        }
    }
}

fn blocks_of(size_bytes: u64) -> usize {
    usize::try_from(size_bytes.div_ceil(BLOCK_BYTES)).expect("a small disk")
}

/// Name of a bitmap. That of the domain is left out: there is only one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BitmapName {
    pub(crate) repository: String,
    /// The disk, where the platform's names carry it.
    pub(crate) disk: Option<String>,
    pub(crate) point: PointId,
}

/// Whether a bitmap says what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BitmapState {
    Recording,
    /// It was disabled: writes may be missing.
    Stopped,
    /// QEMU did not close it.
    Inconsistent,
}

/// What was written since an instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bitmap {
    pub(crate) dirty: Vec<bool>,
    pub(crate) state: BitmapState,
}

/// How a QEMU ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It wrote its bitmaps into the images that can hold them.
    Orderly,
    /// It could not.
    Killed,
}

/// An image.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// What tells the file from any other.
    pub(crate) file: u64,
    pub(crate) format: &'static str,
    pub(crate) content: Content,
    pub(crate) bitmaps: BTreeMap<BitmapName, Bitmap>,
}

impl Image {
    pub(crate) fn write(&mut self, block: usize, value: u32) {
        self.content.set(block, value);
        for bitmap in self.bitmaps.values_mut() {
            if bitmap.state == BitmapState::Recording {
                bitmap.dirty[block] = true;
            }
        }
    }

    /// Somebody writes it whom QEMU does not see; whether a bitmap lies now.
    pub(super) fn write_unseen(&mut self, block: usize, value: u32) -> bool {
        let differs = self.content.blocks()[block] != value;
        self.content.set(block, value);
        let lies = |bitmap: &Bitmap| bitmap.state == BitmapState::Recording && !bitmap.dirty[block];
        differs && self.bitmaps.values().any(lies)
    }

    /// As QEMU does it: what the disk grows by is not marked.
    pub(super) fn resize(&mut self, size_bytes: u64) {
        self.content.resize(size_bytes);
        let blocks = self.content.blocks().len();
        self.bitmaps.values_mut().for_each(|bitmap| bitmap.dirty.resize(blocks, false));
    }

    pub(super) fn add_bitmap(&mut self, name: BitmapName) {
        let dirty = vec![false; self.content.blocks().len()];
        self.bitmaps.insert(name, Bitmap { dirty, state: BitmapState::Recording });
    }

    /// The QEMU that had it open ended.
    pub(super) fn close(&mut self, ending: Ending) {
        if self.format == "raw" {
            self.bitmaps.clear();
        }
        if ending == Ending::Killed {
            self.bitmaps.values_mut().for_each(|bitmap| bitmap.state = BitmapState::Inconsistent);
        }
    }
}
