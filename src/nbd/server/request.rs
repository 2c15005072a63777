//! From a request's header to what is to be done, or to why not. Pure: every rule about requests is
//! here and can be tested without a client.

use super::contexts::Context;
use super::exports::Export;
use super::limits::{CACHE_PIECE_BYTES, EXTENT_BYTES, EXTENTS_MAX, PAYLOAD_BYTES_MAX};
use crate::block::{ByteRange, ZeroMode};
use crate::nbd::wire::{HeaderStyle, Request, be32, be64, command, command_flag, errno};

/// A request that is carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Read(ByteRange, Fragments),
    Write(ByteRange, Durability),
    Flush,
    Trim(ByteRange, Durability),
    Cache(ByteRange),
    Zero(ByteRange, ZeroMode, Durability),
    /// The contexts to tell of, and how many extents of each.
    Status(ByteRange, Vec<Context>, usize),
}

impl Action {
    /// What it takes in memory at a time.
    pub(super) fn memory_bytes(&self) -> usize {
        match self {
            Self::Read(range, _) | Self::Write(range, _) => {
                usize::try_from(range.len()).expect("at most 32 MiB")
            }
            Self::Cache(range) => {
                usize::try_from(range.len().min(CACHE_PIECE_BYTES)).expect("a MiB")
            }
            Self::Status(_, contexts, extents_max) => {
                contexts.len() * EXTENTS_MAX.min(*extents_max) * EXTENT_BYTES
            }
            Self::Flush | Self::Trim(..) | Self::Zero(..) => 0,
        }
    }
}

/// Whether the data of a READ may come in several chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fragments {
    Many,
    One,
}

/// Whether a change is on stable storage before it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    Later,
    Now,
}

/// An error in answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) errno: u32,
    pub(super) text: String,
}

/// Shorthand for a refusal.
pub(super) fn refuse(errno: u32, text: impl Into<String>) -> Refusal {
    Refusal { errno, text: text.into() }
}

/// The payload that follows a header, by the client's own words.
pub(super) fn payload_bytes(request: &Request, style: HeaderStyle) -> u64 {
    let announced = style == HeaderStyle::Extended
        && request.flags & command_flag::PAYLOAD_LEN != 0
        && request.command != command::DISC;
    // QEMU and libnbd send the flag with every WRITE; without it the payload follows all the same.
    if announced || request.command == command::WRITE { request.len } else { 0 }
}

/// What a session has agreed on.
pub(super) struct Agreed<'a> {
    pub(super) export: &'a Export,
    pub(super) style: HeaderStyle,
    pub(super) contexts: &'a [Context],
}

