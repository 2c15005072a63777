//! Which file it is, and whether it was written since: inode, size and time of the last change.
//!
//! A rename changes none of it, nor do a new owner and new rights; whoever runs a VM from an image
//! changes the time. For whoever has to tell later whether a file is still the one that was left.

use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A file or directory as it was at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    inode: u64,
    size_bytes: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
}

impl FileStamp {
    /// Of what has this name now; a link is not followed. `None` if nothing has.
    pub fn of(path: &Path) -> io::Result<Option<Self>> {
        match path.symlink_metadata() {
            Ok(data) => Ok(Some(Self {
                inode: data.ino(),
                size_bytes: data.size(),
                modified: (data.mtime(), data.mtime_nsec()),
            })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether both are of one file, written meanwhile or not. The device is not compared: its number
    /// may be another after a boot, and the two had one directory.
    pub fn is_of_same_file(&self, other: &Self) -> bool {
        self.inode == other.inode
    }
}
