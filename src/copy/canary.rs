//! The block that is cleared first: it tells whether the sink is the source under another name, which
//! no name and no address could.
//!
//! ```text
//!  a block of the source that is not zero ► clear it in the sink ► read it in the source
//!       │ no data: cleared                      │ error                │ as it was: cleared
//!       └ none found: kept                      └──────► put back ◄────┘ gone, or an error
//! ```
//!
//! From clearing to putting back it runs in a task of its own, to its end: a copy that is stopped or
//! dropped in between must not be what loses the block. Only the end of the process or of the runtime
//! can, and a stop waits [`ANSWER`] at most for a sink that does not answer.

use std::sync::Arc;
use std::time::Duration;

use super::clear::{QUERIES_MAX, fast_zero};
use super::{Options, Shape};
use crate::block::{BlockSink, BlockSource, Buffer, ByteRange, ExtentKind};
use crate::control::Control;
use crate::error::{Error, Kind, Result};

/// Size of the block, and the most of them looked at for one that is not zero already.
const CANARY: (u64, usize) = (4096, 64);

/// How long a stop waits for requests that are under way. Until the block is as it was: four small ones, of
/// which a disk that spins up takes some seconds for one.
pub(super) const ANSWER: Duration = Duration::from_secs(30);

/// What became of the block.
#[derive(Debug)]
pub(super) enum Canary {
    /// It was cleared, and the source is as it was; or there is nothing in the source to lose.
    Cleared,
    /// It was not: the sink does not clear fast, or no block was found that would tell.
    Kept,
}

/// Clears a block of the sink where the source has data, and fails when the source lost it: then the
/// block is put back. Stops when `control` asks for it, with the block as it was; cancel-safe.
pub(super) async fn canary(
    (source, sink): (&Arc<dyn BlockSource>, &Arc<dyn BlockSink>),
    options: &Options,
    shape: Shape,
    control: &Control,
) -> Result<Canary> {
    if !sink.can_zero() {
        return Ok(Canary::Kept);
    }
    let telling = control.run(telling_block(&**source, shape)).await;
    let telling = telling.map_err(|e| e.context(format!("cannot read {}", options.source_name)))?;
    let (range, bytes) = match telling {
        Telling::Block(range, bytes) => (range, bytes),
        Telling::NoData => return Ok(Canary::Cleared),
        Telling::NotFound => return Ok(Canary::Kept),
    };
    control.check()?;
    let (source_name, sink_name) = (options.source_name.clone(), options.sink_name.clone());
    let trial = Trial { range, bytes, source_name, sink_name };
    let ends = (Arc::clone(source), Arc::clone(sink));
    let mut trial = tokio::spawn(async move { trial.run((&*ends.0, &*ends.1)).await });
    let ended = tokio::select! {
        ended = &mut trial => Some(ended),
        () = control.cancelled() => tokio::time::timeout(ANSWER, &mut trial).await.ok(),
    };
    let Some(ended) = ended else {
        let message = format!(
            "stopped on request while {range} of {} may be zero: it does not answer",
            options.sink_name
        );
        return Err(Error::new(Kind::Cancelled, message));
    };
    let died = |e| Error::new(Kind::Internal, "the clearing of a block died").source(e);
    let canary = ended.map_err(died)??;
    control.check()?;
    Ok(canary)
}

/// A block, on its way from cleared to known.
struct Trial {
    range: ByteRange,
    /// What the source has there.
    bytes: Vec<u8>,
    source_name: String,
    sink_name: String,
}

impl Trial {
    /// Not cancel-safe.
    async fn run(self, (source, sink): (&dyn BlockSource, &dyn BlockSink)) -> Result<Canary> {
        match fast_zero(sink, self.range).await {
            Ok(false) => return Ok(Canary::Kept),
            Ok(true) => {}
            // The answer may be what failed.
            Err(error) => {
                let error = error.context(format!("cannot clear {}", self.sink_name));
                return Err(self.put_back(sink, error).await);
            }
        }
        let error = match read_block(source, self.range).await {
            Ok(now) if now == self.bytes => return Ok(Canary::Cleared),
            Ok(_) => {
                let message = format!(
                    "{} and {} are the same disk: it would be copied to itself",
                    self.source_name, self.sink_name
                );
                Error::new(Kind::Usage, message).hint("name another target")
            }
            Err(error) => error.context(format!("cannot read {}", self.source_name)),
        };
        Err(self.put_back(sink, error).await)
    }

    /// `error`, and that the block is lost if it cannot be put back.
    async fn put_back(self, sink: &dyn BlockSink, error: Error) -> Error {
        let Self { range, bytes, sink_name, .. } = self;
        let written = sink.write(range.offset(), Buffer::unbudgeted(bytes)).await;
        let durable = match written {
            Ok(()) => sink.flush().await,
            Err(error) => Err(error),
        };
        match durable {
            Ok(()) => error,
            Err(lost) => error.context(format!(
                "{range} of {sink_name} may be left zero: it was cleared, and putting it back \
                 failed too ({})",
                lost.in_one_line()
            )),
        }
    }
}

/// A block of the source that is not zero.
enum Telling {
    Block(ByteRange, Vec<u8>),
    /// The source has no data.
    NoData,
    /// None of those looked at.
    NotFound,
}

