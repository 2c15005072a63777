//! The run's side of the line: a guardian that was started, and what it was asked for.
//!
//! Each step is a type, so that a thaw cannot be forgotten: a [`Guardian`] is asked for a freeze
//! and becomes [`Frozen`], which is asked for the thaw. Dropping any of them closes the line, and
//! the guardian thaws what is to be thawed.
//!
//! A guardian that is gone without a word (killed, say) leaves the guest as it is: then a second
//! one is seated in this process to thaw.

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use super::line::{Line, Order, Report};
use super::{COMMAND, Freezable, Subject, outcome, serve};
use crate::vm::{Consistency, Quiescence};

/// Longest wait for a guardian to be connected: over SSH it may take seconds.
const READY: Duration = Duration::from_secs(20);
/// Longest wait for the answer to a freeze past its budget: the guardian first asks what is
/// mounted.
const ANSWER: Duration = Duration::from_secs(40);
/// Longest wait for a thaw: three attempts, each of which may wait for libvirt's agent job. The
/// guardian goes on beyond it.
const THAW: Duration = Duration::from_secs(60);
/// Longest wait for the thaw after a freeze that failed: nothing is to be done in between, but
/// mostly it takes a moment and saves a warning.
const UNDO: Duration = Duration::from_secs(3);

/// A guardian that is connected to the guest's agent and has not been asked for anything.
pub struct Guardian {
    line: Line,
    /// The way to thaw from this process, unless the guardian sits here and has it.
    own: Option<Box<dyn Freezable>>,
}

/// A frozen guest.
pub struct Frozen {
    guardian: Guardian,
    count: u32,
    partial: Option<String>,
    budget: Duration,
}

/// A freeze that failed.
pub struct NotFrozen {
    /// Why.
    pub reason: String,
    /// Whether it is certain that nothing is frozen.
    pub thaw: Thaw,
}

/// A freeze that was ended.
pub struct Thawed {
    /// What it was worth.
    pub quiescence: Quiescence,
    /// Whether the guest is thawed for certain.
    pub thaw: Thaw,
}

/// Whether a guest is thawed.
#[derive(Debug)]
pub enum Thaw {
    /// For certain.
    Done,
    /// Perhaps not; somebody goes on trying.
    Pending(Pending),
}

/// A thaw that somebody goes on trying.
pub struct Pending {
    line: Option<Line>,
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").field("tried", &self.line.is_some()).finish_non_exhaustive()
    }
}

impl Pending {
    /// Nobody tries any more.
    pub fn lost() -> Self {
        Self { line: None }
    }

    /// Whether it has succeeded by now. Does not wait.
    pub async fn is_done(&mut self) -> bool {
        let Some(line) = &mut self.line else { return false };
        // A message that is there is read; none is no reason to wait.
        while let Ok(report) = tokio::time::timeout(Duration::ZERO, line.receive()).await {
            match report {
                Some(Report::Thawed(_)) => return true,
                Some(_) => {}
                None => {
                    self.line = None;
                    return false;
                }
            }
        }
        false
    }
}

impl Guardian {
    /// Starts a guardian of `subject`: a process of `program`, or a thread that uses `own` when
    /// there is no program or it does not come up. Fails with the reason when there is no way to
    /// the agent.
    pub async fn start(
        program: Option<&Path>,
        subject: Subject,
        own: Box<dyn Freezable>,
    ) -> Result<Self, String> {
        if let Some(program) = program {
            match Self::process(program, subject).await {
                Ok(line) => return Ok(Self { line, own: Some(own) }),
                Err(reason) => {
                    tracing::warn!(reason, "no freeze guardian outside of this process");
                }
            }
        }
        Ok(Self { line: thread(own).await?, own: None })
    }

