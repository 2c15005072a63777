//! Scratch files as QEMU had better find them when it lets go of them: written back, and held.
//!
//! QEMU flushes a node before it closes it (`bdrv_close`), and frees what was unlinked meanwhile, in the thread
//! that does the guest's requests: the guest stands still for as long as the host's disk takes for all that
//! went to scratch. With a guest that had overwritten 80 MiB these were 10 to 14 ms and 6 to 7 ms (QEMU 10.0,
//! ext4); with many GiB they are as many seconds. So we write it back while the guest runs, and hold the files,
//! which are freed when we let go of them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, fdatasync, open};

use super::space::aside;

/// How long write-back is waited for: what it has not done by then, QEMU waits for.
const WRITE_BACK: Duration = Duration::from_secs(60);

/// A flush that took no longer left nothing behind that would be worth another.
const SHORT: Duration = Duration::from_millis(50);

/// Flushes of a file that the guest goes on to fill.
const FLUSHES_MAX: usize = 3;

/// Open files, by the directory they are in.
#[must_use = "QEMU frees what nobody holds"]
pub(super) struct Held {
    directory: PathBuf,
    files: Vec<File>,
}

impl Held {
    /// Writes `files` of `directory`, which has answered, back, and holds them. One that cannot be opened is
    /// left to QEMU: it is gone, or nobody's but QEMU's.
    pub(super) async fn written(directory: &Path, files: Vec<PathBuf>) -> Self {
        let written = aside(directory, WRITE_BACK, move || {
            let files: Vec<File> = files.iter().filter_map(|path| open_file(path)).collect();
            files.iter().for_each(write_back);
            files
        });
        let files = written.await.unwrap_or_else(|error| {
            tracing::warn!(%error, "scratch is not written back; the guest may wait for it");
            Vec::new()
        });
        Self { directory: directory.to_owned(), files }
    }

    /// Lets go of the files: where they were unlinked, this frees them.
    pub(super) async fn let_go(self) {
        let files = self.files;
        if let Err(error) = aside(&self.directory, WRITE_BACK, move || drop(files)).await {
            tracing::warn!(%error, "scratch is still being freed");
        }
    }
}

/// QEMU's user owns the file: it may be anything by now, and nothing but a file is waited for.
fn open_file(path: &Path) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = open(path, flags, Mode::empty()).map_err(std::io::Error::from);
    let file = opened.and_then(|file| {
        let file = File::from(file);
        Ok(file.metadata()?.is_file().then_some(file))
    });
    file.unwrap_or_else(|error| {
        tracing::debug!(path = %path.display(), %error, "a scratch file is not held");
        None
    })
}

/// QEMU meets an error of the disk as well, where it counts for nothing: scratch is thrown away.
fn write_back(file: &File) {
    for _ in 0..FLUSHES_MAX {
        let begun = Instant::now();
        if let Err(error) = fdatasync(file) {
            tracing::debug!(%error, "a scratch file is not written back");
            return;
        }
        if begun.elapsed() <= SHORT {
            return;
        }
    }
}
