//! Servers that take long over what moves no bytes, as a disk with much to write does, and clients
//! that wait for them as long as they said.

use std::time::Duration;

use vmbackup::block::{BlockSink, BlockSource, Buffer, ByteRange, ZeroMode};
use vmbackup::error::Kind;
use vmbackup::nbd::{Client, ClientOptions, Durable, Order, Timeouts};

use crate::support::{Server, writing};

/// What a server takes over each of these.
const SLOW: &str = "sleep 2";

/// A memory disk of a sort, for which everything that moves no bytes is slow.
fn server() -> Server {
    let pwrite = format!("pwrite=cat >/dev/null; case $5 in *fua*) {SLOW};; esac");
    let slow = ["flush", "zero", "trim"].map(|method| format!("{method}={SLOW}"));
    let can = ["write", "flush", "zero", "trim", "multi_conn"];
    let can = can.map(|what| format!("can_{what}=exit 0"));
    let pread = "pread=head -c $3 /dev/zero";
    let mut args = vec!["eval", "get_size=echo 1M", "can_fua=echo native", pread, &pwrite];
    args.extend(slow.iter().chain(&can).map(String::as_str));
    Server::nbdkit(&args)
}

async fn client(server: &Server, slow: Duration) -> Client {
    let timeouts = Timeouts { stall: Duration::from_millis(800), slow, ..Timeouts::default() };
    server.open(ClientOptions { timeouts, ..writing() }).await
}

fn buffer() -> Buffer {
    Buffer::unbudgeted(vec![7; 4096])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flush_may_take_longer_than_a_read() {
    let server = server();
    client(&server, Duration::from_secs(60)).await.flush().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn so_may_zeroes() {
    let server = server();
    let client = client(&server, Duration::from_secs(60)).await;
    client.zero(ByteRange::new(0, 1 << 20), ZeroMode::Sparse).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn so_may_a_trim() {
    let server = server();
    let client = client(&server, Duration::from_secs(60)).await;
    client.order(Order::Trim(ByteRange::new(0, 1 << 20)), Durable::Later).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn so_may_a_write_that_is_durable_when_it_is_answered() {
    let server = server();
    let client = client(&server, Duration::from_secs(60)).await;
    client.order(Order::Write(0, buffer()), Durable::Yes).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_flush_is_waited_for_without_end() {
    let server = server();
    let error = client(&server, Duration::from_secs(1)).await.flush().await.unwrap_err();
    assert_eq!(error.kind(), Kind::Timeout);
}

/// The plugin serves one request at a time, whichever connection it comes over.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_behind_a_flush_is_waited_for_as_long_on_any_connection() {
    let server = server();
    let client = client(&server, Duration::from_secs(60)).await;
    assert_eq!(client.connection_count(), 2);
    let later = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        client.read(0, buffer()).await.map(|_| ())
    };
    let (flushed, read) = tokio::join!(client.flush(), later);
    flushed.unwrap();
    read.unwrap();
}
