//! A request in flight and what its reply has brought so far.
//!
//! Pure bookkeeping, so that every rule about replies is in one place and can be tested without a
//! server: which bytes of a read are covered, which extents a status chunk may hold, how many
//! chunks a reply may have. A `Broken` is a rule the server broke; the caller ends the connection.

use std::ops::Range;
use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::error::{NbdError, violation};
use super::patience::Slow;
use super::wire::{self, HeaderStyle, be32, be64, command};
use crate::block::Buffer;

/// A broken rule, with the offending number.
pub(super) type Broken = String;

/// Most extents in one reply, of all its contexts (for one of them what libnbd and nbdkit agree on).
const EXTENTS_MAX: u64 = 1 << 20;
/// Chunks a reply may have beyond those its data can need: errors, NONE.
const CHUNKS_EXTRA: u64 = 8;
/// Smallest data chunk a server may split a read into, on average.
const CHUNK_BYTES_MIN: u64 = 512;

/// What a request ends with.
#[derive(Debug)]
pub(super) enum Outcome {
    /// Success, nothing to hand over.
    Done,
    /// The buffer, filled.
    Read(Buffer),
    /// What every context told.
    Status(Vec<ContextStatus>),
}

/// The extents one meta context told, coalesced; the first begins at the request's offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ContextStatus {
    /// The context's id on the connection.
    pub(super) id: u32,
    /// Length and flags; lengths are not zero, and their sum does not overflow from the offset on.
    pub(super) runs: Vec<(u64, u64)>,
}

/// What a request waits for.
#[derive(Debug)]
pub(super) enum Expected {
    /// Success or failure.
    Plain,
    /// Data into `at` of the buffer.
    Read { buffer: Buffer, at: Range<usize>, covered: Coverage },
    /// One chunk for each of the context ids.
    Status { ids: Vec<u32>, told: Vec<ContextStatus>, extents: Extents },
}

/// How many extents a query asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extents {
    /// As many as the server likes to tell; the last may pass the end of the request.
    Any,
    /// The first one (REQ_ONE), as far as the request goes.
    One,
}

/// A request that was sent or is about to be.
#[derive(Debug)]
pub(super) struct InFlight {
    pub(super) command: u16,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) expected: Expected,
    /// The first error of the reply: number and message.
    pub(super) error: Option<(u32, String)>,
    pub(super) chunks: u64,
    pub(super) done: oneshot::Sender<Result<Outcome, NbdError>>,
    /// The place among the requests in flight; given back with the request.
    pub(super) _place: OwnedSemaphorePermit,
    /// Counted among those that may take long, if it is one.
    pub(super) _slow: Option<Slow>,
}

impl InFlight {
    /// The command and its range, for errors.
    pub(super) fn describe(&self) -> String {
        let name = match self.command {
            command::READ => "READ",
            command::WRITE => "WRITE",
            command::FLUSH => return "FLUSH".to_owned(),
            command::WRITE_ZEROES => "WRITE_ZEROES",
            command::BLOCK_STATUS => "BLOCK_STATUS",
            command::TRIM => "TRIM",
            command::CACHE => "CACHE",
            _ => "a command",
        };
        format!("{name} of {} bytes at {}", self.len, self.offset)
    }

    /// Counts a chunk.
    pub(super) fn count_chunk(&mut self) -> Result<(), Broken> {
        let needed = match &self.expected {
            Expected::Plain => 0,
            Expected::Read { .. } => self.len / CHUNK_BYTES_MIN + 1,
            Expected::Status { ids, .. } => ids.len() as u64,
        };
        self.chunks += 1;
        if self.chunks > needed + CHUNKS_EXTRA {
            return Err(format!("{} chunks in the reply to {}", self.chunks, self.describe()));
        }
        Ok(())
    }

    /// The part of the buffer that `len` bytes from `offset` of the disk fill: within the request
    /// and not filled before. The caller fills it.
    pub(super) fn cover(&mut self, offset: u64, len: u64) -> Result<&mut [u8], Broken> {
        let (start, all, what) = (self.offset, self.len, self.describe());
        let Expected::Read { buffer, at, covered } = &mut self.expected else {
            return Err(format!("data in the reply to {what}"));
        };
        let within = offset
            .checked_sub(start)
            .filter(|from| len > 0 && from.checked_add(len).is_some_and(|end| end <= all));
        let Some(from) = within else {
            return Err(format!("{len} bytes at {offset} in the reply to {what}"));
        };
        if !covered.add(from, from + len) {
            return Err(format!("overlapping data at {offset} in the reply to {what}"));
        }
        let index = |n: u64| usize::try_from(n).expect("a request fits its buffer");
        Ok(&mut buffer[at.start + index(from)..at.start + index(from + len)])
    }

