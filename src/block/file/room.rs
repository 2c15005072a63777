//! Room in a new file for long runs of data, so that they can be written past the page cache.
//!
//! A direct write into a hole of a file holds the inode's lock until the disk has it, and all
//! others wait (ext4). Into blocks that are allocated already, if only as unwritten, direct writes
//! go side by side. So the room of a run is made (fallocate(2)) when the first long write of it
//! comes, and what nobody wrote is given back at the end: the file ends as sparse as if it had been
//! written through the page cache. It is made only while the file system has room for the whole
//! disk besides: what is held and not used for a while is then not what a guest lacks.
//!
//! Making room waits for the direct writes in flight (ext4, XFS), which only runs of some length
//! are worth. Where none can be made, writes go through the page cache, and it is they who fail if
//! something is wrong.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstatvfs, seek};
use rustix::io::Errno;

use crate::block::ByteRange;
use crate::units::{KIB, MIB};

/// Shorter runs are not worth the wait.
const RUN_BYTES_MIN: u64 = 4 * MIB;

/// Room is made in pieces of at most this size.
const RUN_BYTES_MAX: u64 = 64 * MIB;

/// Shorter writes are better gathered by the page cache than waited for one by one.
const WRITE_BYTES_MIN: u64 = 64 * KIB;

/// What is left unwritten between the writes of a run is a hole again from this length on: one call
/// each, and one extent more.
const HOLE_BYTES_MIN: u64 = 4 * KIB;

/// The runs of a file.
#[derive(Debug)]
pub(super) struct Room {
    /// What is to stay free: the size of the disk.
    reserve_bytes: u64,
    /// Sorted and disjoint. Held for a look only.
    runs: Mutex<Vec<Arc<Run>>>,
    /// Some was made.
    made: AtomicBool,
    /// None could be made, once: each try may leave some allocated.
    failed: AtomicBool,
}

#[derive(Debug)]
struct Run {
    range: ByteRange,
    /// Whether there is room, once it was tried.
    made: OnceLock<bool>,
}

impl Room {
    /// For a file that may become `size_bytes` long, where there is that much room and more.
    pub(super) fn within(file: &File, size_bytes: u64) -> Option<Self> {
        (size_bytes < free_bytes(file)?).then(|| Self {
            reserve_bytes: size_bytes,
            runs: Mutex::default(),
            made: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        })
    }

    /// Says that `range` will be written, most of it as data. Heard only behind what was said
    /// before.
    pub(super) fn expect(&self, range: ByteRange) {
        let mut runs = self.runs();
        let behind = runs.last().is_none_or(|last| last.range.end() <= range.offset());
        if range.len() < RUN_BYTES_MIN || !behind {
            return;
        }
        let run = |range| Arc::new(Run { range, made: OnceLock::new() });
        runs.extend(range.pieces(RUN_BYTES_MAX).map(run));
    }

    /// Whether a write of `range` has its room; makes it for the first long write of a run. The
    /// others of that run wait meanwhile, as they would in the kernel.
    pub(super) fn has(&self, file: &File, range: ByteRange) -> bool {
        if range.len() < WRITE_BYTES_MIN {
            return false;
        }
        let run = {
            let runs = self.runs();
            let index = runs.partition_point(|run| run.range.end() <= range.offset());
            let Some(run) = runs.get(index).filter(|run| run.range.contains(range)) else {
                return false;
            };
            Arc::clone(run)
        };
        *run.made.get_or_init(|| self.make(file, run.range))
    }

    fn make(&self, file: &File, range: ByteRange) -> bool {
        let free = free_bytes(file).is_some_and(|free| free > self.reserve_bytes);
        if !free || self.failed.load(Ordering::Relaxed) {
            return false;
        }
        match fallocate(file, FallocateFlags::KEEP_SIZE, range.offset(), range.len()) {
            Ok(()) => {
                self.made.store(true, Ordering::Relaxed);
                true
            }
            Err(error) => {
                tracing::debug!(%error, ?range, "no room could be made");
                self.failed.store(true, Ordering::Relaxed);
                false
            }
        }
    }

    /// Keeps another amount free than the size of the disk.
    #[cfg(test)]
    pub(super) fn keep_free(&mut self, bytes: u64) {
        self.reserve_bytes = bytes;
    }

    /// Whether any was made so far: writes go past the page cache then.
    pub(super) fn any(&self) -> bool {
        self.made.load(Ordering::Relaxed)
    }

    /// Makes holes of the room that nobody used. Nothing may be written meanwhile. Best effort:
    /// what stays allocated reads as zeroes all the same.
    pub(super) fn give_back(&self, file: &File) {
        let runs = std::mem::take(&mut *self.runs());
        // A failed try may have allocated some of a run.
        for run in runs.iter().filter(|run| run.made.get().is_some()) {
            if let Err(error) = make_holes(file, run.range) {
                tracing::debug!(%error, range = ?run.range, "unwritten room stays allocated");
            }
        }
    }

    fn runs(&self) -> MutexGuard<'_, Vec<Arc<Run>>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What this user may still write to the file's file system.
fn free_bytes(file: &File) -> Option<u64> {
    let told = fstatvfs(file).ok()?;
    Some(told.f_bavail.saturating_mul(told.f_frsize))
}

/// Makes holes of what was not written within `range`: to lseek(2) that is a hole already.
fn make_holes(file: &File, range: ByteRange) -> rustix::io::Result<()> {
    let mut at = range.offset();
    while at < range.end() {
        let start = find(file, SeekFrom::Hole(at))?.unwrap_or(range.end());
        if start >= range.end() {
            return Ok(());
        }
        let end = find(file, SeekFrom::Data(start))?.unwrap_or(u64::MAX).min(range.end());
        if end - start >= HOLE_BYTES_MIN {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, how, start, end - start)?;
        }
        at = end;
    }
    Ok(())
}

/// Where that is; none when there is none up to the file's end.
fn find(file: &File, what: SeekFrom) -> rustix::io::Result<Option<u64>> {
    match seek(file, what) {
        Ok(at) => Ok(Some(at)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error),
    }
}
