//! The reading side of a connection: finds the request of each reply and fills it.
//!
//! Data goes from the socket straight into the request's buffer; only headers pass through a small
//! buffer, so that many short replies cost one system call.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::io::{AsyncReadExt, BufReader};

use super::connection::Shared;
use super::error::{NbdError, lost, violation};
use super::request::{Broken, Expected, InFlight, StatusParser};
use super::stream::ReadHalf;
use super::wire::{self, HeaderStyle, ReplyHeader, be16, be32, be64, chunk, command};

/// Room for the headers of a few dozen short replies; of a large one, this much is copied twice.
const HEADER_BYTES: usize = 1024;
/// Extents are parsed in pieces of this size.
const PIECE_BYTES: usize = 64 << 10;

/// Reads replies until the connection breaks; records why before it returns.
pub(super) async fn run(shared: &Shared, half: ReadHalf) {
    let reader = BufReader::with_capacity(HEADER_BYTES, half);
    let mut replies = Replies { shared, reader, piece: Vec::new() };
    loop {
        if let Err(reason) = replies.next().await {
            return shared.kill(reason);
        }
    }
}

struct Replies<'a> {
    shared: &'a Shared,
    reader: BufReader<ReadHalf>,
    piece: Vec<u8>,
}

impl Replies<'_> {
    /// Reads one reply, or one chunk of one, with all its payload.
    async fn next(&mut self) -> Result<(), NbdError> {
        let mut bytes = [0; 32];
        self.fill(&mut bytes[..4]).await?;
        let magic = be32(&bytes[..4]);
        let Some(rest) = ReplyHeader::rest_len(magic, self.shared.style) else {
            return Err(self.broken(format!("reply magic {magic:#010x}")));
        };
        self.fill(&mut bytes[..rest]).await?;
        let header = ReplyHeader::decode(magic, &bytes[..rest]);
        let (ReplyHeader::Simple { cookie, .. } | ReplyHeader::Chunk { cookie, .. }) = header;
        let Some(mut request) = self.shared.take(cookie) else {
            return Err(self.broken(format!("reply to cookie {cookie:#x}, which is not in flight")));
        };
        let complete = match header {
            ReplyHeader::Simple { error, .. } => self.simple(&mut request, error).await,
            ReplyHeader::Chunk { flags, kind, offset, len, .. } => {
                self.chunk(&mut request, (flags, kind), offset, len).await
            }
        };
        match complete {
            Ok(true) => {
                // The slot first, then its place (which goes with the request).
                self.shared.free(cookie);
                request.finish(&self.shared.peer)
            }
            other => {
                self.shared.put_back(cookie, request);
                other.map(|_| ())
            }
        }
    }

    async fn simple(&mut self, request: &mut InFlight, error: u32) -> Result<bool, NbdError> {
        let structured = self.shared.style == HeaderStyle::Structured;
        if structured && request.command == command::READ {
            return Err(self.broken("a simple reply to READ with structured replies"));
        }
        if error != 0 {
            request.error = Some((error, String::new()));
            return Ok(true);
        }
        let (offset, len) = (request.offset, request.len);
        match request.expected {
            Expected::Plain => {}
            Expected::Read { .. } => {
                let target = request.cover(offset, len).map_err(|rule| self.broken(rule))?;
                self.fill(target).await?;
            }
            Expected::Status { .. } => {
                return Err(self.broken("a simple success to BLOCK_STATUS"));
            }
        }
        Ok(true)
    }

    /// Reads a chunk's payload; whether the reply is complete with it.
    async fn chunk(
        &mut self,
        request: &mut InFlight,
        (flags, kind): (u16, u16),
        offset: Option<u64>,
        len: u64,
    ) -> Result<bool, NbdError> {
        let done = flags & chunk::DONE != 0;
        if let Some(offset) = offset.filter(|offset| *offset != request.offset) {
            return Err(
                self.broken(format!("offset {offset} in the reply to {}", request.describe()))
            );
        }
        request.count_chunk().map_err(|rule| self.broken(rule))?;
        match kind {
            chunk::NONE => {
                if len != 0 || !done {
                    return Err(self.broken("a NONE chunk with payload or without DONE"));
                }
            }
            chunk::OFFSET_DATA => self.data(request, len).await?,
            chunk::OFFSET_HOLE => self.hole(request, len).await?,
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                self.status(request, kind, len).await?;
            }
            _ if kind & chunk::ERROR_BIT != 0 => self.error(request, kind, len).await?,
            _ => return Err(self.broken(format!("chunk of unknown type {kind}"))),
        }
        Ok(done)
    }

    async fn data(&mut self, request: &mut InFlight, len: u64) -> Result<(), NbdError> {
        if len <= 8 {
            return Err(self.broken(format!("data chunk of {len} bytes")));
        }
        let mut offset = [0; 8];
        self.fill(&mut offset).await?;
        let target = request.cover(be64(&offset), len - 8).map_err(|rule| self.broken(rule))?;
        self.fill(target).await
    }

    async fn hole(&mut self, request: &mut InFlight, len: u64) -> Result<(), NbdError> {
        if len != 12 {
            return Err(self.broken(format!("hole chunk of {len} bytes")));
        }
        let mut hole = [0; 12];
        self.fill(&mut hole).await?;
        let (offset, len) = (be64(&hole[..8]), u64::from(be32(&hole[8..])));
        request.cover(offset, len).map_err(|rule| self.broken(rule))?.fill(0);
        Ok(())
    }

    async fn status(
        &mut self,
        request: &mut InFlight,
        kind: u16,
        len: u64,
    ) -> Result<(), NbdError> {
        let (head_len, extents) =
            StatusParser::shape(kind, len, self.shared.style).map_err(|rule| self.broken(rule))?;
        let mut head = [0; 8];
        self.fill(&mut head[..head_len]).await?;
        let mut parser = StatusParser::new(request, &head[..head_len], extents)
            .map_err(|rule| self.broken(rule))?;
        let mut rest = usize::try_from(extents).expect("bounded") * parser.entry_bytes();
        let mut piece = std::mem::take(&mut self.piece);
        while rest > 0 {
            // A multiple of both entry sizes, so no extent is cut.
            let take = rest.min(PIECE_BYTES);
            piece.resize(take, 0);
            self.fill(&mut piece).await?;
            parser.feed(&piece).map_err(|rule| self.broken(rule))?;
            rest -= take;
        }
        self.piece = piece;
        parser.store(request);
        Ok(())
    }

    async fn error(&mut self, request: &mut InFlight, kind: u16, len: u64) -> Result<(), NbdError> {
        // Number, length, message, offset (CVE-2020-10761: texts longer than a string may be).
        let len_max = 6 + wire::STRING_BYTES_MAX + 8;
        let len = usize::try_from(len).ok().filter(|len| (6..=len_max).contains(len));
        let Some(len) = len else {
            return Err(self.broken("an error chunk shorter or longer than one may be"));
        };
        let mut payload = vec![0; len];
        self.fill(&mut payload).await?;
        let (errno, text) = (be32(&payload[..4]), usize::from(be16(&payload[4..6])));
        let expected = match kind {
            chunk::ERROR => Some(6 + text),
            chunk::ERROR_OFFSET => Some(6 + text + 8),
            _ => None,
        };
        let fits = text <= wire::STRING_BYTES_MAX && 6 + text <= len;
        if errno == 0 || !fits || expected.is_some_and(|expected| expected != len) {
            return Err(self.broken("a malformed error chunk"));
        }
        if kind == chunk::ERROR_OFFSET {
            let at = be64(&payload[6 + text..]);
            let end = request.offset.saturating_add(request.len);
            if at < request.offset || at >= end {
                return Err(self.broken(format!("an error at {at}, outside the request")));
            }
        }
        let message = wire::peer_text(&payload[6..6 + text]);
        request.error.get_or_insert((errno, message));
        Ok(())
    }

    async fn fill(&mut self, mut target: &mut [u8]) -> Result<(), NbdError> {
        while !target.is_empty() {
            let read = self.reader.read(target).await.map_err(|e| lost(&self.shared.peer, e))?;
            if read == 0 {
                return Err(lost(&self.shared.peer, std::io::ErrorKind::UnexpectedEof.into()));
            }
            self.shared.moved_bytes.fetch_add(read as u64, Ordering::Relaxed);
            target = &mut target[read..];
        }
        Ok(())
    }

    fn broken(&self, rule: impl Into<Broken>) -> NbdError {
        violation(&self.shared.peer, Arc::from(rule.into()))
    }
}
