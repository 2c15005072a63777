//! Truncated and mutated bytes of a client: the session ends with a result or a reason, at once, and
//! what the server says in between is what the protocol allows.

use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use vmbackup::nbd::server::Limits;
use vmbackup::nbd::wire::{HeaderStyle, Request, command, command_flag, option};

use crate::raw::{LONG, Raw, contexts, go, option_bytes};
use crate::rig::limits;

/// All that a client says in a session which uses every option and every command.
fn transcript(style: HeaderStyle) -> Vec<u8> {
    let mut out = 3_u32.to_be_bytes().to_vec();
    out.extend(option_bytes(option::LIST, &[]));
    out.extend(option_bytes(option::INFO, &go("b")));
    match style {
        HeaderStyle::Simple => {
            out.extend(option_bytes(option::EXPORT_NAME, b"a"));
        }
        HeaderStyle::Structured => out.extend(option_bytes(option::STRUCTURED_REPLY, &[])),
        HeaderStyle::Extended => out.extend(option_bytes(option::EXTENDED_HEADERS, &[])),
    }
    if style != HeaderStyle::Simple {
        out.extend(option_bytes(option::LIST_META_CONTEXT, &contexts("a", &["qemu:"])));
        let both = contexts("a", &["base:allocation", "qemu:dirty-bitmap:x"]);
        out.extend(option_bytes(option::SET_META_CONTEXT, &both));
        out.extend(option_bytes(option::GO, &go("a")));
    }
    for (command, len) in [
        (command::READ, 70_000),
        (command::WRITE, 40),
        (command::FLUSH, 0),
        (command::TRIM, 512),
        (command::CACHE, 512),
        (command::WRITE_ZEROES, 512),
        (command::BLOCK_STATUS, 65536),
        (command::DISC, 0),
    ] {
        let payload = command == command::WRITE;
        let extended = style == HeaderStyle::Extended && payload;
        let flags = if extended { command_flag::PAYLOAD_LEN } else { 0 };
        let request = Request { flags, command, cookie: u64::from(command), offset: 0, len };
        request.encode(style, &mut out);
        if payload {
            out.extend(vec![0x11; usize::try_from(len).unwrap()]);
        }
    }
    out
}

/// A session with a client that says these bytes and hangs up.
async fn session(bytes: &[u8]) {
    let short = Duration::from_secs(5);
    let limits = Limits { handshake: short, stall: short, ..limits() };
    let mut raw = Raw::connect(limits).await;
    let (mut reading, mut writing) = tokio::io::split(&mut raw.stream);
    let mut said = Vec::new();
    let speak = async {
        if writing.write_all(bytes).await.is_ok() {
            let _ = writing.shutdown().await;
        }
    };
    let talk = async { tokio::join!(speak, reading.read_to_end(&mut said)) };
    let _ = tokio::time::timeout(LONG, talk).await.expect("the server hangs up");
    assert!(said.len() < 16 << 20, "a few requests are not answered with {} bytes", said.len());
    if let Err(error) = raw.end().await {
        assert!(error.to_string().contains("the script"), "{error:?}");
    }
}

fn styles() -> [HeaderStyle; 3] {
    [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended]
}

#[tokio::test]
async fn whole_transcripts_are_served_to_their_end() {
    for style in styles() {
        let mut raw = Raw::connect(limits()).await;
        raw.send(&transcript(style)).await;
        raw.end().await.unwrap_or_else(|e| panic!("{style:?}: {e:?}"));
    }
}

fn block_on(work: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(work);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn mutated_clients_never_crash_or_hang_the_server(
        which in 0..3_usize,
        damages in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..9_usize), 1..6),
        word in prop_oneof![Just(0), Just(u64::MAX), Just(1 << 63), Just(1 << 31), any::<u64>()],
    ) {
        let mut bytes = transcript(styles()[which]);
        for (at, value, kind) in damages {
            let at = at.index(bytes.len());
            match kind {
                0..5 => bytes[at] = value,
                5 => drop(bytes.drain(at..bytes.len().min(at + usize::from(value) % 20))),
                6 => drop(bytes.splice(at..at, [value; 7])),
                _ => {
                    for (slot, byte) in bytes[at..].iter_mut().zip(word.to_be_bytes()) {
                        *slot = byte;
                    }
                }
            }
            if bytes.is_empty() {
                break;
            }
        }
        block_on(session(&bytes));
    }

    #[test]
    fn random_options_never_crash_the_server(
        options in prop::collection::vec((0..13_u32, prop::collection::vec(any::<u8>(), 0..40)), 0..8),
        tail in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        bytes.extend(options.iter().flat_map(|(option, payload)| option_bytes(*option, payload)));
        bytes.extend(tail);
        block_on(session(&bytes));
    }
}
