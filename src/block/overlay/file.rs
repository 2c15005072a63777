//! The file of a kept overlay: a header, the disk's written blocks, the bitmap.
//!
//! ```text
//!  header, 4 KiB (at 512: the wish) | the disk | bitmap: a bit per 4 KiB, lowest first
//! ```
//!
//! The header says how large the disk is and where the bitmap begins. The disk grows in place: the
//! bitmap is written anew behind the new end and made durable, then the header says where. Until
//! then the old header and the old bitmap hold; where the old bitmap was is then part of the disk,
//! in blocks that nobody wrote.
//!
//! Who may not open the file, because another serves it, can leave a wish in it: the size the disk
//! should have. The other looks for one when a client comes, and whoever opens the file next.

use std::fs::{File, TryLockError};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bitmap::{BLOCK_BYTES, Bitmap, Page};
use super::growing::{Failed, Fault, Growing};
use crate::error::{Error, Kind, Result};
use crate::units::ByteSize;

/// First bytes of the header.
const MAGIC: &[u8; 16] = b"vmbackup overlay";
/// Version of the layout. The first one had its header behind the disk.
const VERSION: u64 = 2;
/// Room for the header; the disk begins behind it.
pub(super) const HEADER_BYTES: u64 = 4096;
/// What of it is used: magic, version, size, where the bitmap is, identity.
const HEADER_USED: usize = 16 + 8 + 8 + 8 + 32;
/// Where a wish is: in a sector of its own, because another process writes it.
const WISH_AT: u64 = 512;
/// First bytes of a wish. The size follows, and its complement.
const WISH_MAGIC: &[u8; 16] = b"vmbackup resize ";
const WISH_BYTES: usize = 16 + 8 + 8;
/// Largest disk that an overlay grows to: more than file systems have, and the bitmap of it (8 GiB)
/// is no more than addresses.
const SIZE_BYTES_MAX: u64 = 1 << 48;

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) size_bytes: u64,
    pub(super) bitmap_at: u64,
}

