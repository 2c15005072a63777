//! One step of a copy: from the source's bytes to the sink's.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use super::clear::ZeroPolicy;
use super::hash::HashSink;
use super::plan::Step;
use super::sparse::{Run, runs};
use super::{Options, Report, Shape, Tail, Unchanged};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange};
use crate::error::{Error, Result};

/// What all steps of a copy share.
pub(super) struct Copying {
    pub(super) source: Arc<dyn BlockSource>,
    pub(super) sink: Arc<dyn BlockSink>,
    pub(super) shape: Shape,
    pub(super) unchanged: Unchanged,
    pub(super) source_name: String,
    pub(super) sink_name: String,
    pub(super) zeroes: ZeroPolicy,
    /// Block size in which data is searched for zeroes.
    pub(super) detect_bytes: Option<u64>,
    /// Largest read of the source, a multiple of its alignment.
    read_bytes_max: u64,
    pub(super) source_align_bytes: u64,
    tail: Tail,
    /// Sees everything that is read, in whole leaves.
    hash: Option<Arc<HashSink>>,
}

impl Copying {
    pub(super) fn new(
        (source, sink): (Arc<dyn BlockSource>, Arc<dyn BlockSink>),
        options: &Options,
        (shape, zeroes): (Shape, ZeroPolicy),
        hash: Option<Arc<HashSink>>,
    ) -> Self {
        let detect_bytes = options.zeroes.detect_bytes();
        let detect_bytes =
            detect_bytes.filter(|_| sink.can_zero() || zeroes == ZeroPolicy::LeaveOut);
        let geometry = source.geometry();
        let read_max = geometry.request_bytes_max.max(geometry.align_bytes);
        Self {
            detect_bytes: detect_bytes
                .map(|bytes| bytes.max(sink.geometry().align_bytes).min(shape.request_bytes)),
            read_bytes_max: read_max - read_max % geometry.align_bytes,
            source_align_bytes: geometry.align_bytes,
            source,
            sink,
            shape,
            unchanged: options.unchanged,
            tail: options.tail,
            source_name: options.source_name.clone(),
            sink_name: options.sink_name.clone(),
            zeroes,
            hash,
        }
    }

    /// Does a step; a read comes with the buffer for its range. Abandoned when dropped.
    pub(super) async fn run(&self, step: Step, buffer: Option<Buffer>) -> Result<Report> {
        match (step, buffer) {
            (Step::Keep(range), _) => {
                let kept = self.sink.keep(range).await;
                kept.map_err(|e| self.sink_failed("keep", range, e))?;
                Ok(Report { kept_bytes: range.len(), ..Report::default() })
            }
            (Step::Zero(range), _) => {
                if let Some(hash) = &self.hash {
                    hash.pass_zeroes(range);
                }
                self.zero(range).await
            }
            (Step::Read { range, span }, Some(buffer)) => {
                let span = span.widen(self.source_align_bytes, self.shape.size_bytes);
                let mut buffer = self.read(range, span, buffer).await?;
                if let Some(hash) = &self.hash {
                    buffer = hash.pass(range.offset(), buffer).await?;
                }
                let mut report = self.write(range, buffer).await?;
                report.read_bytes = span.len();
                Ok(report)
            }
            (Step::Read { .. }, None) => unreachable!("a read comes with its buffer"),
        }
    }

    /// Reads `span` of `range` and zeroes the rest: buffers carry old bytes.
    async fn read(&self, range: ByteRange, span: ByteRange, buffer: Buffer) -> Result<Buffer> {
        assert!(range.contains(span), "a read within its step");
        let within = |part: ByteRange| -> Range<usize> {
            let at = |n: u64| usize::try_from(n - range.offset()).expect("a buffer fits memory");
            at(part.offset())..at(part.end())
        };
        let mut buffer = buffer.whole();
        assert_eq!(buffer.len() as u64, range.len(), "a buffer for the whole step");
        let inner = within(span);
        buffer[..inner.start].fill(0);
        buffer[inner.end..].fill(0);
        let mut start = span.offset();
        while start < span.end() {
            let end = start.saturating_add(self.read_bytes_max).min(span.end());
            let part = ByteRange::between(start, end);
            let window = buffer.with_window(within(part));
            let filled =
                self.source.read(start, window).await.map_err(|e| {
                    e.context(format!("cannot read {part} of {}", self.source_name))
                })?;
            assert_eq!(filled.len() as u64, part.len(), "a read fills its window");
            buffer = filled.whole();
            start = end;
        }
        Ok(buffer)
    }

