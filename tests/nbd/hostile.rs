//! Servers that break the protocol: a disconnect and an error that names the rule, each time.
//!
//! Where a rule stands for a hole somebody once had, its CVE is named.

use vmbackup::block::{BlockSource, Buffer, ByteRange, ExtentKind};
use vmbackup::error::{Error, Kind};
use vmbackup::nbd::wire::{HeaderStyle, chunk, errno, info, option, reply};
use vmbackup::nbd::{Inspector, Timeouts};

use crate::script::{
    Asked, CONTEXT, SIZE, Scripted, chunk_of, error_payload, honest, info_block_size, info_export,
    option_reply, play, simple,
};

const STRUCTURED: HeaderStyle = HeaderStyle::Structured;
const EXTENDED: HeaderStyle = HeaderStyle::Extended;
const DONE: u16 = chunk::DONE;

/// A server of `style`, honest in the handshake.
fn server(
    style: HeaderStyle,
    act: impl Fn(&Asked) -> Vec<u8> + Clone + Send + Sync + 'static,
) -> Scripted {
    Scripted::new(move |stream| {
        let act = act.clone();
        async move { play(stream, style, |option| honest(style, option), act).await }
    })
}

/// Reads 4096 bytes at 8192 from a server that answers with `act`.
async fn read(
    style: HeaderStyle,
    act: impl Fn(&Asked) -> Vec<u8> + Clone + Send + Sync + 'static,
) -> Result<Buffer, Error> {
    let client = server(style, act).open().await.expect("the handshake is honest");
    let result = client.read(8192, Buffer::unbudgeted(vec![0xee; 4096])).await;
    if result.as_ref().is_err_and(|e| e.kind() == Kind::Protocol) {
        // After a broken rule the connection is gone for everybody.
        let again = client.read(0, Buffer::unbudgeted(vec![0; 512])).await.map(|_| ());
        assert_eq!(again.unwrap_err().kind(), Kind::Protocol);
    }
    result
}

async fn read_breaks(
    rule: &str,
    style: HeaderStyle,
    act: impl Fn(&Asked) -> Vec<u8> + Clone + Send + Sync + 'static,
) {
    let error = read(style, act).await.map(|_| ()).expect_err(rule);
    assert_eq!(error.kind(), Kind::Protocol, "{error:?}");
    let text = error.to_string();
    assert!(text.contains(rule) && text.contains("the script"), "{text}");
}

async fn extents_break(
    rule: &str,
    style: HeaderStyle,
    act: impl Fn(&Asked) -> Vec<u8> + Clone + Send + Sync + 'static,
) {
    let client = server(style, act).open().await.unwrap();
    let error = client.extents(ByteRange::new(0, 65536)).await.map(|_| ()).expect_err(rule);
    assert_eq!(error.kind(), Kind::Protocol, "{error:?}");
    assert!(error.to_string().contains(rule), "{error}");
}

/// Opens a server whose answer to `option` is `answer`.
async fn option_breaks(rule: &str, at: u32, answer: Vec<u8>) {
    let script = Scripted::new(move |stream| {
        let answer = answer.clone();
        let say = move |option| {
            if option == at { answer.clone() } else { honest(STRUCTURED, option) }
        };
        play(stream, STRUCTURED, say, |_| Vec::new())
    });
    let error = script.open().await.map(|_| ()).expect_err(rule);
    assert_eq!(error.kind(), Kind::Protocol, "{error:?}");
    assert!(error.to_string().contains(rule), "{error}");
}

// Data

#[tokio::test]
async fn chunks_in_any_order_and_holes_make_a_read() {
    let buffer = read(STRUCTURED, |asked| {
        let mut hole = 9192_u64.to_be_bytes().to_vec();
        hole.extend(96_u32.to_be_bytes());
        let parts = [
            asked.data(0, 9288, 3000),
            asked.data(0, 8192, 1000),
            asked.chunk(DONE, chunk::OFFSET_HOLE, &hole),
        ];
        parts.concat()
    });
    let buffer = buffer.await.unwrap();
    assert!(buffer[1000..1096].iter().all(|b| *b == 0));
    assert!(buffer[..1000].iter().chain(&buffer[1096..]).all(|b| *b == 0x55));
}

