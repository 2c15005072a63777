//! Room in a new file for long runs of data, so that they can be written past the page cache.
//!
//! A direct write into a hole of a file holds the inode's lock until the disk has it, and all others
//! wait (ext4). Into blocks that are allocated already, if only as unwritten, direct writes go side by
//! side. So the room of a run is made (fallocate(2)) when the first of its bytes come, and what nobody
//! wrote of it is given back at the end: the file ends as sparse as if it had been written through the
//! page cache.
//!
//! Making room waits for the direct writes in flight (ext4, XFS), which only runs of some length are
//! worth. Where none can be made, writes go through the page cache, and it is they who fail if
//! something is wrong.

use std::fs::File;
use std::sync::{Mutex, MutexGuard, PoisonError};

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
#[derive(Debug, Default)]
pub(super) struct Room {
    /// Sorted and disjoint.
    runs: Mutex<Vec<Run>>,
}

#[derive(Debug)]
struct Run {
    range: ByteRange,
    made: Option<bool>,
}

impl Room {
    /// For a file that may become `size_bytes` long, if its file system has room for all of it now:
    /// what is allocated in advance is then never what somebody else lacks.
    pub(super) fn within(file: &File, size_bytes: u64) -> Option<Self> {
        let free = fstatvfs(file).ok()?;
        let free_bytes = free.f_bavail.saturating_mul(free.f_frsize);
        (size_bytes <= free_bytes).then(Self::default)
    }

    /// Says that `range` will be written, most of it as data; behind what was said before.
    pub(super) fn expect(&self, range: ByteRange) {
        if range.len() < RUN_BYTES_MIN {
            return;
        }
        let mut runs = self.runs();
        let behind = runs.last().is_none_or(|last| last.range.end() <= range.offset());
        assert!(behind, "runs are told in the order of the disk");
        runs.extend(range.pieces(RUN_BYTES_MAX).map(|range| Run { range, made: None }));
    }

    /// Whether a write of `range` has its room; makes it for the first write of a run. The others
    /// of that run wait meanwhile, as they would in the kernel.
    pub(super) fn has(&self, file: &File, range: ByteRange) -> bool {
        if range.len() < WRITE_BYTES_MIN {
            return false;
        }
        let mut runs = self.runs();
        let index = runs.partition_point(|run| run.range.end() <= range.offset());
        let Some(run) = runs.get_mut(index).filter(|run| run.range.contains(range)) else {
            return false;
        };
        *run.made.get_or_insert_with(|| {
            let (offset, len) = (run.range.offset(), run.range.len());
            let made = fallocate(file, FallocateFlags::KEEP_SIZE, offset, len);
            made.inspect_err(|error| tracing::debug!(%error, "no room made in advance")).is_ok()
        })
    }

    /// Makes holes of the room that nobody used. Nothing may be written meanwhile. Best effort:
    /// what stays allocated reads as zeroes all the same.
    pub(super) fn give_back(&self, file: &File) {
        let runs = std::mem::take(&mut *self.runs());
        for run in runs.iter().filter(|run| run.made == Some(true)) {
            if let Err(error) = make_holes(file, run.range) {
                tracing::debug!(%error, range = ?run.range, "unwritten room stays allocated");
            }
        }
    }

    fn runs(&self) -> MutexGuard<'_, Vec<Run>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
