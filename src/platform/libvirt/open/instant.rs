//! The instant of a running domain: it is written down, the guest freezes, the job begins and is
//! watched, the guest thaws, on every path. A thaw may take a minute, in which the guest writes.
//!
//! What a job that did not begin leaves is undone by whoever opens the snapshot.

use std::time::Duration;

use virt::domain::Domain;
use virt::error::ErrorNumber;

use super::{Begun, Opening, TAKE_FULL};
use crate::clock::Timestamp;
use crate::control::{Control, NoticeLevel};
use crate::error::{Error, Kind, Result, with_causes};
use crate::journal::{Entry, Phase};
use crate::platform::libvirt::checkpoint::checkpoint_xml;
use crate::platform::libvirt::error::code;
use crate::platform::libvirt::ffi::{self, Events, VirtResult};
use crate::platform::libvirt::job::{self, JobDisk, Server};
use crate::platform::libvirt::names::scratch_path;
use crate::platform::libvirt::quiesce::{self, Frozen, Wish};
use crate::platform::libvirt::reconcile::BEGUN;
use crate::platform::libvirt::scratch;
use crate::platform::libvirt::watch::{Watch, Watched};
use crate::platform::{BackupMode, Quiesce};
use crate::vm::{FullReason, Quiescence};

/// Longest wait for a job to begin: 40 ms measured on an idle machine; libvirt itself waits 30 s
/// for the domain's job lock.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(60);

/// The point in time.
pub(super) struct Instant {
    pub(super) taken: Timestamp,
    pub(super) quiescence: Quiescence,
    pub(super) job_disks: Vec<JobDisk>,
}

impl Opening {
    /// Freezes, begins the job, thaws. Thaws on every path.
    pub(super) async fn take_instant(
        &mut self,
        (server, events): (&Server, Events),
        control: &Control,
    ) -> Result<Instant> {
        let problem = quiesce::agent_problem(&self.survey.root, self.survey.paused);
        // Before the freeze: the guest does not wait for our disk, and the next run thaws and ends
        // the job whenever we die from here on.
        let asked = self.request.quiesce != Quiesce::Never && problem.is_none();
        self.note_instant(server, asked)?;
        let wish = Wish {
            quiesce: self.request.quiesce,
            budget: self.request.freeze_budget,
            guardian: self.request.guardian.as_deref(),
        };
        let frost = std::mem::take(&mut self.frost);
        let (frozen, frost) = quiesce::freeze(&self.domain, &wish, problem, frost).await;
        self.frost = frost;
        let frozen = frozen?;
        if matches!(frozen, Frozen::Yes(_)) {
            self.lock.journal.after(Phase::Freeze);
        }
        if let Frozen::No(Some(reason)) = &frozen {
            control.notice(NoticeLevel::Warning, format!("crash consistent only: {reason}"));
        }
        let begun = self.begin(server, control).await;
        if let Ok((_, job_disks)) = &begun {
            self.watch_job(job_disks, events);
        }
        let (quiescence, frost) = quiesce::thaw(frozen, std::mem::take(&mut self.frost)).await;
        self.frost = frost;
        let frozen = self.frost.is_there().await;
        if frozen {
            let name = &self.domain.name;
            let text = format!("the guest of domain '{name}' may be frozen; thawing it goes on");
            control.notice(NoticeLevel::Warning, text);
        }
        let thawed: &[Phase] = if frozen { &[] } else { &[Phase::Freeze] };
        let begun = begun?;
        // One job at a time: those asked for before have failed, or this one would have.
        let answered = Entry { phase: Phase::Job, objects: vec![BEGUN.into()] };
        let over = [&[Phase::Job, Phase::Scratch, Phase::Socket][..], thawed].concat();
        self.lock.journal.undone_earlier(&over)?;
        self.lock.journal.amend(thawed, [answered])?;
        let (taken, job_disks) = begun;
        Ok(Instant { taken, quiescence, job_disks })
    }

    fn watch_job(&mut self, disks: &[JobDisk], events: Events) {
        let (domain, point) = (self.domain.clone(), self.request.point);
        let (scratch, disks) = (self.scratch.clone(), disks.to_vec());
        self.watch = Some(Watch::start(Watched { domain, point, scratch, disks }, events));
    }

    /// Writes down all that the instant takes.
    fn note_instant(&mut self, server: &Server, freezes: bool) -> Result<()> {
        let scratch = self.job_disks().into_iter().map(|disk| disk.scratch);
        let mut entries = vec![Entry::files(Phase::Scratch, scratch), Entry::of(Phase::Job)];
        if let Server::Unix(socket) = server {
            entries.push(Entry::files(Phase::Socket, [socket]));
        }
        if freezes {
            entries.push(Entry::of(Phase::Freeze));
        }
        self.lock.journal.note(entries)?;
        // libvirt does all the others in one call: the moment before it is the job's.
        if freezes {
            self.lock.journal.before(Phase::Freeze);
        }
        Ok(())
    }

