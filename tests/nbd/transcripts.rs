//! What honest servers say from beginning to end, for each kind of session: what `fuzz.rs` damages.
//!
//! Cookies can be foreseen (slot 0, generation 1, then 2, …), so an unmutated transcript is a successful
//! session.

use vmbackup::nbd::wire::{self, HeaderStyle, chunk, export, option, reply};

use crate::looking::{contexts, listed, told};
use crate::said::{LEN, Session, Transcript};
use crate::script::{
    Asked, CONTEXT, SIZE, chunk_of, greeting, honest, info_block_size, info_flags, option_reply,
    simple,
};

/// All there are.
pub fn all() -> Vec<(Session, Transcript)> {
    let styles = [HeaderStyle::Simple, HeaderStyle::Structured, HeaderStyle::Extended];
    let mut all = vec![
        (Session::Read, oldstyle()),
        (Session::Read, plain_newstyle()),
        // All it tells is told by then.
        (Session::Look, Transcript::of(&oldstyle().parts()[..1])),
    ];
    for style in styles {
        all.push((Session::Read, reading(style)));
        all.push((Session::Look, looking(style)));
        all.push((Session::Write, writing(style)));
    }
    all.push((Session::Secure, without_tls()));
    all
}

/// The greeting and the agreement on headers.
fn agreement(style: HeaderStyle) -> Vec<u8> {
    let mut out = greeting();
    out.extend(honest(style, option::EXTENDED_HEADERS));
    if style != HeaderStyle::Extended {
        out.extend(honest(style, option::STRUCTURED_REPLY));
    }
    out
}

/// The cookie of a request, the first one being 1: the same slot again and again.
fn cookie(request: u64) -> u64 {
    request << 16
}

/// All that a server says in a session of one query and one read.
fn reading(style: HeaderStyle) -> Transcript {
    let mut out = agreement(style);
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
        out.extend(chunk_of(style, head, cookie(1), 0, &status));
    } else {
        out.extend(asked(cookie(1)).status(chunk::DONE, CONTEXT, &[(512, 0), (65024, 3)]));
    }
    pauses.push(out.len());
    let mut hole = 512_u64.to_be_bytes().to_vec();
    hole.extend(100_u32.to_be_bytes());
    out.extend(asked(cookie(2)).data(0, 612, LEN - 612));
    out.extend(asked(cookie(2)).chunk(0, chunk::OFFSET_HOLE, &hole));
    out.extend(asked(cookie(2)).data(0, 0, 512));
    out.extend(asked(cookie(2)).chunk(chunk::DONE, chunk::NONE, &[]));
    Transcript { bytes: out, pauses }
}

fn with_simple_read(mut bytes: Vec<u8>) -> Transcript {
    let pauses = vec![bytes.len()];
    bytes.extend(simple(0, cookie(1)));
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

/// Two exports, what there is to know of each.
fn looking(style: HeaderStyle) -> Transcript {
    let mut out = agreement(style);
    out.extend(listed(&[("vda", "the first"), ("vdb", "")]));
    for _ in 0..2 {
        out.extend(told());
        if style != HeaderStyle::Simple {
            out.extend(contexts(2, 10));
        }
    }
    Transcript { bytes: out, pauses: Vec::new() }
}

/// A server that can do everything is told to.
fn writing(style: HeaderStyle) -> Transcript {
    let mut out = agreement(style);
    if style != HeaderStyle::Simple {
        out.extend(honest(style, option::SET_META_CONTEXT));
        let state = [&[0; 4][..], b"x-vmbackup:initial-state:sparse"].concat();
        out.extend(option_reply(option::LIST_META_CONTEXT, reply::META_CONTEXT, &state));
        out.extend(option_reply(option::LIST_META_CONTEXT, reply::ACK, &[]));
    }
    let flags = export::HAS_FLAGS
        | export::SEND_FLUSH
        | export::SEND_FUA
        | export::SEND_TRIM
        | export::SEND_WRITE_ZEROES
        | export::SEND_FAST_ZERO
        | export::SEND_CACHE;
    out.extend(info_flags(SIZE, flags));
    out.extend(info_block_size([1, 4096, 32 << 20]));
    out.extend(option_reply(option::GO, reply::ACK, &[]));
    let mut pauses = Vec::new();
    // WRITE, WRITE_ZEROES twice, TRIM, CACHE, FLUSH.
    for request in 1..=6 {
        pauses.push(out.len());
        out.extend(match style {
            HeaderStyle::Simple => simple(0, cookie(request)),
            _ => chunk_of(style, (chunk::DONE, chunk::NONE), cookie(request), 0, &[]),
        });
    }
    Transcript { bytes: out, pauses }
}

/// A server that refuses TLS and is read without.
fn without_tls() -> Transcript {
    let mut transcript = reading(HeaderStyle::Structured);
    let refusal = option_reply(option::STARTTLS, reply::POLICY, b"not today");
    let at = greeting().len();
    transcript.pauses.iter_mut().for_each(|pause| *pause += refusal.len());
    transcript.bytes.splice(at..at, refusal);
    transcript
}
