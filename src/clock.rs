//! Time as an input: the library never asks the machine for it, the faces hand a [`Clock`] in.
//!
//! Wall-clock times are for people and for the manifest (UTC). Nothing is ordered by them:
//! points are ordered by the repository, leases are judged by the store's own time stamps.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

pub use jiff::Timestamp;

/// A source of wall-clock time.
pub trait Clock: std::fmt::Debug + Send + Sync {
    /// The current time in UTC.
    fn now(&self) -> Timestamp;
}

/// The machine's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}

/// A clock that stands still until it is moved: for tests and simulation.
#[derive(Debug)]
pub struct ManualClock {
    unix_ms: AtomicI64,
}

impl ManualClock {
    /// A clock standing at `start`.
    pub fn new(start: Timestamp) -> Self {
        Self { unix_ms: AtomicI64::new(start.as_millisecond()) }
    }

    /// Sets the clock back, as an administrator or a time server does.
    pub fn step_back(&self, by: Duration) {
        let by_ms = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.unix_ms.fetch_sub(by_ms, Ordering::Relaxed);
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        let by_ms = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.unix_ms.fetch_add(by_ms, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millisecond(self.unix_ms.load(Ordering::Relaxed)).unwrap_or(Timestamp::MAX)
    }
}
