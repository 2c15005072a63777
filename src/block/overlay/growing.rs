//! Growing the file of a kept overlay, and what is left of it when that fails.
//!
//! ```text
//!  new map ─► sync ─► new header ─► sync ─► grown
//!     │ failed  │ failed  └────┬──────┘ failed
//!     ▼         ▼              ▼
//!  as it was  Fault::Unsynced ◄─ old header ─► sync ─ failed ─► Fault::Header
//! ```
//!
//! A header that was written may be believed after a restart, durable or not: flushes must not go
//! on with the old map then. And the system tells of writes that it lost only once for each open
//! file, which may be here, although they were others': after either no flush is believed ([`Fault`]).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bitmap::{BLOCK_BYTES, Page};
use super::layout::{HEADER_BYTES, Layout, write_pages};
use crate::error::{Error, Kind};

/// Why all flushes fail from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A sync failed: what was written before may be lost.
    Unsynced,
    /// The header may name another map than the one that flushes write.
    Header,
}

impl Fault {
    /// What a flush says.
    pub(super) fn error(self, path: &Path) -> Error {
        let path = path.display();
        let message = match self {
            Self::Unsynced => {
                format!("what was written to the overlay {path} may be lost: a sync of it failed")
            }
            Self::Header => {
                format!("the header of the overlay {path} could not be put back: nothing is kept")
            }
        };
        Error::new(Kind::Io, message)
            .hint("serve it anew when its file system is sound: it is as it was flushed last")
    }
}

/// A growth that failed.
pub(super) struct Failed {
    pub(super) error: Error,
    pub(super) fault: Option<Fault>,
}

/// A growth that is to be written.
pub(super) struct Growing {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
    pub(super) identity: [u8; 32],
    pub(super) old: Layout,
    pub(super) new: Layout,
    pub(super) pages: Vec<Page>,
}

impl Growing {
    /// Writes the new map, then the header that names it. Blocks.
    pub(super) fn write(self) -> Result<Layout, Box<Failed>> {
        let failed = |error, fault| {
            let message = format!("cannot grow the overlay {}", self.path.display());
            Box::new(Failed { error: Error::io(message, error), fault })
        };
        self.write_map().map_err(|e| failed(e, None))?;
        self.sync().map_err(|e| failed(e, Some(Fault::Unsynced)))?;
        let Err(error) = self.write_header(&self.new) else { return Ok(self.new) };
        let put_back = self.write_header(&self.old);
        if let Err(error) = &put_back {
            tracing::error!(path = %self.path.display(), %error, "an overlay's header is unknown");
        }
        let fault = if put_back.is_ok() { Fault::Unsynced } else { Fault::Header };
        Err(failed(error, Some(fault)))
    }

    fn write_map(&self) -> std::io::Result<()> {
        let Self { file, old, new, .. } = self;
        // Behind an odd end there may be what is left of a map from before the disk grew to there,
        // in a block that was written: zeroes are to follow.
        let tail = old.size_bytes.next_multiple_of(BLOCK_BYTES) - old.size_bytes;
        let tail = usize::try_from(tail).expect("less than a block");
        file.write_all_at(&[0; 4096][..tail], HEADER_BYTES + old.size_bytes)?;
        // What an attempt that failed left behind goes first.
        file.set_len(new.bitmap_at)?;
        file.set_len(new.end())?;
        write_pages(file, new.bitmap_at, &self.pages)
    }

    fn write_header(&self, layout: &Layout) -> std::io::Result<()> {
        self.file.write_all_at(&layout.header(&self.identity), 0)?;
        self.sync()
    }

    fn sync(&self) -> std::io::Result<()> {
        sync(&self.file, &self.path)
    }
}

/// Makes `file`, which is the overlay `path`, durable. Blocks.
pub(super) fn sync(file: &File, path: &Path) -> std::io::Result<()> {
    #[cfg(test)]
    faults::next(path)?;
    #[cfg(not(test))]
    let _ = path;
    file.sync_all()
}

/// Syncs that fail, because no file system here fails on demand.
#[cfg(test)]
pub(super) mod faults {
    use std::collections::{BTreeMap, VecDeque};
    use std::path::{Path, PathBuf};
    use std::sync::{Mutex, PoisonError};

    static PLANS: Mutex<BTreeMap<PathBuf, VecDeque<Sync>>> = Mutex::new(BTreeMap::new());

    /// What becomes of a sync.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(in crate::block::overlay) enum Sync {
        Works,
        Fails,
    }

    /// What becomes of the next syncs of the file `path`; those after them work.
    pub(in crate::block::overlay) fn plan(path: &Path, syncs: &[Sync]) {
        let mut plans = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
        plans.insert(path.to_owned(), syncs.iter().copied().collect());
    }

    pub(in crate::block::overlay) fn next(path: &Path) -> std::io::Result<()> {
        let mut plans = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
        match plans.get_mut(path).and_then(VecDeque::pop_front) {
            Some(Sync::Fails) => Err(std::io::Error::from_raw_os_error(5)),
            Some(Sync::Works) | None => Ok(()),
        }
    }
}
