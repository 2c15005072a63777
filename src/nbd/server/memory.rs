//! What the clients of a server may hold of its memory, all together.
//!
//! ```text
//!  request ─► share of the connection's cap ─► its own reserve, else the pool of all ─► buffer
//! ```
//!
//! A part of the whole belongs to each connection alone, so that requests of usual size go on
//! whatever other clients do with theirs; the rest is a pool that is given out in the order of
//! asking. Who holds memory waits for none: a request gets all of its own before it begins, and a
//! client that does not fetch its replies is cut off ([`Limits::stall`]).

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::limits::{Limits, PAYLOAD_BYTES_MAX, RESERVE_BYTES_MIN};
use crate::block::{Budget, Buffer, Share};

/// The unit of the cap, so that its permits fit.
const UNIT_BYTES: usize = 4096;

/// The memory of a server.
#[derive(Debug)]
pub(super) struct Memory {
    pool: Budget,
    reserve_bytes: usize,
    cap_bytes: usize,
}

/// Bytes of each connection's reserve, and of the pool.
pub(super) fn parts(limits: &Limits) -> (usize, usize) {
    let Limits { connections, connection_bytes, total_bytes, .. } = *limits;
    let connections = connections.max(1);
    let fair_bytes = total_bytes / 2 / connections;
    let reserve_bytes = fair_bytes.min(connection_bytes).max(RESERVE_BYTES_MIN);
    // The largest request has to fit.
    let largest = usize::try_from(PAYLOAD_BYTES_MAX).expect("32 MiB");
    let pool_bytes = total_bytes.saturating_sub(reserve_bytes * connections).max(largest);
    (reserve_bytes, pool_bytes)
}

impl Memory {
    pub(super) fn new(limits: &Limits) -> Self {
        let (reserve_bytes, pool_bytes) = parts(limits);
        let pool = Budget::new(pool_bytes);
        Self { pool, reserve_bytes, cap_bytes: limits.connection_bytes }
    }

    /// The part of a connection.
    pub(super) fn of_connection(&self) -> Allowance {
        let units = self.cap_bytes.div_ceil(UNIT_BYTES).clamp(1, Semaphore::MAX_PERMITS);
        Allowance {
            cap: Arc::new(Semaphore::new(units)),
            units: u32::try_from(units).unwrap_or(u32::MAX),
            reserve: Budget::new(self.reserve_bytes),
            reserve_bytes: self.reserve_bytes,
            pool: self.pool.clone(),
        }
    }
}

/// What a request holds until its reply is written.
#[derive(Debug)]
pub(super) struct Held {
    /// Its place among the requests of the connection.
    _place: OwnedSemaphorePermit,
    /// Its share of the connection's cap.
    pub(super) cap: Option<OwnedSemaphorePermit>,
    /// Its share of the memory, where that has not come with a buffer.
    pub(super) memory: Option<Share>,
}

impl Held {
    pub(super) fn new(place: OwnedSemaphorePermit) -> Self {
        Self { _place: place, cap: None, memory: None }
    }
}

/// What one connection may hold.
pub(super) struct Allowance {
    cap: Arc<Semaphore>,
    units: u32,
    reserve: Budget,
    reserve_bytes: usize,
    pool: Budget,
}

impl Allowance {
    /// A share of the connection's cap for a request that will hold `bytes`; one larger than the
    /// whole cap waits until it is alone.
    pub(super) async fn share(&self, bytes: usize) -> OwnedSemaphorePermit {
        let units = u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX);
        let units = units.min(self.units);
        Arc::clone(&self.cap).acquire_many_owned(units).await.expect("never closed")
    }

    /// A share of the memory, for whoever has one of the cap.
    pub(super) async fn hold(&self, len: usize) -> Share {
        if len > self.reserve_bytes {
            return self.pool.share(len).await;
        }
        tokio::select! {
            biased;
            own = self.reserve.share(len) => own,
            shared = self.pool.share(len) => shared,
        }
    }

    /// A buffer, for whoever has a share of the cap for it.
    pub(super) async fn take(&self, len: usize) -> Buffer {
        self.hold(len).await.into_buffer(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const MIB: usize = 1 << 20;

    fn limits() -> Limits {
        Limits {
            connections: 64,
            connection_bytes: 16 * MIB,
            total_bytes: 256 * MIB,
            ..Limits::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn all_connections_together_hold_no_more_than_the_whole() {
        let memory = Memory::new(&limits());
        let connections: Vec<_> = (0..64).map(|_| memory.of_connection()).collect();
        let soon = Duration::from_secs(1);
        let mut held = Vec::new();
        for connection in &connections {
            while let Ok(buffer) = tokio::time::timeout(soon, async {
                (connection.share(MIB).await, connection.take(MIB).await)
            })
            .await
            {
                held.push(buffer);
            }
        }
        assert_eq!(held.len(), 256);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_has_its_reserve_whatever_the_others_hold() {
        let memory = Memory::new(&limits());
        let greedy: Vec<_> = (0..63).map(|_| memory.of_connection()).collect();
        let mut held = Vec::new();
        for connection in &greedy {
            let taken =
                async { (connection.share(16 * MIB).await, connection.take(16 * MIB).await) };
            let soon = tokio::time::timeout(Duration::from_secs(1), taken).await;
            held.extend(soon.ok());
        }
        assert_eq!(held.len(), 8, "the pool is spent");
        let modest = memory.of_connection();
        let _share = modest.share(2 * MIB).await;
        assert_eq!(modest.take(2 * MIB).await.len(), 2 * MIB);
    }

    #[tokio::test(start_paused = true)]
    async fn one_connection_holds_no_more_than_its_cap_and_the_largest_request_gets_through() {
        let memory = Memory::new(&limits());
        let one = memory.of_connection();
        let held = one.share(16 * MIB).await;
        let more = tokio::time::timeout(Duration::from_secs(1), one.share(1)).await;
        assert!(more.is_err());
        drop(held);
        let _share = one.share(32 * MIB).await;
        assert_eq!(one.take(32 * MIB).await.len(), 32 * MIB);
    }
}
