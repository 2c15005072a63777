//! Copies between ends that are a system call away: threads that each read, look for zeroes and
//! write, one step after the other, so that a step's bytes never leave the cache of one core.
//!
//! ```text
//!  walk ─► plan ──batches of steps──► threads: read ► write, zero
//! ```
//!
//! The same plan, policy, errors and report as the pipeline. As many threads as cores keep a copy
//! within the page cache busy; a read that waits for a disk, or writes past the cache, bring in more,
//! because a disk wants many requests at a time. A stop is noticed between steps, and waits [`ANSWER`] at
//! most for the one that a thread is at: a file system that hangs keeps the thread, not the copy.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::canary::ANSWER;
use super::plan::{Planner, Step};
use super::sparse::runs;
use super::step::Copying;
use super::walk::Walk;
use super::{Flush, Options, Report, Unchanged};
use crate::block::{BlockingRead, BlockingWrite, Buffer, ByteRange, ExtentKind, Waited};
use crate::control::{Control, DiskProgress};
use crate::error::{Error, Kind, Result};

/// Steps handed over at once: 8 MiB of the usual size, so that hand-overs cost nothing.
const BATCH: usize = 32;
/// Batches waiting.
const AHEAD: usize = 4;
/// Threads while all reads come out of memory; no more than cores.
const THREADS_CACHED_MAX: usize = 4;
/// Threads where writes wait for a disk, and once a read had to: keeps an NVMe device busy.
const THREADS_DISK: usize = 8;

type Ends = (Arc<dyn BlockingRead>, Arc<dyn BlockingWrite>);

/// What the threads share.
struct Shared {
    job: Arc<Copying>,
    ends: Ends,
    feed: Mutex<Feed>,
    progress: Arc<DiskProgress>,
    stop: AtomicBool,
    /// A read had to wait for a disk.
    cold: AtomicBool,
}

/// Where steps come from.
struct Feed {
    ready: VecDeque<Step>,
    batches: mpsc::Receiver<Vec<Step>>,
}

/// Copies the disk.
pub(super) async fn run(
    job: Arc<Copying>,
    ends: Ends,
    options: &Options,
    (control, progress): (&Control, &Arc<DiskProgress>),
) -> Result<Report> {
    let (send, batches) = mpsc::channel(AHEAD);
    let shared = Arc::new(Shared {
        job: Arc::clone(&job),
        ends,
        feed: Mutex::new(Feed { ready: VecDeque::new(), batches }),
        progress: Arc::clone(progress),
        stop: AtomicBool::new(false),
        cold: AtomicBool::new(false),
    });
    let mut threads = Threads { shared: Arc::clone(&shared), running: JoinSet::new(), count: 0 };
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let most = options.requests.unwrap_or(usize::MAX);
    let first = if shared.ends.1.waits() { THREADS_DISK } else { cores.min(THREADS_CACHED_MAX) };
    threads.start(first.min(most), options);
    let copied = async {
        let planned = plan(&job, send, (&mut threads, most), options);
        control.run(planned).await?;
        let mut report = Report::default();
        while let Some(part) = control.run(async { Ok(threads.running.join_next().await) }).await? {
            add(&mut report, part.map_err(died)??);
        }
        Ok(report)
    };
    let copied: Result<Report> = copied.await;
    let report = match copied {
        Ok(report) => report,
        Err(error) => {
            shared.stop.store(true, Ordering::Relaxed);
            return Err(threads.end(error).await);
        }
    };
    if options.flush == Flush::AtEnd {
        control.run(job.flush()).await?;
    }
    Ok(report)
}

/// Feeds the threads; ends early, without an error, when they have ended: theirs tells why.
async fn plan(
    job: &Copying,
    send: mpsc::Sender<Vec<Step>>,
    (threads, most): (&mut Threads, usize),
    options: &Options,
) -> Result<()> {
    let shape = job.shape;
    let mut walk = Walk::start(Arc::clone(&job.source), shape.range(), job.source_name.clone());
    let mut planner = Planner::new(shape);
    let mut batch = Vec::with_capacity(BATCH);
    while let Some(map) = walk.next().await.transpose()? {
        for mut extent in map.iter() {
            if job.unchanged == Unchanged::Read && extent.kind == ExtentKind::Unchanged {
                extent.kind = ExtentKind::Data;
            }
            planner.push(extent);
            while let Some(step) = planner.pop() {
                batch.push(step);
                if batch.len() == BATCH {
                    let full = std::mem::replace(&mut batch, Vec::with_capacity(BATCH));
                    if send.send(full).await.is_err() {
                        return Ok(());
                    }
                    if threads.shared.cold.load(Ordering::Relaxed) {
                        threads.start(THREADS_DISK.min(most), options);
                    }
                }
            }
        }
    }
    // Whoever is not there to take it has failed.
    let _ = send.send(batch).await;
    Ok(())
}

struct Threads {
    shared: Arc<Shared>,
    running: JoinSet<Result<Report>>,
    count: usize,
}

impl Threads {
    /// Starts threads until there are `count`; each begins as soon as the budget has a buffer.
    fn start(&mut self, count: usize, options: &Options) {
        let len = usize::try_from(self.shared.job.shape.request_bytes).expect("fits memory");
        while self.count < count {
            self.count += 1;
            let (shared, budget) = (Arc::clone(&self.shared), options.budget.clone());
            self.running.spawn(async move {
                let buffer = budget.take(len).await;
                tokio::task::spawn_blocking(move || shared.work(buffer)).await.map_err(died)?
            });
        }
    }

