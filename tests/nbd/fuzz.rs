//! Truncated and mutated bytes of a server: the client ends with a result or a reason, at once.
//!
//! The server says its bytes, pausing before each reply until it has seen that many requests, then
//! closes its side. Cookies can be foreseen (slot 0, generation 1, then 2), so an unmutated
//! transcript is a successful session.

use std::time::Duration;

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use vmbackup::block::{BlockSource, Buffer, ByteRange, ExtentKind};
use vmbackup::error::{Error, Result};
use vmbackup::nbd::wire::{self, HeaderStyle, chunk, export, option, reply};

use crate::corpus::{Corpus, Parts, watched};
use crate::script::{Asked, CONTEXT, SIZE, Scripted, chunk_of, greeting, honest, simple};

/// Cookies of the first and the second request.
const COOKIES: [u64; 2] = [1 << 16, 2 << 16];
const LEN: usize = 1024;
/// Patience where nothing should need it.
const LONG: Duration = Duration::from_secs(20);
/// Patience where a damaged handshake may keep the client from ever asking.
const SHORT: Duration = Duration::from_millis(5);

/// What a server says, and where it waits for the first and the second request.
#[derive(Clone)]
struct Transcript {
    bytes: Vec<u8>,
    pauses: Vec<usize>,
}

impl Transcript {
    /// Cut where it waits.
    fn parts(&self) -> Parts {
        let mut parts = Vec::new();
        let mut start = 0;
        for pause in &self.pauses {
            let pause = (*pause).min(self.bytes.len());
            parts.push(self.bytes[start..pause].to_vec());
            start = pause;
        }
        parts.push(self.bytes[start..].to_vec());
        parts
    }

    fn of(parts: &Parts) -> Self {
        let mut bytes = Vec::new();
        let mut pauses = Vec::new();
        for part in parts {
            bytes.extend(part);
            pauses.push(bytes.len());
        }
        // The last part is followed by the end.
        pauses.pop();
        Self { bytes, pauses }
    }
}

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

/// Says the transcript; waits no longer than `patience` for a request that may never come.
async fn say(mut stream: DuplexStream, transcript: Transcript, patience: Duration) {
    let mut heard = Vec::new();
    let mut said = 0;
    for (index, pause) in transcript.pauses.iter().enumerate() {
        let pause = (*pause).min(transcript.bytes.len());
        if stream.write_all(&transcript.bytes[said..pause]).await.is_err() {
            return;
        }
        said = pause;
        if pause < transcript.bytes.len() {
            let listen = listen(&mut stream, &mut heard, index + 1);
            let _ = tokio::time::timeout(patience, listen).await;
        }
    }
    if stream.write_all(&transcript.bytes[said..]).await.is_ok() && stream.shutdown().await.is_ok()
    {
        listen(&mut stream, &mut heard, usize::MAX).await;
    }
}

/// Hears what the client says until it has made `requests` requests or hangs up.
async fn listen(stream: &mut DuplexStream, heard: &mut Vec<u8>, requests: usize) {
    let magics = [wire::REQUEST.to_be_bytes(), wire::REQUEST_EXTENDED.to_be_bytes()];
    while heard.windows(4).filter(|four| magics.iter().any(|m| four == m)).count() < requests {
        if stream.read_buf(heard).await.is_ok_and(|n| n == 0) {
            return;
        }
    }
}

/// The session against a server that says this.
async fn session(transcript: Transcript, patience: Duration) -> Result<()> {
    let server = Scripted::new(move |stream| say(stream, transcript.clone(), patience));
    let client = server.open().await?;
    let map = client.extents(ByteRange::new(0, 65536)).await?;
    assert!(!map.is_empty() && map.end() <= 65536 && map.bytes_of(ExtentKind::Unchanged) == 0);
    let buffer = client.read(0, Buffer::unbudgeted(vec![0xee; LEN])).await?;
    assert_eq!(buffer.len(), LEN);
    Ok(())
}

/// `Closed` without a reason would mean that the connection's task panicked.
fn has_a_reason(error: &Error) {
    assert!(!error.to_string().ends_with("is closed"), "{error:?}");
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
    let end = watched("nbd", &parts, || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let session = session(transcript.clone(), SHORT);
        let result = runtime.block_on(async { tokio::time::timeout(LONG, session).await });
        match result.expect("the client ends by itself") {
            Ok(()) => "success".to_owned(),
            Err(error) => {
                has_a_reason(&error);
                error.to_string()
            }
        }
    });
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
}
