//! Threads for work that burns CPU (hash, compress, seal), fed by a bounded queue.
//!
//! The reactor never hashes and a worker never waits for input or output. One pool per process is
//! enough; a job borrows it. Order is the caller's business: each piece of work resolves its own
//! future.
//!
//! The pool of a backup gives way ([`Workers::that_give_way`]): on a host of virtual machines its
//! threads would otherwise compete with guests, and with QEMU while it sends what they wait for. The
//! reactor does not: the guest may be waiting for its next word. Nor does who restores or serves:
//! there somebody waits for the threads. Where systemd puts guests and us into slices of different
//! weight, those decide first (`cpu.weight`, Linux Documentation/admin-guide/cgroup-v2.rst).

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Semaphore, oneshot};

use crate::error::{Error, Kind, Result};

type Work = Box<dyn FnOnce() + Send>;

/// By how much threads that give way are nicer than others: a tenth of their share of a processor
/// that both want (`sched_prio_to_weight`, Linux kernel/sched/core.c), all of it when nobody else
/// does.
const NICER: i32 = 10;

/// Pieces of work waiting per thread: enough to never starve one, few enough to stay in cache.
const QUEUED_PER_THREAD: usize = 4;

/// A pool of worker threads. Clones share it; the threads end with the last clone.
#[derive(Clone, Debug)]
pub struct Workers {
    shared: Arc<Shared>,
    /// Whether work is done by whoever asks for it: a simulation replays only on one thread.
    #[cfg(test)]
    inline: bool,
}

#[derive(Debug)]
struct Shared {
    queue: SyncSender<Work>,
    /// Permits for places in the queue, so that sending never blocks the reactor.
    places: Arc<Semaphore>,
}

impl Workers {
    /// A pool of `threads` (at least one).
    pub fn new(threads: usize) -> Result<Self> {
        Self::start(threads, run)
    }

    fn start(threads: usize, life: fn(&Mutex<Receiver<Work>>)) -> Result<Self> {
        let threads = threads.max(1);
        let capacity = threads * QUEUED_PER_THREAD;
        let (queue, work) = sync_channel(capacity);
        let work = Arc::new(Mutex::new(work));
        for index in 0..threads {
            let work = Arc::clone(&work);
            std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || life(&work))
                .map_err(|e| Error::io("cannot start a worker thread", e))?;
        }
        let places = Arc::new(Semaphore::new(capacity));
        Ok(Self {
            shared: Arc::new(Shared { queue, places }),
            #[cfg(test)]
            inline: false,
        })
    }

    /// No threads: whoever asks for work does it.
    #[cfg(test)]
    pub(crate) fn inline() -> Result<Self> {
        Ok(Self { inline: true, ..Self::new(1)? })
    }

    /// As many threads as the machine has cores.
    pub fn per_core() -> Result<Self> {
        Self::new(cores())
    }

    /// The same; they give way to everybody else on it.
    pub fn that_give_way() -> Result<Self> {
        Self::start(cores(), |work| {
            // Of this thread alone (nice(2), "C library/kernel differences").
            if let Err(error) = rustix::process::nice(NICER) {
                tracing::debug!(%error, "a worker thread cannot give way");
            }
            run(work);
        })
    }

    /// Runs `work` on a worker and yields its result. Dropping the future abandons the result; the
    /// work, once queued, still runs. A panic in `work` is an [`Kind::Internal`] error here.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        #[cfg(test)]
        if self.inline {
            return Ok(work());
        }
        let place = Arc::clone(&self.shared.places)
            .acquire_owned()
            .await
            .expect("the semaphore of a pool is never closed");
        let (done, result) = oneshot::channel();
        let work: Work = Box::new(move || {
            drop(place);
            // The receiver may be gone: then nobody wants the result.
            let _ = done.send(work());
        });
        let lost = || Error::new(Kind::Internal, "a worker thread died");
        self.shared.queue.send(work).map_err(|_| lost())?;
        result.await.map_err(|_| lost())
    }
}

impl Workers {
    /// Whether as much work waits for the threads as may: they are what the job waits for.
    pub fn is_behind(&self) -> bool {
        self.shared.places.available_permits() == 0
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// A worker's life: take, run, until the pool is dropped.
fn run(queue: &Mutex<Receiver<Work>>) {
    loop {
        // Held only while waiting for the next piece; the other threads wait behind it.
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(work) = next else { return };
        // A panic ends this piece of work only: its channel closes, its caller sees an error.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panicking_piece_of_work_is_an_error_and_the_pool_lives_on() {
        let workers = Workers::new(1).unwrap();
        let error = workers.run::<()>(|| panic!("on purpose")).await.unwrap_err();
        assert_eq!(error.kind(), Kind::Internal);
        assert_eq!(workers.run(|| 6 * 7).await.unwrap(), 42);
    }

    #[tokio::test]
    async fn threads_are_behind_while_all_places_in_the_queue_are_taken() {
        let workers = Workers::new(1).unwrap();
        let (hold, until) = std::sync::mpsc::channel::<()>();
        let (busy_now, started) = oneshot::channel();
        let mut set = tokio::task::JoinSet::new();
        let busy = workers.clone();
        let work = move || {
            busy_now.send(()).unwrap();
            until.recv().unwrap_err();
        };
        set.spawn(async move { busy.run(work).await });
        started.await.unwrap();
        for _ in 0..QUEUED_PER_THREAD {
            assert!(!workers.is_behind());
            let waiting = workers.clone();
            set.spawn(async move { waiting.run(|| ()).await });
            tokio::task::yield_now().await;
        }
        while !workers.is_behind() {
            tokio::task::yield_now().await;
        }
        drop(hold);
        set.join_all().await.into_iter().collect::<Result<()>>().unwrap();
        assert!(!workers.is_behind());
    }

    #[tokio::test]
    async fn more_work_than_places_all_gets_done() {
        let workers = Workers::new(2).unwrap();
        let mut set = tokio::task::JoinSet::new();
        for n in 0..1000_u64 {
            let workers = workers.clone();
            set.spawn(async move { workers.run(move || n).await.unwrap() });
        }
        assert_eq!(set.join_all().await.into_iter().sum::<u64>(), 499_500);
    }
}
