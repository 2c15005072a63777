//! Truncated and mutated bytes of a server: the client ends with a result or a reason, at once.
//!
//! Cookies can be foreseen (slot 0, generation 1, then 2), so an unmutated
//! transcript is a successful session.

use proptest::prelude::*;
use vmbackup::nbd::wire::{self, HeaderStyle, chunk, export, option, reply};

use crate::corpus::{Corpus, watched};
use crate::said::{LEN, LONG, SHORT, Transcript, ended, has_a_reason, session};
use crate::script::{Asked, CONTEXT, SIZE, chunk_of, greeting, honest, simple};
use crate::uris::survives;

/// Cookies of the first and the second request.
const COOKIES: [u64; 2] = [1 << 16, 2 << 16];

/// All that a server says in a session of one query and one read.
fn transcript(style: HeaderStyle) -> Transcript {
    let mut out = greeting();
    out.extend(honest(style, option::EXTENDED_HEADERS));
    if style != HeaderStyle::Extended {
        out.extend(honest(style, option::STRUCTURED_REPLY));
    }
    if style == HeaderStyle::Simple {
        out.extend(honest(style, option::GO));
        return with_simple_read(out);
    }
    out.extend(honest(style, option::SET_META_CONTEXT));
    out.extend(honest(style, option::GO));
    let mut pauses = vec![out.len()];
    let asked = |cookie| Asked { style, cookie, offset: 0 };
    if style == HeaderStyle::Extended {
        let mut status = CONTEXT.to_be_bytes().to_vec();
        status.extend(2_u32.to_be_bytes());
        for word in [512_u64, 0, 65024, 3] {
            status.extend(word.to_be_bytes());
        }
        let head = (chunk::DONE, chunk::BLOCK_STATUS_EXT);
        out.extend(chunk_of(style, head, COOKIES[0], 0, &status));
    } else {
        out.extend(asked(COOKIES[0]).status(chunk::DONE, CONTEXT, &[(512, 0), (65024, 3)]));
    }
    pauses.push(out.len());
    let mut hole = 512_u64.to_be_bytes().to_vec();
    hole.extend(100_u32.to_be_bytes());
    out.extend(asked(COOKIES[1]).data(0, 612, LEN - 612));
    out.extend(asked(COOKIES[1]).chunk(0, chunk::OFFSET_HOLE, &hole));
    out.extend(asked(COOKIES[1]).data(0, 0, 512));
    out.extend(asked(COOKIES[1]).chunk(chunk::DONE, chunk::NONE, &[]));
    Transcript { bytes: out, pauses }
}

fn with_simple_read(mut bytes: Vec<u8>) -> Transcript {
    let pauses = vec![bytes.len()];
    bytes.extend(simple(0, COOKIES[0]));
    bytes.extend([0x55; LEN]);
    Transcript { bytes, pauses }
}

fn oldstyle() -> Transcript {
    let mut out = wire::GREETING.to_be_bytes().to_vec();
    out.extend(wire::OLDSTYLE.to_be_bytes());
    out.extend(SIZE.to_be_bytes());
    out.extend(u32::from(export::HAS_FLAGS).to_be_bytes());
    out.extend([0; wire::PADDING_BYTES]);
    with_simple_read(out)
}

fn plain_newstyle() -> Transcript {
    let mut out = greeting();
    let flags = out.len() - 1;
    out[flags] = 0;
    out.extend(SIZE.to_be_bytes());
    out.extend(export::HAS_FLAGS.to_be_bytes());
    out.extend([0; wire::PADDING_BYTES]);
    with_simple_read(out)
}

fn transcripts() -> Vec<Transcript> {
    vec![
        oldstyle(),
        plain_newstyle(),
        transcript(HeaderStyle::Simple),
        transcript(HeaderStyle::Structured),
        transcript(HeaderStyle::Extended),
    ]
}

#[tokio::test]
async fn whole_transcripts_succeed() {
    for (index, transcript) in transcripts().into_iter().enumerate() {
        session(transcript, LONG).await.unwrap_or_else(|e| panic!("transcript {index}: {e:?}"));
    }
}