    /// Begins the job; once more with every disk in full when a bitmap breaks in the last moment.
    async fn begin(
        &mut self,
        server: &Server,
        control: &Control,
    ) -> Result<(Timestamp, Vec<JobDisk>)> {
        control.check()?;
        let disks = self.job_disks();
        let what = "begin a backup of";
        self.begun = Begun::Asked;
        self.lock.journal.before(Phase::Job);
        let taken = self.request.clock.now();
        let error = match self.try_begin(server, &disks).await? {
            Ok(()) => {
                self.lock.journal.after(Phase::Job);
                return Ok((taken, disks));
            }
            Err(error) => error,
        };
        let retry = code(&error) == Some(ErrorNumber::CheckpointInconsistent)
            && self.request.mode != BackupMode::Incremental;
        if !retry {
            return Err(self.explain(self.domain.wrap(what, error)));
        }
        for read in self.bases.disks.values_mut().filter(|read| read.is_ok()) {
            *read = Err(FullReason::BitmapInconsistent);
        }
        let disks = self.job_disks();
        let taken = self.request.clock.now();
        let again = self.try_begin(server, &disks).await?;
        again.map_err(|error| self.explain(self.domain.wrap(what, error)))?;
        Ok((taken, disks))
    }

    fn job_disks(&self) -> Vec<JobDisk> {
        let disks = self.survey.disks.iter();
        disks
            .map(|disk| {
                let name = &disk.disk.name;
                let base = self.bases.read(name, self.request.mode).ok();
                JobDisk {
                    name: name.clone(),
                    base: base.map(|point| self.chain.of_point(point)),
                    scratch: scratch_path(&self.places.scratch, self.request.point, name),
                }
            })
            .collect()
    }

    async fn try_begin(&mut self, server: &Server, disks: &[JobDisk]) -> Result<VirtResult<()>> {
        let backup = job::backup_xml(server, disks);
        let tracked: Vec<&str> = self.tracked().collect();
        let name = self.chain.of_point(self.request.point);
        let checkpoint = (!tracked.is_empty())
            .then(|| checkpoint_xml(&name, &self.survey.set.all, &tracked, None));
        tracing::debug!(backup, ?checkpoint, "backup begin");
        let begin =
            move |domain: &Domain| ffi::backup_begin(domain, &backup, checkpoint.as_deref());
        let undo = move |domain: &Domain, begun: &VirtResult<()>| {
            // Of a job that failed only the checkpoint can be there; another's job is not ours.
            let ended = begun.is_ok().then(|| ffi::abort_job(domain));
            let deleted = ffi::Checkpoint::lookup(domain, &name).and_then(|c| c.delete(0));
            tracing::warn!(?ended, ?deleted, "a backup job began too late and was ended");
        };
        let answer = self.domain.call_or_undo(BEGIN_TIMEOUT, begin, undo).await;
        if answer.as_ref().is_some_and(Result::is_err) && !self.domain.host.is_alive() {
            self.begun = Begun::CutOff;
        }
        answer.ok_or_else(|| {
            self.begun = Begun::Unanswered;
            Error::new(
                Kind::Timeout,
                format!(
                    "the backup of domain '{}' did not begin in {BEGIN_TIMEOUT:?}",
                    self.domain.name
                ),
            )
            .hint("see the libvirt log; QEMU may hang on slow storage. Should it begin yet, the next backup ends it")
        })
    }

    /// Adds to an error what may be its cause, or the next step.
    fn explain(&self, error: Error) -> Error {
        match error.kind() {
            Kind::Permission => {
                let owner = self.domain.host.qemu_dir().as_deref().and_then(scratch::owner);
                error.hint(self.places.access_hint(owner.as_deref()))
            }
            Kind::Io if self.is_unseen(&error) => {
                let message = format!(
                    "QEMU of domain '{}' does not find scratch directory {}",
                    self.domain.name,
                    self.places.scratch.display()
                );
                Error::new(Kind::NotFound, message).source(error).hint(
                    "a file system that was mounted after the domain was started is not there for \
                     its QEMU (libvirt gives each a mount namespace of its own): name a directory \
                     that was mounted before with --scratch-dir, or restart the domain",
                )
            }
            // A bitmap broke after it was looked at.
            Kind::NoBase => error.hint(TAKE_FULL),
            Kind::NoSpace => error.hint(format!(
                "free space in {} or name another directory with --scratch-dir",
                self.places.scratch.display()
            )),
            _ => error,
        }
    }

    /// Whether QEMU failed to find a scratch file that libvirt had just made. The text is the
    /// system's, after the path QEMU was told (block/file-posix.c).
    fn is_unseen(&self, error: &Error) -> bool {
        let text = with_causes(error);
        text.contains("No such file or directory")
            && text.contains(&*self.places.scratch.to_string_lossy())
    }
}
