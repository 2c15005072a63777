//! What is in the file of a kept overlay: a header, the disk's written blocks, the bitmap.
//!
//! ```text
//!  header, 4 KiB (at 512: the wish) | the disk | bitmap: a bit per 4 KiB, lowest first
//! ```
//!
//! The header says how large the disk is and where the bitmap begins. The disk grows in place: the
//! bitmap is written anew behind the new end and made durable, then the header says where. Until
//! then the old header and the old bitmap hold; where the old bitmap was is then part of the disk,
//! in blocks that nobody wrote. A disk of no bytes is one that was never made in full.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

use super::bitmap::{BLOCK_BYTES, Bitmap, Page};
use crate::block::file::seek;

/// First bytes of the header.
const MAGIC: &[u8; 16] = b"vmbackup overlay";
/// Version of the layout.
pub(super) const VERSION: u64 = 2;
/// Room for the header; the disk begins behind it.
pub(super) const HEADER_BYTES: u64 = 4096;
/// Where the identity is in it: behind magic, version, size, and where the bitmap is.
const IDENTITY_AT: usize = 16 + 8 + 8 + 8;
/// What of it is used.
const HEADER_USED: usize = IDENTITY_AT + 32;
/// The bitmap is read in pieces of this size.
const READ_BYTES: usize = 64 * PAGE_BYTES;
/// A page of the bitmap.
const PAGE_BYTES: usize = 4096;

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) size_bytes: u64,
    pub(super) bitmap_at: u64,
}

impl Layout {
    /// That of a new file, or of one whose disk is grown and whose first `used_bytes` are in use.
    pub(super) fn new(size_bytes: u64, used_bytes: u64) -> Self {
        let end = HEADER_BYTES + size_bytes.next_multiple_of(BLOCK_BYTES);
        Self { size_bytes, bitmap_at: end.max(used_bytes) }
    }

    pub(super) fn end(&self) -> u64 {
        self.bitmap_at + Bitmap::stored_bytes(self.size_bytes)
    }

    /// Whether a file of `len` bytes can have it.
    fn is_possible(&self, len: u64) -> bool {
        let Self { size_bytes, bitmap_at } = *self;
        size_bytes <= len
            && bitmap_at.is_multiple_of(BLOCK_BYTES)
            && bitmap_at >= Self::new(size_bytes, 0).bitmap_at
            && len
                .checked_sub(bitmap_at)
                .is_some_and(|rest| rest >= Bitmap::stored_bytes(size_bytes))
    }

    pub(super) fn header(&self, identity: &[u8; 32]) -> [u8; HEADER_USED] {
        let mut out = [0; HEADER_USED];
        out[..16].copy_from_slice(MAGIC);
        out[16..24].copy_from_slice(&VERSION.to_le_bytes());
        out[24..32].copy_from_slice(&self.size_bytes.to_le_bytes());
        out[32..40].copy_from_slice(&self.bitmap_at.to_le_bytes());
        out[IDENTITY_AT..].copy_from_slice(identity);
        out
    }

    /// What `file` says, if it is an overlay of the disk `identity`.
    fn read(file: &File, identity: &[u8; 32]) -> std::io::Result<Option<Self>> {
        let len = file.metadata()?.len();
        let mut found = [0; HEADER_USED];
        if len < HEADER_BYTES {
            return Ok(None);
        }
        file.read_exact_at(&mut found, 0)?;
        let number = |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().expect("eight"));
        let layout = Self { size_bytes: number(24), bitmap_at: number(32) };
        let ours = found == layout.header(identity) && layout.is_possible(len);
        Ok(ours.then_some(layout))
    }
}

/// What a file is to whoever wants the overlay of a disk in it.
pub(super) enum Found {
    /// Nothing, or an overlay of no bytes of another disk.
    Nothing,
    /// An overlay of this disk.
    Overlay(Layout),
    /// An overlay in another version of the layout.
    Version(u64),
    /// Something else.
    Other,
}

impl Found {
    pub(super) fn look(file: &File, identity: &[u8; 32]) -> std::io::Result<Self> {
        if let Some(layout) = Layout::read(file, identity)? {
            return Ok(Self::Overlay(layout));
        }
        let file_data = file.metadata()?;
        if !file_data.is_file() {
            return Ok(Self::Other);
        }
        let len = file_data.len();
        let mut found = vec![0; usize::try_from(len.min(HEADER_BYTES)).expect("4 KiB")];
        file.read_exact_at(&mut found, 0)?;
        let of_no_bytes = &Layout::new(0, 0).header(identity)[..IDENTITY_AT];
        // Zeroes: the file system made the length durable before what was written.
        let is_unwritten = len <= HEADER_BYTES && found.iter().all(|byte| *byte == 0);
        if is_unwritten || found.starts_with(of_no_bytes) {
            return Ok(Self::Nothing);
        }
        let version = found.get(16..24).map(|v| u64::from_le_bytes(v.try_into().expect("eight")));
        Ok(match version {
            Some(version) if found.starts_with(MAGIC) && version != VERSION => {
                Self::Version(version)
            }
            _ => Self::Other,
        })
    }
}

/// Reads the stored bitmap into one in memory, without what is not there.
pub(super) fn read_map(file: &File, layout: &Layout) -> std::io::Result<Bitmap> {
    let bitmap = Bitmap::new(layout.size_bytes);
    let mut buffer = vec![0; READ_BYTES];
    let mut at = layout.bitmap_at;
    while let Some(data) = seek(file, SeekFrom::Data(at))?.filter(|data| *data < layout.end()) {
        // File systems may have smaller blocks than a page of the map.
        at = data / BLOCK_BYTES * BLOCK_BYTES;
        let len = usize::try_from(layout.end() - at).map_or(buffer.len(), |n| n.min(buffer.len()));
        file.read_exact_at(&mut buffer[..len], at)?;
        for page in buffer[..len].chunks_exact(PAGE_BYTES) {
            let index = (at - layout.bitmap_at) / BLOCK_BYTES;
            bitmap.load(usize::try_from(index).expect("a page of the map"), page);
            at += BLOCK_BYTES;
        }
    }
    Ok(bitmap)
}

/// Writes pages of the bitmap that begins `at`.
pub(super) fn write_pages(file: &File, at: u64, pages: &[Page]) -> std::io::Result<()> {
    let place = |index: usize| at + index as u64 * BLOCK_BYTES;
    pages.iter().try_for_each(|(index, bytes)| file.write_all_at(bytes, place(*index)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layout_is_believed_only_if_the_file_has_room_for_it() {
        let page = 4096 * 8 * BLOCK_BYTES;
        for size in [0, 1, 4096, 4097, page - 1, page, page + 1, 9 * page + 4096, 1 << 46] {
            let layout = Layout::new(size, 0);
            assert!(layout.is_possible(layout.end()) && !layout.is_possible(layout.end() - 1));
            let behind = Layout::new(size + 1, layout.end());
            assert!(
                behind.bitmap_at >= layout.end(),
                "the old bitmap stays until the new one holds"
            );
            assert!(behind.is_possible(behind.end()));
        }
        for (size_bytes, bitmap_at) in
            [(u64::MAX, 8192), (0, u64::MAX), (0, u64::MAX - 4095), (8192, 8192), (0, 4097)]
        {
            assert!(!Layout { size_bytes, bitmap_at }.is_possible(1 << 20));
        }
    }
}