    /// The request is answered: its caller gets what it got. An error is a rule broken by ending
    /// the reply here; the caller has been told of it too.
    pub(super) fn finish(self, peer: &Arc<str>) -> Result<(), NbdError> {
        let what = self.describe();
        let broken = |how: &str| Err(violation(peer, format!("the reply to {what} {how}")));
        let outcome = match (self.error, self.expected) {
            (Some((errno, message)), _) => Err(NbdError::Refused {
                peer: Arc::clone(peer),
                what: what.as_str().into(),
                errno,
                message: message.into(),
            }),
            (None, Expected::Plain) => Ok(Outcome::Done),
            (None, Expected::Read { buffer, covered, .. }) => {
                if covered.is_all(self.len) {
                    Ok(Outcome::Read(buffer))
                } else {
                    broken("leaves bytes out")
                }
            }
            (None, Expected::Status { ids, told, .. }) => {
                if told.len() == ids.len() {
                    Ok(Outcome::Status(told))
                } else {
                    broken("leaves meta contexts out")
                }
            }
        };
        let ends = match &outcome {
            Err(error @ NbdError::Violation { .. }) => Err(error.clone()),
            _ => Ok(()),
        };
        // The receiver may be gone: a dropped request is nobody's business any more.
        let _ = self.done.send(outcome);
        ends
    }
}

/// Which bytes of a read have come, as disjoint, sorted, merged spans.
#[derive(Debug, Default)]
pub(super) struct Coverage {
    spans: Vec<(u64, u64)>,
}

impl Coverage {
    /// Adds a span; `false` if a byte of it was there already.
    fn add(&mut self, start: u64, end: u64) -> bool {
        let at = self.spans.partition_point(|span| span.0 < start);
        let joins_previous = match at.checked_sub(1).map(|i| self.spans[i].1) {
            Some(previous_end) if previous_end > start => return false,
            previous_end => previous_end == Some(start),
        };
        let joins_next = match self.spans.get(at) {
            Some(next) if next.0 < end => return false,
            next => next.is_some_and(|next| next.0 == end),
        };
        match (joins_previous, joins_next) {
            (true, true) => self.spans[at - 1].1 = self.spans.remove(at).1,
            (true, false) => self.spans[at - 1].1 = end,
            (false, true) => self.spans[at].0 = start,
            (false, false) => self.spans.insert(at, (start, end)),
        }
        true
    }

    fn is_all(&self, len: u64) -> bool {
        len == 0 || self.spans == [(0, len)]
    }
}

/// Reads a BLOCK_STATUS chunk as its bytes arrive, never holding more than it was sent.
pub(super) struct StatusParser {
    id: u32,
    runs: Vec<(u64, u64)>,
    covered: u64,
    offset: u64,
    len: u64,
    entry: usize,
    wanted: Extents,
}

impl StatusParser {
    /// Checks a chunk's kind and payload length; yields how long its head is and how many extents
    /// follow.
    pub(super) fn shape(kind: u16, len: u64, style: HeaderStyle) -> Result<(usize, u64), Broken> {
        let extended = style == HeaderStyle::Extended;
        let right_kind =
            if extended { wire::chunk::BLOCK_STATUS_EXT } else { wire::chunk::BLOCK_STATUS };
        let (head, entry) = if extended { (8, 16) } else { (4, 8) };
        let extents = len.saturating_sub(head) / entry;
        if kind != right_kind {
            return Err(format!("status chunk of type {kind} with these headers"));
        }
        if len < head + entry || extents * entry != len - head || extents > EXTENTS_MAX {
            return Err(format!("status chunk of {len} bytes"));
        }
        Ok((usize::try_from(head).expect("4 or 8"), extents))
    }

