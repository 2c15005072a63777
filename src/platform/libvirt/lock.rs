//! One backup of a domain at a time from this machine, and what a killed one left.
//!
//! A lock file per domain in the runtime directory is held (`flock`) for the life of a snapshot.
//! A record beside it says which point is being made and whether the guest's file systems may be
//! frozen. The lock ends with the process, the record does not: the next run reads what is to be
//! undone. A record is cleared only when nothing is left to undo for certain: a freeze or a job
//! that was asked for and not answered may still happen. A job whose point is *not* in the record
//! was begun elsewhere and is nobody's to end here.
//!
//! The record is replaced as a whole (a new file renamed onto it): a run that is killed while it
//! writes leaves the one before. It is not synced: what it tells of ends with the machine. The
//! lock's file is removed with the lock; that it was removed between open and lock is seen by
//! comparing the locked file with the one under the name.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::vm::{PointId, Uuid};

/// Largest record read: it is a line.
const RECORD_BYTES_MAX: u64 = 4096;

/// What the run that holds the lock is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The point being made.
    pub(super) point: PointId,
    /// Guest file systems are, or may be, frozen.
    pub(super) frozen: bool,
    /// Points of earlier runs whose job may still begin: libvirt never answered.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) earlier: Vec<PointId>,
}

impl Record {
    /// The record of a run that has done nothing yet.
    pub(super) fn of(point: PointId) -> Self {
        Self { point, frozen: false, earlier: Vec::new() }
    }

    /// Whether a job that carries `point` is ours to end.
    pub(super) fn owns(&self, point: PointId) -> bool {
        self.point == point || self.earlier.contains(&point)
    }
}

/// Most earlier points kept: each is a run that waited in vain for a minute.
pub(super) const EARLIER_MAX: usize = 32;

/// What an earlier run left to undo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// Nothing.
    Nothing,
    /// What its record says.
    Recorded(Record),
    /// Nobody knows: there is a record, and it makes no sense. The guest may be frozen.
    Unreadable,
}

/// The lock of a domain; ends when dropped.
#[derive(Debug)]
pub(super) struct DomainLock {
    file: File,
    path: PathBuf,
    /// What an earlier run did not finish.
    pub(super) unfinished: Unfinished,
}

impl DomainLock {
    /// Takes the lock of `domain`; [`Kind::Busy`] when another process has it.
    pub(super) fn take(runtime_dir: &Path, domain: Uuid, name: &str) -> Result<Self> {
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
        let mut lock = Self { file, path, unfinished: Unfinished::Nothing };
        lock.unfinished = lock.read()?;
        Ok(lock)
    }

    fn read(&self) -> Result<Unfinished> {
        let path = self.record_path();
        let failed = |e| Error::io(format!("cannot read {}", path.display()), e);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Unfinished::Nothing),
            Err(error) => return Err(failed(error)),
        };
        let mut text = Vec::new();
        file.take(RECORD_BYTES_MAX).read_to_end(&mut text).map_err(failed)?;
        Ok(serde_json::from_slice(&text).map_or_else(
            |error| {
                tracing::warn!(path = %path.display(), %error, "a record makes no sense");
                Unfinished::Unreadable
            },
            Unfinished::Recorded,
        ))
    }

    /// Where the record is.
    pub(super) fn record_path(&self) -> PathBuf {
        self.path.with_extension("record")
    }

    /// Says what this run is doing.
    pub(super) fn record(&mut self, record: &Record) -> Result<()> {
        let text = serde_json::to_string(record).expect("a record is plain data");
        let (path, new) = (self.record_path(), self.path.with_extension("record.new"));
        let write = || {
            let mut options = OpenOptions::new();
            let mut file =
                options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(text.as_bytes())?;
            std::fs::rename(&new, &path)
        };
        write().map_err(|e| Error::io(format!("cannot write {}", path.display()), e))
    }

    /// Says that nothing is left to undo.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.unfinished = Unfinished::Nothing;
        let path = self.record_path();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::io(format!("cannot remove {}", path.display()), error))
            }
            _ => Ok(()),
        }
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

    #[test]
    fn a_second_backup_waits_and_the_next_one_finds_the_record() {
        let dir = tempfile::tempdir().unwrap();
        let domain = Uuid::from_u128(1);
        let take = || DomainLock::take(dir.path(), domain, "foo");
        let record =
            Record { point: PointId([3; 16]), frozen: true, earlier: vec![PointId([4; 16])] };
        let mut lock = take().unwrap();
        assert_eq!(lock.unfinished, Unfinished::Nothing);
        lock.record(&record).unwrap();
        assert_eq!(take().unwrap_err().kind(), Kind::Busy);
        drop(lock);
        let mut lock = take().unwrap();
        assert_eq!(lock.unfinished, Unfinished::Recorded(record));
        lock.clear().unwrap();
        drop(lock);
        assert_eq!(take().unwrap().unfinished, Unfinished::Nothing);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no file is left");
    }

    #[test]
    fn a_record_that_makes_no_sense_is_not_taken_for_none() {
        let dir = tempfile::tempdir().unwrap();
        let domain = Uuid::from_u128(1);
        let path = dir.path().join(format!("{domain}.record"));
        for text in ["", "{\"point\":", "\u{0}\u{0}"] {
            std::fs::write(&path, text).unwrap();
            let lock = DomainLock::take(dir.path(), domain, "foo").unwrap();
            assert_eq!(lock.unfinished, Unfinished::Unreadable, "{text:?}");
        }
    }

    /// The file of a lock is unlinked when the lock ends: whoever opened it before must not hold a
    /// lock that nobody else sees.
    #[test]
    fn many_at_once_get_the_lock_one_at_a_time() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let (held, taken) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let Ok(_lock) = DomainLock::take(dir.path(), Uuid::from_u128(1), "foo")
                        else {
                            continue;
                        };
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
