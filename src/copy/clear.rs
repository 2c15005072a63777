//! What becomes of zeroes, found out before the first write.
//!
//! In order of cost (Blake and Jones, "Making the Most of NBD"):
//! 1. nothing, where the sink is known to read as zero: by its nature, by the caller's word, or by
//!    what one query says of it;
//! 2. the whole sink cleared in advance, if the sink promises that this is fast
//!    ([`ZeroMode::FastOnly`]) and keeps the promise: two small pieces go first and are timed,
//!    because there are servers that say "fast" and write. Before that one block tells whether the
//!    sink is the source under another name ([`super::canary`]);
//! 3. each hole for itself, less what the query says is zero at its ends.
//!
//! Nothing is cleared in advance where space is to be allocated: it would be allocated twice.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::canary::{Canary, canary};
use super::{Destination, Options, Shape, Tail, Zeroes};
use crate::block::{BlockSink, BlockSource, ByteRange, ExtentKind, Geometry, ZeroMode};
use crate::control::Control;
use crate::error::{Kind, Result};
use crate::units::{GIB, MIB};

/// Queries about a disk that goes on saying "zero": 3 GiB each on servers with 32-bit lengths.
pub(super) const QUERIES_MAX: usize = 4096;

/// Smaller sinks are cleared by one request, without a trial.
const TRIAL_SIZE_BYTES: u64 = 16 * MIB;

/// The trials' share of the sink, and their largest sizes.
const TRIALS: [(u64, u64); 2] = [(64, GIB / 4), (16, GIB)];

/// A trial that takes less is fast enough, whatever its size: it is less than 7 % of the copy.
const TRIAL: Duration = Duration::from_millis(100);

/// Slower clearing (between the two trials, so that latency does not count) is no faster than
/// writing.
const FAST_BYTES_PER_SECOND: f64 = 1_000_000_000.0;

/// What to do about zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ZeroPolicy {
    /// The sink reads as zero all over.
    LeaveOut,
    /// Made by the sink, except in these ranges, which read as zero; sorted and disjoint.
    Make(ZeroMode, Vec<ByteRange>),
}

impl ZeroPolicy {
    /// What of a range of zeroes has to be made, and how.
    pub(super) fn needed(&self, range: ByteRange) -> Option<(ByteRange, ZeroMode)> {
        let Self::Make(mode, known) = self else { return None };
        let holding = |at: u64| {
            let index = known.partition_point(|zero| zero.end() <= at);
            known.get(index).filter(|zero| zero.offset() <= at)
        };
        let mut needed = range;
        if let Some(zero) = holding(range.offset()) {
            needed = ByteRange::between(zero.end().min(range.end()), range.end());
        }
        if needed.is_empty() {
            return None;
        }
        if let Some(zero) = holding(range.end() - 1) {
            needed = ByteRange::between(needed.offset(), zero.offset().max(needed.offset()));
        }
        (!needed.is_empty()).then_some((needed, *mode))
    }
}

/// Looks at the sink and clears it in advance where that is cheap; fails when that would clear the
/// source. What was cleared stays cleared, and was to be overwritten. Stops when `control` asks for it;
/// cancel-safe ([`super::canary`]).
pub(super) async fn prepare(
    (source, sink): (&Arc<dyn BlockSource>, &Arc<dyn BlockSink>),
    options: &Options,
    shape: Shape,
    control: &Control,
) -> Result<ZeroPolicy> {
    if options.zeroes == Zeroes::Allocated {
        return Ok(ZeroPolicy::Make(ZeroMode::Allocated, Vec::new()));
    }
    if options.destination == Destination::Zero || sink.starts_zero() {
        return Ok(ZeroPolicy::LeaveOut);
    }
    let whole = shape.range();
    let whole = match options.tail {
        Tail::Kept => whole,
        Tail::Zero => {
            let Geometry { align_bytes, size_bytes, .. } = sink.geometry();
            whole.widen(align_bytes, size_bytes)
        }
    };
    if options.destination == Destination::AsItSays || whole.is_empty() {
        return Ok(ZeroPolicy::Make(ZeroMode::Sparse, Vec::new()));
    }
    let context = |what: &str| format!("cannot {what} {}", options.sink_name);
    let known = control.run(look(&**sink, whole)).await;
    let known = known.map_err(|e| e.context(context("look at")))?;
    if known == [whole] {
        return Ok(ZeroPolicy::LeaveOut);
    }
    let cleared = match canary((source, sink), options, shape, control).await? {
        Canary::Cleared => {
            let cleared = control.run(clear(&**sink, (whole.end(), shape.cell_bytes))).await;
            cleared.map_err(|e| e.context(context("clear")))?
        }
        Canary::Kept => 0,
    };
    tracing::debug!(?cleared, known = known.len(), "what the destination holds");
    if cleared == whole.end() {
        return Ok(ZeroPolicy::LeaveOut);
    }
    Ok(ZeroPolicy::Make(ZeroMode::Sparse, joined(cleared, known)))
}

