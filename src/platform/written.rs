//! Scratch files as QEMU had better find them when it lets go of them: written back, and held.
//!
//! QEMU flushes a node before it closes it (`bdrv_close`), and frees what was unlinked meanwhile, in the thread
//! that does the guest's requests: the guest stands still for as long as the host's disk takes for all that
//! went to scratch. With a guest that had overwritten 80 MiB these were 10 to 14 ms and 6 to 7 ms (QEMU 10.0,
//! ext4); with many GiB they are as many seconds. So we write it back while the guest runs, and hold the files,
//! which are freed when we let go of them.
//!
//! A disk that hangs holds up `sync`, a process of its own ([`Apart`]): one of ours for each directory that
//! nobody waits for, however often it is tried.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, fdatasync, open};
use tokio::process::Command;
use tokio::time::Instant;

use super::apart::Apart;
use super::space::{ANSWER, POLL, aside, check_aside};
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
    files: Arc<Vec<File>>,
}

impl Held {
    /// Writes `files` of `directory`, which has answered, back, and holds them. One that cannot be opened is
    /// left to QEMU: it is gone, or nobody's but QEMU's. Fails with [`Kind::Timeout`] where the disk hangs:
    /// QEMU had better not let go of them now. Cancel-safe; what hangs goes on by itself.
    pub(super) async fn written(directory: &Path, files: Vec<PathBuf>) -> Result<Self> {
        Self::written_within(WRITE_BACK, directory, files).await
    }

    /// The same, given up where `directory` runs short of room meanwhile: the guest's next write may fail, and
    /// nobody else watches what a killed run left. None then. Cancel-safe.
    pub(super) async fn written_with_room(
        directory: &Path,
        files: Vec<PathBuf>,
    ) -> Result<Option<Self>> {
        // Before anything holds the files: who ends the job has their room at once.
        if is_low(check_aside(directory, ANSWER).await) {
            return Ok(None);
        }
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

    async fn written_within(
        limit: Duration,
        directory: &Path,
        files: Vec<PathBuf>,
    ) -> Result<Self> {
        let until = Instant::now() + limit;
        let written = async {
            let files = aside(directory, limit, move || {
                files.iter().filter_map(|path| open_file(path)).collect()
            });
            let held = Self { directory: directory.to_owned(), files: Arc::new(files.await?) };
            held.write_back(until).await;
            Ok(held)
        };
        let tell = async {
            tokio::time::sleep(TELL).await;
            let directory = directory.display();
            tracing::warn!("scratch in {directory} is being written back, before its job is ended");
            std::future::pending().await
        };
        let held = tokio::select! {
            held = written => held,
            () = tokio::time::sleep_until(until) => Err(silent(directory, limit)),
            never = tell => never,
        };
        held.map_err(|error: Error| match error.kind() {
            Kind::Timeout => silent(directory, limit),
            _ => error,
        })
    }

    /// All of them once; again as long as that is worth it, and would not be what takes too long.
    async fn write_back(&self, until: Instant) {
        // 'sync' of nothing is one of everything.
        let flushes = if self.files.is_empty() { 0 } else { FLUSHES_MAX };
        for _ in 0..flushes {
            let begun = Instant::now();
            self.flush().await;
            let took = begun.elapsed();
            if took <= SHORT || Instant::now() + 2 * took > until {
                return;
            }
        }
    }

    async fn flush(&self) {
        // One that hangs is waited for, and no other begun.
        while let Some(mut left) = Flush::left(&self.directory) {
            left.over().await;
        }
        let files = Arc::clone(&self.files);
        Flush::begin(&self.directory, &files).ended(move || sync(&files)).await;
    }
}

/// A flush of files of a directory.
struct Flush<'a> {
    directory: &'a Path,
    /// Until it is dropped.
    apart: Option<Apart>,
}

/// Those that nobody waits for any more and that had not ended then, by directory.
static LEFT: Mutex<Vec<(PathBuf, Apart)>> = Mutex::new(Vec::new());

impl<'a> Flush<'a> {
    fn begin(directory: &'a Path, files: &Arc<Vec<File>>) -> Self {
        let mut command = Command::new("sync");
        // Not by name: QEMU's user owns them.
        let open = |file: &File| format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
        command.arg("-d").args(files.iter().map(open));
        let files = Arc::clone(files);
        Self { directory, apart: Some(Apart::begin(command, move || sync(&files))) }
    }

    /// One that nobody waits for.
    fn left(directory: &'a Path) -> Option<Self> {
        let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
        let at = left.iter().position(|(of, _)| of == directory)?;
        Some(Self { directory, apart: Some(left.swap_remove(at).1) })
    }

    /// Waits for its end, whatever it did. Cancel-safe.
    async fn over(&mut self) {
        let Some(apart) = &mut self.apart else { return };
        let ended = apart.over().await;
        tracing::debug!(?ended, "an earlier flush of scratch");
    }

    /// Waits for its end. QEMU meets an error of the disk as well, where it counts for nothing: scratch is
    /// thrown away. Cancel-safe.
    async fn ended(&mut self, instead: impl FnOnce() + Send + 'static) {
        let Some(apart) = &mut self.apart else { return };
        if let Err(error) = apart.end(instead).await {
            tracing::warn!(%error, "scratch is not written back before its job ends");
        }
    }
}

impl Drop for Flush<'_> {
    /// One that has not ended may never do.
    fn drop(&mut self) {
        let Some(mut apart) = self.apart.take() else { return };
        if !apart.is_over() {
            apart.kill();
            let mut left = LEFT.lock().unwrap_or_else(PoisonError::into_inner);
            left.retain_mut(|(_, apart)| !apart.is_over());
            left.push((self.directory.to_owned(), apart));
        }
    }
}

/// For a thread.
fn sync(files: &[File]) {
    for file in files {
        if let Err(error) = fdatasync(file) {
            tracing::debug!(%error, "a scratch file is not written back");
        }
    }
}

/// Waits until scratch is short of room, as `ask` tells. Cancel-safe.
async fn until_low<Asked: Future<Output = Result<()>>>(ask: impl Fn() -> Asked) {
    while !is_low(ask().await) {
        tokio::time::sleep(POLL).await;
    }
}

/// Whether scratch was short of room when it was asked. One that does not tell hangs: no reason to end what
/// QEMU would wait for.
fn is_low(asked: Result<()>) -> bool {
    match asked {
        Err(error) if error.kind() == Kind::NoSpace => {
            tracing::warn!(%error, "scratch is not written back before its job ends");
            true
        }
        _ => false,
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

    /// Each attempt left another thread that hung.
    #[tokio::test]
    async fn a_flush_that_hangs_is_waited_for_by_the_next_one() {
        let directory = tempfile::tempdir().expect("a directory");
        let directory = directory.path();
        let file = directory.join("file");
        std::fs::write(&file, "scratch").expect("own directory");
        let written = |limit| Held::written_within(limit, directory, vec![file.clone()]);
        let left = || {
            let left = LEFT.lock().expect("whole");
            left.iter().filter(|(of, _)| of == directory).count()
        };
        let (ends, hangs) = tokio::sync::oneshot::channel();
        let hangs = tokio::spawn(async { hangs.await.expect("it ends") });
        drop(Flush { directory, apart: Some(Apart::Thread(hangs)) });
        for _ in 0..2 {
            let error = written(Duration::from_millis(100)).await.err().expect("it hangs");
            assert_eq!((error.kind(), left()), (Kind::Timeout, 1), "{error:?}");
        }
        ends.send(()).expect("it is waited for");
        written(WRITE_BACK).await.expect("it is written").let_go().await;
        assert_eq!(left(), 0);
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
