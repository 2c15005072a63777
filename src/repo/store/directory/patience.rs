//! How long a call to the file system is waited for.
//!
//! A server that is gone, or a disk that hangs, keeps whoever asks it without end, and with a backup its
//! job on the VM. So a call that takes too long is given up. Its thread stays until the file system
//! answers; as long as one does, nothing else is waited for that long either, so that a run which gives
//! up ends soon. What the call was to do may yet be done: as with a crash, nobody relies on it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::super::{StoreError, StoreResult};

/// Longest wait for one call, if nobody says otherwise: a server of files that is started anew is back
/// within minutes, and a mount that waits for it then goes on (nfs(5), `hard`).
pub const ANSWER: Duration = Duration::from_secs(10 * 60);

/// Longest wait while another call hangs.
const ANSWER_BESIDE: Duration = Duration::from_secs(10);

/// Waits for calls, each on a thread of its own.
pub(super) struct Patience {
    /// Of which store, for errors.
    store: String,
    limit: Duration,
    /// Calls that were given up and have not ended.
    hanging: Arc<AtomicUsize>,
}

impl Patience {
    pub(super) fn new(store: String, limit: Duration) -> Self {
        Self { store, limit, hanging: Arc::default() }
    }

    /// Runs `work` on a blocking thread; a panic in it is an error here. Dropped, it leaves the work to
    /// end by itself.
    pub(super) async fn run<T: Send + 'static, E: From<StoreError> + Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        let hangs = self.hanging.load(Ordering::Relaxed) > 0;
        let limit = if hangs { self.limit.min(ANSWER_BESIDE) } else { self.limit };
        let mut work = tokio::task::spawn_blocking(work);
        if let Ok(done) = tokio::time::timeout(limit, &mut work).await {
            return done.unwrap_or_else(|error| Err(died(error).into()));
        }
        self.hanging.fetch_add(1, Ordering::Relaxed);
        let hanging = Arc::clone(&self.hanging);
        tokio::spawn(async move {
            // What it gives by now nobody waits for.
            let _ = work.await;
            hanging.fetch_sub(1, Ordering::Relaxed);
        });
        Err(StoreError::Silent { store: self.store.clone(), limit }.into())
    }

    /// The same for work of any length, for which no guest waits.
    pub(super) async fn run_long<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> StoreResult<T> + Send + 'static,
    ) -> StoreResult<T> {
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(died(error)))
    }
}

fn died(error: tokio::task::JoinError) -> StoreError {
    StoreError::io("a call to the file system", std::io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::error::{Error, Kind};

    #[tokio::test]
    async fn a_call_that_hangs_is_given_up_and_nothing_waits_long_until_it_ends() {
        let patience = Patience::new("directory /x".to_owned(), Duration::from_millis(50));
        let (answer, hung) = mpsc::channel::<()>();
        let result: StoreResult<()> = patience
            .run(move || {
                let _ = hung.recv();
                Ok(())
            })
            .await;
        let error = Error::from(result.unwrap_err());
        assert_eq!(error.kind(), Kind::Timeout);
        assert!(error.to_string().contains("directory /x has not answered"), "{error}");
        assert_eq!(patience.hanging.load(Ordering::Relaxed), 1);
        // Others that are answered go on.
        assert_eq!(patience.run::<_, StoreError>(|| Ok(7)).await.unwrap(), 7);
        drop(answer);
        while patience.hanging.load(Ordering::Relaxed) > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn while_one_hangs_the_next_is_waited_for_ten_seconds() {
        let patience = Patience::new("directory /x".to_owned(), ANSWER);
        patience.hanging.fetch_add(1, Ordering::Relaxed);
        let (_answer, hung) = mpsc::channel::<()>();
        let begun = std::time::Instant::now();
        let work = move || {
            let _ = hung.recv_timeout(Duration::from_secs(60));
            Ok::<_, StoreError>(())
        };
        // The clock of a test does not go on by itself beside a blocking thread.
        let (result, ()) = tokio::join!(patience.run(work), async {
            tokio::time::advance(ANSWER_BESIDE + Duration::from_secs(1)).await;
        });
        assert!(result.is_err() && begun.elapsed() < Duration::from_secs(30));
    }
}