/// The ranges that read as zero, as far as one answer tells; more is asked only as long as all of
/// the sink is zero.
async fn look(sink: &dyn BlockSink, whole: ByteRange) -> Result<Vec<ByteRange>> {
    let mut zero_end = whole.offset();
    for _ in 0..QUERIES_MAX {
        let map = sink.existing(ByteRange::between(zero_end, whole.end())).await?;
        assert!(map.start() == zero_end && map.end() > zero_end, "a map makes progress");
        let mut zeroes: Vec<_> =
            map.iter().filter(|e| e.kind == ExtentKind::Zero).map(|e| e.range).collect();
        let all = zeroes == [map.range()];
        if all {
            zero_end = map.end();
        }
        if !all || zero_end == whole.end() {
            let before =
                ByteRange::between(whole.offset(), if all { map.start() } else { zero_end });
            if let Some(first) = zeroes.first_mut().filter(|first| first.offset() == before.end()) {
                *first = ByteRange::between(before.offset(), first.end());
            } else if !before.is_empty() {
                zeroes.insert(0, before);
            }
            return Ok(zeroes);
        }
    }
    Ok(vec![ByteRange::between(whole.offset(), zero_end)])
}

/// Clears the sink from the front, as far as that is fast; where that ended.
async fn clear(sink: &dyn BlockSink, (size_bytes, cell_bytes): (u64, u64)) -> Result<u64> {
    let mut at = 0;
    let mut before: Option<(u64, Duration)> = None;
    for (share, bytes_max) in TRIALS.iter().filter(|_| size_bytes > TRIAL_SIZE_BYTES) {
        let wanted = (size_bytes / share).min(*bytes_max);
        let len = wanted.next_multiple_of(cell_bytes.max(MIB)).min(size_bytes - at);
        let begun = Instant::now();
        if !fast_zero(sink, ByteRange::new(at, len)).await? {
            return Ok(at);
        }
        at += len;
        let took = begun.elapsed();
        if let Some((less, in_time)) = before.filter(|_| took > TRIAL) {
            #[allow(clippy::cast_precision_loss, reason = "an estimate")]
            let more_bytes = len.saturating_sub(less) as f64;
            let more_seconds = took.saturating_sub(in_time).as_secs_f64();
            if more_bytes < more_seconds * FAST_BYTES_PER_SECOND {
                tracing::debug!(?took, len, "the destination says fast and is not");
                return Ok(at);
            }
        }
        before = Some((len, took));
    }
    let rest = ByteRange::between(at, size_bytes);
    if rest.is_empty() || fast_zero(sink, rest).await? {
        at = size_bytes;
    }
    Ok(at)
}

/// Whether the sink cleared `range` because that is fast.
pub(super) async fn fast_zero(sink: &dyn BlockSink, range: ByteRange) -> Result<bool> {
    match sink.zero(range, ZeroMode::FastOnly).await {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == Kind::Unsupported => Ok(false),
        Err(error) => Err(error),
    }
}

/// The bytes up to `cleared` and those of `known`, sorted and disjoint.
fn joined(cleared: u64, known: Vec<ByteRange>) -> Vec<ByteRange> {
    let front = ByteRange::between(0, cleared);
    let beyond = known.into_iter().filter(|zero| zero.end() > cleared);
    let beyond = beyond.map(|zero| ByteRange::between(zero.offset().max(cleared), zero.end()));
    std::iter::once(front).filter(|front| !front.is_empty()).chain(beyond).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn make(known: &[(u64, u64)]) -> ZeroPolicy {
        let known = known.iter().map(|(start, end)| ByteRange::between(*start, *end)).collect();
        ZeroPolicy::Make(ZeroMode::Sparse, known)
    }

    #[test]
    fn only_what_is_not_known_to_be_zero_is_made() {
        let policy = make(&[(0, 10), (20, 30), (40, 50)]);
        for (range, needed) in [
            ((0, 10), None),
            ((2, 8), None),
            ((5, 15), Some((10, 15))),
            ((12, 25), Some((12, 20))),
            ((5, 25), Some((10, 20))),
            ((5, 45), Some((10, 40))),
            ((30, 40), Some((30, 40))),
            ((50, 60), Some((50, 60))),
        ] {
            let found = policy.needed(ByteRange::between(range.0, range.1)).map(|(r, _)| r);
            assert_eq!(found, needed.map(|(a, b)| ByteRange::between(a, b)), "{range:?}");
        }
        assert_eq!(ZeroPolicy::LeaveOut.needed(ByteRange::new(0, 5)), None);
    }

    #[test]
    fn what_was_cleared_joins_what_was_known() {
        let range = ByteRange::between;
        let known = vec![range(0, 5), range(8, 20), range(30, 40)];
        assert_eq!(joined(10, known.clone()), [range(0, 10), range(10, 20), range(30, 40)]);
        assert_eq!(joined(0, known.clone()), known);
    }
}
