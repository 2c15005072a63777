//! Clients that break the protocol: an error or a disconnect with the rule named, each time; never a
//! crash, a hang, or memory for what a length only claims.
//!
//! Where a rule stands for a hole somebody once had, its CVE is named.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use vmbackup::block::memory::MemoryDisk;
use vmbackup::block::{BlockSource, Buffer, ByteRange, ExtentMap, Geometry};
use vmbackup::error::Result;
use vmbackup::nbd::server::{Export, Limits};
use vmbackup::nbd::wire::{
    self, HeaderStyle, Request, be32, be64, chunk, command, command_flag, errno, option, reply,
};
use vmbackup::nbd::{Client, ClientOptions};

use crate::raw::{Raw, SIZE, contexts, go, option_bytes, option_header, string};
use crate::rig::{Rig, limits};

const STRUCTURED: HeaderStyle = HeaderStyle::Structured;
const EXTENDED: HeaderStyle = HeaderStyle::Extended;

fn ask(command: u16, flags: u16, offset: u64, len: u64) -> Request {
    Request { flags, command, cookie: 1, offset, len }
}

// Handshake

#[tokio::test]
async fn unknown_options_are_consumed_and_refused() {
    let mut raw = Raw::haggling().await;
    for option in [4, 12, 99, u32::MAX] {
        assert_eq!(raw.refusal(option, &[7; 300]).await, reply::UNSUP);
    }
    raw.enter(STRUCTURED).await;
    raw.lives(STRUCTURED).await;
}

#[tokio::test]
async fn unknown_client_flags_end_the_session() {
    for flags in [4_u32, 0x8000_0003, u32::MAX] {
        let mut raw = Raw::connect(limits()).await;
        raw.send(&flags.to_be_bytes()).await;
        raw.breaks("were not offered").await;
    }
}

#[tokio::test]
async fn a_wrong_option_magic_ends_the_session() {
    let mut raw = Raw::haggling().await;
    raw.send(&[0x41; 16]).await;
    raw.breaks("is not the magic of an option").await;
}

/// CVE-2017-15119 (QEMU): an option of 4 GiB made the server read and hold it.
#[tokio::test]
async fn cve_2017_15119_a_huge_option_is_not_held() {
    let mut raw = Raw::haggling().await;
    raw.send(&option_header(option::LIST, u32::MAX)).await;
    raw.breaks("option 3 of 4294967295 bytes").await;
    // One that is merely too long is read past and refused.
    let mut raw = Raw::haggling().await;
    raw.send(&option_header(99, 1 << 20)).await;
    for _ in 0..16 {
        raw.send(&vec![0; 65536]).await;
    }
    assert_eq!(raw.replies(99).await[0].0, reply::TOO_BIG);
    raw.enter(STRUCTURED).await;
}

/// CVE-2017-15118 (QEMU) and CVE-2022-26496 (nbd-server): a long export name in INFO or GO smashed
/// the stack.
#[tokio::test]
async fn cve_2017_15118_and_cve_2022_26496_a_long_export_name_is_refused() {
    let mut raw = Raw::haggling().await;
    for option in [option::INFO, option::GO] {
        let name = "x".repeat(5000);
        assert_eq!(raw.refusal(option, &go(&name)).await, reply::INVALID);
        assert_eq!(raw.refusal(option, &go(&name[..4096])).await, reply::UNKNOWN);
    }
    raw.enter(STRUCTURED).await;
}

/// CVE-2022-26495 (nbd-server): a name length of 0xffffffff, plus one for the end, became a buffer of
/// no bytes.
#[tokio::test]
async fn cve_2022_26495_a_name_length_that_wraps_is_refused() {
    let mut raw = Raw::haggling().await;
    for option in [option::INFO, option::GO] {
        for len in [u32::MAX, u32::MAX - 1, 1 << 31, 5] {
            let payload = [&len.to_be_bytes()[..], b"abcd\0\0"].concat();
            assert_eq!(raw.refusal(option, &payload).await, reply::INVALID);
        }
    }
    raw.send(&option_header(option::EXPORT_NAME, u32::MAX)).await;
    raw.breaks("option 1 of 4294967295 bytes").await;
}

