//! Many clients, some of whom only want to be in the way: nobody else is kept out, held up, or made
//! to wait for memory.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use vmbackup::block::memory::MemoryDisk;
use vmbackup::block::{BlockSource, Buffer, ByteRange, ExtentMap, Geometry};
use vmbackup::error::{Kind, Result};
use vmbackup::nbd::server::{Export, Limits};
use vmbackup::nbd::wire::{HeaderStyle, Request, command, option};
use vmbackup::nbd::{Client, ClientOptions};

use crate::raw::{LONG, Raw, go, option_bytes};
use crate::rig::{Rig, limits};

const MIB: usize = 1 << 20;

fn rig(limits: Limits) -> Rig {
    let disk = Arc::new(MemoryDisk::with_content(vec![7; 4 * MIB]));
    Rig::with_limits([Export::read_only("", disk)], limits)
}

/// A connection that says nothing.
async fn connect(rig: &Rig) -> UnixStream {
    UnixStream::connect(rig.socket()).await.unwrap()
}

/// A connection that has finished the handshake, with simple replies, and says no more.
async fn enter(rig: &Rig) -> UnixStream {
    let mut stream = connect(rig).await;
    stream.write_all(&3_u32.to_be_bytes()).await.unwrap();
    stream.write_all(&option_bytes(option::GO, &go(""))).await.unwrap();
    // Greeting, two INFO replies and the ACK.
    let mut told = vec![0; 18 + (20 + 14) + (20 + 12) + 20];
    let read = tokio::time::timeout(LONG, stream.read_exact(&mut told)).await;
    read.expect("in time").expect("the server answers");
    stream
}

async fn ask(stream: &mut UnixStream, len: u64) {
    let mut bytes = Vec::new();
    let request = Request { flags: 0, command: command::READ, cookie: 1, offset: 0, len };
    request.encode(HeaderStyle::Simple, &mut bytes);
    stream.write_all(&bytes).await.unwrap();
}

