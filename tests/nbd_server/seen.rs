//! What requests of clients come to at the disk: which zeroes, which reads, and above all when it is
//! told to make durable what was written.

use std::sync::{Arc, Mutex};

use vmbackup::block::memory::MemoryDisk;
use vmbackup::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentMap, Geometry, ZeroMode};
use vmbackup::error::{Error, Kind, Result};
use vmbackup::nbd::server::Export;

use crate::rig::Rig;

const LEN: u64 = 1 << 20;

/// A disk that writes down what it is told, and has no fast way to make zeroes.
struct Disk {
    memory: MemoryDisk,
    seen: Mutex<Vec<Seen>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Read(ByteRange),
    Write(ByteRange),
    Zero(ByteRange, ZeroMode),
    Flush,
}

impl Disk {
    fn saw(&self, seen: Seen) {
        self.seen.lock().unwrap().push(seen);
    }

    /// What it was told since it was asked last.
    fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }
}

#[async_trait::async_trait]
impl BlockSource for Disk {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&self.memory)
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.memory.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.saw(Seen::Read(ByteRange::new(offset, buffer.len() as u64)));
        self.memory.read(offset, buffer).await
    }
}

#[async_trait::async_trait]
impl BlockSink for Disk {
    fn geometry(&self) -> Geometry {
        BlockSink::geometry(&self.memory)
    }

    fn can_zero(&self) -> bool {
        true
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        self.saw(Seen::Write(ByteRange::new(offset, buffer.len() as u64)));
        self.memory.write(offset, buffer).await
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.saw(Seen::Zero(range, mode));
        if mode == ZeroMode::FastOnly {
            return Err(Error::new(Kind::Unsupported, "zeroes are not fast here"));
        }
        self.memory.zero(range, mode).await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        self.memory.keep(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.saw(Seen::Flush);
        self.memory.flush().await
    }
}

fn rig() -> (Rig, Arc<Disk>) {
    let memory = MemoryDisk::with_content(vec![0x5a; usize::try_from(LEN).unwrap()]);
    let disk = Arc::new(Disk { memory, seen: Mutex::default() });
    let rig = Rig::new([Export::writable("", Arc::clone(&disk) as _, Arc::clone(&disk) as _)]);
    (rig, disk)
}

/// What the disk sees when libnbd runs this, with a connection `h`, and `h2` beside it.
fn sees(commands: &str) -> Vec<Seen> {
    let (rig, disk) = rig();
    let uri = rig.text("");
    let script = format!(
        "import errno, nbd\nh, h2 = nbd.NBD(), nbd.NBD()\n\
         h.connect_uri('{uri}')\nh2.connect_uri('{uri}')\n{commands}\n"
    );
    rig.run("/usr/bin/python3", &["-c", &script]);
    disk.seen()
}

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_is_made_durable_when_it_is_asked_for_and_only_then() {
    assert_eq!(sees("h.pwrite(b'x' * 512, 512)"), [Seen::Write(range(512, 512))]);
    let durable = sees("h.pwrite(b'x' * 512, 512, nbd.CMD_FLAG_FUA)");
    assert_eq!(durable, [Seen::Write(range(512, 512)), Seen::Flush]);
}

#[tokio::test(flavor = "multi_thread")]
async fn so_are_zeroes() {
    let zero = |mode| Seen::Zero(range(512, 512), mode);
    assert_eq!(sees("h.zero(512, 512)"), [zero(ZeroMode::Sparse)]);
    let durable = sees("h.zero(512, 512, nbd.CMD_FLAG_FUA)");
    assert_eq!(durable, [zero(ZeroMode::Sparse), Seen::Flush]);
}

#[tokio::test(flavor = "multi_thread")]
async fn so_is_a_trim() {
    let tried = Seen::Zero(range(512, 512), ZeroMode::FastOnly);
    assert_eq!(sees("h.trim(512, 512)"), std::slice::from_ref(&tried));
    assert_eq!(sees("h.trim(512, 512, nbd.CMD_FLAG_FUA)"), [tried, Seen::Flush]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_on_one_connection_follows_what_was_written_on_another() {
    let seen = sees("assert h.can_multi_conn()\nh.pwrite(b'x' * 512, 0)\nh2.flush()");
    assert_eq!(seen, [Seen::Write(range(0, 512)), Seen::Flush]);
}

#[tokio::test(flavor = "multi_thread")]
async fn zeroes_that_are_to_stay_allocated_are_no_holes() {
    let seen = sees("h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE)");
    assert_eq!(seen, [Seen::Zero(range(0, 4096), ZeroMode::Allocated)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fast_zero_that_would_be_slow_is_refused_as_such_and_changes_nothing() {
    let seen = sees(
        "assert h.can_fast_zero()\n\
         try:\n    h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO)\n    raise AssertionError('it went through')\n\
         except nbd.Error as e:\n    assert e.errnum == errno.ENOTSUP, str(e)\n\
         assert h.pread(4096, 0) == b'\\x5a' * 4096",
    );
    assert_eq!(
        seen,
        [Seen::Zero(range(0, 4096), ZeroMode::FastOnly), Seen::Read(range(0, 4096))],
        "and is not done slowly"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_be_cached_is_read() {
    assert_eq!(sees("h.cache(65536, 4096)"), [Seen::Read(range(4096, 65536))]);
}