/// CVE-2020-10761 (QEMU): an error text that quoted the client became longer than a string may be.
#[tokio::test]
async fn cve_2020_10761_an_error_text_is_never_too_long() {
    let mut raw = Raw::haggling().await;
    let name = "x".repeat(4096);
    raw.ask(option::STRUCTURED_REPLY, &[]).await;
    for (option, payload) in [
        (option::GO, go(&name)),
        (option::INFO, go(&name)),
        (option::SET_META_CONTEXT, contexts(&name, &[&name])),
        (option::LIST_META_CONTEXT, contexts(&name, &[])),
    ] {
        let told = raw.ask(option, &payload).await;
        assert_eq!(told[0].0, reply::UNKNOWN);
        assert!(told[0].1.len() < 400, "{} bytes", told[0].1.len());
    }
}

/// CVE-2019-14851 (nbdkit): options in an unexpected order met an assertion.
#[tokio::test]
async fn cve_2019_14851_options_in_any_order_and_number_are_answered() {
    let mut raw = Raw::haggling().await;
    let choice = contexts("a", &["base:allocation"]);
    assert_eq!(raw.refusal(option::SET_META_CONTEXT, &choice).await, reply::INVALID);
    assert_eq!(raw.ask(option::INFO, &go("a")).await.last().unwrap().0, reply::ACK);
    raw.ask(option::STRUCTURED_REPLY, &[]).await;
    assert_eq!(raw.refusal(option::STRUCTURED_REPLY, &[]).await, reply::INVALID);
    assert_eq!(raw.ask(option::SET_META_CONTEXT, &choice).await.len(), 2);
    assert_eq!(raw.ask(option::EXTENDED_HEADERS, &[]).await[0].0, reply::ACK);
    assert_eq!(raw.refusal(option::EXTENDED_HEADERS, &[]).await, reply::INVALID);
    assert_eq!(raw.refusal(option::STRUCTURED_REPLY, &[]).await, reply::EXT_HEADER_REQD);
    let told = raw.ask(option::INFO, &go("b")).await;
    assert_eq!(told, raw.ask(option::INFO, &go("b")).await, "INFO says the same every time");
    assert_eq!(told, raw.ask(option::GO, &go("b")).await, "and so does GO");
    // The contexts were chosen for "a".
    raw.request(EXTENDED, ask(command::BLOCK_STATUS, 0, 0, 512)).await;
    assert_eq!(raw.errno(EXTENDED).await, errno::EINVAL);
}

#[tokio::test]
async fn starttls_without_credentials_is_refused_and_changes_nothing() {
    let mut raw = Raw::haggling().await;
    assert_eq!(raw.refusal(option::STARTTLS, &[]).await, reply::POLICY);
    raw.enter(EXTENDED).await;
    raw.lives(EXTENDED).await;
}

/// CVE-2024-7409 (QEMU): clients that stalled in the handshake crashed a server that stopped.
#[tokio::test]
async fn cve_2024_7409_a_client_that_stalls_in_the_handshake_does_not_keep_the_server() {
    let mut raw = Raw::haggling().await;
    raw.send(&option_header(option::GO, 100)[..7]).await;
    raw.server.stop();
    raw.end().await.unwrap();
}

#[tokio::test]
async fn a_slow_handshake_ends_at_its_deadline() {
    let short = Limits { handshake: Duration::from_millis(200), ..limits() };
    let raw = Raw::connect(short).await;
    raw.breaks("the handshake").await;
    let mut raw = Raw::connect(short).await;
    for byte in [&3_u32.to_be_bytes()[..], &option_header(option::LIST, 60000)].concat() {
        raw.send(&[byte]).await;
    }
    raw.breaks("the handshake").await;
}

#[tokio::test]
async fn options_without_end_end_the_session() {
    let mut raw = Raw::haggling().await;
    for _ in 0..4096 {
        assert_eq!(raw.refusal(99, &[]).await, reply::UNSUP);
    }
    raw.breaks("more than 4096 options").await;
}

