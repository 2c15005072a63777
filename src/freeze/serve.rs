//! The guardian's side of the line.
//!
//! ```text
//!  prepare ─► wait for an order ─► freeze ─► wait: thaw | run gone | budget over ─► thaw … ─► end
//!                   │                └ failed, or no answer in time ────────────────►┤
//!                   ├ thaw (what an earlier run left) ───────────────────────────────┘
//!                   └ run gone: end                       └ released (the run ended it itself): end
//! ```
//!
//! The thaw is tried until it succeeds or the guest is gone; it gives up after an hour, when the
//! record of the platform is all that is left. It waits on nobody: that nobody listens any more
//! changes nothing.

use std::time::Duration;

use tokio::time::Instant;

use super::line::{Ended, Line, Order, Report};
use super::{Freezable, outcome};

/// Longest the thaw is tried for. An agent that has not answered for an hour belongs to a guest
/// that hangs.
const KEEP_TRYING: Duration = Duration::from_secs(3600);
/// After so many attempts the one who waits is told that it takes longer.
const TOLD_AFTER: u32 = 3;
/// Between two attempts: first, and at most.
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Guards `guest` for the run at the other end of `line`, until nothing is left to do.
///
/// Not cancel-safe: dropped in between it leaves the guest as it is.
pub async fn serve(mut guest: Box<dyn Freezable>, mut line: Line) {
    match guest.prepare().await {
        Ok(()) => line.send(&Report::Ready).await,
        Err(reason) => {
            line.send(&Report::Unready(reason)).await;
            return;
        }
    };
    let mut freeze = Freeze { since: Instant::now(), expired: false };
    match line.receive().await {
        Some(Order::Freeze { budget_ms }) => {
            let budget = Duration::from_millis(budget_ms);
            if freeze.hold(guest.as_mut(), budget, &mut line).await == Held::Released {
                return;
            }
        }
        Some(Order::Thaw) => {}
        // Nothing was frozen, and nobody is there to ask for it.
        Some(Order::Watch(_) | Order::Release) | None => return,
    }
    freeze.end(guest.as_mut(), &mut line).await;
}

/// How a freeze that was asked for is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// It is to be thawed here.
    ToThaw,
    /// Whoever asked has ended it.
    Released,
}

/// A freeze that was asked for.
struct Freeze {
    since: Instant,
    expired: bool,
}

impl Freeze {
    /// Freezes, and returns when it is over.
    async fn hold(&mut self, guest: &mut dyn Freezable, budget: Duration, line: &mut Line) -> Held {
        // Before the freeze: a frozen guest's agent answers little else.
        let mounted = guest.file_systems().await;
        self.since = Instant::now();
        let count = match guest.freeze(budget).await {
            Ok(count) => count,
            Err(reason) => {
                line.send(&Report::NotFrozen(reason)).await;
                return Held::ToThaw;
            }
        };
        let partial = mounted.and_then(|mounted| outcome::partial(count, &mounted));
        line.send(&Report::Frozen { count, partial }).await;
        // "Thaw", nonsense, or the closing of the line: all mean that it is time.
        let told = tokio::time::timeout_at(self.since + budget, line.receive::<Order>()).await;
        self.expired = told.is_err();
        if let Ok(Some(Order::Release)) = told { Held::Released } else { Held::ToThaw }
    }

    /// Thaws until it is done.
    async fn end(&self, guest: &mut dyn Freezable, line: &mut Line) {
        let (begun, mut pause) = (Instant::now(), PAUSE);
        for attempt in 1_u32.. {
            let reason = match guest.thaw().await {
                Ok(count) => return self.report(count, line).await,
                Err(_) if guest.is_gone().await => return self.report(0, line).await,
                Err(reason) => reason,
            };
            tracing::warn!(reason, attempt, "the guest is not thawed yet");
            if attempt == TOLD_AFTER {
                line.send(&Report::Stuck(reason)).await;
            }
            if begun.elapsed() > KEEP_TRYING {
                tracing::error!("the guest could not be thawed; given up");
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn report(&self, count: u32, line: &mut Line) {
        let frozen_ms = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        line.send(&Report::Thawed(Ended { count, frozen_ms, expired: self.expired })).await;
    }
}