impl Agreed<'_> {
    /// Checks a request. `payload` is that of a BLOCK_STATUS which has one.
    pub(super) fn check(
        &self,
        request: &Request,
        payload: Option<&[u8]>,
    ) -> Result<Action, Refusal> {
        let einval = |text: String| Err(refuse(errno::EINVAL, text));
        let flags = request.flags;
        let unknown = flags & !self.flags_of(request.command);
        if unknown != 0 {
            return einval(format!("flags {unknown:#x} of command {}", request.command));
        }
        let durability = match flags & command_flag::FUA {
            0 => Durability::Later,
            _ => Durability::Now,
        };
        match request.command {
            command::FLUSH => return Ok(Action::Flush),
            command::WRITE | command::TRIM | command::WRITE_ZEROES
                if self.export.sink.is_none() =>
            {
                return Err(refuse(errno::EPERM, "the export is read-only"));
            }
            command::READ | command::WRITE if request.len > PAYLOAD_BYTES_MAX => {
                return einval(format!("{} bytes are more than a request may have", request.len));
            }
            command::BLOCK_STATUS => return self.status(request, payload),
            command::READ
            | command::WRITE
            | command::TRIM
            | command::CACHE
            | command::WRITE_ZEROES => {}
            other => return einval(format!("command {other} is not known")),
        }
        let range = self.range(request, request.len)?;
        Ok(match request.command {
            command::READ if flags & command_flag::DF == 0 => Action::Read(range, Fragments::Many),
            command::READ => Action::Read(range, Fragments::One),
            command::WRITE => Action::Write(range, durability),
            command::TRIM => Action::Trim(range, durability),
            command::CACHE => Action::Cache(range),
            _ => Action::Zero(range, zero_mode(flags)?, durability),
        })
    }

    /// The flags a command may have. FUA is accepted with all (proto.md, "Command flags").
    fn flags_of(&self, command: u16) -> u16 {
        let structured = self.style != HeaderStyle::Simple;
        let extended = self.style == HeaderStyle::Extended;
        let only = |condition: bool, flag: u16| if condition { flag } else { 0 };
        command_flag::FUA
            | match command {
                command::READ => only(structured, command_flag::DF),
                command::WRITE => only(extended, command_flag::PAYLOAD_LEN),
                command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
                command::BLOCK_STATUS => {
                    command_flag::REQ_ONE | only(extended, command_flag::PAYLOAD_LEN)
                }
                _ => 0,
            }
    }

    /// The range of a request, on the disk and in whole blocks.
    fn range(&self, request: &Request, len: u64) -> Result<ByteRange, Refusal> {
        let geometry = self.export.geometry();
        let range = ByteRange::checked(request.offset, len);
        let Some(range) = range.filter(|range| range.end() <= geometry.size_bytes) else {
            let grows = [command::WRITE, command::WRITE_ZEROES].contains(&request.command);
            let errno = if grows { errno::ENOSPC } else { errno::EINVAL };
            let text = format!("{len} bytes at {} pass the end of the export", request.offset);
            return Err(refuse(errno, text));
        };
        let whole = |at: u64| at.is_multiple_of(geometry.align_bytes);
        if !whole(range.offset()) || !(whole(range.end()) || range.end() == geometry.size_bytes) {
            let text = format!("{range} are no whole blocks of {} bytes", geometry.align_bytes);
            return Err(refuse(errno::EINVAL, text));
        }
        Ok(range)
    }

    fn status(&self, request: &Request, payload: Option<&[u8]>) -> Result<Action, Refusal> {
        let einval = |text: &str| refuse(errno::EINVAL, text);
        let mut contexts = self.contexts.to_vec();
        let mut len = request.len;
        if request.flags & command_flag::PAYLOAD_LEN != 0 {
            let payload = payload.ok_or_else(|| einval("the payload is too long"))?;
            let parts = payload.split_at_checked(8).filter(|(_, ids)| ids.len() % 4 == 0);
            let (effect, ids) = parts.ok_or_else(|| einval("the payload has a wrong length"))?;
            len = be64(effect);
            let ids: Vec<u32> = ids.chunks_exact(4).map(be32).collect();
            contexts.retain(|context| ids.contains(&context.id));
            if contexts.len() != ids.len() {
                return Err(einval("a meta context is named twice, or was not chosen"));
            }
        }
        if contexts.is_empty() {
            return Err(einval("no meta context was chosen"));
        }
        if len == 0 {
            return Err(einval("the status of nothing"));
        }
        let one = request.flags & command_flag::REQ_ONE != 0;
        let range = self.range(request, len)?;
        Ok(Action::Status(range, contexts, if one { 1 } else { usize::MAX }))
    }
}