#[tokio::test]
async fn a_server_that_hangs_up_anywhere_is_an_error() {
    for transcript in transcripts() {
        for end in 0..transcript.bytes.len() {
            let mut cut = transcript.clone();
            cut.bytes.truncate(end);
            has_a_reason(&session(cut, LONG).await.expect_err("it was cut"));
        }
    }
}

/// The client ends with a result or a reason; the way it ends is one the corpus should have.
fn ends(transcript: &Transcript) {
    let parts = transcript.parts();
    let end = watched("nbd", &parts, || ended(transcript));
    Corpus::of("nbd").keep(&end, &parts);
}

#[test]
#[allow(clippy::print_stderr, reason = "names the input that fails")]
fn servers_of_the_corpus_never_crash_or_hang_the_client() {
    let inputs = Corpus::of("nbd").inputs();
    assert!(inputs.len() > 10, "the corpus is there");
    for (name, parts) in inputs {
        eprintln!("{name}");
        ends(&Transcript::of(&parts));
    }
}

/// A way to damage a transcript.
#[derive(Clone, Debug)]
enum Damage {
    Set(u8),
    Flip(u8),
    Remove(usize),
    Insert(Vec<u8>),
    Word(u64),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        any::<u8>().prop_map(Damage::Set),
        (0..8_u8).prop_map(|bit| Damage::Flip(1 << bit)),
        (1..20_usize).prop_map(Damage::Remove),
        prop::collection::vec(any::<u8>(), 1..20).prop_map(Damage::Insert),
        prop_oneof![Just(0), Just(1), Just(u64::MAX), Just(1 << 63), Just(1 << 31), any::<u64>()]
            .prop_map(Damage::Word),
    ]
}

fn apply(bytes: &mut Vec<u8>, at: prop::sample::Index, damage: Damage) {
    if bytes.is_empty() {
        return;
    }
    let at = at.index(bytes.len());
    match damage {
        Damage::Set(value) => bytes[at] = value,
        Damage::Flip(bit) => bytes[at] ^= bit,
        Damage::Remove(len) => drop(bytes.drain(at..bytes.len().min(at + len))),
        Damage::Insert(more) => drop(bytes.splice(at..at, more)),
        Damage::Word(value) => {
            for (slot, byte) in bytes[at..].iter_mut().zip(value.to_be_bytes()) {
                *slot = byte;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn mutated_servers_never_crash_or_hang_the_client(
        which in 0..5_usize,
        damages in prop::collection::vec((any::<prop::sample::Index>(), damage()), 1..6),
    ) {
        let mut damaged = transcripts().swap_remove(which);
        for (at, damage) in damages {
            apply(&mut damaged.bytes, at, damage);
        }
        ends(&damaged);
    }

    #[test]
    fn random_option_replies_never_crash_the_client(
        kind in prop_oneof![0..6_u32, (0..12_u32).prop_map(|n| reply::ERROR_BIT | n)],
        payload in prop::collection::vec(any::<u8>(), 0..64),
        at in 0..4_usize,
    ) {
        let option = [
            option::EXTENDED_HEADERS,
            option::STRUCTURED_REPLY,
            option::SET_META_CONTEXT,
            option::GO,
        ][at];
        let mut bytes = greeting();
        for earlier in &[
            option::EXTENDED_HEADERS,
            option::STRUCTURED_REPLY,
            option::SET_META_CONTEXT,
        ][..at] {
            bytes.extend(honest(HeaderStyle::Structured, *earlier));
        }
        bytes.extend(crate::script::option_reply(option, kind, &payload));
        let transcript = Transcript { bytes, pauses: Vec::new() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        has_a_reason(&runtime.block_on(session(transcript, SHORT)).expect_err("it ends in the handshake"));
    }

    #[test]
    fn no_text_makes_the_parser_of_uris_panic(text in "(nbds?(\\+unix|\\+vsock)?://)?.{0,30}([?&](tls-[a-z]+|socket)=.{0,10})*") {
        survives(&text);
    }
}
