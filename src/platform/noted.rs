//! Files of this machine that killed runs noted: removed, or only found, without waiting for a file
//! system that hangs. For the recovery of every platform, and of VMs that are gone.

use std::path::Path;
use std::time::Duration;

use super::space::{ANSWER, REMOVE, aside, plainly};
use crate::error::Result;
use crate::journal::{Journal, Mode, Phase, Recovery};
use crate::vm::PointId;

/// Removes what earlier runs noted for `phases`; the points of which something stays. Fails with
/// [`Kind::Timeout`](crate::error::Kind::Timeout) where a file system does not answer, and leaves the
/// rest for later: `recovery` has what was done until then; what it finds when it answers yet is not
/// told.
pub(crate) async fn remove_noted(
    journal: &Journal,
    phases: &[Phase],
    recovery: &mut Recovery,
) -> Result<Vec<PointId>> {
    let mode = recovery.mode();
    let mut stay = Vec::new();
    for (directory, mut files) in journal.noted_files(phases) {
        let work = move || {
            let mut found = Recovery::new(mode);
            files.retain(|file| file.remove(&mut found));
            (files, found)
        };
        let (stays, found) = aside(&directory, limit(mode), work).await?;
        recovery.add(found);
        stay.extend(stays.iter().map(|file| file.point));
    }
    Ok(stay)
}

/// Undoes something in `directory`, which has answered, or looks at it. Fails with
/// [`Kind::Timeout`](crate::error::Kind::Timeout) where its file system does not answer any more, and
/// leaves the work to itself then.
pub(crate) async fn work_in<T: Send + 'static>(
    directory: &Path,
    mode: Mode,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    aside(directory, limit(mode), work).await.map_err(|error| plainly(directory, error))
}

fn limit(mode: Mode) -> Duration {
    match mode {
        Mode::Undo => REMOVE,
        Mode::Look => ANSWER,
    }
}