    async fn process(program: &Path, subject: Subject) -> Result<Line, String> {
        let (ours, theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
        let mut command = tokio::process::Command::new(program);
        // Not our streams: whoever reads them to their end must not wait for the guardian.
        command.arg(COMMAND).stdout(Stdio::null()).stderr(Stdio::null()).current_dir("/");
        let child = command.stdin(OwnedFd::from(theirs)).spawn();
        // The runtime reaps it; it is to outlive this handle.
        drop(child.map_err(|error| format!("{}: {error}", program.display()))?);
        // Ours alone now holds the other end open.
        drop(command);
        let mut line = Line::new(ours).map_err(|error| error.to_string())?;
        line.send(&Order::Watch(subject)).await;
        ready(line).await
    }

    /// Asks for the freeze. Not cancel-safe in what it tells, but in what it does: a dropped call
    /// thaws.
    pub async fn freeze(mut self, budget: Duration) -> Result<Frozen, NotFrozen> {
        let budget_ms = u64::try_from(budget.as_millis()).unwrap_or(u64::MAX);
        self.line.send(&Order::Freeze { budget_ms }).await;
        match tokio::time::timeout(budget + ANSWER, self.line.receive()).await {
            Ok(Some(Report::Frozen { count, partial })) => {
                Ok(Frozen { guardian: self, count, partial, budget })
            }
            Ok(Some(Report::NotFrozen(reason))) => {
                let (thaw, _) = self.await_thaw(UNDO).await;
                Err(NotFrozen { reason, thaw })
            }
            Ok(Some(other)) => {
                let reason = format!("the freeze guardian said {other:?}");
                let (thaw, _) = self.await_thaw(UNDO).await;
                Err(NotFrozen { reason, thaw })
            }
            Ok(None) => {
                let (thaw, _) = self.replaced().await;
                Err(NotFrozen { reason: "the freeze guardian ended".into(), thaw })
            }
            Err(_) => {
                let reason = "the freeze guardian did not answer".into();
                Err(NotFrozen { reason, thaw: Thaw::Pending(Pending { line: Some(self.line) }) })
            }
        }
    }

    /// Thaws what an earlier run may have left frozen.
    pub async fn thaw(mut self) -> Thaw {
        self.line.send(&Order::Thaw).await;
        self.await_thaw(THAW).await.0
    }

    /// Waits for the end of a thaw, and how it ended.
    async fn await_thaw(mut self, limit: Duration) -> (Thaw, Option<Report>) {
        match tokio::time::timeout(limit, self.line.receive()).await {
            Ok(Some(report @ Report::Thawed(_))) => (Thaw::Done, Some(report)),
            Ok(Some(report)) => (Thaw::Pending(Pending { line: Some(self.line) }), Some(report)),
            Ok(None) => Box::pin(self.replaced()).await,
            Err(_) => (Thaw::Pending(Pending { line: Some(self.line) }), None),
        }
    }

    /// Thaws from this process after the guardian has gone without a word.
    async fn replaced(self) -> (Thaw, Option<Report>) {
        let Some(own) = self.own else { return (Thaw::Pending(Pending::lost()), None) };
        tracing::warn!("the freeze guardian is gone; thawing from here");
        match thread(own).await {
            Ok(mut line) => {
                line.send(&Order::Thaw).await;
                let (thaw, _) = Self { line, own: None }.await_thaw(THAW).await;
                // What it measured is not the freeze.
                (thaw, None)
            }
            Err(reason) => {
                tracing::error!(reason, "no way to thaw the guest");
                (Thaw::Pending(Pending::lost()), None)
            }
        }
    }
}

impl Frozen {
    /// Says that the caller has ended it by itself, for certain: the guardian does nothing. What is
    /// not said in time the guardian finds out.
    pub async fn release(mut self) {
        self.guardian.line.send(&Order::Release).await;
    }

    /// Thaws and says what was achieved.
    pub async fn thaw(mut self) -> Thawed {
        let budget_ms = u64::try_from(self.budget.as_millis()).unwrap_or(u64::MAX);
        // It may be thawing by itself already; then it says so all the same.
        self.guardian.line.send(&Order::Thaw).await;
        let (thaw, report) = self.guardian.await_thaw(THAW).await;
        let crash = |reason: String| {
            let (level, reason) = (Consistency::Crash, Some(reason));
            Quiescence { level, frozen_ms: None, reason }
        };
        let quiescence = match report {
            Some(Report::Thawed(end)) => outcome::level(self.count, self.partial, budget_ms, end),
            Some(Report::Stuck(reason)) => crash(format!("the thaw failed: {reason}")),
            Some(other) => crash(format!("the freeze guardian said {other:?}")),
            None => crash("the freeze guardian was lost".into()),
        };
        Thawed { quiescence, thaw }
    }
}

/// Seats a guardian in a thread of this process: with a runtime of its own, so that it does not
/// depend on the one that waits for it.
async fn thread(own: Box<dyn Freezable>) -> Result<Line, String> {
    let (ours, theirs) = UnixStream::pair().map_err(|error| error.to_string())?;
    let run = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let served = runtime.and_then(|runtime| {
            runtime.block_on(async {
                serve(own, Line::new(theirs)?).await;
                Ok(())
            })
        });
        if let Err(error) = served {
            tracing::error!(%error, "the freeze guardian cannot run");
        }
    };
    let spawned = std::thread::Builder::new().name("freeze-guardian".into()).spawn(run);
    spawned.map_err(|error| error.to_string())?;
    ready(Line::new(ours).map_err(|error| error.to_string())?).await
}

/// Waits until a guardian is connected to the agent.
async fn ready(mut line: Line) -> Result<Line, String> {
    match tokio::time::timeout(READY, line.receive()).await {
        Ok(Some(Report::Ready)) => Ok(line),
        Ok(Some(Report::Unready(reason))) => Err(reason),
        Ok(_) => Err("the freeze guardian ended at once".into()),
        Err(_) => Err(format!("the freeze guardian was not ready in {READY:?}")),
    }
}