#[tokio::test]
async fn payloads_where_none_belongs_are_refused() {
    let mut raw = Raw::haggling().await;
    for option in [option::LIST, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS] {
        assert_eq!(raw.refusal(option, &[1]).await, reply::INVALID);
    }
    let trailing = [&go("a")[..], &[0]].concat();
    assert_eq!(raw.refusal(option::GO, &trailing).await, reply::INVALID);
    assert_eq!(raw.refusal(option::GO, &string("a")).await, reply::INVALID);
    raw.enter(STRUCTURED).await;
}

#[tokio::test]
async fn a_huge_number_of_meta_contexts_is_neither_believed_nor_repeated() {
    let mut raw = Raw::haggling().await;
    raw.ask(option::STRUCTURED_REPLY, &[]).await;
    let mut lie = string("a");
    lie.extend(u32::MAX.to_be_bytes());
    assert_eq!(raw.refusal(option::SET_META_CONTEXT, &lie).await, reply::INVALID);
    let many = vec!["base:allocation"; 3000];
    let told = raw.ask(option::SET_META_CONTEXT, &contexts("a", &many)).await;
    assert_eq!(told.len(), 2, "one context and the ACK");
    let told = raw.ask(option::LIST_META_CONTEXT, &contexts("a", &vec![""; 10_000])).await;
    assert_eq!(told.len(), 1);
}

#[tokio::test]
async fn a_failed_choice_of_contexts_replaces_the_one_before() {
    let mut raw = Raw::haggling().await;
    raw.ask(option::STRUCTURED_REPLY, &[]).await;
    raw.ask(option::SET_META_CONTEXT, &contexts("a", &["base:allocation"])).await;
    assert_eq!(raw.refusal(option::SET_META_CONTEXT, &string("a")).await, reply::INVALID);
    raw.ask(option::GO, &go("a")).await;
    raw.request(STRUCTURED, ask(command::BLOCK_STATUS, 0, 0, 512)).await;
    assert_eq!(raw.errno(STRUCTURED).await, errno::EINVAL);
}

#[tokio::test]
async fn plain_newstyle_clients_get_an_export_and_nothing_else() {
    for (flags, padding) in [(0_u32, 124), (2, 0)] {
        let mut raw = Raw::connect(limits()).await;
        raw.send(&flags.to_be_bytes()).await;
        raw.send(&option_bytes(option::EXPORT_NAME, b"b")).await;
        let data = raw.read(10 + padding).await;
        assert_eq!(be64(&data[..8]), SIZE);
        assert!(data[10..].iter().all(|byte| *byte == 0));
        raw.request(HeaderStyle::Simple, ask(command::READ, 0, 4096, 512)).await;
        let header = raw.read(16 + 512).await;
        assert_eq!((be32(&header[..4]), be32(&header[4..8])), (wire::REPLY_SIMPLE, 0));
        assert!(header[16..].iter().all(|byte| *byte == 0x5a));
    }
    let mut raw = Raw::connect(limits()).await;
    raw.send(&0_u32.to_be_bytes()).await;
    raw.send(&option_bytes(option::LIST, &[])).await;
    raw.breaks("without fixed newstyle").await;
}

#[tokio::test]
async fn export_name_after_extended_headers_or_of_nothing_ends_the_session() {
    let mut raw = Raw::haggling().await;
    raw.ask(option::EXTENDED_HEADERS, &[]).await;
    raw.send(&option_bytes(option::EXPORT_NAME, b"a")).await;
    raw.breaks("EXPORT_NAME after EXTENDED_HEADERS").await;
    let mut raw = Raw::haggling().await;
    raw.send(&option_bytes(option::EXPORT_NAME, b"c")).await;
    raw.breaks("no export 'c'").await;
}

#[tokio::test]
async fn abort_is_acknowledged_and_ends_well() {
    let mut raw = Raw::haggling().await;
    assert_eq!(raw.refusal(option::ABORT, &[]).await, reply::ACK);
    raw.end().await.unwrap();
}

// Transmission

#[tokio::test]
async fn a_wrong_request_magic_ends_the_session() {
    for (style, other) in [(STRUCTURED, EXTENDED), (EXTENDED, STRUCTURED)] {
        let mut raw = Raw::transmitting(style).await;
        raw.request(other, ask(command::READ, 0, 0, 512)).await;
        raw.send(&[0; 4]).await;
        raw.breaks("is not the magic of a request").await;
    }
}

