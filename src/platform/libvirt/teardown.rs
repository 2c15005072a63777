//! The end of a job of ours: not as long as its scratch hangs.
//!
//! QEMU ends a job when the requests in flight have ended, and does nothing else until then: where
//! they hang in scratch its whole guest stands still with them, and no monitor command returns (seen on
//! QEMU 10.0). As long as the job is left alone only those writes of the guest hang that go to scratch. So
//! scratch is asked first; where it does not answer for too long the job stays, and the person is told
//! where the guest's writes go and what ends it.
//!
//! Not asked is a scratch that has just told that it is almost full ([`super::watch`]): the guest's next
//! write may fail. Scratch on another host cannot be asked. Nor is it asked when a job that was waited for
//! too long begins after all and is ended in the same call ([`super::open`]): QEMU has just made the
//! scratch files and begun to write to them, so it has answered.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use super::connection::{DomainHandle, Host};
use super::job;
use crate::error::{Error, Kind, Result};
use crate::platform::space::{BEFORE, Question, aside};
use crate::platform::written::Held;
use crate::vm::PointId;

/// How long scratch that does not answer is waited for, by the watch before the backup is given up and
/// at the end of a run: write-back holds it up for some ten seconds on a busy host, and a job that stays
/// is watched by nobody.
pub(super) const STALL: Duration = Duration::from_secs(60);

/// The directory that a job's scratch is in.
#[derive(Clone, Debug)]
pub(super) struct Scratch {
    directory: PathBuf,
    /// None where it is not on this machine.
    question: Option<Question>,
}

impl Scratch {
    /// Asks nobody yet.
    pub(super) fn new(host: &Host, directory: PathBuf) -> Self {
        let question = host.is_local().then(|| Question::behind(directory.clone()));
        Self { directory, question }
    }

    /// Where it is, if that is on this machine.
    pub(super) fn local(&self) -> Option<&Path> {
        self.question.is_some().then_some(&*self.directory)
    }

    /// Fails with [`Kind::Timeout`] if it takes no writes now. Cancel-safe.
    pub(super) async fn answers(&self) -> Result<()> {
        match &self.question {
            Some(question) => question.answers().await,
            None => Ok(()),
        }
    }

    /// Waits until it takes writes, however long that is. Cancel-safe.
    pub(super) async fn until_it_answers(&self) {
        while let Err(error) = self.answers().await {
            tracing::warn!(%error, "the backup is given up and its job cannot be ended yet");
        }
    }

    /// Ends the job of a point when scratch takes writes, and its `files` are on disk; [`Kind::Timeout`], with
    /// the job as it was, if it takes none within `limit`, or is not written back ([`Held::written`]). It is
    /// asked once at least. That may take minutes: the handle is for what follows.
    pub(super) async fn end_job(
        &self,
        (domain, point): (&DomainHandle, PointId),
        files: Vec<PathBuf>,
        limit: Duration,
    ) -> Result<DomainHandle> {
        let held = self.written((domain, point), files, limit).await?;
        Self::end_written((domain, point), held).await
    }

    /// Waits until scratch answers and is on disk. It is held where the job is there. The first half of
    /// [`Scratch::end_job`], and cancel-safe.
    pub(super) async fn written(
        &self,
        (domain, point): (&DomainHandle, PointId),
        files: Vec<PathBuf>,
        limit: Duration,
    ) -> Result<Option<Held>> {
        let until = Instant::now() + limit;
        while let Err(hangs) = self.answers().await {
            // The watch ends it at once where scratch is full.
            if job::active(domain).await?.is_none_or(|job| job.point != Some(point)) {
                return Ok(None);
            }
            if Instant::now() >= until {
                return Err(hangs);
            }
            tracing::warn!(error = %hangs, "the backup job cannot be ended yet; tried again");
        }
        // Not known, it may be ours.
        let ours = job::active(domain).await?.is_some_and(|job| job.point == Some(point));
        match self.local().filter(|_| ours) {
            // A guest that stands still already runs on when the job has ended.
            Some(directory) if !job::stands_still(domain).await? => {
                Held::written_with_room(directory, files).await
            }
            _ => Ok(None),
        }
    }

    /// Ends the job, and lets go of its scratch.
    pub(super) async fn end_written(
        (domain, point): (&DomainHandle, PointId),
        held: Option<Held>,
    ) -> Result<DomainHandle> {
        let end = async {
            let domain = domain.revived().await?;
            job::end(&domain, point).await?;
            Ok(domain)
        };
        let ended = end.await;
        if let Some(held) = held {
            held.let_go().await;
        }
        ended
    }

    /// What it means that the job was not ended because of `error`.
    pub(super) async fn stays(
        &self,
        (domain, point): (&DomainHandle, PointId),
        error: Error,
    ) -> Error {
        match job::active(domain).await {
            Ok(job) if job.as_ref().and_then(|job| job.point) != Some(point) => return error,
            Err(gone) if gone.kind() == Kind::NotFound => return error,
            // Taken to be there where libvirt does not tell.
            _ => {}
        }
        let what = format!(
            "the backup job of domain '{}' was not ended: the guest's writes still go to scratch \
             directory {}, of which nobody watches the room any more",
            domain.name,
            self.directory.display()
        );
        error.context(what).hint(
            "run 'vmbackup recover' as soon as the directory can be written to and libvirt answers",
        )
    }
}

/// Removes files that libvirt or QEMU normally removes itself; their names carry a random point id.
pub(super) async fn remove_left(paths: Vec<PathBuf>) {
    let Some(directory) = paths.first().and_then(|path| path.parent()).map(Path::to_owned) else {
        return;
    };
    let removed = aside(&directory, BEFORE, move || paths.iter().for_each(|path| remove(path)));
    if let Err(error) = removed.await {
        tracing::warn!(?error, "files of the job remain");
    }
}

fn remove(path: &Path) {
    match std::fs::remove_file(path) {
        Ok(()) => tracing::debug!(path = %path.display(), "removed what the job left"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(path = %path.display(), %error, "a file of the job remains"),
    }
}