/// libnbd 2019-10: the offset of a data chunk was not checked, a server could write anywhere.
#[tokio::test]
async fn data_before_the_request_is_refused() {
    read_breaks("512 bytes at 8191", STRUCTURED, |asked| asked.data(DONE, 8191, 512)).await;
}

#[tokio::test]
async fn data_past_the_request_is_refused() {
    read_breaks("4096 bytes at 8193", STRUCTURED, |asked| asked.data(DONE, 8193, 4096)).await;
    read_breaks("4097 bytes at 8192", EXTENDED, |asked| asked.data(DONE, 8192, 4097)).await;
    read_breaks("1 bytes at 18446744073709551615", STRUCTURED, |asked| {
        asked.data(DONE, u64::MAX, 1)
    })
    .await;
}

#[tokio::test]
async fn a_data_length_is_refused_before_memory_is_taken_for_it() {
    read_breaks("18446744073709551607 bytes at 8192", EXTENDED, |asked| {
        let mut bytes = chunk_of(EXTENDED, (DONE, 1), asked.cookie, asked.offset, &[]);
        bytes[24..32].copy_from_slice(&u64::MAX.to_be_bytes());
        bytes.extend(8192_u64.to_be_bytes());
        bytes
    })
    .await;
}

#[tokio::test]
async fn empty_data_is_refused() {
    read_breaks("data chunk of 8 bytes", STRUCTURED, |asked| asked.data(DONE, 8192, 0)).await;
}

#[tokio::test]
async fn a_hole_out_of_bounds_is_refused() {
    for (offset, len) in [(8192_u64, 4097_u32), (8192, 0), (0, 1), (u64::MAX, u32::MAX)] {
        read_breaks(&format!("{len} bytes at {offset}"), STRUCTURED, move |asked| {
            let mut hole = offset.to_be_bytes().to_vec();
            hole.extend(len.to_be_bytes());
            asked.chunk(DONE, chunk::OFFSET_HOLE, &hole)
        })
        .await;
    }
}

#[tokio::test]
async fn overlapping_data_is_refused() {
    read_breaks("overlapping data at 8200", STRUCTURED, |asked| {
        [asked.data(0, 8192, 4096), asked.data(DONE, 8200, 8)].concat()
    })
    .await;
}

/// A hole in the reply would leave what the buffer held before: old data of another disk.
#[tokio::test]
async fn a_read_that_leaves_bytes_out_is_refused() {
    read_breaks("leaves bytes out", STRUCTURED, |asked| asked.data(DONE, 8192, 4095)).await;
    read_breaks("leaves bytes out", STRUCTURED, |asked| asked.chunk(DONE, chunk::NONE, &[])).await;
}

#[tokio::test]
async fn chunks_without_end_are_refused() {
    read_breaks("chunks in the reply", STRUCTURED, |asked| {
        let error = asked.chunk(0, chunk::ERROR, &error_payload(errno::EIO, b""));
        error.repeat(1000)
    })
    .await;
}

#[tokio::test]
async fn a_simple_reply_to_read_is_refused_with_structured_replies() {
    read_breaks("simple reply to READ", STRUCTURED, |asked| asked.simple(0)).await;
    read_breaks("reply magic 0x67446698", EXTENDED, |asked| asked.simple(0)).await;
}

#[tokio::test]
async fn a_reply_that_echoes_another_offset_is_refused() {
    read_breaks("offset 1 in the reply", EXTENDED, |asked| {
        chunk_of(EXTENDED, (DONE, chunk::NONE), asked.cookie, 1, &[])
    })
    .await;
}