#[tokio::test]
async fn requests_past_the_end_are_refused_and_the_session_goes_on() {
    for style in [STRUCTURED, EXTENDED] {
        let mut raw = Raw::transmitting(style).await;
        for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 510, 512)] {
            raw.request(style, ask(command::READ, 0, offset, len)).await;
            assert_eq!(raw.errno(style).await, errno::EINVAL);
            raw.request(style, ask(command::WRITE_ZEROES, 0, offset, len)).await;
            assert_eq!(raw.errno(style).await, errno::ENOSPC);
            raw.request(style, ask(command::BLOCK_STATUS, 0, offset, len)).await;
            assert_eq!(raw.errno(style).await, errno::EINVAL);
        }
        raw.lives(style).await;
    }
}

#[tokio::test]
async fn lengths_of_64_bits_take_no_memory() {
    let mut raw = Raw::transmitting(EXTENDED).await;
    for command in [command::READ, command::TRIM, command::CACHE, command::BLOCK_STATUS] {
        for len in [u64::MAX, 1 << 63, SIZE + 1] {
            raw.request(EXTENDED, ask(command, 0, 0, len)).await;
            assert_eq!(raw.errno(EXTENDED).await, errno::EINVAL);
        }
    }
    raw.lives(EXTENDED).await;
}

#[tokio::test]
async fn the_payload_of_a_refused_write_is_consumed() {
    for style in [STRUCTURED, EXTENDED] {
        let mut raw = Raw::transmitting(style).await;
        raw.request(style, ask(command::WRITE, 0, SIZE, 4096)).await;
        raw.send(&[0x25; 4096]).await;
        assert_eq!(raw.errno(style).await, errno::ENOSPC);
        raw.request(style, ask(command::WRITE, command_flag::DF, 0, 4096)).await;
        raw.send(&[0x25; 4096]).await;
        assert_eq!(raw.errno(style).await, errno::EINVAL);
        raw.lives(style).await;
    }
}

#[tokio::test]
async fn a_payload_far_beyond_the_limit_ends_the_session() {
    let mut raw = Raw::transmitting(STRUCTURED).await;
    raw.request(STRUCTURED, ask(command::WRITE, 0, 0, u32::MAX.into())).await;
    raw.breaks("a payload of 4294967295 bytes").await;
    let mut raw = Raw::transmitting(EXTENDED).await;
    raw.request(EXTENDED, ask(command::TRIM, command_flag::PAYLOAD_LEN, 0, u64::MAX)).await;
    raw.breaks("a payload of 18446744073709551615 bytes").await;
}

#[tokio::test]
async fn a_payload_where_none_belongs_is_consumed_and_refused() {
    let mut raw = Raw::transmitting(EXTENDED).await;
    for command in [command::READ, command::FLUSH, command::CACHE, 55] {
        raw.request(EXTENDED, ask(command, command_flag::PAYLOAD_LEN, 0, 1000)).await;
        raw.send(&[0x21; 1000]).await;
        assert_eq!(raw.errno(EXTENDED).await, errno::EINVAL);
    }
    raw.lives(EXTENDED).await;
}

#[tokio::test]
async fn unknown_commands_and_flags_are_refused_and_the_session_goes_on() {
    let mut raw = Raw::transmitting(STRUCTURED).await;
    for (command, flags) in [(8, 0), (u16::MAX, 0), (command::READ, 1 << 9), (command::FLUSH, 2)] {
        raw.request(STRUCTURED, ask(command, flags, 0, 512)).await;
        assert_eq!(raw.errno(STRUCTURED).await, errno::EINVAL);
    }
    raw.lives(STRUCTURED).await;
}

#[tokio::test]
async fn requests_of_no_length_are_answered() {
    for style in [STRUCTURED, EXTENDED] {
        let mut raw = Raw::transmitting(style).await;
        let done = (chunk::DONE, chunk::NONE);
        for command in
            [command::READ, command::WRITE, command::TRIM, command::CACHE, command::WRITE_ZEROES]
        {
            raw.request(style, ask(command, 0, SIZE, 0)).await;
            let (flags, kind, _, payload) = raw.chunk(style).await;
            assert_eq!(((flags, kind), payload.len()), (done, 0), "command {command}");
        }
        raw.request(style, ask(command::BLOCK_STATUS, 0, 0, 0)).await;
        assert_eq!(raw.errno(style).await, errno::EINVAL);
    }
}