    /// Writes what was read, less the zeroes in it.
    pub(super) async fn write(&self, range: ByteRange, buffer: Buffer) -> Result<Report> {
        let runs = match self.detect_bytes {
            Some(block_bytes) => runs(&buffer, range.offset(), block_bytes),
            None => vec![Run { range, zero: false }],
        };
        let mut report = Report::default();
        let mut rest = buffer;
        for run in runs {
            if run.zero {
                take(&mut rest, run.range);
                report.zero_bytes += self.zero(run.range).await?.zero_bytes;
                continue;
            }
            let pieces = run.range.pieces(self.shape.write_bytes);
            let writes = pieces.map(|piece| {
                let bytes = self.padded(piece, take(&mut rest, piece));
                async move {
                    let written = self.sink.write(piece.offset(), bytes).await;
                    written.map_err(|e| self.sink_failed("write", piece, e))
                }
            });
            at_once(writes.map(Box::pin).collect()).await?;
            report.written_bytes += run.range.len();
        }
        Ok(report)
    }

    async fn zero(&self, range: ByteRange) -> Result<Report> {
        if let Some((needed, mode)) = self.zeroes.needed(range) {
            let needed = ByteRange::between(needed.offset(), self.sink_end(needed));
            let zeroed = self.sink.zero(needed, mode).await;
            zeroed.map_err(|e| self.sink_failed("zero", needed, e))?;
        }
        Ok(Report { zero_bytes: range.len(), ..Report::default() })
    }

    /// Where the sink ends a write of `range`: behind the source's odd end if it has to.
    fn sink_end(&self, range: ByteRange) -> u64 {
        let sink = self.sink.geometry();
        match self.tail {
            Tail::Kept => range.end(),
            Tail::Zero => range.end().next_multiple_of(sink.align_bytes).min(sink.size_bytes),
        }
    }

    /// What is written for `range`, with the zeroes that have to follow it.
    fn padded(&self, range: ByteRange, part: Buffer) -> Buffer {
        let len = usize::try_from(self.sink_end(range) - range.offset()).expect("in memory");
        if len == part.len() {
            return part;
        }
        // A copy of one request in the whole job, outside the budget.
        let mut bytes = part.to_vec();
        bytes.resize(len, 0);
        Buffer::unbudgeted(bytes)
    }

    pub(super) fn sink_failed(&self, what: &str, range: ByteRange, error: Error) -> Error {
        error.context(format!("cannot {what} {range} of {}", self.sink_name))
    }

    pub(super) async fn flush(&self) -> Result<()> {
        let flushed = self.sink.flush().await;
        flushed.map_err(|e| e.context(format!("cannot make {} durable", self.sink_name)))
    }
}

/// The bytes of `range`, with which the rest of a buffer begins.
fn take(rest: &mut Buffer, range: ByteRange) -> Buffer {
    rest.split_to(usize::try_from(range.len()).expect("in memory"))
}

/// Waits for all of them, a few, at once; the first error ends the others.
async fn at_once(mut writes: Vec<Pin<Box<impl Future<Output = Result<()>>>>>) -> Result<()> {
    std::future::poll_fn(|context| {
        let mut failed = None;
        writes.retain_mut(|write| match write.as_mut().poll(context) {
            Poll::Ready(written) => {
                failed = failed.take().or(written.err());
                false
            }
            Poll::Pending => true,
        });
        match failed {
            Some(error) => Poll::Ready(Err(error)),
            None if writes.is_empty() => Poll::Ready(Ok(())),
            None => Poll::Pending,
        }
    })
    .await
}