/// libnbd errors-bad-cookie; CVE-2021-20286 was a crash on a reply nobody expected.
#[tokio::test]
async fn cve_2021_20286_a_reply_to_nobody_is_refused() {
    read_breaks("not in flight", STRUCTURED, |asked| {
        chunk_of(STRUCTURED, (DONE, chunk::NONE), asked.cookie ^ 1, 0, &[])
    })
    .await;
    read_breaks("not in flight", HeaderStyle::Simple, |_| simple(0, u64::MAX)).await;
}

#[tokio::test]
async fn a_second_reply_to_the_same_request_is_refused() {
    let twice = server(STRUCTURED, |asked| asked.data(DONE, asked.offset, 512).repeat(2));
    let client = twice.open().await.unwrap();
    client.read(0, Buffer::unbudgeted(vec![0; 512])).await.unwrap();
    let error = client.read(0, Buffer::unbudgeted(vec![0; 512])).await.map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("not in flight"), "{error}");
}

#[tokio::test]
async fn garbage_instead_of_a_reply_is_refused() {
    read_breaks("reply magic 0x25609513", STRUCTURED, |_| vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0])
        .await;
    read_breaks("chunk of unknown type 99", STRUCTURED, |asked| asked.chunk(DONE, 99, &[])).await;
    read_breaks("NONE chunk", STRUCTURED, |asked| asked.chunk(0, chunk::NONE, &[])).await;
    read_breaks("NONE chunk", STRUCTURED, |asked| asked.chunk(DONE, chunk::NONE, &[0])).await;
}

// Errors

/// CVE-2022-0485: a read that failed was written to the target as if it had not.
#[tokio::test]
async fn cve_2022_0485_an_error_after_data_fails_the_read() {
    let error = read(STRUCTURED, |asked| {
        let error = asked.chunk(DONE, chunk::ERROR, &error_payload(errno::EIO, b"bad disk"));
        [asked.data(0, 8192, 4096), error].concat()
    });
    let error = error.await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Io);
    assert!(error.to_string().contains("bad disk"), "{error}");
}

#[tokio::test]
async fn an_unknown_error_chunk_fails_the_command_only() {
    let act = |asked: &Asked| {
        if asked.offset == 0 {
            return asked.data(DONE, 0, 512);
        }
        let mut payload = error_payload(errno::ENOSPC, b"full");
        payload.extend([1, 2, 3]);
        asked.chunk(DONE, chunk::ERROR_BIT | 0x4d, &payload)
    };
    let client = server(STRUCTURED, act).open().await.unwrap();
    let error = client.read(512, Buffer::unbudgeted(vec![0; 512])).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::NoSpace);
    client.read(0, Buffer::unbudgeted(vec![0; 512])).await.unwrap();
}

/// CVE-2020-10761: an error text longer than a string may be.
#[tokio::test]
async fn cve_2020_10761_an_error_text_beyond_4096_bytes_is_refused() {
    read_breaks("malformed error chunk", STRUCTURED, |asked| {
        asked.chunk(DONE, chunk::ERROR, &error_payload(errno::EIO, &[b'x'; 4097]))
    })
    .await;
    read_breaks("error chunk shorter or longer", STRUCTURED, |asked| {
        asked.chunk(DONE, chunk::ERROR, &vec![1; 100_000])
    })
    .await;
}

#[tokio::test]
async fn malformed_errors_are_refused() {
    read_breaks("error chunk shorter", STRUCTURED, |asked| {
        asked.chunk(DONE, chunk::ERROR, &[0, 0, 0, 5, 0])
    })
    .await;
    let bad = [error_payload(0, b""), [error_payload(5, b"").as_slice(), &[1]].concat()];
    for payload in bad {
        read_breaks("malformed error", STRUCTURED, move |asked| {
            asked.chunk(DONE, chunk::ERROR, &payload)
        })
        .await;
    }
    read_breaks("outside the request", STRUCTURED, |asked| {
        let mut payload = error_payload(errno::EIO, b"");
        payload.extend(0_u64.to_be_bytes());
        asked.chunk(DONE, chunk::ERROR_OFFSET, &payload)
    })
    .await;
}

