//! From an outcome to the bytes of its reply. Pure, no I/O.
//!
//! Data is never copied: a reply is a list of slices, alternating between headers made here and the
//! buffer that was read.

use std::io::IoSlice;
use std::ops::Range;

use super::execute::Outcome;
use super::limits::ZERO_RUN_BYTES;
use super::memory::Held;
use super::request::{Fragments, Refusal};
use crate::block::Buffer;
use crate::nbd::wire::{self, HeaderStyle, Request, chunk};

/// Longest text sent with an error (proto.md: at most 4096; CVE-2020-10761 was about more).
const ERROR_TEXT_BYTES_MAX: usize = 1024;

/// A reply on its way to the client. Holds its data and its place among the requests in progress
/// until it is written.
pub(super) struct Reply {
    heads: Vec<u8>,
    /// Where in `heads` a stretch ends, and the part of the buffer that follows it.
    parts: Vec<(usize, Range<usize>)>,
    data: Option<Buffer>,
    _held: Held,
}

impl Reply {
    /// The reply to `request`.
    pub(super) fn new(
        request: &Request,
        style: HeaderStyle,
        outcome: Result<Outcome, Refusal>,
        hold: Held,
    ) -> Self {
        let mut reply = Self { heads: Vec::new(), parts: Vec::new(), data: None, _held: hold };
        let mut head = Head { out: &mut reply.heads, request, style };
        match outcome {
            Err(refusal) => head.error(&refusal),
            Ok(Outcome::Done) => head.done(),
            Ok(Outcome::Status(told)) => head.status(&told),
            Ok(Outcome::Data(buffer, fragments)) => {
                if style == HeaderStyle::Simple {
                    head.simple(0);
                    reply.parts.push((reply.heads.len(), 0..buffer.len()));
                } else {
                    reply.parts = head.data(&buffer, fragments);
                }
                reply.data = Some(buffer);
            }
        }
        reply
    }

    /// Appends what is to be written, in order.
    pub(super) fn slices<'a>(&'a self, out: &mut Vec<IoSlice<'a>>) {
        let mut start = 0;
        for (end, data) in &self.parts {
            out.push(IoSlice::new(&self.heads[start..*end]));
            start = *end;
            let buffer = self.data.as_ref().expect("a reply with data has a buffer");
            if !data.is_empty() {
                out.push(IoSlice::new(&buffer[data.clone()]));
            }
        }
        if start < self.heads.len() {
            out.push(IoSlice::new(&self.heads[start..]));
        }
    }
}

/// Writes headers of one reply.
struct Head<'a> {
    out: &'a mut Vec<u8>,
    request: &'a Request,
    style: HeaderStyle,
}

