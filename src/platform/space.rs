//! The room that scratch has: what every platform with scratch files looks after.
//!
//! What the guest overwrites during a backup is kept in scratch files, and where they are full the
//! guest suffers, not the backup. So a part of their file system must stay free: where that is
//! touched the backup is given up. Asked before a backup begins and four times a second while it
//! runs; what others write there counts as well.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use crate::error::{Error, Kind, Result};

/// How often free space is looked at: a disk written at 1 GB/s fills the reserve in a second.
pub(super) const POLL: Duration = Duration::from_millis(250);

/// Longest wait for the file system of a scratch directory: a busy one takes seconds.
pub(super) const ANSWER: Duration = Duration::from_secs(10);

/// Space that must stay free: a tenth of the file system, within these bounds.
const RESERVE_BYTES_MIN: u64 = 1 << 20;
const RESERVE_BYTES_MAX: u64 = 1 << 30;

/// Size and free bytes of the file system a directory is on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Space {
    pub(super) free_bytes: u64,
    size_bytes: u64,
}

impl Space {
    /// Asks the file system.
    pub(super) fn of(directory: &Path) -> Result<Self> {
        check_directory(directory)?;
        let stat = rustix::fs::statvfs(directory).map_err(|errno| {
            Error::io(format!("cannot use scratch directory {}", directory.display()), errno.into())
                .hint("name a local directory that QEMU may write to with --scratch-dir")
        })?;
        Ok(Self {
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
            size_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        })
    }

    /// What may be used before the reserve is touched; none when it is.
    pub(super) fn usable_bytes(self) -> Option<u64> {
        let reserve = (self.size_bytes / 10).clamp(RESERVE_BYTES_MIN, RESERVE_BYTES_MAX);
        self.free_bytes.checked_sub(reserve)
    }

    /// Whether the reserve is touched.
    pub(super) fn is_low(self) -> bool {
        self.usable_bytes().is_none()
    }
}

/// Fails when a directory of this machine that is to hold scratch files is none.
pub(super) fn check_directory(directory: &Path) -> Result<()> {
    let failed = |kind, why: &str| {
        let message = format!("scratch directory {} {why}", directory.display());
        Err(Error::new(kind, message)
            .hint("name a local directory that QEMU may write to with --scratch-dir"))
    };
    match directory.metadata() {
        Ok(data) if data.is_dir() => Ok(()),
        Ok(_) => failed(Kind::Usage, "is not a directory"),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            failed(Kind::Usage, "is below a file")
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            failed(Kind::NotFound, "does not exist")
        }
        // Whoever uses it says what is wrong.
        Err(_) => Ok(()),
    }
}

/// An error if scratch in `directory` is short of room, or if nobody can tell (any more).
pub(super) fn check(directory: &Path) -> Result<()> {
    let space = Space::of(directory).map_err(|error| {
        error.context("the space for scratch is not known any more; the guest comes first")
    })?;
    if space.is_low() { Err(no_room(directory)) } else { Ok(()) }
}

/// The same elsewhere, since whoever asks a file system that hangs, hangs: an error also if nobody
/// answers for some seconds. Cancel-safe.
pub(super) async fn check_aside(directory: &Path) -> Result<()> {
    let asked = directory.to_owned();
    let asked = tokio::task::spawn_blocking(move || check(&asked));
    let Ok(checked) = tokio::time::timeout(ANSWER, asked).await else {
        let what = format!("scratch directory {} does not answer", directory.display());
        return Err(Error::new(Kind::Timeout, what));
    };
    // Not asked only where the program ends.
    checked.unwrap_or_else(|_| Ok(()))
}

/// The error of a scratch directory that has no room.
pub(super) fn no_room(directory: &Path) -> Error {
    Error::new(
        Kind::NoSpace,
        format!("scratch directory {} is almost full; the guest comes first", directory.display()),
    )
    .hint("free space there, or name a larger local directory with --scratch-dir")
}
