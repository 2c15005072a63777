//! The file of a kept overlay: the disk's written blocks, a header, the bitmap.

use std::fs::{File, TryLockError};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bitmap::{BLOCK_BYTES, Bitmap, Page};
use crate::block::ByteRange;
use crate::error::{Error, Kind, Result};

/// First bytes of the header.
const MAGIC: &[u8; 16] = b"vmbackup overlay";
/// Version of the layout.
const VERSION: u64 = 1;
/// Room for the header.
const HEADER_BYTES: u64 = 4096;
/// What of it is used: magic, version, size, identity.
const HEADER_USED: usize = 16 + 8 + 8 + 32;

/// An open file, locked against other servers as long as it lives.
pub(super) struct Kept {
    file: Arc<File>,
    path: PathBuf,
    bitmap_at: u64,
}

impl Kept {
    /// Opens or makes the file, and reads which blocks were written. The disk has the size it was
    /// made with, or `size.least` if it is new, or `size.wanted`: a smaller one grows to it.
    pub(super) fn open(
        path: &Path,
        size: Size,
        identity: &[u8; 32],
    ) -> Result<(Self, Bitmap, u64)> {
        let failed = |e| Error::io(format!("cannot open the overlay {}", path.display()), e);
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(failed)?;
        lock(&file, path)?;
        let len = file.metadata().map_err(failed)?.len();
        if len == 0 {
            let size_bytes = size.wanted.unwrap_or(size.least);
            let kept = Self::format(file, path, size_bytes, identity)?;
            return Ok((kept, Bitmap::new(size_bytes), size_bytes));
        }
        let refuse = || {
            let message = format!("{} is no overlay of this disk", path.display());
            let hint =
                "an overlay goes with the disk of the point it was made on; name another file";
            Error::new(Kind::Usage, message).hint(hint)
        };
        let header_at = header_at(len).ok_or_else(refuse)?;
        let mut found = [0; HEADER_USED];
        file.read_exact_at(&mut found, header_at).map_err(failed)?;
        let size_bytes = u64::from_le_bytes(found[24..32].try_into().expect("eight bytes"));
        let is_ours = found == header(size_bytes, identity)
            && size_bytes.checked_next_multiple_of(BLOCK_BYTES) == Some(header_at)
            && size_bytes >= size.least;
        if !is_ours {
            return Err(refuse());
        }
        let bitmap_at = header_at + HEADER_BYTES;
        let stored_bytes = Bitmap::stored_bytes(size_bytes);
        let mut bytes = vec![0; usize::try_from(stored_bytes).expect("a bitmap fits memory")];
        file.read_exact_at(&mut bytes, bitmap_at).map_err(failed)?;
        let bitmap = Bitmap::from_bytes(&bytes, size_bytes);
        let kept = Self { file: Arc::new(file), path: path.to_owned(), bitmap_at };
        match size.wanted {
            Some(wanted) if wanted < size_bytes => {
                let message = format!("the overlay {} has {size_bytes} bytes", path.display());
                Err(Error::new(Kind::Usage, message).hint("an overlay only grows"))
            }
            Some(wanted) if wanted > size_bytes => {
                let (kept, bitmap) = kept.grown(&bitmap, (size_bytes, wanted), identity)?;
                Ok((kept, bitmap, wanted))
            }
            _ => Ok((kept, bitmap, size_bytes)),
        }
    }

    /// Makes the empty `file` an overlay.
    fn format(file: File, path: &Path, size_bytes: u64, identity: &[u8; 32]) -> Result<Self> {
        let failed = |e| Error::io(format!("cannot make the overlay {}", path.display()), e);
        let header_at = size_bytes.next_multiple_of(BLOCK_BYTES);
        let bitmap_at = header_at + HEADER_BYTES;
        file.set_len(bitmap_at + Bitmap::stored_bytes(size_bytes)).map_err(failed)?;
        file.write_all_at(&header(size_bytes, identity), header_at).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        Ok(Self { file: Arc::new(file), path: path.to_owned(), bitmap_at })
    }

