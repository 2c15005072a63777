//! Everything a client can make us hold or wait for, with a name and a number.

use std::time::Duration;

use crate::error::{Error, Kind, Result};
use crate::nbd::wire;
use crate::units::ByteSize;

/// Largest payload of a READ or WRITE: what every client may assume without asking (proto.md,
/// "Block size constraints").
pub(super) const PAYLOAD_BYTES_MAX: u64 = wire::PAYLOAD_BYTES_DEFAULT;

/// A payload that is too large is still read and thrown away up to this length, so that the client
/// gets an answer; beyond it the session ends (nbdkit does the same at twice its limit).
pub(super) const PAYLOAD_BYTES_SKIPPED_MAX: u64 = 2 * PAYLOAD_BYTES_MAX;

/// Longest option that is looked at: a meta context option with a dozen names of full length.
pub(super) const OPTION_BYTES_MAX: usize = 64 << 10;

/// Longest option that is read and thrown away with an answer (QEMU's `NBD_MAX_BUFFER_SIZE`).
pub(super) const OPTION_BYTES_SKIPPED_MAX: usize = 32 << 20;

/// Most options of one session. A client that looks at a thousand exports one by one needs these.
pub(super) const OPTIONS_MAX: usize = 4096;

/// Most exports of a server.
pub(super) const EXPORTS_MAX: usize = 1000;

/// Most extents in a reply per context: 128 KiB with extended headers.
pub(super) const EXTENTS_MAX: usize = 8192;

/// Most questions to a source for one reply, each of which may be answered by a short prefix.
pub(super) const EXTENT_CALLS_MAX: usize = 256;

/// How long a client waits, while it negotiates, for an answer it can do without.
pub(super) const STATE_WAIT: Duration = Duration::from_secs(1);

/// How long a client waits to hear whether a disk has grown; then it gets the size that was known.
pub(super) const GROWTH_WAIT: Duration = Duration::from_secs(3);

/// How much of a CACHE request is read ahead; the rest is advice not taken.
pub(super) const CACHE_BYTES_MAX: u64 = 32 << 20;

/// Runs of zeroes are found, and left out of replies, at this granularity.
pub(super) const ZERO_RUN_BYTES: usize = 32 << 10;

/// CACHE reads ahead in pieces of this size.
pub(super) const CACHE_PIECE_BYTES: u64 = 1 << 20;

/// What an extent of a reply takes, as it is found and as it is sent.
pub(super) const EXTENT_BYTES: usize = 32;

/// Smallest part of the memory that belongs to a connection alone: requests of file systems fit.
pub(super) const RESERVE_BYTES_MIN: usize = 64 << 10;

/// How long a client that finds all places taken waits for one. Clients of ours, which wait 3 s for
/// a connection beyond the first, go on with fewer.
pub(super) const PLACE_WAIT: Duration = Duration::from_secs(1);

/// How long requests are still taken, to be refused, once the server stops.
pub(super) const STOP_GRACE: Duration = Duration::from_millis(500);

/// What a server grants its clients.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Clients served at once. One more is refused, unless one of them has never made a request:
    /// that one is cut off. A client that is idle between requests may be so for ever.
    pub connections: usize,
    /// Clients in the handshake at once. One more takes the place of the one that is longest there.
    pub handshakes: usize,
    /// Requests in progress on one connection; further ones are not read until one is answered.
    pub requests: u16,
    /// Bytes of requests in progress on one connection (one request always gets through).
    pub connection_bytes: usize,
    /// Bytes of requests in progress on all connections. Half of it is divided among them, so that
    /// no client can starve another; the rest goes to whoever asks first. At least 32 MiB more than
    /// the parts, so that the largest request gets through ([`Limits::check`]).
    pub total_bytes: usize,
    /// From the first byte to the end of the handshake.
    pub handshake: Duration,
    /// Longest time in which too little moves in the middle of a request or of a reply: less than
    /// 64 KiB, less than a sixteenth of it where that is more, or not the rest where that is less.
    pub stall: Duration,
    /// Longest time that requests in progress get once the server stops (and half a second, in
    /// which further ones are refused) or the client has left.
    pub drain: Duration,
}

impl Limits {
    /// Least [`Limits::total_bytes`] for this many connections: two of the largest requests, or
    /// room for one of them beside a part for each connection that is of use; in whole MiB.
    pub fn total_bytes_min(connections: usize) -> usize {
        const MIB: usize = 1 << 20;
        let largest = usize::try_from(PAYLOAD_BYTES_MAX).expect("32 MiB");
        let parts = RESERVE_BYTES_MIN.saturating_mul(connections.max(1));
        largest.saturating_add(parts.max(largest)).div_ceil(MIB).saturating_mul(MIB)
    }

    /// Refuses limits that could not be kept: with less memory than this the parts of the
    /// connections would be more than the whole. [`Server`](super::Server) does not ask: it keeps
    /// to the least.
    pub fn check(&self) -> Result<()> {
        let least = Self::total_bytes_min(self.connections);
        if self.total_bytes >= least {
            return Ok(());
        }
        let shown = |bytes: usize| ByteSize(bytes as u64);
        let message = format!(
            "{} clients at once cannot share {} for their requests: they need {}",
            self.connections,
            shown(self.total_bytes),
            shown(least)
        );
        Err(Error::new(Kind::Usage, message))
    }
}

impl Default for Limits {
    /// 64 connections, 128 handshakes; 64 requests in 16 MiB each (what nbdcopy keeps in flight by
    /// default), in 256 MiB together; 10 s (QEMU's `handshake-max-seconds`); 60 s; 30 s.
    fn default() -> Self {
        Self {
            connections: 64,
            handshakes: 128,
            requests: 64,
            connection_bytes: 16 << 20,
            total_bytes: 256 << 20,
            handshake: Duration::from_secs(10),
            stall: Duration::from_secs(60),
            drain: Duration::from_secs(30),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::server::memory::parts;

    #[test]
    fn limits_that_could_not_be_kept_are_refused_and_all_others_are_kept() {
        for connections in [1, 2, 63, 64, 511, 512, 513, 1000, 65535] {
            let least = Limits::total_bytes_min(connections);
            assert!(least >= 64 << 20);
            for total_bytes in [least, least + 1, 2 * least, 8 << 30] {
                let limits = Limits { connections, total_bytes, ..Limits::default() };
                limits.check().unwrap();
                let (reserve_bytes, pool_bytes) = parts(&limits);
                let held = reserve_bytes * connections + pool_bytes;
                assert!(held <= total_bytes, "{connections}, {total_bytes}: {held}");
            }
            let limits = Limits { connections, total_bytes: least - 1, ..Limits::default() };
            assert_eq!(limits.check().unwrap_err().kind(), Kind::Usage);
        }
    }
}
