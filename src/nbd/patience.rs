//! How long a client waits for a server that does not answer, and what for.
//!
//! Reads, plain writes and queries move bytes: who is silent over them for [`Timeouts::stall`] is
//! given up. FLUSH, WRITE_ZEROES, TRIM, CACHE and FUA move none while the server works, for minutes
//! where a disk or a network file system has much to write: they get [`Timeouts::slow`], and with
//! them, as long as one is in flight, everything else the client waits for on any connection, because
//! a server may answer nothing else meanwhile. TCP finds earlier that a host is gone: after two minutes by
//! its keepalives (`stream`), or, where something was sent that was not acknowledged, when it has given up
//! sending it again, for which Linux takes 15 minutes (tcp(7), `tcp_retries2`).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::wire::{command, command_flag};

/// Deadlines.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// Connecting and negotiating, together.
    pub handshake: Duration,
    /// Longest time without an answer, and with less than 64 KiB moving, while requests are in
    /// flight.
    pub stall: Duration,
    /// The same while one of them moves no bytes as the server works; `stall` if that is longer.
    pub slow: Duration,
}

impl Default for Timeouts {
    /// 30 s; 120 s, which is what a guest's own disk time-outs come to; 30 minutes, in which a hard
    /// disk (100 MB/s) writes 180 GB: more than the page cache of most servers holds.
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(30),
            stall: Duration::from_secs(120),
            slow: Duration::from_secs(30 * 60),
        }
    }
}

/// Parts of the stall time-out in which a connection looks whether it got on.
const TICKS: u32 = 8;

/// What the connections of a client share.
#[derive(Debug)]
pub(super) struct Patience {
    timeouts: Timeouts,
    /// Slow requests in flight on any of them.
    slow: AtomicUsize,
}

/// A slow request; not in flight any more when this is dropped.
#[derive(Debug)]
pub(super) struct Slow(Arc<Patience>);

impl Drop for Slow {
    fn drop(&mut self) {
        self.0.slow.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Patience {
    pub(super) fn new(timeouts: Timeouts) -> Arc<Self> {
        Arc::new(Self { timeouts, slow: AtomicUsize::new(0) })
    }

    /// Counts a request, if it is a slow one.
    pub(super) fn count(self: &Arc<Self>, command: u16, flags: u16) -> Option<Slow> {
        let slow = match command {
            command::FLUSH | command::WRITE_ZEROES | command::TRIM | command::CACHE => true,
            _ => flags & command_flag::FUA != 0,
        };
        slow.then(|| {
            self.slow.fetch_add(1, Ordering::Relaxed);
            Slow(Arc::clone(self))
        })
    }
}

/// How long one connection has been waiting in vain, in ticks.
pub(super) struct Wait<'a> {
    patience: &'a Patience,
    /// Since something moved.
    silent: u32,
    /// Since something moved and no slow request was in flight.
    stalled: u32,
}

impl<'a> Wait<'a> {
    pub(super) fn new(patience: &'a Patience) -> Self {
        Self { patience, silent: 0, stalled: 0 }
    }

    /// Waits for the next look at the connection. Cancel-safe.
    pub(super) async fn tick(&self) {
        tokio::time::sleep(self.patience.timeouts.stall / TICKS).await;
    }

    /// The connection got on, or has nothing to wait for.
    pub(super) fn progress(&mut self) {
        (self.silent, self.stalled) = (0, 0);
    }

    /// It did not; how long that has been if it is too long.
    pub(super) fn silence(&mut self) -> Option<Duration> {
        self.silent += 1;
        let slow = self.patience.slow.load(Ordering::Relaxed) > 0;
        self.stalled = if slow { 0 } else { self.stalled + 1 };
        let Timeouts { stall, slow, .. } = self.patience.timeouts;
        let silent = stall / TICKS * self.silent;
        (self.stalled >= TICKS || silent >= slow.max(stall)).then_some(silent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patience() -> Arc<Patience> {
        let second = Duration::from_secs(1);
        Patience::new(Timeouts { handshake: second, stall: 8 * second, slow: 40 * second })
    }

    /// Seconds of silence after which the connection is given up.
    fn given_up_after(wait: &mut Wait<'_>) -> u64 {
        (0..1000).find_map(|_| wait.silence()).expect("waits are bounded").as_secs()
    }

    #[test]
    fn only_what_moves_no_bytes_gets_the_long_time() {
        for (command, flags, seconds) in [
            (command::READ, 0, 8),
            (command::READ, command_flag::DF, 8),
            (command::WRITE, 0, 8),
            (command::BLOCK_STATUS, 0, 8),
            (command::WRITE, command_flag::FUA, 40),
            (command::FLUSH, 0, 40),
            (command::WRITE_ZEROES, command_flag::FAST_ZERO, 40),
            (command::TRIM, 0, 40),
            (command::CACHE, 0, 40),
        ] {
            let patience = patience();
            let _slow = patience.count(command, flags);
            assert_eq!(given_up_after(&mut Wait::new(&patience)), seconds, "{command} {flags}");
        }
    }

    #[test]
    fn when_the_slow_request_is_answered_the_others_get_the_short_time_from_then_on() {
        let patience = patience();
        let mut wait = Wait::new(&patience);
        let slow = patience.count(command::FLUSH, 0);
        assert!((0..20).all(|_| wait.silence().is_none()));
        drop(slow);
        assert_eq!(given_up_after(&mut wait), 20 + 8);
        wait.progress();
        assert_eq!(given_up_after(&mut wait), 8);
    }
}
