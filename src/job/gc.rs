//! Freeing what no point needs any more; the repository does the work, backups may run beside it.

use serde::Serialize;

use super::Repository;
use crate::control::Control;
use crate::error::Result;
use crate::repo::CollectOptions;

/// What was freed.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Points that are there; nothing they need was touched.
    pub points: usize,
    /// Forgotten points that are gone for good now.
    pub forgotten: usize,
    /// Bytes freed.
    pub freed_bytes: u64,
    /// Bytes moved out of packs that were mostly garbage.
    pub repacked_bytes: u64,
    /// Bytes that a later collection frees, once the runs in `waiting_for` are over.
    pub waiting_bytes: u64,
    /// Runs that may still need what waits.
    pub waiting_for: Vec<String>,
}

/// Collects garbage. When stopped, the next collection goes on from there.
pub async fn run(repository: &Repository, control: &Control) -> Result<Report> {
    control.set_phase("collecting garbage");
    let done = repository.collect(CollectOptions::default(), control).await?;
    Ok(Report {
        points: done.points,
        forgotten: done.forgotten,
        freed_bytes: done.bytes_freed,
        repacked_bytes: done.bytes_repacked,
        waiting_bytes: done.bytes_waiting,
        waiting_for: done.waiting_for,
    })
}
