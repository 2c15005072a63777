//! A kept overlay as it is open: who may have it, what is written to it, how it grows.
//!
//! What is in the file is told in `layout.rs`. A new one is made as an overlay of no bytes, its
//! directory synced, and then it grows (`growing.rs`): a crash on the way leaves what the next
//! attempt goes on with.
//!
//! Who may not open the file, because another serves it, can leave a wish in it: the size the disk
//! should have. The other looks for one when a client comes, and whoever opens the file next.

use std::fs::{File, TryLockError};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bitmap::{Bitmap, Page};
use super::growing::{Failed, Fault, Growing, sync};
use super::layout::{Found, Layout, VERSION, read_map, write_pages};
use crate::block::file::{blocking, sync_directory_of};
use crate::error::{Error, Kind, Result};
use crate::units::ByteSize;

/// Where a wish is: in a sector of its own, because another process writes it.
const WISH_AT: u64 = 512;
/// First bytes of a wish. The size follows, and its complement.
const WISH_MAGIC: &[u8; 16] = b"vmbackup resize ";
const WISH_BYTES: usize = 16 + 8 + 8;
/// Largest disk that an overlay grows to: more than file systems have. What is not written takes
/// 16 MiB of memory then ([`Bitmap::new`]).
const SIZE_BYTES_MAX: u64 = 1 << 48;

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
        let layout = match Found::look(&file, identity).map_err(failed)? {
            Found::Nothing => make(&file, path, identity).map_err(failed)?,
            Found::Overlay(layout) if layout.size_bytes >= size.least => layout,
            Found::Overlay(layout) if layout.size_bytes == 0 => layout,
            found => return Err(refusal(path, &found)),
        };
        if layout.size_bytes == 0 {
            // First of all: no flush of what is written to it may be in vain.
            sync_name(path)?;
        }
        let bitmap = read_map(&file, &layout).map_err(failed)?;
        let (file, path) = (Arc::new(file), path.to_owned());
        let mut kept = Self { file, path, identity: *identity, layout, fault: None };
        kept.grow_now(size, &bitmap)?;
        Ok((kept, bitmap))
    }

    /// Grows the disk to what is wanted, which takes back what another wished for, or to that, and
    /// an overlay of no bytes at least to what the base has.
    fn grow_now(&mut self, size: Size, bitmap: &Bitmap) -> Result<()> {
        let Size { least, wanted } = size;
        let wish = self.wish();
        let wished = wish.read()?.filter(|wished| *wished > self.size_bytes());
        if wanted.is_some_and(|wanted| wanted < self.size_bytes()) {
            return Err(too_small(&self.path, self.size_bytes()));
        }
        if wanted.is_some() && wished > wanted {
            wish.take_back()?;
        }
        let new = wanted.or(wished).unwrap_or(least).max(least);
        if new <= self.size_bytes() {
            return Ok(());
        }
        match self.growing(new, bitmap).write() {
            Ok(layout) => self.layout = layout,
            Err(failed) => {
                // Any other: nobody has written yet who could have lost something.
                let Failed { error, fault } = *failed;
                let is_usable = self.size_bytes() >= least && fault != Some(Fault::Header);
                if wanted.is_some() || !is_usable {
                    return Err(error);
                }
                // Nobody asked now: the disk can be served as it is.
                tracing::warn!(%error, "the overlay keeps its size");
                return Ok(());
            }
        }
        bitmap.grow(new);
        Ok(())
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
    pub(super) fn check(&self) -> Result<()> {
        self.fault.map_or(Ok(()), |fault| Err(fault.error(&self.path)))
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
    let size_bytes = match Found::look(file, identity)? {
        Found::Overlay(layout) => layout.size_bytes,
        Found::Nothing => return Ok(busy.hint("it is being made: try again")),
        found => return Ok(refusal(path, &found)),
    };
    if wanted < size_bytes {
        return Ok(too_small(path, size_bytes));
    }
    // The size it has is a wish, too: it takes back a larger one.
    file.write_all_at(&wish(wanted), WISH_AT)?;
    file.sync_all()?;
    Ok(busy.hint(format!(
        "it was asked for {wanted} bytes: clients that connect from now on find them, unless its \
         log tells why it cannot grow"
    )))
}

/// Why a file that holds no overlay of this disk in our layout is refused. One in another layout
/// holds somebody's disk, and says so, lest it is thrown away.
fn refusal(path: &Path, found: &Found) -> Error {
    let path = path.display();
    if let Found::Version(version) = found {
        let message =
            format!("the overlay {path} has layout {version}; this vmbackup reads {VERSION} only");
        return Error::new(Kind::Unsupported, message)
            .hint("keep it, and serve it with the version of vmbackup that made it");
    }
    Error::new(Kind::Usage, format!("{path} is no overlay of this disk"))
        .hint("an overlay goes with the disk of the point it was made on; name another file")
}

fn too_small(path: &Path, size_bytes: u64) -> Error {
    let message = format!("the overlay {} has {size_bytes} bytes", path.display());
    Error::new(Kind::Usage, message).hint("an overlay only grows")
}

/// Makes a file with nothing in it an overlay of no bytes. A wish for another disk goes.
fn make(file: &File, path: &Path, identity: &[u8; 32]) -> std::io::Result<Layout> {
    let layout = Layout::new(0, 0);
    file.write_all_at(&[0; WISH_BYTES], WISH_AT)?;
    file.write_all_at(&layout.header(identity), 0)?;
    file.set_len(layout.end())?;
    sync(file, path)?;
    Ok(layout)
}

/// Makes the name of a file durable, which may be a link to another directory.
fn sync_name(path: &Path) -> Result<()> {
    let failed = |e| Error::io(format!("cannot find the overlay {}", path.display()), e);
    #[cfg(test)]
    super::growing::faults::next(path).map_err(failed)?;
    sync_directory_of(&path.canonicalize().map_err(failed)?)
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
