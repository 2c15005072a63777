//! Bytes to lines, bounded.
//!
//! Both protocols are JSON texts, one a line. A peer that never ends its line costs at most the
//! limit; memory grows with what was really received, never with what was announced.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt};

/// Room asked for per read.
const READ_BYTES: usize = 64 * 1024;

/// Splits a byte stream into lines of at most a fixed length.
pub(crate) struct LineReader {
    io: Box<dyn AsyncRead + Send + Unpin>,
    buffer: Vec<u8>,
    /// Bytes of `buffer` known to hold no line end.
    scanned: usize,
    line_bytes_max: usize,
}

/// Why there is no further line.
#[derive(Debug)]
pub(crate) enum LineError {
    /// The stream ended; `partial` if within a line.
    Ended { partial: bool },
    /// The line is longer than the limit.
    TooLong,
    /// Reading failed.
    Io(io::Error),
}

impl LineReader {
    pub(crate) fn new(io: Box<dyn AsyncRead + Send + Unpin>, line_bytes_max: usize) -> Self {
        Self { io, buffer: Vec::new(), scanned: 0, line_bytes_max }
    }

    /// The next line without its end. Cancel-safe: what was read stays in the buffer.
    pub(crate) async fn next(&mut self) -> Result<Vec<u8>, LineError> {
        loop {
            if let Some(at) = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(self.scanned + at + 1);
                let mut line = std::mem::replace(&mut self.buffer, rest);
                self.scanned = 0;
                line.truncate(line.trim_ascii_end().len());
                return Ok(line);
            }
            self.scanned = self.buffer.len();
            if self.scanned > self.line_bytes_max {
                return Err(LineError::TooLong);
            }
            self.buffer.reserve(READ_BYTES);
            match self.io.read_buf(&mut self.buffer).await {
                Ok(0) => return Err(LineError::Ended { partial: self.scanned > 0 }),
                Ok(_) => {}
                Err(error) => return Err(LineError::Io(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_come_whole_however_they_arrive() {
        let (mut peer, ours) = tokio::io::duplex(3);
        let mut lines = LineReader::new(Box::new(ours), 100);
        let writer = tokio::spawn(async move {
            tokio::io::AsyncWriteExt::write_all(&mut peer, b"{\"a\":1}\r\n\n{}\npart").await
        });
        assert_eq!(lines.next().await.unwrap(), b"{\"a\":1}");
        assert_eq!(lines.next().await.unwrap(), b"");
        assert_eq!(lines.next().await.unwrap(), b"{}");
        assert!(matches!(lines.next().await, Err(LineError::Ended { partial: true })));
        writer.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_endless_line_costs_no_more_than_the_limit() {
        let mut lines = LineReader::new(Box::new(tokio::io::repeat(b'x')), 1 << 20);
        assert!(matches!(lines.next().await, Err(LineError::TooLong)));
        assert!(lines.buffer.capacity() <= 4 << 20);
    }
}