/// Which zeroes the flags of a request ask for. No sink promises both, to be fast and to keep the space
/// allocated: then the client writes the zeroes.
fn zero_mode(flags: u16) -> Result<ZeroMode, Refusal> {
    let (fast, allocated) =
        (flags & command_flag::FAST_ZERO != 0, flags & command_flag::NO_HOLE != 0);
    match (fast, allocated) {
        (true, true) => Err(refuse(errno::ENOTSUP, "no fast zeroes keep their space")),
        (true, false) => Ok(ZeroMode::FastOnly),
        (false, true) => Ok(ZeroMode::Allocated),
        (false, false) => Ok(ZeroMode::Sparse),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::memory::MemoryDisk;
    use crate::nbd::server::contexts;
    use std::sync::Arc;

    const SIZE: u64 = 1 << 20;

    fn check(style: HeaderStyle, writable: bool, request: Request) -> Result<Action, u32> {
        let disk = Arc::new(MemoryDisk::zeroed(1 << 20));
        let export = if writable {
            Export::writable("", disk.clone(), disk)
        } else {
            Export::read_only("", disk)
        };
        let contexts = contexts::all(&export);
        let agreed = Agreed { export: &export, style, contexts: &contexts };
        agreed.check(&request, None).map_err(|refusal| refusal.errno)
    }

    fn request(command: u16, flags: u16, offset: u64, len: u64) -> Request {
        Request { flags, command, cookie: 1, offset, len }
    }

    #[test]
    fn requests_past_the_end_are_refused_with_the_documented_errors() {
        for (command, errno) in [
            (command::READ, errno::EINVAL),
            (command::WRITE, errno::ENOSPC),
            (command::TRIM, errno::EINVAL),
            (command::CACHE, errno::EINVAL),
            (command::WRITE_ZEROES, errno::ENOSPC),
            (command::BLOCK_STATUS, errno::EINVAL),
        ] {
            for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 2), (1, SIZE)] {
                let result = check(HeaderStyle::Extended, true, request(command, 0, offset, len));
                assert_eq!(result, Err(errno), "{command} at {offset}");
            }
            check(HeaderStyle::Extended, true, request(command, 0, SIZE - 1, 1)).unwrap();
        }
    }

    #[test]
    fn a_command_takes_its_own_flags_only_and_fua_goes_with_all() {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, PAYLOAD_LEN, REQ_ONE};
        let all = [NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN, 1 << 6, 1 << 15];
        for (command, own) in [
            (command::READ, DF),
            (command::WRITE, PAYLOAD_LEN),
            (command::FLUSH, 0),
            (command::TRIM, 0),
            (command::CACHE, 0),
            (command::WRITE_ZEROES, NO_HOLE | FAST_ZERO),
            (command::BLOCK_STATUS, REQ_ONE),
        ] {
            for flag in all.iter().filter(|flag| **flag & own & !PAYLOAD_LEN != 0).chain(&[0]) {
                let request = request(command, FUA | flag, 0, 512);
                check(HeaderStyle::Extended, true, request).unwrap();
            }
            for flag in all.iter().filter(|flag| *flag & (own | PAYLOAD_LEN) == 0) {
                let result = check(HeaderStyle::Extended, true, request(command, *flag, 0, 512));
                assert_eq!(result, Err(errno::EINVAL), "{command} with {flag:#x}");
            }
        }
        let simple = check(HeaderStyle::Simple, true, request(command::READ, DF, 0, 512));
        assert_eq!(simple, Err(errno::EINVAL), "DF is not offered without structured replies");
    }

    /// Holes were punched.
    #[test]
    fn fast_zeroes_that_are_to_stay_allocated_are_left_to_the_client() {
        let both = command_flag::NO_HOLE | command_flag::FAST_ZERO;
        let result = check(HeaderStyle::Simple, true, request(command::WRITE_ZEROES, both, 0, 512));
        assert_eq!(result, Err(errno::ENOTSUP));
    }

    #[test]
    fn a_read_only_export_refuses_changes_first() {
        for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            let result = check(HeaderStyle::Simple, false, request(command, 0, SIZE, 512));
            assert_eq!(result, Err(errno::EPERM));
        }
    }

    #[test]
    fn unknown_commands_and_oversized_requests_are_refused() {
        for (command, len) in [(8, 0), (99, 512), (command::READ, (32 << 20) + 1)] {
            let result = check(HeaderStyle::Extended, true, request(command, 0, 0, len));
            assert_eq!(result, Err(errno::EINVAL));
        }
    }
}
