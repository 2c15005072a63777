//! Truncated and mutated bytes of a client: the session ends with a result or a reason, at once, and
//! what the server says in between is what the protocol allows.

use proptest::prelude::*;
use vmbackup::nbd::wire::{HeaderStyle, Request, command, command_flag, option};

use crate::corpus::{Corpus, watched};
use crate::heard::{ended, negotiation};
use crate::raw::{Raw, contexts, go, option_bytes};
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

/// The session ends; the way it ends is one the corpus should have.
fn ends(bytes: &[u8]) {
    let parts = vec![bytes.to_vec()];
    let end = watched("nbd_server", &parts, || ended(bytes));
    Corpus::at("nbd_server/corpus").keep(&end, &parts);
}

#[test]
#[allow(clippy::print_stderr, reason = "names the input that fails")]
fn clients_of_the_corpus_never_crash_or_hang_the_server() {
    let inputs = Corpus::at("nbd_server/corpus").inputs();
    assert!(inputs.len() > 5, "the corpus is there");
    for (name, parts) in inputs {
        eprintln!("{name}");
        ends(&parts.concat());
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
        ends(&bytes);
    }

    #[test]
    fn random_options_never_crash_the_server(
        options in prop::collection::vec((0..13_u32, prop::collection::vec(any::<u8>(), 0..40)), 0..8),
        tail in prop::collection::vec(any::<u8>(), 0..80),
    ) {
        let options = options.iter().map(|(option, payload)| (*option, &payload[..]));
        ends(&negotiation(options, &tail));
    }
}
