//! Pipes: bytes in order, without a size, each only once.
//!
//! [`PipeSink`] makes a sink of one: each request waits for its turn. It needs a copy that begins
//! its requests in the order of their offsets and takes their buffers before (the copy engine
//! does): then the one whose turn it is has all it needs, whatever the others hold.
//! [`PipeReader`] cannot be a source: nobody knows its size before its end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use super::blocking;
use crate::block::{BlockSink, Buffer, ByteRange, Geometry, ZeroMode};
use crate::error::{Error, Kind, Result};

/// Requests that may wait for their turn: reads ahead of the pipe.
const IN_FLIGHT: usize = 8;

/// Zeroes are written in pieces of this size.
const ZEROES_BYTES: usize = 256 << 10;

/// The writing end of a pipe, which gets all bytes of a disk in order.
#[derive(Debug)]
pub struct PipeSink {
    file: Arc<File>,
    name: String,
    size_bytes: u64,
    /// The offset whose turn it is.
    turn: watch::Sender<u64>,
}

impl PipeSink {
    /// Writes a disk of `size_bytes` to `file`, which is called `name` in errors.
    pub fn new(file: File, name: impl Into<String>, size_bytes: u64) -> Self {
        let turn = watch::Sender::new(0);
        Self { file: Arc::new(file), name: name.into(), size_bytes, turn }
    }

    /// Waits for the turn of `range`, writes its pieces, and gives the turn on.
    async fn put(
        &self,
        range: ByteRange,
        work: impl FnOnce(&File) -> io::Result<()> + Send + 'static,
    ) -> Result<()> {
        let mut turn = self.turn.subscribe();
        let mine = turn.wait_for(|at| *at == range.offset()).await;
        mine.expect("the sender lives as long as the sink");
        let (file, name) = (Arc::clone(&self.file), self.name.clone());
        blocking(move || {
            work(&file).map_err(|e| Error::io(format!("cannot write {range} to {name}"), e))
        })
        .await?;
        self.turn.send_replace(range.end());
        Ok(())
    }
}

#[async_trait]
impl BlockSink for PipeSink {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes,
            align_bytes: 1,
            preferred_bytes: 4096,
            request_bytes_max: 32 << 20,
            in_flight: IN_FLIGHT,
        }
    }

    fn can_zero(&self) -> bool {
        false
    }

    async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
        let range = ByteRange::new(offset, buffer.len() as u64);
        self.put(range, move |mut file| file.write_all(&buffer)).await
    }

    async fn zero(&self, range: ByteRange, _mode: ZeroMode) -> Result<()> {
        self.put(range, move |mut file| {
            let zeroes = vec![0; ZEROES_BYTES];
            range.pieces(ZEROES_BYTES as u64).try_for_each(|piece| {
                file.write_all(&zeroes[..usize::try_from(piece.len()).expect("a piece is small")])
            })
        })
        .await
    }

    async fn keep(&self, range: ByteRange) -> Result<()> {
        let message = format!("{} has no base to keep {range} from", self.name);
        Err(Error::new(Kind::Unsupported, message))
    }

    async fn flush(&self) -> Result<()> {
        // What is in a pipe is the reader's.
        Ok(())
    }
}

/// The reading end of a pipe.
#[derive(Debug)]
pub struct PipeReader {
    file: Arc<Mutex<File>>,
    name: String,
}

impl PipeReader {
    /// Reads from `file`, which is called `name` in errors.
    pub fn new(file: File, name: impl Into<String>) -> Self {
        Self { file: Arc::new(Mutex::new(file)), name: name.into() }
    }

    /// Fills the buffer from its front and says how far; less than all of it is the end. Not
    /// cancel-safe: what a dropped call had read is lost.
    pub async fn fill(&self, mut buffer: Buffer) -> Result<(Buffer, usize)> {
        let (file, name) = (Arc::clone(&self.file), self.name.clone());
        blocking(move || {
            // One call at a time, on a thread that may wait: a lock is right.
            let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
            let mut done = 0;
            while done < buffer.len() {
                match file.read(&mut buffer[done..]) {
                    Ok(0) => break,
                    Ok(count) => done += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(Error::io(format!("cannot read {name}"), error)),
                }
            }
            Ok((buffer, done))
        })
        .await
    }
}
