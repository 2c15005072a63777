//! Requests that are longer than 32 bits count, or nearly so: what is said of them and done with them
//! is as long as they are.
//!
//! The disk is one that a length may be right for: on a small one such a request is refused before
//! anything is computed from its length.

use std::sync::Arc;

use async_trait::async_trait;
use vmbackup::block::{
    BlockSink, BlockSource, Buffer, ByteRange, ExtentKind, ExtentMap, Geometry, ZeroMode,
};
use vmbackup::error::Result;
use vmbackup::nbd::server::{Export, Exports, Server};
use vmbackup::nbd::wire::{
    HeaderStyle, Request, STATE_HOLE, STATE_ZERO, be32, be64, chunk, command, option, reply,
};

use crate::raw::{Raw, contexts, go};
use crate::rig::limits;
use crate::witness::{Seen, Witness};

const GIB: u64 = 1 << 30;
/// The longest request that a 32-bit header can make.
const LONGEST: u64 = u32::MAX as u64;
/// The one that extended headers make here.
const LONGER: u64 = 6 * GIB;

/// 8 GiB of zeroes but for the two bytes around 4 GiB, known in steps of this many bytes.
struct Large {
    step_bytes: u64,
}

/// Flags of zeroes and of data.
const ZERO: u64 = STATE_HOLE | STATE_ZERO;
const DATA: u64 = 0;

#[async_trait]
impl BlockSource for Large {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: 8 * GIB,
            align_bytes: 1,
            preferred_bytes: 4096,
            request_bytes_max: 32 << 20,
            in_flight: 1,
        }
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        let mut map = ExtentMap::starting_at(range.offset());
        let end = range.end().min(range.offset().saturating_add(self.step_bytes));
        for (until, kind) in [
            (4 * GIB - 1, ExtentKind::Zero),
            (4 * GIB + 1, ExtentKind::Data),
            (8 * GIB, ExtentKind::Zero),
        ] {
            map.push(until.min(end).saturating_sub(map.end()), kind);
        }
        Ok(map)
    }

    async fn read(&self, _offset: u64, mut buffer: Buffer) -> Result<Buffer> {
        buffer.fill(0);
        Ok(buffer)
    }
}