    /// The same for a larger disk. What is behind the disk has to move, and a crash must not lose it:
    /// a new file takes the place of the old one when it is complete.
    fn grown(
        self,
        written: &Bitmap,
        (old_bytes, new_bytes): (u64, u64),
        identity: &[u8; 32],
    ) -> Result<(Self, Bitmap)> {
        let path = &self.path;
        let failed = |e| Error::io(format!("cannot grow the overlay {}", path.display()), e);
        let absolute = std::path::absolute(path).map_err(failed)?;
        let directory = absolute.parent().expect("a file has a directory");
        let new = tempfile::NamedTempFile::new_in(directory).map_err(failed)?;
        lock(new.as_file(), path)?;
        let file = new.as_file().try_clone().map_err(failed)?;
        let kept = Self::format(file, path, new_bytes, identity)?;
        let bitmap = Bitmap::new(new_bytes);
        let mut rest = ByteRange::new(0, old_bytes);
        while !rest.is_empty() {
            let (run, is_written) = written.run(rest);
            if is_written {
                copy(&self.file, &kept.file, run).map_err(failed)?;
                bitmap.mark(run);
            }
            rest = ByteRange::between(run.end(), old_bytes);
        }
        for (index, bytes) in bitmap.take_changed() {
            let at = kept.bitmap_at + index as u64 * BLOCK_BYTES;
            kept.file.write_all_at(&bytes, at).map_err(failed)?;
        }
        kept.file.sync_all().map_err(failed)?;
        new.persist(&absolute).map_err(|e| failed(e.error))?;
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
        Ok((kept, bitmap))
    }

    /// Another handle of the file.
    pub(super) fn file(&self) -> Result<File> {
        let failed = |e| Error::io(format!("cannot open {}", self.path.display()), e);
        self.file.try_clone().map_err(failed)
    }

    /// Writes pages of the bitmap; the caller syncs.
    pub(super) async fn store(&self, pages: &[Page]) -> Result<()> {
        let (file, at) = (Arc::clone(&self.file), self.bitmap_at);
        let pages = pages.to_vec();
        let write = move || {
            pages.iter().try_for_each(|(index, bytes)| {
                file.write_all_at(bytes, at + (*index as u64) * BLOCK_BYTES)
            })
        };
        let written = tokio::task::spawn_blocking(write).await;
        written
            .map_err(|e| Error::new(Kind::Internal, "an input/output thread died").source(e))?
            .map_err(|e| Error::io(format!("cannot write the map of {}", self.path.display()), e))
    }
}

/// Sizes of a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// That of the base: no overlay has less.
    pub(super) least: u64,
    /// What is asked for, if anything is.
    pub(super) wanted: Option<u64>,
}

/// Keeps other servers out as long as the file is open.
fn lock(file: &File, path: &Path) -> Result<()> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => {
            let message = format!("the overlay {} is in use", path.display());
            Err(Error::new(Kind::Busy, message))
        }
        Err(TryLockError::Error(error)) => {
            Err(Error::io(format!("cannot open the overlay {}", path.display()), error))
        }
    }
}

/// Where the header of a complete file of `len` bytes begins: the length leaves one place for it.
fn header_at(len: u64) -> Option<u64> {
    let blocks = len.is_multiple_of(BLOCK_BYTES).then_some(len / BLOCK_BYTES)?;
    // Blocks of the disk, and a block of bitmap for as many of them as it has bits.
    let rest = blocks.checked_sub(HEADER_BYTES / BLOCK_BYTES)?;
    let bits = BLOCK_BYTES * 8;
    let guess = rest - rest.div_ceil(bits + 1);
    let fits = |disk: &u64| disk + disk.div_ceil(bits) == rest;
    [guess, guess + 1].into_iter().find(fits).map(|disk| disk * BLOCK_BYTES)
}

/// Copies a range from one file to the same place of another.
fn copy(from: &File, to: &File, range: ByteRange) -> std::io::Result<()> {
    let mut bytes = vec![0; 1 << 20];
    for piece in range.pieces(1 << 20) {
        let bytes = &mut bytes[..usize::try_from(piece.len()).expect("at most 1 MiB")];
        from.read_exact_at(bytes, piece.offset())?;
        to.write_all_at(bytes, piece.offset())?;
    }
    Ok(())
}

fn header(size_bytes: u64, identity: &[u8; 32]) -> [u8; HEADER_USED] {
    let mut out = [0; HEADER_USED];
    out[..16].copy_from_slice(MAGIC);
    out[16..24].copy_from_slice(&VERSION.to_le_bytes());
    out[24..32].copy_from_slice(&size_bytes.to_le_bytes());
    out[32..].copy_from_slice(identity);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_a_file_tells_where_its_header_is() {
        let page = 4096 * 8 * BLOCK_BYTES;
        for size in [0, 1, 4096, 4097, page - 1, page, page + 1, 2 * page, 9 * page + 4096, 1 << 46]
        {
            let at = size.next_multiple_of(BLOCK_BYTES);
            let len = at + HEADER_BYTES + Bitmap::stored_bytes(size);
            assert_eq!(header_at(len), Some(at), "{size}");
            assert_eq!(header_at(len + 1), None);
        }
        assert_eq!(header_at(0), None);
    }
}
