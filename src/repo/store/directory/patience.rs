//! How long a call to the file system is waited for.
//!
//! A server that is gone, or a disk that hangs, keeps whoever asks it without end, and with a backup its
//! job on the VM. So a call that takes too long is given up. Its thread stays until the file system
//! answers; as long as one that nobody waits for any more does, nothing else is waited for that long
//! either, so that a run which gives up, or is stopped, ends soon. What the call was to do may yet be
//! done: as with a crash, nobody relies on it.
//!
//! No thread of the runtime ever asks the file system, or signals, clocks and every wait of the process
//! would hang with it: not even where something is dropped ([`Aside`]).

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::Instant;

use super::super::{StoreError, StoreResult};

/// Longest wait for one call, if nobody says otherwise: a server of files that is started anew is back
/// within minutes, and a mount that waits for it then goes on (nfs(5), `hard`).
pub const ANSWER: Duration = Duration::from_secs(10 * 60);

/// A call that nobody waits for any more hangs after this long, and another one is given up then.
const ANSWER_BESIDE: Duration = Duration::from_secs(10);

/// How often a store that works for long is asked for a sign that it is there.
const SIGN_EVERY: Duration = Duration::from_secs(60);

/// Waits for calls, each on a thread of its own.
pub(super) struct Patience {
    /// Of which store, for errors.
    store: String,
    limit: Duration,
    /// When the calls began that nobody waits for any more. Each is kept by its own call, until that
    /// ends. Locked for a push or a look, never across an await.
    left: Mutex<Vec<Weak<Instant>>>,
}

/// The wait for a call. However it is over: if the call is not, those who wait for others have to know.
struct Wait<'a> {
    patience: &'a Patience,
    call: Weak<Instant>,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        if self.call.strong_count() > 0 {
            self.patience.left().push(Weak::clone(&self.call));
        }
    }
}

impl Patience {
    pub(super) fn new(store: String, limit: Duration) -> Self {
        Self { store, limit, left: Mutex::default() }
    }

    /// Runs `work` on a blocking thread; a panic in it is an error here. Dropped, it leaves the work to
    /// end by itself. What the work gives by then is dropped on its thread, or on this one: it must not
    /// be what asks the file system when it is dropped (see [`Aside`]).
    pub(super) async fn run<T: Send + 'static, E: From<StoreError> + Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        let begun = Arc::new(Instant::now());
        let _wait = Wait { patience: self, call: Arc::downgrade(&begun) };
        let mut work = tokio::task::spawn_blocking(move || {
            let done = work();
            drop(begun);
            done
        });
        let mut waited = Duration::ZERO;
        while waited < self.limit && !(waited >= ANSWER_BESIDE && self.hangs()) {
            let more = ANSWER_BESIDE.min(self.limit.saturating_sub(waited));
            if let Ok(done) = tokio::time::timeout(more, &mut work).await {
                return done.unwrap_or_else(|error| Err(died(error).into()));
            }
            waited += more;
        }
        Err(StoreError::Silent { store: self.store.clone(), limit: waited }.into())
    }

    /// Whether a call that nobody waits for any more hangs.
    fn hangs(&self) -> bool {
        let left = self.left();
        left.iter().filter_map(Weak::upgrade).any(|begun| begun.elapsed() >= ANSWER_BESIDE)
    }

    /// Those that have not ended: they run, or wait for a thread.
    fn left(&self) -> MutexGuard<'_, Vec<Weak<Instant>>> {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.retain(|call| call.strong_count() > 0);
        left
    }

    /// The same for work of any length, for which no guest waits: until the store does not answer what
    /// `sign` gives, which is asked now and then, and takes a moment.
    pub(super) async fn run_long<T: Send + 'static, S>(
        &self,
        work: impl FnOnce() -> StoreResult<T> + Send + 'static,
        sign: impl Fn() -> S,
    ) -> StoreResult<T>
    where
        S: FnOnce() -> StoreResult<()> + Send + 'static,
    {
        let mut work = tokio::task::spawn_blocking(work);
        loop {
            if let Ok(done) = tokio::time::timeout(SIGN_EVERY, &mut work).await {
                return done.unwrap_or_else(|error| Err(died(error)));
            }
            // What else is wrong with it the work finds out.
            if let Err(silent @ StoreError::Silent { .. }) = self.run(sign()).await {
                return Err(silent);
            }
        }
    }
}

fn died(error: tokio::task::JoinError) -> StoreError {
    StoreError::io("a call to the file system", std::io::Error::other(error))
}

/// Something that asks the file system when it is dropped: does so on a blocking thread, for which
/// nobody waits. Without a runtime, and when that ends, it is dropped where it is.
pub(super) struct Aside<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Aside<T> {
    pub(super) fn new(inner: T) -> Self {
        Self(Some(inner))
    }

    /// For a blocking thread, which may drop it at once.
    pub(super) fn into_inner(mut self) -> T {
        self.0.take().expect("there until it is dropped")
    }
}

impl<T: Send + 'static> Drop for Aside<T> {
    fn drop(&mut self) {
        if let (Some(inner), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            runtime.spawn_blocking(move || drop(inner));
        }
    }
}

impl<T: Send + 'static> Deref for Aside<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("there until it is dropped")
    }
}