#[async_trait]
impl BlockSink for Large {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(self)
    }

    async fn write(&self, _offset: u64, _buffer: Buffer) -> Result<()> {
        Ok(())
    }

    async fn zero(&self, _range: ByteRange, _mode: ZeroMode) -> Result<()> {
        Ok(())
    }

    async fn keep(&self, _range: ByteRange) -> Result<()> {
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// A session of the large disk.
struct Session {
    raw: Raw,
    style: HeaderStyle,
    disk: Arc<Witness<Large>>,
}

impl Session {
    async fn of(style: HeaderStyle, step_bytes: u64) -> Self {
        let disk = Arc::new(Witness::of(Large { step_bytes }));
        let export = Export::writable("a", Arc::clone(&disk) as _, Arc::clone(&disk) as _);
        let mut raw = Raw::to(Server::new(Exports::new([export]).unwrap(), limits())).await;
        raw.send(&3_u32.to_be_bytes()).await;
        let headers = if style == HeaderStyle::Extended {
            option::EXTENDED_HEADERS
        } else {
            option::STRUCTURED_REPLY
        };
        assert_eq!(raw.refusal(headers, &[]).await, reply::ACK);
        raw.ask(option::SET_META_CONTEXT, &contexts("a", &["base:allocation"])).await;
        raw.ask(option::GO, &go("a")).await;
        Self { raw, style, disk }
    }

    async fn ask(&mut self, command: u16, offset: u64, len: u64) -> (u16, u16, Vec<u8>) {
        let request = Request { flags: 0, command, cookie: 1, offset, len };
        self.raw.request(self.style, request).await;
        let (flags, kind, _, payload) = self.raw.chunk(self.style).await;
        (flags, kind, payload)
    }

    /// The extents of a range: their lengths and flags.
    async fn status(&mut self, offset: u64, len: u64) -> Vec<(u64, u64)> {
        let (flags, kind, payload) = self.ask(command::BLOCK_STATUS, offset, len).await;
        assert_eq!(flags, chunk::DONE);
        let extents: Vec<(u64, u64)> = if self.style == HeaderStyle::Extended {
            assert_eq!(kind, chunk::BLOCK_STATUS_EXT);
            assert_eq!(be32(&payload[4..8]) as usize, (payload.len() - 8) / 16);
            payload[8..].chunks(16).map(|e| (be64(&e[..8]), be64(&e[8..]))).collect()
        } else {
            assert_eq!(kind, chunk::BLOCK_STATUS);
            let small = |word: &[u8]| u64::from(be32(word));
            payload[4..].chunks(8).map(|e| (small(&e[..4]), small(&e[4..]))).collect()
        };
        assert!(extents.iter().all(|extent| extent.0 > 0), "{extents:?}");
        extents
    }

    /// What the disk is told by a command that succeeds.
    async fn does(&mut self, command: u16, offset: u64, len: u64) -> Vec<Seen> {
        let told = self.ask(command, offset, len).await;
        assert_eq!(told, (chunk::DONE, chunk::NONE, vec![]), "{command}: {len} bytes at {offset}");
        self.disk.seen()
    }
}

/// How far a disk may look at a time: to the end, in two steps that pass 4 GiB, in many.
const STEPS: [u64; 3] = [u64::MAX, 4 * GIB + 1, GIB - 512];

/// CVE-2025-47711 (nbdkit): an extent that reached past the largest range a client could ask about made
/// the server fail an assertion of its own, one byte too far.
#[tokio::test]
async fn cve_2025_47711_a_status_of_the_largest_length_is_within_it() {
    for step_bytes in STEPS {
        let mut session = Session::of(HeaderStyle::Structured, step_bytes).await;
        assert_eq!(session.status(0, LONGEST).await, [(LONGEST, ZERO)]);
        assert_eq!(session.status(0, LONGEST - 1).await, [(LONGEST - 1, ZERO)]);
        assert_eq!(session.status(1, LONGEST).await, [(LONGEST - 1, ZERO), (1, DATA)]);
        let behind = 4 * GIB + 1;
        assert_eq!(session.status(behind, LONGEST).await, [(LONGEST, ZERO)], "to the very end");
    }
}

#[tokio::test]
async fn a_status_of_more_than_4_gib_tells_of_all_of_it() {
    for step_bytes in STEPS {
        let mut session = Session::of(HeaderStyle::Extended, step_bytes).await;
        let expected = [(4 * GIB - 1, ZERO), (2, DATA), (2 * GIB - 1, ZERO)];
        assert_eq!(session.status(0, LONGER).await, expected);
        assert_eq!(session.status(2 * GIB, 4 * GIB).await[2], (2 * GIB - 1, ZERO));
        assert_eq!(session.status(0, 4 * GIB).await, [(4 * GIB - 1, ZERO), (1, DATA)]);
    }
}

/// CVE-2025-47712 (nbdkit): where requests were cut to blocks, a length near 2^32 overflowed and became
/// none.
#[tokio::test]
async fn cve_2025_47712_lengths_near_4_gib_do_not_overflow() {
    for (style, lengths) in [
        (HeaderStyle::Structured, &[LONGEST - 4095, LONGEST - 1, LONGEST][..]),
        (HeaderStyle::Extended, &[LONGEST, 4 * GIB, 4 * GIB + 1, LONGER][..]),
    ] {
        let mut session = Session::of(style, u64::MAX).await;
        for len in lengths.iter().copied() {
            for offset in [0, 8 * GIB - len] {
                let whole = |mode| [Seen::Zero(ByteRange::new(offset, len), mode)];
                let seen = session.does(command::WRITE_ZEROES, offset, len).await;
                assert_eq!(seen, whole(ZeroMode::Sparse));
                let seen = session.does(command::TRIM, offset, len).await;
                assert_eq!(seen, whole(ZeroMode::FastOnly));
            }
        }
    }
}

/// All of it would be a day's work for one small request.
#[tokio::test]
async fn of_what_is_to_be_cached_the_first_32_mib_are_read_in_pieces() {
    for (style, len) in [(HeaderStyle::Structured, LONGEST), (HeaderStyle::Extended, LONGER)] {
        let mut session = Session::of(style, u64::MAX).await;
        for offset in [0, 8 * GIB - len] {
            let mut at = offset;
            for seen in session.does(command::CACHE, offset, len).await {
                let Seen::Read(range) = seen else { panic!("{seen:?}") };
                assert!(range.offset() == at && range.len() <= 1 << 20, "{range} at {at}");
                at = range.end();
            }
            assert_eq!(at - offset, 32 << 20);
        }
    }
}
