//! What people ask of an export beyond what a disk that is copied needs: TRIM, CACHE, FUA, and reads
//! that come in one piece.
//!
//! A server is sent only what it said it can do. Where it cannot do FUA, a flush afterwards means the
//! same.

use std::sync::Arc;

use super::client::Client;
use super::wire::{command, command_flag, export};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ZeroMode};
use crate::error::{Error, Kind, Result};

/// Largest TRIM or CACHE: as long as our WRITE_ZEROES, for the same reasons.
const RANGE_BYTES_MAX: u64 = 128 << 20;

/// A change of an export, or advice about it.
#[derive(Debug)]
pub enum Order {
    /// These bytes at this offset.
    Write(u64, Buffer),
    /// Zeroes.
    Zero(ByteRange, ZeroMode),
    /// Nobody needs this range: its content is undefined afterwards, for NBD servers as for disks.
    Trim(ByteRange),
    /// This range will be read soon.
    Cache(ByteRange),
}

/// Whether what is ordered is durable when it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durable {
    /// Yes: FUA, or a flush.
    Yes,
    /// Only after a later flush.
    Later,
}

impl Client {
    /// Does it, in as many requests as it takes. Not cancel-safe: dropped, a part may have been done.
    pub async fn order(&self, order: Order, durable: Durable) -> Result<()> {
        let fua = durable == Durable::Yes && self.export().has(export::SEND_FUA);
        let flag = if fua { command_flag::FUA } else { 0 };
        // Zeroes may turn out to need requests of another kind: flushing covers all of them.
        let covered = durable == Durable::Later || fua && !matches!(order, Order::Zero(..));
        match order {
            Order::Write(offset, buffer) => {
                self.check(offset, buffer.len() as u64)?;
                let buffer = Arc::new(buffer);
                for at in self.payloads(buffer.len()) {
                    let (start, part) = (offset + at.start as u64, Arc::clone(&buffer));
                    self.pick().write((start, flag), part, at).await?;
                }
            }
            Order::Zero(range, mode) => self.zero(range, mode).await?,
            Order::Trim(range) => {
                self.need(export::SEND_TRIM, "TRIM")?;
                self.each(command::TRIM, flag, range).await?;
            }
            Order::Cache(range) => {
                self.need(export::SEND_CACHE, "CACHE")?;
                return self.each(command::CACHE, 0, range).await;
            }
        }
        if covered { Ok(()) } else { self.flush().await }
    }

    /// Fills the buffer's window from one unfragmented reply (DF); `Kind::Unsupported` if the server
    /// cannot do that, or not at this length.
    pub async fn read_whole(&self, offset: u64, buffer: Buffer) -> Result<Buffer> {
        self.check(offset, buffer.len() as u64)?;
        self.need(export::SEND_DF, "DF")?;
        let len = buffer.len();
        if len as u64 > BlockSource::geometry(self).request_bytes_max {
            let message = format!("{} bytes are more than NBD server {} sends", len, self.peer());
            return Err(Error::new(Kind::Unsupported, message));
        }
        let read = self.pick().read((offset, command_flag::DF), buffer, 0..len).await;
        read.map_err(|error| match error.errno() {
            Some(super::wire::errno::EOVERFLOW) => {
                Error::new(Kind::Unsupported, "the reply would not be one piece").source(error)
            }
            _ => error.into(),
        })
    }

    fn need(&self, flag: u16, what: &str) -> Result<()> {
        if self.export().has(flag) {
            return Ok(());
        }
        let message = format!("NBD server {} has no {what} for this export", self.peer());
        Err(Error::new(Kind::Unsupported, message))
    }

    /// One command over a range, in pieces.
    async fn each(&self, command: u16, flags: u16, range: ByteRange) -> Result<()> {
        self.check(range.offset(), range.len())?;
        for piece in range.pieces(RANGE_BYTES_MAX) {
            self.pick().plain(command, flags, piece).await.map_err(Error::from)?;
        }
        Ok(())
    }
}