#[tokio::test]
async fn a_status_payload_chooses_contexts_and_must_be_right() {
    let mut raw = Raw::transmitting(EXTENDED).await;
    let status = |effect: u64, ids: &[u32]| {
        let ids = ids.iter().flat_map(|id| id.to_be_bytes());
        effect.to_be_bytes().into_iter().chain(ids).collect::<Vec<u8>>()
    };
    for bad in [
        status(512, &[]),
        status(512, &[99]),
        status(512, &[1, 1]),
        status(0, &[1]),
        status(SIZE + 1, &[1]),
        status(512, &[1])[..11].to_vec(),
        vec![0; 5],
        vec![0; 5000],
    ] {
        let request = ask(command::BLOCK_STATUS, command_flag::PAYLOAD_LEN, 0, bad.len() as u64);
        raw.request(EXTENDED, request).await;
        raw.send(&bad).await;
        assert_eq!(raw.errno(EXTENDED).await, errno::EINVAL, "{bad:?}");
    }
    let good = status(SIZE, &[2]);
    raw.request(EXTENDED, ask(command::BLOCK_STATUS, command_flag::PAYLOAD_LEN, 0, 12)).await;
    raw.send(&good).await;
    let (flags, kind, _, payload) = raw.chunk(EXTENDED).await;
    assert_eq!((flags, kind, payload.len()), (chunk::DONE, chunk::BLOCK_STATUS_EXT, 24));
    assert_eq!((be32(&payload[..4]), be64(&payload[8..16])), (2, SIZE));
}

/// CVE-2025-47711 (nbdkit): the reply to a status of the largest length was one byte short of right.
#[tokio::test]
async fn cve_2025_47711_a_status_of_the_largest_length_is_within_it() {
    let mut raw = Raw::transmitting(STRUCTURED).await;
    raw.request(STRUCTURED, ask(command::BLOCK_STATUS, 0, 0, u32::MAX.into())).await;
    assert_eq!(raw.errno(STRUCTURED).await, errno::EINVAL);
    raw.request(STRUCTURED, ask(command::BLOCK_STATUS, 0, 0, SIZE)).await;
    for last in [false, true] {
        let (flags, kind, _, payload) = raw.chunk(STRUCTURED).await;
        assert_eq!((flags == chunk::DONE, kind), (last, chunk::BLOCK_STATUS));
        assert_eq!(u64::from(be32(&payload[4..8])), SIZE);
    }
}

/// CVE-2025-47712 (nbdkit): lengths near 2^32 overflowed where requests were cut.
#[tokio::test]
async fn cve_2025_47712_lengths_near_4_gib_do_not_overflow() {
    let mut raw = Raw::transmitting(STRUCTURED).await;
    for len in [u32::MAX - 1, u32::MAX] {
        for command in [command::WRITE_ZEROES, command::TRIM, command::CACHE] {
            raw.request(STRUCTURED, ask(command, 0, SIZE - 1, len.into())).await;
            let errno = raw.errno(STRUCTURED).await;
            assert!([errno::EINVAL, errno::ENOSPC].contains(&errno));
        }
    }
    raw.lives(STRUCTURED).await;
}

/// CVE-2013-7441 (nbd-server): a client that hung up in the middle ended the server.
#[tokio::test]
async fn cve_2013_7441_a_client_that_hangs_up_anywhere_ends_its_session_only() {
    let whole = [
        3_u32.to_be_bytes().to_vec(),
        option_bytes(option::STRUCTURED_REPLY, &[]),
        option_bytes(option::GO, &go("a")),
        {
            let mut bytes = Vec::new();
            ask(command::WRITE, 0, 0, 16).encode(STRUCTURED, &mut bytes);
            bytes
        },
        vec![1; 16],
    ]
    .concat();
    for len in 0..=whole.len() {
        let mut raw = Raw::connect(limits()).await;
        raw.send(&whole[..len]).await;
        tokio::io::AsyncWriteExt::shutdown(&mut raw.stream).await.unwrap();
        let _ = raw.end().await;
    }
}