/// Looks at the beginning of each extent of data, and then in ever larger strides.
async fn telling_block(source: &dyn BlockSource, shape: Shape) -> Result<Telling> {
    let block_bytes = CANARY.0.next_multiple_of(shape.cell_bytes);
    let (mut at, mut looked_at) = (0, 0);
    let mut none = Telling::NoData;
    for _ in 0..QUERIES_MAX {
        if at >= shape.size_bytes {
            return Ok(none);
        }
        let map = source.extents(ByteRange::between(at, shape.size_bytes)).await?;
        assert!(map.end() > at, "a map makes progress");
        at = map.end();
        for extent in map.iter().filter(|extent| extent.kind != ExtentKind::Zero) {
            none = Telling::NotFound;
            let first = extent.range.offset().next_multiple_of(block_bytes);
            let mut stride = block_bytes;
            let mut start = first;
            while start.saturating_add(block_bytes) <= extent.range.end() {
                let range = ByteRange::new(start, block_bytes);
                let bytes = read_block(source, range).await?;
                if bytes.iter().any(|byte| *byte != 0) {
                    return Ok(Telling::Block(range, bytes));
                }
                looked_at += 1;
                if looked_at == CANARY.1 {
                    return Ok(none);
                }
                start = first.saturating_add(stride);
                stride = stride.saturating_mul(2);
            }
        }
    }
    Ok(Telling::NotFound)
}

async fn read_block(source: &dyn BlockSource, range: ByteRange) -> Result<Vec<u8>> {
    let len = usize::try_from(range.len()).expect("a block fits memory");
    let buffer = source.read(range.offset(), Buffer::unbudgeted(vec![0; len])).await?;
    Ok(buffer.to_vec())
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;

    use super::*;
    use crate::block::layer::faulty::{Faults, FaultySink};
    use crate::block::memory::MemoryDisk;
    use crate::block::{Geometry, ZeroMode, conformance};
    use crate::copy::{Destination, copy};

    /// What happens after the first block was cleared.
    #[derive(Clone)]
    enum Then {
        /// The answer is lost.
        NoAnswer,
        /// Somebody asks to stop, and the answer takes this long.
        Stopped(Control, Duration),
    }

    /// A sink with its own idea of what happens then.
    struct Cleared {
        inner: Arc<dyn BlockSink>,
        then: Then,
    }

    #[async_trait]
    impl BlockSink for Cleared {
        fn geometry(&self) -> Geometry {
            self.inner.geometry()
        }

        async fn write(&self, offset: u64, buffer: Buffer) -> Result<()> {
            self.inner.write(offset, buffer).await
        }

        async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
            self.inner.zero(range, mode).await?;
            match &self.then {
                Then::NoAnswer => Err(Error::new(Kind::Connection, "lost on purpose")),
                Then::Stopped(control, delay) => {
                    control.cancel();
                    tokio::time::sleep(*delay).await;
                    Ok(())
                }
            }
        }

        async fn keep(&self, _range: ByteRange) -> Result<()> {
            unreachable!("nothing is kept here")
        }

        async fn flush(&self) -> Result<()> {
            self.inner.flush().await
        }
    }

    /// Copies a disk to itself, and what it holds then.
    async fn onto_itself(then: Then, control: &Control) -> (Error, bool) {
        let disk = Arc::new(MemoryDisk::with_content(conformance::pattern(1 << 20)));
        let sink = Arc::new(Cleared { inner: Arc::clone(&disk) as _, then });
        let error = run(Arc::clone(&disk) as _, sink, control).await;
        (error, disk.content() == conformance::pattern(1 << 20))
    }

    async fn run(source: Arc<dyn BlockSource>, sink: Arc<Cleared>, control: &Control) -> Error {
        let options =
            Options { destination: Destination::Overwritten, ..Options::new("vda", "vdb") };
        let progress = control.add_disk("vda", source.geometry().size_bytes);
        copy(source, sink, &options, control, &progress).await.unwrap_err()
    }

    /// A stop once dropped the copy between the two, and the source had lost a block.
    #[tokio::test(start_paused = true)]
    async fn a_stop_between_clearing_and_putting_back_loses_nothing() {
        let control = Control::new();
        let then = Then::Stopped(control.clone(), Duration::from_secs(10));
        let (error, is_whole) = onto_itself(then, &control).await;
        assert!(is_whole);
        assert_eq!(error.kind(), Kind::Usage, "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_waits_for_no_sink_for_ever_and_names_what_may_be_lost() {
        let control = Control::new();
        let then = Then::Stopped(control.clone(), Duration::from_secs(3600));
        let (error, _) = onto_itself(then, &control).await;
        assert_eq!(error.kind(), Kind::Cancelled);
        assert!(error.to_string().contains("bytes 0..4096 of vdb may be zero"), "{error}");
    }

    #[tokio::test]
    async fn a_block_whose_clearing_failed_after_the_fact_is_put_back() {
        let (error, is_whole) = onto_itself(Then::NoAnswer, &Control::new()).await;
        assert!(is_whole);
        assert_eq!(error.kind(), Kind::Connection);
    }

    #[tokio::test]
    async fn a_block_that_cannot_be_put_back_is_named() {
        let disk = Arc::new(MemoryDisk::with_content(conformance::pattern(1 << 20)));
        let faults = Faults { flush: true, ..Faults::default() };
        let inner = Arc::new(FaultySink::new(Arc::clone(&disk) as _, faults));
        let sink = Arc::new(Cleared { inner, then: Then::NoAnswer });
        let error = run(disk, sink, &Control::new()).await;
        assert!(error.to_string().contains("bytes 0..4096 of vdb may be left zero"), "{error}");
        assert!(error.to_string().contains("flush fails on purpose"), "{error}");
        assert_eq!(error.kind(), Kind::Connection);
    }
}
