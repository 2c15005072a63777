//! Who may be here at once: clients in the handshake, and clients that are served.
//!
//! ```text
//!  accept ─► Lobby: the longest there makes room ─► GO: Place, or a refusal ─► requests ─► gone
//! ```
//!
//! The two do not share their places: who connects and never finishes the handshake keeps nobody
//! out who does. (Who connects anew faster than others can finish theirs does: that is for a
//! firewall.) A place is for as long as the client stays, because a guest may be idle for days;
//! only who took one and has never asked for anything since is cut off for those who wait.
//!
//! Deliberately not: making room by cutting off who is slowest or idle for longest. Nothing tells a
//! guest with a quiet disk, which would see its disk fail, from a client that only wants to be in
//! the way; who may connect is for the socket's mode and TLS to say.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::limits::{Limits, PLACE_WAIT};

/// All places of a server.
#[derive(Debug)]
pub(super) struct Places {
    lobby: Arc<Row>,
    served: Arc<Row>,
    free: Arc<Semaphore>,
    limits: Limits,
}

/// Who has places of a kind, in the order in which they came.
#[derive(Debug, Default)]
struct Row(Mutex<VecDeque<Arc<Seat>>>);

/// What others know of a client that has a place.
#[derive(Debug)]
struct Seat {
    since: Instant,
    used: AtomicBool,
    cut: CancellationToken,
}

/// A client's place; free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    seat: Arc<Seat>,
    row: Arc<Row>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Row {
    fn enter(self: &Arc<Self>, permit: Option<OwnedSemaphorePermit>) -> Place {
        let (used, cut) = (AtomicBool::new(false), CancellationToken::new());
        let seat = Arc::new(Seat { since: Instant::now(), used, cut });
        self.seats().push_back(Arc::clone(&seat));
        Place { seat, row: Arc::clone(self), _permit: permit }
    }

    fn seats(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<Seat>>> {
        // Held for a few moves, never across an await.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Places {
    pub(super) fn new(limits: Limits) -> Self {
        let free = Arc::new(Semaphore::new(limits.connections.clamp(1, Semaphore::MAX_PERMITS)));
        Self { lobby: Arc::default(), served: Arc::default(), free, limits }
    }

    /// A place to negotiate in. There always is one: where all are taken, the client that has had
    /// its own for longest is cut off.
    pub(super) fn enter(&self) -> Place {
        let place = self.lobby.enter(None);
        let seats = self.lobby.seats();
        let surplus = seats.len().saturating_sub(self.limits.handshakes.max(1));
        seats.iter().take(surplus).for_each(|seat| seat.cut.cancel());
        drop(seats);
        place
    }

    /// How many can be served at once.
    pub(super) fn count(&self) -> usize {
        self.limits.connections.max(1)
    }

    /// A place to be served in, at once or soon; `None` where none becomes free.
    pub(super) async fn take(&self) -> Option<Place> {
        let free = || Arc::clone(&self.free);
        let permit = if let Ok(permit) = free().try_acquire_owned() {
            permit
        } else {
            self.cut_unused();
            // Who leaves and comes again at once may be here before its old place is free.
            timeout(PLACE_WAIT, free().acquire_owned()).await.ok()?.expect("never closed")
        };
        Some(self.served.enter(Some(permit)))
    }

    /// Cuts off the client that has kept its place for longest without a single request, if that is
    /// longer than a handshake may take.
    fn cut_unused(&self) {
        let unused = |seat: &&Arc<Seat>| {
            let idle = !seat.used.load(Ordering::Relaxed) && !seat.cut.is_cancelled();
            idle && seat.since.elapsed() >= self.limits.handshake
        };
        if let Some(seat) = self.served.seats().iter().find(unused) {
            seat.cut.cancel();
        }
    }
}

impl Place {
    /// The client has asked for something.
    pub(super) fn mark_used(&self) {
        self.seat.used.store(true, Ordering::Relaxed);
    }

    /// Ends when the client is to make room. Cancel-safe.
    pub(super) async fn cut(&self) {
        self.seat.cut.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.row.seats().retain(|seat| !Arc::ptr_eq(seat, &self.seat));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_cut(place: &Place) -> bool {
        place.seat.cut.is_cancelled()
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_negotiated_longest_makes_room() {
        let places = Places::new(Limits { handshakes: 2, ..Limits::default() });
        let (first, second) = (places.enter(), places.enter());
        drop(places.enter());
        assert!(is_cut(&first) && !is_cut(&second));
        drop(first);
        let third = places.enter();
        assert!(!is_cut(&second) && !is_cut(&third));
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_that_was_used_is_kept_and_one_that_never_was_makes_room() {
        let places = Places::new(Limits { connections: 2, ..Limits::default() });
        let (used, unused) = (places.take().await.unwrap(), places.take().await.unwrap());
        used.mark_used();
        assert!(places.take().await.is_none());
        assert!(!is_cut(&unused), "it may be about to ask");
        tokio::time::sleep(Limits::default().handshake).await;
        assert!(places.take().await.is_none());
        assert!(is_cut(&unused) && !is_cut(&used));
        drop(unused);
        let last = places.take().await.unwrap();
        last.mark_used();
        tokio::time::sleep(Limits::default().stall * 1000).await;
        assert!(places.take().await.is_none());
        assert!(!is_cut(&used) && !is_cut(&last), "a guest may be idle for ever");
    }
}
