//! Payloads of options, taken apart without trusting a length in them. No I/O.

use crate::nbd::wire::{STRING_BYTES_MAX, be16, be32};

/// A broken rule of an option's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed(pub(super) &'static str);

/// Name and wanted items of INFO and GO.
pub(super) fn info(payload: &[u8]) -> Result<(&[u8], Vec<u16>), Malformed> {
    let (name, rest) = string(payload)?;
    let (count, items) = rest.split_at_checked(2).ok_or(Malformed("the option is too short"))?;
    if items.len() != usize::from(be16(count)) * 2 {
        return Err(Malformed("the number of items is not the one announced"));
    }
    Ok((name, items.chunks_exact(2).map(be16).collect()))
}

/// Export name and queries of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(super) fn meta_contexts(payload: &[u8]) -> Result<(&[u8], Vec<&[u8]>), Malformed> {
    let (name, rest) = string(payload)?;
    let (count, mut rest) = rest.split_at_checked(4).ok_or(Malformed("the option is too short"))?;
    let count = be32(count);
    let mut queries = Vec::new();
    // Each query takes four bytes at least, so that the payload bounds the list, not the count.
    for _ in 0..count {
        let (query, after) = string(rest)?;
        queries.push(query);
        rest = after;
    }
    if !rest.is_empty() {
        return Err(Malformed("bytes follow the last query"));
    }
    Ok((name, queries))
}

/// A string with its length before it, and what follows.
fn string(bytes: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let (len, rest) = bytes.split_at_checked(4).ok_or(Malformed("the option is too short"))?;
    let len = usize::try_from(be32(len)).unwrap_or(usize::MAX);
    if len > STRING_BYTES_MAX {
        return Err(Malformed("a string is longer than 4096 bytes"));
    }
    rest.split_at_checked(len).ok_or(Malformed("a string passes the end of the option"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lengths_that_lie_are_malformed() {
        let payload = |len: u32, rest: &[u8]| [&len.to_be_bytes()[..], rest].concat();
        assert_eq!(info(&payload(1, b"a\0\x01\0\x03")), Ok((&b"a"[..], vec![3])));
        for (len, rest) in [
            (1, &b"a\0\x02\0\x03"[..]),
            (1, b"a\0\x01\0\x03\0"),
            (2, b"a"),
            (1, b"a\0"),
            (u32::MAX, b"a\0\0"),
            (4097, &[0; 5000]),
        ] {
            info(&payload(len, rest)).unwrap_err();
        }
        assert_eq!(
            meta_contexts(&payload(0, &[0, 0, 0, 1, 0, 0, 0, 1, b'q'])),
            Ok((&b""[..], vec![&b"q"[..]]))
        );
        for rest in [&[255, 255, 255, 255][..], &[0, 0, 0, 0, 1], &[0, 0, 0, 2, 0, 0, 0, 0]] {
            meta_contexts(&payload(0, rest)).unwrap_err();
        }
    }

    proptest! {
        #[test]
        fn no_payload_makes_the_parsers_panic(payload in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = (info(&payload), meta_contexts(&payload));
        }
    }
}
