//! From a pipe, whose size is known at its end only: read in order, written many at a time.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::step::Copying;
use super::{Flush, Options, REQUEST_BYTES_DIRECT, Report, Shape, Tail, clear};
use crate::block::file::PipeReader;
use crate::block::memory::MemoryDisk;
use crate::block::{BlockSink, BlockSource, ByteRange};
use crate::control::{Control, DiskProgress};
use crate::error::{Error, Kind, Result};

/// Copies all that comes out of `pipe` to the front of `sink`. More than the sink holds is an
/// error, once the sink is full. Stops as [`super::copy`] does.
///
/// Nothing may be cleared in advance ([`super::Destination::Overwritten`]): what lies behind the
/// end of the pipe is to stay.
pub async fn copy_pipe(
    pipe: &PipeReader,
    sink: Arc<dyn BlockSink>,
    options: &Options,
    control: &Control,
    progress: &Arc<DiskProgress>,
) -> Result<Report> {
    let geometry = sink.geometry();
    let shape = Shape::between((&geometry, &geometry), options, (REQUEST_BYTES_DIRECT, 1))?;
    // Steps only write here; what they would read from is never asked.
    let nothing: Arc<dyn BlockSource> = Arc::new(MemoryDisk::zeroed(0));
    let zeroes = clear::prepare((&nothing, &sink), options, shape, control).await?;
    let ends = (nothing, Arc::clone(&sink));
    let job = Arc::new(Copying::new(ends, options, (shape, zeroes), None));
    let mut writes = JoinSet::new();
    let report = read_all(pipe, (&job, &mut writes), options, (control, progress)).await;
    if report.is_err() {
        writes.shutdown().await;
    } else if options.flush == Flush::AtEnd {
        control.run(job.flush()).await?;
    }
    report
}

async fn read_all(
    pipe: &PipeReader,
    (job, writes): (&Arc<Copying>, &mut JoinSet<Result<Report>>),
    options: &Options,
    (control, progress): (&Control, &DiskProgress),
) -> Result<Report> {
    let shape = job.shape;
    let len = usize::try_from(shape.request_bytes).expect("a request fits memory");
    let (mut at, mut report) = (0_u64, Report::default());
    loop {
        let take = async { Ok(options.budget.take(len).await) };
        let buffer = control.run(take).await?;
        let (buffer, count) = control.run(pipe.fill(buffer)).await?;
        let range = ByteRange::new(at, count as u64);
        if range.end() > shape.size_bytes {
            let message = format!(
                "{} goes on after the {} bytes {} holds",
                options.source_name, shape.size_bytes, options.sink_name
            );
            return Err(Error::new(Kind::NoSpace, message).hint("make the target larger"));
        }
        let end = count < len;
        let odd = !range.end().is_multiple_of(shape.cell_bytes) && range.end() < shape.size_bytes;
        if end && odd && options.tail == Tail::Kept {
            let message = format!(
                "{} ends at {}, and {} takes multiples of {} bytes",
                options.source_name,
                range.end(),
                options.sink_name,
                shape.cell_bytes
            );
            return Err(Error::new(Kind::Unsupported, message));
        }
        if count > 0 {
            let job = Arc::clone(job);
            writes.spawn(async move { job.write(range, buffer.with_window(0..count)).await });
        }
        while end || writes.len() >= shape.requests {
            let next = async { Ok(writes.join_next().await) };
            let Some(done) = control.run(next).await? else { break };
            let done =
                done.map_err(|e| Error::new(Kind::Internal, "a step of the copy died").source(e))??;
            report.written_bytes += done.written_bytes;
            report.zero_bytes += done.zero_bytes;
            let covered = done.written_bytes + done.zero_bytes;
            progress.add(covered, covered);
        }
        at = range.end();
        if end {
            report.read_bytes = at;
            return Ok(report);
        }
    }
}