impl<T: Send + 'static> DerefMut for Aside<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("there until it is dropped")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use super::*;
    use crate::error::{Error, Kind};

    /// Work that hangs until the sender is dropped.
    fn hanging() -> (mpsc::Sender<()>, impl FnOnce() -> StoreResult<()> + Send) {
        let (answer, hung) = mpsc::channel::<()>();
        let work = move || {
            let _ = hung.recv();
            Ok(())
        };
        (answer, work)
    }

    fn patience(limit: Duration) -> Patience {
        Patience::new("directory /x".to_owned(), limit)
    }

    #[tokio::test]
    async fn a_call_that_hangs_is_given_up_and_others_go_on() {
        let patience = patience(Duration::from_millis(50));
        let (_answer, work) = hanging();
        let error = Error::from(patience.run(work).await.unwrap_err());
        assert_eq!(error.kind(), Kind::Timeout);
        assert!(error.to_string().contains("directory /x has not answered"), "{error}");
        assert_eq!(patience.run::<_, StoreError>(|| Ok(7)).await.unwrap(), 7);
    }

    /// How long until a call is given up.
    async fn given_up_after(patience: &Patience) -> Duration {
        let (_answer, work) = hanging();
        until_failed(patience.run(work)).await
    }

    /// Waits on a clock that stands still but for this: how long until `call` fails.
    async fn until_failed(call: impl Future<Output = StoreResult<()>>) -> Duration {
        let begun = Instant::now();
        let mut call = std::pin::pin!(call);
        loop {
            tokio::select! {
                biased;
                done = &mut call => {
                    done.unwrap_err();
                    return begun.elapsed();
                }
                () = tokio::task::yield_now() => tokio::time::advance(Duration::from_secs(1)).await,
            }
        }
    }

    /// Sees that a call has not ended.
    async fn pend(call: &mut (impl Future<Output = StoreResult<()>> + Unpin)) {
        tokio::select! {
            biased;
            done = call => panic!("it hangs: {done:?}"),
            () = std::future::ready(()) => {}
        }
    }

    /// Begins a call, and drops it after `waited` as a stop does.
    async fn drop_after(waited: Duration, call: impl Future<Output = StoreResult<()>>) {
        tokio::select! {
            biased;
            done = call => panic!("it hangs: {done:?}"),
            () = tokio::time::advance(waited) => {}
        }
    }

    /// Those who gave a run up once waited ten minutes more for each further call, if the run was
    /// stopped before the first of them was given up.
    #[tokio::test(start_paused = true)]
    async fn while_one_hangs_that_nobody_waits_for_the_next_is_given_up_soon() {
        for waited in [1, 5 * 60, 11 * 60].map(Duration::from_secs) {
            let patience = patience(ANSWER);
            let (_answer, work) = hanging();
            drop_after(waited, patience.run(work)).await;
            let given_up = given_up_after(&patience).await;
            assert!(given_up <= ANSWER_BESIDE * 2, "{given_up:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn beside_one_that_ended_late_the_next_is_waited_for_in_full() {
        let patience = patience(ANSWER);
        let (answer, work) = hanging();
        drop_after(Duration::from_secs(60), patience.run(work)).await;
        drop(answer);
        while patience.hangs() {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(given_up_after(&patience).await >= ANSWER);
    }

    #[tokio::test(start_paused = true)]
    async fn work_of_any_length_is_waited_for_while_the_store_answers_and_no_longer() {
        let patience = patience(ANSWER);
        let (_answer, work) = hanging();
        let (answers, asked) = mpsc::channel();
        let (end, silence) = mpsc::channel::<()>();
        let silence = Arc::new(Mutex::new(silence));
        let is_silent = Arc::new(AtomicBool::new(false));
        let silent = Arc::clone(&is_silent);
        let begun = std::cell::Cell::new(0);
        let sign = || {
            begun.set(begun.get() + 1);
            let (silence, silent) = (Arc::clone(&silence), Arc::clone(&silent));
            let answers = answers.clone();
            move || {
                if silent.load(Ordering::SeqCst) {
                    let _ = silence.lock().unwrap().recv();
                }
                let _ = answers.send(());
                Ok(())
            }
        };
        let mut call = std::pin::pin!(patience.run_long(work, sign));
        for count in 1..=30 {
            pend(&mut call).await;
            while begun.get() < count {
                tokio::time::advance(SIGN_EVERY).await;
                pend(&mut call).await;
                // The thread of the last one may still be on its way to its end.
                std::thread::sleep(Duration::from_millis(1));
            }
            asked.recv().unwrap();
        }
        is_silent.store(true, Ordering::SeqCst);
        let failed = until_failed(call).await;
        drop(end);
        assert!(failed >= ANSWER && failed <= ANSWER + SIGN_EVERY * 3, "{failed:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_is_waited_for_shortens_no_other_wait() {
        let patience = patience(ANSWER * 2);
        let (_answer, work) = hanging();
        let first = patience.run(work);
        let second = async {
            tokio::time::advance(ANSWER).await;
            given_up_after(&patience).await
        };
        tokio::select! {
            biased;
            done = first => assert!(done.is_err()),
            given_up = second => panic!("given up after {given_up:?}"),
        }
    }
}
