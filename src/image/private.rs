//! A directory for the socket of a server of ours, which nobody else can enter.
//!
//! It is removed with its handle. One whose owner was killed is removed by the next that makes one, or
//! by a recovery: a lock (`flock`) on the directory says that its owner lives.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use tempfile::TempDir;

use crate::error::{Error, Result};

const PREFIX: &str = "vmbackup-nbd-";
/// Attempts to make one that a sweep does not take for left: it would have to come between two
/// calls each time.
const ATTEMPTS: u32 = 8;

/// The directory.
#[derive(Debug)]
pub(crate) struct PrivateDir {
    directory: TempDir,
    /// Held as long as we live.
    _lock: File,
}

impl PrivateDir {
    /// Makes one where temporary files go.
    pub(crate) fn create() -> Result<Self> {
        let failed = |e| Error::io("cannot create a directory for a socket", e);
        let parent = tempfile::env::temp_dir();
        sweep_in(&parent);
        for _ in 0..ATTEMPTS {
            let made = tempfile::Builder::new()
                .prefix(PREFIX)
                .permissions(fs::Permissions::from_mode(0o700))
                .tempdir_in(&parent);
            let directory = made.map_err(failed)?;
            if let Some(lock) = lock(directory.path()).map_err(failed)? {
                return Ok(Self { directory, _lock: lock });
            }
        }
        Err(failed(io::ErrorKind::Interrupted.into()))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Removes the directories of owners that are gone. What cannot be removed is in nobody's way.
pub fn sweep_sockets() {
    sweep_in(&tempfile::env::temp_dir());
}

fn sweep_in(parent: &Path) {
    let us = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        let named = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        // Not a link, and nobody else's.
        let ours =
            named && path.symlink_metadata().is_ok_and(|data| data.is_dir() && data.uid() == us);
        if ours && let Ok(Some(_lock)) = lock(&path) {
            let removed = fs::remove_dir_all(&path);
            tracing::debug!(path = %path.display(), ?removed, "its owner was killed");
        }
    }
}

/// The lock of a directory; `None` if somebody has it, or it is gone.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        // A sweep took it for left before we had it.
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        file => File::from(file?),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let (here, there) = (file.metadata()?, path.symlink_metadata());
    Ok(there.is_ok_and(|there| there.ino() == here.ino()).then_some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sweep that came between making a directory and locking it once failed the backup.
    #[test]
    fn a_directory_that_is_gone_is_no_error() {
        let parent = tempfile::tempdir().unwrap();
        assert!(lock(&parent.path().join("vmbackup-nbd-swept")).unwrap().is_none());
    }

    #[test]
    fn the_directory_of_a_killed_owner_is_removed_and_that_of_a_living_one_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let dead = parent.path().join("vmbackup-nbd-dead");
        let living = parent.path().join("vmbackup-nbd-living");
        let foreign = parent.path().join("somebody");
        for directory in [&dead, &living, &foreign] {
            fs::create_dir(directory).unwrap();
            fs::write(directory.join("nbd"), "").unwrap();
        }
        let held = lock(&living).unwrap().unwrap();
        sweep_in(parent.path());
        assert!(!dead.exists() && living.exists() && foreign.exists());
        drop(held);
        sweep_in(parent.path());
        assert!(!living.exists());
    }
}