#[tokio::test]
async fn an_error_text_cannot_drive_the_terminal() {
    let error = read(STRUCTURED, |asked| {
        asked.chunk(DONE, chunk::ERROR, &error_payload(errno::EIO, b"a\x1b[2J\nb\xff"))
    });
    let text = error.await.map(|_| ()).unwrap_err().to_string();
    assert!(!text.contains(|c: char| c.is_control()), "{text:?}");
}

// Status

#[tokio::test]
async fn extents_may_be_short_or_overshoot() {
    let short = server(STRUCTURED, |asked| asked.status(DONE, CONTEXT, &[(512, 3), (512, 0)]));
    let map = short.open().await.unwrap().extents(ByteRange::new(0, 65536)).await.unwrap();
    assert_eq!((map.count(), map.end()), (2, 1024));
    let long = server(STRUCTURED, |asked| asked.status(DONE, CONTEXT, &[(512, 0), (u32::MAX, 2)]));
    let map = long.open().await.unwrap().extents(ByteRange::new(0, 65536)).await.unwrap();
    assert_eq!((map.end(), map.bytes_of(ExtentKind::Zero)), (65536, 65024));
}

#[tokio::test]
async fn a_hole_that_does_not_promise_zeroes_is_data() {
    let hole = server(STRUCTURED, |asked| asked.status(DONE, CONTEXT, &[(65536, 1)]));
    let map = hole.open().await.unwrap().extents(ByteRange::new(0, 65536)).await.unwrap();
    assert_eq!(map.bytes_of(ExtentKind::Data), 65536);
}

/// libnbd 2023-07: lengths like these made clients assert or loop for ever.
#[tokio::test]
async fn extents_of_no_length_are_refused() {
    extents_break("an extent of no length", STRUCTURED, |asked| {
        asked.status(DONE, CONTEXT, &[(0, 0)])
    })
    .await;
    extents_break("status chunk of 4 bytes", STRUCTURED, |asked| asked.status(DONE, CONTEXT, &[]))
        .await;
}

#[tokio::test]
async fn extents_beyond_the_request_are_refused() {
    extents_break("beyond the end of the request", STRUCTURED, |asked| {
        asked.status(DONE, CONTEXT, &[(65536, 0), (1, 0)])
    })
    .await;
}

#[tokio::test]
async fn more_than_the_one_extent_asked_for_is_refused() {
    for (extents, rule) in [
        (&[(512, 0), (512, 3)][..], "2 extents where one was asked for"),
        (&[(u32::MAX, 0)], "4294967295 bytes where 65536 were asked about"),
    ] {
        let script = server(STRUCTURED, move |asked| asked.status(DONE, CONTEXT, extents));
        let names = ["base:allocation".to_owned()];
        let inspector = Inspector::open(&script, "", &names, Timeouts::default()).await.unwrap();
        let error = inspector.first(ByteRange::new(0, 65536)).await.expect_err(rule);
        assert_eq!(error.kind(), Kind::Protocol, "{error:?}");
        assert!(error.to_string().contains(rule), "{error}");
    }
}

/// CVE-2023-5871: 64-bit extents whose sum or flags nobody expected.
#[tokio::test]
async fn cve_2023_5871_extents_that_overflow_are_refused() {
    extents_break("an extent of 18446744073709551615 bytes", EXTENDED, |asked| {
        let mut payload = CONTEXT.to_be_bytes().to_vec();
        payload.extend(2_u32.to_be_bytes());
        for word in [512, 0, u64::MAX, u64::MAX] {
            payload.extend(word.to_be_bytes());
        }
        asked.chunk(DONE, chunk::BLOCK_STATUS_EXT, &payload)
    })
    .await;
}

#[tokio::test]
async fn an_extent_count_that_lies_is_refused() {
    extents_break("counts otherwise", EXTENDED, |asked| {
        let mut payload = CONTEXT.to_be_bytes().to_vec();
        payload.extend(u32::MAX.to_be_bytes());
        payload.extend([0; 16]);
        asked.chunk(DONE, chunk::BLOCK_STATUS_EXT, &payload)
    })
    .await;
}