async fn open(rig: &Rig) -> Result<Client> {
    let options = ClientOptions { connections: 1, ..ClientOptions::default() };
    let opening = Client::open_uri(&rig.uri(""), options).await;
    if let Ok(client) = &opening {
        let read = client.read(0, Buffer::unbudgeted(vec![0; 4096])).await.unwrap();
        assert!(read.iter().all(|byte| *byte == 7));
    }
    opening
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_never_finish_the_handshake_keep_nobody_out() {
    let rig = rig(Limits { connections: 4, handshakes: 8, ..limits() });
    let begun = std::time::Instant::now();
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(connect(&rig).await);
    }
    for _ in 0..4 {
        open(&rig).await.unwrap();
    }
    // Those that came first made room.
    let mut rest = Vec::new();
    let ended = tokio::time::timeout(LONG, silent[0].read_to_end(&mut rest)).await;
    let _ = ended.expect("it is cut off");
    assert!(begun.elapsed() < limits().handshake * 3 / 4, "before its time");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_never_make_a_request_make_room_and_idle_ones_stay() {
    let short = Duration::from_millis(1500);
    let rig = rig(Limits { connections: 3, handshake: short, ..limits() });
    let mut guest = enter(&rig).await;
    ask(&mut guest, 512).await;
    let mut reply = vec![0; 16 + 512];
    guest.read_exact(&mut reply).await.unwrap();
    let unused = [enter(&rig).await, enter(&rig).await];
    // They may be about to ask.
    let full = open(&rig).await.err().expect("all places are taken");
    assert_eq!(full.kind(), Kind::Permission, "{full:?}");
    assert!(full.to_string().contains("all 3 places are taken"), "{full}");
    tokio::time::sleep(short).await;
    let newcomers = [open(&rig).await.unwrap(), open(&rig).await.unwrap()];
    for mut cut in unused {
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(LONG, cut.read_to_end(&mut rest)).await.expect("cut off");
    }
    // Idle for as long as it likes, because it has been used.
    tokio::time::sleep(short * 2).await;
    assert!(open(&rig).await.is_err(), "nobody is cut off for being idle");
    ask(&mut guest, 512).await;
    guest.read_exact(&mut reply).await.unwrap();
    drop(newcomers);
    open(&rig).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_fetch_no_replies_hold_up_nobody() {
    let least = Limits { connections: 8, total_bytes: 64 * MIB, ..limits() };
    let rig = rig(least);
    let mut greedy = Vec::new();
    for _ in 0..7 {
        let mut stream = enter(&rig).await;
        for _ in 0..32 {
            ask(&mut stream, 4 * MIB as u64).await;
        }
        greedy.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = std::time::Instant::now();
    let client = open(&rig).await.unwrap();
    for _ in 0..50 {
        client.read(0, Buffer::unbudgeted(vec![0; MIB])).await.unwrap();
    }
    assert!(begun.elapsed() < least.stall / 2, "it did not wait until they were cut off");
}

#[tokio::test]
async fn a_client_that_drips_its_payload_is_cut_off() {
    let short = Limits { stall: Duration::from_millis(400), ..limits() };
    let mut raw = Raw::connect(short).await;
    raw.send(&3_u32.to_be_bytes()).await;
    raw.enter(HeaderStyle::Structured).await;
    let write = Request { flags: 0, command: command::WRITE, cookie: 1, offset: 0, len: 4096 };
    raw.request(HeaderStyle::Structured, write).await;
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if raw.session.is_finished() || raw.stream.write_all(&[1]).await.is_err() {
            return raw.breaks("in the middle of a payload").await;
        }
    }
    panic!("it was served for ten times the stall time-out");
}

#[tokio::test]
async fn a_client_that_sips_its_reply_is_cut_off() {
    let short = Limits { stall: Duration::from_millis(400), ..limits() };
    let mut raw = Raw::connect(short).await;
    raw.send(&3_u32.to_be_bytes()).await;
    raw.enter(HeaderStyle::Structured).await;
    let read = Request { flags: 0, command: command::READ, cookie: 1, offset: 0, len: 1 << 20 };
    raw.request(HeaderStyle::Structured, read).await;
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        raw.read(1).await;
        if raw.session.is_finished() {
            return raw.breaks("in the middle of a reply").await;
        }
    }
    panic!("it was served for ten times the stall time-out");
}

/// A disk that is not read before the gate has room for it, as on storage that hangs.
struct Gated {
    disk: MemoryDisk,
    gate: Arc<Semaphore>,
}

#[async_trait]
impl BlockSource for Gated {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&self.disk)
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.disk.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.gate.acquire().await.unwrap().forget();
        self.disk.read(offset, buffer).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_is_taken_until_the_last_request_of_its_client_gave_its_memory_back() {
    let gate = Arc::new(Semaphore::new(0));
    let disk = MemoryDisk::with_content(vec![7; 4 * MIB]);
    let export = Export::read_only("", Arc::new(Gated { disk, gate: Arc::clone(&gate) }));
    let drain = Duration::from_millis(200);
    let rig = Rig::with_limits([export], Limits { connections: 1, drain, ..limits() });
    let mut gone = enter(&rig).await;
    ask(&mut gone, 1 << 20).await;
    ask(&mut gone, 1 << 20).await;
    drop(gone);
    // Its session is over: the drain was.
    tokio::time::sleep(5 * drain).await;
    let full = open(&rig).await.err().expect("storage holds what it asked for still");
    assert!(full.to_string().contains("all 1 places are taken"), "{full}");
    gate.add_permits(1);
    tokio::time::sleep(drain).await;
    assert!(open(&rig).await.is_err(), "one of two is there still");
    gate.add_permits(2);
    // As soon as the other has been answered.
    let place = async {
        while open(&rig).await.is_err() {
            tokio::time::sleep(drain / 10).await;
        }
    };
    tokio::time::timeout(LONG, place).await.expect("the place is free again");
}

#[tokio::test(start_paused = true)]
async fn stopping_takes_one_drain_whatever_a_client_is_in_the_middle_of() {
    let (stall, drain) = (Duration::from_secs(1000), Duration::from_secs(10));
    let style = HeaderStyle::Structured;
    let mut raw = Raw::connect(Limits { stall, drain, ..limits() }).await;
    raw.send(&3_u32.to_be_bytes()).await;
    raw.enter(style).await;
    let ask = |command, len| Request { flags: 0, command, cookie: 1, offset: 0, len };
    // A reply that is not fetched, and a payload that does not come.
    raw.request(style, ask(command::READ, 1 << 20)).await;
    raw.request(style, ask(command::WRITE, 4096)).await;
    raw.send(&[1; 100]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = tokio::time::Instant::now();
    raw.server.stop();
    let error = raw.session.await.unwrap().expect_err("it was cut off");
    assert_eq!(error.kind(), Kind::Timeout, "{error:?}");
    let taken = begun.elapsed();
    assert!(taken >= drain && taken < drain + Duration::from_secs(1), "{taken:?}");
}
