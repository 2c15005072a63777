//! One backup of a domain at a time from this machine.
//!
//! A lock file per domain in the runtime directory is held (`flock`) for the life of a snapshot, and
//! the domain's journal with it: what a killed run left to undo. The lock ends with the process, the
//! journal does not. A job whose point is *not* in the journal was begun elsewhere and is nobody's to
//! end here.
//!
//! The lock's file is removed with the lock; that it was removed between open and lock is seen by
//! comparing the locked file with the one under the name.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::LibvirtOptions;
use crate::error::{Error, Kind, Result};
use crate::journal::Journal;
use crate::vm::Uuid;

/// The lock of a domain; ends when dropped.
#[derive(Debug)]
pub(super) struct DomainLock {
    file: File,
    path: PathBuf,
    /// What earlier runs did not finish, and what this one does.
    pub(super) journal: Journal,
}

impl DomainLock {
    /// Takes the lock of `domain`; [`Kind::Busy`] when another process has it.
    pub(super) fn take(options: &LibvirtOptions, domain: Uuid, name: &str) -> Result<Self> {
        let runtime_dir = &options.runtime_dir;
        let path = runtime_dir.join(format!("{domain}.lock"));
        let io = |what: &str, error| Error::io(format!("cannot {what} {}", path.display()), error);
        std::fs::create_dir_all(runtime_dir).map_err(|e| io("make the directory of", e))?;
        let file = loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = options.open(&path).map_err(|e| io("open", e))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let message = format!("domain '{name}' is being backed up already");
                    return Err(
                        Error::new(Kind::Busy, message).hint("wait for the other backup to end")
                    );
                }
                Err(errno) => return Err(io("lock", errno.into())),
            }
            if is_at(&file, &path).map_err(|e| io("examine", e))? {
                break file;
            }
        };
        Ok(Self { file, path, journal: options.journals.open(domain)? })
    }
}

impl Drop for DomainLock {
    fn drop(&mut self) {
        // Removed while still locked, so that nobody else's file is. One that stays is harmless:
        // it is not locked.
        if is_at(&self.file, &self.path).unwrap_or(false) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Whether `file` is the one that `path` names now.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let here = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((here.dev(), here.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(dir: &Path) -> LibvirtOptions {
        LibvirtOptions {
            uri: None,
            domain: "foo".into(),
            runtime_dir: dir.join("run"),
            journals: crate::journal::Journals::new(dir.join("journal"), None),
            metadata: crate::platform::libvirt::CheckpointMetadata::Remove,
        }
    }

    #[test]
    fn a_second_backup_waits_and_nothing_is_left_of_a_lock() {
        let dir = tempfile::tempdir().unwrap();
        let take = || DomainLock::take(&options(dir.path()), Uuid::from_u128(1), "foo");
        let lock = take().unwrap();
        assert_eq!(take().unwrap_err().kind(), Kind::Busy);
        drop(lock);
        drop(take().unwrap());
        assert_eq!(std::fs::read_dir(dir.path().join("run")).unwrap().count(), 0);
    }

    /// The file of a lock is unlinked when the lock ends: whoever opened it before must not hold a
    /// lock that nobody else sees.
    #[test]
    fn many_at_once_get_the_lock_one_at_a_time() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let options = options(dir.path());
        let (held, taken) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let lock = DomainLock::take(&options, Uuid::from_u128(1), "foo");
                        let Ok(_lock) = lock else { continue };
                        taken.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(held.fetch_add(1, Ordering::SeqCst), 0, "held twice");
                        held.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(taken.into_inner() > 0);
    }
}
