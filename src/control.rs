//! The handle a running job shares with its face: a request to stop, and counters to show.
//!
//! The job writes plain atomic counters; a face samples them whenever it likes to draw a bar or
//! print a line. Nothing here can block or slow the data path, and there is no channel to fill.
//! Rare happenings a person should see (a disk read in full and why, a warning) are [`Notice`]s,
//! kept in a bounded list.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};

/// Most notices a job keeps; further ones are counted only.
const NOTICES_MAX: usize = 1000;

/// Cancel and progress of one job. Clones share the same state.
#[derive(Clone, Debug, Default)]
pub struct Control {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    cancel: CancellationToken,
    phase: Mutex<String>,
    disks: Mutex<Vec<Arc<DiskProgress>>>,
    notices: Mutex<Notices>,
}

#[derive(Debug, Default)]
struct Notices {
    list: Vec<Notice>,
    dropped: usize,
}

/// Something a person should know although the job goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// How loudly to say it.
    pub level: NoticeLevel,
    /// One sentence that names the object.
    pub text: String,
}

/// Weight of a [`Notice`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoticeLevel {
    /// Good to know.
    Info,
    /// Something is weaker than asked for.
    Warning,
}

impl Control {
    /// A fresh handle: not cancelled, nothing counted.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the job to stop; it aborts at its next await and leaves nothing behind.
    pub fn cancel(&self) {
        self.shared.cancel.cancel();
    }

    /// Whether a stop was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancel.is_cancelled()
    }

    /// Resolves once a stop is asked for. Cancel-safe.
    pub async fn cancelled(&self) {
        self.shared.cancel.cancelled().await;
    }

    /// `Err(Cancelled)` once a stop was asked for.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() {
            return Err(Error::new(Kind::Cancelled, "stopped on request"));
        }
        Ok(())
    }

    /// Runs `work` until it ends or a stop is asked for; then `work` is dropped, so it must be
    /// cancel-safe.
    pub async fn run<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            biased;
            () = self.cancelled() => Err(Error::new(Kind::Cancelled, "stopped on request")),
            result = work => result,
        }
    }

    /// Names what the job does now ("freezing", "copying vda").
    pub fn set_phase(&self, phase: impl Into<String>) {
        let phase = phase.into();
        tracing::debug!(phase, "phase");
        *lock(&self.shared.phase) = phase;
    }

    /// What the job does now.
    pub fn phase(&self) -> String {
        lock(&self.shared.phase).clone()
    }

    /// Adds a disk to the progress shown; `total_bytes` is its virtual size.
    pub fn add_disk(&self, name: &str, total_bytes: u64) -> Arc<DiskProgress> {
        let disk = Arc::new(DiskProgress {
            name: name.to_owned(),
            total_bytes,
            done_bytes: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
        });
        lock(&self.shared.disks).push(Arc::clone(&disk));
        disk
    }

    /// The disks added so far.
    pub fn disks(&self) -> Vec<Arc<DiskProgress>> {
        lock(&self.shared.disks).clone()
    }

    /// Tells the person who watches.
    pub fn notice(&self, level: NoticeLevel, text: impl Into<String>) {
        let mut notices = lock(&self.shared.notices);
        if notices.list.len() < NOTICES_MAX {
            notices.list.push(Notice { level, text: text.into() });
        } else {
            notices.dropped += 1;
        }
    }

    /// The notices from the `from`th on, for a face that prints each once.
    pub fn notices_from(&self, from: usize) -> Vec<Notice> {
        lock(&self.shared.notices).list.get(from..).unwrap_or_default().to_vec()
    }
}

/// A panic while one of these short sections is held leaves the plain data in it valid.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counters of one disk; every field only grows.
#[derive(Debug)]
pub struct DiskProgress {
    /// The disk's name in the VM (`vda`).
    pub name: String,
    /// Virtual size.
    pub total_bytes: u64,
    done_bytes: AtomicU64,
    read_bytes: AtomicU64,
}

impl DiskProgress {
    /// Counts a range as dealt with; `read_bytes` of it came from the source.
    pub fn add(&self, done_bytes: u64, read_bytes: u64) {
        self.done_bytes.fetch_add(done_bytes, Ordering::Relaxed);
        self.read_bytes.fetch_add(read_bytes, Ordering::Relaxed);
    }

    /// Bytes of the disk dealt with, holes and unchanged ranges included.
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.load(Ordering::Relaxed)
    }

    /// Bytes read from the source.
    pub fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }
}