#[tokio::test]
async fn a_request_in_the_middle_of_which_nothing_comes_ends_at_the_stall_time_out() {
    let short = Limits { stall: Duration::from_millis(200), ..limits() };
    let mut raw = Raw::connect(short).await;
    raw.send(&3_u32.to_be_bytes()).await;
    raw.enter(STRUCTURED).await;
    // Idle between requests is fine.
    tokio::time::sleep(Duration::from_millis(500)).await;
    raw.lives(STRUCTURED).await;
    raw.request(STRUCTURED, ask(command::WRITE, 0, 0, 4096)).await;
    raw.send(&[1; 4095]).await;
    raw.breaks("in the middle of a payload").await;
}

#[tokio::test]
async fn a_client_that_does_not_read_its_replies_is_cut_off() {
    let short = Limits { stall: Duration::from_millis(300), ..limits() };
    let mut raw = Raw::connect(short).await;
    raw.send(&3_u32.to_be_bytes()).await;
    raw.enter(STRUCTURED).await;
    for _ in 0..4 {
        raw.request(STRUCTURED, ask(command::READ, 0, 0, SIZE)).await;
    }
    let session = tokio::time::timeout(crate::raw::LONG, &mut raw.session).await;
    let error = session.expect("it ends").unwrap().unwrap_err();
    assert!(error.to_string().contains("in the middle of a reply"), "{error}");
}

#[tokio::test]
async fn a_stopping_server_refuses_new_requests_and_then_leaves() {
    let mut raw = Raw::transmitting(STRUCTURED).await;
    raw.server.stop();
    tokio::time::sleep(Duration::from_millis(50)).await;
    raw.request(STRUCTURED, ask(command::READ, 0, 0, 512)).await;
    assert_eq!(raw.errno(STRUCTURED).await, errno::ESHUTDOWN);
    raw.end().await.unwrap();
}

#[tokio::test]
async fn disc_ends_the_session_after_what_is_in_progress() {
    let mut raw = Raw::transmitting(STRUCTURED).await;
    raw.request(STRUCTURED, ask(command::READ, 0, 0, 512)).await;
    raw.request(STRUCTURED, ask(command::DISC, 0, 0, 0)).await;
    let (flags, kind, _, payload) = raw.chunk(STRUCTURED).await;
    assert_eq!((flags, kind, payload.len()), (chunk::DONE, chunk::OFFSET_DATA, 520));
    raw.end().await.unwrap();
}

/// Counts what it is asked.
struct Counted {
    disk: MemoryDisk,
    asked: AtomicU64,
}

#[async_trait]
impl BlockSource for Counted {
    fn geometry(&self) -> Geometry {
        BlockSource::geometry(&self.disk)
    }

    async fn extents(&self, range: ByteRange) -> Result<ExtentMap> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.disk.extents(range).await
    }

    async fn read(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        self.disk.read(offset, buffer).await
    }
}

/// CVE-2019-14850 (nbdkit): the disk was opened for everybody who connected, before anything was
/// negotiated, so that a scan of ports was a load on it.
#[tokio::test(flavor = "multi_thread")]
async fn cve_2019_14850_clients_that_only_connect_ask_nothing_of_the_disk() {
    let disk = MemoryDisk::with_content(vec![1; 1 << 20]);
    let counted = Arc::new(Counted { disk, asked: AtomicU64::new(0) });
    let rig = Rig::new([Export::read_only("", Arc::clone(&counted) as _)]);
    let connect = || std::os::unix::net::UnixStream::connect(rig.socket()).unwrap();
    let idle: Vec<_> = (0..30).map(|_| connect()).collect();
    for _ in 0..100 {
        drop(connect());
    }
    assert_eq!(counted.asked.load(Ordering::Relaxed), 0);
    let client = Client::open_uri(&rig.uri(""), ClientOptions::default()).await.unwrap();
    assert_eq!(counted.asked.load(Ordering::Relaxed), 0, "nor does who negotiates");
    let read = client.read(0, Buffer::unbudgeted(vec![0; 4096])).await.unwrap();
    assert!(read.iter().all(|byte| *byte == 1) && counted.asked.load(Ordering::Relaxed) == 1);
    drop(idle);
}
