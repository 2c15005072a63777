//! Raw image files and block devices as disks.
//!
//! | type | what | opened by |
//! |---|---|---|
//! | [`FileSource`] | a raw file or device, read-only | image platform, `hash`, `verify --against` |
//! | [`FileSink`] | an existing file or device of exactly the right size | `restore --to-device` |
//! | [`FileDisk`] | both, for a disk in use | `serve --writable` |
//! | [`NewFile`] | a sparse file under a temporary name, renamed when durable | `restore --to`, `copy` |
//! | [`PipeSink`] | standard output or any other pipe, in order | `copy` |
//!
//! Invariants:
//! - Zeroes are made by calls whose result the kernel defines as zero (hole, zero range, written
//!   zeroes). Nothing is ever discarded: what a discarded block reads as is the device's whim.
//! - Nothing existing is replaced before the new is complete and durable; what replaces a file has its
//!   owner and its rights, unless others may have made that file ([`take_over`]).
//! - The reactor never waits for a disk: what is not in the page cache is read on blocking threads,
//!   writing happens on the sink's own threads.
//!
//! Neither format nor partition tables are looked at: bytes are bytes. Locking an image against
//! other users is the business of the platform that knows who they are.

mod bypass;
mod disk;
mod new;
mod pipe;
mod placed;
mod replaced;
mod sink;
mod source;
mod stamp;
#[cfg(test)]
mod tests;

pub use bypass::{Bypass, Gather, MEMORY_BYTES};
pub use disk::FileDisk;
pub use new::{Durability, Existing, NewFile, refuse_special};
pub use pipe::{PipeReader, PipeSink};
pub use placed::Placed;
pub use replaced::{check_take_over, followed, take_over};
pub use sink::FileSink;
pub use source::{Access, FileSource, read_cached};
pub use stamp::FileStamp;

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::io::Errno;

use crate::error::{Error, Kind, Result};

/// What a sink or source stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    File,
    Device,
}

/// Opens a raw file or block device and finds its size. Anything else (a pipe, a directory) is
/// refused: it has no size and cannot be read twice.
fn open(
    path: &Path,
    options: &mut OpenOptions,
    flags: rustix::fs::OFlags,
) -> Result<(File, Medium, u64)> {
    // O_NONBLOCK keeps the open of a FIFO from hanging; it means nothing for files and disks. All
    // flags in one call: a second one would replace those of the first.
    let flags = (flags | rustix::fs::OFlags::NONBLOCK).bits().cast_signed();
    let file = options.custom_flags(flags).open(path).map_err(|error| {
        if error.kind() == std::io::ErrorKind::ResourceBusy {
            return Error::new(Kind::Busy, format!("{} is in use", path.display()))
                .hint("it is mounted, or part of a volume group, array or swap: release it first")
                .source(error);
        }
        Error::open(path, error)
    })?;
    let (medium, size_bytes) = examine(&file, path)?;
    Ok((file, medium, size_bytes))
}

/// Medium and size of an open file.
fn examine(mut file: &File, path: &Path) -> Result<(Medium, u64)> {
    let failed = |e| Error::io(format!("cannot examine {}", path.display()), e);
    let kind = file.metadata().map_err(failed)?.file_type();
    let medium = match kind {
        kind if kind.is_file() => Medium::File,
        kind if kind.is_block_device() => Medium::Device,
        _ => {
            let message = format!("{} is neither a file nor a block device", path.display());
            return Err(Error::new(Kind::Unsupported, message)
                .hint("name a regular file or a block device"));
        }
    };
    // The metadata of a device have no length; its end does.
    let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    Ok((medium, size_bytes))
}

/// Runs `work`, which may wait for a disk, on a blocking thread.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Error::new(Kind::Internal, "an input/output thread died").source(e))?
}

/// Whether `error` says that this kind of call does not exist here, so that another may do.
fn is_unsupported(error: Errno) -> bool {
    [Errno::OPNOTSUPP, Errno::NOSYS, Errno::NODEV, Errno::INVAL, Errno::NOTTY].contains(&error)
}

/// Where data or a hole begins, at the offset that `to` names or behind it; `None` behind the last.
/// A file system that does not know holes has data everywhere. The file offset this moves is used
/// by nobody.
pub(in crate::block) fn seek(
    file: &File,
    to: rustix::fs::SeekFrom,
) -> rustix::io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Err(Errno::NXIO) => Ok(None),
        Err(error) if is_unsupported(error) => Ok(match to {
            rustix::fs::SeekFrom::Data(at) => Some(at),
            _ => None,
        }),
        found => found.map(Some),
    }
}

/// Makes the name `path` durable: it is when its directory is. Blocks.
pub(in crate::block) fn sync_directory_of(path: &Path) -> Result<()> {
    let failed = |e| Error::io(format!("cannot sync the directory of {}", path.display()), e);
    File::open(parent(path)).and_then(|directory| sync_directory(&directory)).map_err(failed)
}

/// Makes the names in a directory durable. Some file systems cannot sync directories and say EINVAL
/// or ENOTSUP (SMB without POSIX extensions, some FUSE ones): there a name is as durable as the
/// server makes it. Blocks.
pub(crate) fn sync_directory(directory: &File) -> io::Result<()> {
    match rustix::fs::fsync(directory) {
        Ok(()) | Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The directory of a name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// An error of the system with what was done to which file.
fn failed(what: impl std::fmt::Display, name: &str, error: impl Into<io::Error>) -> Error {
    let error = error.into();
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return Error::new(Kind::Io, format!("{name} ended at {what}: it shrank while in use"));
    }
    Error::io(format!("cannot {what} of {name}"), error)
}
