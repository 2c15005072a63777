//! Truncated and mutated bytes of a server: the client ends with a result or a reason, at once.

use proptest::prelude::*;
use vmbackup::nbd::wire::{HeaderStyle, option, reply};

use crate::corpus::{Corpus, watched};
use crate::looking::{listed, told};
use crate::said::{LONG, Session, Transcript, ended, has_a_reason, session};
use crate::script::{greeting, honest, option_reply};
use crate::transcripts::all;

#[tokio::test]
async fn whole_transcripts_succeed() {
    for (index, (about, transcript)) in all().into_iter().enumerate() {
        let end = session(about, transcript, LONG).await;
        end.unwrap_or_else(|e| panic!("transcript {index}, {about:?}: {e:?}"));
    }
}

#[tokio::test]
async fn a_server_that_hangs_up_anywhere_is_an_error() {
    for (about, transcript) in all() {
        for end in 0..transcript.bytes.len() {
            let mut cut = transcript.clone();
            cut.bytes.truncate(end);
            let end = session(about, cut, LONG).await;
            has_a_reason(&end.expect_err("it was cut"));
        }
    }
}

fn corpus(about: Session) -> Corpus {
    Corpus::at(&format!("nbd/corpus/{}", about.name()))
}

/// The client ends with a result or a reason; the way it ends is one the corpus should have.
fn ends(about: Session, transcript: &Transcript) -> String {
    let parts = transcript.parts();
    let end = watched(&format!("nbd-{}", about.name()), &parts, || ended(about, transcript));
    corpus(about).keep(&end, &parts);
    end
}

#[test]
#[allow(clippy::print_stderr, reason = "names the input that fails")]
fn servers_of_the_corpus_never_crash_or_hang_the_client() {
    for about in Session::ALL {
        let inputs = corpus(about).inputs();
        assert!(inputs.len() > 10, "the corpus of {about:?} is there");
        for (name, parts) in inputs {
            eprintln!("{name}");
            ends(about, &Transcript::of(&parts));
        }
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

/// Answers to options: for which session, after which honest ones, to which option.
fn options() -> Vec<(Session, Vec<u8>, u32)> {
    let style = HeaderStyle::Structured;
    let mut options = vec![(Session::Secure, greeting(), option::STARTTLS)];
    let headers = [option::EXTENDED_HEADERS, option::STRUCTURED_REPLY];
    let ways: [(Session, &[u32]); 3] = [
        (Session::Read, &[option::SET_META_CONTEXT, option::GO]),
        (Session::Write, &[option::SET_META_CONTEXT, option::LIST_META_CONTEXT, option::GO]),
        (Session::Look, &[option::LIST, option::INFO, option::LIST_META_CONTEXT]),
    ];
    for (about, asked) in ways {
        let mut said = greeting();
        for option in headers.iter().chain(asked).copied() {
            options.push((about, said.clone(), option));
            said.extend(match option {
                option::LIST => listed(&[("vda", "")]),
                option::INFO => told(),
                option => honest(style, option),
            });
        }
    }
    options
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn mutated_servers_never_crash_or_hang_the_client(
        which in any::<prop::sample::Index>(),
        damages in prop::collection::vec((any::<prop::sample::Index>(), damage()), 1..6),
    ) {
        let mut transcripts = all();
        let (about, mut damaged) = transcripts.swap_remove(which.index(transcripts.len()));
        for (at, damage) in damages {
            apply(&mut damaged.bytes, at, damage);
        }
        ends(about, &damaged);
    }

    #[test]
    fn random_option_replies_never_crash_the_client(
        kind in prop_oneof![0..6_u32, (0..12_u32).prop_map(|n| reply::ERROR_BIT | n)],
        payload in prop::collection::vec(any::<u8>(), 0..64),
        which in any::<prop::sample::Index>(),
    ) {
        let mut options = options();
        let (about, mut bytes, option) = options.swap_remove(which.index(options.len()));
        bytes.extend(option_reply(option, kind, &payload));
        let end = ends(about, &Transcript { bytes, pauses: Vec::new() });
        // Who only looks may have seen enough.
        prop_assert!(about == Session::Look || end != "success");
    }
}

/// What comes where TLS should begin is no business of ours, but it ends, too.
#[test]
fn noise_in_place_of_tls_ends_the_session() {
    let agreed = [greeting(), option_reply(option::STARTTLS, reply::ACK, &[])].concat();
    for noise in
        [&b""[..], b"\x15\x03\x03\0\x02\x02\x28", b"HTTP/1.1 400 Bad Request\r\n\r\n", &[0; 70]]
    {
        let bytes = [&agreed, noise].concat();
        let end = ends(Session::Secure, &Transcript { bytes, pauses: Vec::new() });
        assert!(end.contains("TLS") || end.contains("lost"), "{end}");
    }
}
