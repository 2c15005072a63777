//! Carrying a request out on the export's disk.

use super::contexts::Runs;
use super::exports::Export;
use super::limits::{CACHE_BYTES_MAX, CACHE_PIECE_BYTES};
use super::memory::Allowance;
use super::request::{Action, Durability, Fragments, Refusal, refuse};
use crate::block::{BlockSink, Buffer, ByteRange, ZeroMode};
use crate::error::{Error, Kind, Result};
use crate::nbd::wire::{errno, peer_text};

/// What a request came to.
pub(super) enum Outcome {
    /// Success, nothing to tell.
    Done,
    /// The data of a READ: all of the buffer.
    Data(Buffer, Fragments),
    /// What each context says.
    Status(Vec<(u32, Runs)>),
}

/// Carries `action` out. `buffer` is what a READ fills or a WRITE holds, of exactly its length.
///
/// Dropping the future leaves a change done, half done or not done, as the disk has it.
pub(super) async fn execute(
    export: &Export,
    action: Action,
    buffer: Option<Buffer>,
    memory: &Allowance,
) -> std::result::Result<Outcome, Refusal> {
    match run(export, &action, buffer, memory).await {
        Ok(outcome) => Ok(outcome),
        Err(error) => {
            tracing::warn!(export = export.name, ?action, ?error, "a request failed");
            Err(refuse(errno_of(&error, &action), peer_text(error.to_string().as_bytes())))
        }
    }
}

async fn run(
    export: &Export,
    action: &Action,
    buffer: Option<Buffer>,
    memory: &Allowance,
) -> Result<Outcome> {
    let own = || buffer_missing(action);
    match action {
        Action::Read(range, fragments) => {
            let buffer = read(export, range.offset(), buffer.ok_or_else(own)?).await?;
            return Ok(Outcome::Data(buffer, *fragments));
        }
        Action::Status(range, contexts, extents_max) => {
            let mut told = Vec::new();
            for context in contexts {
                told.push((context.id, context.runs(export, *range, *extents_max).await?));
            }
            return Ok(Outcome::Status(told));
        }
        Action::Cache(range) => cache(export, *range, memory).await?,
        Action::Flush => {
            if let Some(sink) = &export.sink {
                sink.flush().await?;
            }
        }
        Action::Write(range, durability) => {
            write(sink(export), range.offset(), buffer.ok_or_else(own)?).await?;
            settle(export, *durability).await?;
        }
        Action::Zero(range, mode, durability) if !range.is_empty() => {
            sink(export).zero(*range, *mode).await?;
            settle(export, *durability).await?;
        }
        Action::Trim(range, durability) if !range.is_empty() => {
            // What was trimmed reads as anything: zeroes will do where they cost nothing.
            match sink(export).zero(*range, ZeroMode::FastOnly).await {
                Err(error) if error.kind() == Kind::Unsupported => {}
                result => result?,
            }
            settle(export, *durability).await?;
        }
        Action::Zero(..) | Action::Trim(..) => {}
    }
    Ok(Outcome::Done)
}

/// FUA.
async fn settle(export: &Export, durability: Durability) -> Result<()> {
    match durability {
        Durability::Later => Ok(()),
        Durability::Now => sink(export).flush().await,
    }
}

fn sink(export: &Export) -> &dyn BlockSink {
    &**export.sink.as_ref().expect("a change of a read-only export was refused")
}

/// Fills the whole buffer, in as many pieces as the source wants.
async fn read(export: &Export, offset: u64, mut buffer: Buffer) -> Result<Buffer> {
    let len = buffer.len();
    let piece_max = piece_max(export.source.geometry().request_bytes_max);
    for start in (0..len).step_by(piece_max) {
        let window = start..len.min(start + piece_max);
        buffer = buffer.with_window(window);
        buffer = export.source.read(offset + start as u64, buffer).await?;
    }
    Ok(buffer.whole())
}

async fn write(sink: &dyn BlockSink, offset: u64, buffer: Buffer) -> Result<()> {
    let piece_max = piece_max(sink.geometry().request_bytes_max);
    if buffer.len() <= piece_max {
        return if buffer.is_empty() { Ok(()) } else { sink.write(offset, buffer).await };
    }
    for (index, piece) in buffer.chunks(piece_max).enumerate() {
        // Copied: a sink takes its buffer, and this way is for sinks with small requests only.
        let piece = Buffer::unbudgeted(piece.to_vec());
        sink.write(offset + (index * piece_max) as u64, piece).await?;
    }
    Ok(())
}

fn piece_max(request_bytes_max: u64) -> usize {
    usize::try_from(request_bytes_max).unwrap_or(usize::MAX).clamp(1, isize::MAX.unsigned_abs())
}

/// Reads through the source, whose caches remember.
async fn cache(export: &Export, range: ByteRange, memory: &Allowance) -> Result<()> {
    let range = ByteRange::new(range.offset(), range.len().min(CACHE_BYTES_MAX));
    let align_bytes = export.geometry().align_bytes;
    for piece in range.pieces(CACHE_PIECE_BYTES.max(align_bytes)) {
        let len = usize::try_from(piece.len()).expect("a piece is a MiB");
        read(export, piece.offset(), memory.take(len).await).await?;
    }
    Ok(())
}

fn buffer_missing(action: &Action) -> Error {
    Error::new(Kind::Internal, format!("{action:?} without a buffer"))
}

/// The number on the wire. ENOTSUP is an answer to a fast zero only.
fn errno_of(error: &Error, action: &Action) -> u32 {
    match error.kind() {
        Kind::Permission => errno::EPERM,
        Kind::NoSpace => errno::ENOSPC,
        Kind::Unsupported if matches!(action, Action::Zero(_, ZeroMode::FastOnly, _)) => {
            errno::ENOTSUP
        }
        Kind::Cancelled => errno::ESHUTDOWN,
        _ => errno::EIO,
    }
}
