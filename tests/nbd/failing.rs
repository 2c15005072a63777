//! nbdkit that fails on purpose: each error is one of the command that failed, of the kind the server
//! gave it, and the connection goes on.

use std::path::Path;

use vmbackup::block::{BlockSink, BlockSource, Buffer, ByteRange, ZeroMode};
use vmbackup::error::{Kind, Result};
use vmbackup::nbd::{Client, ClientOptions, Durable, Order};

use crate::support::{Server, tempdir, writing};

/// What is done to a disk.
#[derive(Clone, Copy)]
enum Act {
    Extents,
    Read,
    Write,
    Zero,
    Trim,
    Cache,
    Flush,
}

/// What it is done to.
const OFFSET: u64 = 4096;
const LEN: usize = 8192;

fn range() -> ByteRange {
    ByteRange::new(OFFSET, LEN as u64)
}

async fn read(client: &Client) -> Result<()> {
    client.read(OFFSET, Buffer::unbudgeted(vec![7; LEN])).await.map(|_| ())
}

impl Act {
    async fn on(self, client: &Client) -> Result<()> {
        let order = match self {
            Self::Extents => return client.extents(range()).await.map(|_| ()),
            Self::Read => return read(client).await,
            Self::Flush => return client.flush().await,
            Self::Write => Order::Write(OFFSET, Buffer::unbudgeted(vec![7; LEN])),
            Self::Zero => Order::Zero(range(), ZeroMode::Sparse),
            Self::Trim => Order::Trim(range()),
            Self::Cache => Order::Cache(range()),
        };
        client.order(order, Durable::Later).await
    }
}

/// A server that fails while `trigger` is there: it works, then fails, then works.
async fn fails_for_a_while(server: &Server, trigger: &Path, act: Act, (kind, what): (Kind, &str)) {
    let client = server.writer().await;
    act.on(&client).await.unwrap();
    std::fs::write(trigger, "").unwrap();
    let error = act.on(&client).await.unwrap_err();
    assert_eq!(error.kind(), kind, "{error:?}");
    assert!(error.to_string().contains(what), "{error} does not name {what}");
    std::fs::remove_file(trigger).unwrap();
    read(&client).await.unwrap();
    act.on(&client).await.unwrap();
}

/// nbdkit with a filter that answers one command with one error.
async fn filtered(error: &str, act: Act, expected: (Kind, &str)) {
    let dir = tempdir();
    let trigger = dir.path().join("fail");
    let file = format!("error-file={}", trigger.display());
    let args = ["--filter=error", "memory", "1M", error, "error-rate=100%", &file];
    fails_for_a_while(&Server::nbdkit(&args), &trigger, act, expected).await;
}

/// One test per cell, named after its claim.
macro_rules! cells {
    ($($name:ident: $error:literal $act:ident $kind:ident $what:literal;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            filtered($error, Act::$act, (Kind::$kind, $what)).await;
        }
    )*};
}

cells! {
    what_is_not_told_is_an_error_of_the_question:
        "error-extents=EIO" Extents Io "BLOCK_STATUS of 8192 bytes at 4096: input/output error";
    what_cannot_be_read_is_an_error_of_the_read:
        "error-pread=EPERM" Read Permission "READ of 8192 bytes at 4096: not permitted";
    what_cannot_be_written_is_an_error_of_the_write:
        "error-pwrite=ENOSPC" Write NoSpace "WRITE of 8192 bytes at 4096: no space left";
    what_cannot_be_zeroed_is_an_error_of_the_zeroing:
        "error-zero=ENOSPC" Zero NoSpace "WRITE_ZEROES of 8192 bytes at 4096: no space left";
    what_cannot_be_trimmed_is_an_error_of_the_trim:
        "error-trim=EPERM" Trim Permission "TRIM of 8192 bytes at 4096: not permitted";
    what_cannot_be_cached_is_an_error_of_the_advice:
        "error-cache=ENOMEM" Cache Io "CACHE of 8192 bytes at 4096: server out of memory";
    a_server_that_goes_away_is_an_error_of_the_connection:
        "error-pread=ESHUTDOWN" Read Connection "READ of 8192 bytes at 4096: server is shutting down";
}

/// nbdkit whose disk is a script: 1 MiB of zeroes, and `method`, which fails with `errno` while the file
/// `fail` is there.
fn scripted(dir: &Path, method: &str, errno: &str, done: &str) -> Server {
    let trigger = dir.join("fail");
    let script = format!(
        "{method}=if test -e {}; then echo {errno} on purpose >&2; exit 1; fi; {done}",
        trigger.display()
    );
    let disk = [
        "get_size=echo 1M",
        "pread=dd if=/dev/zero count=$3 iflag=count_bytes status=none",
        "pwrite=cat >/dev/null",
        "can_flush=exit 0",
        "can_multi_conn=exit 0",
        &script,
    ];
    Server::nbdkit(&[&["eval"], &disk[..]].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_made_durable_is_an_error_of_the_flush() {
    let dir = tempdir();
    let server = scripted(dir.path(), "flush", "EIO", "exit 0");
    let expected = (Kind::Io, "FLUSH: input/output error");
    fails_for_a_while(&server, &dir.path().join("fail"), Act::Flush, expected).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_opened_is_an_error_and_the_next_attempt_may_succeed() {
    let dir = tempdir();
    let trigger = dir.path().join("fail");
    let server = scripted(dir.path(), "open", "EPERM", "echo handle");
    read(&server.reader().await).await.unwrap();
    std::fs::write(&trigger, "").unwrap();
    let begun = std::time::Instant::now();
    for options in [ClientOptions::default(), writing()] {
        let error = Client::open_uri(&server.uri(""), options).await.map(|_| ()).unwrap_err();
        // Whatever the reason is, nbdkit (1.32) answers GO with ERR_UNKNOWN.
        assert_eq!(error.kind(), Kind::NotFound, "{error:?}");
        assert!(error.to_string().contains("has no export ''"), "{error}");
    }
    assert!(begun.elapsed().as_secs() < 5, "it waited for something");
    std::fs::remove_file(&trigger).unwrap();
    read(&server.reader().await).await.unwrap();
}

/// Several connections would see several disks.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_promise_one_disk_to_all_gets_one_connection() {
    for (mode, expected) in [("disable", 1), ("plugin", 2)] {
        let mode = format!("multi-conn-mode={mode}");
        let server = Server::nbdkit(&["--filter=multi-conn", "memory", "1M", &mode]);
        for client in [server.reader().await, server.writer().await] {
            assert_eq!(client.connection_count(), expected, "{mode}");
            read(&client).await.unwrap();
        }
    }
}