impl Layout {
    /// That of a new file, or of one whose disk is grown and whose first `used_bytes` are in use.
    fn new(size_bytes: u64, used_bytes: u64) -> Self {
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
        out[40..].copy_from_slice(identity);
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

/// An open file, locked against other servers as long as it lives.
pub(super) struct Kept {
    file: Arc<File>,
    path: PathBuf,
    identity: [u8; 32],
    layout: Layout,
    fault: Option<Fault>,
}

impl Kept {
    /// Opens or makes the file, and reads which blocks were written. The disk has the size it was
    /// made with, or `size.least` if it is new, or `size.wanted`: a smaller one grows to it. Where
    /// another has the file open, the wish for a larger disk is left there.
    pub(super) fn open(path: &Path, size: Size, identity: &[u8; 32]) -> Result<(Self, Bitmap)> {
        let failed = |e| Error::io(format!("cannot open the overlay {}", path.display()), e);
        size.check()?;
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(failed)?;
        if !lock(&file, path)? {
            return Err(leave_wish(&file, path, size.wanted, identity).map_err(failed)?);
        }
        let file = Arc::new(file);
        let kept = |layout| Self {
            file: Arc::clone(&file),
            path: path.to_owned(),
            identity: *identity,
            layout,
            fault: None,
        };
        if file.metadata().map_err(failed)?.len() == 0 {
            let kept = kept(Layout::new(size.wanted.unwrap_or(size.least), 0));
            kept.format().map_err(failed)?;
            let bitmap = Bitmap::new(kept.layout.size_bytes);
            return Ok((kept, bitmap));
        }
        let found = Layout::read(&file, identity).map_err(failed)?;
        let found = found.filter(|layout| layout.size_bytes >= size.least);
        let mut kept = match found {
            Some(layout) => kept(layout),
            None => return Err(refusal(&file, path).map_err(failed)?),
        };
        let stored_bytes = Bitmap::stored_bytes(kept.size_bytes());
        let mut bytes = vec![0; usize::try_from(stored_bytes).expect("a bitmap fits memory")];
        file.read_exact_at(&mut bytes, kept.layout.bitmap_at).map_err(failed)?;
        let bitmap = Bitmap::from_bytes(&bytes, kept.size_bytes());
        kept.grow_now(size.wanted, &bitmap)?;
        Ok((kept, bitmap))
    }

    /// Grows the disk to what is wanted, which takes back what another wished for, or to that.
    fn grow_now(&mut self, wanted: Option<u64>, bitmap: &Bitmap) -> Result<()> {
        let wish = self.wish();
        let wished = wish.read()?.filter(|wished| *wished > self.size_bytes());
        if wanted.is_some_and(|wanted| wanted < self.size_bytes()) {
            return Err(too_small(&self.path, self.size_bytes()));
        }
        if wanted.is_some() && wished > wanted {
            wish.take_back()?;
        }
        let Some(size_bytes) = wanted.or(wished).filter(|size| *size > self.size_bytes()) else {
            return Ok(());
        };
        match self.growing(size_bytes, bitmap).write() {
            Ok(layout) => self.layout = layout,
            Err(failed) => {
                let Failed { error, fault } = *failed;
                self.fault = fault;
                if wanted.is_some() || fault == Some(Fault::Header) {
                    return Err(error);
                }
                // Nobody asked now: the disk can be served as it is.
                tracing::warn!(%error, "the overlay keeps its size");
                return Ok(());
            }
        }
        bitmap.grow(size_bytes);
        Ok(())
    }

    /// Makes the empty file an overlay.
    fn format(&self) -> std::io::Result<()> {
        self.file.set_len(self.layout.end())?;
        self.file.write_all_at(&self.layout.header(&self.identity), 0)?;
        self.file.sync_all()
    }

    /// What the disk has.
    pub(super) fn size_bytes(&self) -> u64 {
        self.layout.size_bytes
    }

    /// Where others leave their wish.
    pub(super) fn wish(&self) -> Wish {
        Wish { file: Arc::clone(&self.file), path: self.path.clone() }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Another handle of the file.
    pub(super) fn file(&self) -> Result<File> {
        let failed = |e| Error::io(format!("cannot open {}", self.path.display()), e);
        self.file.try_clone().map_err(failed)
    }

    /// Writes pages of the bitmap; the caller syncs.
    pub(super) async fn store(&self, pages: &[Page]) -> Result<()> {
        let (file, at) = (Arc::clone(&self.file), self.layout.bitmap_at);
        let (pages, path) = (pages.to_vec(), self.path.clone());
        blocking(move || {
            write_pages(&file, at, &pages)
                .map_err(|e| Error::io(format!("cannot write the map of {}", path.display()), e))
        })
        .await
    }

    /// What whoever flushes has to be told before anything else: see [`Fault`].
    pub(super) fn check(&mut self) -> Result<()> {
        let Some(fault) = self.fault else { return Ok(()) };
        if fault == Fault::Unsynced {
            self.fault = None;
        }
        Err(fault.error(&self.path))
    }

    /// Grows the disk to `size_bytes`, which is more than it has. On an error it has the size it
    /// had, and [`Kept::check`] knows what else became of it. The caller lets nobody write the
    /// bitmap meanwhile, and does not drop this half way.
    pub(super) async fn grow(&mut self, size_bytes: u64, bitmap: &Bitmap) -> Result<()> {
        if self.fault == Some(Fault::Header) {
            // Another attempt would truncate the map that the header may name.
            return Err(Fault::Header.error(&self.path));
        }
        let growing = self.growing(size_bytes, bitmap);
        let grown = blocking(move || Ok(growing.write())).await;
        // What a thread that died did to the header is not known.
        let died = |error| Err(Box::new(Failed { error, fault: Some(Fault::Header) }));
        match grown.unwrap_or_else(died) {
            Ok(layout) => self.layout = layout,
            Err(failed) => {
                let Failed { error, fault } = *failed;
                // What was not told yet still has to be.
                self.fault = fault.or(self.fault);
                // What changed of them is not stored where the map still is.
                bitmap.give_back_changed(&bitmap.take_all());
                return Err(error);
            }
        }
        bitmap.grow(size_bytes);
        Ok(())
    }

    fn growing(&self, size_bytes: u64, bitmap: &Bitmap) -> Growing {
        Growing {
            file: Arc::clone(&self.file),
            path: self.path.clone(),
            identity: self.identity,
            old: self.layout,
            new: Layout::new(size_bytes, self.layout.end()),
            // Before the sync: what is marked then is in the file, and durable afterwards.
            pages: bitmap.take_all(),
        }
    }
}

/// Where others leave their wish for a larger disk. Not behind the lock of flushes: who looks for
/// one does not wait for a disk.
pub(super) struct Wish {
    file: Arc<File>,
    path: PathBuf,
}

impl Wish {
    /// The size that was wished for last, if any was: one that the disk has, or had, is granted.
    /// Blocks.
    pub(super) fn read(&self) -> Result<Option<u64>> {
        let mut found = [0; WISH_BYTES];
        self.file
            .read_exact_at(&mut found, WISH_AT)
            .map_err(|e| Error::io(format!("cannot read {}", self.path.display()), e))?;
        let size = u64::from_le_bytes(found[16..24].try_into().expect("eight bytes"));
        let whole = found == wish(size) && size <= SIZE_BYTES_MAX;
        Ok(whole.then_some(size))
    }

    /// Takes back what was wished for, because whoever opens the file asks for another size. For
    /// nobody else: another wish may come in just before. Blocks.
    fn take_back(&self) -> Result<()> {
        let cleared = self.file.write_all_at(&[0; WISH_BYTES], WISH_AT);
        cleared
            .and_then(|()| self.file.sync_all())
            .map_err(|e| Error::io(format!("cannot write {}", self.path.display()), e))
    }
}

fn wish(size_bytes: u64) -> [u8; WISH_BYTES] {
    let mut out = [0; WISH_BYTES];
    out[..16].copy_from_slice(WISH_MAGIC);
    out[16..24].copy_from_slice(&size_bytes.to_le_bytes());
    out[24..].copy_from_slice(&(!size_bytes).to_le_bytes());
    out
}

/// What becomes of it when another has the file open: the error for whoever asked.
fn leave_wish(
    file: &File,
    path: &Path,
    wanted: Option<u64>,
    identity: &[u8; 32],
) -> std::io::Result<Error> {
    let busy =
        Error::new(Kind::Busy, format!("another process serves the overlay {}", path.display()));
    let Some(wanted) = wanted else {
        return Ok(busy.hint("stop it first; with --size it can be asked for a larger disk"));
    };
    let Some(Layout { size_bytes, .. }) = Layout::read(file, identity)? else {
        return refusal(file, path);
    };
    if wanted < size_bytes {
        return Ok(too_small(path, size_bytes));
    }
    // The size it has is a wish, too: it takes back a larger one.
    file.write_all_at(&wish(wanted), WISH_AT)?;
    file.sync_all()?;
    let hint = format!("it was told: clients that connect to it from now on find {wanted} bytes");
    Ok(busy.hint(hint))
}

/// Why a file that holds no overlay of this disk in our layout is refused. One in another layout
/// holds somebody's disk, and says so, lest it is thrown away.
fn refusal(file: &File, path: &Path) -> std::io::Result<Error> {
    let path = path.display();
    Ok(match other_version(file)? {
        Some(version) => Error::new(
            Kind::Unsupported,
            format!("the overlay {path} has layout {version}; this vmbackup reads {VERSION} only"),
        )
        .hint("keep it, and serve it with the version of vmbackup that made it"),
        None => Error::new(Kind::Usage, format!("{path} is no overlay of this disk"))
            .hint("an overlay goes with the disk of the point it was made on; name another file"),
    })
}

/// The version of the layout of a file that is an overlay in another one.
fn other_version(file: &File) -> std::io::Result<Option<u64>> {
    let len = file.metadata()?.len();
    for at in [Some(0), first_header_at(len)].into_iter().flatten() {
        let mut found = [0; 24];
        if len < at + HEADER_BYTES {
            continue;
        }
        file.read_exact_at(&mut found, at)?;
        let version = u64::from_le_bytes(found[16..].try_into().expect("eight bytes"));
        if found.starts_with(MAGIC) && version != VERSION {
            return Ok(Some(version));
        }
    }
    Ok(None)
}

/// Where the header of a file of `len` bytes is in the first layout: behind the disk, before a
/// bitmap of whole pages. The length leaves one place for it.
fn first_header_at(len: u64) -> Option<u64> {
    let blocks = len.is_multiple_of(BLOCK_BYTES).then_some(len / BLOCK_BYTES)?;
    // Blocks of the disk, and a block of bitmap for as many of them as it has bits.
    let rest = blocks.checked_sub(HEADER_BYTES / BLOCK_BYTES)?;
    let bits = BLOCK_BYTES * 8;
    let guess = rest - rest.div_ceil(bits + 1);
    let fits = |disk: &u64| disk + disk.div_ceil(bits) == rest;
    [guess, guess + 1].into_iter().find(fits).map(|disk| disk * BLOCK_BYTES)
}

fn too_small(path: &Path, size_bytes: u64) -> Error {
    let message = format!("the overlay {} has {size_bytes} bytes", path.display());
    Error::new(Kind::Usage, message).hint("an overlay only grows")
}

pub(super) fn write_pages(file: &File, at: u64, pages: &[Page]) -> std::io::Result<()> {
    let place = |index: usize| at + index as u64 * BLOCK_BYTES;
    pages.iter().try_for_each(|(index, bytes)| file.write_all_at(bytes, place(*index)))
}

/// Runs `work` on a thread that may wait.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::new(Kind::Internal, "an input/output thread died").source(e))?
}

/// Sizes of a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    /// That of the base: no overlay has less.
    pub(super) least: u64,
    /// What is asked for, if anything is.
    pub(super) wanted: Option<u64>,
}

impl Size {
    /// Refuses a size that no overlay of the base can have.
    pub(super) fn check(&self) -> Result<()> {
        let Self { least, wanted } = *self;
        match wanted {
            Some(wanted) if wanted < least => {
                let message = format!("a disk of {least} bytes cannot be served with {wanted}");
                Err(Error::new(Kind::Usage, message).hint("an overlay only grows"))
            }
            Some(wanted) if wanted > SIZE_BYTES_MAX.max(least) => {
                let message = format!("an overlay has at most {}", ByteSize(SIZE_BYTES_MAX));
                Err(Error::new(Kind::Usage, message))
            }
            _ => Ok(()),
        }
    }
}

/// Keeps other servers out as long as the file is open; `false` if one has done so.
fn lock(file: &File, path: &Path) -> Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => {
            Err(Error::io(format!("cannot open the overlay {}", path.display()), error))
        }
    }
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
