//! The file of a kept overlay: the disk's written blocks, a header, the bitmap.

use std::fs::{File, TryLockError};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bitmap::{BLOCK_BYTES, Bitmap, Page};
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
    /// Opens or makes the file, and reads which blocks were written.
    pub(super) fn open(
        path: &Path,
        size_bytes: u64,
        identity: &[u8; 32],
    ) -> Result<(Self, Bitmap)> {
        let failed = |e| Error::io(format!("cannot open the overlay {}", path.display()), e);
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let message = format!("the overlay {} is in use", path.display());
                return Err(Error::new(Kind::Busy, message));
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let header_at = size_bytes.next_multiple_of(BLOCK_BYTES);
        let bitmap_at = header_at + HEADER_BYTES;
        let stored_bytes = Bitmap::stored_bytes(size_bytes);
        let header = header(size_bytes, identity);
        if file.metadata().map_err(failed)?.len() == 0 {
            file.set_len(bitmap_at + stored_bytes).map_err(failed)?;
            file.write_all_at(&header, header_at).map_err(failed)?;
            file.sync_all().map_err(failed)?;
            let kept = Self { file: Arc::new(file), path: path.to_owned(), bitmap_at };
            return Ok((kept, Bitmap::new(size_bytes)));
        }
        let mut found = [0; HEADER_USED];
        let complete = file.metadata().map_err(failed)?.len() == bitmap_at + stored_bytes
            && file.read_exact_at(&mut found, header_at).is_ok();
        if !complete || found != header {
            let message = format!("{} is no overlay of this disk", path.display());
            let hint =
                "an overlay goes with the disk of the point it was made on; name another file";
            return Err(Error::new(Kind::Usage, message).hint(hint));
        }
        let mut bytes = vec![0; usize::try_from(stored_bytes).expect("a bitmap fits memory")];
        file.read_exact_at(&mut bytes, bitmap_at).map_err(failed)?;
        let bitmap = Bitmap::from_bytes(&bytes, size_bytes);
        Ok((Self { file: Arc::new(file), path: path.to_owned(), bitmap_at }, bitmap))
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

fn header(size_bytes: u64, identity: &[u8; 32]) -> [u8; HEADER_USED] {
    let mut out = [0; HEADER_USED];
    out[..16].copy_from_slice(MAGIC);
    out[16..24].copy_from_slice(&VERSION.to_le_bytes());
    out[24..32].copy_from_slice(&size_bytes.to_le_bytes());
    out[32..].copy_from_slice(identity);
    out
}