impl Head<'_> {
    fn simple(&mut self, errno: u32) {
        self.out.extend(wire::REPLY_SIMPLE.to_be_bytes());
        self.out.extend(errno.to_be_bytes());
        self.out.extend(self.request.cookie.to_be_bytes());
    }

    /// A chunk's header; `len` bytes follow.
    fn chunk(&mut self, flags: u16, kind: u16, len: u64) {
        let extended = self.style == HeaderStyle::Extended;
        let magic = if extended { wire::REPLY_EXTENDED } else { wire::REPLY_STRUCTURED };
        self.out.extend(magic.to_be_bytes());
        self.out.extend(flags.to_be_bytes());
        self.out.extend(kind.to_be_bytes());
        self.out.extend(self.request.cookie.to_be_bytes());
        if extended {
            self.out.extend(self.request.offset.to_be_bytes());
            self.out.extend(len.to_be_bytes());
        } else {
            let len = u32::try_from(len).expect("a chunk is at most 32 MiB");
            self.out.extend(len.to_be_bytes());
        }
    }

    fn done(&mut self) {
        // A structured session may answer simply what is no READ; one way for all is simpler.
        match self.style {
            HeaderStyle::Simple => self.simple(0),
            _ => self.chunk(chunk::DONE, chunk::NONE, 0),
        }
    }

    fn error(&mut self, refusal: &Refusal) {
        if self.style == HeaderStyle::Simple {
            return self.simple(refusal.errno);
        }
        let mut end = refusal.text.len().min(ERROR_TEXT_BYTES_MAX);
        while !refusal.text.is_char_boundary(end) {
            end -= 1;
        }
        let text = &refusal.text.as_bytes()[..end];
        self.chunk(chunk::DONE, chunk::ERROR, 6 + text.len() as u64);
        self.out.extend(refusal.errno.to_be_bytes());
        let len = u16::try_from(text.len()).expect("at most 1024");
        self.out.extend(len.to_be_bytes());
        self.out.extend(text);
    }

    fn status(&mut self, told: &[(u32, Vec<(u64, u64)>)]) {
        let extended = self.style == HeaderStyle::Extended;
        for (index, (id, runs)) in told.iter().enumerate() {
            let flags = if index + 1 == told.len() { chunk::DONE } else { 0 };
            if extended {
                self.chunk(flags, chunk::BLOCK_STATUS_EXT, 8 + 16 * runs.len() as u64);
            } else {
                self.chunk(flags, chunk::BLOCK_STATUS, 4 + 8 * runs.len() as u64);
            }
            self.out.extend(id.to_be_bytes());
            if extended {
                let count = u32::try_from(runs.len()).expect("a few thousand");
                self.out.extend(count.to_be_bytes());
            }
            for (len, flags) in runs {
                if extended {
                    self.out.extend(len.to_be_bytes());
                    self.out.extend(flags.to_be_bytes());
                } else {
                    let small = |n: u64| u32::try_from(n).expect("a range of 32 bits");
                    self.out.extend(small(*len).to_be_bytes());
                    self.out.extend(small(*flags).to_be_bytes());
                }
            }
        }
    }

    /// Data and holes. Nothing can fail any more, so the last chunk may say DONE.
    fn data(&mut self, buffer: &Buffer, fragments: Fragments) -> Vec<(usize, Range<usize>)> {
        let runs = match fragments {
            Fragments::Many => zero_runs(buffer),
            Fragments::One => vec![(0..buffer.len(), false)],
        };
        if buffer.is_empty() {
            self.done();
            return Vec::new();
        }
        let mut parts = Vec::new();
        for (index, (run, zero)) in runs.iter().enumerate() {
            let flags = if index + 1 == runs.len() { chunk::DONE } else { 0 };
            let offset = self.request.offset + run.start as u64;
            if *zero {
                self.chunk(flags, chunk::OFFSET_HOLE, 12);
                self.out.extend(offset.to_be_bytes());
                let len = u32::try_from(run.len()).expect("a request is at most 32 MiB");
                self.out.extend(len.to_be_bytes());
            } else {
                self.chunk(flags, chunk::OFFSET_DATA, 8 + run.len() as u64);
                self.out.extend(offset.to_be_bytes());
                parts.push((self.out.len(), run.clone()));
            }
        }
        parts
    }
}

/// The buffer cut into runs of data and of zeroes. Data shows itself in the first bytes of a block
/// nearly always, so this costs next to nothing where there are no zeroes, and where there are it
/// costs less than sending them.
fn zero_runs(bytes: &[u8]) -> Vec<(Range<usize>, bool)> {
    let mut runs: Vec<(Range<usize>, bool)> = Vec::new();
    for (index, block) in bytes.chunks(ZERO_RUN_BYTES).enumerate() {
        let start = index * ZERO_RUN_BYTES;
        let end = start + block.len();
        // Short tails are not worth a chunk of their own.
        let zero = block.len() == ZERO_RUN_BYTES && is_zero(block);
        match runs.last_mut() {
            Some((run, kind)) if *kind == zero => run.end = end,
            _ => runs.push((start..end, zero)),
        }
    }
    runs
}

fn is_zero(block: &[u8]) -> bool {
    // Wide steps let the compiler use vectors; the first non-zero step ends it.
    block.chunks(256).all(|step| step.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zeroes_are_found_in_whole_blocks() {
        let mut bytes = vec![0; 4 * ZERO_RUN_BYTES + 10];
        bytes[ZERO_RUN_BYTES] = 1;
        bytes[4 * ZERO_RUN_BYTES - 1] = 1;
        let z = ZERO_RUN_BYTES;
        let expected =
            [(0..z, true), (z..2 * z, false), (2 * z..3 * z, true), (3 * z..4 * z + 10, false)];
        assert_eq!(zero_runs(&bytes), expected);
        assert!(zero_runs(&[]).is_empty());
    }
}