    /// Waits for threads that were told to stop because of `error`. Why, in the end.
    async fn end(mut self, error: Error) -> Error {
        let mut first = None;
        let ended = async {
            while let Some(part) = self.running.join_next().await {
                first = first.take().or(part.map_err(died).flatten().err());
            }
        };
        if tokio::time::timeout(ANSWER, ended).await.is_err() && first.is_none() {
            let Copying { source_name, sink_name, .. } = &*self.shared.job;
            return error.context(format!("{source_name} or {sink_name} does not answer"));
        }
        // A thread that failed knows more than whoever waited for it.
        first.unwrap_or(error)
    }
}

impl Shared {
    /// A thread's life: takes steps until there are none.
    fn work(&self, mut buffer: Buffer) -> Result<Report> {
        let mut end = StopAll { shared: self, failed: true };
        let mut report = Report::default();
        while let Some(step) = self.next() {
            if self.stop.load(Ordering::Relaxed) {
                // Whoever asked for it has the reason.
                break;
            }
            let done = self.step(step, &mut buffer)?;
            self.progress.add(done.written_bytes + done.zero_bytes, done.read_bytes);
            add(&mut report, done);
        }
        end.failed = false;
        Ok(report)
    }

    fn next(&self) -> Option<Step> {
        // The threads that find no step wait for the one that waits for the batch: a lock is right.
        let mut feed = self.feed.lock().unwrap_or_else(PoisonError::into_inner);
        while feed.ready.is_empty() {
            let batch = feed.batches.blocking_recv()?;
            feed.ready.extend(batch);
        }
        feed.ready.pop_front()
    }

    fn step(&self, step: Step, buffer: &mut [u8]) -> Result<Report> {
        match step {
            Step::Zero(range) => self.zero(range),
            Step::Keep(range) => {
                let message = format!("a file has no base to keep {range} from");
                Err(Error::new(Kind::Unsupported, message))
            }
            Step::Read { range, span } => {
                let at =
                    |n: u64| usize::try_from(n - range.offset()).expect("a request fits memory");
                let bytes = &mut buffer[..at(range.end())];
                let span = span.widen(self.job.source_align_bytes, self.job.shape.size_bytes);
                bytes[..at(span.offset())].fill(0);
                bytes[at(span.end())..].fill(0);
                let read = self
                    .ends
                    .0
                    .read_at(span.offset(), &mut bytes[at(span.offset())..at(span.end())]);
                let waited = read.map_err(|e| {
                    e.context(format!("cannot read {span} of {}", self.job.source_name))
                })?;
                if waited == Waited::ForDisk {
                    self.cold.store(true, Ordering::Relaxed);
                }
                if self.stop.load(Ordering::Relaxed) {
                    // Nobody may wait for this thread any more.
                    return Ok(Report::default());
                }
                let mut report = self.write(range, bytes)?;
                report.read_bytes = span.len();
                Ok(report)
            }
        }
    }

    fn write(&self, range: ByteRange, bytes: &[u8]) -> Result<Report> {
        let mut report = Report::default();
        let write = |part: ByteRange| {
            let at = |n: u64| usize::try_from(n - range.offset()).expect("a request fits memory");
            let written =
                self.ends.1.write_at(part.offset(), &bytes[at(part.offset())..at(part.end())]);
            written.map_err(|e| self.job.sink_failed("write", part, e))
        };
        let Some(block_bytes) = self.job.detect_bytes else {
            write(range)?;
            report.written_bytes = range.len();
            return Ok(report);
        };
        for run in runs(bytes, range.offset(), block_bytes) {
            if self.stop.load(Ordering::Relaxed) {
                // The one before may have hung: nobody may wait for this thread any more.
                break;
            }
            if run.zero {
                report.zero_bytes += self.zero(run.range)?.zero_bytes;
            } else {
                write(run.range)?;
                report.written_bytes += run.range.len();
            }
        }
        Ok(report)
    }

    fn zero(&self, range: ByteRange) -> Result<Report> {
        if let Some((needed, mode)) = self.job.zeroes.needed(range) {
            let zeroed = self.ends.1.zero_at(needed, mode);
            zeroed.map_err(|e| self.job.sink_failed("zero", needed, e))?;
        }
        Ok(Report { zero_bytes: range.len(), ..Report::default() })
    }
}

/// Stops everybody when a thread fails or panics.
struct StopAll<'a> {
    shared: &'a Shared,
    failed: bool,
}

impl Drop for StopAll<'_> {
    fn drop(&mut self) {
        if self.failed {
            self.shared.stop.store(true, Ordering::Relaxed);
            // Whoever plans would wait for takers for ever.
            self.shared.feed.lock().unwrap_or_else(PoisonError::into_inner).batches.close();
        }
    }
}

fn add(sum: &mut Report, part: Report) {
    sum.written_bytes += part.written_bytes;
    sum.zero_bytes += part.zero_bytes;
    sum.kept_bytes += part.kept_bytes;
    sum.read_bytes += part.read_bytes;
}

fn died(error: tokio::task::JoinError) -> Error {
    Error::new(Kind::Internal, "a thread of the copy died").source(error)
}

#[cfg(test)]
mod tests;
