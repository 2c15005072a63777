//! Keeping writers out of an image, in the way QEMU understands.
//!
//! QEMU announces what it does with an image by shared locks on single bytes of the file
//! (`block/file-posix.c`, `RAW_LOCK_PERM_BASE` and `RAW_LOCK_SHARED_BASE`): byte 100+n means
//! "I use permission n", byte 200+n "nobody else may". We take what a reader would (consistent
//! read) and deny writing and resizing, which QEMU's own read-only openers do not do for raw
//! images. The locks belong to the open file (OFD locks) and end with it, also when we are killed.
//!
//! As long as an [`ImageLock`] lives, no VM with this image can start. It cannot stop programs that
//! do not ask: [`ImageLock::check_unchanged`] sees those by the file's time stamp and size. On a block
//! device the locks do not reach QEMUs of libvirt (`device`): one that uses it already is seen by its
//! open file, and one that starts meanwhile by that or by what it wrote, at the end.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::device::{self, Use, Users};
use crate::error::{Error, Kind, Result};

/// First byte of "in use".
const USED_BASE: i64 = 100;
/// First byte of "denied to others".
const DENIED_BASE: i64 = 200;
/// `BLK_PERM_CONSISTENT_READ` is bit 0.
const CONSISTENT_READ: i64 = 0;
/// `BLK_PERM_WRITE` is bit 1.
const WRITE: i64 = 1;
/// `BLK_PERM_RESIZE` is bit 3.
const RESIZE: i64 = 3;

/// How long programs may go on reading a device that is to be written.
const READERS_MAX: Duration = Duration::from_secs(3);

/// An image nobody can begin to write while this lives.
#[derive(Debug)]
pub struct ImageLock {
    file: File,
    path: PathBuf,
    stamp: Stamp,
}

/// What changes when a file is written or replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size_bytes: u64,
    modified: (i64, i64),
    /// Of a block device: sectors written and discarded.
    written: Option<[u64; 2]>,
}

impl ImageLock {
    /// Whether the image could be locked now: [`Kind::Busy`] if not. Takes no lock.
    pub fn probe(path: &Path) -> Result<()> {
        let file = open(path)?;
        refuse_if_used(&file, path)?;
        refuse_if_open(&file, path, Use::Writes)
    }

    /// Whether nobody uses the image now: [`Kind::Busy`] if someone does. Takes no lock.
    pub fn probe_to_write(path: &Path) -> Result<()> {
        let file = open(path)?;
        refuse_if_used(&file, path)
            .and_then(|()| refuse_if_taken(&file, path, DENIED_BASE + WRITE))
            .and_then(|()| refuse_if_open(&file, path, Use::Opens))
            .map_err(elsewhere)
    }

    /// Locks the image. [`Kind::Busy`] if someone writes it or denies reading it.
    pub fn acquire(path: &Path) -> Result<Self> {
        let announced = [USED_BASE + CONSISTENT_READ, DENIED_BASE + WRITE, DENIED_BASE + RESIZE];
        let file = open(path)?;
        announce(&file, path, &announced)?;
        refuse_if_used(&file, path)?;
        refuse_if_open(&file, path, Use::Writes)?;
        Self::locked(file, path)
    }

    /// Locks the image to write it in place. [`Kind::Busy`] if someone writes it, or relies on its
    /// not being written.
    pub fn acquire_to_write(path: &Path) -> Result<Self> {
        let file = open(path)?;
        let used = [USED_BASE + CONSISTENT_READ, USED_BASE + WRITE];
        announce(&file, path, &[used, [DENIED_BASE + WRITE, DENIED_BASE + RESIZE]].concat())?;
        refuse_if_used(&file, path)
            .and_then(|()| refuse_if_taken(&file, path, DENIED_BASE + WRITE))
            .and_then(|()| refuse_if_open(&file, path, Use::Opens))
            .map_err(elsewhere)?;
        Self::locked(file, path)
    }

    fn locked(file: File, path: &Path) -> Result<Self> {
        let failed = |e| Error::io(format!("cannot examine {}", path.display()), e);
        let stamp = Stamp::of(path, &file).map_err(failed)?;
        Ok(Self { file, path: path.to_owned(), stamp })
    }

    /// The locked image.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Another handle of the same open file: to read it. The lock lasts until all are closed.
    pub fn file(&self) -> Result<File> {
        let failed = |e| Error::io(format!("cannot open {}", self.path.display()), e);
        self.file.try_clone().map_err(failed)
    }

    /// [`Kind::Busy`] if another process may write the device: no lock keeps a domain of libvirt from
    /// starting on it.
    pub fn check_alone(&self) -> Result<()> {
        refuse_if_open(&self.file, &self.path, Use::Writes)
    }

