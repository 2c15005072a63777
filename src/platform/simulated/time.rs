//! The time of a simulated world: stands still between processes, and runs with tokio's paused clock
//! while one does, so that a sleep of an hour costs nothing and is seen by every clock.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::clock::{Clock, Timestamp};

/// The time. One per world; processes come and go.
#[derive(Debug)]
pub(crate) struct Time {
    unix_ms: AtomicI64,
    /// When, by its own clock, the process that runs now began.
    began: Mutex<Option<Instant>>,
}

impl Time {
    pub(crate) fn new(start: Timestamp) -> Arc<Self> {
        let unix_ms = AtomicI64::new(start.as_millisecond());
        Arc::new(Self { unix_ms, began: Mutex::default() })
    }

    /// A process begins; called on its runtime, whose clock is paused.
    pub(crate) fn begin(&self) {
        *self.began.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// It is over; called on its runtime.
    pub(crate) fn end(&self) {
        let now_ms = self.now_ms();
        *self.began.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.unix_ms.store(now_ms, Ordering::Relaxed);
    }

    /// Time passes in which nothing runs.
    pub(crate) fn pass(&self, by: Duration) {
        let by_ms = i64::try_from(by.as_millis()).expect("a few days");
        self.unix_ms.fetch_add(by_ms, Ordering::Relaxed);
    }

    pub(crate) fn now_ms(&self) -> i64 {
        let began = *self.began.lock().unwrap_or_else(PoisonError::into_inner);
        let ran = began.map_or(Duration::ZERO, |began| began.elapsed());
        let ran_ms = i64::try_from(ran.as_millis()).expect("a few days");
        self.unix_ms.load(Ordering::Relaxed) + ran_ms
    }
}

/// A clock of this world; that of a host may be wrong.
#[derive(Debug)]
pub(crate) struct WorldClock {
    pub(crate) time: Arc<Time>,
    pub(crate) wrong_by_ms: i64,
}

impl Clock for WorldClock {
    fn now(&self) -> Timestamp {
        let now_ms = self.time.now_ms() + self.wrong_by_ms;
        Timestamp::from_millisecond(now_ms).expect("within a few years")
    }
}
