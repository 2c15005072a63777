//! One backup of a domain at a time from this machine, and what a killed one left.
//!
//! A lock file per domain in the runtime directory is held (`flock`) for the life of a snapshot
//! and says which point is being made and whether the guest's file systems may be frozen. The lock
//! ends with the process, the record does not: the next run reads what is to be undone. A record
//! is cleared only when nothing is left to undo for certain: a freeze or a job that was asked for
//! and not answered may still happen. A job whose point is *not* in the record was begun elsewhere
//! and is nobody's to end here.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
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

/// The lock of a domain; ends when dropped.
#[derive(Debug)]
pub(super) struct DomainLock {
    file: File,
    path: PathBuf,
    /// What an earlier run did not finish.
    pub(super) unfinished: Option<Record>,
}

impl DomainLock {
    /// Takes the lock of `domain`; [`Kind::Busy`] when another process has it.
    pub(super) fn take(runtime_dir: &Path, domain: Uuid, name: &str) -> Result<Self> {
        let path = runtime_dir.join(format!("{domain}.lock"));
        let io = |what: &str, error| Error::io(format!("cannot {what} {}", path.display()), error);
        std::fs::create_dir_all(runtime_dir).map_err(|e| io("make the directory of", e))?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(&path).map_err(|e| io("open", e))?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|errno| {
            if errno == rustix::io::Errno::WOULDBLOCK {
                Error::new(Kind::Busy, format!("domain '{name}' is being backed up already"))
                    .hint("wait for the other backup to end")
            } else {
                io("lock", errno.into())
            }
        })?;
        let mut text = String::new();
        (&mut file).take(RECORD_BYTES_MAX).read_to_string(&mut text).map_err(|e| io("read", e))?;
        let unfinished = serde_json::from_str(&text).ok();
        Ok(Self { file, path, unfinished })
    }

    /// Says what this run is doing.
    pub(super) fn record(&mut self, record: &Record) -> Result<()> {
        let text = serde_json::to_string(record).expect("a record is plain data");
        self.write(&text)
    }

    /// Says that nothing is left to undo.
    pub(super) fn clear(&mut self) -> Result<()> {
        self.unfinished = None;
        self.write("")
    }

    fn write(&mut self, text: &str) -> Result<()> {
        let mut write = || {
            self.file.seek(SeekFrom::Start(0))?;
            self.file.set_len(0)?;
            self.file.write_all(text.as_bytes())
        };
        write().map_err(|e| Error::io(format!("cannot write {}", self.path.display()), e))
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
        assert_eq!(lock.unfinished, None);
        lock.record(&record).unwrap();
        assert_eq!(take().unwrap_err().kind(), Kind::Busy);
        drop(lock);
        let mut lock = take().unwrap();
        assert_eq!(lock.unfinished, Some(record));
        lock.clear().unwrap();
        drop(lock);
        assert_eq!(take().unwrap().unfinished, None);
    }
}
