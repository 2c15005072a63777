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
use crate::error::Result;

/// How long write-back is waited for. A slow disk under much scratch takes minutes; one that takes longer
/// hangs, and so would QEMU in its own flush, with its guest.
const WRITE_BACK: Duration = Duration::from_secs(600);

/// When the person is told what is waited for.
const TELL: Duration = Duration::from_secs(10);

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
    /// left to QEMU: it is gone, or nobody's but QEMU's. Fails with [`Kind::Timeout`] where the disk hangs:
    /// QEMU had better not let go of them now. Cancel-safe.
    ///
    /// [`Kind::Timeout`]: crate::error::Kind::Timeout
    pub(super) async fn written(directory: &Path, files: Vec<PathBuf>) -> Result<Self> {
        let written = aside(directory, WRITE_BACK, move || {
            let files: Vec<File> = files.iter().filter_map(|path| open_file(path)).collect();
            files.iter().for_each(write_back);
            files
        });
        let tell = async {
            tokio::time::sleep(TELL).await;
            let directory = directory.display();
            tracing::warn!("scratch in {directory} is being written back, before its job is ended");
            std::future::pending().await
        };
        let files = tokio::select! {
            files = written => files?,
            never = tell => never,
        };
        Ok(Self { directory: directory.to_owned(), files })
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    /// A pipe would be waited for, and what a link leads to is not QEMU's.
    #[tokio::test]
    async fn only_files_are_held() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("file"), "scratch").expect("own directory");
        symlink(at("file"), at("link")).expect("own directory");
        mknodat(CWD, at("pipe"), FileType::Fifo, Mode::RWXU, 0).expect("own directory");
        let paths = ["file", "link", "pipe", "gone", "."].map(at);
        let held = Held::written(directory.path(), paths.into()).await.expect("it answers");
        assert_eq!(held.files.len(), 1);
        assert_eq!(held.files[0].metadata().expect("open").len(), 7);
        held.let_go().await;
    }
}