#[tokio::test]
async fn status_of_a_context_that_was_not_asked_for_is_refused() {
    extents_break("was not negotiated", STRUCTURED, |asked| {
        asked.status(DONE, CONTEXT + 1, &[(65536, 0)])
    })
    .await;
    extents_break("twice in one reply", STRUCTURED, |asked| {
        asked.status(0, CONTEXT, &[(65536, 0)]).repeat(2)
    })
    .await;
    extents_break("leaves meta contexts out", STRUCTURED, |asked| {
        asked.chunk(DONE, chunk::NONE, &[])
    })
    .await;
    extents_break("simple success to BLOCK_STATUS", STRUCTURED, |asked| asked.simple(0)).await;
}

#[tokio::test]
async fn status_of_the_wrong_width_is_refused() {
    extents_break("status chunk of type 5", EXTENDED, |asked| {
        asked.status(DONE, CONTEXT, &[(65536, 0)])
    })
    .await;
    extents_break("status chunk of 9 bytes", STRUCTURED, |asked| {
        asked.chunk(DONE, chunk::BLOCK_STATUS, &[0; 9])
    })
    .await;
}

/// More extents than anybody sends: the length alone is refused.
#[tokio::test]
async fn a_status_chunk_without_measure_is_refused() {
    extents_break("status chunk of 4294967292 bytes", STRUCTURED, |asked| {
        let mut bytes = asked.chunk(DONE, chunk::BLOCK_STATUS, &[]);
        bytes[16..20].copy_from_slice(&0xffff_fffc_u32.to_be_bytes());
        bytes
    })
    .await;
}

#[tokio::test]
async fn data_in_answer_to_a_query_is_refused() {
    extents_break("data in the reply to BLOCK_STATUS", STRUCTURED, |asked| {
        asked.data(DONE, 0, 512)
    })
    .await;
    read_breaks("status chunk in the reply to READ", STRUCTURED, |asked| {
        asked.status(DONE, CONTEXT, &[(512, 0)])
    })
    .await;
}

// Handshake

/// CVE-2023-5215: a size past 2^63 became negative.
#[tokio::test]
async fn cve_2023_5215_an_export_larger_than_any_disk_is_refused() {
    let ack = option_reply(option::GO, reply::ACK, &[]);
    for size in [1 << 63, u64::MAX] {
        option_breaks("above 2^63-1", option::GO, [info_export(size), ack.clone()].concat()).await;
    }
}

#[tokio::test]
async fn impossible_block_sizes_are_refused() {
    let answer = [info_export(SIZE), info_block_size([3, 4096, 65536])].concat();
    option_breaks("not a power of two", option::GO, answer).await;
}

#[tokio::test]
async fn go_without_a_size_is_refused() {
    option_breaks("without the export's size", option::GO, option_reply(7, reply::ACK, &[])).await;
}

