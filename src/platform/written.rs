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

use super::space::{POLL, aside, check_aside};
use crate::error::{Error, Kind, Result};

/// How long write-back is waited for. A slow disk under much scratch takes minutes; one that takes longer
/// hangs, and so would QEMU in its own flush, with its guest.
const WRITE_BACK: Duration = Duration::from_secs(600);

/// When the person is told what is waited for.
const TELL: Duration = Duration::from_secs(10);

/// Flushes that took no longer left nothing behind that would be worth others.
const SHORT: Duration = Duration::from_millis(50);

/// Flushes of files that the guest goes on to fill.
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
    /// QEMU had better not let go of them now. Cancel-safe; what hangs goes on in a thread of its own.
    pub(super) async fn written(directory: &Path, files: Vec<PathBuf>) -> Result<Self> {
        Self::written_within(WRITE_BACK, directory, files).await
    }

    async fn written_within(
        limit: Duration,
        directory: &Path,
        files: Vec<PathBuf>,
    ) -> Result<Self> {
        let until = Instant::now() + limit;
        let written = aside(directory, limit, move || {
            let files: Vec<File> = files.iter().filter_map(|path| open_file(path)).collect();
            write_back(&files, until);
            files
        });
        let tell = async {
            tokio::time::sleep(TELL).await;
            let directory = directory.display();
            tracing::warn!("scratch in {directory} is being written back, before its job is ended");
            std::future::pending().await
        };
        let files = tokio::select! {
            files = written => files,
            never = tell => never,
        };
        let files = files.map_err(|error| match error.kind() {
            Kind::Timeout => silent(directory, limit),
            _ => error,
        })?;
        Ok(Self { directory: directory.to_owned(), files })
    }

    /// The same, given up where `directory` runs short of room meanwhile: the guest's next write may fail, and
    /// nobody else watches what a killed run left. None then. Cancel-safe.
    pub(super) async fn written_with_room(
        directory: &Path,
        files: Vec<PathBuf>,
    ) -> Result<Option<Self>> {
        tokio::select! {
            held = Self::written(directory, files) => held.map(Some),
            // One question at a time, however long it hangs: a thread does.
            () = until_low(|| check_aside(directory, WRITE_BACK)) => Ok(None),
        }
    }

    /// Lets go of the files: where they were unlinked, this frees them.
    pub(super) async fn let_go(self) {
        let files = self.files;
        if let Err(error) = aside(&self.directory, WRITE_BACK, move || drop(files)).await {
            tracing::warn!(%error, "scratch is still being freed");
        }
    }
}

/// Waits until scratch is short of room, as `ask` tells. One that does not tell hangs: no reason to end what
/// QEMU would wait for. Cancel-safe.
async fn until_low<Asked: Future<Output = Result<()>>>(ask: impl Fn() -> Asked) {
    loop {
        match ask().await {
            Err(error) if error.kind() == Kind::NoSpace => {
                return tracing::warn!(%error, "scratch is not written back before its job ends");
            }
            _ => tokio::time::sleep(POLL).await,
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

/// The error of a directory whose files are not on disk in time.
fn silent(directory: &Path, limit: Duration) -> Error {
    let (directory, seconds) = (directory.display(), limit.as_secs());
    let what = format!(
        "scratch in {directory} is not on its disk after {seconds} s: the disk hangs, or is too slow"
    );
    Error::new(Kind::Timeout, what)
        .hint("QEMU is left alone until it is; then run 'vmbackup recover' or the next backup")
}

/// All of them once; again as long as that is worth it, and would not be what takes too long.
fn write_back(files: &[File], until: Instant) {
    for _ in 0..FLUSHES_MAX {
        let begun = Instant::now();
        files.iter().for_each(flush);
        let took = begun.elapsed();
        if took <= SHORT || Instant::now() + 2 * took > until {
            return;
        }
    }
}

/// QEMU meets an error of the disk as well, where it counts for nothing: scratch is thrown away.
fn flush(file: &File) {
    if let Err(error) = fdatasync(file) {
        tracing::debug!(%error, "a scratch file is not written back");
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
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

    #[tokio::test(start_paused = true)]
    async fn scratch_that_hangs_or_is_gone_is_not_short_of_room() {
        let asked = Cell::new(0);
        until_low(|| {
            asked.set(asked.get() + 1);
            let kind = [None, Some(Kind::Timeout), Some(Kind::NotFound), Some(Kind::NoSpace)];
            let kind = kind[asked.get() - 1];
            async move { kind.map_or(Ok(()), |kind| Err(Error::new(kind, "scratch"))) }
        })
        .await;
        assert_eq!(asked.get(), 4);
    }

    #[tokio::test]
    async fn what_is_not_on_disk_in_time_is_no_success() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        std::fs::write(&file, vec![1; 16 << 20]).expect("own directory");
        let held = Held::written_within(Duration::ZERO, directory.path(), vec![file]).await;
        let error = held.err().expect("too late");
        assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
        assert!(error.to_string().contains(directory.path().to_str().expect("text")), "{error}");
        assert!(error.hint_text().is_some_and(|hint| hint.contains("'vmbackup recover'")));
    }
}