    /// Starts on a chunk with its head.
    pub(super) fn new(request: &InFlight, head: &[u8], extents: u64) -> Result<Self, Broken> {
        let id = be32(&head[..4]);
        let Expected::Status { ids, told, extents: wanted } = &request.expected else {
            return Err(format!("a status chunk in the reply to {}", request.describe()));
        };
        if !ids.contains(&id) {
            return Err(format!("status of meta context {id}, which was not negotiated"));
        }
        let others = told.iter().map(|context| context.runs.len() as u64).sum::<u64>();
        if others + extents > EXTENTS_MAX {
            return Err(format!("{} extents in one reply", others + extents));
        }
        if told.iter().any(|context| context.id == id) {
            return Err(format!("meta context {id} twice in one reply"));
        }
        if head.len() == 8 && u64::from(be32(&head[4..8])) != extents {
            return Err(format!("{extents} extents in a status chunk that counts otherwise"));
        }
        if *wanted == Extents::One && extents != 1 {
            return Err(format!("{extents} extents where one was asked for"));
        }
        let entry = if head.len() == 8 { 16 } else { 8 };
        let (offset, len) = (request.offset, request.len);
        Ok(Self { id, runs: Vec::new(), covered: 0, offset, len, entry, wanted: *wanted })
    }

    /// Bytes of one extent on the wire.
    pub(super) fn entry_bytes(&self) -> usize {
        self.entry
    }

    /// Takes whole extents.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        for entry in bytes.chunks_exact(self.entry) {
            let (len, flags) = if self.entry == 16 {
                (be64(&entry[..8]), be64(&entry[8..]))
            } else {
                (u64::from(be32(&entry[..4])), u64::from(be32(&entry[4..])))
            };
            if len == 0 {
                return Err("an extent of no length".to_owned());
            }
            // Only the last extent may pass the request's end.
            if self.covered >= self.len {
                return Err("an extent beyond the end of the request".to_owned());
            }
            if self.wanted == Extents::One && len > self.len {
                return Err(format!(
                    "an extent of {len} bytes where {} were asked about",
                    self.len
                ));
            }
            let covered = self.covered.checked_add(len);
            let covered = covered.filter(|covered| self.offset.checked_add(*covered).is_some());
            self.covered = covered.ok_or_else(|| format!("an extent of {len} bytes"))?;
            match self.runs.last_mut() {
                Some(last) if last.1 == flags => last.0 += len,
                _ => self.runs.push((len, flags)),
            }
        }
        Ok(())
    }

    /// Hands the extents to the request.
    pub(super) fn store(self, request: &mut InFlight) {
        if let Expected::Status { told, .. } = &mut request.expected {
            told.push(ContextStatus { id: self.id, runs: self.runs });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::sync::Semaphore;

    #[test]
    fn a_reply_has_so_many_extents_over_all_its_contexts() {
        let place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let mut request = InFlight {
            command: command::BLOCK_STATUS,
            offset: 0,
            len: EXTENTS_MAX + 1,
            expected: Expected::Status { ids: vec![1, 2], told: Vec::new(), extents: Extents::Any },
            error: None,
            chunks: 0,
            done: oneshot::channel().0,
            _place: place,
            _slow: None,
        };
        let head = |id: u32| id.to_be_bytes();
        let mut first = StatusParser::new(&request, &head(1), EXTENTS_MAX - 1).unwrap();
        for flags in (0..2_u32).cycle().take(usize::try_from(EXTENTS_MAX - 1).unwrap()) {
            first.feed(&[1_u32.to_be_bytes(), flags.to_be_bytes()].concat()).unwrap();
        }
        first.store(&mut request);
        assert!(StatusParser::new(&request, &head(2), 1).is_ok());
        assert!(StatusParser::new(&request, &head(2), 2).is_err());
    }

    proptest! {
        #[test]
        fn coverage_equals_a_bitmap(spans in prop::collection::vec((0u64..64, 1u64..20), 0..40)) {
            let mut coverage = Coverage::default();
            let mut bytes = [false; 84];
            for (start, len) in spans {
                let span = usize::try_from(start).unwrap()..usize::try_from(start + len).unwrap();
                let free = bytes[span.clone()].iter().all(|b| !*b);
                prop_assert_eq!(coverage.add(start, start + len), free);
                if free {
                    bytes[span].fill(true);
                }
                let all = bytes.iter().take_while(|b| **b).count();
                let only_prefix = bytes[all..].iter().all(|b| !*b);
                prop_assert_eq!(all > 0 && coverage.is_all(all as u64), all > 0 && only_prefix);
            }
        }
    }
}