/// CVE-2022-26495 and CVE-2017-15119 from the other side: lengths nobody needs.
#[tokio::test]
async fn an_option_reply_without_measure_is_refused() {
    let mut answer = option_reply(option::GO, reply::INFO, &[]);
    answer[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    option_breaks("option reply of 4294967295 bytes", option::GO, answer).await;
}

#[tokio::test]
async fn malformed_option_replies_are_refused() {
    option_breaks("reply to option 3", option::GO, option_reply(3, reply::ACK, &[])).await;
    option_breaks("reply of type 9", option::GO, option_reply(7, 9, &[])).await;
    option_breaks("option reply magic", option::GO, vec![0; 20]).await;
    option_breaks("INFO reply without a type", option::GO, option_reply(7, reply::INFO, &[1]))
        .await;
    let short = option_reply(7, reply::INFO, &info::EXPORT.to_be_bytes());
    option_breaks("INFO reply of the wrong length", option::GO, short).await;
}

#[tokio::test]
async fn info_replies_without_end_are_refused() {
    let name = option_reply(option::GO, reply::INFO, &[0, 1, b'x']);
    option_breaks("without end", option::GO, name.repeat(10_001)).await;
}

#[tokio::test]
async fn meta_contexts_nobody_asked_for_are_refused() {
    let option = option::SET_META_CONTEXT;
    let context = |id: u32, name: &str| {
        let payload = [&id.to_be_bytes()[..], name.as_bytes()].concat();
        option_reply(option, reply::META_CONTEXT, &payload)
    };
    option_breaks("was not asked for", option, context(1, "base:other")).await;
    option_breaks("given twice", option, context(1, "base:allocation").repeat(2)).await;
    let short = option_reply(option, reply::META_CONTEXT, &[0]);
    option_breaks("without an id", option, short).await;
}

#[tokio::test]
async fn a_server_that_demands_tls_is_told_apart() {
    let script = Scripted::new(|stream| {
        let say = |option| option_reply(option, reply::TLS_REQD, b"no");
        play(stream, STRUCTURED, say, |_| Vec::new())
    });
    let error = script.open().await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("TLS"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_speaks_is_given_up() {
    let silent = Scripted::new(|stream| async move {
        tokio::time::sleep(std::time::Duration::from_secs(3600)).await;
        drop(stream);
    });
    assert_eq!(silent.open().await.map(|_| ()).unwrap_err().kind(), Kind::Timeout);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_trickles_the_handshake_is_given_up() {
    let trickle = Scripted::new(|mut stream| async move {
        use tokio::io::AsyncWriteExt;
        for byte in crate::script::greeting() {
            tokio::time::sleep(std::time::Duration::from_secs(2)).await;
            if stream.write_all(&[byte]).await.is_err() {
                return;
            }
        }
    });
    assert_eq!(trickle.open().await.map(|_| ()).unwrap_err().kind(), Kind::Timeout);
}

/// Bytes that keep coming are no progress when they come one by one.
#[tokio::test]
async fn a_server_that_drips_its_reply_is_given_up() {
    use std::time::Duration;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = Scripted::new(|stream| async move {
        let (inner, theirs) = tokio::io::duplex(1 << 20);
        let honest_play = play(
            theirs,
            STRUCTURED,
            |option| honest(STRUCTURED, option),
            |asked| asked.data(DONE, 0, 1 << 20),
        );
        let (mut from_client, mut to_client) = tokio::io::split(stream);
        let (mut from_inner, mut to_inner) = tokio::io::split(inner);
        let asked = std::sync::atomic::AtomicBool::new(false);
        let forth = async {
            let mut piece = [0; 1024];
            while let Ok(len @ 1..) = from_client.read(&mut piece).await {
                let magic = vmbackup::nbd::wire::REQUEST.to_be_bytes();
                if piece[..len].starts_with(&magic) {
                    asked.store(true, std::sync::atomic::Ordering::Relaxed);
                }
                to_inner.write_all(&piece[..len]).await.unwrap();
            }
        };
        let back = async {
            let mut byte = [0];
            while from_inner.read_exact(&mut byte).await.is_ok() {
                if asked.load(std::sync::atomic::Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                if to_client.write_all(&byte).await.is_err() {
                    return;
                }
            }
        };
        tokio::select! { () = honest_play => {}, () = async { tokio::join!(forth, back); } => {} }
    });
    let stall = Duration::from_millis(800);
    let timeouts = Timeouts { stall, ..Timeouts::default() };
    let options =
        vmbackup::nbd::ClientOptions { timeouts, ..vmbackup::nbd::ClientOptions::default() };
    let client = vmbackup::nbd::Client::open(&server, "", options).await.unwrap();
    let read = client.read(0, Buffer::unbudgeted(vec![0; 1 << 20]));
    let read = tokio::time::timeout(stall * 10, read).await.expect("it is given up");
    assert_eq!(read.map(|_| ()).unwrap_err().kind(), Kind::Timeout);
}