    /// [`Kind::SnapshotLost`] if the file was written, resized or replaced since it was locked.
    pub fn check_unchanged(&self) -> Result<()> {
        let failed = |e| Error::io(format!("cannot examine {}", self.path.display()), e);
        refuse_if_open(&self.file, &self.path, Use::Writes).map_err(|error| {
            Error::new(Kind::SnapshotLost, "a VM started while its disk was read").source(error)
        })?;
        if Stamp::of(&self.path, &self.file).map_err(failed)? == self.stamp {
            return Ok(());
        }
        let message = format!("{} was changed while it was read", self.path.display());
        Err(Error::new(Kind::SnapshotLost, message)
            .hint("something that ignores QEMU's image locks writes it; find it, then run again"))
    }
}

impl Stamp {
    fn of(path: &Path, mut file: &File) -> std::io::Result<Self> {
        let data = path.metadata()?;
        if let Some(number) = device::number(file) {
            // Not the node's times: udev sets them whenever somebody closed the device.
            return Ok(Self {
                device: data.rdev(),
                inode: 0,
                size_bytes: file.seek(SeekFrom::End(0))?,
                modified: (0, 0),
                written: device::written_so_far(file, number)?,
            });
        }
        Ok(Self {
            device: data.dev(),
            inode: data.ino(),
            size_bytes: data.size(),
            modified: (data.mtime(), data.mtime_nsec()),
            written: None,
        })
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        // A FIFO must not hang us; for files and disks the flag means nothing.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| Error::open(path, e))
}

/// [`Kind::Busy`] if someone writes the image or denies reading it.
fn refuse_if_used(file: &File, path: &Path) -> Result<()> {
    [DENIED_BASE + CONSISTENT_READ, USED_BASE + WRITE, USED_BASE + RESIZE]
        .into_iter()
        .try_for_each(|byte| refuse_if_taken(file, path, byte))
}

fn refuse_if_taken(file: &File, path: &Path, byte: i64) -> Result<()> {
    let taken = is_taken(file, byte)
        .map_err(|e| Error::io(format!("cannot look at the locks of {}", path.display()), e))?;
    if taken {
        return Err(Error::new(Kind::Busy, format!("{} is in use", path.display()))
            .hint("another program (a running VM?) uses it; stop it, or back up the VM running"));
    }
    Ok(())
}

/// [`Kind::Busy`] if another process uses the device in this way; files have their locks. One that
/// only reads is given a moment: udev and its programs look at each device that was written. Without
/// the right to see all processes a device is not written.
fn refuse_if_open(file: &File, path: &Path, how: Use) -> Result<()> {
    let Some(number) = device::number(file) else { return Ok(()) };
    let failed = |e| Error::io(format!("cannot see who uses {}", path.display()), e);
    let begun = Instant::now();
    loop {
        let user = match device::users(number, how).map_err(failed)? {
            Users::Nobody => return Ok(()),
            Users::Hidden if how == Use::Writes => return Ok(()),
            Users::Hidden => {
                let message = format!("cannot see whether a VM uses {}", path.display());
                return Err(Error::new(Kind::Permission, message)
                    .hint("run as root, who sees the files of all processes"));
            }
            Users::One(user) => user,
        };
        let writes =
            how == Use::Writes || matches!(device::users(number, Use::Writes), Ok(Users::One(_)));
        if writes || begun.elapsed() > READERS_MAX {
            let message =
                format!("{} is in use by {} (process {})", path.display(), user.name, user.process);
            return Err(Error::new(Kind::Busy, message)
                .hint("a running VM? stop it, or back up the VM running"));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Takes the locks. Before looking at those of others: whoever does the same at this moment sees us
/// or is seen.
fn announce(file: &File, path: &Path, bytes: &[i64]) -> Result<()> {
    bytes.iter().try_for_each(|byte| set(file, *byte)).map_err(|e| {
        Error::io(format!("cannot lock {}", path.display()), e)
            .hint("the file system must support locks; start the VM and back it up running")
    })
}

fn byte_lock(kind: i32, byte: i64) -> libc::flock {
    libc::flock {
        // The kernel's constants fit its own field.
        l_type: i16::try_from(kind).expect("lock types are small"),
        l_whence: i16::try_from(libc::SEEK_SET).expect("zero"),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn set(file: &File, byte: i64) -> std::io::Result<()> {
    fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(libc::F_RDLCK, byte)))?;
    Ok(())
}

/// Whether someone else holds a lock on the byte.
fn is_taken(file: &File, byte: i64) -> std::io::Result<bool> {
    let mut lock = byte_lock(libc::F_WRLCK, byte);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// Says what to do about an image that was to be overwritten and is in use.
fn elsewhere(error: Error) -> Error {
    match error.kind() {
        Kind::Busy => error.hint("stop the VM that uses it, or choose another place"),
        _ => error,
    }
}
