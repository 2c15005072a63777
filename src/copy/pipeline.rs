//! Keeps many steps in flight, bounded, and ends all of them with the first error.
//!
//! One task owns the plan; each step is a task of its own, so that steps use all cores. The owner
//! looks at completions whatever it waits for: an error is never found out about late.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::plan::{Planner, Step};
use super::step::Copying;
use super::walk::Walk;
use super::{Flush, Options, Report, Unchanged};
use crate::block::{Budget, ExtentKind};
use crate::control::{Control, DiskProgress};
use crate::error::{Error, Kind, Result};

/// Copies the disk.
pub(super) async fn run(
    job: Arc<Copying>,
    options: &Options,
    control: &Control,
    progress: &Arc<DiskProgress>,
) -> Result<Report> {
    let mut flight = Flight {
        job: Arc::clone(&job),
        control,
        progress,
        steps: JoinSet::new(),
        report: Report::default(),
    };
    match flight.copy(&options.budget).await {
        Ok(()) => {
            if options.flush == Flush::AtEnd {
                control.run(job.flush()).await?;
            }
            Ok(flight.report)
        }
        Err(error) => {
            // Nothing of this copy is running when it returns, save what a thread has begun.
            flight.steps.shutdown().await;
            Err(error)
        }
    }
}

/// The steps in flight and what they added up to.
struct Flight<'a> {
    job: Arc<Copying>,
    control: &'a Control,
    progress: &'a DiskProgress,
    steps: JoinSet<Result<Report>>,
    report: Report,
}

impl Flight<'_> {
    async fn copy(&mut self, budget: &Budget) -> Result<()> {
        let shape = self.job.shape;
        let mut walk =
            Walk::start(Arc::clone(&self.job.source), shape.range(), self.job.source_name.clone());
        let mut planner = Planner::new(shape);
        while let Some(map) = self.attend(walk.next()).await?.transpose()? {
            for mut extent in map.iter() {
                if self.job.unchanged == Unchanged::Read && extent.kind == ExtentKind::Unchanged {
                    extent.kind = ExtentKind::Data;
                }
                planner.push(extent);
                while let Some(step) = planner.pop() {
                    self.begin(step, budget).await?;
                }
            }
        }
        while let Some(done) = self.attend_one().await? {
            self.count(done)?;
        }
        Ok(())
    }

    /// Starts a step as soon as there is room for it.
    async fn begin(&mut self, step: Step, budget: &Budget) -> Result<()> {
        while self.steps.len() >= self.job.shape.requests {
            if let Some(done) = self.attend_one().await? {
                self.count(done)?;
            }
        }
        let buffer = match step {
            Step::Read { range, .. } => {
                let len = usize::try_from(range.len()).expect("a request fits memory");
                Some(self.attend(budget.take(len)).await?)
            }
            Step::Zero(_) | Step::Keep(_) => None,
        };
        let job = Arc::clone(&self.job);
        self.steps.spawn(async move { job.run(step, buffer).await });
        Ok(())
    }

    /// Waits for `work`, counting completions meanwhile; a failed step or a stop ends the wait.
    async fn attend<T>(&mut self, work: impl Future<Output = T>) -> Result<T> {
        let mut work = std::pin::pin!(work);
        loop {
            let done = tokio::select! {
                biased;
                () = self.control.cancelled() => return Err(stopped()),
                Some(done) = self.steps.join_next() => done,
                output = &mut work => return Ok(output),
            };
            self.count(flatten(done))?;
        }
    }

    /// The next completion; `None` when nothing is in flight.
    async fn attend_one(&mut self) -> Result<Option<Result<Report>>> {
        tokio::select! {
            biased;
            () = self.control.cancelled() => Err(stopped()),
            done = self.steps.join_next() => Ok(done.map(flatten)),
        }
    }

    fn count(&mut self, done: Result<Report>) -> Result<()> {
        let done = done?;
        let covered = done.written_bytes + done.zero_bytes + done.kept_bytes;
        self.progress.add(covered, done.read_bytes);
        self.report.written_bytes += done.written_bytes;
        self.report.zero_bytes += done.zero_bytes;
        self.report.kept_bytes += done.kept_bytes;
        self.report.read_bytes += done.read_bytes;
        Ok(())
    }
}

fn flatten(done: Result<Result<Report>, tokio::task::JoinError>) -> Result<Report> {
    done.map_err(|e| Error::new(Kind::Internal, "a step of the copy died").source(e))?
}

fn stopped() -> Error {
    Error::new(Kind::Cancelled, "stopped on request")
}
